//! When workers are restarted: the settings of systemd.service(5), `Restart=`, `RestartSec=`,
//! `RestartSteps=`, `StartLimitBurst=` and `StartLimitIntervalSec=`.

use std::time::Duration;

/// Which ends of a worker's process make it start again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// None.
    No,
    /// Every one but an exit with status 0.
    OnFailure,
    /// Every one.
    Always,
}

impl Policy {
    pub(crate) const ALL: [Self; 3] = [Self::No, Self::OnFailure, Self::Always];

    /// Its name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        }
    }
}

/// How workers are restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// After which ends.
    pub policy: Policy,
    /// The wait before the first restart; each one that follows soon waits twice as long as the one before, up to a minute.
    pub delay: Duration,
    /// Most starts …
    pub limit_burst: u32,
    /// … in this time. After one more end the worker stays down.
    pub limit_interval: Duration,
}
