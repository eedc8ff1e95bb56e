//! Aborts a test that hangs, with a message.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::netns;

/// Aborts the process unless it is dropped in time. It guards against hanging and claims nothing
/// about speed: be generous.
#[derive(Debug)]
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    /// Watches `what`, for instance the test's name. After `limit` it removes the namespaces,
    /// prints what hung, and aborts the process.
    pub fn new(what: &str, limit: Duration) -> Self {
        let (alive, watched) = channel();
        let what = what.to_string();
        std::thread::spawn(move || watch(&what, limit, &watched));
        Self { _alive: alive }
    }
}

fn watch(what: &str, limit: Duration, watched: &Receiver<()>) {
    if watched.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
        eprintln!("watchdog: {what} hangs, not done after {} s; aborting", limit.as_secs());
        netns::remove_all();
        std::process::abort();
    }
}
