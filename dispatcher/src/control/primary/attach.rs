//! A worker takes a place: it is given segments, maps them, seals its own, and says that it is
//! ready. Only then a lane knows it.

use std::time::Instant;

use nix::sys::socket::UnixCredentials;
use xfan_shm::layout::VERSION;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{Attach, Attached, Refusal, RefusalCode, Reply};

use super::{GROUP, Primary, PrimaryError, member_of};
use crate::config::Restart;
use crate::control::access::Standing;
use crate::control::inbox::Answer;
use crate::control::members::{Joining, Member};
use crate::control::peer::Connection;
use crate::group::life::{Change, State};
use crate::lane::Command;
use crate::process::spawn::Process;
use crate::text::excerpt;

impl Primary {
    /// Answers a worker. A refusal of one that this primary started itself, and that will not come better, is an error as well.
    pub(super) fn attach(
        &mut self,
        connection: Connection,
        peer: UnixCredentials,
        mut attach: Attach,
    ) -> (Answer, Result<(), PrimaryError>) {
        attach.program = excerpt(&attach.program);
        match self.admit(connection, peer, &attach) {
            Ok(answer) => (answer, Ok(())),
            Err((place, refusal)) => {
                self.refused += 1;
                let member = attach.member.as_deref().map(excerpt);
                self.tell_refusal(&peer, Some(&attach.program), member.as_deref(), &refusal.message);
                // One that this primary did not start is replaced by one that it starts.
                let adopted = |member: &Member| member.process.as_ref().is_some_and(Process::is_adopted);
                let ours = place.filter(|_| !self.open).map(|place| &self.members[place]).filter(|member| {
                    member.state() == State::Starting
                        && refusal.code == RefusalCode::Version
                        && !adopted(member)
                });
                let result = match ours {
                    Some(member) => Err(PrimaryError::Refused {
                        member: member.id.clone(),
                        program: member.program.clone(),
                        reason: refusal.message.clone(),
                    }),
                    None => Ok(()),
                };
                (Reply::Refused(refusal).into(), result)
            }
        }
    }

    /// Tells of a refusal, unless there were too many of this user.
    pub(super) fn tell_refusal(
        &mut self,
        peer: &UnixCredentials,
        program: Option<&str>,
        member: Option<&str>,
        message: &str,
    ) {
        let Some(suppressed) = self.limit.admit(peer.uid(), Instant::now()) else { return };
        let more = match suppressed {
            0 => String::new(),
            number => format!(" ({number} more requests of this user before)"),
        };
        tracing::warn!(pid = peer.pid(), uid = peer.uid(), program, "refused: {message}{more}");
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        self.journal.write(member, pid, "refused", format!("{message}{more}"));
    }

    /// Makes the segments of a worker.
    fn admit(
        &mut self,
        connection: Connection,
        peer: UnixCredentials,
        attach: &Attach,
    ) -> Result<Answer, (Option<usize>, Refusal)> {
        let place = self
            .choose(&connection, u32::try_from(peer.pid()).unwrap_or(0), attach)
            .map_err(|refusal| (None, refusal))?;
        let refused = |code, message: String| (Some(place), Refusal { code, message });
        if attach.version != VERSION {
            return Err(refused(
                RefusalCode::Version,
                format!(
                    "the worker speaks protocol version {}, this primary version {VERSION}: use builds of the same release",
                    attach.version
                ),
            ));
        }
        let now = Instant::now();
        if self.members[place].token.is_none() {
            self.count_guest(peer.uid(), now).map_err(|message| refused(RefusalCode::Occupied, message))?;
        }
        let fail = |error: &dyn std::fmt::Display| refused(RefusalCode::Closing, explained(error));
        let memory = self.memory.read_only_fd().try_clone_to_owned().map_err(|error| fail(&error))?;
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        let member = &mut self.members[place];
        let deadline = now + self.start_timeout;
        let handover = member
            .begin_joining(connection, pid, attach.program.clone(), self.geometry, deadline)
            .map_err(|error| fail(&error))?;
        // Re-attaching counts as a start.
        if member.token.is_some() {
            if member.attached > 0 {
                member.starts.count(now);
            }
            member.attached = member.attached.saturating_add(1);
        }
        let attached = Attached {
            member: member.id.clone(),
            ports: vec![self.name.clone()],
            geometry: self.geometry,
            umem_bytes: self.memory.length() as u64,
            core: member.core,
            spin_ns: u64::try_from(member.spin.as_nanos()).unwrap_or(u64::MAX),
            yield_ns: u64::try_from(self.yields.as_nanos()).unwrap_or(u64::MAX),
        };
        Ok(Answer {
            reply: Some(Reply::Attached(attached).into()),
            fds: vec![memory, handover.down, handover.up, handover.doorbell],
        })
    }

    /// Counts a worker that xfan did not start. Each costs the lanes some time when it joins and
    /// when it leaves: of one user only so many are taken.
    fn count_guest(&mut self, uid: u32, now: Instant) -> Result<(), String> {
        // Root can do worse.
        if uid == 0 {
            return Ok(());
        }
        let each = self.care.restart;
        let places = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        let limit = Restart { limit_burst: each.limit_burst.saturating_mul(places), ..each };
        let guests = self.guests.entry(uid).or_default();
        if guests.too_many(&limit, now) {
            return Err(format!(
                "workers of user id {uid} have attached {} times within {:?}, which is the limit: {} (start_limit_burst) for \
                 each of {places} places; try again later",
                limit.limit_burst, limit.limit_interval, each.limit_burst
            ));
        }
        guests.count(now);
        Ok(())
    }

    /// A worker has mapped its segments, and is to get packets.
    pub(super) fn ready(&mut self, connection: &Connection, peer: &UnixCredentials) -> Answer {
        match self.join(connection, u32::try_from(peer.pid()).unwrap_or(0)) {
            Ok(()) => Reply::Joined.into(),
            Err((place, refusal)) => {
                self.refused += 1;
                let member = place.map(|place| self.members[place].id.clone());
                self.tell_refusal(peer, None, member.as_deref(), &refusal.message);
                if let Some(place) = place {
                    self.has_hung_up(place);
                }
                Reply::Refused(refusal).into()
            }
        }
    }

    /// Has the lanes know a worker that has mapped its segments.
    fn join(&mut self, connection: &Connection, pid: u32) -> Result<(), (Option<usize>, Refusal)> {
        let take = |(place, member): (usize, &mut Member)| {
            Some((place, member.joining.take_if(|joining| joining.connection().id == connection.id)?))
        };
        let Some((place, joining)) = self.members.iter_mut().enumerate().find_map(take) else {
            let message = match self.place_of(connection.id) {
                Some(_) => "the worker of this connection has been ready before",
                None => "this connection has no worker",
            };
            return Err((None, Refusal { code: RefusalCode::Malformed, message: message.into() }));
        };
        let member = &mut self.members[place];
        let refused = |code, message: String| (Some(place), Refusal { code, message });
        if !member.may_attach() {
            let message = format!("member {} is {}", member.id, member.state().name());
            return Err(refused(RefusalCode::Occupied, message));
        }
        let (links, locked) = member
            .begin_session(joining)
            .map_err(|error| refused(RefusalCode::Impossible, error.to_string()))?;
        member.overdue = None;
        let (id, program) = (member.id.clone(), member.program.clone());
        if let Err(error) = locked
            && !std::mem::replace(&mut self.unlocked, true)
        {
            tracing::warn!(
                "cannot lock the workers' segments in memory: {error}. Should the kernel swap them out, lanes wait for it: \
                 give xfan CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK"
            );
        }
        for (lane, link) in self.lanes.iter_mut().zip(links) {
            lane.command(Command::Join { group: GROUP, member: member_of(place), link: Box::new(link) });
        }
        self.change(place, Change::Attach, program.clone());
        let member = &mut self.members[place];
        if member.held_until.take().is_some() {
            let detail = format!("{} packets that were held", member.backlog());
            self.journal.write(Some(&id), pid, "resumed", detail);
        }
        self.steer();
        tracing::info!(member = id, pid, program, "attached");
        Ok(())
    }

    /// Looks for workers that ought to be ready, and are not.
    pub(super) fn look_for_joining(&mut self, now: Instant) {
        let late = |joining: &Joining| joining.deadline <= now;
        for place in 0..self.members.len() {
            let member = &mut self.members[place];
            let Some(pid) = member.joining.as_ref().filter(|joining| late(joining)).map(Joining::pid) else {
                continue;
            };
            member.end_joining();
            let why = format!("was not ready within {:?} (start_timeout)", self.start_timeout);
            tracing::warn!(member = member.id, pid, "{why}: its connection is ended");
            self.journal.write(Some(&member.id), pid, "refused", why);
            self.has_hung_up(place);
        }
    }

    /// A place that nobody has; one whose packets wait for a worker before others.
    fn vacant_place(&self) -> Option<usize> {
        let vacant = || self.members.iter().enumerate().filter(|(_, member)| member.is_vacant());
        let held = vacant().find(|(_, member)| member.held_until.is_some());
        held.or_else(|| vacant().next()).map(|(place, _)| place)
    }

    /// The place a worker may take.
    fn choose(&self, connection: &Connection, peer: u32, attach: &Attach) -> Result<usize, Refusal> {
        let refuse = |code, message: String| Err(Refusal { code, message });
        if self.place_of(connection.id).is_some() {
            return refuse(RefusalCode::Malformed, "this connection has a worker already".into());
        }
        if let Some(group) = attach.group.as_ref().filter(|group| **group != self.group) {
            return refuse(
                RefusalCode::UnknownGroup,
                format!("there is no group {}: the only one is {}", excerpt(group), self.group),
            );
        }
        // Who has inherited the connection of a place needs no other proof, and gets no other
        // place.
        let its = |member: &Member| member.channel.as_ref().map(|channel| channel.id);
        let own = match connection.channel {
            None => None,
            inherited => match self.members.iter().position(|member| its(member) == inherited) {
                None => {
                    return refuse(
                        RefusalCode::Forbidden,
                        "this connection is for a process that has ended, or that may not attach again"
                            .into(),
                    );
                }
                own => own,
            },
        };
        let place = match &attach.member {
            Some(id) => self.find(id)?,
            None => match own.or_else(|| self.vacant_place()) {
                Some(place) => place,
                None => {
                    return refuse(
                        RefusalCode::Occupied,
                        format!(
                            "all {} places are taken: remove a worker (`xfan workers remove`), or start the primary with a higher \
                             max_workers",
                            self.members.len()
                        ),
                    );
                }
            },
        };
        let member = &self.members[place];
        match own {
            Some(own) if own != place => {
                let message = format!("this connection is for member {}", self.members[own].id);
                return refuse(RefusalCode::Forbidden, message);
            }
            Some(_) => {}
            None if member.token.is_some() && member.token != attach.token => {
                return refuse(
                    RefusalCode::Forbidden,
                    format!("member {} is for the process that the primary started for it", member.id),
                );
            }
            // A worker that was started for its place shall not take others'.
            None if member.token.is_none()
                && self.spawner.is_some()
                && connection.standing == Standing::Worker =>
            {
                return refuse(
                    RefusalCode::Forbidden,
                    "this primary starts its own workers: beside them may join root, and whom allow_users and allow_groups in \
                     [control] of its configuration name"
                        .into(),
                );
            }
            None => {}
        }
        if member.connection().is_some() {
            return refuse(RefusalCode::Occupied, format!("member {} has a worker", member.id));
        }
        if own.is_none()
            && let Some(process) = member.process.as_ref().map(Process::pid)
            && !descends(peer, process)
        {
            return refuse(
                RefusalCode::Forbidden,
                format!("member {} is for process {process} and its children", member.id),
            );
        }
        if !member.may_attach() {
            let state = member.state().name();
            return refuse(RefusalCode::Occupied, format!("member {} is {state}", member.id));
        }
        Ok(place)
    }
}

/// Whether a process is `ancestor`, or a descendant of it. A token alone proves little: all processes of a user can read each other's
/// environment.
fn descends(pid: u32, ancestor: u32) -> bool {
    /// Most generations looked at.
    const GENERATIONS: usize = 32;
    let parent = |pid: &u32| {
        let process = procfs::process::Process::new(i32::try_from(*pid).ok()?).ok()?;
        u32::try_from(process.stat().ok()?.ppid).ok().filter(|parent| *parent > 1)
    };
    std::iter::successors(Some(pid), parent).take(GENERATIONS).any(|pid| pid == ancestor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_descend_from_their_parents_and_not_the_other_way_round() {
        let own = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(descends(own, own) && descends(child.id(), own));
        assert!(!descends(own, child.id()) && !descends(1, own) && !descends(0, own));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
