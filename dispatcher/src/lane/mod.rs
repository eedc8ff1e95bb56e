//! A lane: one RX queue's thread and all it owns.
//!
//! ```text
//!                       ┌──────────────── lane ─────────────────┐
//!                       │           ┌────── per group ────────┐ │
//!   RX ring ──receive──►│ hash ──┬─►│ bucket ─► member ─push──│─│──► ring (1 of n) ──► worker
//!                       │        ┆  │    │ ring full, nobody: │ │                        │
//!                       │        ┆  │    ▼ dropped, counted   │ │                        │
//!   FILL ring ◄──post───│ free frames ◄────take back──────────│─│◄───────── commit ──────┘
//!                       │           └─────────────────────────┘ │
//!                       └───────────────────────────────────────┘
//! ```
//!
//! The frame invariant: every frame is free, the kernel's, the lane's or lent, and after each batch
//! none is the lane's. The kernel always has `posted` frames: the budget made at start holds that
//! many beside all that the rings can lend, so a worker, however slow, cannot starve another worker
//! of frames.
//!
//! Every group gets every packet whose frame the kernel rightly handed over. So for each lane and
//! each group `received = frame_owner + delivered + ring_full + no_worker`: the drops by frame
//! owner come before the groups and are the lane's, the others are counted per group.
//!
//! The loop allocates nothing, takes no lock, logs nothing, and makes no system call per packet: a
//! batch costs at most one `clock_gettime` (vDSO) and one `write` per sleeping worker.

mod batch;
mod bell;
pub mod buckets;
mod command;
pub mod counters;
#[cfg(test)]
mod families;
mod group;
pub mod handle;
pub mod hash;
mod idle;
mod link;

pub use buckets::{BUCKETS, BucketTable, NOBODY};
pub use command::Command;
pub use hash::HashKey;
pub use link::MemberLink;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};
use xfan_shm::Descriptor;
use xfan_shm::clock::{BusyMeter, CoarseClock, stamp, ticks};
use xfan_shm::ids::{PortId, QueueId};

use crate::memory::frames::{Frames, Region};
use crate::memory::umem::PacketMemory;
use crate::port::source::{PacketSource, Received};

use batch::{Stamp, Sums, accept, describe};
use counters::{GroupCounters, LaneCounters};
use group::LaneGroup;
use idle::{Idle, Turn};

/// Most packets handled in one turn.
pub const MAX_BATCH: usize = 64;

/// Most commands in a lane's queue. The lane runs them between two batches, so it rarely holds more
/// than a few.
const COMMANDS: usize = 256;

/// Longest sleep: how old the counters and the backlog of an idle lane can be.
const MAX_SLEEP: Duration = Duration::from_millis(100);

/// How a lane spends its time.
#[derive(Clone, Copy, Debug)]
pub struct LaneConfig {
    /// Packets per turn, at most [`MAX_BATCH`].
    pub batch: usize,
    /// Frames that the kernel has at any time.
    pub posted: u32,
    /// How long to spin when there is nothing to do …
    pub spin: Duration,
    /// … and how long to yield after that, before sleeping.
    pub yields: Duration,
    /// Whether a worker may run on the same CPU: a lane that never runs dry then yields to it.
    pub shared: bool,
}

/// What a lane is made of, beside its source.
#[derive(Debug)]
pub struct LaneParts {
    /// The port it belongs to.
    pub port: PortId,
    /// RX queue of the port.
    pub queue: QueueId,
    /// CPU to pin it on.
    pub core: usize,
    /// How it spends its time.
    pub config: LaneConfig,
    /// Where packets lie.
    pub memory: Arc<PacketMemory>,
    /// Its frames.
    pub region: Region,
    /// Key of the flow hash.
    pub key: HashKey,
    /// Number of groups, at least one.
    pub groups: usize,
    /// A second descriptor of its socket.
    pub socket: Option<OwnedFd>,
}

/// What a lane's thread and the control thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) counters: LaneCounters,
    /// By group.
    pub(crate) groups: Box<[Arc<GroupCounters>]>,
    pub(crate) commands: ArrayQueue<Command>,
    /// Wakes the lane.
    pub(crate) doorbell: OwnedFd,
    /// An eventfd that is readable once the lane has acknowledged commands.
    pub(crate) acknowledged: OwnedFd,
}

/// A lane, before and while it runs.
#[derive(Debug)]
pub struct Lane<S> {
    config: LaneConfig,
    port: PortId,
    source: S,
    memory: Arc<PacketMemory>,
    frames: Frames,
    key: HashKey,
    /// Descriptors of the batch at hand.
    descriptors: Box<[Descriptor; MAX_BATCH]>,
    groups: Box<[LaneGroup]>,
    shared: Arc<Shared>,
    meter: BusyMeter,
    draining: bool,
    /// Some ring is filling up.
    crowded: bool,
}

impl<S: PacketSource> Lane<S> {
    /// A lane that serves no worker yet.
    ///
    /// # Errors
    /// If there is no descriptor left for its doorbell.
    pub fn new(parts: &LaneParts, source: S) -> io::Result<Self> {
        let groups: Box<[Arc<GroupCounters>]> = (0..parts.groups.max(1)).map(|_| Arc::default()).collect();
        let eventfd = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let mut lane = Lane {
            config: parts.config,
            port: parts.port,
            source,
            memory: parts.memory.clone(),
            frames: Frames::new(parts.region, groups.len()),
            key: parts.key,
            descriptors: Box::new([Descriptor::default(); MAX_BATCH]),
            groups: groups.iter().cloned().map(LaneGroup::new).collect(),
            shared: Arc::new(Shared {
                counters: LaneCounters::default(),
                groups,
                commands: ArrayQueue::new(COMMANDS),
                doorbell: eventfd()?.into(),
                acknowledged: eventfd()?.into(),
            }),
            meter: BusyMeter::new(),
            draining: false,
            crowded: false,
        };
        lane.settle();
        Ok(lane)
    }

    /// The control thread's side of it.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
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
            if !self.shared.commands.is_empty() && self.run_commands() {
                self.settle();
                return self.frames;
            }
            let count = self.source.receive(&mut batch[..wanted]);
            if count > 0 {
                // Not `now`: packets may have come after it.
                self.dispatch(&mut batch[..count], stamp(clock.ns(ticks())));
                // The end of this turn is the beginning of the next: reading the counter is not
                // free.
                let start = std::mem::replace(&mut now, ticks());
                #[allow(clippy::cast_possible_truncation)] // at most MAX_BATCH
                self.meter.add(start, now, count as u32);
                self.shared.counters.busy_ticks.set(self.meter.busy_ticks());
                idle.reset();
                if std::mem::take(&mut self.crowded) && self.config.shared {
                    std::thread::yield_now();
                    self.settle();
                    now = ticks();
                }
                continue;
            }
            now = ticks();
            self.shared.counters.emptied.add(1);
            if std::mem::take(&mut self.draining) {
                self.shared.counters.drained.store(true, Ordering::Release);
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
                    self.shared.counters.sleeps.add(1);
                    self.source.wait(self.shared.doorbell.as_fd(), MAX_SLEEP);
                    now = ticks();
                }
            }
        }
    }

    /// Sends a batch on its way.
    #[inline]
    fn dispatch(&mut self, batch: &mut [Received], time: u32) {
        let stamp = Stamp { time, port: self.port };
        let mut sums = Sums::default();
        let received = batch.len();
        let accepted = accept(&mut self.frames, &self.memory, batch, &mut sums);
        let batch = &batch[..accepted];
        describe(&self.key, &self.memory, batch, stamp, &mut self.descriptors, &mut sums);
        let descriptors = &mut self.descriptors[..accepted.min(MAX_BATCH)];
        self.crowded |= match &mut *self.groups {
            [group] => group.deliver::<false>(&mut self.frames, descriptors),
            groups => deliver_to_each(groups, &mut self.frames, descriptors),
        };
        self.refill();
        self.publish(received, &sums);
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
        let counters = &self.shared.counters;
        counters.received.add(packets as u64);
        counters.bytes.add(sums.bytes);
        counters.batches.add(1);
        if sums.frame_owner > 0 {
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

    /// Takes back all that was committed, posts what is missing, publishes the result: what an idle
    /// lane does.
    #[cold]
    fn settle(&mut self) {
        self.take_back_all();
        let missing = self.config.posted.saturating_sub(self.frames.kernel());
        self.source.post(&mut self.frames, missing);
        self.shared.counters.set_tally(self.frames.tally());
    }

    fn take_back_all(&mut self) {
        for group in &mut self.groups {
            group.take_back_all(&mut self.frames);
        }
    }

    /// Carries out all commands; `true`: end.
    #[cold]
    fn run_commands(&mut self) -> bool {
        while let Some(command) = self.shared.commands.pop() {
            let stop = matches!(command, Command::Stop);
            self.carry_out(command);
            self.shared.counters.set_tally(self.frames.tally());
            self.shared.counters.commands.add(1);
            if stop {
                return true;
            }
        }
        // Its counter cannot overflow: the control thread reads it.
        let _ = nix::unistd::write(&self.shared.acknowledged, &1u64.to_ne_bytes());
        false
    }

    fn carry_out(&mut self, command: Command) {
        let (groups, frames) = (&mut self.groups, &mut self.frames);
        match command {
            Command::Join { group, member, link } => {
                self.crowded |= groups[group.index()].join(frames, member, *link);
            }
            Command::Steer { group, table } => groups[group.index()].table = *table,
            Command::Hold { group, member } => groups[group.index()].hold(frames, member),
            Command::Retire { group, member, table } => {
                let group = &mut groups[group.index()];
                group.table = *table;
                self.crowded |= group.retire(frames, member);
            }
            Command::Drain => self.draining = true,
            Command::Stop => groups.iter_mut().for_each(|group| group.retire_all(frames)),
        }
    }
}

/// Pushes the packets of a batch to several groups. Returns whether a ring is filling up.
#[inline(never)]
fn deliver_to_each(groups: &mut [LaneGroup], frames: &mut Frames, descriptors: &[Descriptor]) -> bool {
    // Before the first group: its workers may give frames back while the next one's get them.
    frames.lend(descriptors.iter().map(|descriptor| descriptor.offset));
    let mut crowded = false;
    for group in groups {
        let mut copy = [Descriptor::default(); MAX_BATCH];
        let copy = &mut copy[..descriptors.len()];
        copy.copy_from_slice(descriptors);
        crowded |= group.deliver::<true>(frames, copy);
    }
    crowded
}

#[cfg(test)]
mod tests;
