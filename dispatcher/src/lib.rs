//! The primary of xfan: it owns an interface's AF_XDP sockets, and dispatches packets to worker processes.
//!
//! As packets go: [`port`] takes the interface in a [`mode`], [`xsk`] its sockets, [`umem`] the packet memory; a [`lane`] for each queue
//! receives ([`source`]), hashes and steers ([`steer`]), and keeps book of [`frames`]. Beside them: [`primary`] is the control
//! thread, with [`members`], their [`life`] and [`journal`], their processes ([`supervisor`], [`survivors`], [`restart`]), the [`control`] socket and its [`access`], the [`watch`]
//! over the interface, and the [`report`]. Before all that: [`cli`], [`config`], [`topology`], [`placement`], and [`run`](mod@run), which puts it together.

pub mod access;
pub mod cli;
pub mod config;
pub mod control;
pub mod counters;
pub mod exit;
pub mod frames;
pub mod interface;
pub mod journal;
pub mod lane;
pub mod lanes;
pub mod life;
pub mod members;
pub mod mode;
pub mod placement;
pub mod port;
pub mod primary;
pub mod privileges;
pub mod report;
pub mod restart;
pub mod run;
pub mod source;
pub mod steer;
pub mod supervisor;
pub mod survivors;
pub mod sys;
pub mod topology;
pub mod umem;
pub mod watch;
pub mod xsk;
