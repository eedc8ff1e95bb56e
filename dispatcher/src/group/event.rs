//! What happens to a group, and what the group wants done about it.

use std::time::Duration;

use xfan_shm::ids::MemberId;

use crate::group::shown::Shown;
use crate::lane::BucketTable;

/// Number of a connection, never used again.
pub type ConnectionId = u64;

/// A worker process, by its process id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(pub u32);

/// Number of a change that the lanes acknowledge. It grows with each change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What an operator wants a worker to leave for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To stay down until an operator starts it again.
    StayDown,
    /// To be started again.
    StartAgain,
    /// To free the member for any worker.
    FreeMember,
}

/// What a worker has done so far, as its lanes and its segment say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Packets that it has committed.
    pub committed: u64,
    /// Its heartbeat.
    pub heartbeat: u64,
    /// Packets in its rings.
    pub backlog: u64,
}

/// Something happened. An event about a connection or a process that is gone changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The primary starts, and the member needs a process.
    Start(MemberId),
    /// A process was started, as [`Action::Spawn`] asked.
    Spawned(MemberId, ProcessId),
    /// No process could be started.
    SpawnFailed(MemberId),
    /// A process that an earlier primary started is to be the member's.
    Adopted(MemberId, ProcessId),
    /// A process that an earlier primary started is not wanted.
    Unwanted(ProcessId),
    /// A worker was given segments through this connection.
    Attaching(MemberId, ConnectionId),
    /// A worker of another protocol version wanted to attach.
    Incompatible(MemberId),
    /// The worker of this connection has mapped its segments.
    Joined(ConnectionId),
    /// The worker wants to leave.
    Detach(ConnectionId),
    /// The connection ended, or its worker was refused.
    HungUp(ConnectionId),
    /// The process ended, with or without success; none: unknown.
    Exited(ProcessId, Option<bool>),
    /// A lane read an index that no honest worker can have written.
    Lied(MemberId),
    /// Ringing the bell of the worker's session was slow several times in a row.
    SlowedBell(MemberId),
    /// How far the member's worker has come.
    Observed(MemberId, Reading),
    /// All lanes have carried out the changes up to this one.
    Obeyed(Ticket),
    /// The XDP program is attached: packets may come.
    Opened,
    /// An operator wants the member's worker to leave.
    Order(MemberId, Purpose),
    /// An operator wants a process for a vacant member.
    Add(MemberId),
    /// The primary stops: no worker is started or attached any more.
    Stop,
    /// The RX rings are empty: workers get no more packets.
    Finish,
    /// A second signal: do not wait for the workers.
    Hurry,
    /// A deadline may have passed.
    Tick,
}

/// What the executor must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a process; the answer is [`Event::Spawned`] or [`Event::SpawnFailed`].
    Spawn(MemberId),
    /// Send SIGTERM.
    Terminate(ProcessId),
    /// Kill the process, and take its right to attach away.
    Kill(ProcessId),
    /// The process has ended: let go of what belongs to it.
    Forget(ProcessId),
    /// End the connection of a worker that has not joined.
    HangUp(MemberId, ConnectionId),
    /// Have the lanes serve the member's worker.
    Join(MemberId),
    /// End the session of the member's worker.
    EndSession {
        /// Whose.
        member: MemberId,
        /// The worker must not touch packets any more.
        lost: bool,
    },
    /// Tell the worker that its rings get no more packets.
    Close(MemberId),
    /// Have the lanes use a table.
    Steer(Ticket, Box<BucketTable>),
    /// Have the lanes keep what the member's worker has not committed, and what comes for it.
    Hold(Ticket, MemberId),
    /// Have the lanes use a table, and requeue what the member's worker has not committed.
    Retire(Ticket, MemberId, Box<BucketTable>),
    /// Write a fact to the log and the event history.
    Record(MemberId, Fact),
    /// End the primary.
    Fail(Failure),
}

/// Why something happened to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its process ended.
    Exited,
    /// Its connection ended.
    HungUp,
    /// Its consumer index was impossible.
    Lied,
    /// Its bell was slow to ring.
    SlowBell,
    /// It committed no packet within `hang_timeout`.
    Hung,
    /// It did not leave within `stop_timeout`.
    Overdue,
    /// It was started by an earlier primary, and has not attached to this one.
    NotFound,
    /// The worker asked.
    Asked,
    /// An operator ordered it.
    Ordered,
    /// An operator ordered a restart.
    Restart,
    /// The primary stops.
    Stopping,
}

/// Why a process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It attached too often.
    AttachesAgain,
    /// It has not attached within `start_timeout`.
    NotAttached,
    /// It has not ended after SIGTERM.
    Deaf,
    /// The primary was told to stop a second time.
    Hurried,
}

/// Something that the log and the event history tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A process was started, or adopted.
    Started {
        /// An earlier primary started it.
        adopted: bool,
    },
    /// A worker attached.
    Attached,
    /// It gets the packets that were held.
    Resumed,
    /// It has packets, and has committed none for this time.
    Stalled(Duration),
    /// It commits packets again.
    Recovered,
    /// It gets no new packets.
    Draining(Cause),
    /// It left in good order.
    Left(Cause),
    /// It was lost.
    Died(Cause),
    /// It is not started again.
    GivenUp {
        /// It was started too often; else it could not be started.
        too_often: bool,
    },
    /// The member is free for any worker.
    Vacated(Cause),
    /// It counts as hanging after this time.
    Hung(Duration),
    /// Its process is killed.
    Killed(Reason),
    /// It was not ready within `start_timeout`.
    NotReady,
    /// It disconnected before it was ready.
    GoneEarly,
    /// No worker came within `hold_timeout`.
    HoldExpired,
    /// Its process is started again.
    Restarting,
}

/// Why the group cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No process could be started.
    Spawn(MemberId),
    /// The process ended before it attached.
    EndedEarly(MemberId),
    /// It has not attached within `start_timeout`.
    NotAttached(MemberId),
    /// It speaks another protocol version.
    Incompatible(MemberId),
    /// No worker is left, and none will be started.
    NoneLeft(MemberId),
}

/// The group does not do this now. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The primary has not opened yet.
    #[error("the group is still starting")]
    Starting,
    /// The primary stops.
    #[error("the group is stopping")]
    Stopping,
    /// The member has no worker.
    #[error("the member has no worker")]
    NoWorker,
    /// The member has a worker.
    #[error("the member has a worker")]
    Occupied,
    /// Its worker is leaving already.
    #[error("the member is leaving already")]
    Leaving,
    /// Its worker was not started by the primary.
    #[error("the primary did not start the worker")]
    Foreign,
    /// This cannot happen to a member in this state.
    #[error("this cannot happen to a member that is {}", .0.name())]
    Illegal(Shown),
    /// There is no such member.
    #[error("there is no such member")]
    Unknown,
}
