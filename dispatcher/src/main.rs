//! The `xfan` command.

#![forbid(unsafe_code)]

mod tools;

use std::io;
use std::process::ExitCode;

use clap::Parser;
use xfan::cli::{Cli, Command};
use xfan::config::{Config, Flags, PlacementFlags};
use xfan::exit::Exit;
use xfan::host::interface::Interface;
use xfan::host::placement::place;
use xfan::host::show::show;
use xfan::host::sys::block_terminal_signals;
use xfan::host::topology::Machine;
use xfan::print::{print_in_time, say};
use xfan::process::inherit;
use xfan::start::{RunError, run};
use xfan::{log, report};
use xfan_shm::limits::explained;

/// An exit code, and the message that explains it.
type Failed = (Exit, String);
/// How a command ended.
type Ended = Result<(), Failed>;

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // `--help` and `--version` are output, too: it is an error if they cannot be printed.
            let code = if error.print().is_err() { Exit::Failure.code() } else { 0 };
            return code.max(u8::try_from(error.exit_code()).unwrap_or(u8::MAX)).into();
        }
    };
    let result = match command {
        Command::Run(flags) => run_primary(&flags),
        Command::Check(flags) => check(&flags),
        Command::Topology(flags) => show_topology(flags),
        Command::Stats(flags) => tools::stats(&flags),
        Command::Events(flags) => tools::events(&flags),
        Command::Workers(flags) => tools::workers(&flags.action),
    };
    match result {
        Ok(()) => Exit::Ok.into(),
        Err((exit, message)) => {
            say(&message);
            exit.into()
        }
    }
}

fn failed(error: impl Into<RunError>) -> Failed {
    let error = error.into();
    (Exit::from(&error), explained(error))
}

/// Runs a primary, and logs its error as well as printing it.
fn run_primary(flags: &Flags) -> Ended {
    inherit::save_limits();
    block_terminal_signals().map_err(failed)?;
    let config = Config::load(flags).map_err(failed)?;
    log::begin(config.log.level.into(), config.log.file.as_deref()).map_err(failed)?;
    let result = dispatch(&config);
    if let (Err((_, message)), Some(_)) = (&result, &config.log.file) {
        tracing::error!("{message}");
    }
    // The message on standard error comes after the last line logged there.
    log::flush();
    result
}

/// Runs a primary, and prints its totals. The primary's own error takes precedence over a failure
/// to print them.
fn dispatch(config: &Config) -> Ended {
    let outcome = run(config).map_err(failed)?;
    let printed = print_in_time(&report::render(&outcome.report, None));
    if let Err(error) = &printed {
        tracing::error!("the totals cannot be printed: {error}");
    }
    match outcome.error {
        Some(error) => Err(failed(error)),
        None if !outcome.imbalances.is_empty() => Err(failed(RunError::Imbalance(outcome.imbalances))),
        None if !outcome.unaccounted.is_empty() => Err(failed(RunError::Unaccounted(outcome.unaccounted))),
        // A reader that closed the pipe did not want the totals.
        None => match printed {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(print_failed(error)),
            _ => Ok(()),
        },
    }
}

/// Prints the settings that `run` would use.
fn check(flags: &Flags) -> Ended {
    let config = Config::load(flags).map_err(failed)?;
    print(&config.to_toml())
}

/// Prints which thread would run on which CPU.
fn show_topology(PlacementFlags(flags): PlacementFlags) -> Ended {
    let Config { port, primary, group, .. } = Config::load(&flags).map_err(failed)?;
    let interface = Interface::find(&port.interface).map_err(failed)?;
    let queues = interface.select(&port.queues).map_err(failed)?;
    let machine = Machine::discover(Some(&interface)).map_err(failed)?;
    let placement = place(&machine, queues.len(), group.workers, primary.cores.as_deref()).map_err(failed)?;
    print(&show(&machine, &interface, &queues, &placement))
}

/// Prints to standard output. If the reader has closed the pipe, the program exits with status 0.
///
/// # Errors
/// Standard output cannot be written to.
fn print(text: &str) -> Ended {
    match xfan::print::print(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(print_failed),
    }
}

fn print_failed(error: io::Error) -> Failed {
    (Exit::Failure, format!("cannot print: {error}"))
}
