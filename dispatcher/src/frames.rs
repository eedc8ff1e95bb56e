//! The ledger of a lane's frames: every frame has one owner at any time.
//!
//! ```text
//!          post                 accept                give_back
//!   free ───────► kernel ────────────────► lent ────────────────► free
//!                (FILL, NIC, RX)
//! ```
//!
//! A packet's frame is the lane's between [`accept`](Frames::accept) and the end of its batch, when it is either lent or
//! given back; the ledger has it as lent meanwhile. Free frames are a stack: the one used last is the one
//! most likely in the cache. The ledger is private to the lane; what it counts is published in the lane's counters.

/// The kernel handed over a packet in a frame it did not have: a bug of the NIC's driver, by the likes of it. The
/// frame stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel handed over a packet at UMEM offset {offset}; the ledger has that frame as {found:?}")]
pub struct OwnerError {
    /// UMEM offset of the packet.
    pub offset: u32,
    /// Who has the frame; `None`: there is no such frame.
    pub found: Option<Owner>,
}

/// Who has a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Owner {
    /// Nobody: it can be posted.
    Free,
    /// The kernel: on the FILL ring, in the NIC, or on the RX ring.
    Kernel,
    /// A worker, or, within a batch, the lane.
    Lent,
    /// Another lane: this one has no such frame.
    Foreign,
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
    /// Clears the bits of an offset within its frame.
    start: u32,
    /// By [`UNIT`] of the UMEM, up to the lane's last frame: what is before its first is foreign, and so is what is in
    /// a frame but not where it begins.
    owners: Box<[Owner]>,
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
        let mut owners = vec![Owner::Foreign; units];
        for offset in &stack {
            owners[(offset / UNIT) as usize] = Owner::Free;
        }
        // The lowest on top.
        Frames { start: !(size - 1), owners: owners.into(), stack, free: count as usize, kernel: 0 }
    }

    /// Hands up to `count` free frames to the kernel. Returns the offsets at which they begin.
    #[inline(always)]
    pub fn post(&mut self, count: u32) -> &[u32] {
        let left = self.free.saturating_sub(count as usize);
        let posted = &self.stack[left..self.free];
        for offset in posted {
            self.owners[(offset / UNIT) as usize] = Owner::Kernel;
        }
        self.free = left;
        #[allow(clippy::cast_possible_truncation)] // at most `count`
        let posted_count = posted.len() as u32;
        self.kernel += posted_count;
        posted
    }

    /// The kernel handed over a packet at `offset`. It is lent, unless [`give_back`](Self::give_back) follows.
    /// [`accepted`](Self::accepted) counts.
    ///
    /// # Errors
    /// [`OwnerError`] if the kernel had no such frame; then nothing changes.
    #[inline(always)]
    pub fn accept(&mut self, offset: u32) -> Result<(), OwnerError> {
        match self.owners.get_mut((offset / UNIT) as usize) {
            Some(owner @ Owner::Kernel) => {
                *owner = Owner::Lent;
                Ok(())
            }
            other => Err(OwnerError { offset, found: other.copied() }),
        }
    }

    /// That many frames were accepted.
    #[inline(always)]
    pub fn accepted(&mut self, count: u32) {
        self.kernel -= count;
    }

    /// An accepted packet that nobody took, or one that a worker is done with: its frame is free.
    #[inline(always)]
    pub fn give_back(&mut self, offset: u32) {
        self.returning().give_back(offset);
    }

    /// For giving back many.
    #[inline(always)]
    pub fn returning(&mut self) -> Returning<'_> {
        let free = self.free;
        Returning { frames: self, free }
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

    /// Counts owner by owner, frame by frame: for tests and the final balance, where it must equal [`tally`](Self::tally).
    #[allow(clippy::cast_possible_truncation)] // made from a u32
    pub fn audit(&self) -> Tally {
        let count = |wanted| self.owners.iter().filter(|owner| **owner == wanted).count() as u32;
        Tally {
            total: self.stack.len() as u32,
            free: count(Owner::Free),
            kernel: count(Owner::Kernel),
            lent: count(Owner::Lent),
        }
    }
}

/// Frames on their way back. It keeps the height of the stack, which each changes, out of memory that each writes to.
#[derive(Debug)]
pub struct Returning<'a> {
    frames: &'a mut Frames,
    free: usize,
}

impl Returning<'_> {
    /// A worker is done with the frame, which was lent: it is free. Only the lane's own records say which these
    /// are, so nothing is checked but that there is such a frame.
    #[inline(always)]
    pub fn give_back(&mut self, offset: u32) {
        let owner = self.frames.owners.get_mut((offset / UNIT) as usize);
        if let (Some(owner), Some(place)) = (owner, self.frames.stack.get_mut(self.free)) {
            debug_assert_eq!(*owner, Owner::Lent, "frame at {offset}");
            *owner = Owner::Free;
            *place = offset & self.frames.start;
            self.free += 1;
        }
    }
}

impl Drop for Returning<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.frames.free = self.free;
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
            frames.accept(packet).unwrap();
            frames.accepted(1);
            assert_eq!(frames.tally(), Tally { total: 3, free: 2, kernel: 0, lent: 1 });
            frames.give_back(packet);
            assert_eq!(frames.post(1), [8192]);
        }
    }

    #[test]
    fn a_frame_from_the_wrong_hands_is_refused() {
        let mut frames = Frames::new(4096, 4096, 2);
        assert_eq!(frames.post(1), [4096]);
        let refused = |result: Result<(), OwnerError>| result.unwrap_err().found;
        frames.accept(4096).unwrap();
        frames.accepted(1);
        // The same frame in two packets: what a broken FILL ring looks like.
        assert_eq!(refused(frames.accept(4096)), Some(Owner::Lent));
        assert_eq!(refused(frames.accept(8192)), Some(Owner::Free));
        assert_eq!(refused(frames.accept(0)), Some(Owner::Foreign));
        assert_eq!(refused(frames.accept(3 * 4096)), None);
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
                        frames.accept(f + 256).unwrap();
                        frames.accepted(1);
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
