//! The primary of xfan: it owns an interface's AF_XDP sockets, and dispatches packets to worker processes.
//!
//! The way of a packet: a [`port`] attaches to the interface in a [`mode`]; [`xsk`] has its
//! sockets, [`umem`] the packet memory. A [`lane`] for each queue receives packets ([`source`]),
//! hashes and steers them ([`steer`]), and accounts for [`frames`].
//!
//! The control thread is [`primary`]. It handles [`members`], their [`life`] and [`journal`], their
//! processes ([`supervisor`], [`survivors`], [`restart`]), the [`control`] socket, its [`access`],
//! its [`folder`] and its [`inbox`], the [`watch`] over the interface, and the [`report`]. A
//! [`rate_limit`] keeps users from flooding log and journal.
//!
//! What is shown: the [`log`](mod@log), the workers' [`output`], results and messages
//! ([`print`](mod@print)); [`text`] makes it fit to be shown.
//!
//! The start: [`cli`], [`config`], [`topology`], [`placement`], and [`run`](mod@run), which calls
//! them.

pub mod access;
pub mod cgroup;
pub mod cli;
pub mod config;
pub mod control;
pub mod counters;
pub mod exit;
pub mod folder;
pub mod frames;
pub mod inbox;
pub mod inherit;
pub mod interface;
pub mod journal;
pub mod lane;
pub mod lanes;
pub mod life;
pub mod log;
pub mod members;
pub mod mode;
pub mod orphans;
pub mod output;
pub mod placement;
pub mod port;
pub mod primary;
pub mod print;
pub mod privileges;
pub mod rate_limit;
pub mod report;
pub mod restart;
pub mod run;
pub mod seccomp;
pub mod source;
pub mod steer;
pub mod supervisor;
pub mod survivors;
pub mod sys;
pub mod text;
pub mod topology;
pub mod umem;
pub mod watch;
pub mod xsk;
