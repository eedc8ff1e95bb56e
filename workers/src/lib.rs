//! The worker SDK of the xfan packet dispatcher: attach, receive packets in place, commit them.
//!
//! A worker is a process of its own. The dispatcher makes it a *member* of a group, such as
//! `default/0`, and sends it a share of the flows. All packets of a flow, in both directions, go to
//! the same worker. The worker reads packets in memory that the dispatcher shares read-only:
//! nothing is copied.
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
//! `xfan run -i IFACE -n 2 -- ./my-worker` starts two such workers. [`Worker::attach`] reads the
//! environment that the dispatcher sets for them. [`Worker::attach_to`] joins a running dispatcher
//! from outside.
//!
//! # What a commit means
//!
//! A packet belongs to the worker until [`Batch::commit`] gives its frame back to the dispatcher.
//! Dropping a batch commits nothing: the next [`Worker::recv`] returns the same packets again.
//! [`Batch::commit_first`] commits a part of a batch.
//!
//! When a worker dies, the packets that it had not committed go, together with its flows, to the
//! other workers or to the next worker of the same member, as the dispatcher's configuration says.
//! The dead worker may have processed these packets: [`Packet::is_redelivered`] marks them.
//!
//! # How a worker ends
//!
//! - **The dispatcher stops.** [`Worker::recv`] returns [`Received::Closed`] once all packets are
//!   committed.
//! - **The dispatcher dies.** [`Worker::recv`] returns [`RecvError::PrimaryGone`] once all packets
//!   are committed. A worker that attached on its own may join the next dispatcher with
//!   [`Worker::reattach`]. A worker that the dispatcher started may do so if [`Worker::survival`]
//!   says so.
//! - **The worker asks to leave**, by [`Worker::request_detach`] or, with
//!   [`Builder::leave_on_signals`], on SIGTERM. It keeps receiving until [`Received::Closed`].
//! - **The worker hangs.** The dispatcher evicts it, and [`Worker::recv`] returns
//!   [`RecvError::Evicted`]. See [`Batch::is_current`].
//! - **The worker is dropped or dies.** The dispatcher sees the connection close and gives the
//!   uncommitted packets to other workers.
//!
//! # Monitoring
//!
//! [`report`] asks a dispatcher for all its counters without becoming a worker.

#![deny(unsafe_code)]

mod attach;
#[allow(unsafe_code)] // reads packet memory
mod batch;
mod connection;
mod counter;
mod error;
mod idle;
#[allow(unsafe_code)] // takes over a descriptor by its number
mod inherited;
mod leave;
#[allow(unsafe_code)] // prefetches packet data
mod receiver;
mod report;
mod say;
mod worker;

pub use attach::Builder;
pub use batch::{Batch, Packet, Packets, Received};
pub use counter::{Counter, CounterError};
pub use error::{AttachError, RecvError};
pub use report::{ReportError, report};
pub use say::say;
pub use worker::Worker;
pub use xfan_packet as packet;
pub use xfan_shm::ids::{LaneId, PortId};
pub use xfan_shm::protocol::{RefusalCode, default_socket};

/// Upper limit of [`Builder::batch`], in packets. A worker keeps a private copy of the batch's
/// descriptors: 256 of them take 4 KiB, an eighth of a usual L1 data cache.
pub const MAX_BATCH: usize = 256;

/// Largest number of packets in a batch, unless [`Builder::batch`] sets another. It equals the
/// largest number of packets that a lane receives at once.
pub const DEFAULT_BATCH: usize = 64;
