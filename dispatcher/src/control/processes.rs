//! Worker processes: started, watched, signalled, killed.

use nix::sys::signal::Signal;
use tokio::io::Interest;

use crate::control::error::PrimaryError;
use crate::control::groups::MemberKey;
use crate::control::inbox::Event;
use crate::control::primary::Primary;
use crate::control::spawner::{Child, random_token};
use crate::group::ProcessId;
use crate::host::sys;

impl Primary {
    /// Starts a process for a member.
    pub(super) fn spawn(&mut self, key: MemberKey) -> Result<ProcessId, PrimaryError> {
        let group = self.group(key.group);
        let (Some(spawner), Some(workers)) = (&self.spawner, &group.workers) else {
            return Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into());
        };
        let token = random_token()?;
        let id = &self.resources(key).id;
        let (process, channel) = spawner.spawn(workers, self.cgroups.as_ref(), id, &token)?;
        let program = workers.command.command.first().cloned().unwrap_or_default();
        self.resources_mut(key).program = program;
        self.watch_process(Child { group: key.group, process, channel: Some(channel), token: Some(token) })
    }

    /// Has the end of a process become an event.
    pub(super) fn watch_process(&mut self, child: Child) -> Result<ProcessId, PrimaryError> {
        let id = ProcessId(child.process.pid());
        let ended = sys::watched(child.process.watch()?, Interest::READABLE)?;
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            let _ = ended.readable().await;
            outbox.event(Event::Exited(id));
        });
        self.processes.insert(id, child);
        Ok(id)
    }

    pub(super) fn terminate(&self, process: ProcessId) {
        if let Some(child) = self.processes.get(&process) {
            child.process.signal(Signal::SIGTERM);
        }
    }

    /// Kills a worker: its process, and what could attach in its name. Its end is an event.
    pub(super) fn kill(&mut self, process: ProcessId) {
        if let Some(child) = self.processes.get_mut(&process) {
            (child.channel, child.token) = (None, None);
            child.process.kill();
        }
    }

    /// A process has ended. What it left behind cannot attach as the next one.
    pub(super) fn forget(&mut self, process: ProcessId) {
        self.processes.remove(&process);
        self.look_for_orphans();
    }

    /// The process that was started for a member.
    pub(super) fn child_of(&self, key: MemberKey) -> Option<&Child> {
        self.processes.get(&self.life(key).process()?)
    }

    /// Process id of a member's worker, as the kernel says; else of its process; 0: none.
    pub(super) fn pid_of(&self, key: MemberKey) -> u32 {
        let session = self.resources(key).session.as_ref().map(|session| session.pid);
        let process = self.child_of(key).map(|child| child.process.pid());
        session.or(process).unwrap_or(0)
    }

    /// Opens all files anew, as SIGHUP asks; workers that handle the signal open theirs.
    pub(super) fn reopen(&mut self) {
        crate::log::reopen();
        self.commands().for_each(|command| command.output.reopen());
        let mut told = 0;
        for child in self.processes.values() {
            if child.process.catches(Signal::SIGHUP) {
                child.process.signal(Signal::SIGHUP);
                told += 1;
            }
        }
        tracing::info!(workers_told = told, "SIGHUP: files are opened anew");
    }
}
