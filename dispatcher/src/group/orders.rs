//! Operators' orders: workers are added, drained, restarted and removed.
//!
//! A worker that must leave gets no new packets, and finishes those it has. If its process has not
//! exited after `stop_timeout`, it gets SIGTERM, and SIGKILL after the same time again. A worker
//! that the primary did not start is evicted after `stop_timeout`.

use std::mem::take;
use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::display_state::DisplayState;
use crate::group::event::{Action, Cause, Fact, KillReason, Order, Refused};
use crate::group::machine::Group;
use crate::group::member::{Down, DownReason, SpawnReason, State, StopDeadline};
use crate::group::phase::Phase;

impl Group {
    /// Checks that the group accepts orders.
    fn accepts_orders(&self) -> Result<(), Refused> {
        match self.phase {
            Phase::Open => Ok(()),
            Phase::Starting | Phase::Opening(_) => Err(Refused::Starting),
            Phase::Stopping(_) => Err(Refused::Stopping),
        }
    }

    pub(super) fn add(&mut self, member: MemberId, now: Instant) -> Result<(), Refused> {
        self.accepts_orders()?;
        let State::Vacant { crashed, joining: None, held } = self.member(member)?.state else {
            return Err(Refused::Occupied);
        };
        self.members[member.index()].starts.reset();
        let reason = if crashed { DownReason::Crashed } else { DownReason::Stopped };
        self.spawn(member, SpawnReason::Add, Down { reason, restart: None, held }, now);
        Ok(())
    }

    pub(super) fn order(&mut self, member: MemberId, order: Order, now: Instant) -> Result<(), Refused> {
        self.accepts_orders()?;
        let state = self.member(member)?.state;
        match state {
            State::Draining { order: Some(_), .. }
            | State::Leaving { .. }
            | State::Killed { order: Some(_), .. } => return Err(Refused::Leaving),
            State::Running { worker, .. } | State::Draining { worker, .. }
                if worker.process.is_none() && order == Order::Restart =>
            {
                return Err(Refused::Unsupervised);
            }
            State::Spawning { .. } => {
                return Err(Refused::Illegal(self.members[member.index()].display_state()));
            }
            _ => {}
        }
        // No worker will come for the packets that are held.
        let released = order != Order::Restart && self.release(member);
        let stop_deadline = StopDeadline::after(now, self.policy.stop_timeout);
        match self.members[member.index()].state {
            State::Vacant { .. } if released => Ok(()),
            State::Vacant { .. } => Err(Refused::NoWorker),
            State::Down(down) => self.order_down(member, down, order, released, now),
            State::Starting { process, joining, held, .. }
            | State::Detached { process, joining, held, .. } => {
                self.record(member, Fact::Draining(Cause::Ordered));
                self.members[member.index()].state = State::Leaving { process, order, stop_deadline, held };
                self.disconnect(member, joining);
                self.actions.push(Action::Terminate(process.id));
                Ok(())
            }
            State::Running { worker, .. } => {
                self.drain(member, worker, Some(order), Some(stop_deadline), Cause::Ordered);
                self.steer();
                Ok(())
            }
            State::Draining { worker, closing, .. } => {
                let (order, stop_deadline) = (Some(order), Some(stop_deadline));
                self.members[member.index()].state =
                    State::Draining { worker, order, stop_deadline, closing };
                Ok(())
            }
            State::Killed { process, displayed, retry_at, held, .. } => {
                let order = Some(order);
                self.members[member.index()].state =
                    State::Killed { process, displayed, order, retry_at, held };
                Ok(())
            }
            State::Spawning { .. } | State::Leaving { .. } => Err(Refused::Leaving),
        }
    }

    fn order_down(
        &mut self,
        member: MemberId,
        down: Down,
        order: Order,
        released: bool,
        now: Instant,
    ) -> Result<(), Refused> {
        match order {
            Order::Restart => {
                self.members[member.index()].starts.reset();
                self.spawn(member, SpawnReason::OrderedStart, down, now);
            }
            Order::Remove => {
                self.members[member.index()].state = State::VACANT;
                self.record(member, Fact::Vacated(Cause::Ordered));
            }
            Order::Drain if down.restart.is_some() => {
                let down = Down { reason: DownReason::Stopped, restart: None, held: down.held };
                self.members[member.index()].state = State::Down(down);
                self.record(member, Fact::Left(Cause::Ordered));
            }
            Order::Drain if released => {}
            Order::Drain => return Err(Refused::NoWorker),
        }
        Ok(())
    }

    /// Completes an order: the worker has left. `supervised`: the primary started it, and its
    /// process has exited.
    pub(super) fn complete_order(
        &mut self,
        member: MemberId,
        order: Order,
        supervised: bool,
        held: Option<Instant>,
        now: Instant,
    ) {
        let down = Down { reason: DownReason::Stopped, restart: None, held };
        match order {
            Order::Drain if supervised => {
                self.members[member.index()].state = State::Down(down);
                self.record(member, Fact::Left(Cause::Ordered));
            }
            Order::Restart if supervised => {
                self.members[member.index()].state = State::Down(down);
                self.record(member, Fact::Left(Cause::Restart));
                self.members[member.index()].starts.reset();
                self.spawn(member, SpawnReason::OrderedRestart, down, now);
            }
            _ => {
                self.members[member.index()].state = State::Vacant { crashed: false, joining: None, held };
                self.record(member, Fact::Vacated(Cause::Ordered));
            }
        }
    }

    /// Acts on a worker that has not left in time: SIGTERM first, then SIGKILL; a worker that the
    /// primary did not start is evicted.
    pub(super) fn escalate(&mut self, member: MemberId, now: Instant) {
        let interval = self.kill_interval();
        let found = &mut self.members[member.index()];
        let process = found.state.process().map(|process| process.id);
        let Some(stop_deadline) = found.state.stop_deadline() else { return };
        let terminated = std::mem::replace(&mut stop_deadline.terminated, true);
        stop_deadline.at = now + interval;
        match process {
            Some(_) if terminated => self.kill(member, KillReason::IgnoredSigterm, now),
            Some(process) => self.actions.push(Action::Terminate(process)),
            None => {
                self.record(member, Fact::Died(Cause::StopTimeout));
                self.evict(member, DisplayState::Crashed, now);
            }
        }
    }

    /// Cancels the orders and restarts of a member, and closes the connection of a worker that is
    /// joining: the primary is stopping.
    pub(super) fn cancel_orders(&mut self, member: MemberId) {
        self.members[member.index()].state = match take(&mut self.members[member.index()].state) {
            State::Vacant { crashed, joining, held } => {
                self.disconnect(member, joining);
                State::Vacant { crashed, joining: None, held }
            }
            State::Down(down) => State::Down(Down { restart: None, ..down }),
            State::Starting { process, until, joining, held, .. } => {
                self.disconnect(member, joining);
                State::Starting { process, until, joining: None, stop_deadline: None, held }
            }
            State::Detached { process, crashed, joining, held, .. } => {
                self.disconnect(member, joining);
                State::Detached { process, crashed, joining: None, stop_deadline: None, held }
            }
            State::Draining { worker, closing, .. } => {
                State::Draining { worker, order: None, stop_deadline: None, closing }
            }
            State::Leaving { process, held, .. } => {
                State::Detached { process, crashed: false, joining: None, stop_deadline: None, held }
            }
            State::Killed { process, displayed, retry_at, held, .. } => {
                State::Killed { process, displayed, order: None, retry_at, held }
            }
            other @ (State::Spawning { .. } | State::Running { .. }) => other,
        };
    }
}
