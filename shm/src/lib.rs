//! Everything that the dispatcher and a worker share, and nothing else.
//!
//! | module | contents |
//! |---|---|
//! | [`segment`] | shared memory that one process writes |
//! | [`layout`] | the layout of a worker's two segments |
//! | [`ids`] | numbers that must not be swapped, each a type of its own |
//! | [`descriptor`] | the 16 bytes that describe a packet |
//! | [`ring`] | the single-producer, single-consumer ring of descriptors |
//! | [`doorbell`] | the decision whether a sleeper must be woken |
//! | [`bell`] | the socket that a sleeper blocks on |
//! | [`protocol`] | messages on the control socket |
//! | [`clock`] | time stamps and busy time |
//! | [`limits`] | error texts that name the limit of open files |
//!
//! No two processes write to the same memory. The dispatcher writes a worker's *down* segment, the
//! worker writes its *up* segment, and each maps the other's segment read-only.

#![deny(unsafe_code)]

#[cfg(not(loom))]
pub mod bell;
#[allow(unsafe_code)] // reads the time stamp counter
#[cfg(not(loom))]
pub mod clock;
#[allow(unsafe_code)] // converts between fields and words
pub mod descriptor;
pub mod doorbell;
pub mod ids;
#[allow(unsafe_code)] // turns mapped bytes into atomics
#[cfg(not(loom))]
pub mod layout;
#[cfg(not(loom))]
pub mod limits;
#[allow(unsafe_code)] // writes frames and fills slots
#[cfg(all(test, loom))]
mod models;
#[allow(unsafe_code)] // receives descriptors with recvmsg(2)
#[cfg(not(loom))]
pub mod protocol;
#[allow(unsafe_code)] // fills reserved slots
pub mod ring;
#[allow(unsafe_code)] // maps memory
#[cfg(not(loom))]
pub mod segment;
pub(crate) mod sync;

pub use descriptor::Descriptor;
