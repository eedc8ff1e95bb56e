//! A test that hangs ends with a message instead of with the patience of whoever runs it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::netns;

/// Ends the process unless it is dropped in time. It protects from hanging; it is no claim about speed, so be generous.
#[derive(Debug)]
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    /// Watches over `what`, for instance the test's name: after `limit` the namespaces are removed, and the process
    /// aborts saying what hung.
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
