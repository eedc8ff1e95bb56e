//! The errors that end a primary.

use std::time::Duration;

use xfan_shm::limits::explained;

use crate::process::spawn::SpawnError;

/// Why a primary ended.
#[derive(Debug, thiserror::Error)]
pub enum PrimaryError {
    /// A worker cannot be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A worker ended before it attached.
    #[error(
        "worker {member} ({program}) ended before it attached: {how}. Run it by hand to see why; \
         a worker must attach to the socket named in XFAN_SOCKET"
    )]
    EndedEarly {
        /// Its member, such as `default/0`.
        member: String,
        /// Its program.
        program: String,
        /// Exit status or signal.
        how: String,
    },
    /// A worker did not attach in time.
    #[error(
        "worker {member} ({program}) has not attached within {timeout:?}: is it an xfan worker? If it needs longer, \
         raise start_timeout"
    )]
    NotAttached {
        /// Its member, such as `default/0`.
        member: String,
        /// Its program.
        program: String,
        /// `start_timeout`.
        timeout: Duration,
    },
    /// A worker was refused.
    #[error("worker {member} ({program}) was refused: {reason}")]
    Refused {
        /// Its member, such as `default/0`.
        member: String,
        /// Its program.
        program: String,
        /// The sentence that the worker got.
        reason: String,
    },
    /// No supervised worker is left.
    #[error("no worker is left: the last one, {member}, ended ({how})")]
    NoneLeft {
        /// Its member, such as `default/0`.
        member: String,
        /// Exit status or signal.
        how: String,
    },
    /// The interface is gone.
    #[error(
        "interface {0} has vanished: it was removed, or moved to another network namespace; start xfan \
         again once it is back"
    )]
    Vanished(String),
    /// A lane's thread ended by itself.
    #[error("the lane of queue {0} ended unexpectedly: this is a bug of xfan")]
    LaneEnded(xfan_shm::ids::QueueId),
    /// The port failed.
    #[error(transparent)]
    Port(#[from] crate::port::PortError),
    /// The runtime failed.
    #[error("control thread: {}", explained(.0))]
    Io(#[from] std::io::Error),
}
