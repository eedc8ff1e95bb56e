//! Messages of a worker.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to standard error, in one write. If that fails, the worker goes on without:
/// whoever is behind it shall not end the worker, as `eprintln!` would.
///
/// ```
/// xfan_worker::say(format_args!("{}: {} packets", "my-worker", 3));
/// ```
pub fn say(message: impl Display) {
    let _ = io::stderr().write_all(format!("{message}\n").as_bytes());
}
