//! The `xfan` command.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use xfan::cli::{Cli, Command, StatsFlags};
use xfan::config::{Config, Flags, PlacementFlags};
use xfan::exit::Exit;
use xfan::interface::Interface;
use xfan::placement::place;
use xfan::run::{RunError, run};
use xfan::topology::Machine;
use xfan::{control, report, topology};
use xfan_shm::protocol::ProtocolError;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(flags) => run_primary(&flags),
        Command::Check(flags) => check(&flags),
        Command::Topology(flags) => show_topology(flags),
        Command::Stats(flags) => show_stats(&flags),
    };
    match result {
        Ok(()) => Exit::Ok.into(),
        Err((exit, message)) => {
            eprintln!("xfan: {message}");
            exit.into()
        }
    }
}

type Ended = Result<(), (Exit, String)>;

fn failed(error: impl Into<RunError>) -> (Exit, String) {
    let error = error.into();
    (error.exit(), error.to_string())
}

fn run_primary(flags: &Flags) -> Ended {
    let config = Config::load(flags).map_err(failed)?;
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::from(config.log))
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let outcome = run(&config).map_err(failed)?;
    print(&report::render(&outcome.report, None));
    match outcome.error {
        Some(error) => Err(failed(error)),
        None if !outcome.imbalances.is_empty() => Err(failed(RunError::Imbalance(outcome.imbalances))),
        None => Ok(()),
    }
}

fn check(flags: &Flags) -> Ended {
    let config = Config::load(flags).map_err(failed)?;
    print(&config.to_toml());
    Ok(())
}

fn show_topology(flags: PlacementFlags) -> Ended {
    let config = Config::load(&Flags { placement: flags, ..Flags::default() }).map_err(failed)?;
    let interface = Interface::find(&config.interface).map_err(failed)?;
    let queues = interface.select(&config.queues).map_err(failed)?;
    let machine = Machine::discover(Some(&interface)).map_err(failed)?;
    let placement = place(&machine, queues.len(), config.workers, config.cores.as_deref()).map_err(failed)?;
    print(&topology::show(&machine, &interface, &queues, &placement));
    Ok(())
}

fn show_stats(flags: &StatsFlags) -> Ended {
    let socket = flags.socket();
    let mut earlier = None;
    loop {
        let report = control::ask_for_report(&socket).map_err(|error| match &error {
            ProtocolError::Io(io) => {
                use std::io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
                match io.kind() {
                    NotFound | ConnectionRefused => (
                        Exit::Failure,
                        format!(
                            "no primary answers on {}: start one with `xfan run`, or name its socket",
                            socket.display()
                        ),
                    ),
                    PermissionDenied => (
                        Exit::Permission,
                        format!("{} may be used by root and the workers' user only", socket.display()),
                    ),
                    _ => (Exit::Failure, error.to_string()),
                }
            }
            _ => (Exit::Failure, error.to_string()),
        })?;
        if flags.json {
            print(
                &(serde_json::to_string(&report).map_err(|error| (Exit::Failure, error.to_string()))? + "\n"),
            );
        } else {
            let home =
                if flags.watch.is_some() && std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            print(&(home.to_owned() + &report::render(&report, earlier.as_ref())));
        }
        let Some(seconds) = flags.watch else { return Ok(()) };
        earlier = Some(report);
        std::thread::sleep(Duration::from_secs(seconds));
    }
}

/// Prints; a reader that has gone away ends the program, quietly.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}
