//! The inbox of the control thread: events first, then requests, one at a time.
//!
//! A client can send requests without a pause, and each reply may be a whole report. Exits,
//! disconnects and timers must not wait behind them. The number of queued requests is bounded by
//! the number of connections, since a connection reads its next request only after it has sent the
//! reply to the last one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::socket::UnixCredentials;
use tokio::sync::{mpsc, oneshot};
use xfan_shm::protocol::{Reply, Request};

use crate::control::peer::{Connection, ConnectionId};
use crate::group::ProcessId;

/// An event outside the control thread.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A connection was closed.
    Disconnected(ConnectionId),
    /// A process exited.
    Exited(ProcessId),
    /// A lane acknowledged commands.
    Acknowledged,
    /// SIGHUP: all files must be reopened.
    Reopen,
}

/// A request that waits for its reply.
#[derive(Debug)]
pub struct ClientRequest {
    /// The connection that it came through.
    pub connection: Connection,
    /// The credentials of the client.
    pub peer: UnixCredentials,
    /// The request.
    pub request: Request,
    /// Where to send the response.
    pub reply_to: oneshot::Sender<Response>,
}

/// The response to a request: a message and its descriptors.
#[derive(Debug, Default)]
pub struct Response {
    /// The message; `None`: the request has no reply. Several clients may share one.
    pub reply: Option<Arc<Reply>>,
    /// The descriptors to send with it.
    pub fds: Vec<OwnedFd>,
}

impl From<Reply> for Response {
    fn from(reply: Reply) -> Self {
        Response { reply: Some(reply.into()), fds: Vec::new() }
    }
}

/// What the control thread handles next.
#[derive(Debug)]
pub enum Next {
    /// An event.
    Event(Event),
    /// A request.
    Request(ClientRequest),
}

/// Sends events and requests to the inbox.
#[derive(Clone, Debug)]
pub struct InboxSender {
    events: mpsc::UnboundedSender<Event>,
    requests: mpsc::UnboundedSender<ClientRequest>,
}

impl InboxSender {
    /// Sends an event, unless the primary has ended.
    pub fn send_event(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Sends a request. Returns `false` if the primary has ended.
    pub fn send_request(&self, request: ClientRequest) -> bool {
        self.requests.send(request).is_ok()
    }

    /// Waits until the primary has ended.
    pub async fn closed(&self) {
        self.events.closed().await;
    }
}

/// Receives events and requests.
#[derive(Debug)]
pub struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    requests: mpsc::UnboundedReceiver<ClientRequest>,
    /// Keeps both channels open.
    sender: InboxSender,
}

impl Default for Inbox {
    fn default() -> Self {
        let (event_sender, events) = mpsc::unbounded_channel();
        let (request_sender, requests) = mpsc::unbounded_channel();
        Inbox { events, requests, sender: InboxSender { events: event_sender, requests: request_sender } }
    }
}

impl Inbox {
    /// A sender to this inbox.
    pub fn sender(&self) -> InboxSender {
        self.sender.clone()
    }

    /// Receives the next event, or the next request if there is no event. Cancel-safe: if the
    /// future is dropped, nothing is lost.
    pub async fn next(&mut self) -> Next {
        // The runtime polls descriptors and timers only when a task yields. Without this, no task
        // would learn that a process has exited as long as there are requests.
        tokio::task::yield_now().await;
        tokio::select! {
            biased;
            Some(event) = self.events.recv() => Next::Event(event),
            Some(request) = self.requests.recv() => Next::Request(request),
            // Not reached: `sender` keeps both channels open.
            else => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socketpair, sockopt};
    use tokio::io::Interest;

    use super::*;

    const REQUESTS: usize = 500;

    /// An inbox with many requests.
    fn flooded() -> (Inbox, Vec<oneshot::Receiver<Response>>) {
        let inbox = Inbox::default();
        let (a, _b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let peer = getsockopt(&a, sockopt::PeerCredentials).unwrap();
        let ask = |_| {
            let (reply_to, response) = oneshot::channel();
            let request =
                ClientRequest { connection: Connection::of(7), peer, request: Request::Stats, reply_to };
            assert!(inbox.sender().send_request(request));
            response
        };
        let waiting = (0..REQUESTS).map(ask).collect();
        (inbox, waiting)
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn exits_come_before_requests() {
        run(async {
            let (mut inbox, _waiting) = flooded();
            for process in 0..3 {
                inbox.sender().send_event(Event::Exited(ProcessId(process)));
            }
            for process in 0..3 {
                assert!(
                    matches!(inbox.next().await, Next::Event(Event::Exited(ProcessId(dead))) if dead == process)
                );
            }
            for turn in 0..REQUESTS {
                assert!(matches!(inbox.next().await, Next::Request(_)), "{turn}");
                inbox.sender().send_event(Event::Disconnected(turn as u64));
                assert!(
                    matches!(inbox.next().await, Next::Event(Event::Disconnected(id)) if id == turn as u64)
                );
            }
        });
    }

    #[test]
    fn requests_do_not_keep_the_runtime_from_its_descriptors() {
        run(async {
            let (mut inbox, _waiting) = flooded();
            let (reader, writer) = std::io::pipe().unwrap();
            let ended = crate::host::sys::watched(reader.into(), Interest::READABLE).unwrap();
            let sender = inbox.sender();
            tokio::spawn(async move {
                let _ = ended.readable().await;
                sender.send_event(Event::Exited(ProcessId(1)));
            });
            // From now on the task waits for the descriptor.
            assert!(matches!(inbox.next().await, Next::Request(_)));
            nix::unistd::write(writer.as_fd(), b"x").unwrap();
            let mut before = 0;
            while let Next::Request(_) = inbox.next().await {
                before += 1;
            }
            assert!(before <= 2, "{before} requests before the event");
        });
    }
}
