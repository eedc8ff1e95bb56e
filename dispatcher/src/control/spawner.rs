//! What the primary needs to start workers, and what it keeps of each process.

use std::path::PathBuf;

use xfan_shm::ids::GroupId;

use crate::control::connection::{Channel, Connections, pair};
use crate::control::error::PrimaryError;
use crate::control::groups::Workers;
use crate::host::random::random_bytes;
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
    pub(super) fn spawn(
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
pub(super) fn random_token() -> std::io::Result<String> {
    let bytes: [u8; 16] = random_bytes()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
