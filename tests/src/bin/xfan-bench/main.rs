//! Measures parts of xfan, each beside what it is to be compared with. `scripts/bench` runs them interleaved.

mod dispatch;
mod line;
mod ring;

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
    /// The dispatch path alone: packets in memory, real worker processes, no interface
    Dispatch(dispatch::Options),
    /// The ring alone: two processes on two CPUs, beside one bare cache line
    Ring(ring::Options),
    /// The other process of `ring`
    #[command(hide = true)]
    RingPeer,
}

fn main() -> ExitCode {
    let result = match Cli::parse().what {
        What::Dispatch(options) => dispatch::run(&options),
        What::Ring(options) => ring::run(&options),
        What::RingPeer => ring::serve(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
