//! The end-to-end harness: real namespaces, veth pairs, traffic and processes, each cleaned up by
//! its `Drop`.
//!
//! In the order in which a test uses the modules:
//!
//! - [`require`] checks whether a test can run here; [`watchdog`] ends a test that hangs.
//! - [`netns`], [`veth`], [`link`]: a private network. [`process`]: a program in it; [`primary`]: a
//!   dispatcher in it.
//! - [`proc`], [`cgroups`]: the kernel's view of the dispatcher and its workers, and cgroups for
//!   them.
//! - [`balance`] checks the sums of a report; [`leftovers`] finds what is left after the end.
//! - [`tmpfs`]: a disk that can be full.
//! - [`capture`], [`traffic`]: packets from a file or synthetic. [`oracle`], [`community_id`]:
//!   where the packets should go, read with etherparse, so that no code is shared with the code
//!   under test.
//! - [`replay`] sends packets, each exactly once, over [`tx`] sockets; [`generator`] makes many in
//!   the kernel.
//! - [`stuck`]: a page that blocks its reader in the kernel. [`meddle`] changes a primary's kernel
//!   objects as other tools could.
//! - [`receiver`]: plain AF_XDP sockets that keep what arrives, by queue.

pub mod balance;
pub mod capture;
pub mod cgroups;
pub mod command;
pub mod community_id;
pub mod generator;
pub mod leftovers;
pub mod link;
pub mod meddle;
pub mod netns;
pub mod oracle;
pub mod primary;
pub mod proc;
pub mod process;
pub mod receiver;
pub mod replay;
pub mod require;
pub mod stuck;
pub mod tmpfs;
pub mod traffic;
pub mod tx;
pub mod veth;
pub mod watchdog;
pub mod witness;
mod xsk;
