//! Counters that one lane writes and the control thread reads.
//!
//! A lane adds with a plain load and store, once per batch: nobody else writes. For every lane and
//! each group `received = frame_owner + delivered + ring_full + no_worker`, and for every member
//! `delivered = committed + backlog + requeued + lost`.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use xfan_shm::ring::IndexError;

use crate::memory::frames::Tally;

/// A number that one thread writes.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds, as the only writer.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets, as the only writer.
    #[inline(always)]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Reads; from any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a lane counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct LaneCounters {
    /// Packets taken from the RX ring.
    pub received: Counter,
    /// Bytes of these packets.
    pub bytes: Counter,
    /// Dropped before any group gets it: the frame was not the kernel's to hand over, a bug of the
    /// driver.
    pub frame_owner: Counter,
    /// Packets in which no 5-tuple could be read; they are delivered all the same.
    pub unparsed: Counter,
    /// Packets shorter than their IP length; they are delivered like all others.
    pub cut: Counter,
    /// Batches that held packets.
    pub batches: Counter,
    /// Busy time, in ticks.
    pub busy_ticks: Counter,
    /// Times the lane slept.
    pub sleeps: Counter,
    /// Times the RX ring was found empty.
    pub emptied: Counter,
    /// Commands carried out.
    pub commands: Counter,
    /// Raised when a lane that was told to drain has found its RX ring empty.
    pub drained: AtomicBool,
    tally: [AtomicU32; 5],
}

impl LaneCounters {
    /// Publishes how many frames each owner has.
    pub fn set_tally(&self, tally: Tally) {
        let values = [tally.total, tally.free, tally.kernel, tally.lent, tally.tx];
        for (published, value) in self.tally.iter().zip(values) {
            published.store(value, Ordering::Relaxed);
        }
    }

    /// How many frames each owner had, when the lane last looked.
    pub fn tally(&self) -> Tally {
        let [total, free, kernel, lent, tx] =
            std::array::from_fn(|owner| self.tally[owner].load(Ordering::Relaxed));
        Tally { total, free, kernel, lent, tx }
    }
}

/// What a lane counts of one group.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct GroupCounters {
    /// Packets pushed into a worker's ring.
    pub delivered: Counter,
    /// Dropped: the worker's ring was full.
    pub ring_full: Counter,
    /// Dropped: no worker takes packets of this flow.
    pub no_worker: Counter,
}

/// What a lane has found against a worker: an impossible consumer index, or a slow bell. Each
/// session has one per lane.
#[derive(Debug, Default)]
pub struct Evidence {
    consumed: AtomicU32,
    head: AtomicU32,
    seen: AtomicU32,
    impossible_index: AtomicBool,
    slow_bell: AtomicBool,
}

impl Evidence {
    /// Reports that ringing the worker's bell was slow several times in a row. The lane does not
    /// ring it again.
    pub(super) fn report_slow_bell(&self) {
        self.slow_bell.store(true, Ordering::Relaxed);
    }

    /// Whether the bell was slow.
    pub fn has_slow_bell(&self) -> bool {
        self.slow_bell.load(Ordering::Relaxed)
    }

    /// Reports an impossible index. The lane takes no more packets back from the worker.
    pub(super) fn report_impossible_index(&self, error: IndexError) {
        self.consumed.store(error.consumed, Ordering::Relaxed);
        self.head.store(error.head, Ordering::Relaxed);
        self.seen.store(error.seen, Ordering::Relaxed);
        // Pairs with the Acquire in `impossible_index`.
        self.impossible_index.store(true, Ordering::Release);
    }

    /// The impossible index that the lane has read, if any.
    pub fn impossible_index(&self) -> Option<IndexError> {
        // Pairs with the Release in `report_impossible_index`.
        self.impossible_index.load(Ordering::Acquire).then(|| IndexError {
            consumed: self.consumed.load(Ordering::Relaxed),
            head: self.head.load(Ordering::Relaxed),
            seen: self.seen.load(Ordering::Relaxed),
        })
    }
}

/// What a lane counts of one member.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct MemberCounters {
    /// Packets pushed into the member's ring.
    pub delivered: Counter,
    /// Packets it gave back.
    pub committed: Counter,
    /// Packets for it that were dropped because its ring was full.
    pub dropped: Counter,
    /// Packets that were in its ring when it left, and went to others.
    pub requeued: Counter,
    /// Packets that were in its ring when it left, and that no other ring had a free slot for.
    pub lost: Counter,
    /// Times it was woken.
    pub wakeups: Counter,
}
