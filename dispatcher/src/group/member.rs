//! A member and its states. Each state owns the data that exists only in that state.
//!
//! ```text
//!                        ┌── join ──► Running ──► Draining ──► Vacant     (no process)
//!  any worker:  Vacant ──┤ add
//!                        ▼                 spawned           join
//!  supervised:  Down ─► Spawning ────────► Starting ──────► Running ──┬─ detach, order ─► Draining
//!                 ▲  restart                                   ▲      └─ disconnect ┐        │
//!                 │                                       join │                    ▼        │
//!                 │                                            └─────────────── Detached ◄───┤
//!                 │  exit                                   order ┌────────────────┘         │
//!                 ├─────────────────────────────────── Leaving ◄──┴── disconnect on order ───┤
//!                 └─────────────────────────────────── Killed ◄────── evict, stop timeout ───┘
//! ```
//!
//! When its process exits, a supervised member goes from any state to Down, and from there to
//! Spawning (a restart) or, if an operator ordered that, to Vacant. When a timeout expires,
//! Starting, Detached and Leaving lead to Killed.

use std::time::{Duration, Instant};

use crate::group::display_state::DisplayState;
use crate::group::event::{ConnectionId, Order, ProcessId, Progress, Refused, Ticket};
use crate::group::starts::Starts;

/// A process that the primary started or adopted for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub id: ProcessId,
    /// An earlier primary started it.
    pub adopted: bool,
    /// How often it has attached.
    pub attached: u32,
}

/// A worker that has its segments, and has not reported yet that it mapped them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Joining {
    pub connection: ConnectionId,
    /// When its connection is closed if it is not ready.
    pub until: Instant,
}

/// A worker that the lanes serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Worker {
    pub connection: ConnectionId,
    /// Its process; `None`: the primary did not start it.
    pub process: Option<Process>,
    /// The last observed progress that differed from the one before, and when.
    pub last_progress: Option<(Progress, Instant)>,
}

/// The time by which a worker must have left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StopDeadline {
    /// When the group escalates: SIGTERM first, then SIGKILL.
    pub at: Instant,
    /// The process got SIGTERM.
    pub terminated: bool,
}

impl StopDeadline {
    pub fn after(now: Instant, timeout: Duration) -> Self {
        StopDeadline { at: now + timeout, terminated: false }
    }
}

/// How far a draining worker has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// Packets may still come until the lanes have acknowledged this change.
    AfterAck(Ticket),
    /// The worker was told that its rings hold its last packets.
    Announced,
    /// The worker was told so, and its rings are empty.
    Finished,
}

/// Why a supervised member has no process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DownReason {
    Stopped,
    Crashed,
    Failed,
}

/// A supervised member without a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Down {
    pub reason: DownReason,
    /// When a process is started again; `None`: only on an operator's order.
    pub restart: Option<Instant>,
    /// Until when the lanes hold its flows and packets; `None`: they hold none.
    pub held: Option<Instant>,
}

/// Why a process is started. It decides what happens if the start fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpawnReason {
    /// The primary is starting.
    PrimaryStart,
    /// An operator added a worker to a vacant member.
    Add,
    /// The delay of an automatic restart has passed.
    AutoRestart,
    /// An operator ordered a restart of a worker that was down.
    OrderedStart,
    /// An operator ordered a restart of a worker, and it has left.
    OrderedRestart,
    /// An adopted process exited before it attached to this primary.
    ReplaceAdopted,
}

/// The state of a member. `held`: until when the lanes hold its flows and packets for its next
/// worker; `None`: they hold none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Any worker that may attach can take it. `crashed`: its last worker was lost.
    Vacant { crashed: bool, joining: Option<Joining>, held: Option<Instant> },
    /// It is supervised, and has no process.
    Down(Down),
    /// The executor is starting a process. `down`: the state before.
    Spawning { reason: SpawnReason, down: Down },
    /// Its process runs, and has not attached yet.
    Starting {
        process: Process,
        /// When the process is killed.
        until: Instant,
        joining: Option<Joining>,
        stop_deadline: Option<StopDeadline>,
        held: Option<Instant>,
    },
    /// Its process had attached, and may attach again. `crashed`: it did not ask to leave.
    Detached {
        process: Process,
        crashed: bool,
        joining: Option<Joining>,
        stop_deadline: Option<StopDeadline>,
        held: Option<Instant>,
    },
    /// Its worker gets packets. `stalled`: it has committed none for half of `hang_timeout`.
    Running { worker: Worker, stalled: bool },
    /// Its worker gets no new packets. `order`: the order that it follows; `None`: it asked to
    /// leave, or the primary is stopping.
    Draining { worker: Worker, order: Option<Order>, stop_deadline: Option<StopDeadline>, closing: Closing },
    /// Its process must exit on an operator's order, and has no connection any more.
    Leaving { process: Process, order: Order, stop_deadline: StopDeadline, held: Option<Instant> },
    /// Its process got SIGKILL, and has not exited yet.
    Killed {
        process: Process,
        /// Its state before SIGKILL, or why it was evicted.
        displayed: DisplayState,
        order: Option<Order>,
        /// When it gets SIGKILL again.
        retry_at: Instant,
        held: Option<Instant>,
    },
}

impl State {
    pub const VACANT: Self = Self::Vacant { crashed: false, joining: None, held: None };

    pub const fn display_state(&self) -> DisplayState {
        match self {
            Self::Vacant { crashed: false, .. } => DisplayState::Vacant,
            Self::Down(Down { reason: DownReason::Failed, .. })
            | Self::Spawning { down: Down { reason: DownReason::Failed, .. }, .. } => DisplayState::Failed,
            Self::Down(Down { reason: DownReason::Crashed, .. })
            | Self::Spawning { down: Down { reason: DownReason::Crashed, .. }, .. }
            | Self::Vacant { crashed: true, .. }
            | Self::Detached { crashed: true, .. } => DisplayState::Crashed,
            Self::Down(_) | Self::Spawning { .. } | Self::Detached { crashed: false, .. } => {
                DisplayState::Stopped
            }
            Self::Starting { .. } => DisplayState::Starting,
            Self::Running { stalled: false, .. } => DisplayState::Running,
            Self::Running { stalled: true, .. } => DisplayState::Unhealthy,
            Self::Draining { .. } | Self::Leaving { .. } => DisplayState::Draining,
            Self::Killed { displayed, .. } => *displayed,
        }
    }

    pub const fn process(&self) -> Option<&Process> {
        match self {
            Self::Vacant { .. } | Self::Down(_) | Self::Spawning { .. } => None,
            Self::Starting { process, .. }
            | Self::Detached { process, .. }
            | Self::Leaving { process, .. }
            | Self::Killed { process, .. } => Some(process),
            Self::Running { worker, .. } | Self::Draining { worker, .. } => worker.process.as_ref(),
        }
    }

    pub const fn worker(&self) -> Option<&Worker> {
        match self {
            Self::Running { worker, .. } | Self::Draining { worker, .. } => Some(worker),
            _ => None,
        }
    }

    pub const fn joining(&mut self) -> Option<&mut Option<Joining>> {
        match self {
            Self::Vacant { joining, .. }
            | Self::Starting { joining, .. }
            | Self::Detached { joining, .. } => Some(joining),
            _ => None,
        }
    }

    pub const fn held(&mut self) -> Option<&mut Option<Instant>> {
        match self {
            Self::Vacant { held, .. }
            | Self::Down(Down { held, .. })
            | Self::Spawning { down: Down { held, .. }, .. }
            | Self::Starting { held, .. }
            | Self::Detached { held, .. }
            | Self::Leaving { held, .. }
            | Self::Killed { held, .. } => Some(held),
            Self::Running { .. } | Self::Draining { .. } => None,
        }
    }

    pub const fn stop_deadline(&mut self) -> Option<&mut StopDeadline> {
        match self {
            Self::Starting { stop_deadline, .. }
            | Self::Detached { stop_deadline, .. }
            | Self::Draining { stop_deadline, .. } => stop_deadline.as_mut(),
            Self::Leaving { stop_deadline, .. } => Some(stop_deadline),
            _ => None,
        }
    }
}

/// A member: its state, and data that outlives its states.
#[derive(Clone, Debug)]
pub struct Member {
    pub(super) state: State,
    /// The state as of the last event, and when it changed.
    pub(super) displayed: DisplayState,
    pub(super) since: Instant,
    pub(super) starts: Starts,
    pub(super) hangs: u64,
}

impl Member {
    pub(super) fn new(now: Instant) -> Self {
        let state = State::VACANT;
        Member { state, displayed: state.display_state(), since: now, starts: Starts::default(), hangs: 0 }
    }

    /// Its state, as reports show it.
    pub fn display_state(&self) -> DisplayState {
        self.state.display_state()
    }

    /// How long it has been in that state.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// How often its worker was started again.
    pub fn restarts(&self) -> u64 {
        self.starts.restarts
    }

    /// How often its worker was evicted because it hung.
    pub fn hangs(&self) -> u64 {
        self.hangs
    }

    /// Whether the lanes hold its flows and packets for its next worker.
    pub fn is_held(&self) -> bool {
        let mut state = self.state;
        state.held().is_some_and(|held| held.is_some())
    }

    /// Whether it has a share of the flows: its worker gets their packets, or the lanes hold them.
    pub fn has_flows(&self) -> bool {
        matches!(self.state, State::Running { .. }) || self.is_held()
    }

    /// Whether the primary starts its workers.
    pub fn is_supervised(&self) -> bool {
        match &self.state {
            State::Vacant { .. } => false,
            State::Running { worker, .. } | State::Draining { worker, .. } => worker.process.is_some(),
            _ => true,
        }
    }

    /// Whether it has no worker, and the primary starts none for it.
    pub fn is_vacant(&self) -> bool {
        matches!(self.state, State::Vacant { joining: None, .. })
    }

    /// Whether the lanes serve its worker.
    pub fn has_session(&self) -> bool {
        self.state.worker().is_some()
    }

    /// The process that was started or adopted for it.
    pub fn process(&self) -> Option<ProcessId> {
        self.state.process().map(|process| process.id)
    }

    /// Whether that process was started by an earlier primary.
    pub fn is_adopted(&self) -> bool {
        self.state.process().is_some_and(|process| process.adopted)
    }

    /// The connection of its worker, joined or not.
    pub fn connection(&self) -> Option<ConnectionId> {
        let mut state = self.state;
        let joining = state.joining().and_then(|joining| joining.map(|joining| joining.connection));
        self.state.worker().map(|worker| worker.connection).or(joining)
    }

    /// Whether a worker may attach to it now.
    ///
    /// # Errors
    /// Why none may.
    pub fn may_attach(&self) -> Result<(), Refused> {
        match self.state {
            State::Vacant { joining: None, .. }
            | State::Starting { joining: None, .. }
            | State::Detached { joining: None, .. } => Ok(()),
            _ if self.connection().is_some() => Err(Refused::Occupied),
            _ => Err(Refused::Illegal(self.display_state())),
        }
    }
}
