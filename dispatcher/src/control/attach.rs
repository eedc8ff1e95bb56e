//! A worker takes a place: it is given segments, maps them, seals its own, and says that it is
//! ready. Only then a lane knows it.

use std::time::Instant;

use nix::sys::socket::UnixCredentials;
use xfan_shm::ids::MemberId;
use xfan_shm::layout::VERSION;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{Attach, Attached, Refusal, RefusalCode, Reply};

use crate::control::access::Standing;
use crate::control::inbox::Answer;
use crate::control::peer::Connection;
use crate::control::primary::Primary;
use crate::group::Event;
use crate::text::excerpt;

impl Primary {
    /// Answers a worker that wants to attach.
    pub(super) fn attach(
        &mut self,
        connection: Connection,
        peer: UnixCredentials,
        mut attach: Attach,
    ) -> Answer {
        attach.program = excerpt(&attach.program);
        match self.admit(connection, peer, &attach) {
            Ok(answer) => answer,
            Err((member, refusal)) => {
                self.refused += 1;
                let name = attach.member.as_deref().map(excerpt);
                self.tell_refusal(&peer, Some(&attach.program), name.as_deref(), &refusal.message);
                if let Some(member) = member.filter(|_| refusal.code == RefusalCode::Version) {
                    self.members[member.index()].trouble.clone_from(&refusal.message);
                    self.apply(Event::Incompatible(member));
                }
                Reply::Refused(refusal).into()
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
    ) -> Result<Answer, (Option<MemberId>, Refusal)> {
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
        if !self.group.members()[place.index()].is_supervised() {
            self.count_guest(peer.uid()).map_err(|message| refused(RefusalCode::Occupied, message))?;
        }
        let fail = |error: &dyn std::fmt::Display| refused(RefusalCode::Closing, explained(error));
        let memory = self.memory.read_only_fd().try_clone_to_owned().map_err(|error| fail(&error))?;
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        let id = connection.id;
        let member = &mut self.members[place.index()];
        let handover = member
            .begin_joining(connection, pid, attach.program.clone(), self.geometry)
            .map_err(|error| fail(&error))?;
        if let Err(error) = self.try_apply(Event::Attaching(place, id)) {
            self.members[place.index()].joining = None;
            return Err(refused(RefusalCode::Occupied, error.to_string()));
        }
        let member = &self.members[place.index()];
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

    /// Counts a worker that the primary did not start.
    fn count_guest(&mut self, uid: u32) -> Result<(), String> {
        let policy = self.group.policy().restart;
        let members = self.members.len();
        self.group.count_guest(uid, Instant::now()).map_err(|limit| {
            format!(
                "workers of user id {uid} have attached {limit} times within {:?}, which is the limit: {} (start_limit_burst) \
                 for each of {members} members; try again later",
                policy.limit_interval, policy.limit_burst
            )
        })
    }

    /// Answers a worker that has mapped its segments.
    pub(super) fn ready(&mut self, connection: &Connection, peer: &UnixCredentials) -> Answer {
        match self.join(connection) {
            Ok(()) => Reply::Joined.into(),
            Err((member, refusal)) => {
                self.refused += 1;
                let name = member.map(|member| self.members[member.index()].id.clone());
                self.tell_refusal(peer, None, name.as_deref(), &refusal.message);
                if member.is_some() {
                    self.apply(Event::HungUp(connection.id));
                }
                Reply::Refused(refusal).into()
            }
        }
    }

    /// Has the lanes serve a worker that has mapped its segments.
    fn join(&mut self, connection: &Connection) -> Result<(), (Option<MemberId>, Refusal)> {
        let number = self.group.member_of(connection.id);
        let joining = number.and_then(|number| self.members[number.index()].joining.take());
        let (Some(number), Some(joining)) = (number, joining) else {
            let message = match number {
                Some(_) => "the worker of this connection has been ready before",
                None => "this connection has no worker",
            };
            return Err((None, Refusal { code: RefusalCode::Malformed, message: message.into() }));
        };
        let member = &mut self.members[number.index()];
        let refused = |code, message: String| (Some(number), Refusal { code, message });
        let locked = member
            .begin_session(joining)
            .map_err(|error| refused(RefusalCode::Impossible, error.to_string()))?;
        if let Err(error) = self.try_apply(Event::Joined(connection.id)) {
            self.members[number.index()].session = None;
            return Err(refused(RefusalCode::Occupied, error.to_string()));
        }
        if let Err(error) = locked
            && !std::mem::replace(&mut self.unlocked, true)
        {
            tracing::warn!(
                "cannot lock the workers' segments in memory: {error}. Should the kernel swap them out, lanes wait for it: \
                 give xfan CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK"
            );
        }
        Ok(())
    }

    /// The place a worker may take.
    fn choose(&self, connection: &Connection, peer: u32, attach: &Attach) -> Result<MemberId, Refusal> {
        let refuse = |code, message: String| Err(Refusal { code, message });
        if self.group.member_of(connection.id).is_some() {
            return refuse(RefusalCode::Malformed, "this connection has a worker already".into());
        }
        if let Some(group) = attach.group.as_ref().filter(|group| **group != self.group_name) {
            return refuse(
                RefusalCode::UnknownGroup,
                format!("there is no group {}: the only one is {}", excerpt(group), self.group_name),
            );
        }
        // Who has inherited the connection of a place needs no other proof, and gets no other
        // place.
        let its = |(number, _): &(MemberId, _)| {
            let child = self.child_of(*number)?;
            child.channel.as_ref().map(|channel| channel.id)
        };
        let own = match connection.channel {
            None => None,
            inherited => {
                match self.group.numbered().find(|found| its(found) == inherited).map(|(it, _)| it) {
                    None => {
                        return refuse(
                            RefusalCode::Forbidden,
                            "this connection is for a process that has ended, or that may not attach again"
                                .into(),
                        );
                    }
                    own => own,
                }
            }
        };
        let place = match &attach.member {
            Some(id) => self.find(id)?,
            None => match own.or_else(|| self.group.vacant()) {
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
        let member = &self.members[place.index()];
        let life = &self.group.members()[place.index()];
        let token = self.child_of(place).and_then(|child| child.token.as_ref());
        match own {
            Some(own) if own != place => {
                let message = format!("this connection is for member {}", self.members[own.index()].id);
                return refuse(RefusalCode::Forbidden, message);
            }
            Some(_) => {}
            None if life.is_supervised() && (token.is_none() || token != attach.token.as_ref()) => {
                return refuse(
                    RefusalCode::Forbidden,
                    format!("member {} is for the process that the primary started for it", member.id),
                );
            }
            // A worker that was started for its member must not take others.
            None if !life.is_supervised()
                && self.spawner.is_some()
                && connection.standing == Standing::Worker =>
            {
                return refuse(
                    RefusalCode::Forbidden,
                    "this primary starts its own workers: only root and the users in allow_users and allow_groups in \
                     [control] of its configuration may attach others"
                        .into(),
                );
            }
            None => {}
        }
        if life.connection().is_some() {
            return refuse(RefusalCode::Occupied, format!("member {} has a worker", member.id));
        }
        if own.is_none()
            && let Some(process) = self.child_of(place).map(|child| child.process.pid())
            && !descends(peer, process)
        {
            return refuse(
                RefusalCode::Forbidden,
                format!("member {} is for process {process} and its children", member.id),
            );
        }
        if life.may_attach().is_err() {
            return refuse(RefusalCode::Occupied, format!("member {} is {}", member.id, life.shown().name()));
        }
        Ok(place)
    }
}

/// Whether a process is `ancestor`, or a descendant of it. A token alone proves little: all processes
/// of a user can read each other's environment.
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
