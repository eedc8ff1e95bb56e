//! What the primary has to deal with: events first, then questions, one at a time.
//!
//! A peer can ask as often as it likes, and the answer may be a whole report. Deaths, hang-ups and
//! timers do not wait behind questions: those of which there are only as many as there are
//! connections, since each waits for its answer before it asks again.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::socket::UnixCredentials;
use tokio::sync::{mpsc, oneshot};
use xfan_shm::protocol::{Reply, Request};

use crate::control::peer::{Connection, ConnectionId};
use crate::group::ProcessId;

/// Something happened.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A connection ended.
    HangUp(ConnectionId),
    /// A process ended.
    Exited(ProcessId),
    /// A lane has obeyed commands.
    Obeyed,
    /// Files are to be opened anew.
    Reopen,
}

/// A message arrived.
#[derive(Debug)]
pub struct Question {
    /// From where.
    pub connection: Connection,
    /// From whom.
    pub peer: UnixCredentials,
    /// What they want.
    pub request: Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Answer>,
}

/// An answer, and the descriptors that go with it. `None`: nothing to say.
#[derive(Debug, Default)]
pub struct Answer {
    /// The message; several may be told the same.
    pub reply: Option<Arc<Reply>>,
    /// Descriptors.
    pub fds: Vec<OwnedFd>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Answer { reply: Some(reply.into()), fds: Vec::new() }
    }
}

/// What is to be dealt with next.
#[derive(Debug)]
pub enum Next {
    /// Something happened.
    Event(Event),
    /// Somebody waits for an answer.
    Question(Question),
}

/// Where events and questions go.
#[derive(Clone, Debug)]
pub struct Outbox {
    events: mpsc::UnboundedSender<Event>,
    questions: mpsc::UnboundedSender<Question>,
}

impl Outbox {
    /// Tells the primary, if it still is there.
    pub fn event(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Asks the primary; `false` if it is gone.
    pub fn question(&self, question: Question) -> bool {
        self.questions.send(question).is_ok()
    }

    /// Waits until the primary is gone.
    pub async fn closed(&self) {
        self.events.closed().await;
    }
}

/// Where they come from.
#[derive(Debug)]
pub struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    questions: mpsc::UnboundedReceiver<Question>,
    outbox: Outbox,
}

impl Default for Inbox {
    fn default() -> Self {
        let (to_events, events) = mpsc::unbounded_channel();
        let (to_questions, questions) = mpsc::unbounded_channel();
        Inbox { events, questions, outbox: Outbox { events: to_events, questions: to_questions } }
    }
}

impl Inbox {
    /// What leads here.
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }

    /// What is to be dealt with next: events before questions. Nothing is lost if this is dropped
    /// before it is done.
    pub async fn next(&mut self) -> Next {
        // The runtime looks at descriptors and timers only when nobody is busy: without this pause,
        // as long as there is something to do, no task would learn that a process has ended.
        tokio::task::yield_now().await;
        tokio::select! {
            biased;
            Some(event) = self.events.recv() => Next::Event(event),
            Some(question) = self.questions.recv() => Next::Question(question),
            // Both have a sender here.
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

    const QUESTIONS: usize = 500;

    /// An inbox with questions in it.
    fn flooded() -> (Inbox, Vec<oneshot::Receiver<Answer>>) {
        let inbox = Inbox::default();
        let (a, _b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let peer = getsockopt(&a, sockopt::PeerCredentials).unwrap();
        let ask = |_| {
            let (answer, answered) = oneshot::channel();
            let question = Question { connection: Connection::of(7), peer, request: Request::Stats, answer };
            assert!(inbox.outbox().question(question));
            answered
        };
        let waiting = (0..QUESTIONS).map(ask).collect();
        (inbox, waiting)
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn a_death_comes_before_all_questions() {
        run(async {
            let (mut inbox, _waiting) = flooded();
            for process in 0..3 {
                inbox.outbox().event(Event::Exited(ProcessId(process)));
            }
            for process in 0..3 {
                assert!(
                    matches!(inbox.next().await, Next::Event(Event::Exited(ProcessId(dead))) if dead == process)
                );
            }
            for turn in 0..QUESTIONS {
                assert!(matches!(inbox.next().await, Next::Question(_)), "{turn}");
                inbox.outbox().event(Event::HangUp(turn as u64));
                assert!(matches!(inbox.next().await, Next::Event(Event::HangUp(id)) if id == turn as u64));
            }
        });
    }

    #[test]
    fn questions_do_not_keep_the_runtime_from_its_descriptors() {
        run(async {
            let (mut inbox, _waiting) = flooded();
            let (reader, writer) = std::io::pipe().unwrap();
            let ended = crate::host::sys::watched(reader.into(), Interest::READABLE).unwrap();
            let outbox = inbox.outbox();
            tokio::spawn(async move {
                let _ = ended.readable().await;
                outbox.event(Event::Exited(ProcessId(1)));
            });
            // The task waits.
            assert!(matches!(inbox.next().await, Next::Question(_)));
            nix::unistd::write(writer.as_fd(), b"x").unwrap();
            let mut before = 0;
            while let Next::Question(_) = inbox.next().await {
                before += 1;
            }
            assert!(before <= 2, "{before} questions before the event");
        });
    }
}
