//! The primary's control thread: members, lanes and operators meet here.
//!
//! One thread owns all control state. Connections, processes, lanes and signals become events, and
//! the thread deals with one at a time. The [group] decides what happens to members;
//! this thread carries the actions out, and never waits for a lane or a process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use xfan_shm::ids::MemberId;
use xfan_shm::layout::Geometry;
use xfan_shm::protocol::Request;

use crate::config::OnEmpty;
use crate::control::connection::ControlCounters;
use crate::control::error::PrimaryError;
use crate::control::inbox::{self, Answer, Inbox, Next, Outbox};
use crate::control::journal::Journal;
use crate::control::lanes::Lanes;
use crate::control::members::{Member, Session};
use crate::control::peer::ConnectionId;
use crate::control::processes::{Child, Spawner};
use crate::control::rate_limit::RateLimit;
use crate::control::server::Listener;
use crate::control::shutdown::Outcome;
use crate::group::policy::Policy;
use crate::group::{self, Event, Group, ProcessId};
use crate::host::autogroup::Autogroup;
use crate::host::sys;
use crate::lane::handle::LaneHandle;
use crate::memory::umem::PacketMemory;
use crate::port::Port;
use crate::port::watch::{Arrivals, Watch, has_carrier};
use crate::process::spawn::{Ending, WorkerCommand};
use crate::process::survivors::Note;

/// How often the control thread looks after what sends no event: vanished interfaces, lanes that
/// ended, workers that lie or hang.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// What a primary is made of.
#[derive(Debug)]
pub struct Parts {
    /// Interface name, for the report.
    pub name: String,
    /// The interface; none where packets come from memory.
    pub port: Option<Port>,
    /// Where packets lie.
    pub memory: Arc<PacketMemory>,
    /// Sizes of every worker's segments.
    pub geometry: Geometry,
    /// One for each queue.
    pub lanes: Vec<LaneHandle>,
    /// Name of the group.
    pub group: String,
    /// The group's members.
    pub members: Vec<Member>,
    /// The number of members that have a process from the start; the others show only once a worker
    /// has taken them.
    pub places: usize,
    /// How long workers yield after spinning.
    pub yields: Duration,
    /// What decides about members.
    pub policy: Policy,
}

/// A running primary.
#[derive(Debug)]
pub struct Primary {
    pub(super) name: String,
    pub(super) port: Option<Port>,
    pub(super) memory: Arc<PacketMemory>,
    pub(super) geometry: Geometry,
    pub(super) lanes: Lanes,
    /// Name of the group.
    pub(super) group_name: String,
    /// What happens to the members …
    pub(super) group: Group,
    /// … and what they have, by number.
    pub(super) members: Vec<Member>,
    pub(super) places: usize,
    pub(super) yields: Duration,
    pub(super) processes: BTreeMap<ProcessId, Child>,
    /// The session that the action before ended, and its worker's pid.
    pub(super) ended: Option<(u32, Box<Session>)>,
    /// A session to drop once the lanes have obeyed.
    pub(super) dropped: Option<(u32, Box<Session>)>,
    /// Why the group cannot go on.
    pub(super) failure: Option<PrimaryError>,
    /// Why the last process could not be started.
    pub(super) spawn_error: Option<PrimaryError>,
    pub(super) spawner: Option<Spawner>,
    pub(super) outbox: Outbox,
    pub(super) control: Arc<ControlCounters>,
    pub(super) journal: Journal,
    /// Workers refused.
    pub(super) refused: u64,
    /// How often refusals and orders are logged.
    pub(super) limit: RateLimit,
    /// Questions of users but root that have no answer yet, and when some were last answered.
    pub(super) waiting: Vec<(Request, oneshot::Sender<Answer>)>,
    pub(super) told: Option<Instant>,
    /// Segments could not be locked in memory, and the log says so.
    pub(super) unlocked: bool,
    /// The XDP program is attached.
    attached: bool,
    /// The log says that the primary runs.
    announced: bool,
    /// Watches the interface; `None` before [`run`](Self::run).
    pub(super) watch: Option<Watch>,
    /// For each lane, in order: whether redirected packets arrive.
    pub(super) arrivals: Vec<Arrivals>,
    pub(super) next_reading: Instant,
    pub(super) autogroup: Autogroup,
    /// Packets come: a member takes them, or they are to be dropped.
    flowing: bool,
    pub(super) started: Instant,
}

impl Primary {
    /// A primary of these parts, and its inbox.
    fn new(parts: Parts, outbox: Outbox, control: Arc<ControlCounters>) -> Self {
        let now = Instant::now();
        Primary {
            name: parts.name,
            port: parts.port,
            memory: parts.memory,
            geometry: parts.geometry,
            lanes: Lanes::new(parts.lanes),
            group_name: parts.group,
            group: Group::new(parts.policy, parts.members.len(), now),
            members: parts.members,
            places: parts.places,
            yields: parts.yields,
            processes: BTreeMap::new(),
            ended: None,
            dropped: None,
            failure: None,
            spawn_error: None,
            spawner: None,
            outbox,
            control,
            journal: Journal::default(),
            refused: 0,
            limit: RateLimit::default(),
            waiting: Vec::new(),
            told: None,
            unlocked: false,
            attached: false,
            announced: false,
            watch: None,
            arrivals: Vec::new(),
            next_reading: now,
            autogroup: Autogroup::begin(),
            flowing: false,
            started: now,
        }
    }

    /// Starts the workers, lets packets in once all have attached, and serves until a signal or an
    /// error ends it. Everything is taken down again before this returns.
    ///
    /// # Errors
    /// If the runtime cannot be made; what goes wrong later is part of the outcome.
    pub fn run(
        parts: Parts,
        listener: &Listener,
        workers: Option<&WorkerCommand>,
    ) -> std::io::Result<Outcome> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut inbox = Inbox::default();
            let mut primary = Self::new(parts, inbox.outbox(), listener.counters());
            reopen_on_hangup(inbox.outbox())?;
            primary.lanes.watch(&primary.outbox)?;
            let result = primary.serve(listener, workers, &mut inbox).await;
            Ok(primary.stop(result, &mut inbox).await)
        })
    }

    /// Runs from the start of the workers to the signal that ends it.
    async fn serve(
        &mut self,
        listener: &Listener,
        workers: Option<&WorkerCommand>,
        inbox: &mut Inbox,
    ) -> Result<(), PrimaryError> {
        // A worker that survives its primary connects to the socket of the next one.
        let inherited = workers.is_some_and(|workers| !workers.survive);
        let connections = listener.serve(inbox.outbox(), inherited)?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        // They were blocked until now.
        sys::block_signals(false)?;
        let note = Note::beside(listener.place());
        note.remove_unfinished();
        if let Some(command) = workers {
            self.spawner = Some(Spawner::new(command, listener.path(), note, connections));
            self.start_workers()?;
            self.write_note();
        }
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.open(listener)?;
            let deadline = self.group.next_deadline().map(tokio::time::Instant::from_std);
            let deadline = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = interrupted.recv() => return Ok(()),
                _ = terminated.recv() => return Ok(()),
                _ = ticks.tick() => self.look_after()?,
                () = deadline => self.apply(Event::Tick),
                next = inbox.next() => match next {
                    Next::Event(event) => self.handle(event),
                    Next::Question(question) => self.answer(question),
                },
            }
            self.check_failure()?;
            self.open_or_shut()?;
        }
    }

    /// Lets packets in once every process that was started has attached. First the XDP program is
    /// attached, and the lanes get the table; once they use it, packets come.
    fn open(&mut self, listener: &Listener) -> Result<(), PrimaryError> {
        if !self.attached && self.group.has_started() {
            let mut had_carrier = false;
            if let Some(port) = &mut self.port {
                had_carrier = has_carrier(port.interface.index);
                port.attach()?;
            }
            self.begin_watching(had_carrier)?;
            self.lanes.handles.iter_mut().for_each(LaneHandle::packets_come);
            self.attached = true;
            self.apply(Event::Opened);
        }
        if !self.announced && self.group.is_open() {
            self.open_or_shut()?;
            self.give_up_capabilities(listener.path());
            self.announced = true;
            tracing::info!(
                interface = self.name,
                mode = self.mode(),
                lanes = self.lanes.handles.len(),
                workers = self.group.members().iter().filter(|member| member.has_flows()).count(),
                socket = %listener.path().display(),
                "running"
            );
        }
        Ok(())
    }

    /// Packets come unless no member takes any and the settings pass them to the kernel then.
    fn open_or_shut(&mut self) -> Result<(), PrimaryError> {
        let wanted =
            self.group.is_open() && (self.group.policy().on_empty == OnEmpty::Drop || self.group.has_flows());
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
    pub(super) fn handle(&mut self, event: inbox::Event) {
        match event {
            inbox::Event::HangUp(connection) => self.hang_up(connection),
            inbox::Event::Exited(process) => self.process_ended(process),
            inbox::Event::Obeyed => self.acknowledge(),
            inbox::Event::Reopen => self.reopen(),
        }
    }

    fn hang_up(&mut self, connection: ConnectionId) {
        self.apply(Event::HungUp(connection));
        for member in &mut self.members {
            member.joining.take_if(|joining| joining.connection.id == connection);
        }
    }

    fn process_ended(&mut self, process: ProcessId) {
        let Some(child) = self.processes.get_mut(&process) else { return };
        let Some(ending) = child.process.ended() else { return };
        let its = |(_, member): &(MemberId, &group::member::Member)| member.process() == Some(process);
        if let Some((number, _)) = self.group.numbered().find(its) {
            let member = &mut self.members[number.index()];
            member.last_exit = Some(ending.to_string());
            member.trouble = ending.to_string();
        }
        let success = match ending {
            Ending::Unknown => None,
            Ending::Status(status) => Some(status.success()),
        };
        self.apply(Event::Exited(process, success));
    }

    /// The mode, for logs and reports.
    pub(super) fn mode(&self) -> String {
        self.port.as_ref().map_or_else(|| "memory".to_owned(), Port::mode)
    }

    /// Looks after what sends no event.
    fn look_after(&mut self) -> Result<(), PrimaryError> {
        if let Some(lane) = self.lanes.handles.iter().find(|lane| lane.ended()) {
            return Err(PrimaryError::LaneEnded(lane.queue));
        }
        self.look_for_interface()?;
        self.look_for_lost_packets();
        self.look_at_interface();
        self.look_at_autogroup();
        self.acknowledge();
        self.look_at_workers();
        let now = Instant::now();
        self.tell_suppressed(now);
        self.tell_those_who_wait();
        self.look_for_cut(now);
        self.look_for_orphans();
        Ok(())
    }

    /// Tells the group how far each worker has come, and which one lied.
    pub(super) fn look_at_workers(&mut self) {
        for number in (0..u8::MAX).map(MemberId).take(self.members.len()) {
            let member = &mut self.members[number.index()];
            if let Some((lane, error)) = member.session.as_ref().and_then(Session::lie) {
                let queue = self.lanes.handles.get(lane.index()).map(|lane| lane.queue.0);
                member.trouble = match queue {
                    Some(queue) => format!("lane of queue {queue}: {error}"),
                    None => error.to_string(),
                };
                self.apply(Event::Lied(number));
            } else if member.session.as_ref().is_some_and(Session::has_slow_bell) {
                self.apply(Event::SlowedBell(number));
            } else if let Some(reading) = member.read() {
                self.apply(Event::Observed(number, reading));
            }
        }
    }

    /// Reports packets that arrive cut: nothing else shows that a driver cuts them.
    fn look_for_cut(&mut self, now: Instant) {
        for lane in &mut self.lanes.handles {
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
}

/// Has every SIGHUP become an event, while the primary starts, runs and stops.
fn reopen_on_hangup(outbox: Outbox) -> std::io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            outbox.event(inbox::Event::Reopen);
            // However many come, ten times a second is often enough.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    Ok(())
}
