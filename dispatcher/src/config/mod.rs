//! What `xfan` is to do: one validated [`Config`] out of the command line and a TOML file.
//!
//! ```text
//!  defaults ──► file.rs ──► flags.rs ──► Config       what comes later wins
//!                   └── value.rs ──┘                  each value is checked here, and only here
//! ```
//!
//! Nothing after this module validates a setting again. What depends on the machine (does the
//! interface exist, has it that queue, do the frames fit) is checked where the machine is known:
//! [`crate::host::interface`], [`crate::host::placement`] and [`FrameBudget`].

mod budget;
mod error;
mod file;
mod flags;
mod list;
mod restart;
mod show;
mod user;
mod value;

use std::path::PathBuf;
use std::time::Duration;

use xfan_shm::protocol::default_socket;

pub use budget::{BudgetError, FrameBudget, MAX_MEMBERS, Sizes};
pub use error::ConfigError;
pub use flags::{Flags, PlacementFlags, RunFlags};
pub(crate) use list::{format_list, parse_list};
pub use restart::{Policy, Restart};
pub use user::{UserError, WorkerUser};
pub(crate) use value::MAX_CPU;
pub use xfan_xdp::PassRule;

pub(crate) use flags::socket_flag;

/// All settings. Each field is a key of the file under the same name, unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The interface whose packets are dispatched. Required. Flag `-i`.
    pub interface: String,

    /// The RX queues that get a lane: `"all"`, or a list such as `"0-3,6"` or `[0, 1]`. Packets of
    /// the other queues go to the kernel as before. Default `"all"`. Flag `--queues`.
    pub queues: Queues,

    /// Worker processes, 1 to 64. Default 1. Flag `-n`.
    pub workers: usize,

    /// Workers there can be at a time, those that join later included: 1 to 64, or `"auto"` (`None`): two more than `workers`,
    /// fewer where the packet memory would exceed 1 GiB or `frames`. Default `"auto"`.
    pub max_workers: Option<usize>,

    /// The program every worker runs, and its arguments, as a list of texts. Default: none; then the
    /// workers' places stay vacant until workers attach through the socket. On the command line: what follows `--`.
    pub command: Vec<String>,

    /// The CPUs to run on, such as `"2-5,7"` or `[2, 3]`: first the lanes', then the workers'. Default:
    /// chosen, the nearest to the interface first (`xfan topology` shows them). Flag `--cores`.
    pub cores: Option<Vec<usize>>,

    /// The user the workers run as. Default: the user who called sudo, else `nobody`. With `"root"`
    /// a worker could write to the packets of all; it must be asked for. Flag `--user`.
    pub user: Option<String>,

    /// What is left to the kernel, as a list of rules: a protocol, or a protocol and a port, such as
    /// `["icmp", "tcp/22"]`. Default: none. Flag `--pass`, once per rule; replaces the file's list.
    pub pass: Vec<PassRule>,

    /// The control socket, an absolute path of at most 107 bytes. Default `/run/xfan/INTERFACE.sock`.
    /// Flag `--socket`.
    pub socket: PathBuf,

    /// How the XDP program is attached: `"native"` (by the driver), `"generic"` (by the kernel, slower),
    /// or `"auto"`: native, else generic, with a warning. Default `"auto"`.
    pub xdp_mode: ModeChoice,

    /// How the sockets are bound: `"zero-copy"`, `"copy"`, or `"auto"`: zero-copy, else copy, with
    /// a warning. Default `"auto"`.
    pub bind_mode: BindMode,

    /// The size of a frame in bytes, 2048, 4096 or `"auto"` (`None`). A packet must fit one, less
    /// 256 bytes of headroom. `"auto"` is 4096 where the MTU needs it, and in zero-copy mode unless
    /// the driver is known to fill 2048-byte frames without cutting packets; else 2048. Default
    /// `"auto"`.
    pub frame_size: Option<u32>,

    /// Frames kept posted to the kernel per lane: a power of two from 64 to 32768. In zero-copy
    /// mode raised to the size of the NIC's own RX ring. The FILL ring has twice as many entries.
    /// Default 4096.
    pub rx_ring: u32,

    /// Slots of the ring between a lane and a worker: a power of two from 64 to 1048576, or `"auto"`
    /// (`None`): 8192 when threads share a CPU, else 4096; halved, though not below 512, until the
    /// packet memory fits 1 GiB and `frames`. Default `"auto"`.
    pub ring_slots: Option<u32>,

    /// Frames per lane, 128 to 2097152, or `"auto"` (`None`): the fewest that suffice, which are
    /// `rx_ring + batch + max_workers × ring_slots`. Default `"auto"`.
    pub frames: Option<u32>,

    /// The most packets a lane takes at once, 1 to 64. Default 64.
    pub batch: usize,

    /// The key of the flow hash, 32 hexadecimal digits (128 bits). Fix it to have the same flows go to the
    /// same workers at every start. Default: random at every start (`None`).
    pub hash_key: Option<[u8; 16]>,

    /// How long a worker may take from its start until it is attached, 100ms to 600s. Default `"10s"`.
    pub start_timeout: Duration,

    /// How long a worker may take to finish its packets, and then to end after SIGTERM before it is
    /// killed, 0s to 600s. Default `"5s"`.
    pub stop_timeout: Duration,

    /// When a worker that ended is started again: `restart`, `"no"`, `"on-failure"` (every end but an exit with status 0) or
    /// `"always"`, default `"on-failure"`; `restart_delay`, 1ms to 60s, default `"100ms"`, doubled with each restart that
    /// follows soon; `start_limit_burst`, default 5, starts at most in `start_limit_interval`, 1ms to 86400s, default
    /// `"10s"`.
    pub restart: Restart,

    /// How long a worker that has packets may take none, and not even ask, before it counts as hanging and is killed (or
    /// evicted, if xfan did not start it), 0s (never) to 3600s. Default `"30s"`.
    pub hang_timeout: Duration,

    /// Whether the workers that xfan started go on when it is killed, and look for the next primary of the same interface for a minute.
    /// Default `false`: they end with it.
    pub survive: bool,

    /// What becomes of the packets that a worker had not committed when it was gone: `"requeue"`: they go to the others, as its
    /// flows do; or `"hold"`: they wait, and its flows with them, for the next worker in its place. Default `"requeue"`.
    pub on_loss: OnLoss,

    /// With `on_loss = "hold"`: how long the packets wait, 1ms to 3600s; then they are requeued.
    /// They keep their receive time. Default `"4s"`.
    pub hold_timeout: Duration,

    /// Memory that a worker and all its descendants may use: a size from 1MiB to 1024GiB, such as `"512MiB"`, or `"unlimited"`
    /// (`None`). Default `"unlimited"`.
    pub worker_memory: Option<u64>,

    /// Processes and threads of a worker and all its descendants, 1 to 4194304. Default 1024.
    pub worker_processes: u32,

    /// A worker's share of CPU time where more is wanted than there is, 1 to 10000; others have 100. Default 100.
    pub worker_cpu_weight: u32,

    /// Whether workers are refused sockets but Unix ones, bpf, perf events, io_uring and keyrings. Default `false`.
    pub worker_sandbox: bool,

    /// Where packets go while no worker takes any: `"drop"`, counted as `no_worker`, or `"pass"`: to the kernel. Default `"drop"`.
    pub on_empty: OnEmpty,

    /// Where workers' standard output and standard error go: `"log"`, `"null"`, `"journal"`, or an
    /// absolute path, in which `{member}` stands for the member. Default `"log"`.
    pub worker_output: WorkerOutput,

    /// Who may use the control socket: the table `[control]`.
    pub control: ControlAccess,

    /// What a lane does while there is nothing to do: the table `[idle]`.
    pub idle: Idle,

    /// How much is logged: `"error"`, `"warn"`, `"info"`, `"debug"` or `"trace"`. Key `level` in the table
    /// `[log]`. Default `"info"`. Flag `--log`.
    pub log: LogLevel,

    /// The file the log is appended to, an absolute path. Key `file` in the table `[log]`. Default:
    /// none, but standard error.
    pub log_file: Option<PathBuf>,
}

/// Where workers' standard output and standard error go.
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

/// Who may use the control socket, besides root and the workers' user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlAccess {
    /// Names of users who may attach workers and read the counters. Default: none.
    pub allow_users: Vec<String>,
    /// Names of groups whose members may. Default: none.
    pub allow_groups: Vec<String>,
    /// Who owns the socket's file: `"user"`, `"user:group"` or `":group"`. Default: the workers' user.
    pub socket_owner: Option<Owner>,
    /// Permissions of the socket's file, in octal. Default: `"0600"`, or `"0666"` where users or groups are allowed.
    pub socket_mode: Option<u32>,
}

/// An owner of a file, by names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user; none: stays as it is.
    pub user: Option<String>,
    /// The group; none: stays as it is.
    pub group: Option<String>,
}

/// How a lane waits: it spins, then yields its CPU, then sleeps until a packet arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle {
    /// How long it spins, 0s to 1s. Default `"50us"`. Not used by threads that share a CPU.
    pub spin: Duration,
    /// How long it yields after that, 0s to 1s. Key `yield`. Default `"1ms"`.
    pub yielding: Duration,
}

/// The RX queues that get a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Queues {
    /// Every queue the interface has.
    All,
    /// These, each once. Never empty.
    List(Vec<u32>),
}

/// Where packets go while no worker takes any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnEmpty {
    /// Nowhere; they are counted.
    Drop,
    /// To the kernel.
    Pass,
}

/// What becomes of the packets that a worker had not committed when it was gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// They go to the others, as its flows do.
    Requeue,
    /// They wait for the next worker in its place, as its flows do.
    Hold,
}

/// How the XDP program is attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModeChoice {
    /// Native, or generic where the driver cannot.
    #[default]
    Auto,
    /// Native or fail.
    Native,
    /// Generic, even where the driver could do native.
    Generic,
}

/// How the AF_XDP sockets are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindMode {
    /// Zero-copy, else copy.
    Auto,
    /// The NIC writes to the frames, or nothing does.
    ZeroCopy,
    /// The kernel copies into the frames.
    Copy,
}

/// How much is logged.
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
        let Some(file) = &flags.placement.config else { return Self::assemble(None, flags) };
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.clone(), source })?;
        Self::assemble(Some((&text, &file.display().to_string())), flags)
    }

    /// Reads the text of a file alone. `file_name` is for the messages.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`].
    pub fn from_toml_str(text: &str, file_name: &str) -> Result<Self, ConfigError> {
        Self::assemble(Some((text, file_name)), &Flags::default())
    }

    fn assemble(file: Option<(&str, &str)>, flags: &Flags) -> Result<Self, ConfigError> {
        let mut config = Self::defaults();
        if let Some((text, name)) = file {
            file::apply(&mut config, text, name)?;
        }
        flags.apply(&mut config);
        if config.interface.is_empty() {
            return Err(ConfigError::NoInterface);
        }
        if config.socket.as_os_str().is_empty() {
            config.socket = default_socket(&config.interface);
        }
        Ok(config)
    }

    /// The defaults. `interface` and `socket` are still empty: [`Self::assemble`] sees to them.
    fn defaults() -> Self {
        Self {
            interface: String::new(),
            queues: Queues::All,
            workers: 1,
            max_workers: None,
            command: Vec::new(),
            cores: None,
            user: None,
            pass: Vec::new(),
            socket: PathBuf::new(),
            xdp_mode: ModeChoice::Auto,
            bind_mode: BindMode::Auto,
            frame_size: None,
            rx_ring: 4096,
            ring_slots: None,
            frames: None,
            batch: 64,
            hash_key: None,
            start_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(5),
            restart: Restart {
                policy: Policy::OnFailure,
                delay: Duration::from_millis(100),
                limit_burst: 5,
                limit_interval: Duration::from_secs(10),
            },
            hang_timeout: Duration::from_secs(30),
            survive: false,
            on_loss: OnLoss::Requeue,
            hold_timeout: Duration::from_secs(4),
            on_empty: OnEmpty::Drop,
            worker_memory: None,
            worker_processes: 1024,
            worker_cpu_weight: 100,
            worker_sandbox: false,
            worker_output: WorkerOutput::Log,
            control: ControlAccess::default(),
            idle: Idle { spin: Duration::from_micros(50), yielding: Duration::from_millis(1) },
            log: LogLevel::Info,
            log_file: None,
        }
    }
}

impl LogLevel {
    pub(crate) const ALL: [Self; 5] = [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// The level's name in the file and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
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

    use super::*;

    #[test]
    fn an_interface_is_all_that_is_needed() {
        let config = Config::from_toml_str("interface = \"eth1\"", "f").unwrap();
        assert_eq!(config.socket, Path::new("/run/xfan/eth1.sock"));
        assert_eq!(config.queues, Queues::All);
        let error = Config::from_toml_str("workers = 2", "f").unwrap_err();
        assert!(error.to_string().contains("`-i IFACE`"), "{error}");
    }

    #[test]
    fn flags_win_over_the_file() {
        let mut flags = Flags::default();
        flags.placement.workers = Some(3);
        flags.run.pass = vec!["icmp".parse().unwrap()];
        let text = "interface = 'eth1'\nworkers = 2\npass = ['tcp/22']\ncommand = ['w']";
        let config = Config::assemble(Some((text, "f")), &flags).unwrap();
        assert_eq!((config.workers, config.pass), (3, flags.run.pass));
        assert_eq!(config.command, ["w"]);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let mut flags = Flags::default();
        flags.placement.config = Some("/no/such/file.toml".into());
        let error = Config::load(&flags).unwrap_err().to_string();
        assert!(error.contains("/no/such/file.toml") && error.contains("No such file"), "{error}");
    }

    /// `docs/xfan.toml` as an operator would read it, and with every setting in it switched on.
    #[test]
    fn the_documented_file_has_every_key_and_its_default() {
        let text = include_str!("../../../docs/xfan.toml");
        let defaults = Config::from_toml_str("interface = 'eth1'", "f").unwrap();
        assert_eq!(Config::from_toml_str(text, "docs/xfan.toml").unwrap(), defaults);

        let uncomment =
            |line: &str| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).map(str::to_owned);
        let all: Vec<_> =
            text.lines().map(|line| uncomment(line).unwrap_or_else(|| line.to_owned())).collect();
        let all = all.join("\n");
        let full = Config::from_toml_str(&all, "docs/xfan.toml").unwrap();
        let control = ControlAccess { socket_owner: None, socket_mode: None, ..full.control };
        assert_eq!(
            Config { cores: None, user: None, hash_key: None, log_file: None, control, ..full },
            defaults
        );
        let table: toml::Table = all.parse().unwrap();
        for key in file::KEYS {
            let found = match key.split_once('.') {
                None => table.contains_key(key),
                Some((outer, inner)) => {
                    table[outer].as_table().is_some_and(|table| table.contains_key(inner))
                }
            };
            assert!(found, "docs/xfan.toml lacks {key}");
        }
    }
}
