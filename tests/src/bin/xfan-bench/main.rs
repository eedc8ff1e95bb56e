//! Measures parts of xfan, each beside something to compare it with. `scripts/bench` interleaves
//! them.

mod dispatch;
mod fanout;
mod line;
mod net;
mod priority;
mod raw;
mod receivers;
mod recovery;
mod ring;
mod spread;
mod table;
mod tally;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Why a measurement failed: a sentence.
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
    /// The time from a worker's death until others have its packets; the cost of joins and leaves
    Recovery(recovery::Options),
    /// The other process of `ring`
    #[command(hide = true)]
    RingPeer,
    /// A receiver for `net`: raw AF_XDP, one socket, receive and refill; until SIGTERM
    Raw(raw::Options),
    /// A receiver for `net`: AF_PACKET, TPACKET_V3, one of several processes that share the
    /// packets; until SIGTERM
    Fanout(fanout::Options),
}

fn main() -> ExitCode {
    let what = Cli::parse().what;
    // A process that another xfan-bench started has its priority already.
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
