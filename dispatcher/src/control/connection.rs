//! A connection, from its beginning to its end.

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

use crate::control::access::Standing;
use crate::control::closer::Closer;
use crate::control::inbox::{Event, Outbox, Question};
use crate::control::peer::{Connection, ConnectionId};
use crate::host::sys;

/// Connections that can be made through an inherited one at a time.
const THROUGH_A_CHANNEL: usize = 4;

/// The CPU time from which a message is slow: it takes some microseconds, unless its peer has
/// thousands of epoll entries wait for its end of the connection.
const SLOW: Duration = Duration::from_millis(1);
/// The pause after a slow message, as a multiple of its CPU time …
const SLOW_PAUSES: u32 = 100;
/// … and the longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What came over the control socket.
#[derive(Debug, Default)]
pub struct ControlCounters {
    pub(super) connections: AtomicU64,
    pub(super) forbidden: AtomicU64,
    pub(super) too_many: AtomicU64,
    pub(super) malformed: AtomicU64,
}

impl ControlCounters {
    /// As in the report.
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

/// The connection that a worker's process inherits. Dropping it hangs up, and ends all connections
/// that were made through it.
#[derive(Debug)]
pub struct Channel {
    /// Its number.
    pub id: ConnectionId,
    _alive: watch::Sender<()>,
}

/// The inherited connection that a connection is, or was made through.
#[derive(Clone, Debug)]
struct Origin {
    channel: ConnectionId,
    /// Counts down the connections that can still be made through it.
    left: Arc<Semaphore>,
    alive: watch::Receiver<()>,
}

impl Origin {
    /// Waits until the channel is dropped.
    async fn gone(mut self) {
        while self.alive.changed().await.is_ok() {}
    }
}

/// The thread that serves all connections.
#[derive(Clone, Debug)]
pub struct Connections {
    pub(super) runtime: Handle,
    pub(super) shared: Shared,
}

/// What all connections have in common.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub next: Arc<AtomicU64>,
    pub counters: Arc<ControlCounters>,
    pub outbox: Outbox,
    pub closer: Arc<Closer>,
}

/// Two connected sockets: the primary's end, and what a worker is given.
///
/// # Errors
/// No descriptors left, most likely.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    // As for the listener.
    let _ = sys::refuse_descriptors(ours.as_fd());
    Ok((ours, theirs))
}

impl Connections {
    /// Serves the primary's end of a connection that the worker process `peer` has inherited.
    pub fn hand_over(&self, ours: OwnedFd, peer: UnixCredentials) -> Channel {
        let (alive, end) = watch::channel(());
        let id = self.shared.next_id();
        let left = Arc::new(Semaphore::new(THROUGH_A_CHANNEL));
        let origin = Origin { channel: id, left, alive: end };
        let connection = self.shared.connection(id, Standing::Worker, Some(&origin));
        self.runtime.spawn(carry(self.shared.clone(), connection, peer, ours, Some(origin), Vec::new()));
        Channel { id, _alive: alive }
    }
}

impl Shared {
    fn next_id(&self) -> ConnectionId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn connection(&self, id: ConnectionId, standing: Standing, origin: Option<&Origin>) -> Connection {
        Connection::new(id, standing, origin.map(|origin| origin.channel))
    }

    /// Serves a connection that was accepted.
    pub fn serve(
        &self,
        standing: Standing,
        peer: UnixCredentials,
        socket: OwnedFd,
        permits: Vec<OwnedSemaphorePermit>,
    ) {
        let connection = self.connection(self.next_id(), standing, None);
        tokio::spawn(carry(self.clone(), connection, peer, socket, None, permits));
    }

    /// Makes a connection through an inherited one. Returns the peer's end.
    fn connect(
        &self,
        standing: Standing,
        peer: UnixCredentials,
        origin: Option<&Origin>,
    ) -> Result<OwnedFd, Refusal> {
        let refusal = |code, message: String| Refusal { code, message };
        let origin = origin.ok_or_else(|| {
            let message = "only the connection that a worker inherited makes others: connect to the socket";
            refusal(RefusalCode::Forbidden, message.into())
        })?;
        let permit = origin.left.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("this worker has {THROUGH_A_CHANNEL} connections, which is the limit: close some");
            refusal(RefusalCode::Occupied, message)
        })?;
        let (ours, theirs) = pair().map_err(|error| {
            let message = format!("the primary cannot make a connection: {}", explained(error));
            refusal(RefusalCode::Occupied, message)
        })?;
        let connection = self.connection(self.next_id(), standing, Some(origin));
        tokio::spawn(carry(self.clone(), connection, peer, ours, Some(origin.clone()), vec![permit]));
        Ok(theirs)
    }
}

/// A connection from its beginning to its end.
async fn carry(
    shared: Shared,
    connection: Connection,
    peer: UnixCredentials,
    socket: OwnedFd,
    origin: Option<Origin>,
    _permits: Vec<OwnedSemaphorePermit>,
) {
    let id = connection.id;
    let end = connection.end.clone();
    let disowned = origin.clone();
    let disowned = async {
        match disowned {
            Some(origin) => origin.gone().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = end.notified() => {}
        () = disowned => {}
        result = converse(&shared, connection, peer, socket, origin) => {
            if let Err(error) = result {
                tracing::debug!(connection = id, %error, "connection ended");
            }
        }
    }
    shared.outbox.event(Event::HangUp(id));
}

/// Carries one connection's messages until it ends.
async fn converse(
    shared: &Shared,
    connection: Connection,
    peer: UnixCredentials,
    socket: OwnedFd,
    origin: Option<Origin>,
) -> Result<(), ProtocolError> {
    let socket = sys::watched(socket, Interest::READABLE | Interest::WRITABLE)?;
    let mut spent = Duration::ZERO;
    loop {
        // The peer takes at most one percent of the thread.
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
            Ok(Request::Connect) => match shared.connect(connection.standing, peer, origin.as_ref()) {
                Ok(theirs) => (Reply::Connected.into(), vec![theirs]),
                Err(refusal) => (Reply::Refused(refusal).into(), Vec::new()),
            },
            Ok(request) => {
                let (answer, answered) = oneshot::channel();
                let connection = connection.clone();
                if !shared.outbox.question(Question { connection, peer, request, answer }) {
                    return Ok(());
                }
                let answer = answered.await.unwrap_or_default();
                let Some(reply) = answer.reply else { continue };
                (reply, answer.fds)
            }
            Err(ProtocolError::Closed) => return Ok(()),
            Err(error) => {
                count(&shared.counters.malformed);
                let refusal = Refusal { code: RefusalCode::Malformed, message: error.to_string() };
                let _ = protocol::send(socket.get_ref(), &Reply::Refused(refusal), &[]);
                return Err(error);
            }
        };
        let sent = reply_on(&socket, &reply, &fds, &mut spent).await;
        shared.closer.close(fds);
        sent?;
        // An inherited connection is the only one that its worker has: it stays.
        if matches!(*reply, Reply::Refused(_)) && connection.channel != Some(connection.id) {
            return Ok(());
        }
    }
}

/// Adds the CPU time that something takes.
fn timed<T>(spent: &mut Duration, what: impl FnOnce() -> T) -> T {
    let before = thread_cpu_time();
    let result = what();
    *spent += thread_cpu_time().saturating_sub(before);
    result
}

/// Sends a reply, once the socket's buffer takes it. Adds the CPU time of sending.
async fn reply_on(
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
            // A report of many members. The buffer grows to that size and no further: whoever never
            // reads fills all of it.
            Err(error) if error.is_too_long() && !enlarged => {
                enlarged = true;
                let bytes = serde_json::to_vec(reply)?.len().min(MAX_REPLY);
                setsockopt(socket.get_ref(), sockopt::SndBufForce, &bytes).map_err(io::Error::from)?;
            }
            result => return result,
        }
    }
}
