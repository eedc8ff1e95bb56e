//! The stop of a primary: it returns the traffic to the kernel, and ends the workers and then the
//! lanes.

use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use xfan_shm::protocol::{Refusal, RefusalCode, Reply, Request};

use crate::control::error::PrimaryError;
use crate::control::inbox::{ClientRequest, Inbox, Next};
use crate::control::outcome::Outcome;
use crate::control::primary::Primary;
use crate::group;
use crate::host::sys;
use crate::lane::handle::LaneHandle;

/// The time between two checks of a condition while the primary stops. Some conditions have no
/// event, such as a lane's empty RX ring.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How long lanes may take to empty their RX rings. The rings get no new packets, so a lane needs
/// milliseconds if it gets CPU time.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the last reading of the interface's counters may take: another process may hold RTNL.
const READ_TIMEOUT: Duration = Duration::from_millis(200);

/// Further stop signals, which arrive while the primary stops. They cut the current wait short.
struct StopSignals {
    signals: Vec<Signal>,
    /// A signal has arrived during the current wait.
    cut_short: bool,
    /// A signal has arrived.
    received: bool,
}

impl StopSignals {
    fn listen() -> Self {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate()];
        // If a signal cannot be listened to, no wait is cut short.
        StopSignals {
            signals: kinds.into_iter().filter_map(|kind| signal(kind).ok()).collect(),
            cut_short: false,
            received: false,
        }
    }

    async fn wait(&mut self) {
        let (cut_short, received) = (&mut self.cut_short, &mut self.received);
        std::future::poll_fn(|context| {
            if self.signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
                (*cut_short, *received) = (true, true);
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
    }
}

impl Primary {
    /// Stops the primary. `result`: why it stops.
    pub(super) async fn stop(mut self, result: Result<(), PrimaryError>, inbox: &mut Inbox) -> Outcome {
        let mut signals = StopSignals::listen();
        self.answer_waiting();
        self.ports.iter_mut().for_each(|port| port.close(READ_TIMEOUT));
        // From now on, no worker is started or joins.
        self.apply_to_all(group::Event::Stop);
        // The lanes dispatch the packets that are left on their RX rings.
        self.lanes.drain();
        self.wait(inbox, &mut signals, DRAIN_TIMEOUT, |primary| {
            primary.lanes.handles.iter().all(LaneHandle::drained)
        })
        .await;
        // If redirected packets are missing, the driver may still be processing them.
        self.wait(inbox, &mut signals, DRAIN_TIMEOUT, Primary::all_arrived).await;
        // The workers finish their packets, and exit or are killed.
        self.apply_to_all(group::Event::Finish);
        self.finish(inbox, &mut signals).await;
        signals.cut_short = false;
        for child in self.processes.values() {
            tracing::error!(
                pid = child.process.pid(),
                "worker did not exit after SIGKILL: it hangs in the kernel"
            );
        }
        let all_ended = |primary: &mut Primary| primary.reap_orphans();
        if !self.wait(inbox, &mut signals, Duration::from_secs(1), all_ended).await {
            tracing::error!("descendants of workers did not exit after SIGKILL");
        }
        let lane_ended = |primary: &mut Primary| primary.lanes.handles.iter().all(LaneHandle::ended);
        self.lanes.handles.iter_mut().for_each(LaneHandle::begin_stop);
        signals.cut_short = false;
        self.wait(inbox, &mut signals, Duration::from_secs(1), lane_ended).await;
        self.run_acknowledged();
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
        self.ports.iter_mut().for_each(|port| port.count_now(READ_TIMEOUT));
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
        // Block signals: one that arrives from now on stays pending for the start in the next mode,
        // if there is one. One that arrived before may not have been delivered yet: wait for it.
        let _ = sys::block_signals(true);
        let _ = tokio::time::timeout(Duration::from_millis(1), signals.wait()).await;
        Outcome { error: result.err(), report, imbalances, unaccounted, interrupted: signals.received }
    }

    /// Handles events until `done` holds, the timeout expires, or a further stop signal arrives.
    /// Returns whether `done` holds.
    async fn wait(
        &mut self,
        inbox: &mut Inbox,
        signals: &mut StopSignals,
        timeout: Duration,
        done: impl Fn(&mut Primary) -> bool,
    ) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            self.run_acknowledged();
            if done(self) {
                return true;
            }
            if Instant::now() >= deadline || signals.cut_short {
                return false;
            }
            self.handle_next(inbox, signals).await;
        }
    }

    /// Handles events until the stop of all groups is complete.
    async fn finish(&mut self, inbox: &mut Inbox, signals: &mut StopSignals) {
        let mut forced = false;
        while !self.is_over() {
            if signals.cut_short && !std::mem::replace(&mut forced, true) {
                self.apply_to_all(group::Event::ForceStop);
                continue;
            }
            self.lanes.handles.iter().for_each(LaneHandle::wake);
            self.check_workers();
            if self.next_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
                self.apply_to_all(group::Event::Tick);
            }
            if self.is_over() {
                return;
            }
            self.handle_next(inbox, signals).await;
        }
    }

    /// Whether all redirected packets of all ports are accounted for.
    fn all_arrived(&mut self) -> bool {
        self.ports.iter().all(|port| port.all_arrived(&mut self.lanes))
    }

    fn is_over(&self) -> bool {
        self.groups.iter().all(|group| group.machine.is_over())
    }

    /// Handles the next event, request or signal. Waits for it no longer than [`POLL_INTERVAL`].
    async fn handle_next(&mut self, inbox: &mut Inbox, signals: &mut StopSignals) {
        tokio::select! {
            next = inbox.next() => match next {
                Next::Event(event) => self.handle(event),
                Next::Request(request) => self.handle_request_while_stopping(request),
            },
            () = signals.wait() => {}
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }

    /// Refuses workers and orders. Handles all other requests as usual.
    fn handle_request_while_stopping(&mut self, request: ClientRequest) {
        match request.request {
            Request::Attach(_) | Request::Ready | Request::Workers(_) => {
                let refusal =
                    Refusal { code: RefusalCode::Closing, message: "this primary is stopping".into() };
                let _ = request.reply_to.send(Reply::Refused(refusal).into());
            }
            _ => {
                self.handle_request(request);
                // No tick answers them any more.
                self.answer_waiting();
            }
        }
    }
}
