//! What an operator orders: workers are added, drained, restarted, removed.
//!
//! Who is to leave gets no new packets, finishes what it has, and sees that there will be no more. A process that does not end
//! then gets SIGTERM after `stop_timeout`, and SIGKILL after as much again; a worker that xfan did not start is evicted. What it
//! had not committed by then goes to the others.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::UnixCredentials;
use xfan_shm::protocol::{Refusal, RefusalCode, Reply, WorkersOrder};

use super::{Primary, PrimaryError};
use crate::group::life::Change;
use crate::text::excerpt;

/// What a member leaves for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Until it is ordered to start.
    StayAway,
    /// To be started again.
    StartAgain,
    /// For good.
    GiveUpPlace,
}

/// A worker that ought to have ended: it was told to leave, or its connection is gone.
#[derive(Clone, Copy, Debug)]
pub struct Overdue {
    /// When the next thing is done about it.
    deadline: Instant,
    /// Its process got SIGTERM.
    terminated: bool,
}

impl Overdue {
    /// Something is done about it after this time.
    pub fn after(patience: Duration) -> Self {
        Overdue { deadline: Instant::now() + patience, terminated: false }
    }
}

fn refuse<T>(code: RefusalCode, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { code, message: message.into() })
}

impl Primary {
    /// Carries out an order. What takes time goes on when this returns: the members are starting or draining.
    pub(super) fn order(&mut self, peer: &UnixCredentials, order: &WorkersOrder) -> Reply {
        if peer.uid() != 0 {
            let message = "only root may add, drain, restart or remove workers: use sudo".to_owned();
            let refusal = Refusal { code: RefusalCode::Forbidden, message };
            self.tell_refusal(peer, None, None, &refusal.message);
            return Reply::Refused(refusal);
        }
        // What an order does is told whatever came before, an order that does nothing only so
        // often.
        let told = self.limit.admit(peer.uid(), Instant::now()).is_some();
        if told {
            self.tell_order(peer, order);
        }
        match self.carry_out(order) {
            Ok(members) => {
                if !told {
                    self.tell_order(peer, order);
                }
                Reply::Ordered(members)
            }
            Err(refusal) => {
                if told {
                    tracing::warn!(pid = peer.pid(), uid = peer.uid(), "refused: {}", refusal.message);
                }
                Reply::Refused(refusal)
            }
        }
    }

    fn tell_order(&mut self, peer: &UnixCredentials, order: &WorkersOrder) {
        tracing::info!(pid = peer.pid(), ?order, "an operator's order");
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        self.journal.write(None, pid, "ordered", format!("{order:?}"));
    }

    fn carry_out(&mut self, order: &WorkersOrder) -> Result<Vec<String>, Refusal> {
        if !self.open {
            return refuse(RefusalCode::Impossible, "this primary is still starting its workers: try again");
        }
        let (id, purpose) = match order {
            WorkersOrder::Add(count) => return self.add(*count),
            WorkersOrder::Drain(id) => (id, Purpose::StayAway),
            WorkersOrder::Restart(id) => (id, Purpose::StartAgain),
            WorkersOrder::Remove(id) => (id, Purpose::GiveUpPlace),
        };
        let place = self.find(id)?;
        self.have_leave(place, purpose)?;
        Ok(vec![self.members[place].id.clone()])
    }

    fn add(&mut self, count: usize) -> Result<Vec<String>, Refusal> {
        if self.spawner.is_none() {
            return refuse(
                RefusalCode::Impossible,
                "this primary has no command to start workers with: give `xfan run` one, or start workers that attach by \
                 themselves, as `xfan-count --attach SOCKET` does",
            );
        }
        let vacant: Vec<usize> =
            (0..self.members.len()).filter(|&place| self.members[place].is_vacant()).take(count).collect();
        if vacant.len() < count {
            let places = self.members.len();
            return refuse(
                RefusalCode::Occupied,
                format!(
                    "{} of {places} places are vacant, which {count} more workers do not fit: remove some, or start the \
                     primary with a higher max_workers",
                    vacant.len()
                ),
            );
        }
        let mut started = Vec::new();
        for place in vacant {
            self.members[place].starts.forgive();
            if let Err(error) = self.start_worker(place) {
                self.vacate(place);
                return refuse(
                    RefusalCode::Impossible,
                    format!("{error} ({} of {count} were started)", started.len()),
                );
            }
            started.push(self.members[place].id.clone());
        }
        Ok(started)
    }

    fn have_leave(&mut self, place: usize, purpose: Purpose) -> Result<(), Refusal> {
        let id = &self.members[place].id;
        if self.members[place].leaving.is_some() {
            return refuse(RefusalCode::Impossible, format!("member {id} is leaving already"));
        }
        // No worker will come for what waits here.
        let released = purpose != Purpose::StartAgain && self.release(place);
        let member = &mut self.members[place];
        let id = &member.id;
        if member.session.is_none() && member.process.is_none() {
            let failed =
                |error: PrimaryError| Refusal { code: RefusalCode::Impossible, message: error.to_string() };
            return match purpose {
                _ if released && member.is_vacant() => Ok(()),
                Purpose::StayAway if released && !member.restarting => Ok(()),
                _ if member.token.is_none() => {
                    refuse(RefusalCode::Impossible, format!("member {id} has no worker"))
                }
                Purpose::StayAway if !member.restarting => {
                    refuse(RefusalCode::Impossible, format!("member {id} has no worker"))
                }
                Purpose::StayAway => {
                    member.restarting = false;
                    self.change(place, Change::Leave, "not to be started again");
                    Ok(())
                }
                Purpose::StartAgain => self.start_afresh(place).map_err(failed),
                Purpose::GiveUpPlace => {
                    self.vacate(place);
                    Ok(())
                }
            };
        }
        if purpose == Purpose::StartAgain && member.process.is_none() {
            return refuse(
                RefusalCode::Impossible,
                format!(
                    "member {id} was not started by xfan: restart it where it was started; `xfan workers drain` has it leave"
                ),
            );
        }
        member.leaving = Some(purpose);
        member.overdue = Some(Overdue::after(self.stop_timeout));
        if let (None, Some(process)) = (&member.session, &member.process) {
            process.signal(Signal::SIGTERM);
        }
        let takes_packets = member.state().takes_packets();
        self.change(place, Change::Drain, "as it was told");
        if takes_packets {
            self.steer();
            self.settle();
            self.members[place].close();
        }
        Ok(())
    }

    /// The worker in this place has left as it was told, and its process has ended.
    pub(super) fn has_left(&mut self, place: usize) {
        let member = &mut self.members[place];
        member.overdue = None;
        let Some(purpose) = member.leaving.take() else { return };
        member.restarting = false;
        tracing::info!(member = member.id, "left, as it was told");
        match purpose {
            Purpose::GiveUpPlace => self.vacate(place),
            Purpose::StayAway if member.token.is_none() => {
                self.change(place, Change::Vacate, "as it was told")
            }
            Purpose::StayAway => self.change(place, Change::Leave, "as it was told"),
            Purpose::StartAgain => {
                self.change(place, Change::Leave, "to be started again");
                if let Err(error) = self.start_afresh(place) {
                    tracing::error!(member = self.members[place].id, "{error}");
                    self.change(place, Change::GiveUp, error.to_string());
                    self.release(place);
                }
            }
        }
    }

    /// Looks for workers that ought to have ended, and have not.
    pub(super) fn look_for_overdue(&mut self, now: Instant) {
        for place in 0..self.members.len() {
            let member = &mut self.members[place];
            let Some(overdue) = member.overdue.as_mut().filter(|overdue| now >= overdue.deadline) else {
                continue;
            };
            overdue.deadline = now + self.stop_timeout.max(Duration::from_millis(100));
            let terminated = std::mem::replace(&mut overdue.terminated, true);
            match &mut member.process {
                Some(process) if terminated => {
                    tracing::warn!(member = member.id, "does not end: killed");
                    // Its end is an event.
                    process.kill();
                }
                Some(process) => process.signal(Signal::SIGTERM),
                None => {
                    tracing::warn!(member = member.id, "does not leave: evicted");
                    self.leave(place, Some(Change::Die), "evicted: it does not leave");
                }
            }
        }
    }

    /// Starts the process of a member that has none, whatever came of the ones before.
    pub(super) fn start_afresh(&mut self, place: usize) -> Result<(), PrimaryError> {
        self.members[place].starts.forgive();
        self.start_worker(place)?;
        self.members[place].restarting = false;
        Ok(())
    }

    /// Gives a place to whoever comes.
    fn vacate(&mut self, place: usize) {
        let member = &mut self.members[place];
        member.token = None;
        member.channel = None;
        member.restarting = false;
        member.program.clear();
        self.change(place, Change::Vacate, "");
    }

    /// The place of the member of this name.
    pub(super) fn find(&self, id: &str) -> Result<usize, Refusal> {
        match self.members.iter().position(|member| member.id == id) {
            Some(place) => Ok(place),
            None => refuse(
                RefusalCode::UnknownMember,
                format!(
                    "there is no member {}: they are {group}/0 to {group}/{}",
                    excerpt(id),
                    self.members.len().saturating_sub(1),
                    group = self.group,
                ),
            ),
        }
    }
}
