//! The state of a member, as reports and errors show it.

/// The state of a member, as reports and errors show it. It has fewer details than the state
/// machine's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DisplayState {
    /// Any worker that may attach can take the member.
    Vacant,
    /// The member's process runs, and has not attached yet.
    Starting,
    /// The worker gets packets.
    Running,
    /// The worker gets packets, and has committed none for half of `hang_timeout`.
    Unhealthy,
    /// The worker gets no new packets, and finishes those it has.
    Draining,
    /// The worker left in good order.
    Stopped,
    /// The worker disconnected unexpectedly, failed, or was evicted. It may be started again.
    Crashed,
    /// The worker was started too often, or could not be started, and stays down.
    Failed,
}

impl DisplayState {
    /// The name of the state in the report.
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
