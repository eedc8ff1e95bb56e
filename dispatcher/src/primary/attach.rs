//! A worker takes a place.

use std::time::{Duration, Instant};

use nix::sys::socket::UnixCredentials;
use xfan_shm::layout::VERSION;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{Attach, Attached, Refusal, RefusalCode, Reply};

use super::{Primary, PrimaryError};
use crate::access::Standing;
use crate::control::{Answer, Connection};
use crate::lane::Command;
use crate::life::{Change, State};
use crate::members::Member;
use crate::supervisor::Process;

impl Primary {
    /// Answers a worker. A refusal of one that this primary started itself, and that will not come better, is an error as well.
    pub(super) fn attach(
        &mut self,
        connection: Connection,
        peer: UnixCredentials,
        mut attach: Attach,
    ) -> (Answer, Result<(), PrimaryError>) {
        attach.program = printable(&attach.program);
        match self.admit(connection, peer, &attach) {
            Ok(answer) => (answer, Ok(())),
            Err((place, refusal)) => {
                tracing::warn!(
                    pid = peer.pid(),
                    uid = peer.uid(),
                    program = attach.program,
                    "refused: {}",
                    refusal.message
                );
                let pid = u32::try_from(peer.pid()).unwrap_or(0);
                let member = attach.member.as_deref().map(printable);
                self.refused += 1;
                // Who tries again and again does not fill the journal.
                if self.last_refusal.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
                    self.last_refusal = Some(Instant::now());
                    self.journal.write(member.as_deref(), pid, "refused", refusal.message.clone());
                }
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
        let fail = |error: &dyn std::fmt::Display| refused(RefusalCode::Closing, explained(error));
        let memory = self.memory.read_only_fd().try_clone_to_owned().map_err(|error| fail(&error))?;
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        let member = &mut self.members[place];
        let (links, handover) =
            member.begin_session(connection, pid, self.geometry).map_err(|error| fail(&error))?;
        // Of one process only so many are taken as of processes.
        if member.token.is_some() {
            if member.attached > 0 {
                member.starts.count(Instant::now());
            }
            member.attached = member.attached.saturating_add(1);
        }
        member.program.clone_from(&attach.program);
        member.overdue = None;
        let attached = Attached {
            member: member.id.clone(),
            ports: vec![self.name.clone()],
            geometry: self.geometry,
            umem_bytes: self.memory.length() as u64,
            core: member.core,
            spin_ns: u64::try_from(self.members[place].spin.as_nanos()).unwrap_or(u64::MAX),
            yield_ns: u64::try_from(self.yields.as_nanos()).unwrap_or(u64::MAX),
        };
        for (lane, link) in self.lanes.iter_mut().zip(links) {
            lane.command(Command::Join(place, Box::new(link)));
        }
        self.change(place, Change::Attach, attach.program.clone());
        let member = &mut self.members[place];
        if member.held_until.take().is_some() {
            let detail = format!("{} packets that were held", member.backlog());
            self.journal.write(Some(&member.id), pid, "resumed", detail);
        }
        self.steer();
        tracing::info!(member = attached.member, pid, program = attach.program, "attached");
        Ok(Answer {
            reply: Some(Reply::Attached(attached)),
            fds: vec![memory, handover.down, handover.up, handover.doorbell],
        })
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
        if let Some(group) = attach.group.as_ref().filter(|group| *group != "default") {
            return refuse(
                RefusalCode::UnknownGroup,
                format!("there is no group {}: the only one is default", printable(group)),
            );
        }
        let place = match &attach.member {
            Some(id) => self.find(id)?,
            None => match self.vacant_place() {
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
        if member.token.is_some() && member.token != attach.token {
            return refuse(
                RefusalCode::Forbidden,
                format!("member {} is for the process that the primary started for it", member.id),
            );
        }
        // A worker that was started for its place shall not take others'.
        if member.token.is_none() && self.spawner.is_some() && connection.standing == Standing::Worker {
            return refuse(
                RefusalCode::Forbidden,
                "this primary starts its own workers: beside them may join root, and whom allow_users and allow_groups in \
                 [control] of its configuration name"
                    .into(),
            );
        }
        if member.session.is_some() {
            return refuse(RefusalCode::Occupied, format!("member {} has a worker", member.id));
        }
        if let Some(process) = member.process.as_ref().map(Process::pid)
            && !descends(peer, process)
        {
            return refuse(
                RefusalCode::Forbidden,
                format!("member {} is for process {process} and its children", member.id),
            );
        }
        // It is leaving, or down for good.
        if member.state().after(Change::Attach).is_none()
            || member.leaving.is_some()
            || (member.token.is_some() && member.process.is_none())
        {
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

/// The beginning of a stranger's text, without what would steer a terminal or begin a line of its own in the log.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(64).collect()
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

    #[test]
    fn a_strangers_text_is_one_short_line() {
        assert_eq!(printable("a\n\u{1b}[31mb\u{9b}c"), "a[31mbc");
        assert_eq!(printable(&"x".repeat(10_000)).len(), 64);
    }
}
