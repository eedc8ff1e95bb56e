//! How a worker is lost: its connection ends, its process ends, or it is evicted.
//!
//! Its flows, and the packets that it has not committed, go to the others at once, or are held for
//! the next worker of the member.

use std::mem::take;
use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Cause, ConnectionId, Fact, Failure, ProcessId, Reason};
use crate::group::machine::Group;
use crate::group::member::{Down, Member, Occasion, Overdue, Process, Rest, State};
use crate::group::phase::Phase;
use crate::group::restart::Verdict;
use crate::group::shown::Shown;

/// What a session leaves behind when it ends.
pub(super) struct Lost {
    /// Its worker had a share of the flows.
    pub flows: bool,
    /// An operator told it to leave: no other worker will come for its packets.
    pub told: bool,
    /// The worker did not leave in good order.
    pub crashed: bool,
}

impl Group {
    /// Ends the session of a member, whose state becomes `next` of what is held until when.
    pub(super) fn lose(
        &mut self,
        member: MemberId,
        lost: &Lost,
        now: Instant,
        next: impl FnOnce(Option<Instant>) -> State,
    ) {
        let hold = self.policy.hold.filter(|_| lost.flows && !lost.told && !self.is_stopping());
        self.members[member.index()].state = next(hold.map(|time| now + time));
        self.out.push(Action::EndSession { member, lost: lost.crashed || hold.is_some() });
        if hold.is_some() {
            let ticket = self.ticket();
            self.out.push(Action::Hold(ticket, member));
        } else {
            self.retire(member);
        }
    }

    /// Ends the session of a member against its worker's will, and kills its process.
    pub(super) fn evict(&mut self, member: MemberId, shown: Shown, now: Instant) {
        let (worker, purpose, flows) = match take(&mut self.members[member.index()].state) {
            State::Running { worker, .. } => (worker, None, true),
            State::Draining { worker, purpose, .. } => (worker, purpose, false),
            other => {
                self.members[member.index()].state = other;
                return;
            }
        };
        let lost = Lost { flows, told: purpose.is_some(), crashed: true };
        let again = now + self.patience();
        self.lose(member, &lost, now, |held| match worker.process {
            Some(process) => State::Killed { process, shown, purpose, again, held },
            None => State::Vacant { crashed: true, joining: None, held },
        });
        match (worker.process, purpose) {
            (Some(process), _) => self.out.push(Action::Kill(process.id)),
            (None, Some(purpose)) => self.has_left(member, purpose, false, None, now),
            (None, None) => {}
        }
    }

    /// Kills the process of a member, whose session ends with it.
    pub(super) fn kill(&mut self, member: MemberId, reason: Reason, now: Instant) {
        self.record(member, Fact::Killed(reason));
        let shown = self.members[member.index()].shown();
        let again = now + self.patience();
        let (process, joining, purpose, held) = match take(&mut self.members[member.index()].state) {
            State::Starting { process, joining, held, .. }
            | State::Detached { process, joining, held, .. } => (process, joining, None, held),
            State::Leaving { process, purpose, held, .. } => (process, None, Some(purpose), held),
            State::Killed { process, purpose, held, .. } => (process, None, purpose, held),
            other => {
                self.members[member.index()].state = other;
                return self.evict(member, shown, now);
            }
        };
        self.members[member.index()].state = State::Killed { process, shown, purpose, again, held };
        self.hang_up(member, joining);
        self.out.push(Action::Kill(process.id));
    }

    pub(super) fn hung_up(&mut self, connection: ConnectionId, now: Instant) {
        let Some(member) = self.member_of(connection) else { return };
        if let Some(joining) = self.members[member.index()].state.joining() {
            *joining = None;
            self.record(member, Fact::GoneEarly);
            return self.disconnected(member, now);
        }
        let orderly = Lost { flows: false, told: true, crashed: false };
        match self.members[member.index()].state {
            State::Running { worker, .. } => {
                self.record(member, Fact::Died(Cause::HungUp));
                let lost = Lost { flows: true, told: false, crashed: true };
                self.lose(member, &lost, now, |held| match worker.process {
                    Some(process) => {
                        State::Detached { process, crashed: true, joining: None, overdue: None, held }
                    }
                    None => State::Vacant { crashed: true, joining: None, held },
                });
                self.disconnected(member, now);
            }
            State::Draining { worker, purpose, overdue, .. } => match (worker.process, purpose) {
                (None, None) => {
                    self.record(member, Fact::Vacated(Cause::Asked));
                    self.lose(member, &orderly, now, |_| State::VACANT);
                }
                (None, Some(purpose)) => {
                    self.lose(member, &orderly, now, |_| State::VACANT);
                    self.has_left(member, purpose, false, None, now);
                }
                (Some(process), None) => {
                    self.record(member, Fact::Left(Cause::Asked));
                    self.lose(member, &orderly, now, |held| State::Detached {
                        process,
                        crashed: false,
                        joining: None,
                        overdue: None,
                        held,
                    });
                    self.disconnected(member, now);
                }
                (Some(process), Some(purpose)) => {
                    let overdue = overdue.unwrap_or(Overdue::after(now, self.policy.stop_timeout));
                    self.lose(member, &orderly, now, |held| State::Leaving {
                        process,
                        purpose,
                        overdue,
                        held,
                    });
                    self.disconnected(member, now);
                }
            },
            _ => {}
        }
    }

    /// The process of a member, if there is one, has to end now or to attach again; not for ever.
    pub(super) fn disconnected(&mut self, member: MemberId, now: Instant) {
        let (restart, patience) = (self.policy.restart, self.policy.stop_timeout);
        let stopping = self.is_stopping();
        let found = &mut self.members[member.index()];
        let Some(attached) = found.state.process().map(|process| process.attached) else { return };
        if stopping {
            return;
        }
        if attached > 1 && found.starts.too_many(&restart, now) {
            self.kill(member, Reason::AttachesAgain, now);
        } else if let State::Starting { overdue, .. } | State::Detached { overdue, .. } = &mut found.state {
            overdue.get_or_insert(Overdue::after(now, patience));
        }
    }

    pub(super) fn exited(&mut self, id: ProcessId, success: Option<bool>, now: Instant) {
        if let Some(at) = self.unwanted.iter().position(|(unwanted, _)| *unwanted == id) {
            self.unwanted.swap_remove(at);
            self.out.push(Action::Forget(id));
            return;
        }
        let Some(member) = self.member_of_process(id) else { return };
        self.out.push(Action::Forget(id));
        let shown = self.members[member.index()].shown();
        let told = matches!(shown, Shown::Draining | Shown::Stopped);
        // Only its parent knows how a process ended: an adopted one seems to have done as told.
        let well = success.unwrap_or(self.is_stopping() && told);
        let rest = |well| if well { Rest::Stopped } else { Rest::Crashed };
        let down = |well, held| Down { rest: rest(well), restart: None, held };
        let fact = |well| if well { Fact::Left(Cause::Exited) } else { Fact::Died(Cause::Exited) };
        match take(&mut self.members[member.index()].state) {
            State::Starting { process, joining, held, .. } => {
                self.hang_up(member, joining);
                self.never_attached(member, process, held, now);
            }
            State::Killed { process, shown: Shown::Starting, purpose: None, held, .. } => {
                self.never_attached(member, process, held, now);
            }
            State::Detached { joining, held, .. } => {
                self.hang_up(member, joining);
                self.record(member, fact(well));
                self.judge(member, down(well, held), well, now);
            }
            State::Running { .. } => {
                self.record(member, fact(well));
                let lost = Lost { flows: true, told: false, crashed: !well };
                self.lose(member, &lost, now, |held| State::Down(down(well, held)));
                let held = self.members[member.index()].state.held().and_then(|held| *held);
                self.judge(member, down(well, held), well, now);
            }
            State::Draining { purpose: None, .. } => {
                self.record(member, fact(well));
                let lost = Lost { flows: false, told: false, crashed: !well };
                self.lose(member, &lost, now, |held| State::Down(down(well, held)));
                self.judge(member, down(well, None), well, now);
            }
            State::Draining { purpose: Some(purpose), .. } => {
                let lost = Lost { flows: false, told: true, crashed: false };
                self.lose(member, &lost, now, |_| State::VACANT);
                self.has_left(member, purpose, true, None, now);
            }
            State::Leaving { purpose, held, .. } | State::Killed { purpose: Some(purpose), held, .. } => {
                self.has_left(member, purpose, true, held, now);
            }
            // What a killed process did before does not count.
            State::Killed { held, .. } => {
                self.record(member, fact(false));
                self.judge(member, down(false, held), false, now);
            }
            other @ (State::Vacant { .. } | State::Down(_) | State::Spawning { .. }) => {
                self.members[member.index()].state = other;
            }
        }
    }

    /// A process ended before it attached: it failed, whatever its exit status says.
    fn never_attached(&mut self, member: MemberId, process: Process, held: Option<Instant>, now: Instant) {
        let down = Down { rest: Rest::Crashed, restart: None, held };
        self.members[member.index()].state = State::Down(down);
        if self.is_stopping() {
            self.record(member, Fact::Died(Cause::Exited));
        } else if process.adopted {
            self.record(member, Fact::Died(Cause::NotFound));
            self.members[member.index()].starts.forgive();
            self.spawn(member, Occasion::Replace, down, now);
        } else if self.phase == Phase::Starting {
            self.out.push(Action::Fail(Failure::EndedEarly(member)));
        } else {
            self.record(member, Fact::Died(Cause::Exited));
            self.judge(member, down, false, now);
        }
    }

    /// Decides whether a worker whose process ended, or could not be started, is started again.
    pub(super) fn judge(&mut self, member: MemberId, down: Down, success: bool, now: Instant) {
        self.members[member.index()].state = State::Down(Down { restart: None, ..down });
        if self.is_stopping() {
            return;
        }
        let restart = self.policy.restart;
        match self.members[member.index()].starts.judge(&restart, now, success) {
            Verdict::Stay => {
                self.release(member);
            }
            Verdict::After(delay) => {
                self.members[member.index()].state = State::Down(Down { restart: Some(now + delay), ..down });
            }
            Verdict::GiveUp => {
                self.members[member.index()].state =
                    State::Down(Down { rest: Rest::Failed, restart: None, ..down });
                self.record(member, Fact::GivenUp { too_often: true });
                self.release(member);
            }
        }
        let over = |member: &Member| {
            matches!(member.state, State::Vacant { .. } | State::Down(Down { restart: None, .. }))
        };
        if self.members.iter().all(over) {
            self.out.push(Action::Fail(Failure::NoneLeft(member)));
        }
    }
}
