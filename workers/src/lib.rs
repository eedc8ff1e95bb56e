//! Write a worker of the xfan packet dispatcher: attach, receive packets in place, commit them.
//!
//! A worker is a process of its own. The dispatcher gives it a place in a group (a *member*, such as `default/0`) and
//! with it a share of the flows; all packets of a flow, in both directions, come to the same worker. Packets lie in
//! memory that the dispatcher shares read-only; nothing is copied.
//!
//! ```no_run
//! use std::time::Duration;
//! use xfan_worker::{Received, Worker};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let mut worker = Worker::builder().leave_on_signals().attach()?;
//!     let mut tiny = worker.counter("tiny_packets")?;
//!     loop {
//!         match worker.recv(Duration::from_millis(100))? {
//!             Received::Packets(batch) => {
//!                 for packet in &batch {
//!                     if packet.data().len() < 64 {
//!                         tiny.add(1);
//!                     }
//!                 }
//!                 batch.commit();
//!             }
//!             Received::Idle => {}
//!             Received::Closed => return Ok(()),
//!         }
//!     }
//! }
//! ```
//!
//! `xfan run -i IFACE -n 2 -- ./my-worker` starts two of them; [`Worker::attach`] finds its way through the environment that
//! the dispatcher sets. [`Worker::attach_to`] joins a dispatcher from outside.
//!
//! # What a commit means
//!
//! A packet is the worker's until [`Batch::commit`]; then its memory goes back to the network card. A batch that is dropped
//! instead comes again with the next [`Worker::recv`]; [`Batch::commit_first`] is something of both. What a process that dies had not committed goes to the other workers, with
//! its flows, or to the next in its place, as the dispatcher's configuration says; those packets say so
//! ([`Packet::is_redelivered`]), since it may have seen them.
//!
//! # How a worker ends
//!
//! - The dispatcher stops: [`Received::Closed`], once all packets are committed.
//! - The dispatcher dies: [`RecvError::PrimaryGone`], once all packets are committed. A worker that came by itself may go on with the
//!   next one: [`Worker::reattach`]; so may one that the dispatcher started, if it says so: [`Worker::survival`].
//! - The worker wants to go: [`Worker::request_detach`], or SIGTERM with [`Builder::leave_on_signals`]; then it keeps receiving until
//!   [`Received::Closed`].
//! - The worker stands still for too long: [`RecvError::Evicted`], see [`Batch::is_current`].
//! - The worker is dropped, or dies: the dispatcher sees the connection end and gives its packets to others.
//!
//! # Who watches
//!
//! [`report`] asks a dispatcher for all its counters, without becoming a worker of it.

mod attach;
mod batch;
mod counter;
mod idle;
mod inherited;
mod leave;
mod report;
mod say;
mod worker;

pub use attach::{AttachError, Builder};
pub use batch::{Batch, Packet, Packets};
pub use counter::{Counter, CounterError};
pub use report::{ReportError, report};
pub use say::say;
pub use worker::{RecvError, Worker};
pub use xfan_packet as packet;
pub use xfan_shm::ids::{LaneId, PortId};
pub use xfan_shm::protocol::{RefusalCode, default_socket};

/// Most packets in one batch.
pub const MAX_BATCH: usize = 256;

/// Packets in one batch, unless [`Builder::batch`] says otherwise.
pub const DEFAULT_BATCH: usize = 64;

/// What [`Worker::recv`] found.
#[derive(Debug)]
#[must_use = "packets that are not committed come again"]
pub enum Received<'a> {
    /// At least one packet.
    Packets(Batch<'a>),
    /// Nothing within the timeout, or a signal came: call again.
    Idle,
    /// There will be no more packets, and all there were are committed.
    Closed,
}
