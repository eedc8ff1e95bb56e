//! The kernel side of xfan: the XDP program that steers an interface's RX queues into AF_XDP sockets.
//!
//! The program is C, under `src/bpf/`; this crate compiles it into itself and gives it a small typed API:
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
//! // ... and when the sockets are done with:
//! program.detach();
//! for (queue, packets) in program.counters()?.iter().enumerate() {
//!     println!("queue {queue}: {} redirected, {} passed", packets.redirect, packets.passed());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The program stays attached no longer than the process lives: the kernel detaches it when the process ends
//! in whatever way, and the interface's traffic goes to the kernel's stack again.

mod attach;
mod counters;
mod libbpf_log;
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
