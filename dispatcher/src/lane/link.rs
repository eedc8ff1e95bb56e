//! A lane's link to one worker: the ring to it, its bell, and what the lane remembers about it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use xfan_shm::Descriptor;
use xfan_shm::doorbell::Ringer;
use xfan_shm::ids::MemberId;
use xfan_shm::layout::{SharedRing, Up};
use xfan_shm::ring::{Producer, Reserved};

use super::bell::BellMeter;
use super::counters::{Evidence, MemberCounters};
use crate::memory::frames::Frames;

/// What the control thread hands a lane for a worker.
#[derive(Debug)]
pub struct MemberLink {
    /// The ring to it.
    pub ring: Producer<SharedRing>,
    /// Its own segment, for its sleep epoch.
    pub up: Up,
    /// The ringer's end of the bell that wakes it.
    pub doorbell: Arc<OwnedFd>,
    /// What this lane counts of it.
    pub counters: Arc<MemberCounters>,
    /// Where it reports an impossible index.
    pub evidence: Arc<Evidence>,
}

/// The bit of a member in a set.
#[inline(always)]
pub(super) fn bit(member: MemberId) -> u64 {
    1u64.wrapping_shl(u32::from(member.0))
}

/// A [`MemberLink`] and what the lane remembers about it.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Link {
    pub(super) ring: Producer<SharedRing>,
    pub(super) up: Up,
    pub(super) doorbell: Arc<OwnedFd>,
    pub(super) counters: Arc<MemberCounters>,
    pub(super) evidence: Arc<Evidence>,
    pub(super) ringer: Ringer,
    pub(super) bell: BellMeter,
    /// Position up to which pushed descriptors are counted.
    pub(super) counted: u32,
    /// Dropped, not yet counted.
    dropped: u32,
    /// The worker's index was impossible, or the worker is gone: the lane takes nothing back any
    /// more.
    distrusted: bool,
    /// The worker is gone, and had a chance to see this many of the packets that are in the ring.
    pub(super) held: Option<u32>,
}

impl Link {
    pub(super) fn new(link: MemberLink) -> Self {
        let MemberLink { ring, up, doorbell, counters, evidence } = link;
        let counted = ring.head();
        Link {
            ring,
            up,
            doorbell,
            counters,
            evidence,
            ringer: Ringer::default(),
            bell: BellMeter::default(),
            counted,
            dropped: 0,
            distrusted: false,
            held: None,
        }
    }

    /// Takes back the frames of committed packets.
    #[inline]
    pub(super) fn take_back(&mut self, frames: &mut Frames) {
        if frames.is_shared() {
            self.take_back_shared(frames);
        } else {
            self.take_back_known::<false>(frames);
        }
    }

    /// Not inlined, so that the code for one group is as small as if there were no other.
    #[inline(never)]
    fn take_back_shared(&mut self, frames: &mut Frames) {
        self.take_back_known::<true>(frames);
    }

    /// As [`take_back`](Self::take_back), for callers that know whether the frames are shared by
    /// several groups.
    #[inline(always)]
    fn take_back_known<const SHARED: bool>(&mut self, frames: &mut Frames) {
        if self.distrusted {
            return;
        }
        let taken = if SHARED {
            self.ring.take_back(|offset| frames.give_back_known::<true>(offset))
        } else {
            let mut returning = frames.returning(self.ring.lent());
            self.ring.take_back(|offset| returning.give_back(offset))
        };
        match taken {
            Ok(committed) => self.counters.committed.add(u64::from(committed)),
            Err(error) => {
                self.distrusted = true;
                self.evidence.report_impossible_index(error);
            }
        }
    }

    /// Keeps what is in the ring, and what is pushed from now on, for another worker.
    pub(super) fn hold(&mut self, frames: &mut Frames) {
        if self.held.is_none() {
            self.take_back(frames);
            self.distrusted = true;
            self.held = Some(self.ring.lent());
        }
    }

    /// Hands over what was not committed, in order, marked where the worker that is gone may have
    /// seen it. Returns the number of packets.
    pub(super) fn bequeath(&mut self, mut heir: impl FnMut(Descriptor)) -> u32 {
        let (mut number, seen) = (0, self.held.unwrap_or(u32::MAX));
        self.ring.take_all(|mut descriptor| {
            if number < seen {
                descriptor.flags |= Descriptor::REDELIVERED;
            }
            number += 1;
            heir(descriptor);
        })
    }

    /// Takes a packet of a member that has left, if a slot is free.
    pub(super) fn inherit(&mut self, descriptor: Descriptor, frames: &mut Frames) -> bool {
        if self.ring.free_slots() == 0 {
            self.take_back(frames);
        }
        self.ring.push(descriptor)
    }

    /// Counts what happened since the last call.
    #[inline(always)]
    pub(super) fn count(&mut self) {
        let head = self.ring.head();
        self.counters.delivered.add(u64::from(head.wrapping_sub(self.counted)));
        self.counted = head;
        self.counters.dropped.add(u64::from(std::mem::take(&mut self.dropped)));
    }

    /// The ring was full: takes a slot if the worker has committed meanwhile, else counts the drop.
    #[cold]
    #[inline(never)]
    pub(super) fn reserve_again<const SHARED: bool>(&mut self, frames: &mut Frames) -> Option<Reserved> {
        self.take_back_known::<SHARED>(frames);
        let reserved = self.ring.reserve();
        self.dropped += u32::from(reserved.is_none());
        reserved
    }
}
