//! The control socket: who connects, what they say, when they hang up.
//!
//! A connection is a task that only moves messages, on a thread of its own: what they mean is
//! decided in one place, the primary, which gets them through its [inbox](crate::control::inbox),
//! and which goes on whatever a peer makes its connection wait for.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat};
use nix::unistd::{fchownat, geteuid};
use tokio::io::Interest;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{self, Refusal, RefusalCode, Reply};

use crate::control::access::{Access, peer_of};
use crate::control::connection::{Connections, ControlCounters, Shared, count};
use crate::control::connection_limits::{Admission, ConnectionLimits};
use crate::control::inbox::Outbox;
use crate::host::directory::{Directory, DirectoryError, kind, set_mode};
use crate::host::privileges::{OF_SOCKET, drop_capabilities_but};
use crate::host::sys;

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Somebody listens there.
    #[error("another primary answers on {0}: stop it, or choose another control socket with --socket")]
    Occupied(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: remove it, or choose another control socket with --socket")]
    NotASocket(PathBuf),
    /// Its folder is not to be trusted, or not to be had.
    #[error("no control socket: {0}")]
    Directory(#[from] DirectoryError),
    /// Anything else.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// Path of the socket.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
}

/// The listening socket. Dropping it removes its file.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    folder: Directory,
    name: OsString,
    inode: u64,
    access: Access,
    counters: Arc<ControlCounters>,
}

fn seqpacket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, flags | SockFlag::SOCK_CLOEXEC, None)
}

impl Listener {
    /// Listens on `path`. The socket of a primary that was killed is replaced.
    ///
    /// # Errors
    /// [`ControlError`]
    pub fn bind(path: &Path, access: Access) -> Result<Self, ControlError> {
        let fail = |source: io::Error| ControlError::Io { path: path.to_owned(), source };
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(fail(io::ErrorKind::InvalidInput.into()));
        };
        let folder = Directory::open(parent)?;
        let address = UnixAddr::new(path).map_err(|errno| fail(errno.into()))?;
        if let Ok(found) = folder.look(name) {
            if kind(&found) != SFlag::S_IFSOCK {
                return Err(ControlError::NotASocket(path.to_owned()));
            }
            let probe = seqpacket(SockFlag::SOCK_NONBLOCK).map_err(|errno| fail(errno.into()))?;
            match connect(probe.as_raw_fd(), &address) {
                Err(nix::errno::Errno::ECONNREFUSED) => folder.remove(name).map_err(fail)?,
                Err(nix::errno::Errno::ENOENT) => {}
                _ => return Err(ControlError::Occupied(path.to_owned())),
            }
        }
        let listening = || -> io::Result<Self> {
            let fd = seqpacket(SockFlag::SOCK_NONBLOCK)?;
            // Kernels before 6.16 cannot; there a peer can stop the thread of all connections, by a
            // descriptor whose closing blocks.
            let _ = sys::refuse_descriptors(fd.as_fd());
            // The file gets no more than this, whatever the umask.
            fchmod(&fd, Mode::from_bits_truncate(access.mode))?;
            bind(fd.as_raw_fd(), &address)?;
            let inode = folder.look(name)?.st_ino;
            // From here on, a failure removes the file.
            let (path, name, counters) = (path.to_owned(), name.to_owned(), Arc::default());
            let listener = Listener { fd, path, folder, name, inode, access, counters };
            // Nobody can connect before `listen`.
            hand_over(&listener.folder, &listener.name, &listener.access)?;
            listen(&listener.fd, Backlog::MAXCONN)?;
            Ok(listener)
        };
        listening().map_err(fail)
    }

    /// The folder of the socket, and its name there.
    pub fn file(&self) -> (&Directory, &OsStr) {
        (&self.folder, &self.name)
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What came over it.
    pub fn counters(&self) -> Arc<ControlCounters> {
        self.counters.clone()
    }

    /// Accepts connections, on a thread of their own, and reports what happens on them, until the
    /// inbox is gone. `inherited`: all workers inherit their connections.
    ///
    /// # Errors
    /// If the thread cannot be made.
    pub fn serve(&self, outbox: Outbox, inherited: bool) -> io::Result<Connections> {
        let fd = self.fd.try_clone()?;
        let access = self.access.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (counters, closer) = (self.counters.clone(), Arc::default());
        let shared = Shared { next: Arc::default(), counters, outbox, closer };
        let connections = Connections { runtime: runtime.handle().clone(), shared: shared.clone() };
        std::thread::Builder::new().name("control".into()).spawn(move || {
            drop_capabilities_but(OF_SOCKET);
            runtime.block_on(async {
                tokio::select! {
                    () = shared.outbox.closed() => {}
                    result = accept_all(fd, &access, ConnectionLimits::new(inherited), &shared) => {
                        if let Err(error) = result {
                            tracing::error!("the control socket accepts no connections: {}", explained(error));
                        }
                    }
                }
            });
        })?;
        Ok(connections)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Not if another process has replaced it.
        if self.folder.look(&self.name).is_ok_and(|found| found.st_ino == self.inode) {
            let _ = self.folder.remove(&self.name);
        }
    }
}

/// Gives the file of a socket that this process has just bound its mode and owner, and no other
/// file, should one be there by now.
fn hand_over(folder: &Directory, name: &OsStr, access: &Access) -> io::Result<()> {
    let file = folder.open_file(name, OFlag::O_PATH, 0)?;
    let found = fstat(&file)?;
    if kind(&found) != SFlag::S_IFSOCK || found.st_uid != geteuid().as_raw() {
        return Err(io::Error::other("another file has replaced the socket"));
    }
    set_mode(&file, access.mode)?;
    fchownat(&file, "", Some(access.owner), access.group, AtFlags::AT_EMPTY_PATH)?;
    Ok(())
}

/// Accepts connections for ever.
async fn accept_all(
    listener: OwnedFd,
    access: &Access,
    limits: ConnectionLimits,
    shared: &Shared,
) -> io::Result<()> {
    let counters = &shared.counters;
    let listener = sys::watched(listener, Interest::READABLE)?;
    let mut admission = Admission::new(limits);
    let mut told = None;
    loop {
        let accepted = listener.async_io(Interest::READABLE, |listener| {
            let socket = sys::accept(listener)?;
            let peer = peer_of(&socket)?;
            Ok((socket, peer))
        });
        let (socket, peer) = match accepted.await {
            Ok(accepted) => accepted,
            Err(error) => {
                // No descriptors left, most likely: others will be closed.
                if told.is_none_or(|told: Instant| told.elapsed() >= Duration::from_secs(60)) {
                    told = Some(Instant::now());
                    tracing::warn!("the control socket cannot accept a connection: {}", explained(error));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        count(&counters.connections);
        // Whoever it is hears of it or sees the end.
        let refuse = |code, message| protocol::send(&socket, &Reply::Refused(Refusal { code, message }), &[]);
        let Some(standing) = access.admits(&socket, &peer).unwrap_or(None) else {
            count(&counters.forbidden);
            tracing::debug!(uid = peer.uid(), pid = peer.pid(), "may not use the control socket");
            let message = format!(
                "user id {} may not use this control socket: root and the workers' user may, and whom allow_users and \
                 allow_groups in [control] of its configuration name",
                peer.uid()
            );
            let _ = refuse(RefusalCode::Forbidden, message);
            continue;
        };
        match admission.admit(peer.uid(), standing) {
            Ok(permits) => shared.serve(standing, peer, socket, permits),
            Err(message) => {
                count(&counters.too_many);
                let _ = refuse(RefusalCode::Occupied, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ControlAccess, WorkerUser};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_link_in_place_of_the_socket_leads_nowhere() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("folder/x.sock");
        let folder = Directory::open(path.parent().unwrap()).unwrap();
        let mut access =
            Access::find(&ControlAccess::default(), &WorkerUser::find(Some("root")).unwrap()).unwrap();
        (access.mode, access.owner) = (0o666, 4711.into());
        let target = temporary.path().join("target");
        std::fs::write(&target, "root's alone").unwrap();
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o600)).unwrap();
        let before = std::fs::metadata(&target).unwrap();
        // Before the start …
        symlink(&target, &path).unwrap();
        assert!(matches!(Listener::bind(&path, access.clone()), Err(ControlError::NotASocket(_))));
        // … and at the worst time, between bind and what follows.
        assert!(hand_over(&folder, OsStr::new("x.sock"), &access).is_err());
        let after = std::fs::metadata(&target).unwrap();
        assert_eq!((after.mode(), after.uid()), (before.mode(), before.uid()));
    }
}
