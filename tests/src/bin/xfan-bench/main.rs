//! Measures parts of xfan, each beside what it is to be compared with. `scripts/bench` runs them interleaved.

mod dispatch;
mod fanout;
mod line;
mod net;
mod priority;
mod raw;
mod receivers;
mod recovery;
mod ring;
mod table;
mod tally;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Why there is no measurement: a sentence.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measures parts of xfan
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// From one end of a veth pair to the other: raw AF_XDP, AF_PACKET fanout and xfan, interleaved
    Net(net::Options),
    /// The dispatch path alone: packets in memory, real worker processes, no interface
    Dispatch(dispatch::Options),
    /// The ring alone: two processes on two CPUs, beside one bare cache line
    Ring(ring::Options),
    /// From a worker's death until others have its packets; and what joining and leaving cost
    Recovery(recovery::Options),
    /// The other process of `ring`
    #[command(hide = true)]
    RingPeer,
    /// A receiver for `net`: raw AF_XDP, one socket, receive and refill; until SIGTERM
    Raw(raw::Options),
    /// A receiver for `net`: AF_PACKET, TPACKET_V3, one of several processes that share the packets; until SIGTERM
    Fanout(fanout::Options),
}

fn main() -> ExitCode {
    let what = Cli::parse().what;
    // What another xfan-bench has started has its priority already.
    if !matches!(what, What::RingPeer | What::Raw(_) | What::Fanout(_)) {
        priority::raise();
    }
    let result = match what {
        What::Net(options) => net::run(&options),
        What::Dispatch(options) => dispatch::run(&options),
        What::Ring(options) => ring::run(&options),
        What::Recovery(options) => recovery::run(&options),
        What::RingPeer => ring::serve(),
        What::Raw(options) => raw::run(&options),
        What::Fanout(options) => fanout::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
