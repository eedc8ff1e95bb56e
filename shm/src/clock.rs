//! Time stamps and busy time.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds.
#[inline]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// A cheap counter that all cores share: the TSC on x86-64, nanoseconds elsewhere.
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        // SAFETY: every x86-64 processor has it.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        monotonic_ns()
    }
}

/// Ticks per nanosecond, measured once per process against the monotonic clock, for 20 ms.
pub fn ticks_per_ns() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (start, ticks_then) = (Instant::now(), ticks());
        while start.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        #[allow(clippy::cast_precision_loss)] // 20 ms of ticks fit
        let elapsed = (ticks() - ticks_then) as f64;
        (elapsed / start.elapsed().as_secs_f64() / 1e9).max(f64::MIN_POSITIVE)
    })
}

/// Ticks as nanoseconds.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub fn ticks_to_ns(ticks: u64) -> u64 {
    (ticks as f64 / ticks_per_ns()) as u64
}

/// Sums up the time a thread spends in iterations that found work.
///
/// Where threads share a core, the kernel may take the core away in the middle of an iteration, and other
/// threads' time would be counted. An iteration that took suspiciously long (20 µs and 1 µs for each packet) is therefore
/// left out if the kernel says that the thread was preempted since the last such look; the system call is made for these only.
#[derive(Debug)]
pub struct BusyMeter {
    busy: u64,
    preempted: u64,
    base: u64,
    per_packet: u64,
    switches: i64,
}

impl Default for BusyMeter {
    fn default() -> Self {
        Self::new()
    }
}

impl BusyMeter {
    /// A meter at zero. To be used by the thread that made it.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn new() -> Self {
        let us = (ticks_per_ns() * 1e3) as u64;
        BusyMeter { busy: 0, preempted: 0, base: 20 * us, per_packet: us, switches: preemptions() }
    }

    /// Adds an iteration that began at `start` ([`ticks`]) and handled `packets`, and ends now.
    #[inline(always)]
    pub fn add(&mut self, start: u64, packets: u32) {
        let elapsed = ticks().wrapping_sub(start);
        if elapsed < self.base + self.per_packet * u64::from(packets) {
            self.busy += elapsed;
        } else {
            self.add_long(elapsed);
        }
    }

    #[cold]
    fn add_long(&mut self, elapsed: u64) {
        let switches = preemptions();
        if switches == self.switches {
            self.busy += elapsed;
        } else {
            self.switches = switches;
            self.preempted += 1;
        }
    }

    /// Busy time so far, in ticks.
    #[inline(always)]
    pub fn busy_ticks(&self) -> u64 {
        self.busy
    }

    /// Iterations that were left out.
    pub fn preempted(&self) -> u64 {
        self.preempted
    }
}

/// How often the kernel took the core away from the calling thread.
fn preemptions() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.involuntary_context_switches())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "time")]
    fn ticks_and_nanoseconds_agree() {
        let (ns, start) = (monotonic_ns(), ticks());
        std::thread::sleep(Duration::from_millis(50));
        let (by_ticks, by_clock) = (ticks_to_ns(ticks() - start), monotonic_ns() - ns);
        // The two clocks are read one after the other: a thread may lose its core in between, but not for half the time.
        assert!(
            by_ticks.abs_diff(by_clock) < by_clock / 2,
            "{by_ticks} ns by ticks, {by_clock} ns by the clock"
        );
    }

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn busy_time_is_summed() {
        let mut meter = BusyMeter::new();
        meter.add(ticks().wrapping_sub(1000), 1);
        let first = meter.busy_ticks();
        assert!(first >= 1000);
        meter.add(ticks().wrapping_sub(500), 1);
        assert!(meter.busy_ticks() >= first + 500);
    }
}
