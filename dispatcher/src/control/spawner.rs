//! Starts worker processes with a connection.

use std::path::PathBuf;

use xfan_shm::ids::GroupId;

use crate::control::connection::{Connections, InheritedConnection, pair};
use crate::control::error::PrimaryError;
use crate::control::groups::Workers;
use crate::control::peer::ConnectionId;
use crate::host::random::random_bytes;
use crate::process::cgroup::Cgroups;
use crate::process::spawn::Process;
use crate::process::survivors::Note;

/// What starting a worker needs, in addition to the settings of its [group](Workers).
#[derive(Debug)]
pub(super) struct Spawner {
    /// The path of the control socket.
    pub(super) socket: PathBuf,
    /// The note about workers, for the next primary.
    pub(super) note: Note,
    pub(super) connections: Connections,
}

impl Spawner {
    /// Starts a process for a member. The process inherits a connection. Also returns a connection
    /// number from before.
    pub(super) fn spawn(
        &self,
        workers: &Workers,
        cgroups: Option<&Cgroups>,
        member: &str,
        token: &str,
    ) -> Result<(ConnectionId, Process, InheritedConnection), PrimaryError> {
        let born = self.connections.next_id();
        let Workers { command, rlimits, .. } = workers;
        let (ours, theirs) = pair()?;
        let cgroup = cgroups.map(|cgroups| cgroups.make(member, &command.limits)).transpose()?;
        let process = Process::spawn(command, &self.socket, member, token, &theirs, cgroup, *rlimits)?;
        let user = &command.user;
        // The kernel would report the primary as the peer, since it made both ends.
        let peer =
            libc::ucred { pid: process.pid().cast_signed(), uid: user.uid.as_raw(), gid: user.gid.as_raw() };
        let connection = self.connections.hand_over(ours, peer.into());
        Ok((born, process, connection))
    }
}

/// A worker process, and its credentials for attaching.
#[derive(Debug)]
pub(super) struct Child {
    /// The group of its member.
    pub(super) group: GroupId,
    pub(super) process: Process,
    /// A connection number from just before the process was started; `None`: an earlier primary
    /// started it, before any connection of this one.
    pub(super) born: Option<ConnectionId>,
    /// The connection that it inherited; `None`: it has none, or may not attach any more.
    pub(super) connection: Option<InheritedConnection>,
    /// The token that it must present to attach on another connection; `None`: it may not any more.
    pub(super) token: Option<String>,
}

impl Child {
    /// Whether the process has made this connection. `pid`: the connection's, as the kernel noted
    /// it then. An older connection with that pid is another process's, which has exited since.
    pub(super) fn has_made(&self, connection: ConnectionId, pid: u32) -> bool {
        self.process.pid() == pid && self.born.is_none_or(|born| connection > born)
    }
}

/// A token of 128 random bits, in hexadecimal.
pub(super) fn random_token() -> std::io::Result<String> {
    let bytes: [u8; 16] = random_bytes()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
