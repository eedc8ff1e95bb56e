//! The groups of a primary: what decides about their members, and what the members have.

use std::time::Instant;

use xfan_shm::ids::{GroupId, MemberId};
use xfan_shm::protocol::{Refusal, RefusalCode};

use crate::control::primary::Primary;
use crate::control::resources::Resources;
use crate::group::member::Member;
use crate::group::policy::Policy;
use crate::group::{ConnectionId, Group};
use crate::process::cgroup::Cgroups;
use crate::process::inherit::Fresh;
use crate::process::spawn::WorkerCommand;
use crate::report::{self, Confinement};
use crate::text::excerpt;

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
    fn find(&self, id: &str) -> Option<MemberKey> {
        self.keys().find(|key| self.members[key.member.index()].id == id)
    }
}

impl Primary {
    pub(super) fn group(&self, group: GroupId) -> &GroupState {
        &self.groups[group.index()]
    }

    pub(super) fn group_mut(&mut self, group: GroupId) -> &mut GroupState {
        &mut self.groups[group.index()]
    }

    /// What a member has.
    pub(super) fn resources(&self, key: MemberKey) -> &Resources {
        &self.group(key.group).members[key.member.index()]
    }

    pub(super) fn resources_mut(&mut self, key: MemberKey) -> &mut Resources {
        &mut self.group_mut(key.group).members[key.member.index()]
    }

    /// The state of a member.
    pub(super) fn life(&self, key: MemberKey) -> &Member {
        &self.group(key.group).life.members()[key.member.index()]
    }

    /// The commands of all groups whose workers the primary starts.
    pub(super) fn commands(&self) -> impl Iterator<Item = &WorkerCommand> {
        self.groups.iter().filter_map(|group| Some(&group.workers.as_ref()?.command))
    }

    /// The ids of all groups.
    pub(super) fn group_ids(&self) -> impl Iterator<Item = GroupId> + use<> {
        (0..u8::MAX).map(GroupId).take(self.groups.len())
    }

    /// The members of all groups.
    pub(super) fn keys(&self) -> Vec<MemberKey> {
        self.groups.iter().flat_map(GroupState::keys).collect()
    }

    /// The group of this name; without a name, the first.
    pub(super) fn group_named(&self, name: Option<&str>) -> Result<GroupId, Refusal> {
        let found = self.groups.iter().find(|group| name.is_none_or(|name| group.name == name));
        found.map(|group| group.id).ok_or_else(|| {
            let names: Vec<_> = self.groups.iter().map(|group| group.name.as_str()).collect();
            let what = if names.len() == 1 { "the only one is" } else { "they are" };
            Refusal {
                code: RefusalCode::UnknownGroup,
                message: format!(
                    "there is no group {}: {what} {}",
                    excerpt(name.unwrap_or_default()),
                    names.join(", ")
                ),
            }
        })
    }

    /// The member of this id, such as `default/0`.
    pub(super) fn find(&self, id: &str) -> Result<MemberKey, Refusal> {
        self.groups.iter().find_map(|group| group.find(id)).ok_or_else(|| {
            let last = |group: &GroupState| group.members.len().saturating_sub(1);
            let ids = |group: &GroupState| format!("{name}/0 to {name}/{}", last(group), name = group.name);
            let ids: Vec<_> = self.groups.iter().map(ids).collect();
            Refusal {
                code: RefusalCode::UnknownMember,
                message: format!("there is no member {}: they are {}", excerpt(id), ids.join(", ")),
            }
        })
    }

    /// The member whose worker, joined or not, has this connection.
    pub(super) fn member_of(&self, connection: ConnectionId) -> Option<MemberKey> {
        self.groups.iter().find_map(|group| {
            let member = group.life.member_of(connection)?;
            Some(MemberKey { group: group.id, member })
        })
    }

    /// What is known of a group.
    pub(super) fn report_of(&self, group: &GroupState) -> report::Group {
        let is_shown = |key: &MemberKey| {
            let untouched = self.resources(*key).is_untouched() && self.life(*key).is_vacant();
            key.member.index() < group.initial || !untouched
        };
        let report_of = |key: MemberKey| {
            let resources = self.resources(key);
            let output = group.workers.as_ref().map(|workers| &workers.command.output);
            let dropped = output.map_or(0, |output| output.dropped(&resources.id));
            resources.report(&group.life, key.member, self.pid_of(key), dropped)
        };
        let port_of = |lane: &crate::lane::handle::LaneHandle| self.ports[lane.port.index()].name.as_str();
        report::Group {
            name: group.name.clone(),
            buckets: crate::lane::BUCKETS,
            lanes: self.lanes.handles.iter().map(|lane| lane.report_of(group.id, port_of(lane))).collect(),
            members: group.keys().filter(is_shown).map(report_of).collect(),
            confinement: group
                .workers
                .as_ref()
                .map(|workers| workers.confinement.clone())
                .unwrap_or_default(),
        }
    }
}
