//! The end of a primary: it gives the traffic back to the kernel, then ends the workers, then the
//! lanes, and leaves nothing behind.

use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use xfan_shm::protocol::{Refusal, RefusalCode, Reply, Request};

use crate::control::error::PrimaryError;
use crate::control::inbox::{Inbox, Next, Question};
use crate::control::outcome::Outcome;
use crate::control::primary::Primary;
use crate::group;
use crate::host::sys;
use crate::lane::handle::LaneHandle;

/// How often conditions are looked at while stopping.
const POLL: Duration = Duration::from_millis(5);

/// How long lanes may take to find their RX rings empty, which nothing is put on any more.
const DRAIN: Duration = Duration::from_secs(1);

/// How long a last look at the interface may take.
const LOOK: Duration = Duration::from_millis(200);

/// Signals that arrive while the primary stops. Their sender does not want to wait for the workers.
struct Again {
    signals: Vec<Signal>,
    /// One has come, and the wait at hand was given up for it.
    told: bool,
    /// One has come.
    ever: bool,
}

impl Again {
    fn listen() -> Self {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate()];
        // Where there is no way to listen, everything takes its time.
        Again {
            signals: kinds.into_iter().filter_map(|kind| signal(kind).ok()).collect(),
            told: false,
            ever: false,
        }
    }

    async fn wait(&mut self) {
        let (told, ever) = (&mut self.told, &mut self.ever);
        std::future::poll_fn(|context| {
            if self.signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
                (*told, *ever) = (true, true);
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
    }
}

impl Primary {
    /// Takes everything down.
    pub(super) async fn stop(mut self, result: Result<(), PrimaryError>, inbox: &mut Inbox) -> Outcome {
        let mut again = Again::listen();
        self.tell_those_who_wait();
        self.ports.iter_mut().for_each(|port| port.close(LOOK));
        // No worker is started or joins any more.
        self.apply_to_all(group::Event::Stop);
        // Packets on the RX rings still go to the workers …
        self.lanes.drain();
        self.wait(inbox, &mut again, DRAIN, |primary| primary.lanes.handles.iter().all(LaneHandle::drained))
            .await;
        // If redirected packets are missing, the driver may still be handling them.
        self.wait(inbox, &mut again, DRAIN, Primary::all_arrived).await;
        // … which finish them, or are killed in the end.
        self.apply_to_all(group::Event::Finish);
        self.finish(inbox, &mut again).await;
        again.told = false;
        for child in self.processes.values() {
            tracing::error!(
                pid = child.process.pid(),
                "worker does not end though it was killed: it hangs in the kernel"
            );
        }
        let all_ended = |primary: &mut Primary| primary.look_for_orphans();
        if !self.wait(inbox, &mut again, Duration::from_secs(1), all_ended).await {
            tracing::error!("processes of workers do not end though they were killed");
        }
        let lane_ended = |primary: &mut Primary| primary.lanes.handles.iter().all(LaneHandle::ended);
        self.lanes.handles.iter_mut().for_each(LaneHandle::begin_stop);
        again.told = false;
        self.wait(inbox, &mut again, Duration::from_secs(1), lane_ended).await;
        self.acknowledge();
        let mut imbalances = Vec::new();
        for lane in &mut self.lanes.handles {
            match lane.stop() {
                None => imbalances.push(format!("lane {}: ended by a panic", lane.queue)),
                Some(frames) => {
                    let (audit, tally) = (frames.audit(), frames.tally());
                    if audit.lent > 0 {
                        imbalances.push(format!("lane {}: {} frames not given back", lane.queue, audit.lent));
                    }
                    if audit != tally {
                        imbalances.push(format!(
                            "lane {}: frames are {audit:?}, the ledger has {tally:?}",
                            lane.queue
                        ));
                    }
                }
            }
        }
        if self.commands().any(|command| command.survive)
            && let Some(spawner) = &self.spawner
        {
            spawner.note.remove();
        }
        self.ports.iter_mut().for_each(|port| port.count_now(LOOK));
        let mut report = self.report();
        imbalances.extend(report.imbalances());
        let mut unaccounted = Vec::new();
        let of_interfaces = self.ports.iter().zip(&mut report.ports).filter(|(port, _)| port.port.is_some());
        for (_, port) in of_interfaces {
            for lane in &mut port.lanes {
                lane.unaccounted = lane.missing();
                if lane.unaccounted > 0 {
                    let notice = crate::port::watch::unaccounted(lane.queue, lane.unaccounted).to_string();
                    tracing::error!(interface = port.name, queue = lane.queue.0, "{notice}");
                    unaccounted.push(notice);
                }
            }
        }
        // Block signals: one that arrives from here on stays pending for the next start, if there
        // is one. One that has arrived may not have been delivered yet: wait for it.
        let _ = sys::block_signals(true);
        let _ = tokio::time::timeout(Duration::from_millis(1), again.wait()).await;
        Outcome { error: result.err(), report, imbalances, unaccounted, interrupted: again.ever }
    }

    /// Handles events until the condition holds (`true`), the time is up, or patience is.
    async fn wait(
        &mut self,
        inbox: &mut Inbox,
        again: &mut Again,
        timeout: Duration,
        done: impl Fn(&mut Primary) -> bool,
    ) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            self.acknowledge();
            if done(self) {
                return true;
            }
            if Instant::now() >= deadline || again.told {
                return false;
            }
            self.deal_with_next(inbox, again).await;
        }
    }

    /// Handles events until all groups are over.
    async fn finish(&mut self, inbox: &mut Inbox, again: &mut Again) {
        let mut hurried = false;
        while !self.is_over() {
            if again.told && !std::mem::replace(&mut hurried, true) {
                self.apply_to_all(group::Event::Hurry);
                continue;
            }
            self.lanes.handles.iter().for_each(LaneHandle::wake);
            self.look_at_workers();
            if self.next_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                self.apply_to_all(group::Event::Tick);
            }
            if self.is_over() {
                return;
            }
            self.deal_with_next(inbox, again).await;
        }
    }

    /// Whether all redirected packets of all ports are accounted for.
    fn all_arrived(&mut self) -> bool {
        self.ports.iter().all(|port| port.all_arrived(&mut self.lanes))
    }

    fn is_over(&self) -> bool {
        self.groups.iter().all(|group| group.life.is_over())
    }

    /// Handles the next event, question or signal, and waits for it no longer than [`POLL`].
    async fn deal_with_next(&mut self, inbox: &mut Inbox, again: &mut Again) {
        tokio::select! {
            next = inbox.next() => match next {
                Next::Event(event) => self.handle(event),
                Next::Question(question) => self.answer_while_stopping(question),
            },
            () = again.wait() => {}
            () = tokio::time::sleep(POLL) => {}
        }
    }

    /// Workers and orders are refused, and the rest is as always.
    fn answer_while_stopping(&mut self, question: Question) {
        match question.request {
            Request::Attach(_) | Request::Ready | Request::Workers(_) => {
                let refusal =
                    Refusal { code: RefusalCode::Closing, message: "this primary is stopping".into() };
                let _ = question.answer.send(Reply::Refused(refusal).into());
            }
            _ => {
                self.answer(question);
                // There are no ticks any more.
                self.tell_those_who_wait();
            }
        }
    }
}
