//! Who is at the other end of a connection.

use std::sync::Arc;

use tokio::sync::Notify;

use crate::control::access::Standing;

pub use crate::group::ConnectionId;

/// A connection, as the primary knows it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its number.
    pub id: ConnectionId,
    /// Whom it was admitted as.
    pub standing: Standing,
    /// The inherited connection that it is, or was made through.
    pub channel: Option<ConnectionId>,
    pub(super) end: Arc<Notify>,
}

impl Connection {
    /// One of this number, which leads nowhere.
    #[cfg(test)]
    pub fn of(id: ConnectionId) -> Self {
        Connection::new(id, Standing::Named, None)
    }

    /// A connection of this number.
    pub fn new(id: ConnectionId, standing: Standing, channel: Option<ConnectionId>) -> Self {
        Connection { id, standing, channel, end: Arc::default() }
    }

    /// Hangs up.
    pub fn end(&self) {
        self.end.notify_one();
    }
}
