//! Counters that a worker publishes by name.

use std::sync::atomic::Ordering;

use xfan_shm::layout::{COUNTER_NAME, COUNTERS, Up};

/// A number that `xfan stats` shows under its name, beside the member.
///
/// The worker's own segment holds it, so a change is one store, seen by the dispatcher without any call.
#[derive(Debug)]
pub struct Counter {
    up: Up,
    index: usize,
    value: u64,
}

/// Why a counter could not be published.
#[derive(Debug, thiserror::Error)]
pub enum CounterError {
    /// Its name is none.
    #[error("{0:?} is no name for a counter: 1 to {COUNTER_NAME} characters of a-z, 0-9 and _")]
    Name(String),
    /// Its name is taken.
    #[error("this worker has published a counter named {0:?} already")]
    Taken(String),
    /// There is no room.
    #[error("no room for counter {0:?}: a worker can publish {COUNTERS}")]
    Full(String),
}

impl Counter {
    pub(crate) fn new(up: &Up, index: usize) -> Self {
        Counter { up: up.clone(), index, value: 0 }
    }

    /// Adds to it; wraps around at 2⁶⁴.
    #[inline]
    pub fn add(&mut self, more: u64) {
        self.set(self.value.wrapping_add(more));
    }

    /// Sets it, for what goes up and down.
    #[inline]
    pub fn set(&mut self, value: u64) {
        self.value = value;
        // Single writer: this value is the truth, the shared word a copy of it.
        self.up.counter(self.index).1.store(value, Ordering::Relaxed);
    }

    /// Its value.
    #[inline]
    pub fn get(&self) -> u64 {
        self.value
    }
}
