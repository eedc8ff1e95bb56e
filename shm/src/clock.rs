//! Clocks: ticks, time stamps of packets, and busy time.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

/// Reads `CLOCK_MONOTONIC`, in nanoseconds.
#[inline]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// The CPU time that the calling thread has used. Time in which it waits, or in which other threads
/// have its CPU, does not count.
pub fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Reads a cheap counter that all cores share: the TSC on x86-64, the monotonic clock elsewhere.
/// See [`ticks_to_ns`] for its unit.
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        // SAFETY: the intrinsic requires a processor with a TSC: every x86-64 processor has one.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        monotonic_ns()
    }
}

/// The values of the counter and of the clock at one moment.
#[derive(Clone, Copy, Debug)]
struct Moment {
    ticks: u64,
    ns: u64,
}

impl Moment {
    /// Reads both. A thread may lose its core between the two readings, so this takes the quickest
    /// of eight attempts, or the first that takes at most `ticks_enough`. The counter is read after
    /// the clock. A time computed from the moment may therefore be late by the time between the two
    /// readings, but it is never ahead of the clock.
    fn now(ticks_enough: u64) -> Self {
        let (mut least, mut moment) = (u64::MAX, Moment { ticks: 0, ns: 0 });
        for _ in 0..8 {
            let (before, ns, after) = (ticks(), monotonic_ns(), ticks());
            let took = after.wrapping_sub(before);
            if took < least {
                (least, moment) = (took, Moment { ticks: after, ns });
            }
            if least <= ticks_enough {
                break;
            }
        }
        moment
    }
}

/// Ticks per nanosecond. The first call in a process measures the rate against the monotonic clock,
/// which takes 20 ms: with readings that are exact to some 50 ns, the error is a few parts per
/// million.
pub fn ticks_per_ns() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (start, begin) = (Moment::now(0), Instant::now());
        while begin.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        let end = Moment::now(0);
        #[allow(clippy::cast_precision_loss)] // some 20 ms of either fit
        let rate = (end.ticks.wrapping_sub(start.ticks)) as f64 / (end.ns - start.ns) as f64;
        rate.max(f64::MIN_POSITIVE)
    })
}

/// Converts ticks to nanoseconds.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub fn ticks_to_ns(ticks: u64) -> u64 {
    (ticks as f64 / ticks_per_ns()) as u64
}

/// How long a [`CoarseClock`] interpolates between two readings of the kernel's clock. The kernel
/// adjusts its clock by at most 500 parts per million, so within 1 ms the two differ by at most
/// half a microsecond.
const COARSE_NS: u64 = 1_000_000;

/// `CLOCK_MONOTONIC`, interpolated by [`ticks`], for a thread that reads the ticks anyway. It reads
/// the kernel's clock once per millisecond, differs from it by less than a microsecond, and never
/// goes back.
#[derive(Debug)]
pub struct CoarseClock {
    /// The last reading of the kernel's clock.
    asked: Moment,
    /// The latest time returned, in nanoseconds.
    told: u64,
    /// Ticks after a reading until the next one is due.
    limit: u64,
    /// Nanoseconds per tick, times 2³².
    scale: u64,
}

impl CoarseClock {
    /// A clock that shows the kernel's time. The first call in a process takes 20 ms, see
    /// [`ticks_per_ns`].
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // small, positive
    pub fn new() -> Self {
        let rate = ticks_per_ns();
        let scale = (f64::from(1 << 16) * f64::from(1 << 16) / rate) as u64;
        CoarseClock { asked: Moment::now(0), told: 0, limit: (rate * COARSE_NS as f64) as u64, scale }
    }

    /// The time at tick `now`, in nanoseconds.
    #[inline(always)]
    pub fn ns(&mut self, now: u64) -> u64 {
        let elapsed = now.wrapping_sub(self.asked.ticks);
        let ns = if elapsed > self.limit {
            self.ask()
        } else {
            // A millisecond in ticks times the scale is about 10⁶ · 2³², which fits 64 bits.
            self.asked.ns + ((elapsed * self.scale) >> 32)
        };
        self.told = self.told.max(ns);
        self.told
    }

    #[cold]
    fn ask(&mut self) -> u64 {
        self.asked = Moment::now(self.limit / 2500); // 400 ns
        self.asked.ns
    }
}

impl Default for CoarseClock {
    fn default() -> Self {
        Self::new()
    }
}

/// The unit of receive times in descriptors is 2¹⁰ ns = 1,024 ns: 32 bits of it wrap after 73
/// minutes, longer than any packet waits.
const STAMP_SHIFT: u32 = 10;
/// How far a receive time may be ahead of the reader's clock. The clocks of two threads differ by
/// microseconds: a second leaves a wide margin and costs little of the 73 minutes.
const STAMP_AHEAD_NS: u64 = 1_000_000_000;

/// The stamp of a time in nanoseconds: the low 32 bits of the time in units of 1,024 ns. Stamps
/// wrap after 73 minutes.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // the low bits are wanted
pub fn stamp(ns: u64) -> u32 {
    (ns >> STAMP_SHIFT) as u32
}

/// The time of a stamp in nanoseconds, rounded down to 1,024 ns, for a reader whose clock shows
/// `now`. It is right if the stamp is at most 73 minutes old, and at most one second ahead of
/// `now`.
///
/// The clocks of two threads differ slightly. If no time ahead of `now` were allowed, a time just
/// ahead of the reader's clock would be taken for one 73 minutes ago.
///
/// # Examples
///
/// ```
/// use xfan_shm::clock::{stamp, stamped_ns};
///
/// let received = 5_000 * 1_024;
/// assert_eq!(stamped_ns(stamp(received), received + 1_000_000), received);
/// ```
#[inline]
pub fn stamped_ns(stamp: u32, now: u64) -> u64 {
    let latest = now.saturating_add(STAMP_AHEAD_NS) >> STAMP_SHIFT;
    #[allow(clippy::cast_possible_truncation)] // the low bits are wanted
    let age = (latest as u32).wrapping_sub(stamp);
    latest.saturating_sub(age.into()) << STAMP_SHIFT
}

/// Adds up the time that a thread spends in iterations that found work.
///
/// If threads share a core, the kernel may preempt a thread in the middle of an iteration, and the
/// time of other threads would be counted. Such an iteration is left out. To find these, the meter
/// asks the kernel for the thread's preemptions after every iteration that took longer than 20 µs
/// plus 1 µs for each packet. Shorter iterations cost no system call.
#[derive(Debug)]
pub struct BusyMeter {
    /// Busy time so far, in ticks.
    busy: u64,
    /// Iterations left out.
    preempted: u64,
    /// 20 µs in ticks, far longer than the fixed cost of an iteration.
    base: u64,
    /// 1 µs in ticks, longer than most workers need for a packet.
    per_packet: u64,
    /// The thread's preemptions at the last look.
    switches: i64,
}

impl Default for BusyMeter {
    fn default() -> Self {
        Self::new()
    }
}

impl BusyMeter {
    /// A meter at zero. Only the calling thread may use it: it counts the preemptions of one
    /// thread.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn new() -> Self {
        let us = (ticks_per_ns() * 1e3) as u64;
        BusyMeter { busy: 0, preempted: 0, base: 20 * us, per_packet: us, switches: preemptions() }
    }

    /// Adds an iteration from `start` to `end`, in [`ticks`], that handled `packets` packets.
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

    /// Returns the busy time so far, in ticks.
    #[inline(always)]
    pub fn busy_ticks(&self) -> u64 {
        self.busy
    }

    /// Number of iterations left out because the thread was preempted.
    pub fn preempted(&self) -> u64 {
        self.preempted
    }
}

/// How often the kernel has preempted the calling thread.
fn preemptions() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.involuntary_context_switches())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[cfg_attr(miri, ignore = "time")]
    fn ticks_and_nanoseconds_agree() {
        let (ns, start) = (monotonic_ns(), ticks());
        std::thread::sleep(Duration::from_millis(50));
        let (by_ticks, by_clock) = (ticks_to_ns(ticks() - start), monotonic_ns() - ns);
        // The thread may lose its core between reading the two clocks, but hardly for half the
        // time.
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
            let coarse = clock.ns(ticks());
            let after = monotonic_ns();
            // The time lies between the two readings, give or take a microsecond.
            assert!(coarse + 1000 >= before && coarse <= after + 1000, "{before} {coarse} {after}");
            std::thread::sleep(Duration::from_micros(700));
        }
    }

    /// The clock's rate may be wrong, and the kernel may slow its own clock down.
    #[test]
    #[cfg_attr(miri, ignore = "time")]
    fn the_coarse_clock_never_goes_back() {
        for (numerator, denominator) in [(1, 1), (11, 10), (3, 2), (9, 10)] {
            let mut clock = CoarseClock::new();
            clock.scale = clock.scale * numerator / denominator;
            let (mut last, mut asked) = (0, 0);
            while asked < 5 {
                let ask = clock.asked.ns;
                let time = clock.ns(ticks());
                assert!(time >= last, "{last} {time}, {numerator} / {denominator}");
                last = time;
                asked += u32::from(clock.asked.ns != ask);
            }
        }
    }

    proptest! {
        // Few cases under Miri, which is slow. No failure files: Miri's isolation forbids writing
        // them.
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 16 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn a_stamp_is_read_right_by_any_clock_near_it(
            time in 0..1u64 << 62,
            ahead in 0..STAMP_AHEAD_NS - 1024,
            waited in 0..(1u64 << 42) - STAMP_AHEAD_NS - 1024,
        ) {
            let unit = 1 << STAMP_SHIFT;
            // The reader's clock is behind, or the packet has waited in its ring.
            for now in [time.saturating_sub(ahead), time + waited] {
                prop_assert_eq!(stamped_ns(stamp(time), now), time / unit * unit);
            }
        }
    }

    #[test]
    fn a_stamp_is_read_right_where_it_wraps() {
        const LAP: u64 = 1 << 42;
        for time in [0, 1024, LAP - 1024, LAP, LAP + 1024, 7 * LAP] {
            // Received now, just ahead of the clock, an hour ago.
            for now in [time, time.saturating_sub(1024), time + 3_600_000_000_000] {
                assert_eq!(stamped_ns(stamp(time), now), time, "{time} {now}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "system calls")]
    fn busy_time_adds_up() {
        let mut meter = BusyMeter::new();
        meter.add(10_000, 11_000, 1);
        let first = meter.busy_ticks();
        assert!(first >= 1000);
        meter.add(11_000, 11_500, 1);
        assert!(meter.busy_ticks() >= first + 500);
    }
}
