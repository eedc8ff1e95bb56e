//! Workers that an earlier primary started: adopted if this primary would start the same, or ended.

use xfan_shm::ids::MemberId;
use xfan_shm::limits::explained;

use crate::control::error::PrimaryError;
use crate::control::primary::Primary;
use crate::control::processes::Child;
use crate::group::Event;
use crate::process::spawn::Process;
use crate::process::survivors::Survivor;

impl Primary {
    /// Starts a process for each member that has one from the start, unless a worker of an earlier
    /// primary is adopted for it.
    pub(super) fn start_workers(&mut self) -> Result<(), PrimaryError> {
        if self.spawner.as_ref().is_some_and(|spawner| spawner.command.user.is_root()) {
            tracing::warn!(
                "workers run as root, as configured: nothing keeps them from writing to packets and segments that are not theirs"
            );
        }
        self.adopt_survivors()?;
        for member in self.initial() {
            if self.group.members()[member.index()].process().is_none() {
                self.apply(Event::Start(member));
                self.check_failure()?;
            }
        }
        Ok(())
    }

    /// The members that have a process from the start.
    fn initial(&self) -> impl Iterator<Item = MemberId> + use<> {
        (0..u8::MAX).map(MemberId).take(self.places)
    }

    fn adopt_survivors(&mut self) -> Result<(), PrimaryError> {
        let Some(spawner) = &self.spawner else { return Ok(()) };
        let (command, note) = (spawner.command.clone(), spawner.note.clone());
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
            let Some(pidfd) = survivor.find(&command) else { continue };
            let cgroup = self.cgroups().and_then(|cgroups| cgroups.of(survivor.pid));
            let process = Process::adopt(survivor.pid, pidfd, cgroup);
            let (id, pid) = (survivor.member, survivor.pid);
            let free = |member: &MemberId| {
                self.members[member.index()].id == id
                    && self.group.members()[member.index()].process().is_none()
            };
            let member = self.initial().find(free);
            let child = Child { process, channel: None, token: Some(survivor.token) };
            match member {
                Some(member) if command.survive && command.command == survivor.command => {
                    tracing::info!(member = id, pid, "adopting a worker of the previous primary");
                    self.members[member.index()].program =
                        command.command.first().cloned().unwrap_or_default();
                    let process = self.watch_process(child)?;
                    self.apply(Event::Adopted(member, process));
                }
                _ => {
                    tracing::info!(member = id, pid, "terminating a worker of the previous primary");
                    let process = self.watch_process(Child { token: None, ..child })?;
                    self.apply(Event::Unwanted(process));
                }
            }
        }
        if let Some(cgroups) = self.cgroups() {
            let kept: Vec<_> = self.processes.values().filter_map(|child| child.process.cgroup()).collect();
            cgroups.clear(&kept);
        }
        Ok(())
    }

    /// Writes the list of workers that the next primary is to find.
    pub(super) fn write_note(&self) {
        let Some(spawner) = self.spawner.as_ref().filter(|spawner| spawner.command.survive) else { return };
        let survivor = |(number, member): (MemberId, &crate::control::members::Member)| {
            let child = self.child_of(number)?;
            let survivor = Survivor::of(&child.process, &member.id, child.token.as_ref()?, &spawner.command);
            if survivor.is_none() {
                tracing::warn!(
                    member = member.id,
                    "the kernel does not tell when the process began: the next primary will not find it"
                );
            }
            survivor
        };
        let members = (0..u8::MAX).map(MemberId).zip(&self.members);
        let survivors: Vec<_> = members.filter_map(survivor).collect();
        if let Err(error) = spawner.note.write(&survivors) {
            tracing::warn!(
                path = format!("{}.workers", spawner.socket.display()),
                "cannot write the list of workers: the next primary will not find them: {}",
                explained(error)
            );
        }
    }
}
