//! What operators order: workers are added, drained, restarted, removed.
//!
//! A worker that is to leave gets no new packets, finishes those it has, and is told that there
//! will be no more. A process that has not ended by `stop_timeout` gets SIGTERM, and SIGKILL after
//! as much again; a worker that the primary did not start is evicted.

use std::mem::take;
use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Cause, Fact, Purpose, Reason, Refused};
use crate::group::machine::Group;
use crate::group::member::{Down, Occasion, Overdue, Rest, State};
use crate::group::phase::Phase;
use crate::group::shown::Shown;

impl Group {
    /// Whether orders are taken now.
    fn takes_orders(&self) -> Result<(), Refused> {
        match self.phase {
            Phase::Open => Ok(()),
            Phase::Starting | Phase::Opening(_) => Err(Refused::Starting),
            Phase::Stopping(_) => Err(Refused::Stopping),
        }
    }

    pub(super) fn add(&mut self, member: MemberId, now: Instant) -> Result<(), Refused> {
        self.takes_orders()?;
        let State::Vacant { crashed, joining: None, held } = self.get(member)?.state else {
            return Err(Refused::Occupied);
        };
        self.members[member.index()].starts.forgive();
        let rest = if crashed { Rest::Crashed } else { Rest::Stopped };
        self.spawn(member, Occasion::Add, Down { rest, restart: None, held }, now);
        Ok(())
    }

    pub(super) fn order(&mut self, member: MemberId, purpose: Purpose, now: Instant) -> Result<(), Refused> {
        self.takes_orders()?;
        let state = self.get(member)?.state;
        match state {
            State::Draining { purpose: Some(_), .. }
            | State::Leaving { .. }
            | State::Killed { purpose: Some(_), .. } => return Err(Refused::Leaving),
            State::Running { worker, .. } | State::Draining { worker, .. }
                if worker.process.is_none() && purpose == Purpose::StartAgain =>
            {
                return Err(Refused::Foreign);
            }
            State::Spawning { .. } => return Err(Refused::Illegal(self.members[member.index()].shown())),
            _ => {}
        }
        // No worker will come for what is held.
        let released = purpose != Purpose::StartAgain && self.release(member);
        let overdue = Overdue::after(now, self.policy.stop_timeout);
        match self.members[member.index()].state {
            State::Vacant { .. } if released => Ok(()),
            State::Vacant { .. } => Err(Refused::NoWorker),
            State::Down(down) => self.order_down(member, down, purpose, released, now),
            State::Starting { process, joining, held, .. }
            | State::Detached { process, joining, held, .. } => {
                self.record(member, Fact::Draining(Cause::Ordered));
                self.members[member.index()].state = State::Leaving { process, purpose, overdue, held };
                self.hang_up(member, joining);
                self.out.push(Action::Terminate(process.id));
                Ok(())
            }
            State::Running { worker, .. } => {
                self.drain(member, worker, Some(purpose), Some(overdue), Cause::Ordered);
                self.steer();
                Ok(())
            }
            State::Draining { worker, closing, .. } => {
                let (purpose, overdue) = (Some(purpose), Some(overdue));
                self.members[member.index()].state = State::Draining { worker, purpose, overdue, closing };
                Ok(())
            }
            State::Killed { process, shown, again, held, .. } => {
                let purpose = Some(purpose);
                self.members[member.index()].state = State::Killed { process, shown, purpose, again, held };
                Ok(())
            }
            State::Spawning { .. } | State::Leaving { .. } => Err(Refused::Leaving),
        }
    }

    fn order_down(
        &mut self,
        member: MemberId,
        down: Down,
        purpose: Purpose,
        released: bool,
        now: Instant,
    ) -> Result<(), Refused> {
        match purpose {
            Purpose::StartAgain => {
                self.members[member.index()].starts.forgive();
                self.spawn(member, Occasion::Order, down, now);
            }
            Purpose::FreeMember => {
                self.members[member.index()].state = State::VACANT;
                self.record(member, Fact::Vacated(Cause::Ordered));
            }
            Purpose::StayDown if down.restart.is_some() => {
                let down = Down { rest: Rest::Stopped, restart: None, held: down.held };
                self.members[member.index()].state = State::Down(down);
                self.record(member, Fact::Left(Cause::Ordered));
            }
            Purpose::StayDown if released => {}
            Purpose::StayDown => return Err(Refused::NoWorker),
        }
        Ok(())
    }

    /// A worker has left as it was told, and its process, if the primary started it, has ended.
    pub(super) fn has_left(
        &mut self,
        member: MemberId,
        purpose: Purpose,
        supervised: bool,
        held: Option<Instant>,
        now: Instant,
    ) {
        let down = Down { rest: Rest::Stopped, restart: None, held };
        match purpose {
            Purpose::StayDown if supervised => {
                self.members[member.index()].state = State::Down(down);
                self.record(member, Fact::Left(Cause::Ordered));
            }
            Purpose::StartAgain if supervised => {
                self.members[member.index()].state = State::Down(down);
                self.record(member, Fact::Left(Cause::Restart));
                self.members[member.index()].starts.forgive();
                self.spawn(member, Occasion::Again, down, now);
            }
            _ => {
                self.members[member.index()].state = State::Vacant { crashed: false, joining: None, held };
                self.record(member, Fact::Vacated(Cause::Ordered));
            }
        }
    }

    /// Does something about a worker that ought to have ended.
    pub(super) fn overdue(&mut self, member: MemberId, now: Instant) {
        let patience = self.patience();
        let found = &mut self.members[member.index()];
        let process = found.state.process().map(|process| process.id);
        let Some(overdue) = found.state.overdue() else { return };
        let terminated = std::mem::replace(&mut overdue.terminated, true);
        overdue.at = now + patience;
        match process {
            Some(_) if terminated => self.kill(member, Reason::Deaf, now),
            Some(process) => self.out.push(Action::Terminate(process)),
            None => {
                self.record(member, Fact::Died(Cause::Overdue));
                self.evict(member, Shown::Crashed, now);
            }
        }
    }

    /// Forgets what was ordered: the primary stops.
    pub(super) fn forget_orders(&mut self, member: MemberId) {
        self.members[member.index()].state = match take(&mut self.members[member.index()].state) {
            State::Vacant { crashed, joining, held } => {
                self.hang_up(member, joining);
                State::Vacant { crashed, joining: None, held }
            }
            State::Down(down) => State::Down(Down { restart: None, ..down }),
            State::Starting { process, until, joining, held, .. } => {
                self.hang_up(member, joining);
                State::Starting { process, until, joining: None, overdue: None, held }
            }
            State::Detached { process, crashed, joining, held, .. } => {
                self.hang_up(member, joining);
                State::Detached { process, crashed, joining: None, overdue: None, held }
            }
            State::Draining { worker, closing, .. } => {
                State::Draining { worker, purpose: None, overdue: None, closing }
            }
            State::Leaving { process, held, .. } => {
                State::Detached { process, crashed: false, joining: None, overdue: None, held }
            }
            State::Killed { process, shown, again, held, .. } => {
                State::Killed { process, shown, purpose: None, again, held }
            }
            other @ (State::Spawning { .. } | State::Running { .. }) => other,
        };
    }
}
