//! The primary of xfan: it owns an interface's AF_XDP sockets and dispatches packets to worker
//! processes.
//!
//! The rooms, in the order in which a packet and its administration pass them. Each depends only on
//! those above it, and on [`text`] and [`report`].
//!
//! | room | what is in it |
//! |---|---|
//! | [`config`] | settings: file, flags, validation |
//! | [`host`] | the machine: interface, topology, CPUs, capabilities, system calls |
//! | [`memory`] | packet memory, and the ledger of who owns each frame |
//! | [`port`] | an interface: XDP program, AF_XDP sockets and rings, and the watch over it |
//! | [`lane`] | one RX queue's thread: receive, hash, push |
//! | [`group`] | members, decided without I/O: lifecycle, restarts |
//! | [`process`] | worker processes: start, confinement, output |
//! | [`control`] | the control thread and its socket |
//!
//! [`start`] puts them together; [`cli`] and [`exit`] are the command's face, [`log`](mod@log) and
//! [`print`](mod@print) its voice.

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
