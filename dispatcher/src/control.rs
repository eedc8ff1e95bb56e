//! The control socket: who connects, what they say, when they hang up.
//!
//! A connection is a task that only moves messages. What they mean is decided in one place, the primary, which
//! gets them as [`Event`]s.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, accept4, bind, connect, getsockopt, listen,
    setsockopt, socket, sockopt,
};
use nix::unistd::Uid;
use tokio::io::Interest;
use tokio::sync::{Semaphore, mpsc, oneshot};
use xfan_shm::protocol::{self, MAX_REPLY, MAX_REQUEST, ProtocolError, Refusal, RefusalCode, Reply, Request};

use crate::sys;

/// Connections at a time: each member's, and as many tools.
const MAX_CONNECTIONS: usize = 256;

/// Number of a connection, never used again.
pub type ConnectionId = u64;

/// What the primary has to deal with.
#[derive(Debug)]
pub enum Event {
    /// A message arrived.
    Request {
        /// From where.
        connection: ConnectionId,
        /// From whom.
        peer: UnixCredentials,
        /// What they want.
        request: Request,
        /// Where the answer goes.
        answer: oneshot::Sender<Answer>,
    },
    /// A connection ended.
    HangUp(ConnectionId),
    /// The process of the member in this place ended.
    Exited(usize),
}

/// An answer, and the descriptors that go with it. `None`: nothing to say.
#[derive(Debug, Default)]
pub struct Answer {
    /// The message.
    pub reply: Option<Reply>,
    /// Descriptors.
    pub fds: Vec<OwnedFd>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Answer { reply: Some(reply), fds: Vec::new() }
    }
}

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Somebody listens there.
    #[error("another primary answers on {0}: stop it, or choose another control socket with --socket")]
    Occupied(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: remove it, or choose another control socket with --socket")]
    NotASocket(PathBuf),
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
    inode: u64,
}

fn seqpacket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, flags | SockFlag::SOCK_CLOEXEC, None)
}

impl Listener {
    /// Listens on `path`, for `user` and root. The socket of a primary that was killed is replaced.
    ///
    /// # Errors
    /// [`ControlError`]
    pub fn bind(path: &Path, user: Uid) -> Result<Self, ControlError> {
        let fail = |source: io::Error| ControlError::Io { path: path.to_owned(), source };
        if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
            std::fs::create_dir(parent).map_err(fail)?;
        }
        let address = UnixAddr::new(path).map_err(|errno| fail(errno.into()))?;
        if let Ok(found) = std::fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                return Err(ControlError::NotASocket(path.to_owned()));
            }
            let probe = seqpacket(SockFlag::SOCK_NONBLOCK).map_err(|errno| fail(errno.into()))?;
            match connect(probe.as_raw_fd(), &address) {
                Err(nix::errno::Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(fail)?,
                Err(nix::errno::Errno::ENOENT) => {}
                _ => return Err(ControlError::Occupied(path.to_owned())),
            }
        }
        let listening = || -> io::Result<Self> {
            let fd = seqpacket(SockFlag::SOCK_NONBLOCK)?;
            bind(fd.as_raw_fd(), &address)?;
            // To connect is to write: until the mode is set, the umask keeps others out.
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            std::os::unix::fs::chown(path, Some(user.as_raw()), None)?;
            listen(&fd, Backlog::MAXCONN)?;
            let inode = std::fs::symlink_metadata(path)?.ino();
            Ok(Listener { fd, path: path.to_owned(), inode })
        };
        listening().map_err(fail)
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts connections and reports what happens on them, until the receiver of events is gone.
    ///
    /// # Errors
    /// If the runtime cannot watch the socket.
    pub fn serve(&self, events: mpsc::UnboundedSender<Event>) -> io::Result<tokio::task::JoinHandle<()>> {
        let fd = sys::watched(self.fd.try_clone()?, Interest::READABLE)?;
        Ok(tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
            let mut next = 0;
            loop {
                let Ok(place) = places.clone().acquire_owned().await else { return };
                let Ok(accepted) = fd.async_io(Interest::READABLE, |fd| accept(fd)).await else {
                    // No descriptors left, most likely: others will be closed.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                next += 1;
                let (connection, events) = (next, events.clone());
                tokio::spawn(async move {
                    if let Err(error) = converse(connection, accepted, &events).await {
                        tracing::debug!(connection, %error, "connection ended");
                    }
                    let _ = events.send(Event::HangUp(connection));
                    drop(place);
                });
            }
        }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Not if somebody has put another in its place.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: the kernel has just made it, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Carries one connection's messages until it ends.
async fn converse(
    connection: ConnectionId,
    socket: OwnedFd,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<(), ProtocolError> {
    let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
    // A report is one message, and must fit the send buffer.
    let _ = setsockopt(&socket, sockopt::SndBufForce, &MAX_REPLY);
    let socket = sys::watched(socket, Interest::READABLE | Interest::WRITABLE)?;
    loop {
        let request = loop {
            let mut ready = socket.readable().await?;
            match protocol::receive::<Request>(socket.get_ref(), MAX_REQUEST) {
                Err(error) if error.would_block() => ready.clear_ready(),
                result => break result.map(|(request, _)| request),
            }
        };
        let answer = match request {
            Ok(request) => {
                let (answer, answered) = oneshot::channel();
                if events.send(Event::Request { connection, peer, request, answer }).is_err() {
                    return Ok(());
                }
                answered.await.unwrap_or_default()
            }
            Err(ProtocolError::Closed) => return Ok(()),
            Err(error) => {
                let refusal = Refusal { code: RefusalCode::Malformed, message: error.to_string() };
                let _ = protocol::send(socket.get_ref(), &Reply::Refused(refusal), &[]);
                return Err(error);
            }
        };
        let Some(reply) = answer.reply else { continue };
        let fds: Vec<_> = answer.fds.iter().map(AsFd::as_fd).collect();
        loop {
            let mut ready = socket.writable().await?;
            match protocol::send(socket.get_ref(), &reply, &fds) {
                Err(error) if error.would_block() => ready.clear_ready(),
                result => break result?,
            }
        }
        if matches!(reply, Reply::Refused(_)) {
            return Ok(());
        }
    }
}

/// Asks the primary on `path` for its report, as a tool does.
///
/// # Errors
/// [`ProtocolError`]; [`io::ErrorKind::NotFound`] or [`io::ErrorKind::ConnectionRefused`] if there is no primary.
pub fn ask_for_report(path: &Path) -> Result<crate::report::Report, ProtocolError> {
    let socket = seqpacket(SockFlag::empty())?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    protocol::send(&socket, &Request::Stats, &[])?;
    match protocol::receive::<Reply>(&socket, MAX_REPLY)?.0 {
        Reply::Stats(report) => Ok(serde_json::from_value(report)?),
        Reply::Refused(refusal) => Err(io::Error::other(refusal.message).into()),
        Reply::Attached(_) => Err(io::Error::other("the primary answered something else").into()),
    }
}
