//! A worker is no more: what becomes of its flows, and of the packets that it had not committed.
//!
//! They go to the others at once (retire), or wait for the next worker in its place (hold) until none is to come (release).

use std::time::{Duration, Instant};

use super::{GROUP, Primary, member_of};
use crate::group::life::{Change, State};
use crate::lane::Command;

impl Primary {
    /// The worker in this place is no more: its flows go to the others, and what it had not committed; or all that waits for
    /// the next worker here.
    pub(super) fn leave(&mut self, place: usize, change: Option<Change>, why: &str) {
        let pid = self.members[place].pid();
        let id = self.members[place].id.clone();
        let had_flows = self.members[place].state().takes_packets();
        if let Some(change) = change.filter(|change| self.members[place].life.make(*change, Instant::now())) {
            self.journal.write(Some(&id), pid, change.name(), why);
        }
        // Nobody without a worker takes packets.
        if self.members[place].state().takes_packets() {
            self.change(place, Change::Die, why);
        }
        match self.care.hold {
            Some(timeout) if had_flows && self.members[place].leaving.is_none() => {
                self.hold(place, pid, timeout);
            }
            _ if self.members[place].session.is_none() => {}
            _ => self.retire(place, pid),
        }
        if self.members[place].process.is_none() {
            self.has_left(place);
        }
    }

    /// Ends the session in this place; its flows, and what its worker had not committed, wait for another.
    fn hold(&mut self, place: usize, pid: u32, timeout: Duration) {
        let member = &mut self.members[place];
        let Some(session) = member.end_session(true) else { return };
        session.connection.end();
        member.held_until = Some(Instant::now() + timeout);
        for lane in &mut self.lanes {
            lane.command(Command::Hold { group: GROUP, member: member_of(place) });
        }
        self.settle();
        let member = &self.members[place];
        member.take_corrupt();
        let detail = format!("{} packets, for the next worker here, for {timeout:?}", member.backlog());
        self.journal.write(Some(&member.id), pid, "held", detail);
    }

    /// What was held for a worker is held no longer: its flows go to the others, and the packets. Whether there was something.
    pub(super) fn release(&mut self, place: usize) -> bool {
        let held = self.members[place].held_until.take().is_some();
        if held {
            self.retire(place, self.members[place].pid());
        }
        held
    }

    /// What was to be held until now, or until before, is held no longer.
    pub(super) fn release_due(&mut self, now: Instant) {
        for place in 0..self.members.len() {
            if self.members[place].held_until.is_some_and(|until| until <= now) {
                tracing::warn!(member = self.members[place].id, "no worker came within hold_timeout");
                self.release(place);
            }
        }
    }

    /// Ends what there is of a session in this place: its flows go to the others, and what was not committed.
    fn retire(&mut self, place: usize, pid: u32) {
        let member = &mut self.members[place];
        let before = (member.requeued(), member.lost());
        // Its worker, if there still is one, sees the end of the connection.
        let packets = member.state() == State::Crashed || member.backlog() > 0;
        if let Some(session) = member.end_session(packets) {
            session.connection.end();
        }
        self.deal();
        for lane in &mut self.lanes {
            let table = Box::new(self.table.clone());
            lane.command(Command::Retire { group: GROUP, member: member_of(place), table });
        }
        self.settle();
        // Who takes the place next has not lied yet.
        let member = &self.members[place];
        member.take_corrupt();
        let (requeued, lost) = (member.requeued() - before.0, member.lost() - before.1);
        if requeued + lost > 0 {
            let detail = format!("requeued {requeued}, lost {lost}");
            self.journal.write(Some(&member.id), pid, "uncommitted", detail);
        }
    }
}
