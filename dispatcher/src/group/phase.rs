//! The phases of a group, from its start to its stop.

use std::time::Instant;

use crate::group::event::Ticket;

/// The phase of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The first workers are starting. The XDP program is not attached yet.
    Starting,
    /// The XDP program is attached. The group opens once the lanes have acknowledged this change.
    Opening(Ticket),
    /// The lanes use the group's table.
    Open,
    /// The primary is stopping.
    Stopping(Stopping),
}

/// The steps of a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopping {
    /// The lanes are dispatching the packets that are left on their RX rings.
    Emptying,
    /// Workers may finish their packets until this time.
    Finishing(Instant),
    /// Processes got SIGTERM, and may exit until this time.
    Terminating(Instant),
    /// Processes got SIGKILL, and may exit until this time.
    Killing(Instant),
    /// The stop is complete.
    Over,
}
