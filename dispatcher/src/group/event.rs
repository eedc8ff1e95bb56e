//! The input and the output of a group's state machine.
//!
//! The control thread reports each [`Event`] to the group, and carries out the [`Action`]s that the
//! group returns.

use std::time::Duration;

use xfan_shm::ids::MemberId;

use crate::group::display_state::DisplayState;
use crate::lane::BucketTable;

/// The number of a connection. No other connection of the primary gets the same number.
pub type ConnectionId = u64;

/// The process id of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(pub u32);

/// The sequence number of a change that the lanes acknowledge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// An operator's order to a member's worker. In each case the worker leaves first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The worker stays down until an operator starts it again.
    Drain,
    /// The primary starts the worker again.
    Restart,
    /// The member becomes vacant.
    Remove,
}

/// How far a worker has come, according to its lanes and its up segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The number of packets that it has committed.
    pub committed: u64,
    /// Its heartbeat.
    pub heartbeat: u64,
    /// The number of packets in its rings.
    pub backlog: u64,
}

/// An input of the state machine. An event about a connection or a process that no longer exists
/// changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The primary is starting, and the member needs a process.
    Start(MemberId),
    /// The process that [`Action::Spawn`] asked for is running.
    Spawned(MemberId, ProcessId),
    /// The process that [`Action::Spawn`] asked for could not be started.
    SpawnFailed(MemberId),
    /// The member takes over a process that an earlier primary started.
    Adopted(MemberId, ProcessId),
    /// An earlier primary started this process, and no member takes it over.
    Unwanted(ProcessId),
    /// The worker of this connection attached to the member, and got its segments.
    Attaching(MemberId, ConnectionId),
    /// A worker with another protocol version tried to attach to the member.
    Incompatible(MemberId),
    /// The worker of this connection has mapped its segments.
    Joined(ConnectionId),
    /// The worker of this connection asked to leave.
    Detach(ConnectionId),
    /// The connection was closed, or its worker was refused.
    Disconnected(ConnectionId),
    /// The process exited; `Some(true)`: with status 0; `None`: its exit status is unknown.
    Exited(ProcessId, Option<bool>),
    /// A lane read a consumer index that no correct worker can have written.
    ImpossibleIndex(MemberId),
    /// Several wake-ups of the member's worker in a row took too long.
    SlowBell(MemberId),
    /// The current progress of the member's worker.
    Observed(MemberId, Progress),
    /// All lanes have acknowledged this change and all earlier ones.
    Acknowledged(Ticket),
    /// The XDP program is attached.
    Opened,
    /// An operator gave an order about the member's worker.
    Order(MemberId, Order),
    /// An operator wants the primary to start a process for a vacant member.
    Add(MemberId),
    /// The primary is stopping. From now on no worker is started or attaches.
    Stop,
    /// The lanes have emptied their RX rings: workers get no more packets.
    Finish,
    /// The primary got a second stop signal: it must not wait for the workers.
    ForceStop,
    /// A deadline may have passed.
    Tick,
}

/// An output of the state machine. The executor carries actions out in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a process. The executor answers with [`Event::Spawned`] or [`Event::SpawnFailed`].
    Spawn(MemberId),
    /// Send SIGTERM to the process.
    Terminate(ProcessId),
    /// Send SIGKILL to the process, and revoke its right to attach.
    Kill(ProcessId),
    /// Release all resources of a process that has exited.
    Forget(ProcessId),
    /// Close the connection of a worker that has not joined yet.
    Disconnect(MemberId, ConnectionId),
    /// Make the lanes serve the member's worker.
    Join(MemberId),
    /// End the session of the member's worker.
    EndSession {
        /// The member.
        member: MemberId,
        /// The worker must not access packets any more. Otherwise it may finish those it has.
        revoke: bool,
    },
    /// Tell the worker that its rings hold its last packets.
    Close(MemberId),
    /// Make the lanes use this table.
    Steer(Ticket, Box<BucketTable>),
    /// Make the lanes hold the uncommitted packets of the member's worker, and new packets of its
    /// flows.
    Hold(Ticket, MemberId),
    /// Make the lanes use this table, and requeue the uncommitted packets of the member's worker.
    Retire(Ticket, MemberId, Box<BucketTable>),
    /// Write a fact to the log and to the event history.
    Record(MemberId, Fact),
    /// End the primary with this failure.
    Fail(Failure),
}

/// Why a worker left or was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its process exited.
    Exited,
    /// Its connection was closed.
    Disconnected,
    /// It stored an impossible consumer index.
    ImpossibleIndex,
    /// Waking it took too long, several times in a row.
    SlowBell,
    /// It had packets, and committed none within `hang_timeout`.
    Hung,
    /// It did not leave within `stop_timeout`.
    StopTimeout,
    /// An earlier primary started it, and it did not attach to this one.
    NotReattached,
    /// It asked to leave.
    Requested,
    /// An operator ordered it to leave.
    Ordered,
    /// An operator ordered a restart.
    Restart,
    /// The primary is stopping.
    Stopping,
}

/// Why a process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    /// It attached too often.
    AttachedTooOften,
    /// It did not attach within `start_timeout`.
    NotAttached,
    /// It did not exit after SIGTERM.
    IgnoredSigterm,
    /// The primary got a second stop signal.
    ForcedStop,
}

/// A fact about a member, for the log and the event history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The primary started or adopted a process for the member.
    Started {
        /// An earlier primary started the process.
        adopted: bool,
    },
    /// A worker attached and joined.
    Attached,
    /// The new worker gets the packets that were held for the member.
    Resumed,
    /// The worker has packets, and has committed none for this time.
    Stalled(Duration),
    /// The worker commits packets again.
    Recovered,
    /// The worker gets no new packets.
    Draining(Cause),
    /// The worker left in good order.
    Left(Cause),
    /// The worker was lost.
    Died(Cause),
    /// The worker is not started again.
    GivenUp {
        /// It was started too often. Otherwise it could not be started.
        too_often: bool,
    },
    /// The member is vacant: any worker may take it.
    Vacated(Cause),
    /// The worker is evicted because it committed no packet for this time.
    Hung(Duration),
    /// The worker's process is killed.
    Killed(KillReason),
    /// The worker was not ready within `start_timeout`.
    NotReady,
    /// The worker disconnected before it was ready.
    DisconnectedEarly,
    /// No worker attached within `hold_timeout`.
    HoldExpired,
    /// The primary starts the worker's process again.
    Restarting,
}

/// Why the primary must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The member's process could not be started.
    Spawn(MemberId),
    /// The member's process exited before it attached.
    EndedEarly(MemberId),
    /// The member's process did not attach within `start_timeout`.
    NotAttached(MemberId),
    /// The member's worker uses another protocol version.
    Incompatible(MemberId),
    /// No worker is left, and none will be started. The member's was the last.
    NoneLeft(MemberId),
}

/// The group refuses an event. Its state is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The primary has not attached the XDP program yet.
    #[error("the group is still starting")]
    Starting,
    /// The primary is stopping.
    #[error("the group is stopping")]
    Stopping,
    /// The member has no worker.
    #[error("the member has no worker")]
    NoWorker,
    /// The member has a worker.
    #[error("the member has a worker")]
    Occupied,
    /// The member's worker is already leaving.
    #[error("the member is leaving already")]
    Leaving,
    /// The primary did not start the member's worker.
    #[error("the primary did not start the worker")]
    Unsupervised,
    /// The event is not possible in the member's state.
    #[error("this cannot happen to a member that is {}", .0.name())]
    Illegal(DisplayState),
    /// The member does not exist.
    #[error("there is no such member")]
    Unknown,
}
