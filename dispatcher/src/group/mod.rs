//! The lifecycle of a group's members. Nothing here does I/O.
//!
//! [`machine`] is the state machine: `step(event, now)` returns actions, which the control thread
//! carries out. [`event`] defines events and actions, [`member`] the states of a member, and
//! `phase` those of the group. The machine handles
//!
//! - in `attachment`: workers that attach, join, and ask to leave;
//! - in `endings`: workers that are lost;
//! - in `orders`: operators' orders;
//! - in `deadlines`: timeouts;
//! - in `stop`: the stop of the primary.
//!
//! [`admission`] decides which member a worker may take. [`starts`] counts the starts of a worker,
//! and decides whether to restart it. [`policy`] holds the settings.

pub mod admission;
mod attachment;
mod deadlines;
pub mod display_state;
mod endings;
pub mod event;
pub mod machine;
pub mod member;
mod orders;
mod phase;
pub mod policy;
pub mod starts;
mod stop;
#[cfg(test)]
mod tests;

pub use display_state::DisplayState;
pub use event::{
    Action, Cause, ConnectionId, Event, Fact, Failure, KillReason, Order, ProcessId, Progress, Refused,
    Ticket,
};
pub use machine::Group;
