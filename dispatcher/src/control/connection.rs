//! The task of a connection: it passes requests to the control thread, and sends the replies.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixCredentials, setsockopt, socketpair, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use xfan_shm::clock::thread_cpu_time;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{self, MAX_REPLY, MAX_REQUEST, ProtocolError, Refusal, RefusalCode, Reply, Request};

use crate::control::access::Role;
use crate::control::closer::Closer;
use crate::control::inbox::{ClientRequest, Event, InboxSender};
use crate::control::peer::{Connection, ConnectionId};
use crate::host::sys;

/// The most open connections made through one inherited connection. A worker needs one, and may
/// make the next before the primary has noticed that the last is closed.
const MAX_DERIVED: usize = 4;

/// The CPU time from which a message counts as slow. A message takes some microseconds, unless its
/// peer has registered its end of the connection thousands of times with epoll.
const SLOW: Duration = Duration::from_millis(1);
/// The pause after a slow message, as a multiple of its CPU time: such a peer uses at most one
/// percent of the thread.
const SLOW_PAUSES: u32 = 100;
/// The longest pause after a slow message.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Counters of the control socket.
#[derive(Debug, Default)]
pub struct ControlCounters {
    pub(super) connections: AtomicU64,
    pub(super) forbidden: AtomicU64,
    pub(super) too_many: AtomicU64,
    pub(super) malformed: AtomicU64,
}

impl ControlCounters {
    /// The counters for the report. The control thread counts `refused`.
    pub fn report(&self) -> crate::report::Control {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        crate::report::Control {
            connections: get(&self.connections),
            forbidden: get(&self.forbidden),
            too_many: get(&self.too_many),
            malformed: get(&self.malformed),
            refused: 0,
        }
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The primary's handle to a connection that a worker's process inherited. Dropping it closes the
/// connection, and all connections that were made through it.
#[derive(Debug)]
pub struct InheritedConnection {
    /// The number of the connection.
    pub id: ConnectionId,
    _alive: watch::Sender<()>,
}

/// The inherited connection that a connection is or was made through.
#[derive(Clone, Debug)]
struct Origin {
    id: ConnectionId,
    /// One permit for each connection that can still be made through it.
    permits: Arc<Semaphore>,
    /// Closed when the [`InheritedConnection`] is dropped.
    alive: watch::Receiver<()>,
}

impl Origin {
    /// Waits until the [`InheritedConnection`] is dropped.
    async fn dropped(mut self) {
        while self.alive.changed().await.is_ok() {}
    }
}

/// A handle to the thread that serves all connections.
#[derive(Clone, Debug)]
pub struct Connections {
    pub(super) runtime: Handle,
    pub(super) shared: Shared,
}

/// The state that all connections share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    /// The number of the next connection.
    pub next: Arc<AtomicU64>,
    pub counters: Arc<ControlCounters>,
    pub sender: InboxSender,
    pub closer: Arc<Closer>,
}

/// Makes a pair of connected sockets: the primary's end, and the worker's.
///
/// # Errors
/// The errors of socketpair(2): usually no descriptor is left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    // See `Listener::bind`.
    let _ = sys::refuse_descriptors(ours.as_fd());
    Ok((ours, theirs))
}

impl Connections {
    /// A number that no connection has. Those that are accepted from now on have greater ones.
    pub fn next_id(&self) -> ConnectionId {
        self.shared.next_id()
    }

    /// Serves the primary's end of a connection that the worker process `peer` has inherited.
    pub fn hand_over(&self, ours: OwnedFd, peer: UnixCredentials) -> InheritedConnection {
        let (alive, end) = watch::channel(());
        let id = self.shared.next_id();
        let permits = Arc::new(Semaphore::new(MAX_DERIVED));
        let origin = Origin { id, permits, alive: end };
        let connection = self.shared.connection(id, Role::Worker, Some(&origin));
        self.runtime.spawn(run_connection(
            self.shared.clone(),
            connection,
            peer,
            ours,
            Some(origin),
            Vec::new(),
        ));
        InheritedConnection { id, _alive: alive }
    }
}

impl Shared {
    fn next_id(&self) -> ConnectionId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn connection(&self, id: ConnectionId, role: Role, origin: Option<&Origin>) -> Connection {
        Connection::new(id, role, origin.map(|origin| origin.id))
    }

    /// Serves a connection that was accepted on the control socket. It holds `permits` until it is
    /// closed.
    pub fn serve(
        &self,
        role: Role,
        peer: UnixCredentials,
        socket: OwnedFd,
        permits: Vec<OwnedSemaphorePermit>,
    ) {
        let connection = self.connection(self.next_id(), role, None);
        tokio::spawn(run_connection(self.clone(), connection, peer, socket, None, permits));
    }

    /// Makes a connection through the inherited connection `origin`. Returns the peer's end.
    fn connect(
        &self,
        role: Role,
        peer: UnixCredentials,
        origin: Option<&Origin>,
    ) -> Result<OwnedFd, Refusal> {
        let refusal = |code, message: String| Refusal { code, message };
        let origin = origin.ok_or_else(|| {
            let message = "only the connection that a worker inherited makes others: connect to the socket";
            refusal(RefusalCode::Forbidden, message.into())
        })?;
        let permit = origin.permits.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("this worker has {MAX_DERIVED} connections, which is the limit: close some");
            refusal(RefusalCode::Occupied, message)
        })?;
        let (ours, theirs) = pair().map_err(|error| {
            let message = format!("the primary cannot make a connection: {}", explained(error));
            refusal(RefusalCode::Occupied, message)
        })?;
        let connection = self.connection(self.next_id(), role, Some(origin));
        tokio::spawn(run_connection(
            self.clone(),
            connection,
            peer,
            ours,
            Some(origin.clone()),
            vec![permit],
        ));
        Ok(theirs)
    }
}

/// Serves a connection until the peer, the primary or the drop of its origin closes it.
async fn run_connection(
    shared: Shared,
    connection: Connection,
    peer: UnixCredentials,
    socket: OwnedFd,
    origin: Option<Origin>,
    _permits: Vec<OwnedSemaphorePermit>,
) {
    let id = connection.id;
    let end = connection.end.clone();
    let origin_dropped = origin.clone();
    let origin_dropped = async {
        match origin_dropped {
            Some(origin) => origin.dropped().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = end.notified() => {}
        () = origin_dropped => {}
        result = serve_messages(&shared, connection, peer, socket, origin) => {
            if let Err(error) = result {
                tracing::debug!(connection = id, %error, "connection ended");
            }
        }
    }
    shared.sender.send_event(Event::Disconnected(id));
}

/// Handles the requests of one connection until the peer closes it.
async fn serve_messages(
    shared: &Shared,
    connection: Connection,
    peer: UnixCredentials,
    socket: OwnedFd,
    origin: Option<Origin>,
) -> Result<(), ProtocolError> {
    let socket = sys::watched(socket, Interest::READABLE | Interest::WRITABLE)?;
    let mut spent = Duration::ZERO;
    loop {
        if spent >= SLOW {
            tokio::time::sleep((spent * SLOW_PAUSES).min(LONGEST_PAUSE)).await;
        }
        spent = Duration::ZERO;
        let request = loop {
            let mut ready = socket.readable().await?;
            let received = timed(&mut spent, || protocol::receive::<Request>(socket.get_ref(), MAX_REQUEST));
            match received {
                Err(error) if error.would_block() => ready.clear_ready(),
                result => break result.map(|(request, _)| request),
            }
        };
        let (reply, fds) = match request {
            Ok(Request::Connect) => match shared.connect(connection.role, peer, origin.as_ref()) {
                Ok(theirs) => (Reply::Connected.into(), vec![theirs]),
                Err(refusal) => (Reply::Refused(refusal).into(), Vec::new()),
            },
            Ok(request) => {
                let (reply_to, response) = oneshot::channel();
                let connection = connection.clone();
                if !shared.sender.send_request(ClientRequest { connection, peer, request, reply_to }) {
                    return Ok(());
                }
                let response = response.await.unwrap_or_default();
                let Some(reply) = response.reply else { continue };
                (reply, response.fds)
            }
            Err(ProtocolError::Closed) => return Ok(()),
            Err(error) => {
                count(&shared.counters.malformed);
                let refusal = Refusal { code: RefusalCode::Malformed, message: error.to_string() };
                let _ = protocol::send(socket.get_ref(), &Reply::Refused(refusal), &[]);
                return Err(error);
            }
        };
        let sent = send_reply(&socket, &reply, &fds, &mut spent).await;
        shared.closer.close(fds);
        sent?;
        // A refusal ends the connection, except an inherited one: its worker has no other way to
        // connect.
        if matches!(*reply, Reply::Refused(_)) && connection.inherited != Some(connection.id) {
            return Ok(());
        }
    }
}

/// Adds the CPU time of `work` to `spent`.
fn timed<T>(spent: &mut Duration, work: impl FnOnce() -> T) -> T {
    let before = thread_cpu_time();
    let result = work();
    *spent += thread_cpu_time().saturating_sub(before);
    result
}

/// Sends a reply as soon as the socket's buffer has room. Adds the CPU time to `spent`.
async fn send_reply(
    socket: &AsyncFd<OwnedFd>,
    reply: &Reply,
    fds: &[OwnedFd],
    spent: &mut Duration,
) -> Result<(), ProtocolError> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut enlarged = false;
    loop {
        let mut ready = socket.writable().await?;
        match timed(spent, || protocol::send(socket.get_ref(), reply, &fds)) {
            Err(error) if error.would_block() => ready.clear_ready(),
            // A report of many members. The buffer grows to its size and no further, since a peer
            // that never reads fills all of it.
            Err(error) if error.is_too_long() && !enlarged => {
                enlarged = true;
                let bytes = serde_json::to_vec(reply)?.len().min(MAX_REPLY);
                setsockopt(socket.get_ref(), sockopt::SndBufForce, &bytes).map_err(io::Error::from)?;
            }
            result => return result,
        }
    }
}
