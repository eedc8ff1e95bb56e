//! All that the dispatcher and a worker share, and nothing else.
//!
//! | module | noun |
//! |---|---|
//! | [`segment`] | a piece of shared memory with one writing process |
//! | [`layout`] | where things lie in the two segments of a worker |
//! | [`ids`] | numbers that must not be swapped |
//! | [`descriptor`] | 16 bytes that stand for a packet |
//! | [`ring`] | the single-producer, single-consumer ring that descriptors travel through |
//! | [`doorbell`] | who must be woken, and that it is once |
//! | [`bell`] | what the sleeper blocks on |
//! | [`protocol`] | the conversation on the control socket |
//! | [`clock`] | time stamps and busy time |
//! | [`limits`] | which limit of open files was reached |
//!
//! Two processes write no word in common: the dispatcher writes a worker's *down* segment, the worker its
//! *up* segment, and each maps the other's read-only.

#[cfg(not(loom))]
pub mod bell;
#[cfg(not(loom))]
pub mod clock;
pub mod descriptor;
pub mod doorbell;
pub mod ids;
#[cfg(not(loom))]
pub mod layout;
#[cfg(not(loom))]
pub mod limits;
#[cfg(all(test, loom))]
mod models;
#[cfg(not(loom))]
pub mod protocol;
pub mod ring;
#[cfg(not(loom))]
pub mod segment;
pub(crate) mod sync;

pub use descriptor::Descriptor;
