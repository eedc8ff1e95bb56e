//! The errors of attaching and of receiving.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use xfan_shm::ids::{LaneId, UmemOffset};
use xfan_shm::layout::LayoutError;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{ENV_CONTROL_FD, ENV_SOCKET, ProtocolError, RefusalCode};

use crate::MAX_BATCH;

/// Longest time the dispatcher may take to answer a request. A healthy dispatcher answers within
/// milliseconds, also on a loaded machine: after 10 s something is wrong with it.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a worker could not attach.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Neither the environment nor the program names a control socket.
    #[error(
        "no control socket: {ENV_SOCKET} is not set. `xfan run … -- COMMAND` sets it for the workers it starts; \
         to join a running dispatcher, name its socket, such as /run/xfan/IFACE.sock"
    )]
    NoSocket,
    /// The socket does not exist, or nothing listens on it.
    #[error(
        "no dispatcher listens on {0}: start one with `xfan run -i IFACE …`, or name the socket of the one that runs"
    )]
    NoDispatcher(PathBuf),
    /// The permissions of the socket or of its directory deny access.
    #[error(
        "no permission to connect to {0}: run as the user or group that owns the socket and may enter its directory, or as root"
    )]
    Permission(PathBuf),
    /// The connection failed for another reason.
    #[error("cannot connect to {}: {}", .0.display(), explained(.1))]
    Connect(PathBuf, #[source] io::Error),
    /// The environment names an inherited descriptor that is not a connection to a dispatcher.
    #[error(
        "{ENV_CONTROL_FD} names descriptor {number} as the connection to the dispatcher, but {reason}: the program that starts \
         this worker for `xfan run` must leave that descriptor open"
    )]
    Inherited {
        /// The value of the environment variable.
        number: String,
        /// What is wrong with that descriptor.
        reason: String,
    },
    /// The dispatcher refused the worker.
    #[error("the dispatcher refused this worker: {message}")]
    Refused {
        /// The kind of refusal, for programs.
        code: RefusalCode,
        /// The dispatcher's reason: a sentence for people.
        message: String,
    },
    /// The dispatcher accepted the connection, but did not answer within 10 seconds.
    #[error(
        "{0} did not answer within {seconds} s: read the dispatcher's log to see whether it still works",
        seconds = ANSWER_TIMEOUT.as_secs()
    )]
    NoAnswer(PathBuf),
    /// A message could not be exchanged.
    #[error("the exchange with {0} failed: {1}")]
    Protocol(PathBuf, #[source] ProtocolError),
    /// The reply does not match the request.
    #[error("{0} sent an unexpected reply: check that an xfan dispatcher of the same release listens there")]
    Unexpected(PathBuf),
    /// A segment does not have the layout that the dispatcher announced.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The worker's own segment cannot be sealed.
    #[error("cannot seal this worker's segment: {0}; the kernel must be Linux 5.1 or later")]
    Seal(#[source] io::Error),
    /// The packet memory cannot be mapped.
    #[error("cannot map the packet memory: {}", explained(.0))]
    Umem(#[source] io::Error),
    /// The calling thread cannot be pinned to the core that the dispatcher assigned.
    #[error(
        "cannot run on core {0}, which the dispatcher assigned to this worker: the core is offline or outside this \
         process's cpuset (see `taskset -p`); choose other cores with `xfan run --cores`"
    )]
    Core(usize),
    /// The batch size is out of range.
    #[error("a batch cannot hold {0} packets: the batch size must be 1 to {MAX_BATCH}")]
    Batch(usize),
    /// A signal asked the worker to leave while it waited for the next dispatcher.
    #[error("a signal asked this worker to leave while it waited for a dispatcher")]
    Leaving,
    /// The signal handlers cannot be installed.
    #[error("cannot install handlers for SIGTERM and SIGINT: {}", explained(.0))]
    Signals(#[source] io::Error),
}

impl AttachError {
    /// Whether the dispatcher refused the requested member, but may accept another.
    pub(crate) fn is_about_the_member(&self) -> bool {
        use RefusalCode::{Forbidden, Occupied, UnknownMember};
        matches!(self, AttachError::Refused { code: Forbidden | Occupied | UnknownMember, .. })
    }

    /// Whether a later attempt may succeed: the dispatcher has not started yet, is stopping, or has
    /// no vacant member at the moment.
    pub(crate) fn is_temporary(&self) -> bool {
        use RefusalCode::{Closing, Occupied};
        match self {
            AttachError::NoDispatcher(_) | AttachError::NoAnswer(_) | AttachError::Permission(_) => true,
            AttachError::Protocol(_, error) => matches!(error, ProtocolError::Closed),
            AttachError::Refused { code, .. } => matches!(code, Closing | Occupied),
            _ => false,
        }
    }
}

/// Why [`Worker::recv`](crate::Worker::recv) or
/// [`Worker::request_detach`](crate::Worker::request_detach) failed.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The dispatcher died or closed the connection. The worker has committed all packets that it
    /// had received.
    #[error("the dispatcher is gone: it died or closed the connection")]
    PrimaryGone,
    /// The dispatcher ended this worker's membership, because the worker hung or did not leave when
    /// asked to. The packets now belong to other workers, and their frames may be overwritten: data
    /// read from the last batch may belong to other packets.
    #[error(
        "the dispatcher has ended this worker's membership, because the worker hung or did not leave when asked to; \
         its packets went to other workers"
    )]
    Evicted,
    /// A descriptor points outside the packet memory. Nothing behind it in that lane's ring can be
    /// received.
    #[error(
        "lane {lane} sent a corrupt descriptor: {length} bytes at offset {offset}, but the packet memory has {umem_bytes} bytes. \
         This is a bug in the dispatcher; please report it"
    )]
    Corrupt {
        /// The lane whose ring holds the descriptor.
        lane: LaneId,
        /// Offset of the packet according to the descriptor, in bytes.
        offset: UmemOffset,
        /// Length of the packet according to the descriptor, in bytes.
        length: u16,
        /// Length of the packet memory, in bytes.
        umem_bytes: usize,
    },
    /// A system call failed. The text says what the worker attempted.
    #[error("cannot {0}: {1}")]
    System(&'static str, #[source] io::Error),
}
