//! The control thread: it carries out what operators, workers and the kernel ask for.
//!
//! [`primary`] owns all control state. Connections, processes and signals reach it as events through
//! the [`inbox`]. [`server`] accepts connections on the control socket, [`connection`] converses
//! with a [`peer`], [`access`] decides who may connect, [`limits`] how many may, and [`rate_limit`] how often
//! refusals are logged. [`client`] is the tools' end of the socket. [`members`] are the workers' places, [`journal`] records what happened.

pub mod access;
mod adoption;
mod answers;
mod attach;
pub mod client;
mod confinement;
pub mod connection;
pub mod error;
mod executor;
mod facts;
pub mod inbox;
pub mod journal;
pub mod lanes;
pub mod limits;
pub mod members;
mod orders;
pub mod peer;
pub mod primary;
mod processes;
pub mod rate_limit;
mod reporting;
pub mod server;
pub mod shutdown;
mod watching;
