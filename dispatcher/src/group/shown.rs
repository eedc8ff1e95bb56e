//! The state of a member, as reports and errors show it.

/// The state of a member, as the report shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Any worker that may attach can take the member.
    Vacant,
    /// Its process runs, and has not attached yet.
    Starting,
    /// Its worker gets packets.
    Running,
    /// Its worker gets packets, and has committed none for half of `hang_timeout`.
    Unhealthy,
    /// Its worker gets no new packets, and finishes those it has.
    Draining,
    /// Its worker left in good order.
    Stopped,
    /// Its worker disconnected unexpectedly, lied, or hung. It may be started again.
    Crashed,
    /// Its worker was started too often, and stays down.
    Failed,
}

impl Shown {
    /// Its name in the report.
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
}
