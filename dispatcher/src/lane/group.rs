//! A group as a lane sees it: the bucket table, and the links to the members' workers.

use std::sync::Arc;

use xfan_shm::Descriptor;
use xfan_shm::doorbell::Ringer;
use xfan_shm::ids::MemberId;

use super::batch::{Pushed, push};
use super::buckets::BucketTable;
use super::counters::GroupCounters;
use super::link::{Link, MemberLink, bit};
use crate::config::MAX_MEMBERS;
use crate::memory::frames::Frames;

/// A lane takes frames back from a ring that has lent this many: often enough that the frames in
/// use stay in the cache, seldom enough that the consumer index, a line that another core writes,
/// is loaded once for many packets.
const TAKE_BACK: u32 = 256;

const _: () = assert!(MAX_MEMBERS <= u64::BITS as usize);

/// The state of one group in one lane.
#[derive(Debug)]
pub(super) struct LaneGroup {
    /// Which member takes which flows.
    pub(super) table: BucketTable,
    /// By member; one for each value of a table entry, so that no entry is out of range.
    links: Box<[Option<Link>; 256]>,
    /// Members that ever had a worker, as bits: an idle lane does not look at the other links, each
    /// of which is a cache line.
    joined: u64,
    counters: Arc<GroupCounters>,
}

impl LaneGroup {
    pub(super) fn new(counters: Arc<GroupCounters>) -> Self {
        let links = Box::new([const { None }; 256]);
        LaneGroup { table: BucketTable::empty(), links, joined: 0, counters }
    }

    /// Pushes the packets of a batch to the group's workers, and drops those that no ring takes.
    /// Reorders `descriptors`. `SHARED`: there are other groups. Returns whether a ring is filling
    /// up.
    #[inline]
    pub(super) fn deliver<const SHARED: bool>(
        &mut self,
        frames: &mut Frames,
        descriptors: &mut [Descriptor],
    ) -> bool {
        let mut sums = Pushed::default();
        push::<SHARED>(frames, &self.table, &mut self.links, descriptors, &mut sums);
        let crowded = self.wake(frames, sums.touched);
        let dropped = sums.ring_full + sums.no_worker;
        self.counters.delivered.add(descriptors.len() as u64 - dropped);
        if dropped > 0 {
            self.counters.ring_full.add(sums.ring_full);
            self.counters.no_worker.add(sums.no_worker);
        }
        crowded
    }

    /// Rings for every member that got packets and sleeps, counts, and takes frames back where many
    /// are lent. Returns whether a ring is filling up.
    #[inline]
    fn wake(&mut self, frames: &mut Frames, touched: u64) -> bool {
        let mut crowded = false;
        Ringer::fence();
        for member in members(touched) {
            let Some(link) = &mut self.links[member.index()] else { continue };
            link.ring.filled();
            if link.ringer.must_ring(link.up.epoch()) {
                link.bell.ring(&link.doorbell, &link.counters, &link.evidence);
            }
            link.count();
            if link.ring.lent() >= TAKE_BACK || link.ring.is_filling_up() {
                link.take_back(frames);
                crowded |= link.ring.is_filling_up() && link.held.is_none();
            }
        }
        crowded
    }

    /// Takes back the frames of everything that the workers have committed.
    pub(super) fn take_back_all(&mut self, frames: &mut Frames) {
        for member in members(self.joined) {
            if let Some(link) = &mut self.links[member.index()] {
                link.take_back(frames);
            }
        }
    }

    /// A worker joins as `member`. What was held for it comes first. Returns whether a ring is
    /// filling up.
    #[cold]
    pub(super) fn join(&mut self, frames: &mut Frames, member: MemberId, link: MemberLink) -> bool {
        let predecessor = self.links[member.index()].take_if(|link| link.held.is_some());
        let mut crowded = self.retire(frames, member);
        self.joined |= bit(member);
        let mut link = Link::new(link);
        if let Some(mut gone) = predecessor {
            gone.count();
            let mut kept = 0;
            let left = gone.bequeath(|descriptor| {
                if link.ring.push(descriptor) {
                    kept += 1;
                } else {
                    frames.give_back(descriptor.offset);
                }
            });
            // All rings have as many slots, so each packet finds one.
            gone.counters.lost.add(u64::from(left - kept));
            // These packets were counted as delivered to this member before.
            link.counted = link.ring.head();
        }
        self.links[member.index()] = Some(link);
        crowded |= self.wake(frames, bit(member));
        crowded
    }

    /// The worker of `member` is gone: its packets are kept for the next.
    pub(super) fn hold(&mut self, frames: &mut Frames, member: MemberId) {
        if let Some(link) = &mut self.links[member.index()] {
            link.hold(frames);
        }
    }

    /// The worker of `member` has left: what it has not committed goes, marked, to the members that
    /// take its flows now. What their rings have no free slots for is lost, and so is all of it if
    /// there is no other member. Returns whether a ring is filling up.
    #[cold]
    pub(super) fn retire(&mut self, frames: &mut Frames, member: MemberId) -> bool {
        let Some(mut gone) = self.links[member.index()].take() else { return false };
        gone.count();
        gone.take_back(frames);
        let (mut touched, mut requeued) = (0, 0);
        let left = gone.bequeath(|descriptor| {
            let member = self.table.member(descriptor.hash);
            let heir = self.links[member.index()].as_mut();
            if heir.is_some_and(|heir| heir.inherit(descriptor, frames)) {
                touched |= bit(member);
                requeued += 1;
            } else {
                frames.give_back(descriptor.offset);
            }
        });
        gone.counters.requeued.add(requeued);
        gone.counters.lost.add(u64::from(left) - requeued);
        self.wake(frames, touched)
    }

    /// Retires every member. Nobody takes packets afterwards.
    pub(super) fn retire_all(&mut self, frames: &mut Frames) {
        self.table = BucketTable::empty();
        for member in members(self.joined) {
            self.retire(frames, member);
        }
    }
}

/// The members in a set of bits.
#[inline(always)]
fn members(mut bits: u64) -> impl Iterator<Item = MemberId> {
    std::iter::from_fn(move || {
        let member = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        #[allow(clippy::cast_possible_truncation)] // below 64
        (member < MAX_MEMBERS as u32).then_some(MemberId(member as u8))
    })
}
