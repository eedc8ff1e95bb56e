//! The ring that descriptors travel through: one producing thread, one consuming process.
//!
//! ```text
//!             consumed                filled        head
//!                │                      │            │
//!    … free … ───┼── lent to consumer ──┼─ reserved ─┼─ free …     positions are free-running u32, masked at access
//!                │                      │
//!   published by │                      │ private to the producer: a slot announces itself
//!   the consumer ┘                      └ by the lap mark in its second word
//! ```
//!
//! A slot is two words. The producer stores the first, then the second with Release; the second carries a mark
//! that flips each lap. The consumer waits for the mark of its lap with Acquire on the very slot it wants, so no
//! producer index travels between the caches. The consumer index travels back: it is stored once per commit, and the
//! producer loads it when its private copy says *full* or when it wants its slots' frames back.
//!
//! The producer believes nothing: a consumer index that went backwards or past what was filled is an [`IndexError`].
//! The algorithms are written over [`RingMemory`], so that loom runs them over its own atomics (`models`)
//! while production runs them over mapped memory (`layout`).
//!
//! What the other side writes is mapped read-only here. On such memory Rust allows relaxed atomic loads and no others, so
//! an Acquire load is written as a relaxed load and an Acquire fence behind it; on x86-64 it is the same instruction.

use std::ptr::NonNull;

use crate::descriptor::{Descriptor, LAP};
use crate::ids::UmemOffset;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// One place in a ring: two words that only the producer writes.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct Slot {
    body: AtomicU64,
    mark: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Slot>() == 16);

impl Slot {
    /// A slot as it lies in zeroed memory.
    pub fn zeroed() -> Self {
        Slot { body: AtomicU64::new(0), mark: AtomicU64::new(0) }
    }
}

/// Where a ring lies.
pub trait RingMemory {
    /// Number of slots: a power of two, at least 1 and at most 2³¹; never changes.
    fn slots(&self) -> u32;
    /// The slot of a free-running `position`: number `position % slots`.
    fn slot(&self, position: u32) -> &Slot;
    /// The consumer index: a free-running position that only the consumer writes.
    fn consumer(&self) -> &AtomicU32;
}

/// The consumer index is one that no honest consumer can have written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the consumer index says {seen}, but only positions {consumed} to {head} are possible: \
     the worker moved it backwards or past what it was given"
)]
pub struct IndexError {
    /// Where the consumer stood before.
    pub consumed: u32,
    /// The first position not yet filled.
    pub head: u32,
    /// What its segment says now.
    pub seen: u32,
}

/// The mark that a published slot at `position` carries. Memory starts zeroed, so lap 0 is marked by one.
#[inline(always)]
fn lap_mark(position: u32, slots: u32) -> u64 {
    // `slots` is a power of two: the bit above the mask is the parity of the lap. It also flips across the wrap
    // of `position`, since 2³² is an even number of laps.
    if position & slots == 0 { LAP } else { 0 }
}

/// The producing end.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    slots: u32,
    head: u32,
    /// Up to here the slots hold descriptors; from here to the head they are reserved.
    filled: u32,
    consumed: u32,
}

impl<M: RingMemory> Producer<M> {
    /// The producing end of a ring whose memory is zeroed and whose consumer index is 0.
    ///
    /// # Panics
    /// If the memory's number of slots is none that [`RingMemory::slots`] allows.
    pub fn new(memory: M) -> Self {
        let slots = memory.slots();
        assert!(slots.is_power_of_two() && slots <= 1 << 31, "ring of {slots} slots");
        Producer { memory, slots, head: 0, filled: 0, consumed: 0 }
    }

    /// Like [`new`](Self::new), at a position that is a multiple of twice the slots: for tests near the wrap-around.
    #[doc(hidden)]
    pub fn starting_at(memory: M, position: u32) -> Self {
        let mut producer = Producer::new(memory);
        assert_eq!(u64::from(position) % (2 * u64::from(producer.slots)), 0);
        (producer.head, producer.filled, producer.consumed) = (position, position, position);
        producer
    }

    /// Slots that are not lent, by the private copy of the consumer index; there may be more by now.
    #[inline(always)]
    pub fn room(&self) -> u32 {
        self.slots - self.lent()
    }

    /// Slots that hold descriptors the consumer has not committed, by the private copy of its index.
    #[inline(always)]
    pub fn lent(&self) -> u32 {
        self.head.wrapping_sub(self.consumed)
    }

    /// Whether a quarter of the slots or more are lent, by the private copy of the consumer index.
    #[inline(always)]
    pub fn is_filling_up(&self) -> bool {
        self.lent() >= self.slots / 4
    }

    /// The first position not yet produced.
    #[inline(always)]
    pub fn head(&self) -> u32 {
        self.head
    }

    /// Takes the next slot, and asks for its line. `None`: full by the private copy; [`take_back`](Self::take_back) may
    /// make room.
    ///
    /// Many slots are best [filled](Reserved::fill) from the last to the first: the consumer, which stops at the first that
    /// is not filled, then reaches for no line that is still being written, and sees them all at once. Then say so
    /// by [`filled`](Self::filled).
    #[inline(always)]
    pub fn reserve(&mut self) -> Option<Reserved> {
        if self.room() == 0 {
            return None;
        }
        let slot = self.memory.slot(self.head);
        prefetch_for_writing(slot);
        let mark = lap_mark(self.head, self.slots);
        self.head = self.head.wrapping_add(1);
        Some(Reserved { slot: NonNull::from(slot), mark })
    }

    /// Publishes one descriptor. `false`: full by the private copy, nothing was written.
    #[inline(always)]
    pub fn push(&mut self, descriptor: Descriptor) -> bool {
        debug_assert_eq!(self.filled, self.head, "a slot is reserved and not filled");
        let Some(reserved) = self.reserve() else { return false };
        // SAFETY: `self` has the ring's memory.
        unsafe { reserved.fill(descriptor) };
        self.filled();
        true
    }

    /// All slots that were reserved have been filled: the consumer may commit them.
    #[inline(always)]
    pub fn filled(&mut self) {
        self.filled = self.head;
    }

    /// Loads the consumer index and hands the offset of every descriptor committed since the last call to `returned`, in
    /// order. Returns how many these were.
    ///
    /// # Errors
    /// [`IndexError`] if no honest consumer can have written that index. Nothing was handed back then, and what the
    /// ring holds is still there for [`take_all`](Self::take_all).
    #[inline]
    pub fn take_back(&mut self, mut returned: impl FnMut(UmemOffset)) -> Result<u32, IndexError> {
        let seen = self.memory.consumer().load(Ordering::Relaxed);
        // Acquire: pairs with the Release in `Consumer::commit`; the consumer's reads of the packets
        // are over before their frames are used again.
        fence(Ordering::Acquire);
        let committed = seen.wrapping_sub(self.consumed);
        if committed > self.filled.wrapping_sub(self.consumed) {
            return Err(IndexError { consumed: self.consumed, head: self.filled, seen });
        }
        for ahead in 0..committed {
            // Own words: only this producer writes them.
            let body = self.memory.slot(self.consumed.wrapping_add(ahead)).body.load(Ordering::Relaxed);
            returned(Descriptor::offset_in(body));
        }
        self.consumed = seen;
        Ok(committed)
    }

    /// Hands back every descriptor the consumer has not committed, in order, whatever its index says: for a consumer
    /// that is gone. Returns how many these were.
    pub fn take_all(&mut self, mut returned: impl FnMut(Descriptor)) -> u32 {
        let lent = self.filled.wrapping_sub(self.consumed);
        for ahead in 0..lent {
            let slot = self.memory.slot(self.consumed.wrapping_add(ahead));
            // Own words, as above.
            returned(Descriptor::from_words(
                slot.body.load(Ordering::Relaxed),
                slot.mark.load(Ordering::Relaxed),
            ));
        }
        self.consumed = self.filled;
        lent
    }
}

/// A slot that a producer has taken.
#[derive(Clone, Copy, Debug)]
pub struct Reserved {
    slot: NonNull<Slot>,
    mark: u64,
}

impl Reserved {
    /// Writes the descriptor that the slot is for.
    ///
    /// # Safety
    /// The ring's memory still exists, and the slot has not been filled.
    #[inline(always)]
    pub unsafe fn fill(self, descriptor: Descriptor) {
        // SAFETY: the slot lies in the ring's memory, which exists.
        let slot = unsafe { self.slot.as_ref() };
        let (word0, word1) = descriptor.to_words();
        slot.body.store(word0, Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `Consumer::peek`; who sees the mark sees the body,
        // and the packet's bytes that were written before this.
        slot.mark.store(word1 | self.mark, Ordering::Release);
    }
}

/// Asks for the line of a slot: the consumer has read it in the last lap, so another cache has it. Lines that are asked for
/// one after the other come at the same time; stores that miss wait for each other.
#[inline(always)]
fn prefetch_for_writing(slot: &Slot) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: a prefetch changes nothing that a program sees, and the line is there. The intrinsic with the hint for
    // writing needs a processor feature that is no part of x86-64; without it, this is no operation.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) slot, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = slot;
}

/// The consuming end.
#[derive(Debug)]
pub struct Consumer<M> {
    memory: M,
    slots: u32,
    position: u32,
}

impl<M: RingMemory> Consumer<M> {
    /// The consuming end of a ring whose memory is zeroed and whose consumer index is 0.
    ///
    /// # Panics
    /// If the memory's number of slots is none that [`RingMemory::slots`] allows.
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

    /// The descriptor `ahead` places after the first uncommitted one, if it has been published. It may be so before one
    /// that comes earlier: only look past those that are there.
    #[inline(always)]
    pub fn peek(&self, ahead: u32) -> Option<Descriptor> {
        if ahead >= self.slots {
            return None;
        }
        let position = self.position.wrapping_add(ahead);
        let slot = self.memory.slot(position);
        let mark = slot.mark.load(Ordering::Relaxed);
        if mark & LAP != lap_mark(position, self.slots) {
            return None;
        }
        // Acquire: pairs with the Release in `Reserved::fill`.
        fence(Ordering::Acquire);
        Some(Descriptor::from_words(slot.body.load(Ordering::Relaxed), mark))
    }

    /// Hands the published descriptors to `found`, in order, with their numbers from 0: at most `limit` of them, and none
    /// beyond the end of the lap, so that the next call may have more. Ends when `found` answers `false`; returns for
    /// how many it answered `true`.
    #[inline(always)]
    pub fn scan(&self, limit: u32, mut found: impl FnMut(usize, Descriptor) -> bool) -> u32 {
        // Up to the end of the lap all marks are alike.
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
            if !found(count as usize, Descriptor::from_words(slot.body.load(Ordering::Relaxed), word1)) {
                break;
            }
            count += 1;
        }
        count
    }

    /// Gives the first `count` descriptors and their frames back: all that were seen by [`peek`](Self::peek) with
    /// `ahead < count`, or by [`scan`](Self::scan). Their packets must not be read afterwards.
    #[inline(always)]
    pub fn commit(&mut self, count: u32) {
        self.position = self.position.wrapping_add(count);
        // Release: pairs with the Acquire fence in `Producer::take_back`.
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

        /// A ring that has run up to `position`, a multiple of twice its slots: marks as after an odd lap.
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
    fn an_index_past_the_head_or_backwards_is_an_error_and_nothing_is_handed_back() {
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
        assert_eq!(producer.room(), 7);
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

    /// What a consumer writes that is out of its mind.
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

    /// Few cases under Miri, which is slow, and no files of failures, which its isolation forbids.
    fn cases() -> ProptestConfig {
        if cfg!(miri) {
            ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() }
        } else {
            ProptestConfig::default()
        }
    }

    proptest! {
        #![proptest_config(cases())]

        /// The ring against a queue: same order, same contents, nothing lost, starting shortly before the wrap of positions.
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
                            // SAFETY: the ring is there, and each slot is filled once.
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

        /// Whatever a consumer index says, it is an error exactly when it is none an honest consumer can have written,
        /// and descriptors come back once, in order, and never more of them than were produced.
        #[test]
        fn believes_no_index_it_cannot_believe(
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
            prop_assert_eq!(producer.room(), slots);
        }
    }
}
