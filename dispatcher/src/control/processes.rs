//! Worker processes: started, watched, signalled, killed.

use std::path::PathBuf;

use nix::sys::signal::Signal;
use tokio::io::Interest;
use xfan_shm::ids::GroupId;

use crate::control::connection::{Channel, Connections, pair};
use crate::control::error::PrimaryError;
use crate::control::groups::{MemberKey, Workers};
use crate::control::inbox::Event;
use crate::control::primary::Primary;
use crate::group::ProcessId;
use crate::host::random::random_bytes;
use crate::host::sys;
use crate::process::cgroup::Cgroups;
use crate::process::spawn::Process;
use crate::process::survivors::Note;

/// What the primary needs to start workers, beside what their [groups](Workers) say.
#[derive(Debug)]
pub(super) struct Spawner {
    pub(super) socket: PathBuf,
    /// The list of workers for the next primary.
    pub(super) note: Note,
    pub(super) connections: Connections,
}

impl Spawner {
    /// Starts a process for a member. It inherits a connection.
    fn spawn(
        &self,
        workers: &Workers,
        cgroups: Option<&Cgroups>,
        member: &str,
        token: &str,
    ) -> Result<(Process, Channel), PrimaryError> {
        let Workers { command, fresh, .. } = workers;
        let (ours, theirs) = pair()?;
        let cgroup = cgroups.map(|cgroups| cgroups.make(member, &command.limits)).transpose()?;
        let process = Process::spawn(command, &self.socket, member, token, &theirs, cgroup, *fresh)?;
        let user = &command.user;
        // The kernel would name the primary, which made both ends.
        let peer =
            libc::ucred { pid: process.pid().cast_signed(), uid: user.uid.as_raw(), gid: user.gid.as_raw() };
        let channel = self.connections.hand_over(ours, peer.into());
        Ok((process, channel))
    }
}

/// A worker process, and its right to attach.
#[derive(Debug)]
pub(super) struct Child {
    /// The group that it was started for.
    pub(super) group: GroupId,
    pub(super) process: Process,
    /// The connection that it inherited.
    pub(super) channel: Option<Channel>,
    /// What a worker must know to attach as its member; none: it may not any more.
    pub(super) token: Option<String>,
}

/// 128 random bits, in hexadecimal.
fn random_token() -> std::io::Result<String> {
    let bytes: [u8; 16] = random_bytes()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

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
