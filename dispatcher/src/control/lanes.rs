//! Sends commands to all lanes, and queues actions that must wait for their acknowledgements.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use xfan_shm::ids::{GroupId, PortId};

use crate::control::groups::MemberKey;
use crate::control::inbox::{Event, InboxSender};
use crate::control::resources::Session;
use crate::group::Ticket;
use crate::host::sys;
use crate::lane::handle::LaneHandle;
use crate::lane::{BucketTable, Command, MemberLink};

/// How long the lanes may take to acknowledge a command before a warning is logged. A lane that
/// gets CPU time acknowledges a command after its current batch, within microseconds.
const LATE: Duration = Duration::from_secs(1);

/// What to do once all lanes have acknowledged a command.
#[derive(Debug)]
pub(super) enum AfterAck {
    /// Report the acknowledgement to the group.
    Notify(GroupId, Ticket),
    /// Record how many packets the lanes hold for a member.
    LogHeld { member: MemberKey, pid: u32 },
    /// Record how many packets of a member were requeued and lost. `requeued` and `lost` are its
    /// counters before the command.
    LogRetired { member: MemberKey, pid: u32, requeued: u64, lost: u64 },
    /// Drop a session, which unmaps its segments. A lane must not drop it last: it would wait for
    /// the kernel.
    Drop(#[expect(dead_code, reason = "it is dropped")] Box<Session>),
}

/// The lanes of all ports.
#[derive(Debug)]
pub struct Lanes {
    /// The lanes, by number.
    pub handles: Vec<LaneHandle>,
    /// Actions, in order, and the number of commands that every lane must acknowledge before.
    outstanding: VecDeque<(u64, AfterAck)>,
    /// Since when the oldest acknowledgement is outstanding.
    waiting_since: Instant,
    /// The log has a warning about it.
    warned: bool,
}

impl Lanes {
    pub(super) fn new(handles: Vec<LaneHandle>) -> Self {
        Lanes { handles, outstanding: VecDeque::new(), waiting_since: Instant::now(), warned: false }
    }

    /// Sends an event to the inbox for every acknowledgement of a lane.
    pub(super) fn watch(&self, sender: &InboxSender) -> std::io::Result<()> {
        for lane in &self.handles {
            let eventfd = sys::watched(lane.watch()?, Interest::READABLE)?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while let Ok(mut ready) = eventfd.readable().await {
                    let mut count = [0; 8];
                    let _ = nix::unistd::read(eventfd.get_ref(), &mut count);
                    ready.clear_ready();
                    sender.send_event(Event::Acknowledged);
                }
            });
        }
        Ok(())
    }

    /// The lanes of a port, in order.
    pub(super) fn of(&self, port: PortId) -> impl Iterator<Item = &LaneHandle> {
        self.handles.iter().filter(move |lane| lane.port == port)
    }

    /// The lanes of a port, in order.
    pub(super) fn of_mut(&mut self, port: PortId) -> impl Iterator<Item = &mut LaneHandle> {
        self.handles.iter_mut().filter(move |lane| lane.port == port)
    }

    /// Makes the lanes serve a member's worker. `links`: one for each lane, in order.
    pub(super) fn join(&mut self, MemberKey { group, member }: MemberKey, links: Vec<MemberLink>) {
        for (lane, link) in self.handles.iter_mut().zip(links) {
            lane.command(Command::Join { group, member, link: Box::new(link) });
        }
    }

    /// Makes the lanes use a table.
    pub(super) fn steer(&mut self, group: GroupId, table: &BucketTable) {
        for lane in &mut self.handles {
            lane.command(Command::Steer { group, table: Box::new(table.clone()) });
        }
    }

    /// Makes the lanes hold a member's uncommitted packets, and new packets of its flows.
    pub(super) fn hold(&mut self, MemberKey { group, member }: MemberKey) {
        for lane in &mut self.handles {
            lane.command(Command::Hold { group, member });
        }
    }

    /// Makes the lanes use a table, and requeue a member's uncommitted packets.
    pub(super) fn retire(&mut self, MemberKey { group, member }: MemberKey, table: &BucketTable) {
        for lane in &mut self.handles {
            lane.command(Command::Retire { group, member, table: Box::new(table.clone()) });
        }
    }

    /// Makes each lane report when it has found its RX ring empty.
    pub(super) fn drain(&mut self) {
        for lane in &mut self.handles {
            lane.command(Command::Drain);
        }
    }

    /// Does `action` once all lanes have acknowledged every command so far.
    pub(super) fn after_ack(&mut self, action: AfterAck) {
        if self.outstanding.is_empty() {
            (self.waiting_since, self.warned) = (Instant::now(), false);
        }
        let issued = self.handles.iter().map(LaneHandle::issued).max().unwrap_or(0);
        self.outstanding.push_back((issued, action));
    }

    /// Returns the next action whose commands all lanes have acknowledged. Does not wait.
    pub(super) fn next_acknowledged(&mut self) -> Option<AfterAck> {
        self.handles.iter_mut().for_each(LaneHandle::flush);
        let acknowledged = self.handles.iter().map(LaneHandle::acknowledged).min().unwrap_or(u64::MAX);
        let (_, action) = self.outstanding.pop_front_if(|(issued, _)| *issued <= acknowledged)?;
        (self.waiting_since, self.warned) = (Instant::now(), false);
        Some(action)
    }

    /// Logs a warning, once, if a lane has not acknowledged for a second.
    pub(super) fn warn_if_late(&mut self) {
        if !self.outstanding.is_empty() && !self.warned && self.waiting_since.elapsed() >= LATE {
            self.warned = true;
            tracing::warn!("a lane has not acknowledged a command within {LATE:?}: it gets no CPU time");
        }
    }
}
