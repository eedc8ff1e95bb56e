//! Workers attach and join, and ask to leave.

use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Cause, ConnectionId, Fact, Purpose, Refused, Ticket};
use crate::group::machine::Group;
use crate::group::member::{Closing, Joining, Overdue, State, Worker};

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
        self.get(member)?.may_attach()?;
        if self.member_of(connection).is_some() {
            return Err(Refused::Occupied);
        }
        let until = now + self.policy.start_timeout;
        let member = &mut self.members[member.index()];
        if let State::Starting { process, .. } | State::Detached { process, .. } = &mut member.state {
            // Re-attaching counts as a start.
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
        let shown = self.members[member.index()].shown();
        let (process, held) = match self.members[member.index()].state {
            State::Vacant { joining: Some(_), held, .. } => (None, held),
            State::Starting { process, joining: Some(_), held, .. }
            | State::Detached { process, joining: Some(_), held, .. } => (Some(process), held),
            _ => return Err(Refused::Illegal(shown)),
        };
        let worker = Worker { connection, process, pulse: None };
        self.members[member.index()].state = State::Running { worker, stalled: false };
        self.out.push(Action::Join(member));
        self.record(member, Fact::Attached);
        if held.is_some() {
            self.record(member, Fact::Resumed);
        }
        self.steer();
        Ok(())
    }

    /// A worker wants to leave: it gets no new packets, and is told so once that is true.
    pub(super) fn detach(&mut self, connection: ConnectionId) {
        let Some(member) = self.member_of(connection) else { return };
        if let State::Running { worker, .. } = self.members[member.index()].state {
            self.drain(member, worker, None, None, Cause::Asked);
            self.steer();
        }
    }

    /// Takes a worker's share of the flows away with the next change, after which it is told that
    /// no more packets come.
    pub(super) fn drain(
        &mut self,
        member: MemberId,
        worker: Worker,
        purpose: Option<Purpose>,
        overdue: Option<Overdue>,
        cause: Cause,
    ) {
        let closing = Closing::When(Ticket(self.tickets + 1));
        self.members[member.index()].state = State::Draining { worker, purpose, overdue, closing };
        self.record(member, Fact::Draining(cause));
    }
}
