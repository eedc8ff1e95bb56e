//! The stop of a group: workers finish their packets, get SIGTERM, and then SIGKILL. Each step has
//! a deadline.

use std::time::{Duration, Instant};

use xfan_shm::ids::MemberId;

use crate::group::endings::SessionEnd;
use crate::group::event::{Action, Cause, Fact, KillReason, ProcessId};
use crate::group::machine::Group;
use crate::group::member::{Closing, State};
use crate::group::phase::{Phase, Stopping};

/// How long a process may take to exit after SIGKILL. It takes longer only if it hangs in the
/// kernel, and then waiting does not help.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

impl Group {
    /// Whether the stop is complete.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Stopping(Stopping::Over)
    }

    pub(super) fn stop(&mut self) {
        if self.is_stopping() {
            return;
        }
        self.phase = Phase::Stopping(Stopping::Emptying);
        self.ids().for_each(|member| self.cancel_orders(member));
        // The workers that are left get the packets that are held for workers that will not come.
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
        self.advance_stop(now);
    }

    /// Advances the stop by all steps that are possible now.
    pub(super) fn advance_stop(&mut self, now: Instant) {
        let timeout = self.policy.stop_timeout;
        loop {
            let Phase::Stopping(stopping) = self.phase else { return };
            let next = match stopping {
                Stopping::Emptying | Stopping::Over => return,
                Stopping::Finishing(until) if self.has_finished() || self.forced || now >= until => {
                    let processes: Vec<_> = self.processes().collect();
                    self.actions.extend(processes.into_iter().map(|(_, process)| Action::Terminate(process)));
                    Stopping::Terminating(now + timeout)
                }
                Stopping::Terminating(_) | Stopping::Killing(_) if self.has_ended() => Stopping::Over,
                Stopping::Terminating(until)
                    if self.forced || now >= until || self.processes().next().is_none() =>
                {
                    let reason =
                        if self.forced { KillReason::ForcedStop } else { KillReason::IgnoredSigterm };
                    let members: Vec<MemberId> = self.processes().map(|(member, _)| member).collect();
                    members.into_iter().for_each(|member| self.kill(member, reason, now));
                    self.actions.extend(self.unwanted.iter().map(|(process, _)| Action::Kill(*process)));
                    Stopping::Killing(now + KILL_TIMEOUT)
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

    /// Ends a process whose start began before the stop and completed during it.
    pub(super) fn end_late(&mut self, process: ProcessId) {
        match self.phase {
            Phase::Stopping(Stopping::Terminating(_)) => self.actions.push(Action::Terminate(process)),
            Phase::Stopping(Stopping::Killing(_) | Stopping::Over) => {
                self.actions.push(Action::Kill(process))
            }
            _ => {}
        }
    }

    /// When the current step of the stop ends.
    pub(super) fn phase_deadline(&self) -> Option<Instant> {
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

    /// Ends the sessions of workers that the primary did not start: their connections are closed.
    fn end_sessions(&mut self, now: Instant) {
        for member in self.ids() {
            let (State::Running { worker, .. } | State::Draining { worker, .. }) =
                self.members[member.index()].state
            else {
                continue;
            };
            // The sessions of supervised workers ended with the exit or SIGKILL of their processes.
            if worker.process.is_none() {
                self.record(member, Fact::Left(Cause::Stopping));
                let end = SessionEnd { had_flows: false, crashed: false };
                self.end_session(member, &end, now, |_| State::VACANT);
            }
        }
    }
}
