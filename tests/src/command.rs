//! Short system tools (`ip`, `ethtool`), run to their end.

use std::io;
use std::process::Command;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The tool could not be started.
    #[error("`{command}` did not start: {source}; is the tool installed (Debian: iproute2, ethtool)?")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// The tool ended with an error.
    #[error("`{command}` failed ({status}): {output}")]
    Failed {
        /// The command line.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// What it wrote.
        output: String,
    },
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// The command could not be started, or its exit status is not 0.
pub fn run(command: &mut Command) -> Result<String, CommandError> {
    let line = || {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    };
    let line = line();
    let output = command.output().map_err(|source| CommandError::Start { command: line.clone(), source })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = [text(&output.stderr), text(&output.stdout)].join(" ");
    Err(CommandError::Failed { command: line, status: output.status, output: said.trim().into() })
}

/// Runs `ip` with the words of `arguments`, in the namespace of the calling thread.
///
/// # Errors
/// As [`run`].
pub fn ip(arguments: &str) -> Result<String, CommandError> {
    run(Command::new("ip").args(arguments.split_whitespace()))
}
