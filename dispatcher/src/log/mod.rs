//! The log: formatted lines in a bounded queue, and a thread that writes them.
//!
//! ```text
//!  tracing ──► Line: one line, printable ──┐
//!                                          ├──► Writer (queue, thread) ──► Sink (stderr or file)
//!  output/: a worker's line, escaped ──────┘
//! ```
//!
//! Whoever logs neither waits nor fails, whatever is behind the sink. Lines that find no room, or
//! that the sink does not take, are counted; once it takes lines again, one tells how many are
//! missing.

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
pub use writer::{ROOM, Writer};

/// The log of this process.
static LOG: OnceLock<Writer> = OnceLock::new();

/// The log cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Its file cannot be opened.
    #[error("cannot open the log file {}: {source}; make its folder, or set another file in [log]", path.display())]
    File {
        /// The setting `file` in `[log]`.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is no thread or descriptor for it.
    #[error("cannot begin to log: {0}")]
    Io(#[from] io::Error),
}

/// Begins to log, to standard error or to a file. Panics are logged, too.
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

/// Writes a line of a worker, unless so many lines wait that those of the primary might find no
/// room.
pub fn relay(member: &str, stream: &str, text: &str) -> bool {
    let line = format!("{} {} {stream}: {text}\n", line::now(), printable(member));
    LOG.get().is_some_and(|log| log.offer(line.into_bytes(), 1, None, ROOM / 2))
}

/// Opens the log's file anew.
pub fn reopen() {
    if let Some(log) = LOG.get() {
        log.reopen();
    }
}

/// Lines that were not written.
pub fn lost() -> u64 {
    LOG.get().map_or(0, Writer::lost)
}

/// Waits until all is written, but not for long.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush(Instant::now() + PATIENCE);
    }
}

fn notice(lost: u64) -> Vec<u8> {
    format!("{}  WARN {lost} lines of this log were lost: it could not be written\n", line::now())
        .into_bytes()
}

/// Takes what tracing writes: whole lines.
struct Queue;

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(log) = LOG.get()
            && !log.offer(line.to_vec(), 1, None, ROOM)
        {
            log.lose(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
