//! The control thread: it carries out what the [group](crate::group) decides, and answers operators
//! and workers.
//!
//! [`primary`] owns all control state; connections, processes, lanes and signals reach it as events
//! through the [`inbox`]. `executor` turns the group's actions into calls: `processes` starts and
//! kills workers, [`lanes`] commands the lanes and collects their acknowledgements, [`members`] holds
//! each member's segments and counters, `facts` words the log and the [`journal`]. `adoption` takes
//! over the workers of an earlier primary, `attach` and `orders` answer workers and operators,
//! [`shutdown`] ends it all.
//!
//! [`server`] accepts connections on the control socket, [`connection`] converses with a [`peer`],
//! [`access`] decides who may connect, [`limits`] how many may, and [`rate_limit`] how often refusals
//! are logged. [`client`] is the tools' end of the socket.

pub mod access;
mod adoption;
mod answers;
mod attach;
pub mod client;
mod closer;
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
