//! A member's life: the states it can be in, and what leads from one to another.
//!
//! ```text
//!            start             attach               drain               leave
//!  vacant ─────────► starting ────────► running ─────────► draining ─────────► stopped
//!     ▲                  │               │   ▲                 │                  │
//!     │                  │         stall ▼   │ recover         │                  │
//!     │                  │            unhealthy                │                  │ start, attach
//!     │                  └───────die──────┴──────die───────────┴──► crashed ──────┤
//!     │                                                                │ give up  │
//!     └──vacate (anyone without a worker)                              └► failed ─┘
//! ```
//!
//! A worker that attaches by itself begins with *attach*, and when it has left its place is vacant again.

use std::time::{Duration, Instant};

/// Where a member is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody has the place; whoever may can take it.
    Vacant,
    /// Its process runs, and has not attached yet.
    Starting,
    /// It gets packets.
    Running,
    /// It gets packets, and has taken none for half the time after which it counts as hanging.
    Unhealthy,
    /// It gets no new packets and finishes what it has.
    Draining,
    /// It left in good order.
    Stopped,
    /// It ended without a word, lied, or hung; it may be started again.
    Crashed,
    /// It was started too often, and stays down.
    Failed,
}

/// What happens to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A process was started for it.
    Start,
    /// A worker took the place.
    Attach,
    /// It has packets and takes none.
    Stall,
    /// It takes packets again.
    Recover,
    /// It is to leave, or wants to.
    Drain,
    /// It has left in good order.
    Leave,
    /// It is gone without a word, or had to go.
    Die,
    /// It is not started any more.
    GiveUp,
    /// Its place is for whoever comes.
    Vacate,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Vacant,
        Self::Starting,
        Self::Running,
        Self::Unhealthy,
        Self::Draining,
        Self::Stopped,
        Self::Crashed,
        Self::Failed,
    ];

    /// As in the report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vacant => "vacant",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Failed => "failed",
        }
    }

    /// Whether it takes its share of the flows.
    #[must_use]
    pub const fn takes_packets(self) -> bool {
        matches!(self, Self::Running | Self::Unhealthy)
    }

    /// The state after a change; none if that cannot happen to a member in this state.
    #[must_use]
    pub const fn after(self, change: Change) -> Option<Self> {
        use State::{Crashed, Draining, Failed, Running, Starting, Stopped, Unhealthy, Vacant};
        Some(match (change, self) {
            (Change::Start, Vacant | Stopped | Crashed | Failed) => Starting,
            // Also a process whose connection broke may attach anew.
            (Change::Attach, Vacant | Starting | Stopped | Crashed) => Running,
            (Change::Stall, Running) => Unhealthy,
            (Change::Recover, Unhealthy) => Running,
            (Change::Drain, Starting | Running | Unhealthy) => Draining,
            // A process that ended well has left, whatever it looked like before.
            (Change::Leave, Running | Unhealthy | Draining | Crashed | Stopped) => Stopped,
            (Change::Die, Starting | Running | Unhealthy | Draining | Stopped | Crashed) => Crashed,
            (Change::GiveUp, Starting | Draining | Stopped | Crashed) => Failed,
            (Change::Vacate, Vacant | Starting | Draining | Stopped | Crashed | Failed) => Vacant,
            _ => return None,
        })
    }
}

impl Change {
    /// Every change.
    pub const ALL: [Self; 9] = [
        Self::Start,
        Self::Attach,
        Self::Stall,
        Self::Recover,
        Self::Drain,
        Self::Leave,
        Self::Die,
        Self::GiveUp,
        Self::Vacate,
    ];

    /// As in the journal.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "started",
            Self::Attach => "attached",
            Self::Stall => "stalled",
            Self::Recover => "recovered",
            Self::Drain => "draining",
            Self::Leave => "left",
            Self::Die => "died",
            Self::GiveUp => "given_up",
            Self::Vacate => "vacated",
        }
    }
}

/// A state, and since when.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    state: State,
    since: Instant,
}

impl Life {
    /// A vacant place.
    pub fn new(now: Instant) -> Self {
        Life { state: State::Vacant, since: now }
    }

    /// The state it is in.
    pub fn state(&self) -> State {
        self.state
    }

    /// How long it has been in it.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    /// Makes a change; `false` if it cannot happen now, and nothing has.
    pub fn make(&mut self, change: Change, now: Instant) -> bool {
        let Some(next) = self.state.after(change) else { return false };
        if next != self.state {
            *self = Life { state: next, since: now };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_change_is_decided() {
        // A row for each state, a column for each change, in the order of `ALL`: the state after it, or nothing.
        let table = "
            vacant    | starting running .         .       .        .       .       .      vacant
            starting  | .        running .         .       draining .       crashed failed vacant
            running   | .        .       unhealthy .       draining stopped crashed .      .
            unhealthy | .        .       .         running draining stopped crashed .      .
            draining  | .        .       .         .       .        stopped crashed failed vacant
            stopped   | starting running .         .       .        stopped crashed failed vacant
            crashed   | starting running .         .       .        stopped crashed failed vacant
            failed    | starting .       .         .       .        .       .       .      vacant";
        let rows: Vec<_> = table.lines().filter(|line| !line.trim().is_empty()).collect();
        assert_eq!(rows.len(), State::ALL.len());
        for (row, state) in rows.iter().zip(State::ALL) {
            let (name, cells) = row.split_once('|').unwrap();
            assert_eq!(name.trim(), state.name());
            let cells: Vec<_> = cells.split_whitespace().collect();
            assert_eq!(cells.len(), Change::ALL.len());
            for (cell, change) in cells.into_iter().zip(Change::ALL) {
                assert_eq!(state.after(change).map_or(".", State::name), cell, "{change:?} of {state:?}");
            }
        }
    }

    #[test]
    fn who_takes_packets_can_go_every_way() {
        for state in State::ALL.into_iter().filter(|state| state.takes_packets()) {
            assert_eq!(state.after(Change::Drain), Some(State::Draining));
            assert_eq!(state.after(Change::Die), Some(State::Crashed));
            assert_eq!(state.after(Change::Vacate), None, "first it has to stop taking them");
        }
    }

    #[test]
    fn time_in_a_state_begins_when_it_changes() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut life = Life::new(start);
        assert!(life.make(Change::Attach, start + second));
        assert_eq!((life.state(), life.age(start + 3 * second)), (State::Running, 2 * second));
        assert!(!life.make(Change::Recover, start + 4 * second), "it was never unhealthy");
        assert!(life.make(Change::Die, start + 5 * second) && life.make(Change::Die, start + 6 * second));
        assert_eq!((life.state(), life.age(start + 7 * second)), (State::Crashed, 2 * second));
    }
}
