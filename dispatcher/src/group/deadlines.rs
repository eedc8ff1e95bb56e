//! Timeouts of members and processes.

use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Fact, Failure, KillReason};
use crate::group::machine::Group;
use crate::group::member::{Down, SpawnReason, State};
use crate::group::phase::Phase;

impl Group {
    /// When the group needs the next [`Event::Tick`](super::Event::Tick).
    pub fn next_deadline(&self) -> Option<Instant> {
        let unwanted = self.unwanted.iter().map(|(_, stop_deadline)| stop_deadline.at);
        let members = self.members.iter().filter(|_| !self.is_stopping()).flat_map(|member| {
            let mut state = member.state;
            let held = state.held().and_then(|held| *held);
            let joining = state.joining().and_then(|joining| joining.map(|joining| joining.until));
            let stop_deadline = state.stop_deadline().map(|stop_deadline| stop_deadline.at);
            let own = match state {
                State::Starting { until, .. } => Some(until),
                State::Killed { retry_at, .. } => Some(retry_at),
                State::Down(Down { restart, .. }) => restart,
                _ => None,
            };
            [held, joining, stop_deadline, own]
        });
        members.flatten().chain(unwanted).chain(self.phase_deadline()).min()
    }

    pub(super) fn tick(&mut self, now: Instant) {
        let interval = self.kill_interval();
        for (process, stop_deadline) in
            self.unwanted.iter_mut().filter(|(_, stop_deadline)| stop_deadline.at <= now)
        {
            stop_deadline.at = now + interval;
            self.actions.push(Action::Kill(*process));
        }
        if self.is_stopping() {
            return self.advance_stop(now);
        }
        for member in self.ids() {
            self.tick_member(member, now);
        }
    }

    fn tick_member(&mut self, member: MemberId, now: Instant) {
        let state = &mut self.members[member.index()].state;
        if let Some(joining) = state.joining().and_then(|joining| joining.take_if(|it| it.until <= now)) {
            self.record(member, Fact::NotReady);
            self.disconnect(member, Some(joining));
            self.require_exit_or_reattach(member, now);
        }
        if self.members[member.index()]
            .state
            .stop_deadline()
            .is_some_and(|stop_deadline| stop_deadline.at <= now)
        {
            self.escalate(member, now);
        }
        let start_timeout = self.policy.start_timeout;
        match &mut self.members[member.index()].state {
            State::Starting { process, until, .. } if *until <= now => {
                if self.phase == Phase::Starting && !process.adopted {
                    *until = now + start_timeout;
                    self.actions.push(Action::Fail(Failure::NotAttached(member)));
                } else {
                    self.kill(member, KillReason::NotAttached, now);
                }
            }
            State::Killed { retry_at, .. } if *retry_at <= now => {
                self.kill(member, KillReason::IgnoredSigterm, now)
            }
            State::Down(down) if down.restart.is_some_and(|restart| restart <= now) => {
                let down = *down;
                self.record(member, Fact::Restarting);
                self.spawn(member, SpawnReason::AutoRestart, Down { restart: None, ..down }, now);
            }
            _ => {}
        }
        let held = self.members[member.index()].state.held().and_then(|held| *held);
        if held.is_some_and(|until| until <= now) {
            self.record(member, Fact::HoldExpired);
            self.release(member);
        }
    }
}
