//! The end-to-end harness: real namespaces, veth pairs, traffic and processes, each put away by its own `Drop`.
//!
//! In the order in which a test uses them:
//!
//! - [`require`]: may this test run here, and if not, why; [`watchdog`]: no test hangs for ever.
//! - [`netns`], [`veth`], [`link`]: a network of one's own. [`process`]: a program in it; [`primary`]: a dispatcher in it.
//! - [`proc`], [`cgroups`]: what the kernel says of it and its workers, and the cgroups that it may have.
//! - [`balance`]: do its numbers add up; [`leftovers`]: what is still there after its end.
//! - [`tmpfs`]: a disk that is full.
//! - [`capture`], [`traffic`]: packets from a file or made up. [`oracle`], [`community_id`]: what they should lead to,
//!   read with etherparse, so that it shares no code with what is tested.
//! - [`replay`] sends packets, each exactly once, over [`tx`] sockets; [`generator`] makes many in the kernel.
//! - [`stuck`]: a page that the kernel waits for. [`meddle`]: what other tools may do to a primary's kernel objects.
//! - [`receiver`]: plain AF_XDP sockets that keep what arrives, queue by queue.

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
