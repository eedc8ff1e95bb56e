//! How far a group has come, from its start to its stop.

use std::time::Instant;

use crate::group::event::Ticket;

/// How far the group has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Workers are being started, and no packets come.
    Starting,
    /// Packets come once the lanes have carried out this change.
    Opening(Ticket),
    /// Packets come.
    Open,
    /// The primary stops.
    Stopping(Stopping),
}

/// How far the stop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopping {
    /// The lanes hand out what is on the RX rings.
    Emptying,
    /// Workers finish their packets, until this time.
    Finishing(Instant),
    /// Processes have got SIGTERM, and may take until this time.
    Terminating(Instant),
    /// Processes were killed, and may take until this time.
    Killing(Instant),
    /// Nothing is left to wait for.
    Over,
}
