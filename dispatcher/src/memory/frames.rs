//! The ledger of a lane's frames: every frame has one owner at any time.
//!
//! ```text
//!          post                 accept                give_back
//!   free ───────► kernel ────────────────► lent ────────────────► free
//!                (FILL, NIC, RX)
//! ```
//!
//! Between [`accepting`](Frames::accepting) and the end of its batch a packet's frame is the
//! lane's; the ledger already counts it as lent. With several groups a frame is lent to each of
//! them, and is free when the last has given it back: the ledger counts these loans. With one group
//! there is nothing to count.
//!
//! Free frames are a stack: the frame used last is the one most likely in the cache. A mark per
//! frame says whether the kernel has it. A frame that the kernel does not have is free if it is on
//! the stack, else lent. The ledger is private to the lane, which publishes the totals in its
//! counters.

use std::collections::HashSet;
use std::num::NonZeroU32;

use xfan_shm::ids::{LaneId, UmemOffset};

/// The kernel handed over a packet in a frame that it did not have: almost certainly a bug of the
/// NIC's driver. The frame keeps its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel handed over a packet at UMEM offset {offset}, in a frame that was not posted")]
pub struct OwnerError {
    /// UMEM offset of the packet.
    pub offset: UmemOffset,
}

/// The frames of one lane: a part of the UMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the first frame begins, a multiple of the frame size.
    pub base: UmemOffset,
    /// Bytes of a frame, a power of two and at least 2,048.
    pub frame_size: u32,
    /// Number of frames.
    pub frames: NonZeroU32,
}

impl Region {
    /// The region of `lane` in a UMEM in which every lane has as many frames. It begins below the
    /// limit of 4 GiB, though the end of the last lane's region may be at the limit.
    pub fn of_lane(lane: LaneId, frame_size: u32, frames: NonZeroU32) -> Self {
        let base = u64::from(lane.0) * u64::from(frames.get()) * u64::from(frame_size);
        Region { base: UmemOffset(u32::try_from(base).unwrap_or(u32::MAX)), frame_size, frames }
    }
}

/// How many frames each owner has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All frames of the lane.
    pub total: u32,
    /// Frames nobody has.
    pub free: u32,
    /// Frames the kernel has.
    pub kernel: u32,
    /// Frames that some worker has.
    pub lent: u32,
    /// Frames being transmitted. Workers cannot send yet, so there are none.
    pub tx: u32,
}

/// Bytes of the smallest frame: frames are numbered in these units. A packet begins within the
/// first unit of its frame, behind 256 bytes of headroom.
const UNIT: u32 = 2048;

/// The ledger.
#[derive(Debug)]
pub struct Frames {
    /// UMEM offset of the first frame.
    base: u32,
    /// Clears the bits of an offset within its frame.
    start: u32,
    /// By [`UNIT`] of the UMEM, up to the lane's last frame: whether the kernel has the frame that
    /// begins there, on the FILL ring, in the NIC, or on the RX ring.
    posted: Box<[bool]>,
    /// Offsets of free frames: the first `free` of these.
    stack: Box<[UmemOffset]>,
    free: usize,
    kernel: u32,
    /// Groups that each packet is lent to.
    groups: u8,
    /// With several groups, by [`UNIT`]: how many of them still have the frame that begins there.
    /// Empty with one group: what comes back from it is free.
    loans: Box<[u8]>,
}

impl Frames {
    /// The frames of `region`, all free. Each packet will be lent to `groups` groups, at least one.
    ///
    /// # Panics
    /// If the region is not as described there, reaches beyond 4 GiB, or there are more than 255
    /// groups.
    pub fn new(region: Region, groups: usize) -> Self {
        let Region { base: UmemOffset(base), frame_size: size, frames } = region;
        let count = frames.get();
        assert!(
            size.is_power_of_two() && size >= UNIT && base.is_multiple_of(size),
            "size {size}, base {base}"
        );
        assert!(u64::from(base) + u64::from(size) * u64::from(count) <= 1 << 32, "beyond 4 GiB");
        let groups = u8::try_from(groups).expect("a GroupId has 8 bits");
        let units = (base / UNIT) as usize + count as usize * (size / UNIT) as usize;
        Frames {
            base,
            start: !(size - 1),
            posted: vec![false; units].into(),
            // The lowest on top.
            stack: (0..count).rev().map(|index| UmemOffset(base + index * size)).collect(),
            free: count as usize,
            kernel: 0,
            groups,
            loans: vec![0; if groups > 1 { units } else { 0 }].into(),
        }
    }

    /// Hands up to `count` free frames to the kernel. Returns the offsets at which they begin.
    #[inline(always)]
    pub fn post(&mut self, count: u32) -> &[UmemOffset] {
        let left = self.free.saturating_sub(count as usize);
        let posted = &self.stack[left..self.free];
        for offset in posted {
            debug_assert!(!self.posted[unit(*offset)], "frame at {offset} is free and the kernel's");
            self.posted[unit(*offset)] = true;
        }
        self.free = left;
        #[allow(clippy::cast_possible_truncation)] // at most `count`
        let posted_count = posted.len() as u32;
        self.kernel += posted_count;
        posted
    }

    /// For accepting the packets of a batch.
    #[inline(always)]
    pub fn accepting(&mut self) -> Accepting<'_> {
        Accepting { posted: &mut self.posted, kernel: &mut self.kernel, count: 0 }
    }

    /// Whether each packet is lent to several groups.
    #[inline(always)]
    pub fn is_shared(&self) -> bool {
        !self.loans.is_empty()
    }

    /// Lends accepted packets to every group: needed if the frames are [shared](Self::is_shared).
    pub fn lend(&mut self, packets: impl Iterator<Item = UmemOffset>) {
        for offset in packets {
            if let Some(loans) = self.loans.get_mut(unit(offset)) {
                *loans = self.groups;
            }
        }
    }

    /// A group is done with a packet: a worker has given it back, or nobody in the group took it.
    /// When the last group is done, the frame is free.
    #[inline(always)]
    pub fn give_back(&mut self, offset: UmemOffset) {
        if self.is_shared() {
            self.give_back_known::<true>(offset);
        } else {
            self.give_back_known::<false>(offset);
        }
    }

    /// As [`give_back`](Self::give_back), for callers that know whether the frames are
    /// [shared](Self::is_shared): with one group it costs no branch.
    #[inline(always)]
    pub fn give_back_known<const SHARED: bool>(&mut self, offset: UmemOffset) {
        debug_assert_eq!(SHARED, self.is_shared());
        if !SHARED || self.last_loan_ends(offset) {
            self.returning(1).give_back(offset);
        }
    }

    /// Ends one loan. Returns whether it was the last.
    fn last_loan_ends(&mut self, offset: UmemOffset) -> bool {
        let Some(loans) = self.loans.get_mut(unit(offset)) else { return true };
        *loans = loans.saturating_sub(1);
        *loans == 0
    }

    /// For giving back up to `count` frames that are lent to one group and not
    /// [shared](Self::is_shared).
    #[inline(always)]
    pub fn returning(&mut self, count: u32) -> Returning<'_> {
        let slots = &mut self.stack[self.free..];
        let count = slots.len().min(count as usize);
        Returning { start: self.start, slots: slots[..count].iter_mut(), free: &mut self.free, count }
    }

    /// Frames the kernel has.
    #[inline(always)]
    pub fn kernel(&self) -> u32 {
        self.kernel
    }

    /// Frames nobody has.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // made from a u32
    pub fn free(&self) -> u32 {
        self.free as u32
    }

    /// How many frames each owner has. How many are lent follows from the rest.
    #[allow(clippy::cast_possible_truncation)] // made from a u32
    pub fn tally(&self) -> Tally {
        let total = self.stack.len() as u32;
        let (free, kernel) = (self.free(), self.kernel);
        Tally { total, free, kernel, lent: total - free - kernel, tx: 0 }
    }

    /// Counts frame by frame: for tests and the final balance, where it must equal
    /// [`tally`](Self::tally).
    pub fn audit(&self) -> Tally {
        let free: HashSet<UmemOffset> = self.stack[..self.free].iter().copied().collect();
        let mut tally = Tally::default();
        for (unit, &posted) in (0u32..).zip(&self.posted) {
            let offset = unit * UNIT;
            let is_free = free.contains(&UmemOffset(offset));
            // A frame with two owners counts twice, and the sum is wrong.
            tally.free += u32::from(is_free);
            tally.kernel += u32::from(posted);
            let frame = offset >= self.base && offset & !self.start == 0;
            tally.total += u32::from(frame);
            let lent = self.loans.get(unit as usize).map_or(!is_free && !posted, |loans| *loans > 0);
            tally.lent += u32::from(frame && lent);
        }
        tally
    }
}

/// The unit of the UMEM that an offset lies in.
#[inline(always)]
fn unit(offset: UmemOffset) -> usize {
    (offset.0 / UNIT) as usize
}

/// Accepts packets. Accumulates the count in a register and stores it once, on drop.
#[derive(Debug)]
pub struct Accepting<'a> {
    posted: &'a mut [bool],
    kernel: &'a mut u32,
    count: u32,
}

impl Accepting<'_> {
    /// The kernel handed over a packet at `offset`. Its frame is lent until
    /// [`give_back`](Frames::give_back).
    ///
    /// # Errors
    /// [`OwnerError`] if the kernel had no such frame; nothing has changed then.
    #[inline(always)]
    pub fn accept(&mut self, offset: UmemOffset) -> Result<(), OwnerError> {
        match self.posted.get_mut(unit(offset)) {
            Some(posted) if *posted => {
                *posted = false;
                self.count += 1;
                Ok(())
            }
            _ => Err(OwnerError { offset }),
        }
    }
}

impl Drop for Accepting<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.kernel -= self.count;
    }
}

/// Takes frames back. Accumulates the height of the stack in a register and stores it once, on
/// drop.
#[derive(Debug)]
pub struct Returning<'a> {
    start: u32,
    slots: std::slice::IterMut<'a, UmemOffset>,
    free: &'a mut usize,
    count: usize,
}

impl Returning<'_> {
    /// Frees the frame of a packet. Only the lane's own records name these packets, so nothing is
    /// checked.
    #[inline(always)]
    pub fn give_back(&mut self, offset: UmemOffset) {
        if let Some(slot) = self.slots.next() {
            *slot = UmemOffset(offset.0 & self.start);
        }
    }
}

impl Drop for Returning<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.free += self.count - self.slots.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames(base: u32, frame_size: u32, frames: u32, groups: usize) -> Frames {
        let frames = NonZeroU32::new(frames).unwrap();
        Frames::new(Region { base: UmemOffset(base), frame_size, frames }, groups)
    }

    #[test]
    fn a_frame_goes_round_whatever_the_offset_within_it() {
        let mut frames = frames(8192, 2048, 3, 1);
        assert_eq!(frames.post(1), [UmemOffset(8192)]);
        for from_start in [0, 256, 2047] {
            let packet = UmemOffset(8192 + from_start);
            frames.accepting().accept(packet).unwrap();
            assert_eq!(frames.tally(), Tally { total: 3, free: 2, kernel: 0, lent: 1, tx: 0 });
            frames.give_back(packet);
            assert_eq!(frames.post(1), [UmemOffset(8192)]);
        }
    }

    #[test]
    fn a_frame_from_the_wrong_hands_is_refused() {
        let mut frames = frames(4096, 4096, 2, 1);
        assert_eq!(frames.post(1), [UmemOffset(4096)]);
        frames.accepting().accept(UmemOffset(4096)).unwrap();
        // The same frame in two packets, as with a broken FILL ring; a free one; another lane's;
        // none.
        for offset in [4096, 8192, 0, 3 * 4096].map(UmemOffset) {
            assert_eq!(frames.accepting().accept(offset), Err(OwnerError { offset }));
        }
        assert_eq!(frames.tally(), frames.audit());
    }

    #[test]
    fn a_frame_is_free_when_the_last_group_gives_it_back() {
        let mut frames = frames(4096, 4096, 2, 3);
        let packet = UmemOffset(frames.post(1)[0].0 + 256);
        frames.accepting().accept(packet).unwrap();
        frames.lend([packet].into_iter());
        for lent in [1, 1, 0] {
            frames.give_back(packet);
            assert_eq!(frames.tally(), Tally { total: 2, free: 2 - lent, kernel: 0, lent, tx: 0 });
            assert_eq!(frames.tally(), frames.audit());
        }
    }

    #[test]
    fn lanes_have_regions_one_after_the_other() {
        let frames = NonZeroU32::new(1 << 19).unwrap();
        let region = Region::of_lane(LaneId(3), 2048, frames);
        assert_eq!((region.base, region.frames), (UmemOffset(3 << 30), frames));
        // The end of the UMEM is no offset.
        assert_eq!(Region::of_lane(LaneId(4), 2048, frames).base, UmemOffset(u32::MAX));
    }

    proptest! {
        #[test]
        fn owners_always_sum_to_the_total(
            groups in 1usize..4,
            steps in prop::collection::vec((0u8..3, 0u32..5, any::<prop::sample::Index>()), 0..500),
        ) {
            let mut frames = frames(2048, 2048, 16, groups);
            // A frame is in `lent` once for each group that has it.
            let (mut kernel, mut lent) = (vec![], vec![]);
            fn take(from: &mut Vec<UmemOffset>, pick: prop::sample::Index) -> Option<UmemOffset> {
                (!from.is_empty()).then(|| from.swap_remove(pick.index(from.len())))
            }
            for (step, count, pick) in steps {
                match step {
                    0 => {
                        let posted = frames.post(count).to_vec();
                        prop_assert!(posted.len() <= count as usize);
                        kernel.extend(posted);
                    }
                    1 => if let Some(frame) = take(&mut kernel, pick) {
                        let packet = UmemOffset(frame.0 + 256);
                        frames.accepting().accept(packet).unwrap();
                        frames.lend([packet].into_iter());
                        lent.extend(vec![packet; groups]);
                    },
                    _ => { take(&mut lent, pick).inspect(|&packet| frames.give_back(packet)); }
                }
                prop_assert_eq!(frames.tally(), frames.audit());
                let distinct: HashSet<_> = lent.iter().collect();
                prop_assert_eq!(frames.tally().lent as usize, distinct.len());
                prop_assert_eq!(frames.tally().kernel as usize, kernel.len());
            }
        }
    }
}
