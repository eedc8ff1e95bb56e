//! The control socket: who connects, what they say, when they hang up.
//!
//! A connection is a task that only moves messages, on a thread of its own: what they mean is decided in one place, the
//! primary, which gets them as [`Event`]s, and which goes on whatever a peer makes its connection wait for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, accept4, bind, connect,
    getsockopt, listen, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::Uid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use xfan_shm::protocol::{self, MAX_REPLY, MAX_REQUEST, ProtocolError, Refusal, RefusalCode, Reply, Request};

use crate::sys;

/// Connections at a time: those of the workers' user, and those of root, which no worker can use up.
const MAX_CONNECTIONS: usize = 256;
const MAX_ROOT_CONNECTIONS: usize = 64;

/// How long a tool waits for the primary's answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Number of a connection, never used again.
pub type ConnectionId = u64;

/// A connection, as the primary knows it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its number.
    pub id: ConnectionId,
    end: Arc<Notify>,
}

impl Connection {
    /// Hangs up.
    pub fn end(&self) {
        self.end.notify_one();
    }
}

/// What the primary has to deal with.
#[derive(Debug)]
pub enum Event {
    /// A message arrived.
    Request {
        /// From where.
        connection: Connection,
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
    /// It is time to start the process of the member in this place again.
    Restart(usize),
    /// The process of the member in this place, with this id, was to attach by now.
    StartTimeout(usize, u32),
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
            // Kernels before 6.16 cannot; there a peer can stop the thread of all connections, by a descriptor whose
            // closing blocks.
            let _ = sys::refuse_descriptors(fd.as_fd());
            bind(fd.as_raw_fd(), &address)?;
            let inode = std::fs::symlink_metadata(path)?.ino();
            // From here on, a failure removes the file.
            let listener = Listener { fd, path: path.to_owned(), inode };
            // Nobody can connect before `listen`.
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            std::os::unix::fs::chown(path, Some(user.as_raw()), None)?;
            listen(&listener.fd, Backlog::MAXCONN)?;
            Ok(listener)
        };
        listening().map_err(fail)
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts connections, on a thread of their own, and reports what happens on them, until the receiver of events is
    /// gone.
    ///
    /// # Errors
    /// If the thread cannot be made.
    pub fn serve(&self, events: mpsc::UnboundedSender<Event>) -> io::Result<()> {
        let fd = self.fd.try_clone()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("control".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = events.closed() => {}
                    result = accept_all(fd, &events) => {
                        if let Err(error) = result {
                            tracing::error!(%error, "the control socket accepts no connections");
                        }
                    }
                }
            });
        })?;
        Ok(())
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

/// Accepts connections for ever.
async fn accept_all(listener: OwnedFd, events: &mpsc::UnboundedSender<Event>) -> io::Result<()> {
    let listener = sys::watched(listener, Interest::READABLE)?;
    let roots = Arc::new(Semaphore::new(MAX_ROOT_CONNECTIONS));
    let others = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for id in 0.. {
        let accepted = listener.async_io(Interest::READABLE, |listener| {
            let socket = accept(listener)?;
            let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
            Ok((socket, peer))
        });
        let Ok((socket, peer)) = accepted.await else {
            // No descriptors left, most likely: others will be closed.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (places, limit) =
            if peer.uid() == 0 { (&roots, MAX_ROOT_CONNECTIONS) } else { (&others, MAX_CONNECTIONS) };
        let Ok(place) = places.clone().try_acquire_owned() else {
            let message =
                format!("there are {limit} connections of this kind of user, which is the limit: close some");
            // Whoever it is hears of it or sees the end.
            let _ = protocol::send(
                &socket,
                &Reply::Refused(Refusal { code: RefusalCode::Occupied, message }),
                &[],
            );
            continue;
        };
        let connection = Connection { id, end: Arc::default() };
        tokio::spawn(carry(connection, peer, socket, place, events.clone()));
    }
    Ok(())
}

/// A connection from its beginning to its end.
async fn carry(
    connection: Connection,
    peer: UnixCredentials,
    socket: OwnedFd,
    _place: OwnedSemaphorePermit,
    events: mpsc::UnboundedSender<Event>,
) {
    let id = connection.id;
    let end = connection.end.clone();
    tokio::select! {
        () = end.notified() => {}
        result = converse(connection, peer, socket, &events) => {
            if let Err(error) = result {
                tracing::debug!(connection = id, %error, "connection ended");
            }
        }
    }
    let _ = events.send(Event::HangUp(id));
}

/// Carries one connection's messages until it ends.
async fn converse(
    connection: Connection,
    peer: UnixCredentials,
    socket: OwnedFd,
    events: &mpsc::UnboundedSender<Event>,
) -> Result<(), ProtocolError> {
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
                let connection = connection.clone();
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
        let Some(reply) = &answer.reply else { continue };
        reply_on(&socket, reply, &answer.fds).await?;
        if matches!(reply, Reply::Refused(_)) {
            return Ok(());
        }
    }
}

/// Sends a reply, once there is room for it.
async fn reply_on(socket: &AsyncFd<OwnedFd>, reply: &Reply, fds: &[OwnedFd]) -> Result<(), ProtocolError> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut enlarged = false;
    loop {
        let mut ready = socket.writable().await?;
        match protocol::send(socket.get_ref(), reply, &fds) {
            Err(error) if error.would_block() => ready.clear_ready(),
            // A report of many members. No more room than that: whoever never reads fills all there is.
            Err(error) if error.is_too_long() && !enlarged => {
                enlarged = true;
                let bytes = serde_json::to_vec(reply)?.len().min(MAX_REPLY);
                setsockopt(socket.get_ref(), sockopt::SndBufForce, &bytes).map_err(io::Error::from)?;
            }
            result => return result,
        }
    }
}

/// Asks the primary on `path` for its report, as a tool does.
///
/// # Errors
/// [`ProtocolError`]; [`io::ErrorKind::NotFound`] or [`io::ErrorKind::ConnectionRefused`] if there is no primary.
pub fn ask_for_report(path: &Path) -> Result<crate::report::Report, ProtocolError> {
    let socket = seqpacket(SockFlag::empty())?;
    let patience = TimeVal::seconds(i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    let ask = || {
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        // If it has refused and hung up already, its word is still there to be read.
        let _ = protocol::send(&socket, &Request::Stats, &[]);
        protocol::receive::<Reply>(&socket, MAX_REPLY)
    };
    let (reply, _) = ask().map_err(|error| match error {
        error if error.would_block() => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{} did not answer within {PATIENCE:?}", path.display()),
        )
        .into(),
        error => error,
    })?;
    match reply {
        Reply::Stats(report) => Ok(serde_json::from_value(report)?),
        Reply::Refused(refusal) => Err(io::Error::other(refusal.message).into()),
        Reply::Attached(_) => Err(io::Error::other("the primary answered something else").into()),
    }
}
