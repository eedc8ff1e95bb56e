//! The configuration: one validated [`Config`] out of the command line and a TOML file.
//!
//! ```text
//!  settings.rs ── defaults ──► file.rs ──► flags.rs ──► Config      the last one wins
//!  (the tables)                   └── value.rs ──┘                 the only check of a value
//! ```
//!
//! Nothing after this module validates a setting again. What depends on the machine (does the
//! interface exist, does it have that queue, do the frames fit) is checked where the machine is
//! known: [`crate::host::interface`], [`crate::host::placement`] and [`FrameBudget`].

mod budget;
mod error;
mod file;
mod flags;
mod list;
mod restart;
pub mod settings;
mod show;
pub mod table;
mod user;
mod value;

use std::path::PathBuf;

use xfan_shm::protocol::default_socket;

pub use budget::{BudgetError, FrameBudget, MAX_MEMBERS, Sizes};
pub use error::ConfigError;
pub(crate) use flags::socket_flag;
pub use flags::{Flags, PlacementFlags};
pub(crate) use list::{format_list, parse_list};
pub use restart::{Policy, Restart};
pub use settings::{ControlAccess, GroupConfig, IdleConfig, LogConfig, PortConfig, PrimaryConfig};
pub use table::Section;
pub use user::{UserError, WorkerUser};
pub(crate) use value::MAX_CPU;
use value::{Read, Value};
pub use xfan_xdp::PassRule;

/// All settings, by section. Each field of a section is a key of the file under the same name;
/// [`settings`] says what it means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The interface.
    pub port: PortConfig,
    /// What belongs to neither an interface nor a group.
    pub primary: PrimaryConfig,
    /// The workers.
    pub group: GroupConfig,
    /// Who may use the control socket.
    pub control: ControlAccess,
    /// How lanes and workers wait.
    pub idle: IdleConfig,
    /// The log.
    pub log: LogConfig,
}

/// Where the standard output and standard error of workers go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerOutput {
    /// Into the primary's log.
    Log,
    /// Nowhere.
    Null,
    /// To systemd's journal.
    Journal,
    /// To files of this name, in which `{member}` stands for the member.
    File(PathBuf),
}

/// An owner of a file, by names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user; `None`: unchanged.
    pub user: Option<String>,
    /// The group; `None`: unchanged.
    pub group: Option<String>,
}

/// The RX queues that get a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Queues {
    /// Every queue of the interface.
    All,
    /// These, each once. Never empty.
    List(Vec<u32>),
}

/// What happens to packets while no worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEmpty {
    /// They are dropped and counted.
    Drop,
    /// They go to the kernel.
    Pass,
}

/// What happens to the packets that a lost worker had not committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// They go to the other workers, as its flows do.
    Requeue,
    /// They wait for the next worker of its member, as its flows do.
    Hold,
}

/// How the XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModeChoice {
    /// Native, or generic where the driver has no native mode.
    Auto,
    /// Native only.
    Native,
    /// Generic, even where the driver has a native mode.
    Generic,
}

/// How the AF_XDP sockets are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindMode {
    /// Zero-copy, or copy where the driver has no zero-copy.
    Auto,
    /// The NIC writes to the frames.
    ZeroCopy,
    /// The kernel copies packets to the frames.
    Copy,
}

/// The least important messages that are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Config {
    /// Reads `flags`, and the file they name, into one configuration. The flags win.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`].
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let Some(file) = &flags.config else { return Self::assemble(None, flags) };
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.clone(), source })?;
        Self::assemble(Some((&text, &file.display().to_string())), flags)
    }

    /// Reads the text of a file alone. `file_name` names it in error messages.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`].
    pub fn from_toml_str(text: &str, file_name: &str) -> Result<Self, ConfigError> {
        Self::assemble(Some((text, file_name)), &Flags::default())
    }

    fn assemble(file: Option<(&str, &str)>, flags: &Flags) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some((text, name)) = file {
            file::apply(&mut config, text, name)?;
        }
        flags.apply(&mut config)?;
        if config.port.interface.is_empty() {
            return Err(ConfigError::NoInterface);
        }
        if config.primary.socket.as_os_str().is_empty() {
            config.primary.socket = default_socket(&config.port.interface);
        }
        Ok(config)
    }

    /// The sections, in the order in which they are shown. The keys of those without a table stand
    /// at the top of the file, before all tables. A table that may repeat, such as `[[group]]`,
    /// would be a section for each of its elements.
    #[must_use]
    pub fn sections(&self) -> [&dyn Section; 6] {
        let Self { port, primary, group, control, idle, log } = self;
        [port, primary, group, control, idle, log]
    }

    /// The sections, to be set.
    fn sections_mut(&mut self) -> [&mut dyn Section; 6] {
        let Self { port, primary, group, control, idle, log } = self;
        [port, primary, group, control, idle, log]
    }

    /// The names of all keys, with their tables.
    fn keys(&self) -> impl Iterator<Item = String> {
        let of = |section: &dyn Section| {
            section.settings().iter().map(|setting| section.full_key(setting)).collect::<Vec<_>>()
        };
        self.sections().into_iter().flat_map(of)
    }

    /// Sets the value of a key, which is one of [`Self::keys`].
    fn set(&mut self, full_key: &str, value: &Value) -> Read<()> {
        for section in self.sections_mut() {
            let known = section.settings().iter().find(|setting| section.full_key(setting) == full_key);
            if let Some(setting) = known {
                return section.set(setting.key(), value);
            }
        }
        Ok(())
    }
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::{Args as _, FromArgMatches as _};

    use super::table::Initial;
    use super::*;

    fn flags(line: &str) -> Flags {
        let command = Flags::augment_args(clap::Command::new("xfan"));
        let matches = command.get_matches_from(format!("xfan {line}").split_whitespace());
        Flags::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn an_interface_is_all_that_is_needed() {
        let config = Config::from_toml_str("interface = \"eth1\"", "f").unwrap();
        assert_eq!(config.primary.socket, Path::new("/run/xfan/eth1.sock"));
        assert_eq!(config.port.queues, Queues::All);
        let error = Config::from_toml_str("workers = 2", "f").unwrap_err();
        assert!(error.to_string().contains("`-i IFACE`"), "{error}");
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = flags("-n 3 --pass icmp");
        let text = "interface = 'eth1'\nworkers = 2\npass = ['tcp/22']\ncommand = ['w']";
        let config = Config::assemble(Some((text, "f")), &flags).unwrap();
        assert_eq!((config.group.workers, config.port.pass), (3, vec!["icmp".parse().unwrap()]));
        assert_eq!(config.group.command, ["w"]);
    }

    #[test]
    fn an_invalid_command_on_the_command_line() {
        let error = Config::assemble(None, &flags("-i eth1 -- \0")).unwrap_err().to_string();
        assert!(error.starts_with("`command` on the command line is [\"\\0\"], but it must be"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = Config::load(&flags("-c /no/such/file.toml")).unwrap_err().to_string();
        assert!(error.contains("/no/such/file.toml") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn every_default_and_every_example_is_valid() {
        let mut config = Config::default();
        let defaults = config.clone();
        let value = |text| Value::from(toml::de::DeValue::parse(text).unwrap().get_ref());
        for section in defaults.sections() {
            for setting in section.settings() {
                let key = section.full_key(setting);
                let (Initial::Value(text)
                | Initial::Chosen { example: text, .. }
                | Initial::Required { example: text }) = setting.initial();
                config.set(&key, &value(text)).unwrap();
                let shown = config.sections().iter().find_map(|section| {
                    let of = |setting| section.full_key(setting) == key;
                    section
                        .settings()
                        .iter()
                        .find(|setting| of(setting))
                        .map(|setting| section.show(setting.key()))
                });
                assert_eq!(shown.flatten().as_deref(), Some(text), "{key}");
                if let Initial::Value(_) = setting.initial() {
                    assert_eq!(config, defaults, "{key}");
                } else {
                    assert_ne!(config, defaults, "{key}");
                    config = defaults.clone();
                }
            }
        }
    }

    #[test]
    fn no_key_stands_in_two_sections() {
        let mut keys: Vec<_> = Config::default().keys().collect();
        assert_eq!(keys.len(), 41);
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 41);
    }
}
