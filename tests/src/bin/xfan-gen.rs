//! Generates traffic: much of it from within the kernel, or a little into a capture file.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Parser};
use xfan_tests::capture;
use xfan_tests::generator::{self, End, Load, Report};
use xfan_tests::traffic;

/// Generates UDP traffic from within the kernel into a veth interface, or writes a capture of
/// synthetic traffic.
///
/// The frames arrive on the other end's RX queue with the number of the sending CPU, if that end
/// has an XDP program or GRO. Every frame has a sequence number, 8 bytes from byte 42 on. The
/// driver counts what was sent: offered frames were made, sent frames were accepted by the other
/// end, refused frames found its ring full.
#[derive(Parser)]
#[command(version, group = ArgGroup::new("where").required(true))]
struct Arguments {
    /// Sending interface, one end of a veth pair
    #[arg(short, long, value_name = "IFACE", group = "where")]
    interface: Option<String>,

    /// Bytes of a frame, without FCS: 60 to 1514
    #[arg(long, default_value_t = 64, value_name = "BYTES", conflicts_with = "write_pcap")]
    size: u16,

    /// Number of flows
    #[arg(long, default_value_t = 4096, value_name = "N")]
    flows: u32,

    /// Let every other round over the flows go the other way
    #[arg(long, conflicts_with = "write_pcap")]
    both_directions: bool,

    /// Frames per second, at least 1000 [default: as fast as possible]
    #[arg(long, value_name = "N", conflicts_with = "write_pcap")]
    pps: Option<u64>,

    /// How long to send [default: 1, unless --count is given]
    #[arg(long, value_name = "S", value_parser = seconds, conflicts_with_all = ["count", "write_pcap"])]
    seconds: Option<Duration>,

    /// The exact number of frames to make
    #[arg(long, value_name = "N", conflicts_with = "write_pcap")]
    count: Option<u32>,

    /// CPU to send from
    #[arg(long, default_value_t = 0, value_name = "C", conflicts_with = "write_pcap")]
    cpu: usize,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Send nothing; write a capture of --packets packets and --flows flows (TCP, UDP, ICMP; IPv4,
    /// IPv6; VLAN; both directions)
    #[arg(long, value_name = "FILE", group = "where")]
    write_pcap: Option<PathBuf>,

    /// Packets of the capture
    #[arg(long, default_value_t = 10_000, value_name = "N", requires = "write_pcap")]
    packets: u32,

    /// The same seed makes the same capture
    #[arg(long, default_value_t = 1, value_name = "N", requires = "write_pcap")]
    seed: u64,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("xfan-gen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<String, Box<dyn std::error::Error>> {
    if let Some(path) = &arguments.write_pcap {
        let (packets, flows) = (arguments.packets, arguments.flows);
        let mut bytes = 0;
        let frames = traffic::synthetic_frames(flows, packets, arguments.seed);
        capture::write(path, frames.inspect(|frame| bytes += frame.len()))?;
        return Ok(match arguments.json {
            true => serde_json::json!({ "packets": packets, "bytes": bytes, "flows": flows }).to_string(),
            false => format!("{}: {packets} packets, {bytes} bytes, {flows} flows", path.display()),
        });
    }
    let report = generator::run(&load(arguments))?;
    Ok(if arguments.json { serde_json::to_string(&report)? } else { text(&report) })
}

fn load(arguments: &Arguments) -> Load {
    let end = match (arguments.count, arguments.seconds) {
        (Some(frames), _) => End::Frames(frames),
        (None, time) => End::After(time.unwrap_or(Duration::from_secs(1))),
    };
    Load {
        interface: arguments.interface.clone().unwrap_or_default(),
        frame_bytes: arguments.size,
        flows: arguments.flows,
        both_directions: arguments.both_directions,
        frames_per_second: arguments.pps,
        end,
        cpu: arguments.cpu,
    }
}

fn text(report: &Report) -> String {
    format!(
        "{} frames offered in {:.3} s ({:.0} per second), {} sent to queue {}, {} refused; {} times late",
        report.offered,
        report.seconds,
        report.offered_per_second,
        report.sent,
        report.queue,
        report.refused,
        report.late
    )
}
