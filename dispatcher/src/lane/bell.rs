//! How long a lane's rings take, and what follows from it.
//!
//! The kernel wakes everybody who waits for the sleeper's end of a bell, with interrupts off. A
//! worker can have a million epoll entries wait for it, and a ring then takes the lane some tenths
//! of a second. So a lane measures each ring. After a slow one it does not ring again for a hundred
//! times as long: rings cost it at most one percent of its time. The worker still gets its packets,
//! since each of its sleeps has an upper bound.

use std::os::fd::AsFd;
use std::time::Duration;

use xfan_shm::bell;
use xfan_shm::clock::{thread_cpu_time, ticks, ticks_per_ns, ticks_to_ns};

use super::counters::{Evidence, MemberCounters};

/// The time from which a ring is slow: a hundred times what it takes to wake one thread.
const SLOW: Duration = Duration::from_micros(100);
/// How long the lane does not ring after a slow ring, as a multiple of the ring's CPU time.
const QUIET: u64 = 100;
/// The CPU time from which a ring counts against the worker …
const TOO_SLOW: Duration = Duration::from_millis(10);
/// … and the number of such rings in a row after which the worker is evicted. A hypervisor that
/// takes the CPU away during a ring does not do so three times in a row.
const LIMIT: u32 = 3;

/// What a lane remembers about its rings for one worker.
#[derive(Debug, Default)]
pub(super) struct BellMeter {
    /// A ring was slow. It may have been another thread that had the CPU meanwhile: the following
    /// rings are measured in CPU time, which costs two system calls.
    suspected: bool,
    /// The number of rings in a row that took [`TOO_SLOW`].
    too_slow: u32,
    /// The lane does not ring for `quiet` ticks after `since`.
    since: u64,
    quiet: u64,
}

impl BellMeter {
    /// Rings, unless it has to be quiet.
    pub(super) fn ring(&mut self, doorbell: impl AsFd, counters: &MemberCounters, evidence: &Evidence) {
        let start = ticks();
        if start.wrapping_sub(self.since) < self.quiet {
            return;
        }
        let before = if self.suspected { thread_cpu_time() } else { Duration::ZERO };
        bell::ring(doorbell);
        counters.wakeups.add(1);
        let end = ticks();
        if self.suspected {
            let took = thread_cpu_time().saturating_sub(before);
            if self.took(took, end) {
                evidence.report_slow_bell();
            }
        } else if u128::from(ticks_to_ns(end.wrapping_sub(start))) >= SLOW.as_nanos() {
            self.suspected = true;
        }
    }

    /// A ring took this CPU time. Returns whether the worker is to be evicted.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    fn took(&mut self, took: Duration, now: u64) -> bool {
        self.quiet = 0;
        if took >= SLOW {
            let quiet = took.as_nanos() as f64 * ticks_per_ns();
            (self.since, self.quiet) = (now, (quiet as u64).saturating_mul(QUIET));
        }
        self.too_slow = if took >= TOO_SLOW { self.too_slow + 1 } else { 0 };
        if self.too_slow >= LIMIT {
            self.quiet = u64::MAX;
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_slow_rings_in_a_row_evict() {
        let mut meter = BellMeter::default();
        let millis = Duration::from_millis;
        for took in [millis(10), millis(360), Duration::from_micros(5), millis(10), millis(10)] {
            assert!(!meter.took(took, 0), "{took:?}");
        }
        assert!(meter.took(millis(10), 0));
        assert_eq!(meter.quiet, u64::MAX);
    }

    #[test]
    fn the_lane_is_quiet_after_a_slow_ring_only() {
        let mut meter = BellMeter::default();
        let ns = |ticks: u64| ticks as f64 / ticks_per_ns();
        meter.took(Duration::from_micros(99), 7);
        assert_eq!(meter.quiet, 0);
        meter.took(Duration::from_millis(2), 7);
        assert_eq!(meter.since, 7);
        assert!((ns(meter.quiet) - 2e8).abs() < 1e6, "{}", ns(meter.quiet));
    }

    /// Prints what a measured ring costs: run it with `--ignored --nocapture`, optimized.
    #[test]
    #[ignore = "a measurement"]
    fn cost_of_a_ring() {
        let (ringer, sleeper) = bell::create().unwrap();
        let (counters, evidence, rings) = (MemberCounters::default(), Evidence::default(), 200_000u32);
        let measure = |mut ring: Box<dyn FnMut() + '_>| {
            let start = std::time::Instant::now();
            for _ in 0..rings {
                ring();
                bell::silence(&sleeper);
            }
            start.elapsed() / rings
        };
        for _ in 0..3 {
            let plain = measure(Box::new(|| bell::ring(&ringer)));
            let mut meter = BellMeter::default();
            let metered = measure(Box::new(|| meter.ring(&ringer, &counters, &evidence)));
            let mut meter = BellMeter { suspected: true, ..BellMeter::default() };
            let suspected = measure(Box::new(|| meter.ring(&ringer, &counters, &evidence)));
            println!("plain {plain:?}, measured {metered:?}, suspected {suspected:?}");
        }
    }
}
