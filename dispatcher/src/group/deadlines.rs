//! What happens when time passes.

use std::time::Instant;

use xfan_shm::ids::MemberId;

use crate::group::event::{Action, Fact, Failure, Reason};
use crate::group::machine::Group;
use crate::group::member::{Down, Occasion, State};
use crate::group::phase::Phase;

impl Group {
    /// When [`Event::Tick`](super::Event::Tick) has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let unwanted = self.unwanted.iter().map(|(_, overdue)| overdue.at);
        let members = self.members.iter().filter(|_| !self.is_stopping()).flat_map(|member| {
            let mut state = member.state;
            let held = state.held().and_then(|held| *held);
            let joining = state.joining().and_then(|joining| joining.map(|joining| joining.until));
            let overdue = state.overdue().map(|overdue| overdue.at);
            let own = match state {
                State::Starting { until, .. } => Some(until),
                State::Killed { again, .. } => Some(again),
                State::Down(Down { restart, .. }) => restart,
                _ => None,
            };
            [held, joining, overdue, own]
        });
        members.flatten().chain(unwanted).chain(self.stop_deadline()).min()
    }

    pub(super) fn tick(&mut self, now: Instant) {
        let patience = self.patience();
        for (process, overdue) in self.unwanted.iter_mut().filter(|(_, overdue)| overdue.at <= now) {
            overdue.at = now + patience;
            self.out.push(Action::Kill(*process));
        }
        if self.is_stopping() {
            return self.proceed(now);
        }
        for member in self.ids() {
            self.tick_member(member, now);
        }
    }

    fn tick_member(&mut self, member: MemberId, now: Instant) {
        let state = &mut self.members[member.index()].state;
        if let Some(joining) = state.joining().and_then(|joining| joining.take_if(|it| it.until <= now)) {
            self.record(member, Fact::NotReady);
            self.hang_up(member, Some(joining));
            self.disconnected(member, now);
        }
        if self.members[member.index()].state.overdue().is_some_and(|overdue| overdue.at <= now) {
            self.overdue(member, now);
        }
        let start_timeout = self.policy.start_timeout;
        match &mut self.members[member.index()].state {
            State::Starting { process, until, .. } if *until <= now => {
                if self.phase == Phase::Starting && !process.adopted {
                    *until = now + start_timeout;
                    self.out.push(Action::Fail(Failure::NotAttached(member)));
                } else {
                    self.kill(member, Reason::NotAttached, now);
                }
            }
            State::Killed { again, .. } if *again <= now => self.kill(member, Reason::Deaf, now),
            State::Down(down) if down.restart.is_some_and(|restart| restart <= now) => {
                let down = *down;
                self.record(member, Fact::Restarting);
                self.spawn(member, Occasion::Restart, Down { restart: None, ..down }, now);
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
