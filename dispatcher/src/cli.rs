//! The command line of `xfan`.

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

const EXAMPLES: &str = "\
Examples:
  Two workers on all queues of eth1, ssh and ping left to the kernel:
    sudo xfan run -i eth1 -n 2 --pass icmp --pass tcp/22 -- xfan-flow

  Who would run where, and why:
    xfan topology -i eth1 -n 4

  The counters, every two seconds:
    sudo xfan stats -i eth1 --watch 2";

/// The whole command line.
#[derive(Parser, Clone, Debug)]
#[command(name = "xfan", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = after_help())]
#[command(max_term_width = 80, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `xfan` can do.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Dispatch an interface's packets to workers, until SIGINT or SIGTERM
    ///
    /// Starts the primary and, if a COMMAND is given, its workers: supervised, pinned, unprivileged.
    /// Needs root (or CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_CHOWN,
    /// CAP_KILL and CAP_SETPCAP).
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

    /// List the workers of a running primary, add, drain, restart or remove some
    #[command(after_long_help = after_help(), arg_required_else_help = true, subcommand_required = true)]
    Workers(WorkersFlags),
}

/// Which primary.
#[derive(Args, Clone, Debug)]
pub struct PrimaryFlags {
    /// Interface of the primary
    #[arg(short, long, value_name = "IFACE", required_unless_present = "socket")]
    pub interface: Option<String>,

    /// Control socket of the primary [default: /run/xfan/IFACE.sock]
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

/// Whose journal to show, and how.
#[derive(Args, Clone, Debug)]
pub struct EventsFlags {
    /// Which primary.
    #[command(flatten)]
    pub primary: PrimaryFlags,

    /// Continue with new events until the primary ends
    #[arg(long)]
    pub follow: bool,

    /// Print JSON, one object per line
    #[arg(long)]
    pub json: bool,
}

/// What to do with whose workers.
#[derive(Args, Clone, Debug)]
pub struct WorkersFlags {
    /// What to do.
    #[command(subcommand)]
    pub action: WorkersAction,
}

/// What can be done with workers.
#[derive(Subcommand, Clone, Debug)]
pub enum WorkersAction {
    /// List them
    List {
        /// Which primary.
        #[command(flatten)]
        primary: PrimaryFlags,
        /// Print JSON: an array of members, as in `xfan stats --json`
        #[arg(long)]
        json: bool,
    },
    /// Start more of them
    ///
    /// Those whose command `xfan run` was given. There can be `max_workers` at a time.
    Add {
        /// How many
        #[arg(value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=64))]
        count: u8,
        /// Which primary.
        #[command(flatten)]
        order: OrderFlags,
    },
    /// Let one finish its packets, and stop it
    ///
    /// It gets no new packets: its flows go to the others. It stays away until `restart`.
    Drain(MemberFlags),
    /// Drain one, and start it again
    ///
    /// Also one that has failed, or that was drained.
    Restart(MemberFlags),
    /// Drain one, and free its place
    Remove(MemberFlags),
}

/// Which member of which primary.
#[derive(Args, Clone, Debug)]
pub struct MemberFlags {
    /// The member, such as default/0
    #[arg(value_name = "ID")]
    pub member: String,
    /// Which primary.
    #[command(flatten)]
    pub order: OrderFlags,
}

/// Which primary, and whether to wait.
#[derive(Args, Clone, Debug)]
pub struct OrderFlags {
    /// Which primary.
    #[command(flatten)]
    pub primary: PrimaryFlags,
    /// Do not wait until it is done
    #[arg(long)]
    pub no_wait: bool,
}

/// Whose counters to show, and how.
#[derive(Args, Clone, Debug)]
pub struct StatsFlags {
    /// Which primary.
    #[command(flatten)]
    pub primary: PrimaryFlags,

    /// Print JSON: one object, or with --watch one per line
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
    fn the_definition_holds_together() {
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
    fn a_wrong_flag_says_what_it_must_be_and_ends_with_the_code_of_usage() {
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
    fn the_long_help_ends_with_the_exit_codes_and_fits_80_columns() {
        let mut command = Cli::command();
        command.build();
        for name in ["run", "check", "topology", "stats", "workers", "events"] {
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            assert!(help.contains("Exit codes:"), "{name}");
            assert!(help.lines().all(|line| line.chars().count() <= 80), "{name}:\n{help}");
        }
    }
}
