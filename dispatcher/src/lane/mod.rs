//! A lane: one RX queue's thread and all it owns.
//!
//! ```text
//!                       ┌───────────────────── lane ─────────────────────┐
//!   RX ring ──receive──►│ hash ─► bucket ─► member ──push──► ring (1 of n) │──► worker
//!                       │   │ no room, nobody: dropped, counted            │      │
//!   FILL ring ◄──post───│ free frames ◄──────────take back─────────────────│◄─ commit
//!                       └──────────────────────────────────────────────────┘
//! ```
//!
//! The frame invariant: every frame is free, the kernel's, the lane's or lent, and after each batch none is the
//! lane's. The kernel always has `posted` frames: the budget made at start holds that many beside all that
//! the rings can lend, so no worker, however slow, takes another's packets their place.
//!
//! The loop allocates nothing, takes no lock, logs nothing, and makes no system call per packet: a batch costs at
//! most one `clock_gettime` (vDSO) and one `write` per sleeping worker.

mod batch;
pub mod buckets;
pub mod counters;
#[cfg(test)]
mod families;
pub mod handle;
pub mod hash;
mod idle;

pub use buckets::{BUCKETS, BucketTable, NOBODY};
pub use hash::HashKey;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use xfan_shm::Descriptor;
use xfan_shm::bell;
use xfan_shm::clock::{BusyMeter, CoarseClock, stamp, ticks};
use xfan_shm::doorbell::Ringer;
use xfan_shm::layout::{SharedRing, Up};
use xfan_shm::ring::{Producer, Reserved};

use crate::config::MAX_MEMBERS;
use crate::lane::counters::{LaneCounters, MemberCounters};
use crate::memory::frames::Frames;
use crate::memory::umem::PacketMemory;
use crate::port::source::{PacketSource, Received};

use batch::{Stamp, Sums, accept, describe, push};
use idle::{Idle, Turn};

/// Most packets handled in one turn.
pub const MAX_BATCH: usize = 64;

/// A lane takes frames back from a ring that has lent this many: often enough that the frames in use stay in the cache,
/// seldom enough that the consumer index, a line that another core writes, is loaded once for many packets.
const TAKE_BACK: u32 = 256;

/// Longest sleep: how old counters and the backlog of an idle lane can be.
const MAX_SLEEP: Duration = Duration::from_millis(100);

/// The member's end of things in one lane.
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
}

/// What the control thread asks of a lane.
#[derive(Debug)]
pub enum Command {
    /// Serve a member: its place, which is vacant, and its link. It gets packets once the table says so, and at once those
    /// that were held for it.
    Join(usize, Box<MemberLink>),
    /// Use this table from now on.
    Steer(Box<BucketTable>),
    /// A member's worker is gone: keep what it has not committed, and what comes for it, until another joins in its place.
    Hold(usize),
    /// Forget a member, and use this table from now on: what it has not committed goes to those that take its flows, before
    /// any newer packet of them.
    Retire(usize, Box<BucketTable>),
    /// Raise the `drained` flag of the counters when the RX ring has been found empty.
    Drain,
    /// End, retiring every member.
    Stop,
}

/// How a lane spends its time.
#[derive(Clone, Copy, Debug)]
pub struct LaneConfig {
    /// Packets per turn, at most [`MAX_BATCH`].
    pub batch: usize,
    /// Frames the kernel is to have at any time.
    pub posted: u32,
    /// How long to spin when there is nothing to do …
    pub spin: Duration,
    /// … and how long to yield after that, before sleeping.
    pub yields: Duration,
    /// Whether a worker may run on the same CPU: then a lane that never runs dry makes room for it.
    pub shared: bool,
    /// Number of the interface, for descriptors.
    pub port: u8,
}

/// A lane, before and while it runs.
#[derive(Debug)]
pub struct Lane<S> {
    config: LaneConfig,
    source: S,
    memory: Arc<PacketMemory>,
    frames: Frames,
    key: HashKey,
    table: BucketTable,
    /// Descriptors of the batch at hand.
    room: Box<[Descriptor; MAX_BATCH]>,
    /// By place; one for each value of a table entry, so that no entry is out of range.
    members: Box<[Option<Link>; 256]>,
    /// Places that were ever taken, as bits: an idle lane does not look at the others, each of which is a cache line.
    joined: u64,
    counters: Arc<LaneCounters>,
    commands: Arc<ArrayQueue<Command>>,
    doorbell: Arc<OwnedFd>,
    meter: BusyMeter,
    draining: bool,
    /// Some ring is filling up.
    crowded: bool,
}

/// A [`MemberLink`] and what the lane remembers about it.
#[derive(Debug)]
#[repr(align(128))]
struct Link {
    link: MemberLink,
    ringer: Ringer,
    /// Position up to which pushed descriptors are counted.
    counted: u32,
    /// Dropped, not yet counted.
    dropped: u32,
    /// Its index made no sense, or its worker is gone: nothing is taken back any more.
    distrusted: bool,
    /// Its worker is gone, and had a chance to see so many of the packets that are in the ring.
    held: Option<u32>,
}

impl Link {
    /// Frees the frames of committed packets.
    #[inline]
    fn take_back(&mut self, frames: &mut Frames) {
        if self.distrusted {
            return;
        }
        let mut returning = frames.returning(self.link.ring.lent());
        match self.link.ring.take_back(|offset| returning.give_back(offset)) {
            Ok(committed) => self.link.counters.committed.add(u64::from(committed)),
            Err(_) => {
                self.distrusted = true;
                self.link.counters.corrupt.store(true, Ordering::Release);
            }
        }
    }

    /// Keeps what is in the ring, and what comes, for another worker.
    fn hold(&mut self, frames: &mut Frames) {
        if self.held.is_none() {
            self.take_back(frames);
            self.distrusted = true;
            self.held = Some(self.link.ring.lent());
        }
    }

    /// Hands over what was not committed, in order, marked where the worker that is gone may have seen it. Returns how many
    /// packets these were.
    fn bequeath(&mut self, mut heir: impl FnMut(Descriptor)) -> u32 {
        let (mut number, seen) = (0, self.held.unwrap_or(u32::MAX));
        self.link.ring.take_all(|mut descriptor| {
            if number < seen {
                descriptor.flags |= Descriptor::REDELIVERED;
            }
            number += 1;
            heir(descriptor);
        })
    }

    /// Takes a packet of a member that is no more, if there is room.
    fn inherit(&mut self, descriptor: Descriptor, frames: &mut Frames) -> bool {
        if self.link.ring.free_slots() == 0 {
            self.take_back(frames);
        }
        self.link.ring.push(descriptor)
    }

    /// Counts what happened since the last call.
    #[inline(always)]
    fn count(&mut self) {
        let head = self.link.ring.head();
        self.link.counters.delivered.add(u64::from(head.wrapping_sub(self.counted)));
        self.counted = head;
        self.link.counters.dropped.add(u64::from(std::mem::take(&mut self.dropped)));
    }

    /// The ring was full: takes a slot if the worker has moved on meanwhile, else counts the drop.
    #[cold]
    #[inline(never)]
    fn reserve_again(&mut self, frames: &mut Frames) -> Option<Reserved> {
        self.take_back(frames);
        let reserved = self.link.ring.reserve();
        self.dropped += u32::from(reserved.is_none());
        reserved
    }
}

const _: () = assert!(MAX_MEMBERS <= u64::BITS as usize);

impl<S: PacketSource> Lane<S> {
    /// A lane that serves nobody yet.
    #[allow(clippy::too_many_arguments)] // each its own thing, used at one place
    pub fn new(
        config: LaneConfig,
        source: S,
        memory: Arc<PacketMemory>,
        frames: Frames,
        key: HashKey,
        counters: Arc<LaneCounters>,
        commands: Arc<ArrayQueue<Command>>,
        doorbell: Arc<OwnedFd>,
    ) -> Self {
        let mut lane = Lane {
            config,
            source,
            memory,
            frames,
            key,
            table: BucketTable::empty(),
            room: Box::new([Descriptor::default(); MAX_BATCH]),
            members: Box::new([const { None }; 256]),
            joined: 0,
            counters,
            commands,
            doorbell,
            meter: BusyMeter::new(),
            draining: false,
            crowded: false,
        };
        lane.settle();
        lane
    }

    /// Runs until [`Command::Stop`]. Call it on the lane's own thread, pinned where it belongs.
    pub fn run(mut self) -> Frames {
        self.meter = BusyMeter::new();
        let mut batch = [Received::default(); MAX_BATCH];
        let wanted = self.config.batch.clamp(1, MAX_BATCH);
        let mut idle = Idle::new(self.config.spin, self.config.yields);
        let mut clock = CoarseClock::new();
        let mut now = ticks();
        loop {
            if !self.commands.is_empty() && self.obey() {
                self.settle();
                return self.frames;
            }
            let count = self.source.receive(&mut batch[..wanted]);
            if count > 0 {
                // Not `now`: packets may have come after it.
                self.dispatch(&mut batch[..count], stamp(clock.ns(ticks())));
                // The end of this turn is the beginning of the next: reading the counter is not free.
                let start = std::mem::replace(&mut now, ticks());
                #[allow(clippy::cast_possible_truncation)] // at most MAX_BATCH
                self.meter.add(start, now, count as u32);
                self.counters.busy_ticks.set(self.meter.busy_ticks());
                idle.reset();
                if std::mem::take(&mut self.crowded) && self.config.shared {
                    std::thread::yield_now();
                    self.settle();
                    now = ticks();
                }
                continue;
            }
            now = ticks();
            self.counters.emptied.add(1);
            if std::mem::take(&mut self.draining) {
                self.counters.drained.store(true, Ordering::Release);
            }
            match idle.next(now) {
                Turn::Settle => self.settle(),
                Turn::Spin => std::hint::spin_loop(),
                Turn::Yield => {
                    std::thread::yield_now();
                    // A worker on this CPU has had its turn.
                    self.settle();
                    now = ticks();
                }
                Turn::Sleep => {
                    self.settle();
                    self.counters.sleeps.add(1);
                    self.source.wait(self.doorbell.as_fd(), MAX_SLEEP);
                    now = ticks();
                }
            }
        }
    }

    /// Sends a batch on its way.
    #[inline]
    fn dispatch(&mut self, batch: &mut [Received], time: u32) {
        let stamp = Stamp { time, port: self.config.port };
        let mut sums = Sums::default();
        let received = batch.len();
        let accepted = accept(&mut self.frames, &self.memory, batch, &mut sums);
        let batch = &batch[..accepted];
        describe(&self.key, &self.memory, batch, stamp, &mut self.room, &mut sums);
        let descriptors = &mut self.room[..accepted.min(MAX_BATCH)];
        push(&mut self.frames, &self.table, &mut self.members, descriptors, &mut sums);
        self.wake(sums.touched);
        self.refill();
        self.publish(received, &sums);
    }

    /// Rings for every member that got packets and sleeps, counts, and takes frames back where many are lent.
    #[inline]
    fn wake(&mut self, touched: u64) {
        Ringer::fence();
        for place in places(touched) {
            let Some(link) = &mut self.members[place] else { continue };
            link.link.ring.filled();
            if link.ringer.must_ring(link.link.up.epoch()) {
                link.link.counters.wakeups.add(1);
                bell::ring(&link.link.doorbell);
            }
            link.count();
            if link.link.ring.lent() >= TAKE_BACK || link.link.ring.is_filling_up() {
                link.take_back(&mut self.frames);
                self.crowded |= link.link.ring.is_filling_up() && link.held.is_none();
            }
        }
    }

    /// Posts frames for those that were received.
    #[inline]
    fn refill(&mut self) {
        let missing = self.config.posted.saturating_sub(self.frames.kernel());
        if missing > self.frames.free() {
            self.take_back_all();
        }
        if missing > 0 {
            self.source.post(&mut self.frames, missing);
        }
    }

    #[inline]
    fn publish(&self, packets: usize, sums: &Sums) {
        let (counters, packets) = (&self.counters, packets as u64);
        counters.received.add(packets);
        counters.bytes.add(sums.bytes);
        counters.batches.add(1);
        let dropped = sums.ring_full + sums.no_worker + sums.frame_owner;
        counters.delivered.add(packets - dropped);
        if dropped > 0 {
            counters.ring_full.add(sums.ring_full);
            counters.no_worker.add(sums.no_worker);
            counters.frame_owner.add(sums.frame_owner);
        }
        if sums.unparsed > 0 {
            counters.unparsed.add(sums.unparsed);
        }
        if sums.cut > 0 {
            counters.cut.add(sums.cut);
        }
        counters.set_tally(self.frames.tally());
    }

    /// Takes back what can be had, posts what is missing, publishes the result: what an idle lane does.
    #[cold]
    fn settle(&mut self) {
        self.take_back_all();
        let missing = self.config.posted.saturating_sub(self.frames.kernel());
        self.source.post(&mut self.frames, missing);
        self.counters.set_tally(self.frames.tally());
    }

    fn take_back_all(&mut self) {
        for place in places(self.joined) {
            if let Some(link) = &mut self.members[place] {
                link.take_back(&mut self.frames);
            }
        }
    }

    /// A member is no more: what it has not committed goes, marked, to those that take its flows now. For what they have no
    /// room for, and if there are none, it is lost.
    #[cold]
    fn retire(&mut self, place: usize) {
        let Some(mut gone) = self.members[place].take() else { return };
        gone.count();
        gone.take_back(&mut self.frames);
        let (mut touched, mut requeued) = (0, 0);
        let (frames, members, table) = (&mut self.frames, &mut self.members, &self.table);
        let left = gone.bequeath(|descriptor| {
            let place = table.member(descriptor.hash);
            let heir = members[usize::from(place)].as_mut();
            if heir.is_some_and(|heir| heir.inherit(descriptor, frames)) {
                touched |= 1u64.wrapping_shl(u32::from(place));
                requeued += 1;
            } else {
                frames.give_back(descriptor.offset);
            }
        });
        gone.link.counters.requeued.add(requeued);
        gone.link.counters.lost.add(u64::from(left) - requeued);
        self.wake(touched);
    }

    /// A worker joins. What was held for it comes first.
    #[cold]
    fn join(&mut self, place: usize, link: MemberLink) {
        let predecessor = self.members[place].take_if(|link| link.held.is_some());
        self.retire(place);
        self.joined |= 1 << place;
        let counted = link.ring.head();
        let mut link =
            Link { link, ringer: Ringer::default(), counted, dropped: 0, distrusted: false, held: None };
        if let Some(mut gone) = predecessor {
            gone.count();
            let mut kept = 0;
            let left = gone.bequeath(|descriptor| {
                if link.link.ring.push(descriptor) {
                    kept += 1;
                } else {
                    self.frames.give_back(descriptor.offset);
                }
            });
            // All rings are alike, so there is room for each.
            gone.link.counters.lost.add(u64::from(left - kept));
            // They were delivered to this member before.
            link.counted = link.link.ring.head();
        }
        self.members[place] = Some(link);
        self.wake(1 << place);
    }

    /// Carries out all commands; `true`: end.
    #[cold]
    fn obey(&mut self) -> bool {
        while let Some(command) = self.commands.pop() {
            let stop = matches!(command, Command::Stop);
            match command {
                Command::Join(place, link) => self.join(place, *link),
                Command::Steer(table) => self.table = *table,
                Command::Hold(place) => {
                    if let Some(link) = &mut self.members[place] {
                        link.hold(&mut self.frames);
                    }
                }
                Command::Retire(place, table) => {
                    self.table = *table;
                    self.retire(place);
                }
                Command::Drain => self.draining = true,
                Command::Stop => {
                    self.table = BucketTable::empty();
                    places(self.joined).for_each(|place| self.retire(place));
                }
            }
            self.counters.set_tally(self.frames.tally());
            self.counters.commands.add(1);
            if stop {
                return true;
            }
        }
        false
    }
}

/// The places that a set of bits stands for.
#[inline(always)]
fn places(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (place < MAX_MEMBERS).then_some(place)
    })
}

#[cfg(test)]
mod tests;
