//! The kernel side of xfan: the XDP program that redirects the packets of an interface's RX queues
//! to AF_XDP sockets.
//!
//! The program is written in C, under `src/bpf/`. This crate compiles it, embeds the object, and
//! offers a small typed API to load it, attach it, set its rules and read its counters:
//!
//! ```no_run
//! use std::os::fd::RawFd;
//! use xfan_xdp::{PassRule, SteerProgram, XdpMode};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (ifindex, queues) = (2, 4);
//! # let socket_of = |_queue: u32| -> RawFd { 3 };
//! let rules: Vec<PassRule> = vec!["icmp".parse()?, "tcp/22".parse()?];
//! let mut program = SteerProgram::load(queues, &rules, 1792)?;
//! for queue in 0..queues {
//!     program.insert_socket(queue, &socket_of(queue))?;
//! }
//! program.attach(ifindex, "eth1", XdpMode::Native)?;
//! // Later, before the sockets are closed:
//! program.detach();
//! for (queue, packets) in program.counters()?.iter().enumerate() {
//!     println!("queue {queue}: {} redirected, {} passed", packets.redirect, packets.passed());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The kernel detaches the program when the process exits, for whatever reason. From then on, the
//! interface's traffic goes to the kernel's network stack again.

#![deny(unsafe_code)]

#[allow(unsafe_code)] // creates and detaches the link with libbpf's C functions
mod attach;
mod counters;
mod libbpf_log;
#[allow(unsafe_code)] // generated code
mod object;
mod privilege;
mod program;
mod rule;
mod rule_table;

pub use attach::{AttachError, XdpMode};
pub use counters::QueueCounters;
pub use object::OBJECT;
pub use program::{LoadError, MAX_QUEUES, MINIMUM_KERNEL, MapError, SteerProgram};
pub use rule::{PassRule, RuleError};
pub use rule_table::rule_table;
