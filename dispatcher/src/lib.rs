//! The primary of xfan: it owns the AF_XDP sockets of an interface and dispatches the packets to
//! worker processes.
//!
//! The modules, in the order in which a packet passes them. Each module depends only on those above
//! it, and on the last row.
//!
//! | module | contents |
//! |---|---|
//! | [`config`] | settings: file, flags, validation |
//! | [`host`] | the machine: interface, topology, CPUs, capabilities, system calls |
//! | [`memory`] | packet memory, and the ledger of the owner of each frame |
//! | [`port`] | an interface: XDP program, AF_XDP sockets and rings, monitoring |
//! | [`lane`] | the thread of one RX queue: receive, hash, dispatch |
//! | [`group`] | the lifecycle of members and their restarts, without I/O |
//! | [`process`] | worker processes: start, confinement, output |
//! | [`control`] | the control thread and its socket |
//! | [`start`] | from a configuration to a running primary |
//! | [`exit`], [`cli`] | exit codes and command line |
//! | [`text`], [`print`](mod@print), [`report`], [`log`](mod@log) | output; `log` needs [`host`] |
//!
//! `unsafe` is denied. The files that need it allow it, and say why.

#![deny(unsafe_code)]

pub mod cli;
pub mod config;
pub mod control;
pub mod exit;
pub mod group;
pub mod host;
pub mod lane;
pub mod log;
pub mod memory;
pub mod port;
pub mod print;
pub mod process;
pub mod report;
pub mod start;
pub mod text;
