//! The end of a group: workers finish their packets, get SIGTERM, and are killed, each step by a
//! deadline.

use std::time::{Duration, Instant};

use crate::group::endings::Lost;
use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Cause, Fact, ProcessId, Reason};
use crate::group::machine::Group;
use crate::group::member::{Closing, State};
use crate::group::phase::{Phase, Stopping};

/// How long a killed process may take to end.
const KILLED: Duration = Duration::from_secs(1);

impl Group {
    /// Whether the stop is over.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Stopping(Stopping::Over)
    }

    pub(super) fn stop(&mut self) {
        if self.is_stopping() {
            return;
        }
        self.phase = Phase::Stopping(Stopping::Emptying);
        self.ids().for_each(|member| self.forget_orders(member));
        // What is held for workers that will not come goes to those that are there.
        for member in self.ids() {
            self.release(member);
        }
    }

    pub(super) fn finish(&mut self, now: Instant) {
        if self.phase != Phase::Stopping(Stopping::Emptying) {
            return;
        }
        for member in self.ids() {
            if let State::Running { worker, .. } = self.members[member.index()].state {
                self.drain(member, worker, None, None, Cause::Stopping);
            }
        }
        self.steer();
        self.phase = Phase::Stopping(Stopping::Finishing(now + self.policy.stop_timeout));
        self.proceed(now);
    }

    /// Goes on with the stop, as far as it can now.
    pub(super) fn proceed(&mut self, now: Instant) {
        let patience = self.policy.stop_timeout;
        loop {
            let Phase::Stopping(stopping) = self.phase else { return };
            let next = match stopping {
                Stopping::Emptying | Stopping::Over => return,
                Stopping::Finishing(until) if self.has_finished() || self.hurried || now >= until => {
                    let processes: Vec<_> = self.processes().collect();
                    self.out.extend(processes.into_iter().map(|(_, process)| Action::Terminate(process)));
                    Stopping::Terminating(now + patience)
                }
                Stopping::Terminating(_) | Stopping::Killing(_) if self.has_ended() => Stopping::Over,
                Stopping::Terminating(until)
                    if self.hurried || now >= until || self.processes().next().is_none() =>
                {
                    let reason = if self.hurried { Reason::Hurried } else { Reason::Deaf };
                    let members: Vec<MemberId> = self.processes().map(|(member, _)| member).collect();
                    members.into_iter().for_each(|member| self.kill(member, reason, now));
                    self.out.extend(self.unwanted.iter().map(|(process, _)| Action::Kill(*process)));
                    Stopping::Killing(now + KILLED)
                }
                Stopping::Killing(until) if now >= until => Stopping::Over,
                Stopping::Finishing(_) | Stopping::Terminating(_) | Stopping::Killing(_) => return,
            };
            self.phase = Phase::Stopping(next);
            if next == Stopping::Over {
                self.end_sessions(now);
            }
        }
    }

    /// Ends a process that was started before the stop, and is there only now.
    pub(super) fn end_late(&mut self, process: ProcessId) {
        match self.phase {
            Phase::Stopping(Stopping::Terminating(_)) => self.out.push(Action::Terminate(process)),
            Phase::Stopping(Stopping::Killing(_) | Stopping::Over) => self.out.push(Action::Kill(process)),
            _ => {}
        }
    }

    /// When something must be done about the stop.
    pub(super) fn stop_deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Stopping(
                Stopping::Finishing(until) | Stopping::Terminating(until) | Stopping::Killing(until),
            ) => Some(until),
            _ => None,
        }
    }

    fn processes(&self) -> impl Iterator<Item = (MemberId, ProcessId)> {
        self.numbered().filter_map(|(id, member)| Some((id, member.process()?)))
    }

    fn has_ended(&self) -> bool {
        self.processes().next().is_none() && self.unwanted.is_empty()
    }

    fn has_finished(&self) -> bool {
        self.members.iter().all(|member| {
            !member.has_session()
                || matches!(member.state, State::Draining { closing: Closing::Finished, .. })
        })
    }

    /// Workers that the primary did not start see the end of their connection.
    fn end_sessions(&mut self, now: Instant) {
        for member in self.ids() {
            let (State::Running { worker, .. } | State::Draining { worker, .. }) =
                self.members[member.index()].state
            else {
                continue;
            };
            // A process that does not end though it was killed has lost its session by then.
            if worker.process.is_none() {
                self.record(member, Fact::Left(Cause::Stopping));
                let lost = Lost { flows: false, told: true, crashed: false };
                self.lose(member, &lost, now, |_| State::VACANT);
            }
        }
    }
}
