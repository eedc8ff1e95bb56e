//! Attaching a worker. It gets segments, maps them, seals its up segment, and sends `ready`. Only
//! then do the lanes serve it.

use std::time::Instant;

use nix::sys::socket::UnixCredentials;
use xfan_shm::ids::GroupId;
use xfan_shm::layout::VERSION;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{Attach, Attached, Refusal, RefusalCode, Reply};

use crate::control::access::Role;
use crate::control::groups::MemberKey;
use crate::control::inbox::Response;
use crate::control::peer::Connection;
use crate::control::primary::Primary;
use crate::group::admission::{Candidate, Inherited, NotAdmitted, Proof};
use crate::group::{Event, ProcessId};
use crate::text::excerpt;

impl Primary {
    /// Handles a worker's request to attach.
    pub(super) fn attach(
        &mut self,
        connection: Connection,
        peer: UnixCredentials,
        mut attach: Attach,
    ) -> Response {
        attach.program = excerpt(&attach.program);
        match self.admit(connection, peer, &attach) {
            Ok(response) => response,
            Err((member, refusal)) => {
                self.refused += 1;
                let name = attach.member.as_deref().map(excerpt);
                self.report_refusal(&peer, Some(&attach.program), name.as_deref(), &refusal.message);
                if let Some(key) = member.filter(|_| refusal.code == RefusalCode::Version) {
                    self.resources_mut(key).last_error.clone_from(&refusal.message);
                    self.apply(key.group, Event::Incompatible(key.member));
                }
                Reply::Refused(refusal).into()
            }
        }
    }

    /// Reports a refusal in the log and the event history, unless there were too many for this
    /// user.
    pub(super) fn report_refusal(
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
        self.history.write(member, pid, "refused", format!("{message}{more}"));
    }

    /// Chooses the member for a worker, and makes its segments.
    fn admit(
        &mut self,
        connection: Connection,
        peer: UnixCredentials,
        attach: &Attach,
    ) -> Result<Response, (Option<MemberKey>, Refusal)> {
        let pid = u32::try_from(peer.pid()).unwrap_or(0);
        let key = self.choose_member(&connection, pid, attach).map_err(|refusal| (None, refusal))?;
        let refused = |code, message: String| (Some(key), Refusal { code, message });
        if attach.version != VERSION {
            return Err(refused(
                RefusalCode::Version,
                format!(
                    "the worker speaks protocol version {}, this primary version {VERSION}: use builds of the same release",
                    attach.version
                ),
            ));
        }
        if !self.member(key).is_supervised() {
            self.count_unsupervised(key.group, peer.uid())
                .map_err(|message| refused(RefusalCode::Occupied, message))?;
        }
        let fail = |error: &dyn std::fmt::Display| refused(RefusalCode::Closing, explained(error));
        let memory = self.memory.read_only_fd().try_clone_to_owned().map_err(|error| fail(&error))?;
        let (id, geometry) = (connection.id, self.geometry);
        let handover = self
            .resources_mut(key)
            .begin_joining(connection, pid, attach.program.clone(), geometry)
            .map_err(|error| fail(&error))?;
        if let Err(error) = self.try_apply(key.group, Event::Attaching(key.member, id)) {
            self.resources_mut(key).joining = None;
            return Err(refused(RefusalCode::Occupied, error.to_string()));
        }
        let resources = self.resources(key);
        let attached = Attached {
            member: resources.id.clone(),
            ports: self.ports.iter().map(|port| port.name.clone()).collect(),
            geometry,
            umem_bytes: self.memory.length() as u64,
            core: resources.core,
            spin_ns: u64::try_from(resources.spin.as_nanos()).unwrap_or(u64::MAX),
            yield_ns: u64::try_from(self.yields.as_nanos()).unwrap_or(u64::MAX),
        };
        Ok(Response {
            reply: Some(Reply::Attached(attached).into()),
            fds: vec![memory, handover.down, handover.up, handover.doorbell],
        })
    }

    /// Counts an attach of a worker that the primary did not start. The error is a sentence.
    fn count_unsupervised(&mut self, group: GroupId, uid: u32) -> Result<(), String> {
        let machine = &mut self.group_mut(group).machine;
        let (policy, members) = (machine.policy().restart, machine.members().len());
        machine.count_unsupervised(uid, Instant::now()).map_err(|limit| {
            format!(
                "workers of user id {uid} have attached {limit} times within {:?}, which is the limit: {} (start_limit_burst) \
                 for each of {members} members; try again later",
                policy.limit_interval, policy.limit_burst
            )
        })
    }

    /// Handles `ready` from a worker that has mapped its segments.
    pub(super) fn ready(&mut self, connection: &Connection, peer: &UnixCredentials) -> Response {
        match self.join(connection) {
            Ok(()) => Reply::Joined.into(),
            Err((member, refusal)) => {
                self.refused += 1;
                let name = member.map(|key| self.resources(key).id.clone());
                self.report_refusal(peer, None, name.as_deref(), &refusal.message);
                if let Some(key) = member {
                    self.apply(key.group, Event::Disconnected(connection.id));
                }
                Reply::Refused(refusal).into()
            }
        }
    }

    /// Begins the session of a worker, and makes the lanes serve it.
    fn join(&mut self, connection: &Connection) -> Result<(), (Option<MemberKey>, Refusal)> {
        let key = self.member_of(connection.id);
        let joining = key.and_then(|key| self.resources_mut(key).joining.take());
        let (Some(key), Some(joining)) = (key, joining) else {
            let message = match key {
                Some(_) => "the worker of this connection has been ready before",
                None => "this connection has no worker",
            };
            return Err((None, Refusal { code: RefusalCode::Malformed, message: message.into() }));
        };
        let refused = |code, message: String| (Some(key), Refusal { code, message });
        let held = self
            .resources_mut(key)
            .begin_session(joining)
            .map_err(|error| refused(RefusalCode::Impossible, error.to_string()))?;
        if let Err(error) = self.try_apply(key.group, Event::Joined(connection.id)) {
            self.resources_mut(key).session = None;
            return Err(refused(RefusalCode::Occupied, error.to_string()));
        }
        if let Err(error) = held
            && !std::mem::replace(&mut self.mlock_warned, true)
        {
            tracing::warn!(
                "cannot lock the workers' segments in memory: {error}. If the kernel swaps them out or moves them, lanes \
                 wait for it: give xfan CAP_IPC_LOCK or a higher RLIMIT_MEMLOCK"
            );
        }
        Ok(())
    }

    /// Chooses the member that a worker takes.
    fn choose_member(
        &self,
        connection: &Connection,
        pid: u32,
        attach: &Attach,
    ) -> Result<MemberKey, Refusal> {
        let group = self.group_named(attach.group.as_deref())?;
        let state = self.group(group);
        let named = attach.member.as_deref().map(|id| self.find(id)).transpose()?;
        if let Some(named) = named.filter(|named| named.group != group) {
            let message = format!("member {} is not one of group {}", self.resources(named).id, state.name);
            return Err(Refusal { code: RefusalCode::UnknownMember, message });
        }
        let inherited = match connection.inherited {
            None => Inherited::No,
            id => {
                let owns_it = |key: &MemberKey| {
                    let child = self.child_of(*key);
                    child.and_then(|child| child.connection.as_ref().map(|inherited| inherited.id)) == id
                };
                state.keys().find(owns_it).map_or(Inherited::Stale, |key| Inherited::From(key.member))
            }
        };
        let candidate = Candidate {
            connection: connection.id,
            named: named.map(|key| key.member),
            inherited,
            is_workers_user: connection.role == Role::Worker,
        };
        let proof = |member| {
            let child = self.child_of(MemberKey { group, member });
            let token = child.and_then(|child| child.token.as_ref());
            Proof {
                token: token.is_some() && token == attach.token.as_ref(),
                is_process: child.is_some_and(|child| child.has_made(connection.id, pid)),
            }
        };
        match state.machine.admit(&candidate, state.workers.is_some(), proof) {
            Ok(member) => Ok(MemberKey { group, member }),
            Err(why) => Err(self.refusal(group, why)),
        }
    }

    /// Says why a worker may not attach.
    fn refusal(&self, group: GroupId, why: NotAdmitted) -> Refusal {
        let id = |member| self.resources(MemberKey { group, member }).id.as_str();
        let members = self.group(group).members.len();
        let (code, message) = match why {
            NotAdmitted::HasAttached => {
                (RefusalCode::Malformed, "this connection has a worker already".to_owned())
            }
            NotAdmitted::Stale => (
                RefusalCode::Forbidden,
                "this connection is for a process that has ended, or that may not attach again".into(),
            ),
            NotAdmitted::NoneVacant => (
                RefusalCode::Occupied,
                format!(
                    "all {members} members have a worker: remove one (`xfan workers remove`), or start the \
                             primary with a higher max_workers"
                ),
            ),
            NotAdmitted::ForMember(own) => {
                (RefusalCode::Forbidden, format!("this connection is for member {}", id(own)))
            }
            NotAdmitted::WrongToken(member) => (
                RefusalCode::Forbidden,
                format!("member {} is for the process that the primary started for it", id(member)),
            ),
            NotAdmitted::NotAllowed => (
                RefusalCode::Forbidden,
                "this primary starts its own workers: only root and the users in allow_users and \
                         allow_groups in [control] of its configuration may attach others"
                    .into(),
            ),
            NotAdmitted::Occupied(member) => {
                (RefusalCode::Occupied, format!("member {} has a worker", id(member)))
            }
            NotAdmitted::NotProcess(member, ProcessId(process)) => {
                (RefusalCode::Forbidden, format!("member {} is for process {process}", id(member)))
            }
            NotAdmitted::InState(member, displayed) => {
                (RefusalCode::Occupied, format!("member {} is {}", id(member), displayed.name()))
            }
        };
        Refusal { code, message }
    }
}
