//! Workers that an earlier primary started. This primary adopts those that it would start itself,
//! and terminates the others.

use xfan_shm::ids::GroupId;
use xfan_shm::limits::explained;

use crate::control::error::PrimaryError;
use crate::control::groups::{GroupState, MemberKey};
use crate::control::primary::Primary;
use crate::control::spawner::Child;
use crate::group::Event;
use crate::process::spawn::Process;
use crate::process::survivors::Survivor;

impl Primary {
    /// Adopts workers of an earlier primary, and starts a process for every other initial member.
    pub(super) fn start_workers(&mut self) -> Result<(), PrimaryError> {
        if self.commands().any(|command| command.user.is_root()) {
            tracing::warn!(
                "workers run as root, as configured: nothing prevents them from writing to packet memory and to segments of others"
            );
        }
        self.adopt_survivors()?;
        for key in self.initial() {
            if self.member(key).process().is_none() {
                self.apply(key.group, Event::Start(key.member));
                self.check_failure()?;
            }
        }
        Ok(())
    }

    /// The members that have a process from the start.
    fn initial(&self) -> Vec<MemberKey> {
        let started = self.groups.iter().filter(|group| group.workers.is_some());
        started.flat_map(GroupState::initial).collect()
    }

    /// Adopts or terminates the workers in the note of an earlier primary.
    fn adopt_survivors(&mut self) -> Result<(), PrimaryError> {
        let Some(spawner) = &self.spawner else { return Ok(()) };
        let note = spawner.note.clone();
        let survivors = note.read().unwrap_or_else(|error| {
            tracing::warn!(
                path = format!("{}.workers", spawner.socket.display()),
                "cannot find the workers of an earlier primary: {}",
                explained(error)
            );
            Vec::new()
        });
        note.remove();
        for survivor in survivors {
            // If the group of a worker is no longer configured, the first group's user and command
            // apply.
            let group = self.group_of(&survivor.member);
            let Some(workers) = &self.group(group).workers else { continue };
            let command = &workers.command;
            let Some(pidfd) = survivor.find(command) else { continue };
            let wanted = command.survive && command.command == survivor.command;
            let program = command.command.first().cloned().unwrap_or_default();
            let cgroup = self.cgroups.as_ref().and_then(|cgroups| cgroups.of(survivor.pid));
            let process = Process::adopt(survivor.pid, pidfd, cgroup);
            let (id, pid) = (survivor.member, survivor.pid);
            let is_free =
                |key: &MemberKey| self.resources(*key).id == id && self.member(*key).process().is_none();
            let key = self.group(group).initial().find(is_free).filter(|_| wanted);
            let child = Child { group, process, born: None, connection: None, token: Some(survivor.token) };
            if let Some(key) = key {
                tracing::info!(member = id, pid, "adopting a worker of the previous primary");
                self.resources_mut(key).program = program;
                let process = self.watch_process(child)?;
                self.apply(group, Event::Adopted(key.member, process));
            } else {
                tracing::info!(member = id, pid, "terminating a worker of the previous primary");
                let process = self.watch_process(Child { token: None, ..child })?;
                self.apply(group, Event::Unwanted(process));
            }
        }
        if let Some(cgroups) = &self.cgroups {
            let kept: Vec<_> = self.processes.values().filter_map(|child| child.process.cgroup()).collect();
            cgroups.clear(&kept);
        }
        Ok(())
    }

    /// The group of a member's id; the first group if none has that name.
    fn group_of(&self, id: &str) -> GroupId {
        let name = id.rsplit_once('/').map(|(name, _)| name);
        self.groups
            .iter()
            .find(|group| Some(group.name.as_str()) == name)
            .map_or(GroupId(0), |group| group.id)
    }

    /// Writes the note about workers for the next primary.
    pub(super) fn write_note(&self) {
        let Some(spawner) = &self.spawner else { return };
        let surviving =
            |group: &&GroupState| group.workers.as_ref().is_some_and(|workers| workers.command.survive);
        let surviving: Vec<_> = self.groups.iter().filter(surviving).collect();
        if surviving.is_empty() {
            return;
        }
        let survivor = |key: MemberKey| {
            let (child, resources) = (self.child_of(key)?, self.resources(key));
            let command = &self.group(key.group).workers.as_ref()?.command;
            let survivor = Survivor::of(&child.process, &resources.id, child.token.as_ref()?, command);
            if survivor.is_none() {
                tracing::warn!(
                    member = resources.id,
                    "cannot read the start time of the process: the next primary will not find it"
                );
            }
            survivor
        };
        let survivors: Vec<_> =
            surviving.into_iter().flat_map(GroupState::keys).filter_map(survivor).collect();
        if let Err(error) = spawner.note.write(&survivors) {
            tracing::warn!(
                path = format!("{}.workers", spawner.socket.display()),
                "cannot write the list of workers: the next primary will not find them: {}",
                explained(error)
            );
        }
    }
}
