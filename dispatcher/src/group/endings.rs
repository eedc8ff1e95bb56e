//! The end of a worker: its connection is closed, its process exits, or it is evicted or killed.
//!
//! The other members get its flows and its uncommitted packets at once, or the lanes hold them for
//! the member's next worker.

use std::mem::take;
use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::display_state::DisplayState;
use crate::group::event::{Action, Cause, ConnectionId, Fact, Failure, KillReason, ProcessId};
use crate::group::machine::Group;
use crate::group::member::{Down, DownReason, Member, Process, SpawnReason, State, StopDeadline};
use crate::group::phase::Phase;
use crate::group::starts::Decision;

/// The circumstances under which a session ends.
pub(super) struct SessionEnd {
    /// The worker had a share of the flows.
    pub had_flows: bool,
    /// The worker did not leave in good order.
    pub crashed: bool,
}

impl Group {
    /// Ends the session of a member. `next` makes the member's new state. Its argument says until
    /// when packets are held.
    pub(super) fn end_session(
        &mut self,
        member: MemberId,
        end: &SessionEnd,
        now: Instant,
        next: impl FnOnce(Option<Instant>) -> State,
    ) {
        let hold = self.policy.hold.filter(|_| end.had_flows && !self.is_stopping());
        self.members[member.index()].state = next(hold.map(|time| now + time));
        self.actions.push(Action::EndSession { member, revoke: end.crashed || hold.is_some() });
        if hold.is_some() {
            let ticket = self.ticket();
            self.actions.push(Action::Hold(ticket, member));
        } else {
            self.retire(member);
        }
    }

    /// Ends the session of a member, and kills its process if the primary started it. `displayed`:
    /// the state to show until the process has exited.
    pub(super) fn evict(&mut self, member: MemberId, displayed: DisplayState, now: Instant) {
        let (worker, order, had_flows) = match take(&mut self.members[member.index()].state) {
            State::Running { worker, .. } => (worker, None, true),
            State::Draining { worker, order, .. } => (worker, order, false),
            other => {
                self.members[member.index()].state = other;
                return;
            }
        };
        let end = SessionEnd { had_flows, crashed: true };
        let retry_at = now + self.kill_interval();
        self.end_session(member, &end, now, |held| match worker.process {
            Some(process) => State::Killed { process, displayed, order, retry_at, held },
            None => State::Vacant { crashed: true, joining: None, held },
        });
        match (worker.process, order) {
            (Some(process), _) => self.actions.push(Action::Kill(process.id)),
            (None, Some(order)) => self.complete_order(member, order, false, None, now),
            (None, None) => {}
        }
    }

    /// Kills the process of a member, and ends its session.
    pub(super) fn kill(&mut self, member: MemberId, reason: KillReason, now: Instant) {
        self.record(member, Fact::Killed(reason));
        let displayed = self.members[member.index()].display_state();
        let retry_at = now + self.kill_interval();
        let (process, joining, order, held) = match take(&mut self.members[member.index()].state) {
            State::Starting { process, joining, held, .. }
            | State::Detached { process, joining, held, .. } => (process, joining, None, held),
            State::Leaving { process, order, held, .. } => (process, None, Some(order), held),
            State::Killed { process, order, held, .. } => (process, None, order, held),
            other => {
                self.members[member.index()].state = other;
                return self.evict(member, displayed, now);
            }
        };
        self.members[member.index()].state = State::Killed { process, displayed, order, retry_at, held };
        self.disconnect(member, joining);
        self.actions.push(Action::Kill(process.id));
    }

    pub(super) fn disconnected(&mut self, connection: ConnectionId, now: Instant) {
        let Some(member) = self.member_of(connection) else { return };
        if let Some(joining) = self.members[member.index()].state.joining() {
            *joining = None;
            self.record(member, Fact::DisconnectedEarly);
            return self.require_exit_or_reattach(member, now);
        }
        let orderly = SessionEnd { had_flows: false, crashed: false };
        match self.members[member.index()].state {
            State::Running { worker, .. } => {
                self.record(member, Fact::Died(Cause::Disconnected));
                let end = SessionEnd { had_flows: true, crashed: true };
                self.end_session(member, &end, now, |held| match worker.process {
                    Some(process) => {
                        State::Detached { process, crashed: true, joining: None, stop_deadline: None, held }
                    }
                    None => State::Vacant { crashed: true, joining: None, held },
                });
                self.require_exit_or_reattach(member, now);
            }
            State::Draining { worker, order, stop_deadline, .. } => match (worker.process, order) {
                (None, None) => {
                    self.record(member, Fact::Vacated(Cause::Requested));
                    self.end_session(member, &orderly, now, |_| State::VACANT);
                }
                (None, Some(order)) => {
                    self.end_session(member, &orderly, now, |_| State::VACANT);
                    self.complete_order(member, order, false, None, now);
                }
                (Some(process), None) => {
                    self.record(member, Fact::Left(Cause::Requested));
                    self.end_session(member, &orderly, now, |held| State::Detached {
                        process,
                        crashed: false,
                        joining: None,
                        stop_deadline: None,
                        held,
                    });
                    self.require_exit_or_reattach(member, now);
                }
                (Some(process), Some(order)) => {
                    let stop_deadline =
                        stop_deadline.unwrap_or(StopDeadline::after(now, self.policy.stop_timeout));
                    self.end_session(member, &orderly, now, |held| State::Leaving {
                        process,
                        order,
                        stop_deadline,
                        held,
                    });
                    self.require_exit_or_reattach(member, now);
                }
            },
            _ => {}
        }
    }

    /// Gives the process of a member, which has lost its connection, `stop_timeout` to exit or to
    /// attach again. Kills it if it has attached too often.
    pub(super) fn require_exit_or_reattach(&mut self, member: MemberId, now: Instant) {
        let (restart, timeout) = (self.policy.restart, self.policy.stop_timeout);
        let stopping = self.is_stopping();
        let found = &mut self.members[member.index()];
        let Some(attached) = found.state.process().map(|process| process.attached) else { return };
        if stopping {
            return;
        }
        if attached > 1 && found.starts.limit_reached(&restart, now) {
            self.kill(member, KillReason::AttachedTooOften, now);
        } else if let State::Starting { stop_deadline, .. } | State::Detached { stop_deadline, .. } =
            &mut found.state
        {
            stop_deadline.get_or_insert(StopDeadline::after(now, timeout));
        }
    }

    pub(super) fn exited(&mut self, id: ProcessId, success: Option<bool>, now: Instant) {
        if let Some(at) = self.unwanted.iter().position(|(unwanted, _)| *unwanted == id) {
            self.unwanted.swap_remove(at);
            self.actions.push(Action::Forget(id));
            return;
        }
        let Some(member) = self.member_of_process(id) else { return };
        self.actions.push(Action::Forget(id));
        let displayed = self.members[member.index()].display_state();
        let expected = matches!(displayed, DisplayState::Draining | DisplayState::Stopped);
        // Only the parent learns the exit status. For an adopted process, assume success if it had
        // to exit.
        let success = success.unwrap_or(self.is_stopping() && expected);
        let reason = |success| if success { DownReason::Stopped } else { DownReason::Crashed };
        let down = |success, held| Down { reason: reason(success), restart: None, held };
        let fact = |success| if success { Fact::Left(Cause::Exited) } else { Fact::Died(Cause::Exited) };
        match take(&mut self.members[member.index()].state) {
            State::Starting { process, joining, held, .. } => {
                self.disconnect(member, joining);
                self.never_attached(member, process, held, now);
            }
            State::Killed { process, displayed: DisplayState::Starting, order: None, held, .. } => {
                self.never_attached(member, process, held, now);
            }
            State::Detached { joining, held, .. } => {
                self.disconnect(member, joining);
                self.record(member, fact(success));
                self.decide_restart(member, down(success, held), success, now);
            }
            State::Running { .. } => {
                self.record(member, fact(success));
                let end = SessionEnd { had_flows: true, crashed: !success };
                self.end_session(member, &end, now, |held| State::Down(down(success, held)));
                let held = self.members[member.index()].state.held().and_then(|held| *held);
                self.decide_restart(member, down(success, held), success, now);
            }
            State::Draining { order: None, .. } => {
                self.record(member, fact(success));
                let end = SessionEnd { had_flows: false, crashed: !success };
                self.end_session(member, &end, now, |held| State::Down(down(success, held)));
                self.decide_restart(member, down(success, None), success, now);
            }
            State::Draining { order: Some(order), .. } => {
                let end = SessionEnd { had_flows: false, crashed: false };
                self.end_session(member, &end, now, |_| State::VACANT);
                self.complete_order(member, order, true, None, now);
            }
            State::Leaving { order, held, .. } | State::Killed { order: Some(order), held, .. } => {
                self.complete_order(member, order, true, held, now);
            }
            // A killed process has failed, whatever its exit status.
            State::Killed { held, .. } => {
                self.record(member, fact(false));
                self.decide_restart(member, down(false, held), false, now);
            }
            other @ (State::Vacant { .. } | State::Down(_) | State::Spawning { .. }) => {
                self.members[member.index()].state = other;
            }
        }
    }

    /// Handles a process that exited before it attached. It has failed, whatever its exit status.
    fn never_attached(&mut self, member: MemberId, process: Process, held: Option<Instant>, now: Instant) {
        let down = Down { reason: DownReason::Crashed, restart: None, held };
        self.members[member.index()].state = State::Down(down);
        if self.is_stopping() {
            self.record(member, Fact::Died(Cause::Exited));
        } else if process.adopted {
            self.record(member, Fact::Died(Cause::NotReattached));
            self.members[member.index()].starts.reset();
            self.spawn(member, SpawnReason::ReplaceAdopted, down, now);
        } else if self.phase == Phase::Starting {
            self.actions.push(Action::Fail(Failure::EndedEarly(member)));
        } else {
            self.record(member, Fact::Died(Cause::Exited));
            self.decide_restart(member, down, false, now);
        }
    }

    /// Decides whether to restart a worker whose process exited or could not be started.
    pub(super) fn decide_restart(&mut self, member: MemberId, down: Down, success: bool, now: Instant) {
        self.members[member.index()].state = State::Down(Down { restart: None, ..down });
        if self.is_stopping() {
            return;
        }
        let restart = self.policy.restart;
        match self.members[member.index()].starts.decide(&restart, now, success) {
            Decision::StayDown => {
                self.release(member);
            }
            Decision::RestartAfter(delay) => {
                self.members[member.index()].state = State::Down(Down { restart: Some(now + delay), ..down });
            }
            Decision::GiveUp => {
                self.members[member.index()].state =
                    State::Down(Down { reason: DownReason::Failed, restart: None, ..down });
                self.record(member, Fact::GivenUp { too_often: true });
                self.release(member);
            }
        }
        let is_down = |member: &Member| {
            matches!(member.state, State::Vacant { .. } | State::Down(Down { restart: None, .. }))
        };
        if self.members.iter().all(is_down) {
            self.actions.push(Action::Fail(Failure::NoneLeft(member)));
        }
    }
}
