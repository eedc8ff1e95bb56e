//! Messages on standard error.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to standard error, in one write. Ignores a failure, on which `eprintln!` would
/// panic: the process that reads standard error must not be able to terminate the worker.
///
/// # Examples
///
/// ```
/// xfan_worker::say(format_args!("{}: {} packets", "my-worker", 3));
/// ```
pub fn say(message: impl Display) {
    let _ = io::stderr().write_all(format!("{message}\n").as_bytes());
}
