//! The smallest secondary: finds a running primary by its interface, joins it, and prints the
//! packets that arrive.
//!
//! ```sh
//! sudo xfan run -i eth1 &
//! sudo target/debug/examples/secondary eth1 --wait
//! ```
//!
//! On SIGINT or SIGTERM it first receives the packets that are on their way to it, so none is lost.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use xfan_worker::{AttachError, Packet, Received, RefusalCode, Worker, packet, say};

/// Pause between two attempts with --wait: short for a person who waits, and next to no CPU time.
const PAUSE: Duration = Duration::from_millis(100);

/// Joins a running dispatcher and prints one line for each packet.
#[derive(Parser)]
struct Arguments {
    /// Interface whose dispatcher to join.
    #[arg(value_name = "IFACE", required_unless_present = "socket")]
    interface: Option<String>,
    /// The dispatcher's control socket [default: /run/xfan/IFACE.sock].
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Wait for the dispatcher if it has not started yet.
    #[arg(long)]
    wait: bool,
    /// Exit after this many packets.
    #[arg(long)]
    count: Option<usize>,
}

impl Arguments {
    fn socket(&self) -> PathBuf {
        let by_name = || xfan_worker::default_socket(self.interface.as_deref().unwrap_or_default());
        self.socket.clone().unwrap_or_else(by_name)
    }
}

/// Attaches to the dispatcher. With `--wait`, waits until one listens.
fn attach(arguments: &Arguments) -> Result<Worker, AttachError> {
    let socket = arguments.socket();
    loop {
        let unavailable = match Worker::builder().socket(&socket).leave_on_signals().attach() {
            Ok(worker) => return Ok(worker),
            Err(error @ AttachError::NoDispatcher(_)) => error,
            // It is stopping. Another one may follow.
            Err(error @ AttachError::Refused { code: RefusalCode::Closing, .. }) => error,
            Err(error) => return Err(error),
        };
        if !arguments.wait {
            return Err(unavailable);
        }
        std::thread::sleep(PAUSE);
    }
}

fn print(out: &mut impl Write, packet: Packet<'_>) -> io::Result<()> {
    let length = packet.data().len();
    write!(out, "{length} bytes, hash {:08x}, lane {}", packet.hash(), packet.lane())?;
    if let Some(packet::Packet { key, .. }) = packet::Packet::parse(packet.data()) {
        let packet::FlowKey { source, source_port, destination, destination_port, protocol } = key;
        write!(out, ", {source} {source_port} > {destination} {destination_port}, protocol {protocol}")?;
    }
    writeln!(out)
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let mut worker = attach(arguments)?;
    say(format_args!(
        "secondary: attached as member {} of {}",
        worker.member(),
        arguments.socket().display()
    ));
    let mut left = arguments.count.unwrap_or(usize::MAX);
    let mut out = io::BufWriter::new(io::stdout().lock());
    // Packets that it received but did not print go to the dispatcher's other workers.
    while left > 0 {
        match worker.recv(Duration::from_millis(100))? {
            Received::Packets(batch) => {
                let wanted = left.min(batch.len());
                batch.iter().take(wanted).try_for_each(|packet| print(&mut out, packet))?;
                out.flush()?;
                batch.commit_first(wanted);
                left -= wanted;
            }
            Received::Idle => {}
            Received::Closed => break,
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let Err(error) = run(&Arguments::parse()) else { return ExitCode::SUCCESS };
    say(format_args!("secondary: {error}"));
    ExitCode::FAILURE
}
