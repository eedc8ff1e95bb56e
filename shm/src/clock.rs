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

/// `CLOCK_MONOTONIC` by way of [`ticks`], for a thread that has read them anyway: asks the kernel's clock only every 10 ms,
/// and is less than a microsecond off it.
#[derive(Debug)]
pub struct CoarseClock {
    ticks: u64,
    ns: u64,
    /// Ticks after which to ask again.
    limit: u64,
    /// Nanoseconds per tick, times 2³².
    scale: u64,
}

impl CoarseClock {
    /// A clock that is right.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // both are small and positive
    pub fn new() -> Self {
        let rate = ticks_per_ns();
        let (limit, scale) = ((rate * 1e7) as u64, (f64::from(1 << 16) * f64::from(1 << 16) / rate) as u64);
        let mut clock = CoarseClock { ticks: 0, ns: 0, limit, scale };
        clock.ask();
        clock
    }

    /// The low 32 bits of the time at `now`, in nanoseconds.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // the low bits are what is asked for
    pub fn low_ns(&mut self, now: u64) -> u32 {
        let elapsed = now.wrapping_sub(self.ticks);
        if elapsed > self.limit {
            return self.ask();
        }
        // 10 ms of ticks times 2³² nanoseconds per tick fit 64 bits.
        (self.ns + ((elapsed * self.scale) >> 32)) as u32
    }

    #[cold]
    #[allow(clippy::cast_possible_truncation)] // the low bits are what is asked for
    fn ask(&mut self) -> u32 {
        // A thread that loses its core between the two readings would be wrong by that time until it asks again.
        for _ in 0..4 {
            (self.ticks, self.ns) = (ticks(), monotonic_ns());
            if ticks().wrapping_sub(self.ticks) < self.limit / 10_000 {
                break; // within a microsecond
            }
        }
        self.ns as u32
    }
}

impl Default for CoarseClock {
    fn default() -> Self {
        Self::new()
    }
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

    /// Adds an iteration from `start` to `end` ([`ticks`]), which handled `packets`.
    #[inline(always)]
    pub fn add(&mut self, start: u64, end: u64, packets: u32) {
        let elapsed = end.wrapping_sub(start);
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
    #[cfg_attr(miri, ignore = "time")]
    fn the_coarse_clock_follows_the_clock() {
        let mut clock = CoarseClock::new();
        for _ in 0..3 {
            let before = monotonic_ns();
            let coarse = clock.low_ns(ticks());
            let after = monotonic_ns();
            // Between the two readings, give or take a microsecond.
            #[allow(clippy::cast_possible_truncation)]
            let since = coarse.wrapping_sub((before - 1000) as u32);
            assert!(u64::from(since) <= after - before + 2000, "{before} {coarse} {after}");
            std::thread::sleep(Duration::from_millis(7));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn busy_time_is_summed() {
        let mut meter = BusyMeter::new();
        meter.add(10_000, 11_000, 1);
        let first = meter.busy_ticks();
        assert!(first >= 1000);
        meter.add(11_000, 11_500, 1);
        assert!(meter.busy_ticks() >= first + 500);
    }
}
