//! The end of a primary: traffic back to the kernel first, then the workers, then the lanes; nothing is left.

use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use xfan_shm::protocol::{Refusal, RefusalCode, Reply, Request};

use super::{Primary, PrimaryError};
use crate::control::inbox::{Event, Inbox, Next, Question};
use crate::group::life::{Change, State};
use crate::host::sys;
use crate::lane::Command;
use crate::lane::handle::LaneHandle;
use crate::process::spawn::{Ending, Process};
use crate::report::Report;

/// How often conditions are looked at while stopping.
const POLL: Duration = Duration::from_millis(5);

/// How long lanes may take to find their RX rings empty, which nothing is put on any more.
const DRAIN: Duration = Duration::from_secs(1);

/// How long a last look at the interface may take.
const LOOK: Duration = Duration::from_millis(200);

/// How a primary ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why, unless it was asked to.
    pub error: Option<PrimaryError>,
    /// The last report.
    pub report: Report,
    /// What did not add up; nothing, unless there is a bug.
    pub imbalances: Vec<String>,
    /// A signal arrived while the primary stopped: it must not be started again.
    pub interrupted: bool,
    /// One sentence for each lane with redirected packets that did not arrive and are in no
    /// counter.
    pub unaccounted: Vec<String>,
}

/// Signals that come while the primary is stopping: whoever sends one does not want to wait for the workers.
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
        // Nobody is started again.
        for member in &mut self.members {
            (member.leaving, member.overdue) = (None, None);
            // Nor joins; whoever was about to sees the end of the connection.
            member.end_joining();
        }
        self.tell_those_who_wait();
        // Before the program is detached, since that resets the counters of some drivers.
        if let Some(watch) = &mut self.watch {
            watch.count_now(LOOK);
        }
        if let Some(port) = &mut self.port {
            port.close();
        }
        // What waits for workers that will not come goes to those that are there.
        self.care.hold = None;
        for place in 0..self.members.len() {
            self.release(place);
        }
        // What is on the RX rings still goes to the workers …
        for lane in &mut self.lanes {
            lane.command(Command::Drain);
        }
        self.wait(inbox, &mut again, DRAIN, |primary| primary.lanes.iter().all(LaneHandle::drained)).await;
        // If redirected packets are missing, the driver may still be handling them.
        self.wait(inbox, &mut again, DRAIN, Primary::all_arrived).await;
        // … who are told that it is the last, and may finish it …
        for place in 0..self.members.len() {
            if self.members[place].state().takes_packets() {
                self.change(place, Change::Drain, "the primary stops");
                self.members[place].close();
            }
        }
        let timeout = self.stop_timeout;
        self.wait(inbox, &mut again, timeout, |primary| {
            primary.lanes.iter().for_each(LaneHandle::wake);
            primary.members.iter().all(|member| member.session.is_none() || member.backlog() == 0)
        })
        .await;
        // … before they have to go.
        for process in self.members.iter().filter_map(|member| member.process.as_ref()) {
            process.signal(nix::sys::signal::Signal::SIGTERM);
        }
        let gone = |primary: &mut Primary| primary.members.iter().all(|member| member.process.is_none());
        if !self.wait(inbox, &mut again, timeout, gone).await {
            for member in &mut self.members {
                if let Some(process) = &mut member.process {
                    if again.told {
                        tracing::warn!(member = member.id, "killed, as the primary was told to stop again");
                    } else {
                        tracing::warn!(
                            member = member.id,
                            "did not end within {timeout:?} of SIGTERM: killed"
                        );
                    }
                    process.kill();
                }
            }
            again.told = false;
            self.wait(inbox, &mut again, Duration::from_secs(1), gone).await;
        }
        self.unwanted.0.clear();
        let all_ended = |primary: &mut Primary| primary.look_for_orphans();
        if !self.wait(inbox, &mut again, Duration::from_secs(1), all_ended).await {
            tracing::error!("processes that workers started do not end though they were killed");
        }
        // Attached workers are nobody's children: they see the end of the connection.
        for place in 0..self.members.len() {
            let draining = self.members[place].state() == State::Draining;
            self.leave(place, draining.then_some(Change::Leave), "the primary stops");
        }
        let mut imbalances = Vec::new();
        for lane in &mut self.lanes {
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
        if let Some(spawner) = self.spawner.as_ref().filter(|spawner| spawner.command.survive) {
            spawner.note.remove();
        }
        if let Some(watch) = &mut self.watch {
            watch.count_now(LOOK);
        }
        let mut report = self.report();
        imbalances.extend(report.imbalances());
        let mut unaccounted = Vec::new();
        if self.port.is_some() {
            for lane in report.ports.iter_mut().flat_map(|port| &mut port.lanes) {
                lane.unaccounted = lane.missing();
                if lane.unaccounted > 0 {
                    let notice = crate::port::watch::unaccounted(lane.queue, lane.unaccounted).to_string();
                    tracing::error!(interface = self.name, queue = lane.queue.0, "{notice}");
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

    /// Deals with events until the condition holds (`true`), the time is up, or patience is.
    async fn wait(
        &mut self,
        inbox: &mut Inbox,
        again: &mut Again,
        timeout: Duration,
        done: impl Fn(&mut Primary) -> bool,
    ) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            if done(self) {
                return true;
            }
            if Instant::now() >= deadline || again.told {
                return false;
            }
            tokio::select! {
                next = inbox.next() => match next {
                    Next::Event(event) => self.handle_while_stopping(event),
                    Next::Question(question) => self.answer_while_stopping(question),
                },
                () = again.wait() => {}
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }

    fn handle_while_stopping(&mut self, event: Event) {
        match event {
            Event::Exited(place) => {
                let member = &mut self.members[place];
                if let Some(status) = member.process.as_mut().and_then(Process::ended) {
                    member.process = None;
                    // How one ended that an earlier primary started, nobody knows: as it was told, it seems.
                    let told = matches!(member.state(), State::Draining | State::Stopped);
                    let left = status.success() || status == Ending::Unknown && told;
                    let change = if left { Change::Leave } else { Change::Die };
                    if !left {
                        tracing::warn!(member = member.id, how = %status, "its process ended");
                    }
                    self.leave(place, Some(change), &status.to_string());
                }
            }
            Event::Restart(_) | Event::StartTimeout(..) => {}
            event => {
                // Errors end nothing that is ending already.
                let _ = self.handle(event);
            }
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
                let _ = self.answer(question);
                // There are no ticks any more.
                self.tell_those_who_wait();
            }
        }
    }
}
