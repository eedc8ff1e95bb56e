//! Finds groups and members by number, name, process or connection.

use xfan_shm::ids::GroupId;
use xfan_shm::protocol::{Refusal, RefusalCode};

use crate::control::groups::{GroupState, MemberKey};
use crate::control::primary::Primary;
use crate::control::resources::Resources;
use crate::group::ConnectionId;
use crate::group::member::Member;
use crate::process::spawn::WorkerCommand;
use crate::text::excerpt;

impl Primary {
    pub(super) fn group(&self, group: GroupId) -> &GroupState {
        &self.groups[group.index()]
    }

    pub(super) fn group_mut(&mut self, group: GroupId) -> &mut GroupState {
        &mut self.groups[group.index()]
    }

    /// The resources of a member.
    pub(super) fn resources(&self, key: MemberKey) -> &Resources {
        &self.group(key.group).members[key.member.index()]
    }

    pub(super) fn resources_mut(&mut self, key: MemberKey) -> &mut Resources {
        &mut self.group_mut(key.group).members[key.member.index()]
    }

    /// A member of a group's state machine.
    pub(super) fn member(&self, key: MemberKey) -> &Member {
        &self.group(key.group).machine.members()[key.member.index()]
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

    /// The group with this name; without a name, the first group.
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

    /// The member with this id, such as `default/0`.
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

    /// The member whose worker, joined or not, uses this connection.
    pub(super) fn member_of(&self, connection: ConnectionId) -> Option<MemberKey> {
        self.groups.iter().find_map(|group| {
            let member = group.machine.member_of(connection)?;
            Some(MemberKey { group: group.id, member })
        })
    }
}
