//! Groups: what happens to their members. Everything here is decided without I/O.
//!
//! [`machine`] is the state machine: `step(event, now)` returns actions, which the control thread
//! carries out. [`event`] defines both, [`member`] the states of a member, `phase` those of the
//! group. Parts of the machine:
//! `attachment` (workers join), `endings` (a worker is lost), `orders` (operators), `deadlines`,
//! and `stop`. [`admission`] decides which member a worker may become. [`policy`] holds the
//! settings, [`restart`] counts starts.

pub mod admission;
mod attachment;
mod deadlines;
mod endings;
pub mod event;
pub mod machine;
pub mod member;
mod orders;
mod phase;
pub mod policy;
pub mod restart;
pub mod shown;
mod stop;
#[cfg(test)]
mod tests;

pub use event::{
    Action, Cause, ConnectionId, Event, Fact, Failure, ProcessId, Purpose, Reading, Reason, Refused, Ticket,
};
pub use machine::Group;
pub use shown::Shown;
