//! The primary's control thread: members, lanes and operators meet here.
//!
//! One thread, one owner of all state: connections, processes and signals become events, and each is dealt with to
//! its end before the next. To a lane it speaks by commands; from a lane it reads counters.

mod answer;
mod attach;
mod confine;
mod error;
mod loss;
mod operator;
mod stop;
mod watching;
mod workers;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use xfan_shm::ids::{GroupId, MemberId};
use xfan_shm::layout::Geometry;
use xfan_shm::protocol::Request;

use crate::config::OnEmpty;
use crate::control::connection::ControlCounters;
use crate::control::inbox::{Answer, Event, Inbox, Next, Outbox};
use crate::control::journal::Journal;
use crate::control::members::Member;
use crate::control::peer::ConnectionId;
use crate::control::rate_limit::RateLimit;
use crate::control::server::Listener;
use crate::group::life::{Change, State};
use crate::group::restart::Starts;
use crate::host::random::random_bytes;
use crate::host::sys;
use crate::lane::handle::LaneHandle;
use crate::lane::{BUCKETS, BucketTable, Command, NOBODY};
use crate::memory::umem::PacketMemory;
use crate::port::Port;
use crate::port::watch::{Arrivals, Watch, has_carrier};
use crate::process::spawn::{Process, WorkerCommand};
use crate::process::survivors::Note;
use crate::report::{self, Report};
use workers::Spawner;

pub use error::PrimaryError;
pub use operator::{Overdue, Purpose};
pub use stop::Outcome;
pub use workers::Care;

/// How often the control thread looks after what sends no event: vanished interfaces, lanes that ended, liars.
const TICK: Duration = Duration::from_millis(50);

/// The group of all workers.
const GROUP: GroupId = GroupId(0);

/// What a primary is made of.
#[derive(Debug)]
pub struct Primary {
    /// Interface name, for the report.
    pub name: String,
    /// The interface; none where packets come from memory.
    pub port: Option<Port>,
    /// Where packets lie.
    pub memory: Arc<PacketMemory>,
    /// Name of the group.
    pub group: String,
    /// Sizes of every worker's segments.
    pub geometry: Geometry,
    /// One for each queue.
    pub lanes: Vec<LaneHandle>,
    /// The group's places.
    pub members: Vec<Member>,
    /// The places that `xfan run` starts with; the others show only once somebody has taken them.
    pub places: usize,
    /// How long workers yield after spinning.
    pub yields: Duration,
    /// How long workers may take to attach.
    pub start_timeout: Duration,
    /// How long workers may take to finish, and to end.
    pub stop_timeout: Duration,
    /// When workers are restarted.
    pub care: Care,
    spawner: Option<Spawner>,
    /// Workers of the primary before that are to end, and until when.
    unwanted: (Vec<Process>, Instant),
    control: Arc<ControlCounters>,
    journal: Journal,
    /// Workers refused.
    refused: u64,
    /// How often refusals and orders are told.
    limit: RateLimit,
    /// For each user but root: how often its workers, which xfan did not start, have attached.
    guests: BTreeMap<u32, Starts>,
    /// What users but root want to know and wait for, and when they were last told something.
    waiting: Vec<(Request, oneshot::Sender<Answer>)>,
    told: Option<Instant>,
    /// Segments could not be locked in memory, and that was told.
    unlocked: bool,
    /// The start is over: all workers had attached.
    open: bool,
    /// Watches the interface; `None` before [`run`](Self::run).
    watch: Option<Watch>,
    /// For each lane, in order: whether redirected packets arrive.
    arrivals: Vec<Arrivals>,
    next_reading: Instant,
    /// They come: there is somebody to take them, or they are to be dropped.
    flowing: bool,
    table: BucketTable,
    started: Instant,
}

impl Primary {
    /// A primary of these parts.
    #[allow(clippy::too_many_arguments)] // each its own thing, used at one place
    pub fn new(
        name: String,
        port: Option<Port>,
        memory: Arc<PacketMemory>,
        group: String,
        geometry: Geometry,
        lanes: Vec<LaneHandle>,
        members: Vec<Member>,
        places: usize,
        yields: Duration,
        timeouts: (Duration, Duration),
        care: Care,
    ) -> Self {
        Primary {
            name,
            port,
            memory,
            group,
            geometry,
            lanes,
            members,
            places,
            yields,
            start_timeout: timeouts.0,
            stop_timeout: timeouts.1,
            care,
            spawner: None,
            unwanted: (Vec::new(), Instant::now()),
            control: Arc::default(),
            journal: Journal::default(),
            refused: 0,
            limit: RateLimit::default(),
            guests: BTreeMap::new(),
            waiting: Vec::new(),
            told: None,
            unlocked: false,
            open: false,
            watch: None,
            arrivals: Vec::new(),
            next_reading: Instant::now(),
            flowing: false,
            table: BucketTable::empty(),
            started: Instant::now(),
        }
    }

    /// Starts the workers, lets packets in once all have attached, and serves until a signal or an error ends it. Everything
    /// is taken down again before this returns.
    ///
    /// # Errors
    /// If the runtime cannot be made; what goes wrong later is part of the outcome.
    pub fn run(self, listener: &Listener, workers: Option<&WorkerCommand>) -> std::io::Result<Outcome> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(self.run_async(listener, workers))
    }

    async fn run_async(
        mut self,
        listener: &Listener,
        workers: Option<&WorkerCommand>,
    ) -> std::io::Result<Outcome> {
        let mut inbox = Inbox::default();
        self.control = listener.counters();
        reopen_on_hangup(inbox.outbox())?;
        let result = self.serve(listener, workers, &mut inbox).await;
        Ok(self.stop(result, &mut inbox).await)
    }

    /// From the start of the workers to the signal that ends it.
    async fn serve(
        &mut self,
        listener: &Listener,
        workers: Option<&WorkerCommand>,
        inbox: &mut Inbox,
    ) -> Result<(), PrimaryError> {
        // A worker that looks for the next primary has inherited its connection from another.
        let inherited = workers.is_some_and(|workers| !workers.survive);
        let connections = listener.serve(inbox.outbox(), inherited)?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        // They were blocked until now.
        sys::block_signals(false)?;
        let note = Note::beside(listener.place());
        note.remove_unfinished();
        if let Some(command) = workers {
            self.spawner = Some(Spawner::new(command, listener.path(), note, inbox.outbox(), connections));
            self.start_workers()?;
        }
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if !self.open && self.members.iter().all(|member| member.state() != State::Starting) {
                self.let_in()?;
                self.give_up_capabilities(listener.path());
                tracing::info!(
                    interface = self.name,
                    mode = self.mode(),
                    lanes = self.lanes.len(),
                    workers = self.places_of(Member::has_flows).len(),
                    socket = %listener.path().display(),
                    "running"
                );
            }
            tokio::select! {
                biased;
                _ = interrupted.recv() => return Ok(()),
                _ = terminated.recv() => return Ok(()),
                _ = ticks.tick() => self.look_after()?,
                next = inbox.next() => match next {
                    Next::Event(event) => self.handle(event)?,
                    Next::Question(question) => self.answer(question)?,
                },
            }
            self.open_or_shut()?;
        }
    }

    /// Lets packets in. With the same key, the same members get the same flows at every start: shares are dealt out
    /// anew here, as those of the start depend on the order in which workers happened to attach.
    fn let_in(&mut self) -> Result<(), PrimaryError> {
        let mut had_carrier = false;
        if let Some(port) = &mut self.port {
            had_carrier = has_carrier(port.interface.index);
            port.attach()?;
        }
        self.begin_watching(had_carrier)?;
        self.lanes.iter_mut().for_each(LaneHandle::packets_come);
        self.table = BucketTable::empty();
        self.steer();
        self.settle();
        self.open = true;
        self.open_or_shut()
    }

    /// Packets come unless nobody takes any and they are to go to the kernel then.
    fn open_or_shut(&mut self) -> Result<(), PrimaryError> {
        let wanted =
            self.open && (self.care.on_empty == OnEmpty::Drop || self.members.iter().any(Member::has_flows));
        if wanted == self.flowing {
            return Ok(());
        }
        if let Some(port) = &self.port {
            if wanted { port.open()? } else { port.shut()? }
        }
        self.flowing = wanted;
        let (event, detail) = if wanted {
            ("running", "packets come")
        } else {
            ("empty", "no worker takes packets: they pass to the kernel")
        };
        tracing::info!("{detail}");
        self.journal.write(None, std::process::id(), event, detail);
        Ok(())
    }

    /// Deals with one event.
    fn handle(&mut self, event: Event) -> Result<(), PrimaryError> {
        match event {
            Event::HangUp(connection) => {
                self.hang_up(connection);
                Ok(())
            }
            Event::Exited(place) => self.process_ended(place),
            Event::Restart(place) => self.restart(place),
            Event::StartTimeout(place, pid) => self.start_timed_out(place, pid),
            Event::Reopen => {
                self.reopen();
                Ok(())
            }
        }
    }

    /// The mode, for logs and reports.
    fn mode(&self) -> String {
        self.port.as_ref().map_or_else(|| "memory".to_owned(), Port::mode)
    }

    /// Looks after what sends no event.
    fn look_after(&mut self) -> Result<(), PrimaryError> {
        if let Some(lane) = self.lanes.iter().find(|lane| lane.ended()) {
            return Err(PrimaryError::LaneEnded(lane.queue));
        }
        self.look_for_interface()?;
        self.look_for_lost_packets();
        self.look_at_interface();
        for place in 0..self.members.len() {
            if self.members[place].take_corrupt() {
                tracing::error!(member = self.members[place].id, "its consumer index made no sense: evicted");
                self.leave(place, Some(Change::Die), "evicted: its consumer index made no sense");
                // It is not let in again.
                let member = &mut self.members[place];
                member.channel = None;
                if let Some(token) = &mut member.token {
                    *token = random_token()?;
                }
                // Its end is an event.
                if let Some(process) = &mut member.process {
                    process.kill();
                }
            }
        }
        let now = Instant::now();
        self.release_due(now);
        self.look_for_joining(now);
        self.tell_suppressed(now);
        self.tell_those_who_wait();
        if self.unwanted.1 <= now {
            // They are killed, if they still are.
            self.unwanted.0.clear();
        }
        self.look_for_hanging(now);
        self.look_for_overdue(now);
        self.look_for_cut(now);
        self.look_for_orphans();
        Ok(())
    }

    /// Reports packets that arrive cut: nothing else shows that a driver cuts them.
    fn look_for_cut(&mut self, now: Instant) {
        for lane in &mut self.lanes {
            let Some(packets) = lane.newly_cut(now) else { continue };
            let detail = format!(
                "queue {}: {packets} packets arrived cut: the driver delivered less than their IP length. \
                 Unless they are cut on the wire, set frame_size = 4096 or bind_mode = \"copy\"",
                lane.queue
            );
            tracing::warn!("{detail}");
            self.journal.write(None, std::process::id(), "cut", detail);
        }
    }

    /// The places of those whom this is true of.
    fn places_of(&self, wanted: impl Fn(&Member) -> bool) -> Vec<MemberId> {
        let places = self.members.iter().enumerate().filter(|(_, member)| wanted(member));
        places.map(|(place, _)| member_of(place)).collect()
    }

    /// Deals the flows out anew to those that are to have some.
    fn deal(&mut self) {
        let held = self.places_of(|member| member.held_until.is_some());
        self.table = self.table.with_members_and_fixed(&self.places_of(Member::has_flows), &held);
    }

    /// Has all lanes use a table of those that run.
    fn steer(&mut self) {
        self.deal();
        for lane in &mut self.lanes {
            lane.command(Command::Steer { group: GROUP, table: Box::new(self.table.clone()) });
        }
    }

    /// Has something happen to the member in this place, and writes it down.
    fn change(&mut self, place: usize, change: Change, detail: impl Into<String>) {
        let member = &mut self.members[place];
        if member.life.make(change, Instant::now()) {
            self.journal.write(Some(&member.id), member.pid(), change.name(), detail);
        }
    }

    /// Waits until the lanes have obeyed all commands: microseconds, or what the scheduler takes to run them.
    fn settle(&self) {
        let given_up = Instant::now() + Duration::from_secs(1);
        while !self.lanes.iter().all(LaneHandle::obeyed) {
            if Instant::now() >= given_up {
                tracing::warn!("a lane has not obeyed within a second: it gets no CPU time");
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// The member whose worker speaks through this connection, joined or not.
    fn place_of(&self, connection: ConnectionId) -> Option<usize> {
        self.members.iter().position(|member| member.connection().is_some_and(|found| found.id == connection))
    }

    /// A worker wants to leave: it gets no new packets, and is told when the last is in its rings.
    fn begin_detach(&mut self, connection: ConnectionId) {
        let Some(place) = self.place_of(connection) else { return };
        if self.members[place].session.is_some() && self.members[place].state().takes_packets() {
            self.change(place, Change::Drain, "as it asked");
            self.steer();
            self.settle();
            self.members[place].close();
        }
    }

    fn hang_up(&mut self, connection: ConnectionId) {
        let Some(place) = self.place_of(connection) else { return };
        if self.members[place].joining.take().is_some() {
            tracing::warn!(member = self.members[place].id, "its worker is gone before it was ready");
            self.has_hung_up(place);
            return;
        }
        let draining = self.members[place].state() == State::Draining;
        let vacant = self.members[place].token.is_none();
        let told = self.members[place].leaving.is_some();
        let change = match (draining, vacant) {
            (false, _) => Some(Change::Die),
            // It has left when its process has ended.
            (true, _) if told => None,
            (true, true) => Some(Change::Vacate),
            (true, false) => Some(Change::Leave),
        };
        self.leave(place, change, if draining { "" } else { "its connection ended" });
        self.has_hung_up(place);
        let member = &self.members[place];
        if draining {
            tracing::info!(member = member.id, "detached");
        } else {
            let (requeued, lost) = (member.requeued(), member.lost());
            tracing::warn!(member = member.id, requeued, lost, "its worker is gone without a word");
        }
    }

    /// The process in this place, if there is one, is to end or to attach anew; but not for ever.
    fn has_hung_up(&mut self, place: usize) {
        let patience = self.stop_timeout;
        let member = &mut self.members[place];
        let too_often = member.attached > 1 && member.starts.too_many(&self.care.restart, Instant::now());
        match &mut member.process {
            Some(process) if too_often => {
                tracing::error!(member = member.id, "attaches again and again: killed");
                self.journal.write(Some(&member.id), process.pid(), "killed", "attaches again and again");
                // Its end is an event. It is not let in again.
                process.kill();
                member.channel = None;
                member.token = random_token().ok().or(member.token.take());
            }
            // It is to end now, or to attach anew.
            Some(_) if member.overdue.is_none() => member.overdue = Some(Overdue::after(patience)),
            _ => {}
        }
    }

    /// What is known of everything.
    pub fn report(&mut self) -> Report {
        let (served, unserved) = self.port.as_ref().map(Port::counters).unwrap_or_default();
        let mut served = served.into_iter();
        let mut lanes: Vec<_> =
            self.lanes.iter_mut().map(|lane| lane.report(served.next().unwrap_or_default())).collect();
        for (lane, arrivals) in lanes.iter_mut().zip(&self.arrivals) {
            lane.unaccounted = arrivals.lost();
        }
        let members = self
            .members
            .iter()
            .enumerate()
            .filter(|(place, member)| *place < self.places || !member.is_untouched())
            .map(|(place, member)| {
                let buckets = self.table.share(member_of(place));
                let output = self.spawner.as_ref().map(|spawner| &spawner.command.output);
                member.report(buckets, output.map_or(0, |output| output.dropped(&member.id)))
            })
            .collect();
        let port = report::Port {
            name: self.name.clone(),
            mode: self.mode(),
            lanes,
            unserved,
            nic: self.watch.as_ref().map(Watch::nic).unwrap_or_default(),
            notices: self.notices(),
        };
        let group = report::Group {
            name: self.group.clone(),
            buckets: BUCKETS,
            lanes: self.lanes.iter().map(|lane| lane.report_of(GROUP, &self.name)).collect(),
            members,
        };
        Report {
            version: report::VERSION,
            pid: std::process::id(),
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            ports: vec![port],
            groups: vec![group],
            confinement: self.spawner.as_ref().map(|spawner| spawner.confinement.clone()).unwrap_or_default(),
            control: report::Control { refused: self.refused, ..self.control.report() },
            log_lines_lost: crate::log::lost(),
        }
    }
}

/// The member in this place; there are never more than a bucket table can name.
fn member_of(place: usize) -> MemberId {
    u8::try_from(place).map_or(NOBODY, MemberId)
}

/// Has every SIGHUP become an event, while the primary starts, runs and stops.
fn reopen_on_hangup(outbox: Outbox) -> std::io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            outbox.event(Event::Reopen);
            // However many come, ten times a second is often enough.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    Ok(())
}

/// 128 random bits, in hexadecimal.
fn random_token() -> std::io::Result<String> {
    let bytes: [u8; 16] = random_bytes()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
