//! The ledger of a lane's frames: every frame has one owner at any time.
//!
//! ```text
//!          post                 accept                give_back
//!   free ───────► kernel ────────────────► lent ────────────────► free
//!                (FILL, NIC, RX)
//! ```
//!
//! A packet's frame is the lane's between [`accepting`](Frames::accepting) and the end of its batch, when it is either lent or
//! given back; the ledger has it as lent meanwhile. Free frames are a stack: the one used last is the one
//! most likely in the cache. A mark per frame says whether the kernel has it; one that it has not is free if it is on the
//! stack, else lent. The ledger is private to the lane; what it counts is published in the lane's counters.

use std::collections::HashSet;

/// The kernel handed over a packet in a frame it did not have: a bug of the NIC's driver, by the likes of it. The
/// frame stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel handed over a packet at UMEM offset {offset}, in a frame that was not posted")]
pub struct OwnerError {
    /// UMEM offset of the packet.
    pub offset: u32,
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
    /// Frames workers have.
    pub lent: u32,
}

/// Bytes of the smallest frame, by which frames are numbered. A packet begins within the first of its frame: behind 256 bytes
/// of headroom.
const UNIT: u32 = 2048;

/// The ledger.
#[derive(Debug)]
pub struct Frames {
    /// UMEM offset of the first frame.
    base: u32,
    /// Clears the bits of an offset within its frame.
    start: u32,
    /// By [`UNIT`] of the UMEM, up to the lane's last frame: whether the kernel has the frame that begins there, on the FILL
    /// ring, in the NIC, or on the RX ring.
    posted: Box<[bool]>,
    /// Offsets of free frames: the first `free` of these.
    stack: Box<[u32]>,
    free: usize,
    kernel: u32,
}

impl Frames {
    /// `count` free frames of `size` bytes, a power of two and at least 2,048, beginning at UMEM offset `base`, a
    /// multiple of the size.
    ///
    /// # Panics
    /// If these are not as said, or the region reaches beyond 4 GiB.
    pub fn new(base: u32, size: u32, count: u32) -> Self {
        assert!(
            size.is_power_of_two() && size >= UNIT && base.is_multiple_of(size),
            "size {size}, base {base}"
        );
        assert!(u64::from(base) + u64::from(size) * u64::from(count) <= 1 << 32, "beyond 4 GiB");
        let stack: Box<[u32]> = (0..count).rev().map(|index| base + index * size).collect();
        let units = (base / UNIT) as usize + count as usize * (size / UNIT) as usize;
        // The lowest on top.
        Frames {
            base,
            start: !(size - 1),
            posted: vec![false; units].into(),
            stack,
            free: count as usize,
            kernel: 0,
        }
    }

    /// Hands up to `count` free frames to the kernel. Returns the offsets at which they begin.
    #[inline(always)]
    pub fn post(&mut self, count: u32) -> &[u32] {
        let left = self.free.saturating_sub(count as usize);
        let posted = &self.stack[left..self.free];
        for offset in posted {
            debug_assert!(
                !self.posted[(offset / UNIT) as usize],
                "frame at {offset} is free and the kernel's"
            );
            self.posted[(offset / UNIT) as usize] = true;
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

    /// An accepted packet that nobody took, or one that a worker is done with: its frame is free.
    #[inline(always)]
    pub fn give_back(&mut self, offset: u32) {
        self.returning(1).give_back(offset);
    }

    /// For giving back up to `count` frames.
    #[inline(always)]
    pub fn returning(&mut self, count: u32) -> Returning<'_> {
        let places = &mut self.stack[self.free..];
        let count = places.len().min(count as usize);
        Returning { start: self.start, places: places[..count].iter_mut(), free: &mut self.free, count }
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
        Tally { total, free, kernel, lent: total - free - kernel }
    }

    /// Counts frame by frame: for tests and the final balance, where it must equal [`tally`](Self::tally).
    pub fn audit(&self) -> Tally {
        let free: HashSet<u32> = self.stack[..self.free].iter().copied().collect();
        let mut tally = Tally::default();
        for (unit, &posted) in (0u32..).zip(&self.posted) {
            let offset = unit * UNIT;
            let is_free = free.contains(&offset);
            // One that is both counts twice, as it must not be.
            tally.free += u32::from(is_free);
            tally.kernel += u32::from(posted);
            let frame = offset >= self.base && offset & !self.start == 0;
            tally.total += u32::from(frame);
            tally.lent += u32::from(frame && !is_free && !posted);
        }
        tally
    }
}

/// Packets on their way in. It keeps their number, which each changes, out of memory that each writes to.
#[derive(Debug)]
pub struct Accepting<'a> {
    posted: &'a mut [bool],
    kernel: &'a mut u32,
    count: u32,
}

impl Accepting<'_> {
    /// The kernel handed over a packet at `offset`. It is lent, unless [`give_back`](Frames::give_back) follows.
    ///
    /// # Errors
    /// [`OwnerError`] if the kernel had no such frame; then nothing changes.
    #[inline(always)]
    pub fn accept(&mut self, offset: u32) -> Result<(), OwnerError> {
        match self.posted.get_mut((offset / UNIT) as usize) {
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

/// Frames on their way back. It keeps the height of the stack, which each changes, out of memory that each writes to.
#[derive(Debug)]
pub struct Returning<'a> {
    start: u32,
    places: std::slice::IterMut<'a, u32>,
    free: &'a mut usize,
    count: usize,
}

impl Returning<'_> {
    /// A worker is done with the frame, which was lent: it is free. Only the lane's own records say which these
    /// are, so nothing is checked.
    #[inline(always)]
    pub fn give_back(&mut self, offset: u32) {
        if let Some(place) = self.places.next() {
            *place = offset & self.start;
        }
    }
}

impl Drop for Returning<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        *self.free += self.count - self.places.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_goes_round_whatever_the_offset_within_it() {
        let mut frames = Frames::new(8192, 2048, 3);
        assert_eq!(frames.post(1), [8192]);
        for from_start in [0, 256, 2047] {
            let packet = 8192 + from_start;
            frames.accepting().accept(packet).unwrap();
            assert_eq!(frames.tally(), Tally { total: 3, free: 2, kernel: 0, lent: 1 });
            frames.give_back(packet);
            assert_eq!(frames.post(1), [8192]);
        }
    }

    #[test]
    fn a_frame_from_the_wrong_hands_is_refused() {
        let mut frames = Frames::new(4096, 4096, 2);
        assert_eq!(frames.post(1), [4096]);
        frames.accepting().accept(4096).unwrap();
        // The same frame in two packets, as with a broken FILL ring; a free one; another lane's; none.
        for offset in [4096, 8192, 0, 3 * 4096] {
            assert_eq!(frames.accepting().accept(offset), Err(OwnerError { offset }));
        }
        assert_eq!(frames.tally(), frames.audit());
    }

    proptest! {
        #[test]
        fn owners_always_sum_to_the_total(steps in prop::collection::vec((0u8..3, 0u32..5, any::<prop::sample::Index>()), 0..500)) {
            let mut frames = Frames::new(2048, 2048, 16);
            let (mut kernel, mut lent) = (vec![], vec![]);
            fn take(from: &mut Vec<u32>, pick: prop::sample::Index) -> Option<u32> {
                (!from.is_empty()).then(|| from.swap_remove(pick.index(from.len())))
            }
            for (step, count, pick) in steps {
                match step {
                    0 => {
                        let posted = frames.post(count).to_vec();
                        prop_assert!(posted.len() <= count as usize);
                        kernel.extend(posted);
                    }
                    1 => lent.extend(take(&mut kernel, pick).inspect(|&f| {
                        frames.accepting().accept(f + 256).unwrap();
                    })),
                    _ => { take(&mut lent, pick).inspect(|&f| frames.give_back(f + 256)); }
                }
                prop_assert_eq!(frames.tally(), frames.audit());
                prop_assert_eq!(frames.tally().lent as usize, lent.len());
                prop_assert_eq!(frames.tally().kernel as usize, kernel.len());
            }
        }
    }
}
