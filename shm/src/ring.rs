//! The ring of descriptors: one producing thread, one consuming process.
//!
//! ```text
//!             consumed                filled        head
//!                │                      │            │
//!    … free … ───┼── lent to consumer ──┼─ reserved ─┼─ free …
//!                │                      │
//!   published by │                      │ private to the producer: each slot is published
//!   the consumer ┘                      └ by the lap mark in its second word
//! ```
//!
//! Positions are free-running `u32` numbers, masked at access.
//!
//! A slot has two words. The producer stores the first word, then the second with Release. The
//! second word carries a mark that flips in each lap. The consumer polls that word, with Acquire,
//! in the slot that it wants next. So there is no producer index whose cache line would have to
//! move between the cores. The consumer index is the only word that travels back. The consumer
//! stores it once per commit. The producer loads it when its private copy says that the ring is
//! full, or when it wants committed frames back.
//!
//! The producer trusts nothing that the consumer writes: a consumer index that moved backwards, or
//! past the filled slots, is an [`IndexError`].
//!
//! The algorithms are written over [`RingMemory`]. So loom runs them over its own atomics
//! (`models`), and production code runs them over mapped memory (`layout`).
//!
//! Each side maps the memory that the other side writes read-only. Rust allows only relaxed atomic
//! loads of read-only memory. So an Acquire load is written as a relaxed load followed by an
//! Acquire fence, which on x86-64 is the same instruction.

use std::ptr::NonNull;

use crate::descriptor::{Descriptor, LAP};
use crate::ids::UmemOffset;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// A slot of a ring: two words that only the producer writes.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Slot {
    body: AtomicU64,
    mark: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == 16);

impl Slot {
    /// A slot of zeroed memory.
    pub fn zeroed() -> Self {
        Slot { body: AtomicU64::new(0), mark: AtomicU64::new(0) }
    }
}

/// The memory of a ring.
pub trait RingMemory {
    /// Number of slots. It is a power of two from 1 to 2³¹, and never changes.
    fn slots(&self) -> u32;
    /// The slot at the free-running `position`: slot number `position % slots`.
    fn slot(&self, position: u32) -> &Slot;
    /// The consumer index: a free-running position that only the consumer writes.
    fn consumer(&self) -> &AtomicU32;
}

/// The consumer index has a value that a correct consumer cannot have written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the consumer index is {seen}, but only positions {consumed} to {head} are possible: \
     the worker moved it backwards or past the packets it was sent"
)]
pub struct IndexError {
    /// The last valid consumer index.
    pub consumed: u32,
    /// The first position that is not filled yet.
    pub head: u32,
    /// The consumer index in the worker's segment.
    pub seen: u32,
}

/// The mark of a published slot at `position`. Memory starts zeroed, so the mark of lap 0 is a set
/// bit.
#[inline(always)]
fn lap_mark(position: u32, slots: u32) -> u64 {
    // `slots` is a power of two, so this bit of `position` is the parity of the lap. It also flips
    // where `position` wraps around, since 2³² is an even number of laps.
    if position & slots == 0 { LAP } else { 0 }
}

/// The producing end of a ring.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    slots: u32,
    /// The next position to reserve.
    head: u32,
    /// Slots before this position hold descriptors. Those from here to `head` are reserved.
    filled: u32,
    /// Private copy of the consumer index.
    consumed: u32,
}

impl<M: RingMemory> Producer<M> {
    /// The producing end of a ring whose memory is zeroed, so that its consumer index is 0.
    ///
    /// # Panics
    /// If the number of slots is not one that [`RingMemory::slots`] allows.
    pub fn new(memory: M) -> Self {
        let slots = memory.slots();
        assert!(slots.is_power_of_two() && slots <= 1 << 31, "ring of {slots} slots");
        Producer { memory, slots, head: 0, filled: 0, consumed: 0 }
    }

    /// Like [`new`](Self::new), but starts at `position`, a multiple of twice the number of slots.
    /// For tests near the wrap-around.
    #[doc(hidden)]
    pub fn starting_at(memory: M, position: u32) -> Self {
        let mut producer = Producer::new(memory);
        assert_eq!(u64::from(position) % (2 * u64::from(producer.slots)), 0);
        (producer.head, producer.filled, producer.consumed) = (position, position, position);
        producer
    }

    /// Number of free slots, by the private copy of the consumer index. There may be more by now.
    #[inline(always)]
    pub fn free_slots(&self) -> u32 {
        self.slots - self.lent()
    }

    /// Number of slots that are reserved, or that hold descriptors which the consumer has not
    /// committed, by the private copy of its index.
    #[inline(always)]
    pub fn lent(&self) -> u32 {
        self.head.wrapping_sub(self.consumed)
    }

    /// Whether at least a quarter of the slots are lent, by the private copy of the consumer index.
    #[inline(always)]
    pub fn is_filling_up(&self) -> bool {
        self.lent() >= self.slots / 4
    }

    /// The next position to reserve.
    #[inline(always)]
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Reserves the next slot, and prefetches its cache line. Returns `None` if the ring is full by
    /// the private copy of the consumer index: [`take_back`](Self::take_back) may free slots.
    ///
    /// [Fill](Reserved::fill) several slots from the last to the first, then call
    /// [`filled`](Self::filled). The consumer stops at the first slot that is not filled. So it
    /// touches no cache line that is still being written, and sees all slots at once.
    #[inline(always)]
    pub fn reserve(&mut self) -> Option<Reserved> {
        if self.free_slots() == 0 {
            return None;
        }
        let slot = self.memory.slot(self.head);
        prefetch_for_writing(slot);
        let mark = lap_mark(self.head, self.slots);
        self.head = self.head.wrapping_add(1);
        Some(Reserved { slot: NonNull::from(slot), mark })
    }

    /// Publishes one descriptor. Returns `false`, and publishes nothing, if the ring is full by the
    /// private copy of the consumer index.
    #[inline(always)]
    pub fn push(&mut self, descriptor: Descriptor) -> bool {
        debug_assert_eq!(self.filled, self.head, "a slot is reserved and not filled");
        let Some(reserved) = self.reserve() else { return false };
        // SAFETY: `fill` requires that the ring's memory exists, which `self` owns, and that the
        // slot was not filled: it was just reserved.
        unsafe { reserved.fill(descriptor) };
        self.filled();
        true
    }

    /// Notes that all reserved slots are filled, so that the consumer may commit them.
    #[inline(always)]
    pub fn filled(&mut self) {
        self.filled = self.head;
    }

    /// Loads the consumer index, and passes the offset of every descriptor committed since the last
    /// call to `returned`, in order. Returns their number.
    ///
    /// # Errors
    /// [`IndexError`] if a correct consumer cannot have written that index. Then nothing was passed
    /// to `returned`, and [`take_all`](Self::take_all) still returns everything that the ring
    /// holds.
    #[inline]
    pub fn take_back(&mut self, mut returned: impl FnMut(UmemOffset)) -> Result<u32, IndexError> {
        let seen = self.memory.consumer().load(Ordering::Relaxed);
        // Acquire: pairs with the Release in `Consumer::commit`. The consumer's reads of the
        // packets happen before their frames are reused.
        fence(Ordering::Acquire);
        let committed = seen.wrapping_sub(self.consumed);
        if committed > self.filled.wrapping_sub(self.consumed) {
            return Err(IndexError { consumed: self.consumed, head: self.filled, seen });
        }
        for ahead in 0..committed {
            // Relaxed: only this producer writes the slots.
            let body = self.memory.slot(self.consumed.wrapping_add(ahead)).body.load(Ordering::Relaxed);
            returned(Descriptor::offset_in(body));
        }
        self.consumed = seen;
        Ok(committed)
    }

    /// Passes every descriptor that the consumer has not committed to `returned`, in order, without
    /// reading the consumer index. For a consumer that has exited or is evicted. Returns their
    /// number.
    pub fn take_all(&mut self, mut returned: impl FnMut(Descriptor)) -> u32 {
        let lent = self.filled.wrapping_sub(self.consumed);
        for ahead in 0..lent {
            let slot = self.memory.slot(self.consumed.wrapping_add(ahead));
            // Relaxed: only this producer writes the slots.
            returned(Descriptor::from_words(
                slot.body.load(Ordering::Relaxed),
                slot.mark.load(Ordering::Relaxed) & !LAP,
            ));
        }
        self.consumed = self.filled;
        lent
    }
}

/// A slot that [`Producer::reserve`] returned.
#[derive(Clone, Copy, Debug)]
pub struct Reserved {
    slot: NonNull<Slot>,
    mark: u64,
}

impl Reserved {
    /// Publishes `descriptor` in this slot.
    ///
    /// # Safety
    /// The memory of the ring must still exist, and the slot must not have been filled since it was
    /// reserved.
    #[inline(always)]
    pub unsafe fn fill(self, descriptor: Descriptor) {
        // SAFETY: `as_ref` requires a valid pointer without a mutable reference to its target. The
        // slot lies in the ring's memory, which the caller ensures exists. Slots are atomics, to
        // which only shared references exist.
        let slot = unsafe { self.slot.as_ref() };
        let (word0, word1) = descriptor.to_words();
        slot.body.store(word0, Ordering::Relaxed);
        // Release: pairs with the Acquire fences in `Consumer::peek` and `Consumer::scan`. A
        // consumer that sees the mark also sees the body, and the packet's bytes written before
        // this.
        slot.mark.store(word1 | self.mark, Ordering::Release);
    }
}

/// Prefetches the cache line of a slot for writing. The consumer read the slot in the last lap, so
/// the line is in another core's cache. Prefetched lines arrive in parallel, while stores that miss
/// the cache complete one after the other.
#[inline(always)]
fn prefetch_for_writing(slot: &Slot) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: the instruction accesses no memory visibly, and it preserves flags and stack as the
    // options say. It is written as assembly because the intrinsic for a write prefetch requires a
    // processor feature beyond x86-64. On a processor without it, `prefetchw` executes as a NOP.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) slot, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = slot;
}

/// The consuming end of a ring.
#[derive(Debug)]
pub struct Consumer<M> {
    memory: M,
    slots: u32,
    /// Position of the first descriptor that is not committed.
    position: u32,
}

impl<M: RingMemory> Consumer<M> {
    /// The consuming end of a ring whose memory is zeroed, so that its consumer index is 0.
    ///
    /// # Panics
    /// If the number of slots is not one that [`RingMemory::slots`] allows.
    pub fn new(memory: M) -> Self {
        let slots = memory.slots();
        assert!(slots.is_power_of_two() && slots <= 1 << 31, "ring of {slots} slots");
        Consumer { memory, slots, position: 0 }
    }

    /// See [`Producer::starting_at`].
    #[doc(hidden)]
    pub fn starting_at(memory: M, position: u32) -> Self {
        let mut consumer = Consumer::new(memory);
        assert_eq!(u64::from(position) % (2 * u64::from(consumer.slots)), 0);
        consumer.position = position;
        consumer
    }

    /// The descriptor in the slot `ahead` of the first uncommitted one, if it is published. Slots
    /// may be published out of order: a caller must look at them in order, and stop at the first
    /// `None`.
    #[inline(always)]
    pub fn peek(&self, ahead: u32) -> Option<Descriptor> {
        if ahead >= self.slots {
            return None;
        }
        let position = self.position.wrapping_add(ahead);
        let slot = self.memory.slot(position);
        let word1 = slot.mark.load(Ordering::Relaxed);
        if word1 & LAP != lap_mark(position, self.slots) {
            return None;
        }
        // Acquire: pairs with the Release in `Reserved::fill`.
        fence(Ordering::Acquire);
        Some(Descriptor::from_words(slot.body.load(Ordering::Relaxed), word1 & !LAP))
    }

    /// Passes the published descriptors to `found`, in order, each with its number from 0. Stops
    /// after `limit` descriptors, at the end of the lap, or when `found` returns `false`. More may
    /// be published beyond the end of the lap: the next call finds them. Returns for how many
    /// descriptors `found` returned `true`.
    #[inline(always)]
    pub fn scan(&self, limit: u32, mut found: impl FnMut(usize, Descriptor) -> bool) -> u32 {
        // Up to the end of the lap, all published slots carry the same mark.
        let left = self.slots - (self.position & (self.slots - 1));
        let mark = lap_mark(self.position, self.slots);
        let mut count = 0;
        while count < limit.min(left) {
            let slot = self.memory.slot(self.position.wrapping_add(count));
            let word1 = slot.mark.load(Ordering::Relaxed);
            if word1 & LAP != mark {
                break;
            }
            // Acquire: pairs with the Release in `Reserved::fill`.
            fence(Ordering::Acquire);
            // This clears the mark, which `mark` equals, with one instruction and no constant.
            let word1 = word1 ^ mark;
            if !found(count as usize, Descriptor::from_words(slot.body.load(Ordering::Relaxed), word1)) {
                break;
            }
            count += 1;
        }
        count
    }

    /// Commits the first `count` descriptors: gives their slots and frames back to the producer.
    /// All of them must have been returned by [`peek`](Self::peek) or [`scan`](Self::scan). Their
    /// packets must not be read afterwards.
    #[inline(always)]
    pub fn commit(&mut self, count: u32) {
        self.position = self.position.wrapping_add(count);
        // Release: pairs with the Acquire fence in `Producer::take_back`. The reads of the packets
        // happen before the producer reuses their frames.
        self.memory.consumer().store(self.position, Ordering::Release);
    }
}

#[cfg(test)]
pub(crate) mod heap {
    use super::*;

    /// A ring in ordinary memory, for tests and models.
    #[derive(Debug)]
    pub(crate) struct HeapRing {
        slots: Box<[Slot]>,
        consumer: AtomicU32,
    }

    impl HeapRing {
        pub(crate) fn new(slots: u32) -> Self {
            HeapRing { slots: (0..slots).map(|_| Slot::zeroed()).collect(), consumer: AtomicU32::new(0) }
        }

        /// A ring that has run up to `position`, a multiple of twice the number of slots. All marks
        /// are clear, as after an odd lap.
        pub(crate) fn starting_at(slots: u32, position: u32) -> Self {
            let ring = HeapRing::new(slots);
            ring.consumer.store(position, Ordering::Relaxed);
            ring
        }
    }

    impl RingMemory for &HeapRing {
        fn slots(&self) -> u32 {
            u32::try_from(self.slots.len()).expect("small")
        }
        fn slot(&self, position: u32) -> &Slot {
            &self.slots[position as usize & (self.slots.len() - 1)]
        }
        fn consumer(&self) -> &AtomicU32 {
            &self.consumer
        }
    }

    #[cfg(loom)] // models hand the ring to two threads
    impl RingMemory for loom::sync::Arc<HeapRing> {
        fn slots(&self) -> u32 {
            (&**self).slots()
        }
        fn slot(&self, position: u32) -> &Slot {
            &self.slots[position as usize & (self.slots.len() - 1)]
        }
        fn consumer(&self) -> &AtomicU32 {
            &self.consumer
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::heap::HeapRing;
    use super::*;
    use crate::ids::PortId;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn numbered(n: u32) -> Descriptor {
        Descriptor {
            offset: UmemOffset(n),
            time: !n,
            length: 60,
            port: PortId(3),
            flags: 5,
            hash: n.rotate_left(9),
        }
    }

    #[test]
    fn an_impossible_consumer_index_hands_nothing_back() {
        let ring = HeapRing::new(8);
        let mut producer = Producer::new(&ring);
        for n in 0..5 {
            assert!(producer.push(numbered(n)));
        }
        assert!(producer.reserve().is_some());
        let lie = |value| RingMemory::consumer(&&ring).store(value, Ordering::Relaxed);
        let none = |_| panic!("handed back");
        lie(6);
        assert_eq!(producer.take_back(none), Err(IndexError { consumed: 0, head: 5, seen: 6 }));
        lie(u32::MAX);
        assert!(producer.take_back(none).is_err());
        lie(3);
        assert_eq!(producer.take_back(|_| ()), Ok(3));
        lie(2);
        assert_eq!(producer.take_back(none), Err(IndexError { consumed: 3, head: 5, seen: 2 }));
        let mut left = Vec::new();
        assert_eq!(producer.take_all(|d| left.push(d.offset)), 2);
        assert_eq!(left, [3, 4].map(UmemOffset));
        assert_eq!(producer.free_slots(), 7);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Reserve,
        Fill,
        Commit(u32),
        TakeBack,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![4 => Just(Step::Reserve), 2 => Just(Step::Fill), 2 => (0u32..6).prop_map(Step::Commit), 1 => Just(Step::TakeBack)]
    }

    /// A consumer index that a faulty or hostile consumer writes.
    #[derive(Clone, Debug)]
    enum Index {
        Any(u32),
        BesideConsumed(i32),
        BesideHead(i32),
    }

    fn lie() -> impl Strategy<Value = Index> {
        prop_oneof![
            any::<u32>().prop_map(Index::Any),
            (-3..40).prop_map(Index::BesideConsumed),
            (-40..3).prop_map(Index::BesideHead),
        ]
    }

    /// Few cases under Miri, which is slow. No failure files: Miri's isolation forbids writing
    /// them.
    fn cases() -> ProptestConfig {
        if cfg!(miri) {
            ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() }
        } else {
            ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(cases())]

        /// Compares the ring with a queue: same order, same contents, nothing lost. Half of the
        /// cases start shortly before positions wrap around.
        #[test]
        fn behaves_like_a_queue(
            slots in (0u32..6).prop_map(|log| 1 << log),
            near_wrap: bool,
            steps in prop::collection::vec(step(), 0..600),
        ) {
            let start = if near_wrap { 0u32.wrapping_sub(slots * 4) } else { 0 };
            let ring = HeapRing::starting_at(slots, start);
            let mut producer = Producer::starting_at(&ring, start);
            let mut consumer = Consumer::starting_at(&ring, start);
            let (mut held, mut queue, mut lent) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Reserve => {
                        let reserved = producer.reserve();
                        prop_assert_eq!(reserved.is_some(), lent.len() < slots as usize);
                        if let Some(slot) = reserved {
                            held.push_back((next, slot));
                            lent.push_back(next);
                            next += 1;
                        }
                    }
                    Step::Fill => {
                        for (number, slot) in held.iter().rev() {
                            // SAFETY: the ring exists, and each slot is filled once.
                            unsafe { slot.fill(numbered(*number)) };
                        }
                        producer.filled();
                        queue.extend(held.drain(..).map(|(number, _)| number));
                    }
                    Step::Commit(count) => {
                        let count = count.min(u32::try_from(queue.len()).unwrap());
                        let mut scanned = Vec::new();
                        consumer.scan(count, |number, descriptor| {
                            assert_eq!(number, scanned.len());
                            scanned.push(descriptor);
                            true
                        });
                        for ahead in 0..count {
                            let expected = numbered(queue.pop_front().unwrap());
                            prop_assert_eq!(consumer.peek(ahead), Some(expected));
                            if let Some(descriptor) = scanned.get(ahead as usize) {
                                prop_assert_eq!(*descriptor, expected);
                            }
                        }
                        prop_assert!(count == 0 || !scanned.is_empty());
                        if queue.is_empty() {
                            prop_assert_eq!(consumer.peek(count), None);
                        }
                        consumer.commit(count);
                    }
                    Step::TakeBack => {
                        let mut back = Vec::new();
                        producer.take_back(|d| back.push(d)).unwrap();
                        for offset in back {
                            prop_assert_eq!(offset, numbered(lent.pop_front().unwrap()).offset);
                        }
                        prop_assert_eq!(lent.len(), queue.len() + held.len());
                    }
                }
                prop_assert_eq!(producer.lent() as usize, lent.len());
            }
            let mut rest = 0;
            producer.take_all(|_| rest += 1);
            prop_assert_eq!(rest, lent.len() - held.len());
        }

        /// A consumer index is an error exactly if a correct consumer cannot have written it.
        /// Descriptors come back once, in order, and never more of them than were produced.
        #[test]
        fn accepts_possible_consumer_indexes_only(
            slots in (0u32..6).prop_map(|log| 1 << log),
            near_wrap: bool,
            steps in prop::collection::vec((0u32..40, lie()), 0..200),
        ) {
            let start = if near_wrap { 0u32.wrapping_sub(slots * 4) } else { 0 };
            let ring = HeapRing::starting_at(slots, start);
            let mut producer = Producer::starting_at(&ring, start);
            let (mut pushed, mut back) = (0, 0);
            for (push, lie) in steps {
                for _ in 0..push {
                    pushed += u32::from(producer.push(numbered(pushed)));
                }
                prop_assert!(pushed - back <= slots);
                let (head, consumed) = (start.wrapping_add(pushed), start.wrapping_add(back));
                let seen = match lie {
                    Index::Any(index) => index,
                    Index::BesideConsumed(distance) => consumed.wrapping_add_signed(distance),
                    Index::BesideHead(distance) => head.wrapping_add_signed(distance),
                };
                RingMemory::consumer(&&ring).store(seen, Ordering::Relaxed);
                let mut returned = Vec::new();
                let answer = producer.take_back(|offset| returned.push(offset));
                if (0..=pushed - back).any(|committed| consumed.wrapping_add(committed) == seen) {
                    prop_assert_eq!(answer, Ok(seen.wrapping_sub(consumed)));
                } else {
                    prop_assert_eq!(answer, Err(IndexError { consumed, head, seen }));
                    prop_assert!(returned.is_empty());
                }
                for offset in returned {
                    prop_assert_eq!(offset, numbered(back).offset);
                    back += 1;
                }
            }
            let mut rest = Vec::new();
            prop_assert_eq!(producer.take_all(|descriptor| rest.push(descriptor)), pushed - back);
            prop_assert!(rest.into_iter().eq((back..pushed).map(numbered)));
            prop_assert_eq!(producer.free_slots(), slots);
        }
    }
}
