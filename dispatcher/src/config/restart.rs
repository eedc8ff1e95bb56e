//! When xfan restarts workers. The settings follow systemd.service(5): `Restart=`, `RestartSec=`,
//! `RestartSteps=`, `StartLimitBurst=` and `StartLimitIntervalSec=`.

use std::time::Duration;

use super::GroupConfig;

/// Which exits of a worker make xfan restart it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// None.
    No,
    /// Every exit except one with status 0.
    OnFailure,
    /// Every exit.
    Always,
}

impl GroupConfig {
    /// The settings about restarts.
    #[must_use]
    pub const fn restart_policy(&self) -> Restart {
        Restart {
            policy: self.restart,
            delay: self.restart_delay,
            limit_burst: self.start_limit_burst,
            limit_interval: self.start_limit_interval,
        }
    }
}

/// How workers are restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// Setting `restart`.
    pub policy: Policy,
    /// Setting `restart_delay`.
    pub delay: Duration,
    /// Setting `start_limit_burst`.
    pub limit_burst: u32,
    /// Setting `start_limit_interval`.
    pub limit_interval: Duration,
}
