//! Counters that a worker publishes by name.

use std::sync::atomic::Ordering;

use xfan_shm::layout::{COUNTER_NAME, COUNTERS, Up};

/// A number that `xfan stats` shows under its name, next to the member. Made by
/// [`Worker::counter`](crate::Worker::counter).
///
/// The value is stored in the worker's own segment, which the dispatcher reads. Updating it is a
/// single store: no system call, lock or allocation.
///
/// # Examples
///
/// ```no_run
/// # use xfan_worker::Worker;
/// let mut worker = Worker::attach()?;
/// let mut alerts = worker.counter("alerts")?;
/// let mut open_files = worker.counter("open_files")?;
/// alerts.add(1);
/// open_files.set(7);
/// assert_eq!(alerts.get(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Counter {
    up: Up,
    index: usize,
    value: u64,
}

/// Why a counter could not be published.
#[derive(Debug, thiserror::Error)]
pub enum CounterError {
    /// The name is not valid.
    #[error("{0:?} is not a valid counter name: use 1 to {COUNTER_NAME} characters of a-z, 0-9 and _")]
    Name(String),
    /// This worker has published a counter of that name.
    #[error("this worker has already published a counter named {0:?}")]
    Taken(String),
    /// This worker has published as many counters as it can.
    #[error("cannot publish counter {0:?}: this worker has published {COUNTERS} counters, the most it can")]
    Full(String),
}

impl Counter {
    pub(crate) fn new(up: &Up, index: usize) -> Self {
        Counter { up: up.clone(), index, value: 0 }
    }

    /// Adds `more` to the value, which wraps around at 2⁶⁴.
    #[inline]
    pub fn add(&mut self, more: u64) {
        self.set(self.value.wrapping_add(more));
    }

    /// Sets the value. Use this for a number that can decrease.
    #[inline]
    pub fn set(&mut self, value: u64) {
        self.value = value;
        // This worker is the only writer: `value` is authoritative, and the shared word is a copy.
        self.up.counter(self.index).1.store(value, Ordering::Relaxed);
    }

    /// The current value.
    #[inline]
    pub fn get(&self) -> u64 {
        self.value
    }
}
