//! A manager: shows the state and the load of a dispatcher's members.
//!
//! ```sh
//! cargo run -p xfan-worker --example manager -- eth1
//! ```
//!
//! It asks over the control socket, which takes the same permission as attaching a worker. It does
//! not become a worker.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Deserialize;

/// Shows the members of a running dispatcher, every second.
#[derive(Parser)]
struct Arguments {
    /// Interface whose dispatcher to ask.
    #[arg(value_name = "IFACE", required_unless_present = "socket")]
    interface: Option<String>,
    /// The dispatcher's control socket [default: /run/xfan/IFACE.sock].
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Show them once, with rates since the dispatcher's start.
    #[arg(long)]
    once: bool,
}

impl Arguments {
    fn socket(&self) -> PathBuf {
        let by_name = || xfan_worker::default_socket(self.interface.as_deref().unwrap_or_default());
        self.socket.clone().unwrap_or_else(by_name)
    }
}

/// The parts of the report that this program shows.
#[derive(Deserialize)]
struct Report {
    ports: Vec<Port>,
    pid: u32,
    uptime_ns: u64,
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Port {
    name: String,
}

#[derive(Deserialize)]
struct Group {
    members: Vec<Member>,
}

#[derive(Deserialize)]
struct Member {
    id: String,
    pid: u32,
    core: Option<usize>,
    state: String,
    committed: u64,
    busy_ns: u64,
    backlog: u64,
    dropped: u64,
}

impl Report {
    fn members(&self) -> impl Iterator<Item = &Member> {
        self.groups.iter().flat_map(|group| &group.members)
    }

    /// Prints one line per member. Rates are those since `earlier`, if it is a report of the same
    /// dispatcher, else those since the dispatcher's start.
    fn print(&self, earlier: Option<&Report>, out: &mut impl Write) -> io::Result<()> {
        let earlier = earlier.filter(|earlier| earlier.pid == self.pid);
        let elapsed = self.uptime_ns.saturating_sub(earlier.map_or(0, |earlier| earlier.uptime_ns)).max(1);
        let per = |count: u64, whole: u64| u128::from(count) * u128::from(whole) / u128::from(elapsed);
        let ports: Vec<_> = self.ports.iter().map(|port| port.name.as_str()).collect();
        writeln!(out, "{}: primary {}, up {} s", ports.join(", "), self.pid, self.uptime_ns / 1_000_000_000)?;
        writeln!(
            out,
            "{:<14} {:>8} {:>4} {:<9} {:>10} {:>6} {:>9} {:>9}",
            "member", "pid", "core", "state", "packets/s", "busy %", "backlog", "dropped"
        )?;
        for member in self.members() {
            let before = earlier.and_then(|report| report.members().find(|other| other.id == member.id));
            let packets = member.committed.saturating_sub(before.map_or(0, |before| before.committed));
            let busy_ns = member.busy_ns.saturating_sub(before.map_or(0, |before| before.busy_ns));
            writeln!(
                out,
                "{:<14} {:>8} {:>4} {:<9} {:>10} {:>6} {:>9} {:>9}",
                member.id,
                member.pid,
                member.core.map_or_else(|| "-".into(), |core| core.to_string()),
                member.state,
                per(packets, 1_000_000_000),
                per(busy_ns, 100),
                member.backlog,
                member.dropped
            )?;
        }
        out.flush()
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let mut out = io::stdout().lock();
    let mut earlier = None;
    loop {
        let report: Report = serde_json::from_value(xfan_worker::report(arguments.socket())?)?;
        if out.is_terminal() && !arguments.once {
            // Move the cursor to the upper left corner, and clear the screen below it.
            write!(out, "\x1b[H\x1b[J")?;
        }
        report.print(earlier.as_ref(), &mut out)?;
        if arguments.once {
            return Ok(());
        }
        earlier = Some(report);
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn main() -> ExitCode {
    let Err(error) = run(&Arguments::parse()) else { return ExitCode::SUCCESS };
    xfan_worker::say(format_args!("manager: {error}"));
    ExitCode::FAILURE
}
