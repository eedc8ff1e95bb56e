//! A connection to a worker or a tool, as the control thread knows it.

use std::sync::Arc;

use tokio::sync::Notify;

use crate::control::access::Role;

pub use crate::group::ConnectionId;

/// A connection, as the control thread knows it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its number.
    pub id: ConnectionId,
    /// The role of its peer.
    pub role: Role,
    /// The number of the inherited connection that this is, or that it was made through; `None`: it
    /// was accepted on the control socket.
    pub inherited: Option<ConnectionId>,
    pub(super) end: Arc<Notify>,
}

impl Connection {
    /// A connection without a socket.
    #[cfg(test)]
    pub fn of(id: ConnectionId) -> Self {
        Connection::new(id, Role::Allowed, None)
    }

    /// A connection with this number.
    pub fn new(id: ConnectionId, role: Role, inherited: Option<ConnectionId>) -> Self {
        Connection { id, role, inherited, end: Arc::default() }
    }

    /// Closes the connection.
    pub fn close(&self) {
        self.end.notify_one();
    }
}
