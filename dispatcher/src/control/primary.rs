//! The primary's control thread: members, lanes and operators meet here.
//!
//! One thread owns all control state. Connections, processes, lanes and signals become events, and
//! the thread handles one at a time. The [groups](crate::group) decide what happens to members;
//! this thread carries the actions out, and never waits for a lane or a process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use xfan_shm::ids::{GroupId, PortId};
use xfan_shm::layout::Geometry;
use xfan_shm::protocol::Request;

use crate::control::connection::ControlCounters;
use crate::control::error::PrimaryError;
use crate::control::groups::{GroupParts, GroupState, MemberKey};
use crate::control::history::History;
use crate::control::inbox::{self, Answer, Inbox, Next, Outbox};
use crate::control::lanes::Lanes;
use crate::control::outcome::Outcome;
use crate::control::peer::ConnectionId;
use crate::control::ports::{News, PortParts, PortState};
use crate::control::rate_limit::RateLimit;
use crate::control::resources::Session;
use crate::control::server::Listener;
use crate::control::spawner::{Child, Spawner};
use crate::group::{Event, ProcessId};
use crate::host::autogroup::Autogroup;
use crate::host::sys;
use crate::lane::handle::LaneHandle;
use crate::memory::umem::PacketMemory;
use crate::process::cgroup::Cgroups;
use crate::process::spawn::Ending;
use crate::process::survivors::Note;

/// How often the control thread looks after what sends no event: vanished interfaces, lanes that
/// ended, workers that lie or hang.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// What a primary is made of.
#[derive(Debug)]
pub struct Parts {
    /// Where packets come from, by [`PortId`].
    pub ports: Vec<PortParts>,
    /// Where packets go, by [`GroupId`].
    pub groups: Vec<GroupParts>,
    /// Where packets lie.
    pub memory: Arc<PacketMemory>,
    /// Sizes of every worker's segments.
    pub geometry: Geometry,
    /// One for each queue of each port.
    pub lanes: Vec<LaneHandle>,
    /// How long workers yield after spinning.
    pub yields: Duration,
}

/// A running primary.
#[derive(Debug)]
pub struct Primary {
    pub(super) ports: Vec<PortState>,
    pub(super) groups: Vec<GroupState>,
    pub(super) lanes: Lanes,
    pub(super) memory: Arc<PacketMemory>,
    pub(super) geometry: Geometry,
    pub(super) yields: Duration,
    pub(super) processes: BTreeMap<ProcessId, Child>,
    /// `None`: the system has none, or the primary starts no workers.
    pub(super) cgroups: Option<Cgroups>,
    /// `None` before [`run`](Self::run), and if the workers of all groups attach by themselves.
    pub(super) spawner: Option<Spawner>,
    /// Why no group can go on.
    pub(super) failure: Option<PrimaryError>,
    /// Why the last process could not be started.
    pub(super) spawn_error: Option<PrimaryError>,
    pub(super) outbox: Outbox,
    pub(super) control: Arc<ControlCounters>,
    pub(super) history: History,
    /// Workers refused.
    pub(super) refused: u64,
    /// How often refusals and orders are logged.
    pub(super) limit: RateLimit,
    /// Requests of users other than root that have no answer yet, and when some were last answered.
    pub(super) waiting: Vec<(Request, oneshot::Sender<Answer>)>,
    pub(super) told: Option<Instant>,
    /// Segments could not be locked in memory, and the log says so.
    pub(super) unlocked: bool,
    /// The XDP programs are attached.
    attached: bool,
    /// The log says that the primary runs.
    announced: bool,
    pub(super) autogroup: Autogroup,
    /// Packets come: a member takes them, or they are to be dropped.
    flowing: bool,
    pub(super) started: Instant,
}

impl Primary {
    /// A primary of these parts.
    fn new(parts: Parts, outbox: Outbox, listener: &Listener) -> Self {
        let now = Instant::now();
        let mut commands = parts.groups.iter().filter_map(|group| group.command.as_ref()).peekable();
        let cgroups = commands.peek().is_some().then(|| {
            let cpuset = commands.any(|command| !command.limits.lanes.is_empty());
            Cgroups::begin(listener.path(), cpuset)
        });
        let groups = (0..u8::MAX).map(GroupId).zip(parts.groups);
        let ports = (0..u8::MAX).map(PortId).zip(parts.ports);
        Primary {
            ports: ports.map(|(id, parts)| PortState::new(id, parts, now)).collect(),
            groups: groups.map(|(id, parts)| GroupState::new(id, parts, cgroups.as_ref(), now)).collect(),
            lanes: Lanes::new(parts.lanes),
            memory: parts.memory,
            geometry: parts.geometry,
            yields: parts.yields,
            processes: BTreeMap::new(),
            cgroups: cgroups.and_then(Result::ok),
            spawner: None,
            failure: None,
            spawn_error: None,
            outbox,
            control: listener.counters(),
            history: History::default(),
            refused: 0,
            limit: RateLimit::default(),
            waiting: Vec::new(),
            told: None,
            unlocked: false,
            attached: false,
            announced: false,
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
    pub fn run(parts: Parts, listener: &Listener) -> std::io::Result<Outcome> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut inbox = Inbox::default();
            let mut primary = Self::new(parts, inbox.outbox(), listener);
            reopen_on_hangup(inbox.outbox())?;
            primary.lanes.watch(&primary.outbox)?;
            let result = primary.serve(listener, &mut inbox).await;
            Ok(primary.stop(result, &mut inbox).await)
        })
    }

    /// Runs from the start of the workers to the signal that ends it.
    async fn serve(&mut self, listener: &Listener, inbox: &mut Inbox) -> Result<(), PrimaryError> {
        // A worker that survives its primary connects to the socket of the next one.
        let starts_workers = self.commands().next().is_some();
        let inherited = starts_workers && self.commands().all(|command| !command.survive);
        let connections = listener.serve(inbox.outbox(), inherited)?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        // They were blocked until now.
        sys::block_signals(false)?;
        let note = Note::beside(listener.file());
        note.remove_unfinished();
        if starts_workers {
            self.spawner = Some(Spawner { socket: listener.path().to_owned(), note, connections });
            self.start_workers()?;
            self.write_note();
        }
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.open(listener)?;
            let deadline = self.next_deadline().map(tokio::time::Instant::from_std);
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
                () = deadline => self.apply_to_all(Event::Tick),
                next = inbox.next() => match next {
                    Next::Event(event) => self.handle(event),
                    Next::Question(question) => self.answer(question),
                },
            }
            self.check_failure()?;
            self.let_packets_in()?;
        }
    }

    /// When the next group has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.groups.iter().filter_map(|group| group.life.next_deadline()).min()
    }

    /// Lets packets in once every process that was started has attached. First the XDP programs are
    /// attached, and the lanes get the tables; once they use them, packets come.
    fn open(&mut self, listener: &Listener) -> Result<(), PrimaryError> {
        if !self.attached && self.groups.iter().all(|group| group.life.has_started()) {
            let mut news = Vec::new();
            for port in &mut self.ports {
                news.extend(port.open(&self.lanes)?);
            }
            self.write_down(news);
            self.lanes.handles.iter_mut().for_each(LaneHandle::packets_come);
            self.attached = true;
            self.apply_to_all(Event::Opened);
        }
        if !self.announced && self.groups.iter().all(|group| group.life.is_open()) {
            self.let_packets_in()?;
            self.give_up_capabilities(listener.path());
            self.announced = true;
            let names = self.ports.iter().map(|port| port.name.as_str()).collect::<Vec<_>>().join(", ");
            let modes = self.ports.iter().map(PortState::mode).collect::<Vec<_>>().join("; ");
            tracing::info!(
                interface = names,
                mode = modes,
                lanes = self.lanes.handles.len(),
                workers = self.keys().into_iter().filter(|key| self.life(*key).has_flows()).count(),
                socket = %listener.path().display(),
                "running"
            );
        }
        Ok(())
    }

    /// Packets come while a group wants them; else they pass to the kernel.
    fn let_packets_in(&mut self) -> Result<(), PrimaryError> {
        let wanted = self.groups.iter().any(|group| group.life.wants_packets());
        if wanted == self.flowing {
            return Ok(());
        }
        for port in &self.ports {
            port.let_in(wanted)?;
        }
        self.flowing = wanted;
        let (event, detail) = if wanted {
            ("running", "packets come")
        } else {
            ("empty", "no worker takes packets: they pass to the kernel")
        };
        tracing::info!("{detail}");
        self.history.write_own(event, detail);
        Ok(())
    }

    /// Handles one event.
    pub(super) fn handle(&mut self, event: inbox::Event) {
        match event {
            inbox::Event::HangUp(connection) => self.hang_up(connection),
            inbox::Event::Exited(process) => self.process_ended(process),
            inbox::Event::Obeyed => self.acknowledge(),
            inbox::Event::Reopen => self.reopen(),
        }
    }

    fn hang_up(&mut self, connection: ConnectionId) {
        if let Some(key) = self.member_of(connection) {
            self.apply(key.group, Event::HungUp(connection));
            self.resources_mut(key).joining.take_if(|joining| joining.connection.id == connection);
        }
    }

    fn process_ended(&mut self, process: ProcessId) {
        let Some(child) = self.processes.get_mut(&process) else { return };
        let (group, Some(ending)) = (child.group, child.process.ended()) else { return };
        if let Some(member) = self.group(group).life.member_of_process(process) {
            let resources = self.resources_mut(MemberKey { group, member });
            resources.last_exit = Some(ending.to_string());
            resources.trouble = ending.to_string();
        }
        let success = match ending {
            Ending::Unknown => None,
            Ending::Status(status) => Some(status.success()),
        };
        self.apply(group, Event::Exited(process, success));
    }

    /// Looks after what sends no event.
    fn look_after(&mut self) -> Result<(), PrimaryError> {
        if let Some(lane) = self.lanes.handles.iter().find(|lane| lane.ended()) {
            return Err(PrimaryError::LaneEnded(lane.queue));
        }
        self.look_at_ports()?;
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

    /// Ends the primary if an interface is gone, and reports what has changed about the others.
    fn look_at_ports(&mut self) -> Result<(), PrimaryError> {
        let mut news = Vec::new();
        for port in &mut self.ports {
            news.extend(port.look_for_interface()?);
            news.extend(port.look_for_lost_packets(&mut self.lanes));
            news.extend(port.look());
        }
        self.write_down(news);
        Ok(())
    }

    /// Writes news to the event history. The log has them already.
    fn write_down(&mut self, news: Vec<News>) {
        for News { event, detail } in news {
            self.history.write_own(event, detail);
        }
    }

    /// Tells the groups how far each worker has come, and what lanes have found against it.
    pub(super) fn look_at_workers(&mut self) {
        for key in self.keys() {
            let resources = self.resources(key);
            let session = resources.session.as_ref();
            let event = if let Some((lane, error)) = session.and_then(Session::impossible_index) {
                let queue = self.lanes.handles.get(lane.index()).map(|lane| lane.queue);
                self.resources_mut(key).trouble = match queue {
                    Some(queue) => format!("lane of queue {queue}: {error}"),
                    None => error.to_string(),
                };
                Event::Lied(key.member)
            } else if session.is_some_and(Session::has_slow_bell) {
                Event::SlowedBell(key.member)
            } else if let Some(reading) = resources.read() {
                Event::Observed(key.member, reading)
            } else {
                continue;
            };
            self.apply(key.group, event);
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
            self.history.write_own("cut", detail);
        }
    }

    /// Checks about once a second that no worker has changed the priority of the session that it
    /// shares with the primary.
    fn look_at_autogroup(&mut self) {
        let shared = self.commands().any(|command| !command.own_session);
        if let Some(changed) = shared.then(|| self.autogroup.check(Instant::now())).flatten() {
            tracing::warn!("{changed}");
            self.history.write_own("autogroup", changed.to_string());
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
