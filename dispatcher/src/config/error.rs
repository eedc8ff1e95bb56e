//! What can be wrong with a configuration.

use std::path::PathBuf;

/// Why there is no configuration. The message names the key, the file and what would be valid.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {source}", file.display())]
    Read {
        /// The file asked for.
        file: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{file} (line {line}) is not valid TOML: {message}")]
    Syntax {
        /// The file's name.
        file: String,
        /// Line of the error, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// An unknown key.
    #[error("unknown key `{key}` in {file} (line {line}): {hint}")]
    UnknownKey {
        /// The key with the tables it lies in, such as `idle.spin`.
        key: String,
        /// The file's name.
        file: String,
        /// Line of the key, from 1.
        line: usize,
        /// The nearest known key, or all of them.
        hint: String,
    },
    /// A value of the wrong type or beyond its limits.
    #[error("`{key}` in {file} (line {line}) is {found}, but it must be {wanted}")]
    Value {
        /// The key with the tables it lies in.
        key: String,
        /// The file's name.
        file: String,
        /// Line of the value, from 1.
        line: usize,
        /// The value as written.
        found: String,
        /// What it must be: type, limits, unit.
        wanted: String,
    },
    /// An argument of the wrong type or beyond its limits.
    #[error("`{key}` on the command line is {found}, but it must be {wanted}")]
    Argument {
        /// The key that the argument sets.
        key: String,
        /// The value as given.
        found: String,
        /// What it must be: type, limits, unit.
        wanted: String,
    },
    /// Neither the command line nor the file names an interface.
    #[error("no interface given: say which with `-i IFACE`, or set `interface` in the configuration file")]
    NoInterface,
}
