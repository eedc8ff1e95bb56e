//! The log: formatted lines in a bounded queue, and a thread that writes them.
//!
//! ```text
//!  tracing ──► Line: one line, printable ──┐
//!                                          ├──► Writer (queue, thread) ──► Sink (stderr or file)
//!  process/output: a worker's line ────────┘
//! ```
//!
//! Logging neither blocks nor fails, whatever the state of the sink. Lines that do not fit into the
//! queue, or that the sink does not accept, are counted as lost. Once the sink accepts lines again,
//! a line reports how many were lost.

mod line;
mod sink;
mod writer;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use crate::print::PATIENCE;
use crate::text::printable;

pub use sink::{Sink, open_to_append};
pub use writer::{CAPACITY, Writer};

/// The writer of this process' log; unset until [`begin`].
static LOG: OnceLock<Writer> = OnceLock::new();

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The log file cannot be opened.
    #[error(
        "cannot open the log file {}: {source}; create its directory, or set another file in [log]",
        path.display()
    )]
    File {
        /// The setting `file` in `[log]`.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No thread or descriptor is available.
    #[error("cannot start logging: {0}")]
    Io(#[from] io::Error),
}

/// Starts logging to standard error or to a file. Panics are logged as errors.
///
/// # Errors
/// [`LogError`]
pub fn begin(level: tracing::Level, file: Option<&Path>) -> Result<(), LogError> {
    let (name, sink) = match file {
        None => ("standard error".to_owned(), Sink::stderr()?),
        Some(path) => (
            path.display().to_string(),
            Sink::file(path).map_err(|source| LogError::File { path: path.to_owned(), source })?,
        ),
    };
    let ansi = file.is_none() && io::stderr().is_terminal();
    let _ = LOG.set(Writer::start(name, sink, Some(notice))?);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(line::Line { ansi })
        .with_writer(|| Queue)
        .init();
    std::panic::set_hook(Box::new(|info| tracing::error!("{info}")));
    Ok(())
}

/// Logs a line that a worker wrote. Returns `false` if the queue is more than half full: the other
/// half is for lines of the primary.
pub fn relay(member: &str, stream: &str, text: &str) -> bool {
    let line = format!("{} {} {stream}: {text}\n", line::now(), printable(member));
    LOG.get().is_some_and(|log| log.offer(line.into_bytes(), 1, None, CAPACITY / 2))
}

/// Reopens the log file, for example after log rotation.
pub fn reopen() {
    if let Some(log) = LOG.get() {
        log.reopen();
    }
}

/// The number of lines that were lost.
pub fn lost() -> u64 {
    LOG.get().map_or(0, Writer::lost)
}

/// Waits until all lines are written, at most for [`PATIENCE`].
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush(Instant::now() + PATIENCE);
    }
}

fn notice(lost: u64) -> Vec<u8> {
    format!("{}  WARN {lost} lines of this log were lost: it could not be written\n", line::now())
        .into_bytes()
}

/// Puts the lines of tracing, which writes whole lines, into the queue.
struct Queue;

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(log) = LOG.get()
            && !log.offer(line.to_vec(), 1, None, CAPACITY)
        {
            log.lose(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
