//! Replays a capture into the TX queues of an interface, byte for byte, each packet exactly once.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use xfan_tests::replay::{Replay, Spread};
use xfan_tests::tx::MAX_FRAME_BYTES;

/// Replays a capture (pcap or pcapng, also gzipped) into chosen TX queues of an interface, byte for
/// byte, each packet exactly once.
///
/// On a veth pair, what goes through TX queue N arrives on RX queue N of the other end. When the
/// program ends, all packets have arrived there. It prints one line of JSON: packets and bytes
/// sent, packets by queue, and how often a full receiver refused a packet, which was then sent
/// again.
///
/// The capture may be larger than memory. It is read once before the first packet is sent: nothing
/// is sent of a file that is damaged or has a packet too long for the interface. A pipe is read
/// only once, and packets before a fault are sent. Where the capture says that packets end in their
/// FCS, each FCS that matches its packet is removed.
#[derive(Parser)]
#[command(version, after_help = format!("Packets may be {MAX_FRAME_BYTES} bytes long, or the MTU and 18 bytes."))]
struct Arguments {
    /// Sending interface
    #[arg(short, long, value_name = "IFACE")]
    interface: String,

    /// TX queues to use: `all` that are in use (see `ethtool -l`), or a list such as 0,1,3
    #[arg(long, default_value = "all", value_parser = queues)]
    queues: Queues,

    /// What goes to the same queue: `packet` (each to the next), `flow` (both directions together;
    /// memory grows with the number of flows), or a number of packets in a row
    #[arg(long, default_value = "packet")]
    spread: Spread,

    /// How many times to send the capture; a pipe can be sent once
    #[arg(long, default_value_t = 1, value_name = "N")]
    loops: u64,

    /// The most packets per second [default: as fast as possible]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pps: Option<u64>,

    /// The capture
    file: PathBuf,
}

/// The queues; empty means all.
#[derive(Clone)]
struct Queues(Vec<u32>);

fn queues(text: &str) -> Result<Queues, String> {
    if text == "all" {
        return Ok(Queues(Vec::new()));
    }
    let numbers: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
    numbers.map(Queues).map_err(|_| "neither `all` nor numbers separated by commas".into())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match replay(&arguments) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("xfan-replay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn replay(arguments: &Arguments) -> Result<String, Box<dyn std::error::Error>> {
    let replay = Replay {
        interface: arguments.interface.clone(),
        queues: arguments.queues.0.clone(),
        spread: arguments.spread,
        loops: arguments.loops,
        frames_per_second: arguments.pps,
    };
    Ok(serde_json::to_string(&replay.run_file(&arguments.file)?)?)
}
