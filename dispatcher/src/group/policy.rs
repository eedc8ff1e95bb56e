//! The settings that decide what happens to members.

use std::time::Duration;

use crate::config::{OnEmpty, Restart};

/// When workers are restarted, when they count as hanging, and what becomes of their packets.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// When a worker whose process ended is started again.
    pub restart: Restart,
    /// How long a worker that has packets may commit none (`hang_timeout`); zero: without limit.
    pub hang_timeout: Duration,
    /// How long the flows and packets of a lost worker wait for the next worker of the member
    /// (`hold_timeout`); none: they go to the other members at once.
    pub hold: Option<Duration>,
    /// Where packets go while no member takes any.
    pub on_empty: OnEmpty,
    /// How long a worker may take to attach, and to map its segments after that.
    pub start_timeout: Duration,
    /// How long a worker may take to finish its packets, and to end after SIGTERM.
    pub stop_timeout: Duration,
}
