//! The cost of one cache line's transfer between two CPUs: the yardstick of every figure that
//! involves two CPUs.

use std::sync::atomic::{AtomicU64, Ordering};

use core_affinity::CoreId;
use xfan_shm::clock::{ticks, ticks_per_ns};

/// Round trips measured.
const TRIPS: u64 = 5000;

#[repr(align(128))]
struct Line(AtomicU64);

/// The median round trip of a cache line between two CPUs, in nanoseconds. On a virtual machine it
/// may change within seconds, when the host moves its CPUs.
pub fn round_trip_ns(here: usize, there: usize) -> f64 {
    let line = Line(AtomicU64::new(0));
    let line = &line.0;
    let mut trips = std::thread::scope(|scope| {
        scope.spawn(move || {
            core_affinity::set_for_current(CoreId { id: there });
            for trip in 1..=TRIPS {
                while line.load(Ordering::Acquire) != trip {
                    std::hint::spin_loop();
                }
                line.store(trip | 1 << 63, Ordering::Release);
            }
        });
        // A new thread leaves the caller's affinity unchanged.
        let pinging = scope.spawn(move || {
            core_affinity::set_for_current(CoreId { id: here });
            let trips = (1..=TRIPS).map(|trip| {
                let start = ticks();
                line.store(trip, Ordering::Release);
                while line.load(Ordering::Acquire) != trip | 1 << 63 {
                    std::hint::spin_loop();
                }
                ticks() - start
            });
            trips.collect::<Vec<_>>()
        });
        pinging.join().unwrap_or_default()
    });
    trips.sort_unstable();
    #[allow(clippy::cast_precision_loss)] // nanoseconds
    trips.get(trips.len() / 2).map_or(f64::NAN, |ticks| *ticks as f64 / ticks_per_ns())
}
