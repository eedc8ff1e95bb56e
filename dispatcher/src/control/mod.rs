//! The control thread. It carries out what the [groups](crate::group) decide, and serves workers
//! and operators.
//!
//! [`primary`] owns all control state: [`ports`], [`groups`] and [`lanes`]. Connections, processes,
//! lanes and signals send it events through the [`inbox`].
//!
//! - `executor` carries out the actions of the groups. It uses `processes` and `spawner` to start
//!   and kill workers, [`lanes`] to send commands and await acknowledgements, [`resources`] for the
//!   segments and counters of members, and `facts` to write to the log and the [`history`].
//! - `requests` handles requests: those of workers in `attach`, orders in `operator`, and reports
//!   in `reporting`.
//! - `adoption` takes over the workers of an earlier primary. `confinement` restricts the workers
//!   and the primary. `lookup` finds groups and members.
//! - `shutdown` stops the primary. [`outcome`] and [`error`] describe the result.
//!
//! A separate thread serves the control socket. [`server`] accepts connections, [`connection`]
//! passes the messages of a [`peer`] on, and `closer` closes descriptors that were sent. [`access`]
//! decides who may connect, [`connection_limits`] limits the number of connections, and
//! [`rate_limit`] the number of reported refusals. [`client`] is the other end, for the tools.

pub mod access;
mod adoption;
mod attach;
pub mod client;
mod closer;
mod confinement;
pub mod connection;
pub mod connection_limits;
pub mod error;
mod executor;
mod facts;
pub mod groups;
pub mod history;
pub mod inbox;
pub mod lanes;
mod lookup;
mod operator;
pub mod outcome;
pub mod peer;
pub mod ports;
pub mod primary;
mod processes;
pub mod rate_limit;
mod reporting;
mod requests;
pub mod resources;
pub mod server;
mod shutdown;
mod spawner;
