//! The groups of a primary: their state machines, and the resources of their members.

use std::time::Instant;

use xfan_shm::ids::{GroupId, MemberId};

use crate::control::resources::Resources;
use crate::group::Group;
use crate::group::policy::Policy;
use crate::process::cgroup::Cgroups;
use crate::process::inherit::Rlimits;
use crate::process::spawn::WorkerCommand;
use crate::report::Confinement;

/// The parts of a group.
#[derive(Debug)]
pub struct GroupParts {
    /// The name of the group.
    pub name: String,
    /// The resources of its members, by number.
    pub members: Vec<Resources>,
    /// The number of members that have a worker from the start. Reports show the others only once a
    /// worker has taken them.
    pub initial: usize,
    /// The settings of its state machine.
    pub policy: Policy,
    /// How the primary starts its workers; `None`: it starts none.
    pub command: Option<WorkerCommand>,
}

/// A group of a running primary.
#[derive(Debug)]
pub(super) struct GroupState {
    pub(super) id: GroupId,
    pub(super) name: String,
    /// Decides what happens to the members.
    pub(super) machine: Group,
    /// The resources of the members, by number.
    pub(super) members: Vec<Resources>,
    /// See [`GroupParts::initial`].
    pub(super) initial: usize,
    /// How the primary starts its workers; `None`: it starts none.
    pub(super) workers: Option<Workers>,
}

/// How the primary starts the workers of a group.
#[derive(Debug)]
pub(super) struct Workers {
    pub(super) command: WorkerCommand,
    /// The resource limits of their processes.
    pub(super) rlimits: Rlimits,
    /// How they are confined, for the report.
    pub(super) confinement: Confinement,
}

/// The group and the number of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemberKey {
    pub(super) group: GroupId,
    pub(super) member: MemberId,
}

impl GroupState {
    /// Makes a group of vacant members. `cgroups`: those of the primary, or why it has none;
    /// `None`: it starts no workers.
    pub(super) fn new(
        id: GroupId,
        parts: GroupParts,
        cgroups: Option<&Result<Cgroups, String>>,
        now: Instant,
    ) -> Self {
        let GroupParts { name, members, initial, policy, command } = parts;
        let workers = command.zip(cgroups).map(|(command, cgroups)| Workers::new(command, cgroups));
        GroupState { id, name, machine: Group::new(policy, members.len(), now), members, initial, workers }
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

    /// The member with this id, such as `default/0`.
    pub(super) fn find(&self, id: &str) -> Option<MemberKey> {
        self.keys().find(|key| self.members[key.member.index()].id == id)
    }
}
