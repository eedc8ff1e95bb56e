//! The command line of `xfan`. The flags of settings come from [`crate::config::settings`].

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use xfan_shm::protocol::default_socket;

use crate::config::{Flags, PlacementFlags, socket_flag};
use crate::exit::Exit;

const ABOUT: &str = "Fans packets out from a network interface to worker processes";

const LONG_ABOUT: &str = "\
Fans packets out from a network interface to worker processes.

xfan owns the AF_XDP sockets of an interface's RX queues. It hashes the 5-tuple of every packet \
and hands the packet, in shared memory and without copying it, to one of several worker processes. \
Both directions of a flow reach the same worker.";

/// Examples for the long help and the manual page.
pub const EXAMPLES: &str = "\
Examples:
  Two workers on all queues of eth1; ssh and ping stay with the kernel:
    sudo xfan run -i eth1 -n 2 --pass icmp --pass tcp/22 -- xfan-flow

  Which thread would run on which CPU, and why:
    xfan topology -i eth1 -n 4

  The counters, every two seconds:
    sudo xfan stats -i eth1 --watch 2";

/// The command line.
#[derive(Parser, Clone, Debug)]
#[command(name = "xfan", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = after_help())]
#[command(max_term_width = 80, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of `xfan`.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Dispatch an interface's packets to workers, until SIGINT or SIGTERM
    ///
    /// Starts the primary and, if a COMMAND is given, its workers. Each worker is supervised,
    /// pinned to a CPU, and unprivileged. Needs root, or CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF,
    /// CAP_PERFMON, CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_CHOWN, CAP_KILL and CAP_SETPCAP.
    #[command(after_long_help = after_help())]
    Run(Flags),

    /// Validate the settings that `run` would use, and print them
    ///
    /// Takes the flags of `run`. The output is a complete configuration file.
    #[command(after_long_help = after_help())]
    Check(Flags),

    /// Show which lane and worker would run on which CPU, and why
    #[command(after_long_help = after_help())]
    Topology(PlacementFlags),

    /// Show the counters of a running primary
    #[command(after_long_help = after_help())]
    Stats(StatsFlags),

    /// Show what happened to the workers of a running primary, and when
    #[command(after_long_help = after_help())]
    Events(EventsFlags),

    /// List, add, drain, restart or remove the workers of a running primary
    #[command(after_long_help = after_help(), arg_required_else_help = true, subcommand_required = true)]
    Workers(WorkersFlags),
}

/// The primary to ask.
#[derive(Args, Clone, Debug)]
pub struct PrimaryFlags {
    /// The interface of the primary
    #[arg(short, long, value_name = "IFACE", required_unless_present = "socket")]
    pub interface: Option<String>,

    /// The control socket of the primary [default: /run/xfan/IFACE.sock]
    #[arg(long, value_name = "PATH", value_parser = socket_flag())]
    pub socket: Option<PathBuf>,
}

impl PrimaryFlags {
    /// The control socket to ask.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        let default = || default_socket(self.interface.as_deref().unwrap_or_default());
        self.socket.clone().unwrap_or_else(default)
    }
}

/// The flags of `events`.
#[derive(Args, Clone, Debug)]
pub struct EventsFlags {
    /// The primary to ask.
    #[command(flatten)]
    pub primary: PrimaryFlags,

    /// Continue with new events until the primary ends
    #[arg(long)]
    pub follow: bool,

    /// Print JSON, one object per line
    #[arg(long)]
    pub json: bool,
}

/// The flags of `workers`.
#[derive(Args, Clone, Debug)]
pub struct WorkersFlags {
    /// The action.
    #[command(subcommand)]
    pub action: WorkersAction,
}

/// The actions of `workers`.
#[derive(Subcommand, Clone, Debug)]
pub enum WorkersAction {
    /// List the workers
    List {
        /// The primary to ask.
        #[command(flatten)]
        primary: PrimaryFlags,
        /// Print JSON: an array of members, as in `xfan stats --json`
        #[arg(long)]
        json: bool,
    },
    /// Start more workers
    ///
    /// They run the command that `xfan run` was given. The setting `max_workers` limits their
    /// number.
    Add {
        /// The number of workers to start, 1 to 64
        #[arg(value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=64))]
        count: u8,
        /// How to order it.
        #[command(flatten)]
        order: OrderFlags,
    },
    /// Let a worker finish its packets, and stop it
    ///
    /// The worker gets no new packets: its flows go to the other workers. It stays down until
    /// `restart`.
    Drain(MemberFlags),
    /// Drain a worker, and start it again
    ///
    /// Also starts a worker that has failed or was drained.
    Restart(MemberFlags),
    /// Drain a worker, and free its member
    Remove(MemberFlags),
}

/// A member, and how to order it.
#[derive(Args, Clone, Debug)]
pub struct MemberFlags {
    /// The member, such as default/0
    #[arg(value_name = "ID")]
    pub member: String,
    /// How to order it.
    #[command(flatten)]
    pub order: OrderFlags,
}

/// The primary to order something from, and whether to wait.
#[derive(Args, Clone, Debug)]
pub struct OrderFlags {
    /// The primary to ask.
    #[command(flatten)]
    pub primary: PrimaryFlags,
    /// Do not wait until it is done
    #[arg(long)]
    pub no_wait: bool,
}

/// The flags of `stats`.
#[derive(Args, Clone, Debug)]
pub struct StatsFlags {
    /// The primary to ask.
    #[command(flatten)]
    pub primary: PrimaryFlags,

    /// Print JSON: one object, or one per line with --watch
    #[arg(long)]
    pub json: bool,

    /// Print again every SECONDS, 1 to 3600 [default: 1]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub watch: Option<u64>,
}

fn after_help() -> String {
    format!("{EXAMPLES}\n\n{}", Exit::help())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Queues};
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_all_its_flags() {
        let line = "xfan run -i eth1 --queues 0-1 -n 2 --cores 2-3,1,1 --socket /tmp/x --user daemon \
                    --pass icmp --pass tcp/22 --log debug -- worker --flag -x";
        let Ok(Command::Run(flags)) = parse(line) else { panic!("{:?}", parse(line)) };
        let config = Config::load(&flags).unwrap();
        assert_eq!(config.port.interface, "eth1");
        assert_eq!(config.port.queues, Queues::List(vec![0, 1]));
        assert_eq!(config.group.workers, 2);
        assert_eq!(config.primary.cores, Some(vec![2, 3, 1, 1]));
        assert_eq!(config.port.pass.len(), 2);
        assert_eq!(config.group.command, ["worker", "--flag", "-x"]);
    }

    #[test]
    fn an_invalid_flag_names_the_limits_and_exits_with_usage() {
        for (line, words) in [
            ("xfan run -i eth1 -n 65", "must be a whole number from 1 to 64"),
            ("xfan run -i eth1 -n two", "must be a whole number from 1 to 64"),
            ("xfan run -i eth/1", "must be the name of an interface"),
            ("xfan run -i eth1 --queues 0,0", "each once"),
            ("xfan run -i eth1 --cores 5-2", "must be a list of CPU numbers"),
            ("xfan run -i eth1 --log loud", "must be \"error\", \"warn\""),
            ("xfan stats", "--interface <IFACE>"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.to_string().contains(words), "{line}: {error}");
            assert_eq!(error.exit_code(), i32::from(Exit::Usage.code()));
        }
    }

    #[test]
    fn stats_watch_every_second_unless_told() {
        let watch = |line| match parse(line) {
            Ok(Command::Stats(flags)) => flags.watch,
            other => panic!("{other:?}"),
        };
        assert_eq!(watch("xfan stats -i eth1"), None);
        assert_eq!(watch("xfan stats -i eth1 --watch"), Some(1));
        assert_eq!(watch("xfan stats --watch 5 --socket /tmp/x"), Some(5));
    }

    #[test]
    fn the_long_help_has_the_exit_codes_and_fits_80_columns() {
        let mut command = Cli::command();
        command.build();
        for name in ["run", "check", "topology", "stats", "workers", "events"] {
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            assert!(help.contains("Exit codes:"), "{name}");
            assert!(help.lines().all(|line| line.chars().count() <= 80), "{name}:\n{help}");
        }
    }
}
