//! What the control thread asks of a lane.

use xfan_shm::ids::{GroupId, MemberId};

use super::buckets::BucketTable;
use super::link::MemberLink;

/// A command. The lane carries it out between two batches.
#[derive(Debug)]
pub enum Command {
    /// Serve a worker. It gets packets once the table says so, and at once those that were held for
    /// its member.
    Join {
        /// The group it joins.
        group: GroupId,
        /// The member it takes, which has no worker.
        member: MemberId,
        /// The lane's end of the ring to it.
        link: Box<MemberLink>,
    },
    /// Use this table from now on.
    Steer {
        /// The group whose table it is.
        group: GroupId,
        /// The table.
        table: Box<BucketTable>,
    },
    /// A member's worker is gone: keep what it has not committed, and new packets of its flows,
    /// until another worker joins as this member.
    Hold {
        /// The group.
        group: GroupId,
        /// The member.
        member: MemberId,
    },
    /// Forget a member's worker, and use this table from now on. What the worker has not committed
    /// goes to the members that take its flows, before any newer packet of them.
    Retire {
        /// The group.
        group: GroupId,
        /// The member.
        member: MemberId,
        /// The group's table without the member.
        table: Box<BucketTable>,
    },
    /// Raise the `drained` flag of the counters when the RX ring has been found empty.
    Drain,
    /// End, retiring every member of every group.
    Stop,
}
