//! The control thread: it carries out what the [groups](crate::group) decide, and answers operators
//! and workers.
//!
//! [`primary`] owns all control state: the [`ports`], the [`groups`] and the [`lanes`].
//! Connections, processes, lanes and signals reach it as events through the [`inbox`]. `executor`
//! turns the groups' actions into calls: `processes` starts and kills workers, of which `spawner`
//! holds what is kept; [`lanes`] commands the lanes and collects their acknowledgements;
//! [`resources`] holds the segments and counters of a member; `facts` words the log and the
//! [`history`]. `lookup` finds groups and members. `confinement` limits workers and the primary
//! itself. `adoption` takes over the workers of an earlier primary. `attach` answers workers,
//! `operator` operators, and `answers` everyone else, with what `reporting` collects. `shutdown`
//! ends it all; [`outcome`] and [`error`] say how and why.
//!
//! [`server`] accepts connections on the control socket, [`connection`] carries the messages of a
//! [`peer`], and `closer` closes what was sent. [`access`] decides who may connect,
//! [`connection_limits`] how often at a time, and [`rate_limit`] how often refusals are logged.
//! [`client`] is the tools' end of the socket.

pub mod access;
mod adoption;
mod answers;
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
pub mod resources;
pub mod server;
mod shutdown;
mod spawner;
