//! What can be wrong with a configuration.

use std::path::PathBuf;

/// Why there is no configuration. The messages name the key, the file and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {source}", file.display())]
    Read {
        /// The file asked for.
        file: PathBuf,
        /// What the system says.
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
    /// A key that nobody knows.
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
    /// Neither the command line nor the file names an interface.
    #[error("no interface given: say which with `-i IFACE`, or set `interface` in the configuration file")]
    NoInterface,
}
