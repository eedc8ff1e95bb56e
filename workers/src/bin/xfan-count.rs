//! `xfan-count`: reads the headers of every packet and counts packets and bytes. The shortest of
//! the bundled workers, and the one that benchmarks run.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use signal_hook::consts::SIGHUP;
use xfan_worker::{AttachError, Packet, Received, RecvError, Worker, say};

/// Counts packets: a worker of the xfan packet dispatcher. Prints one JSON object when it exits.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Control socket of the dispatcher to join [default: the one that `xfan run` sets in the
    /// environment].
    #[arg(long, value_name = "SOCKET", visible_alias = "socket")]
    attach: Option<PathBuf>,
    /// Group to join [default: the dispatcher's first].
    #[arg(long)]
    group: Option<String>,
    /// Member to become, such as default/0 [default: any vacant member].
    #[arg(long)]
    member: Option<String>,
    /// When the dispatcher exits, wait for the next one on the same socket.
    #[arg(long)]
    reconnect: bool,
    /// Sleep this long before each commit, such as 10ms, to simulate a slow worker.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    sleep_per_batch: Option<Duration>,
}

/// Ethertype, version and header length of the packets it reads: IPv4 without options.
const IPV4: [u8; 3] = [0x08, 0x00, 0x45];

/// The totals that it prints.
#[derive(Default, serde::Serialize)]
struct Totals {
    member: String,
    packets: u64,
    bytes: u64,
    /// Packets that are not IPv4 without options, or too short to read.
    other: u64,
    /// Sum of addresses and ports. It proves that they were read, and does not depend on the order
    /// of packets.
    checksum: u64,
}

impl Totals {
    #[inline(always)]
    fn count(&mut self, packet: Packet<'_>) {
        let data = packet.data();
        self.packets += 1;
        self.bytes += data.len() as u64;
        match data.first_chunk::<38>() {
            Some(header) if header[12..15] == IPV4 => {
                let word = |at: usize| {
                    u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
                };
                let [source, destination, ports] = [word(26), word(30), word(34)].map(u64::from);
                self.checksum = self.checksum.wrapping_add(source + destination + ports);
            }
            _ => self.other += 1,
        }
    }
}

fn count(arguments: &Arguments, totals: &mut Totals) -> Result<(), Box<dyn std::error::Error>> {
    // SIGHUP asks for files to be reopened. This worker has none, but must not die of the signal.
    signal_hook::flag::register(SIGHUP, Default::default())?;
    let mut builder = Worker::builder().leave_on_signals();
    if let Some(socket) = &arguments.attach {
        builder = builder.socket(socket);
    }
    if let Some(group) = &arguments.group {
        builder = builder.group(group);
    }
    if let Some(member) = &arguments.member {
        builder = builder.member(member);
    }
    let mut worker = builder.attach()?;
    totals.member = worker.member().into();
    let (mut packets, mut bytes) = (worker.counter("packets")?, worker.counter("bytes")?);
    let patience = arguments.reconnect.then_some(Duration::MAX).or(worker.survival());
    loop {
        let received = match (worker.recv(Duration::from_millis(100)), patience) {
            (Err(RecvError::PrimaryGone), Some(patience)) => {
                match worker.reattach(patience) {
                    Err(AttachError::Leaving) => return Ok(()),
                    result => result?,
                }
                totals.member = worker.member().into();
                (packets, bytes) = (worker.counter("packets")?, worker.counter("bytes")?);
                continue;
            }
            (received, _) => received?,
        };
        match received {
            Received::Packets(batch) => {
                for packet in &batch {
                    totals.count(packet);
                }
                packets.set(totals.packets);
                bytes.set(totals.bytes);
                if let Some(pause) = arguments.sleep_per_batch {
                    std::thread::sleep(pause);
                }
                batch.commit();
            }
            Received::Idle => {}
            Received::Closed => return Ok(()),
        }
    }
}

fn print(totals: &Totals) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(format!("{}\n", serde_json::json!(totals)).as_bytes())?;
    out.flush()
}

fn main() -> ExitCode {
    let (arguments, mut totals) = (Arguments::parse(), Totals::default());
    let counted = count(&arguments, &mut totals);
    let printed = if totals.member.is_empty() { Ok(()) } else { print(&totals) };
    if let Err(error) = &printed {
        say(format_args!("xfan-count: cannot print the totals: {error}"));
    }
    if let Err(error) = &counted {
        say(format_args!("xfan-count: {error}"));
    }
    if counted.is_ok() && printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
