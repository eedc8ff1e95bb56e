//! The settings of a group's state machine.

use std::time::Duration;

use crate::config::{OnEmpty, Restart};

/// The settings of a group's state machine.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// When a worker whose process exited is started again.
    pub restart: Restart,
    /// How long a worker that has packets may commit none (`hang_timeout`); zero: without limit.
    pub hang_timeout: Duration,
    /// How long the lanes hold the flows and packets of a lost worker for the member's next worker
    /// (`hold_timeout`); `None`: the other members get them at once.
    pub hold: Option<Duration>,
    /// Where packets go while no member gets any.
    pub on_empty: OnEmpty,
    /// How long a worker may take to attach, and then to map its segments.
    pub start_timeout: Duration,
    /// How long a worker may take to finish its packets, and to exit after SIGTERM.
    pub stop_timeout: Duration,
}
