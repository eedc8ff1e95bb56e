//! The groups of a primary: what decides about their members, and what the members have.

use std::time::Instant;

use xfan_shm::ids::{GroupId, MemberId};

use crate::control::resources::Resources;
use crate::group::Group;
use crate::group::policy::Policy;
use crate::process::cgroup::Cgroups;
use crate::process::inherit::Fresh;
use crate::process::spawn::WorkerCommand;
use crate::report::Confinement;

/// A group to be.
#[derive(Debug)]
pub struct GroupParts {
    /// Its name.
    pub name: String,
    /// What its members have, by number.
    pub members: Vec<Resources>,
    /// The number of members that have a worker from the start. The others are reported only once a
    /// worker has attached as them.
    pub initial: usize,
    /// What decides about members.
    pub policy: Policy,
    /// How the primary starts its workers. `None`: they attach by themselves.
    pub command: Option<WorkerCommand>,
}

/// A group of a running primary.
#[derive(Debug)]
pub(super) struct GroupState {
    pub(super) id: GroupId,
    pub(super) name: String,
    /// Decides what happens to the members.
    pub(super) life: Group,
    /// What the members have, by number.
    pub(super) members: Vec<Resources>,
    /// As in [`GroupParts`].
    pub(super) initial: usize,
    /// How the primary starts its workers. `None`: they attach by themselves.
    pub(super) workers: Option<Workers>,
}

/// How the workers of a group are started.
#[derive(Debug)]
pub(super) struct Workers {
    pub(super) command: WorkerCommand,
    /// The scheduling and limits that their processes get.
    pub(super) fresh: Fresh,
    /// For the report.
    pub(super) confinement: Confinement,
}

/// A member of one of the primary's groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemberKey {
    pub(super) group: GroupId,
    pub(super) member: MemberId,
}

impl GroupState {
    /// `cgroups`: those of the primary, or why there are none; `None` if it starts no workers.
    pub(super) fn new(
        id: GroupId,
        parts: GroupParts,
        cgroups: Option<&Result<Cgroups, String>>,
        now: Instant,
    ) -> Self {
        let GroupParts { name, members, initial, policy, command } = parts;
        let workers = command.zip(cgroups).map(|(command, cgroups)| Workers::new(command, cgroups));
        GroupState { id, name, life: Group::new(policy, members.len(), now), members, initial, workers }
    }

    /// The keys of its members.
    pub(super) fn keys(&self) -> impl Iterator<Item = MemberKey> + use<> {
        let group = self.id;
        (0..u8::MAX).map(MemberId).take(self.members.len()).map(move |member| MemberKey { group, member })
    }

    /// The keys of the members that have a worker from the start.
    pub(super) fn initial(&self) -> impl Iterator<Item = MemberKey> + use<> {
        self.keys().take(self.initial)
    }

    /// Its member of this id, such as `default/0`.
    pub(super) fn find(&self, id: &str) -> Option<MemberKey> {
        self.keys().find(|key| self.members[key.member.index()].id == id)
    }
}
