//! Starts, watches, signals and kills worker processes.

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
        let (born, process, connection) = spawner.spawn(workers, self.cgroups.as_ref(), id, &token)?;
        let program = workers.command.command.first().cloned().unwrap_or_default();
        self.resources_mut(key).program = program;
        self.watch_process(Child {
            group: key.group,
            process,
            born: Some(born),
            connection: Some(connection),
            token: Some(token),
        })
    }

    /// Sends an event to the inbox when a process exits.
    pub(super) fn watch_process(&mut self, child: Child) -> Result<ProcessId, PrimaryError> {
        let id = ProcessId(child.process.pid());
        let pidfd = sys::watched(child.process.watch()?, Interest::READABLE)?;
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let _ = pidfd.readable().await;
            sender.send_event(Event::Exited(id));
        });
        self.processes.insert(id, child);
        Ok(id)
    }

    /// Sends SIGTERM to a process.
    pub(super) fn terminate(&self, process: ProcessId) {
        if let Some(child) = self.processes.get(&process) {
            child.process.signal(Signal::SIGTERM);
        }
    }

    /// Kills a process, and revokes its right to attach. Its exit becomes an event.
    pub(super) fn kill(&mut self, process: ProcessId) {
        if let Some(child) = self.processes.get_mut(&process) {
            (child.connection, child.token) = (None, None);
            child.process.kill();
        }
    }

    /// Releases the resources of a process that has exited, among them its connection and its
    /// token: no other process can attach with them.
    pub(super) fn forget(&mut self, process: ProcessId) {
        self.processes.remove(&process);
        self.reap_orphans();
    }

    /// The process that was started for a member.
    pub(super) fn child_of(&self, key: MemberKey) -> Option<&Child> {
        self.processes.get(&self.member(key).process()?)
    }

    /// The process id of a member's worker, according to the kernel; if there is no session, that
    /// of the member's process; 0: none.
    pub(super) fn pid_of(&self, key: MemberKey) -> u32 {
        let session = self.resources(key).session.as_ref().map(|session| session.pid);
        let process = self.child_of(key).map(|child| child.process.pid());
        session.or(process).unwrap_or(0)
    }

    /// Reopens all files, and passes SIGHUP on to the workers that handle it.
    pub(super) fn reopen(&mut self) {
        crate::log::reopen();
        self.commands().for_each(|command| command.output.reopen());
        let mut signalled = 0;
        for child in self.processes.values() {
            if child.process.catches(Signal::SIGHUP) {
                child.process.signal(Signal::SIGHUP);
                signalled += 1;
            }
        }
        tracing::info!(workers_signalled = signalled, "SIGHUP: files are reopened");
    }
}
