//! The ledger of a lane's frames: every frame has one owner at any time.
//!
//! ```text
//!          post                receive             lend              give_back
//!   free ───────► kernel ────────────────► lane ─────────► lent ────────────────► free
//!    ▲           (FILL, NIC, RX)             │
//!    └───────────────────────────────────────┘ drop
//! ```
//!
//! Free frames are a stack: the one used last is the one most likely in the cache. The ledger is private to the lane; what it
//! counts is published in the lane's counters.

/// A frame is not where the ledger says it is. Somebody who may not (the NIC's driver, by the likes of it)
/// handed it over, so it is not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame at UMEM offset {offset} was handed over by {expected:?}, the ledger has it as {found:?}")]
pub struct OwnerError {
    /// UMEM offset of the packet or frame in question.
    pub offset: u32,
    /// Who handed it over.
    pub expected: Owner,
    /// Who has it; `None`: no such frame in this lane.
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
    /// The lane, which is looking at it.
    Lane,
    /// A worker.
    Lent,
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
    /// Frames the lane is looking at.
    pub lane: u32,
    /// Frames workers have.
    pub lent: u32,
}

/// The ledger.
#[derive(Debug)]
pub struct Frames {
    /// UMEM offset of the lane's first frame.
    base: u32,
    /// Frame size is `1 << shift`.
    shift: u32,
    owners: Box<[Owner]>,
    /// Offsets of free frames.
    free: Vec<u32>,
    kernel: u32,
    lane: u32,
}

impl Frames {
    /// `count` free frames of `size` bytes, a power of two, beginning at UMEM offset `base`.
    ///
    /// # Panics
    /// If the size is no power of two, or the region reaches beyond 4 GiB.
    pub fn new(base: u32, size: u32, count: u32) -> Self {
        assert!(size.is_power_of_two(), "frame size {size}");
        assert!(u64::from(base) + u64::from(size) * u64::from(count) <= 1 << 32, "beyond 4 GiB");
        Frames {
            base,
            shift: size.ilog2(),
            owners: vec![Owner::Free; count as usize].into(),
            // The lowest on top.
            free: (0..count).rev().map(|index| base + index * size).collect(),
            kernel: 0,
            lane: 0,
        }
    }

    /// Index of the frame that `offset` lies in; out of range for an offset that is not this lane's.
    #[inline(always)]
    fn index(&self, offset: u32) -> usize {
        (offset.wrapping_sub(self.base) >> self.shift) as usize
    }

    /// UMEM offset at which the frame that `offset` lies in begins.
    #[inline(always)]
    fn start(&self, offset: u32) -> u32 {
        self.base + ((offset - self.base) >> self.shift << self.shift)
    }

    /// Moves a frame from one owner to another.
    #[inline(always)]
    fn pass(&mut self, offset: u32, from: Owner, to: Owner) -> Result<(), OwnerError> {
        let index = self.index(offset);
        match self.owners.get_mut(index) {
            Some(owner) if *owner == from => {
                *owner = to;
                Ok(())
            }
            other => Err(OwnerError { offset, expected: from, found: other.copied() }),
        }
    }

    /// A free frame's offset, now the kernel's.
    #[inline(always)]
    pub fn post(&mut self) -> Option<u32> {
        let offset = self.free.pop()?;
        let index = self.index(offset);
        self.owners[index] = Owner::Kernel;
        self.kernel += 1;
        Some(offset)
    }

    /// The kernel handed over a packet at `offset`: the lane's now.
    ///
    /// # Errors
    /// [`OwnerError`] if the kernel had no such frame; then nothing changes.
    #[inline(always)]
    pub fn receive(&mut self, offset: u32) -> Result<(), OwnerError> {
        self.pass(offset, Owner::Kernel, Owner::Lane)?;
        self.kernel -= 1;
        self.lane += 1;
        Ok(())
    }

    /// The lane lends the frame to a worker.
    ///
    /// # Errors
    /// [`OwnerError`] if the lane has it not.
    #[inline(always)]
    pub fn lend(&mut self, offset: u32) -> Result<(), OwnerError> {
        self.pass(offset, Owner::Lane, Owner::Lent)?;
        self.lane -= 1;
        Ok(())
    }

    /// The lane drops the packet: its frame is free.
    ///
    /// # Errors
    /// [`OwnerError`] if the lane has it not.
    #[inline(always)]
    pub fn discard(&mut self, offset: u32) -> Result<(), OwnerError> {
        self.pass(offset, Owner::Lane, Owner::Free)?;
        self.lane -= 1;
        self.free.push(self.start(offset));
        Ok(())
    }

    /// A worker is done with the frame: it is free.
    ///
    /// # Errors
    /// [`OwnerError`] if it was not lent.
    #[inline(always)]
    pub fn give_back(&mut self, offset: u32) -> Result<(), OwnerError> {
        self.pass(offset, Owner::Lent, Owner::Free)?;
        self.free.push(self.start(offset));
        Ok(())
    }

    /// Frames the kernel has.
    #[inline(always)]
    pub fn kernel(&self) -> u32 {
        self.kernel
    }

    /// Frames nobody has.
    #[inline(always)]
    pub fn free(&self) -> u32 {
        u32::try_from(self.free.len()).unwrap_or(u32::MAX)
    }

    /// How many frames each owner has. Who is lent to follows from the rest.
    pub fn tally(&self) -> Tally {
        let total = u32::try_from(self.owners.len()).unwrap_or(u32::MAX);
        let (free, kernel, lane) = (self.free(), self.kernel, self.lane);
        Tally { total, free, kernel, lane, lent: total - free - kernel - lane }
    }

    /// Counts owner by owner, frame by frame: for tests and the final balance, where it must equal [`tally`](Self::tally).
    pub fn audit(&self) -> Tally {
        let count = |wanted| {
            u32::try_from(self.owners.iter().filter(|owner| **owner == wanted).count()).unwrap_or(u32::MAX)
        };
        Tally {
            total: u32::try_from(self.owners.len()).unwrap_or(u32::MAX),
            free: count(Owner::Free),
            kernel: count(Owner::Kernel),
            lane: count(Owner::Lane),
            lent: count(Owner::Lent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_goes_round_whatever_the_offset_within_it() {
        let mut frames = Frames::new(8192, 2048, 3);
        let frame = frames.post().unwrap();
        assert_eq!(frame, 8192);
        for from_start in [0, 256, 2047] {
            let packet = frame + from_start;
            frames.receive(packet).unwrap();
            frames.lend(packet).unwrap();
            assert_eq!(frames.tally(), Tally { total: 3, free: 2, kernel: 0, lane: 0, lent: 1 });
            frames.give_back(packet).unwrap();
            assert_eq!(frames.post(), Some(frame));
        }
    }

    #[test]
    fn a_frame_from_the_wrong_hands_is_refused() {
        let mut frames = Frames::new(4096, 4096, 2);
        let frame = frames.post().unwrap();
        let refused = |result: Result<(), OwnerError>| result.unwrap_err().found;
        assert_eq!(refused(frames.give_back(frame)), Some(Owner::Kernel));
        frames.receive(frame).unwrap();
        assert_eq!(refused(frames.receive(frame)), Some(Owner::Lane));
        assert_eq!(refused(frames.receive(0)), None);
        assert_eq!(refused(frames.receive(3 * 4096)), None);
        assert_eq!(frames.tally(), frames.audit());
    }

    proptest! {
        #[test]
        fn owners_always_sum_to_the_total(steps in prop::collection::vec((0u8..5, any::<prop::sample::Index>()), 0..500)) {
            let mut frames = Frames::new(0, 2048, 16);
            let (mut kernel, mut lane, mut lent) = (vec![], vec![], vec![]);
            for (step, pick) in steps {
                fn take(from: &mut Vec<u32>, pick: prop::sample::Index) -> Option<u32> {
                    (!from.is_empty()).then(|| from.swap_remove(pick.index(from.len())))
                }
                match step {
                    0 => kernel.extend(frames.post()),
                    1 => lane.extend(take(&mut kernel, pick).inspect(|&f| frames.receive(f).unwrap())),
                    2 => lent.extend(take(&mut lane, pick).inspect(|&f| frames.lend(f).unwrap())),
                    3 => { take(&mut lane, pick).inspect(|&f| frames.discard(f).unwrap()); }
                    _ => { take(&mut lent, pick).inspect(|&f| frames.give_back(f).unwrap()); }
                }
                prop_assert_eq!(frames.tally(), frames.audit());
                prop_assert_eq!(frames.tally().lent as usize, lent.len());
            }
        }
    }
}
