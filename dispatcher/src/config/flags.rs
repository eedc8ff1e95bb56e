//! The settings that the command line can give.

use std::path::PathBuf;

use clap::Args;

use super::value::{self, Read, Value};
use super::{Config, LogLevel, PassRule, Queues};

/// All flags that are settings.
#[derive(Args, Clone, Debug, Default)]
pub struct Flags {
    /// What runs where.
    #[command(flatten)]
    pub placement: PlacementFlags,
    /// How it runs.
    #[command(flatten)]
    pub run: RunFlags,
}

/// Which interface, and which threads on which CPUs.
#[derive(Args, Clone, Debug, Default)]
pub struct PlacementFlags {
    /// Interface whose packets are dispatched
    #[arg(short, long, value_name = "IFACE", value_parser = from_text(value::interface))]
    pub interface: Option<String>,

    /// RX queues that get a lane: `all`, or a list such as 0-3,6 [default: all]
    #[arg(long, value_name = "LIST", value_parser = from_text(value::queues))]
    pub queues: Option<Queues>,

    /// Worker processes, 1 to 64 [default: 1]
    #[arg(short = 'n', long, value_name = "WORKERS", value_parser = workers)]
    pub workers: Option<usize>,

    /// CPUs to run on, such as 2-5,7: first the lanes', then the workers'
    /// [default: the nearest to the interface]
    #[arg(long, value_name = "LIST", value_parser = cores)]
    pub cores: Option<Cores>,

    /// TOML file with these and more settings; flags win over it
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How the primary and its workers run.
#[derive(Args, Clone, Debug, Default)]
pub struct RunFlags {
    /// Control socket [default: /run/xfan/IFACE.sock]
    #[arg(long, value_name = "PATH", value_parser = socket_flag())]
    pub socket: Option<PathBuf>,

    /// User the workers run as [default: who called sudo, else nobody]
    ///
    /// `root` must be asked for: a worker that runs as root can write to the packets of all others.
    #[arg(long, value_name = "NAME", value_parser = from_text(value::user))]
    pub user: Option<String>,

    /// What is left to the kernel stack: icmp, tcp/22, …; once per rule
    ///
    /// ARP, IPv6 neighbour discovery and other non-IP frames always are. Replaces the list in the file.
    #[arg(long, value_name = "RULE")]
    pub pass: Vec<PassRule>,

    /// How much is logged: error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = from_text(value::log_level))]
    pub log: Option<LogLevel>,

    /// Program that every worker runs, and its arguments
    ///
    /// Without one the workers' places stay vacant until workers attach through the socket.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// CPU numbers, as one argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(pub Vec<usize>);

impl Flags {
    /// Puts what was given over what `config` holds.
    pub(super) fn apply(&self, config: &mut Config) {
        fn over<T: Clone>(place: &mut T, flag: Option<&T>) {
            if let Some(value) = flag {
                place.clone_from(value);
            }
        }
        let Self { placement, run } = self;
        over(&mut config.interface, placement.interface.as_ref());
        over(&mut config.queues, placement.queues.as_ref());
        over(&mut config.workers, placement.workers.as_ref());
        over(&mut config.cores, placement.cores.clone().map(|Cores(list)| Some(list)).as_ref());
        over(&mut config.socket, run.socket.as_ref());
        over(&mut config.user, run.user.clone().map(Some).as_ref());
        over(&mut config.log, run.log.as_ref());
        over(&mut config.pass, Some(&run.pass).filter(|rules| !rules.is_empty()));
        over(&mut config.command, Some(&run.command).filter(|command| !command.is_empty()));
    }
}

/// Reads a flag as the file's text of the same meaning is read.
fn from_text<T: Clone + Send + Sync + 'static>(
    read: fn(&Value) -> Read<T>,
) -> impl Fn(&str) -> Read<T> + Clone + Send + Sync + 'static {
    move |text| read(&Value::Text(text.to_owned()))
}

/// Reads the path of a control socket.
pub(crate) fn socket_flag() -> impl Fn(&str) -> Read<PathBuf> + Clone + Send + Sync + 'static {
    from_text(value::socket)
}

fn workers(text: &str) -> Read<usize> {
    let number = text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Integer);
    value::workers(&number)
}

fn cores(text: &str) -> Read<Cores> {
    value::cores(&Value::Text(text.to_owned())).map(Cores)
}
