//! The lanes, as the group commands them. Each command goes to all lanes. What must not happen
//! before all lanes have obeyed a command is kept here until they have.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use xfan_shm::ids::{GroupId, PortId};

use crate::control::groups::MemberKey;
use crate::control::inbox::{Event, Outbox};
use crate::control::resources::Session;
use crate::group::Ticket;
use crate::host::sys;
use crate::lane::handle::LaneHandle;
use crate::lane::{BucketTable, Command, MemberLink};

/// After this time without an acknowledgement the log says that a lane gets no CPU time.
const LATE: Duration = Duration::from_secs(1);

/// What is done once all lanes have obeyed a command.
#[derive(Debug)]
pub(super) enum Then {
    /// The group hears of it.
    Tell(GroupId, Ticket),
    /// The event history says how many packets are held.
    Held { member: MemberKey, pid: u32 },
    /// The event history says how many packets were requeued and lost beyond these.
    Retired { member: MemberKey, pid: u32, requeued: u64, lost: u64 },
    /// The segments of a session are unmapped: not by a lane, which would wait for the kernel.
    Drop(#[expect(dead_code, reason = "it is dropped")] Box<Session>),
}

/// The lanes of all ports.
#[derive(Debug)]
pub struct Lanes {
    /// In the order of their numbers.
    pub handles: Vec<LaneHandle>,
    outstanding: VecDeque<(u64, Then)>,
    /// When the oldest of them was due, and whether the log has told that it is late.
    since: Instant,
    told: bool,
}

impl Lanes {
    pub(super) fn new(handles: Vec<LaneHandle>) -> Self {
        Lanes { handles, outstanding: VecDeque::new(), since: Instant::now(), told: false }
    }

    /// Has every acknowledgement of a lane become an event.
    pub(super) fn watch(&self, outbox: &Outbox) -> std::io::Result<()> {
        for lane in &self.handles {
            let obeyed = sys::watched(lane.watch()?, Interest::READABLE)?;
            let outbox = outbox.clone();
            tokio::spawn(async move {
                while let Ok(mut ready) = obeyed.readable().await {
                    let mut count = [0; 8];
                    let _ = nix::unistd::read(obeyed.get_ref(), &mut count);
                    ready.clear_ready();
                    outbox.event(Event::Obeyed);
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

    pub(super) fn join(&mut self, MemberKey { group, member }: MemberKey, links: Vec<MemberLink>) {
        for (lane, link) in self.handles.iter_mut().zip(links) {
            lane.command(Command::Join { group, member, link: Box::new(link) });
        }
    }

    pub(super) fn steer(&mut self, group: GroupId, table: &BucketTable) {
        for lane in &mut self.handles {
            lane.command(Command::Steer { group, table: Box::new(table.clone()) });
        }
    }

    pub(super) fn hold(&mut self, MemberKey { group, member }: MemberKey) {
        for lane in &mut self.handles {
            lane.command(Command::Hold { group, member });
        }
    }

    pub(super) fn retire(&mut self, MemberKey { group, member }: MemberKey, table: &BucketTable) {
        for lane in &mut self.handles {
            lane.command(Command::Retire { group, member, table: Box::new(table.clone()) });
        }
    }

    pub(super) fn drain(&mut self) {
        for lane in &mut self.handles {
            lane.command(Command::Drain);
        }
    }

    /// Has something done once all lanes have obeyed every command so far.
    pub(super) fn when_obeyed(&mut self, then: Then) {
        if self.outstanding.is_empty() {
            (self.since, self.told) = (Instant::now(), false);
        }
        let issued = self.handles.iter().map(LaneHandle::issued).max().unwrap_or(0);
        self.outstanding.push_back((issued, then));
    }

    /// The next thing to do, now that all lanes have obeyed. Never waits.
    pub(super) fn next_obeyed(&mut self) -> Option<Then> {
        self.handles.iter_mut().for_each(LaneHandle::flush);
        let obeyed = self.handles.iter().map(LaneHandle::obeyed).min().unwrap_or(u64::MAX);
        let (_, then) = self.outstanding.pop_front_if(|(issued, _)| *issued <= obeyed)?;
        (self.since, self.told) = (Instant::now(), false);
        Some(then)
    }

    /// Tells once if a lane has not obeyed for a second.
    pub(super) fn look_for_late(&mut self) {
        if !self.outstanding.is_empty() && !self.told && self.since.elapsed() >= LATE {
            self.told = true;
            tracing::warn!("a lane has not obeyed within {LATE:?}: it gets no CPU time");
        }
    }
}
