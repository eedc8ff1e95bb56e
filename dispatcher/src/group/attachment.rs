//! Workers that attach, join, and ask to leave.

use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Cause, ConnectionId, Fact, Order, Refused, Ticket};
use crate::group::machine::Group;
use crate::group::member::{Closing, Joining, State, StopDeadline, Worker};

impl Group {
    pub(super) fn attaching(
        &mut self,
        member: MemberId,
        connection: ConnectionId,
        now: Instant,
    ) -> Result<(), Refused> {
        if self.is_stopping() {
            return Err(Refused::Stopping);
        }
        self.member(member)?.may_attach()?;
        if self.member_of(connection).is_some() {
            return Err(Refused::Occupied);
        }
        let until = now + self.policy.start_timeout;
        let member = &mut self.members[member.index()];
        if let State::Starting { process, .. } | State::Detached { process, .. } = &mut member.state {
            // Each further attach counts as a start.
            if process.attached > 0 {
                member.starts.count(now);
            }
            process.attached = process.attached.saturating_add(1);
        }
        if let Some(joining) = member.state.joining() {
            *joining = Some(Joining { connection, until });
        }
        Ok(())
    }

    pub(super) fn joined(&mut self, connection: ConnectionId) -> Result<(), Refused> {
        let member = self.member_of(connection).ok_or(Refused::NoWorker)?;
        let displayed = self.members[member.index()].display_state();
        let (process, held) = match self.members[member.index()].state {
            State::Vacant { joining: Some(_), held, .. } => (None, held),
            State::Starting { process, joining: Some(_), held, .. }
            | State::Detached { process, joining: Some(_), held, .. } => (Some(process), held),
            _ => return Err(Refused::Illegal(displayed)),
        };
        let worker = Worker { connection, process, last_progress: None };
        self.members[member.index()].state = State::Running { worker, stalled: false };
        self.actions.push(Action::Join(member));
        self.record(member, Fact::Attached);
        if held.is_some() {
            self.record(member, Fact::Resumed);
        }
        self.steer();
        Ok(())
    }

    /// Drains a worker that asked to leave.
    pub(super) fn detach(&mut self, connection: ConnectionId) {
        let Some(member) = self.member_of(connection) else { return };
        if let State::Running { worker, .. } = self.members[member.index()].state {
            self.drain(member, worker, None, None, Cause::Requested);
            self.steer();
        }
    }

    /// Starts to drain a worker. The caller's next change must give its flows to others. Once the
    /// lanes have acknowledged that change, the worker is told that its rings hold its last
    /// packets.
    pub(super) fn drain(
        &mut self,
        member: MemberId,
        worker: Worker,
        order: Option<Order>,
        stop_deadline: Option<StopDeadline>,
        cause: Cause,
    ) {
        let closing = Closing::AfterAck(Ticket(self.last_ticket + 1));
        self.members[member.index()].state = State::Draining { worker, order, stop_deadline, closing };
        self.record(member, Fact::Draining(cause));
    }
}
