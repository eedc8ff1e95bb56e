//! A member: one of the states below, each of which owns what is true only in it.
//!
//! ```text
//!                        ┌── join ──► Running ──► Draining ──► Vacant     (no process)
//!  any worker:  Vacant ──┤ add
//!                        ▼                 spawned           join
//!  supervised:  Down ─► Spawning ────────► Starting ──────► Running ──┬─ detach, order ─► Draining
//!                 ▲  restart                                   ▲      └─ hang up ─┐          │
//!                 │                                       join │                  ▼          │
//!                 │                                            └───────────── Detached ◄─────┤
//!                 │  exit                                       order ┌──────────┘ hang up   │
//!                 ├─────────────────────────────────────── Leaving ◄──┴── hang up, if told ──┤
//!                 └─────────────────────────────────────── Killed ◄──── lie, hang, overdue ──┘
//! ```
//!
//! The end of its process leads every supervised member to Down, and from there to Spawning (a
//! restart) or, as an operator orders, to Vacant. Starting, Detached and Leaving lead to Killed by
//! a deadline.

use std::time::{Duration, Instant};

use crate::group::event::{ConnectionId, ProcessId, Purpose, Reading, Refused, Ticket};
use crate::group::restart::Starts;
use crate::group::shown::Shown;

/// The process that the primary started, or adopted, for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub id: ProcessId,
    /// An earlier primary started it.
    pub adopted: bool,
    /// Times it has attached.
    pub attached: u32,
}

/// A worker that was given segments, and has not said that it mapped them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Joining {
    pub connection: ConnectionId,
    /// When its connection is ended.
    pub until: Instant,
}

/// A worker that the lanes serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Worker {
    pub connection: ConnectionId,
    /// Its process; none: the primary did not start it.
    pub process: Option<Process>,
    /// What it had done when it was last seen to do something.
    pub pulse: Option<(Reading, Instant)>,
}

/// A process that ought to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overdue {
    /// When something is done about it.
    pub at: Instant,
    /// It got SIGTERM.
    pub terminated: bool,
}

impl Overdue {
    pub fn after(now: Instant, patience: Duration) -> Self {
        Overdue { at: now + patience, terminated: false }
    }
}

/// How far a draining worker has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// It is told once the lanes have carried out this change: until then packets may come.
    When(Ticket),
    /// It knows that no more packets come.
    Told,
    /// It knows, and its rings are empty.
    Finished,
}

/// Why a member that the primary starts workers for has no process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    Stopped,
    Crashed,
    Failed,
}

/// A member without a process, for which the primary starts workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Down {
    pub rest: Rest,
    /// When its process is started again.
    pub restart: Option<Instant>,
    /// Until when its flows and packets are held.
    pub held: Option<Instant>,
}

/// What a process is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occasion {
    /// The start of the primary.
    Start,
    /// An operator added a worker to a vacant member.
    Add,
    /// The time of a restart has come.
    Restart,
    /// An operator ordered the start of a worker that is down.
    Order,
    /// A worker left to be started again.
    Again,
    /// A worker of an earlier primary has not attached to this one.
    Replace,
}

/// The state of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Any worker that may attach can take it.
    Vacant { crashed: bool, joining: Option<Joining>, held: Option<Instant> },
    /// The primary starts its workers, and none runs.
    Down(Down),
    /// A process is being started.
    Spawning { occasion: Occasion, down: Down },
    /// The process has not attached yet.
    Starting {
        process: Process,
        /// When it is killed.
        until: Instant,
        joining: Option<Joining>,
        overdue: Option<Overdue>,
        held: Option<Instant>,
    },
    /// The process had attached, and may attach again.
    Detached {
        process: Process,
        crashed: bool,
        joining: Option<Joining>,
        overdue: Option<Overdue>,
        held: Option<Instant>,
    },
    /// The worker gets packets.
    Running { worker: Worker, stalled: bool },
    /// The worker gets no new packets.
    Draining { worker: Worker, purpose: Option<Purpose>, overdue: Option<Overdue>, closing: Closing },
    /// The process was told to end, and has no connection any more.
    Leaving { process: Process, purpose: Purpose, overdue: Overdue, held: Option<Instant> },
    /// The process was killed, and has not ended yet.
    Killed {
        process: Process,
        shown: Shown,
        purpose: Option<Purpose>,
        /// When it is killed again.
        again: Instant,
        held: Option<Instant>,
    },
}

impl State {
    pub const VACANT: Self = Self::Vacant { crashed: false, joining: None, held: None };

    pub const fn shown(&self) -> Shown {
        match self {
            Self::Vacant { crashed: false, .. } => Shown::Vacant,
            Self::Down(Down { rest: Rest::Failed, .. })
            | Self::Spawning { down: Down { rest: Rest::Failed, .. }, .. } => Shown::Failed,
            Self::Down(Down { rest: Rest::Crashed, .. })
            | Self::Spawning { down: Down { rest: Rest::Crashed, .. }, .. }
            | Self::Vacant { crashed: true, .. }
            | Self::Detached { crashed: true, .. } => Shown::Crashed,
            Self::Down(_) | Self::Spawning { .. } | Self::Detached { crashed: false, .. } => Shown::Stopped,
            Self::Starting { .. } => Shown::Starting,
            Self::Running { stalled: false, .. } => Shown::Running,
            Self::Running { stalled: true, .. } => Shown::Unhealthy,
            Self::Draining { .. } | Self::Leaving { .. } => Shown::Draining,
            Self::Killed { shown, .. } => *shown,
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

    pub const fn overdue(&mut self) -> Option<&mut Overdue> {
        match self {
            Self::Starting { overdue, .. }
            | Self::Detached { overdue, .. }
            | Self::Draining { overdue, .. } => overdue.as_mut(),
            Self::Leaving { overdue, .. } => Some(overdue),
            _ => None,
        }
    }
}

/// A member and what outlives its states.
#[derive(Clone, Debug)]
pub struct Member {
    pub(super) state: State,
    pub(super) shown: Shown,
    pub(super) since: Instant,
    pub(super) starts: Starts,
    pub(super) hangs: u64,
}

impl Member {
    pub(super) fn new(now: Instant) -> Self {
        let state = State::VACANT;
        Member { state, shown: state.shown(), since: now, starts: Starts::default(), hangs: 0 }
    }

    /// Its state, as in the report.
    pub fn shown(&self) -> Shown {
        self.state.shown()
    }

    /// How long it has been in that state.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// Times that its process was started again.
    pub fn restarts(&self) -> u64 {
        self.starts.restarts
    }

    /// Times that its worker hung.
    pub fn hangs(&self) -> u64 {
        self.hangs
    }

    /// Whether its flows and packets are held for the next worker.
    pub fn is_held(&self) -> bool {
        let mut state = self.state;
        state.held().is_some_and(|held| held.is_some())
    }

    /// Whether it has a share of the flows: its worker gets them, or they are held.
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

    /// Whether no worker has it, and the primary starts none for it.
    pub fn is_vacant(&self) -> bool {
        matches!(self.state, State::Vacant { joining: None, .. })
    }

    /// Whether the lanes serve its worker.
    pub fn has_session(&self) -> bool {
        self.state.worker().is_some()
    }

    /// The process that was started for it.
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
    /// Why not.
    pub fn may_attach(&self) -> Result<(), Refused> {
        match self.state {
            State::Vacant { joining: None, .. }
            | State::Starting { joining: None, .. }
            | State::Detached { joining: None, .. } => Ok(()),
            _ if self.connection().is_some() => Err(Refused::Occupied),
            _ => Err(Refused::Illegal(self.shown())),
        }
    }
}
