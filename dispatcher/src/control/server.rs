//! The control socket and the thread that serves its connections.
//!
//! Each connection is a task on that thread. It only passes messages on: the control thread gets
//! requests through its [inbox](crate::control::inbox) and handles them. So a peer that makes its
//! connection slow does not delay the control thread.

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
use crate::control::inbox::InboxSender;
use crate::host::directory::{Directory, DirectoryError, kind, set_mode};
use crate::host::privileges::{OF_SOCKET, drop_capabilities_but};
use crate::host::sys;

/// Why the control socket cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another primary listens on the socket.
    #[error("another primary answers on {0}: stop it, or choose another control socket with --socket")]
    Occupied(PathBuf),
    /// The path exists and is not a socket.
    #[error("{0} exists and is no socket: remove it, or choose another control socket with --socket")]
    NotASocket(PathBuf),
    /// Its directory is not trustworthy, or cannot be opened.
    #[error("no control socket: {0}")]
    Directory(#[from] DirectoryError),
    /// Any other error.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// The system's error.
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
    /// Listens on `path`. Replaces the socket of a primary that was killed.
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
            // Before Linux 6.16 this fails, and a peer can block the thread of all connections by
            // sending a descriptor whose close blocks.
            let _ = sys::refuse_descriptors(fd.as_fd());
            // bind(2) makes the file with this mode, reduced by the umask.
            fchmod(&fd, Mode::from_bits_truncate(access.mode))?;
            bind(fd.as_raw_fd(), &address)?;
            let inode = folder.look(name)?.st_ino;
            // From here on, an error drops the listener, which removes the file.
            let (path, name, counters) = (path.to_owned(), name.to_owned(), Arc::default());
            let listener = Listener { fd, path, folder, name, inode, access, counters };
            // No process can connect before listen(2).
            set_permissions(&listener.folder, &listener.name, &listener.access)?;
            listen(&listener.fd, Backlog::MAXCONN)?;
            Ok(listener)
        };
        listening().map_err(fail)
    }

    /// The directory of the socket, and its name there.
    pub fn file(&self) -> (&Directory, &OsStr) {
        (&self.folder, &self.name)
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The counters of the socket.
    pub fn counters(&self) -> Arc<ControlCounters> {
        self.counters.clone()
    }

    /// Starts the thread that accepts and serves connections until the inbox is dropped.
    /// `inherited`: all workers inherit their connections.
    ///
    /// # Errors
    /// The thread or its runtime cannot be made.
    pub fn serve(&self, sender: InboxSender, inherited: bool) -> io::Result<Connections> {
        let fd = self.fd.try_clone()?;
        let access = self.access.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (counters, closer) = (self.counters.clone(), Arc::default());
        let shared = Shared { next: Arc::default(), counters, sender, closer };
        let connections = Connections { runtime: runtime.handle().clone(), shared: shared.clone() };
        std::thread::Builder::new().name("control".into()).spawn(move || {
            drop_capabilities_but(OF_SOCKET);
            runtime.block_on(async {
                tokio::select! {
                    () = shared.sender.closed() => {}
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
        // Another process may have replaced the file.
        if self.folder.look(&self.name).is_ok_and(|found| found.st_ino == self.inode) {
            let _ = self.folder.remove(&self.name);
        }
    }
}

/// Sets the mode and the owner of the socket's file. Fails if another file has replaced it since
/// bind(2).
fn set_permissions(folder: &Directory, name: &OsStr, access: &Access) -> io::Result<()> {
    let file = folder.open_file(name, OFlag::O_PATH, 0)?;
    let found = fstat(&file)?;
    if kind(&found) != SFlag::S_IFSOCK || found.st_uid != geteuid().as_raw() {
        return Err(io::Error::other("another file has replaced the socket"));
    }
    set_mode(&file, access.mode)?;
    fchownat(&file, "", Some(access.owner), access.group, AtFlags::AT_EMPTY_PATH)?;
    Ok(())
}

/// Accepts connections until the task is dropped.
async fn accept_all(
    listener: OwnedFd,
    access: &Access,
    limits: ConnectionLimits,
    shared: &Shared,
) -> io::Result<()> {
    let counters = &shared.counters;
    let listener = sys::watched(listener, Interest::READABLE)?;
    let mut admission = Admission::new(limits);
    let mut last_warning = None;
    loop {
        let accepted = listener.async_io(Interest::READABLE, |listener| {
            let socket = sys::accept(listener)?;
            let peer = peer_of(&socket)?;
            Ok((socket, peer))
        });
        let (socket, peer) = match accepted.await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Usually no descriptor is left, until another connection is closed.
                if last_warning.is_none_or(|last: Instant| last.elapsed() >= Duration::from_secs(60)) {
                    last_warning = Some(Instant::now());
                    tracing::warn!("the control socket cannot accept a connection: {}", explained(error));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        count(&counters.connections);
        // If this fails, the peer only sees that the connection is closed.
        let refuse = |code, message| protocol::send(&socket, &Reply::Refused(Refusal { code, message }), &[]);
        let Some(role) = access.role_of(&socket, &peer).unwrap_or(None) else {
            count(&counters.forbidden);
            tracing::debug!(
                uid = peer.uid(),
                pid = peer.pid(),
                "connection refused: the user has no access to the control socket"
            );
            let message = format!(
                "user id {} may not use this control socket: only root, the workers' user, and the users in allow_users and \
                 allow_groups in [control] of its configuration may",
                peer.uid()
            );
            let _ = refuse(RefusalCode::Forbidden, message);
            continue;
        };
        match admission.admit(peer.uid(), role) {
            Ok(permits) => shared.serve(role, peer, socket, permits),
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
        // The link exists before the start.
        symlink(&target, &path).unwrap();
        assert!(matches!(Listener::bind(&path, access.clone()), Err(ControlError::NotASocket(_))));
        // The link replaces the socket between bind(2) and the next step.
        assert!(set_permissions(&folder, OsStr::new("x.sock"), &access).is_err());
        let after = std::fs::metadata(&target).unwrap();
        assert_eq!((after.mode(), after.uid()), (before.mode(), before.uid()));
    }
}
