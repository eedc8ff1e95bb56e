//! The control thread and its state.
//!
//! One thread owns all control state. Connections, processes, lanes and signals send it events,
//! which it handles one at a time. The [groups](crate::group) decide what happens to members. This
//! thread carries out their actions, and never waits for a lane or a process.

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
use crate::control::inbox::{self, Inbox, InboxSender, Next, Response};
use crate::control::lanes::Lanes;
use crate::control::outcome::Outcome;
use crate::control::peer::ConnectionId;
use crate::control::ports::{PortEvent, PortParts, PortState};
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

/// The time between two checks of what sends no event: interfaces, the progress of workers, ended
/// lanes. xfan notices changes within this time, and the checks still cost little CPU time.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// The parts of a primary.
#[derive(Debug)]
pub struct Parts {
    /// The ports, by [`PortId`].
    pub ports: Vec<PortParts>,
    /// The groups, by [`GroupId`].
    pub groups: Vec<GroupParts>,
    /// The packet memory.
    pub memory: Arc<PacketMemory>,
    /// The sizes of every worker's segments.
    pub geometry: Geometry,
    /// The lanes: one for each queue of each port.
    pub lanes: Vec<LaneHandle>,
    /// How long workers yield after spinning, before they sleep.
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
    /// `None`: xfan cannot make cgroups here, or the primary starts no workers.
    pub(super) cgroups: Option<Cgroups>,
    /// `None` before the primary serves connections, or if it starts no workers.
    pub(super) spawner: Option<Spawner>,
    /// Why the primary must end.
    pub(super) failure: Option<PrimaryError>,
    /// Why the last process could not be started.
    pub(super) spawn_error: Option<PrimaryError>,
    /// Sends events to this thread.
    pub(super) sender: InboxSender,
    pub(super) control: Arc<ControlCounters>,
    pub(super) history: History,
    /// The number of refused workers.
    pub(super) refused: u64,
    /// Limits how often refusals and orders are logged.
    pub(super) limit: RateLimit,
    /// Requests for reports and events that wait for their replies. Root's requests never wait.
    pub(super) waiting: Vec<(Request, oneshot::Sender<Response>)>,
    /// When some of these were last answered.
    pub(super) last_answered: Option<Instant>,
    /// The log has a warning that segments could not be locked in memory.
    pub(super) mlock_warned: bool,
    /// The XDP programs are attached.
    attached: bool,
    /// The log says that the primary is running.
    announced: bool,
    pub(super) autogroup: Autogroup,
    /// The XDP programs redirect packets to the lanes.
    redirecting: bool,
    pub(super) started: Instant,
}

impl Primary {
    /// Makes a primary that has not started yet.
    fn new(parts: Parts, sender: InboxSender, listener: &Listener) -> Self {
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
            sender,
            control: listener.counters(),
            history: History::default(),
            refused: 0,
            limit: RateLimit::default(),
            waiting: Vec::new(),
            last_answered: None,
            mlock_warned: false,
            attached: false,
            announced: false,
            autogroup: Autogroup::begin(),
            redirecting: false,
            started: now,
        }
    }

    /// Starts the workers, redirects packets to the lanes once all workers have attached, and
    /// serves until a signal or an error. Undoes everything before it returns.
    ///
    /// # Errors
    /// The runtime or its descriptors cannot be made. Later errors are part of the outcome.
    pub fn run(parts: Parts, listener: &Listener) -> std::io::Result<Outcome> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut inbox = Inbox::default();
            let mut primary = Self::new(parts, inbox.sender(), listener);
            reopen_on_sighup(inbox.sender())?;
            primary.lanes.watch(&primary.sender)?;
            let result = primary.serve(listener, &mut inbox).await;
            Ok(primary.stop(result, &mut inbox).await)
        })
    }

    /// Runs until a stop signal or an error.
    async fn serve(&mut self, listener: &Listener, inbox: &mut Inbox) -> Result<(), PrimaryError> {
        // Workers that survive their primary must connect to the socket of the next one.
        let starts_workers = self.commands().next().is_some();
        let inherited = starts_workers && self.commands().all(|command| !command.survive);
        let connections = listener.serve(inbox.sender(), inherited)?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        // The signals were blocked until now.
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
                _ = ticks.tick() => self.on_tick()?,
                () = deadline => self.apply_to_all(Event::Tick),
                next = inbox.next() => match next {
                    Next::Event(event) => self.handle(event),
                    Next::Request(request) => self.handle_request(request),
                },
            }
            self.check_failure()?;
            self.update_redirection()?;
        }
    }

    /// The earliest deadline of a group.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.groups.iter().filter_map(|group| group.machine.next_deadline()).min()
    }

    /// Attaches the XDP programs and sends the tables to the lanes, once every process that was
    /// started has attached. Redirects packets to the lanes once these have acknowledged the
    /// tables.
    fn open(&mut self, listener: &Listener) -> Result<(), PrimaryError> {
        if !self.attached && self.groups.iter().all(|group| group.machine.has_started()) {
            let mut events = Vec::new();
            for port in &mut self.ports {
                events.extend(port.open(&self.lanes)?);
            }
            self.record_port_events(events);
            self.lanes.handles.iter_mut().for_each(LaneHandle::begin_receiving);
            self.attached = true;
            self.apply_to_all(Event::Opened);
        }
        if !self.announced && self.groups.iter().all(|group| group.machine.is_open()) {
            self.update_redirection()?;
            self.drop_startup_capabilities(listener.path());
            self.announced = true;
            let names = self.ports.iter().map(|port| port.name.as_str()).collect::<Vec<_>>().join(", ");
            let modes = self.ports.iter().map(PortState::mode).collect::<Vec<_>>().join("; ");
            tracing::info!(
                interface = names,
                mode = modes,
                lanes = self.lanes.handles.len(),
                workers = self.keys().into_iter().filter(|key| self.member(*key).has_flows()).count(),
                socket = %listener.path().display(),
                "running"
            );
        }
        Ok(())
    }

    /// Redirects packets to the lanes while a group wants them. Otherwise they pass to the kernel.
    fn update_redirection(&mut self) -> Result<(), PrimaryError> {
        let wanted = self.groups.iter().any(|group| group.machine.wants_packets());
        if wanted == self.redirecting {
            return Ok(());
        }
        for port in &self.ports {
            port.set_redirection(wanted)?;
        }
        self.redirecting = wanted;
        let (event, detail) = if wanted {
            ("running", "packets are redirected to the lanes")
        } else {
            ("empty", "no worker takes packets: they pass to the kernel")
        };
        tracing::info!("{detail}");
        self.history.write_own(event, detail);
        Ok(())
    }

    /// Handles one event of the inbox.
    pub(super) fn handle(&mut self, event: inbox::Event) {
        match event {
            inbox::Event::Disconnected(connection) => self.disconnected(connection),
            inbox::Event::Exited(process) => self.process_ended(process),
            inbox::Event::Acknowledged => self.run_acknowledged(),
            inbox::Event::Reopen => self.reopen(),
        }
    }

    fn disconnected(&mut self, connection: ConnectionId) {
        if let Some(key) = self.member_of(connection) {
            self.apply(key.group, Event::Disconnected(connection));
            self.resources_mut(key).joining.take_if(|joining| joining.connection.id == connection);
        }
    }

    fn process_ended(&mut self, process: ProcessId) {
        let Some(child) = self.processes.get_mut(&process) else { return };
        let (group, Some(ending)) = (child.group, child.process.ended()) else { return };
        if let Some(member) = self.group(group).machine.member_of_process(process) {
            let resources = self.resources_mut(MemberKey { group, member });
            resources.last_exit = Some(ending.to_string());
            resources.last_error = ending.to_string();
        }
        let success = match ending {
            Ending::Unknown => None,
            Ending::Status(status) => Some(status.success()),
        };
        self.apply(group, Event::Exited(process, success));
    }

    /// Checks what sends no event.
    fn on_tick(&mut self) -> Result<(), PrimaryError> {
        if let Some(lane) = self.lanes.handles.iter().find(|lane| lane.ended()) {
            return Err(PrimaryError::LaneEnded(lane.queue));
        }
        self.check_ports()?;
        self.check_autogroup();
        self.run_acknowledged();
        self.check_workers();
        let now = Instant::now();
        self.report_suppressed(now);
        self.answer_waiting();
        self.report_cut(now);
        self.reap_orphans();
        Ok(())
    }

    /// Reports changes of the interfaces.
    ///
    /// # Errors
    /// [`PrimaryError::Vanished`]
    fn check_ports(&mut self) -> Result<(), PrimaryError> {
        let mut events = Vec::new();
        for port in &mut self.ports {
            events.extend(port.check_name()?);
            events.extend(port.check_arrivals(&mut self.lanes));
            events.extend(port.poll_conditions());
        }
        self.record_port_events(events);
        Ok(())
    }

    /// Writes events of ports, which are in the log already, to the event history.
    fn record_port_events(&mut self, events: Vec<PortEvent>) {
        for PortEvent { event, detail } in events {
            self.history.write_own(event, detail);
        }
    }

    /// Reports to the groups the progress of each worker, and the violations that lanes have found.
    pub(super) fn check_workers(&mut self) {
        for key in self.keys() {
            let resources = self.resources(key);
            let session = resources.session.as_ref();
            let event = if let Some((lane, error)) = session.and_then(Session::impossible_index) {
                let queue = self.lanes.handles.get(lane.index()).map(|lane| lane.queue);
                self.resources_mut(key).last_error = match queue {
                    Some(queue) => format!("lane of queue {queue}: {error}"),
                    None => error.to_string(),
                };
                Event::ImpossibleIndex(key.member)
            } else if session.is_some_and(Session::has_slow_bell) {
                Event::SlowBell(key.member)
            } else if let Some(progress) = resources.progress() {
                Event::Observed(key.member, progress)
            } else {
                continue;
            };
            self.apply(key.group, event);
        }
    }

    /// Reports packets that arrived cut: no other counter shows that a driver cuts them.
    fn report_cut(&mut self, now: Instant) {
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
    fn check_autogroup(&mut self) {
        let shared = self.commands().any(|command| !command.own_session);
        if let Some(changed) = shared.then(|| self.autogroup.check(Instant::now())).flatten() {
            tracing::warn!("{changed}");
            self.history.write_own("autogroup", changed.to_string());
        }
    }
}

/// Sends an event for every SIGHUP, also while the primary starts and stops.
fn reopen_on_sighup(sender: InboxSender) -> std::io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            sender.send_event(inbox::Event::Reopen);
            // Files are reopened at most ten times a second.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    Ok(())
}
