//! The `xfan` command.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use xfan::cli::{Cli, Command, EventsFlags, PrimaryFlags, StatsFlags, WorkersAction};
use xfan::config::{Config, Flags, PlacementFlags};
use xfan::control::{client, journal};
use xfan::exit::Exit;
use xfan::host::interface::Interface;
use xfan::host::placement::place;
use xfan::host::sys::block_terminal_signals;
use xfan::host::topology;
use xfan::host::topology::Machine;
use xfan::print::{print_in_time, say};
use xfan::process::inherit;
use xfan::start::{RunError, run};
use xfan::text::escaped_json;
use xfan::{log, print, report};
use xfan_shm::limits::explained;
use xfan_shm::protocol::{ProtocolError, RefusalCode, Reply, Request, WorkersOrder};

fn main() -> ExitCode {
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => {
            // Help and version are results, too.
            let code = if error.print().is_err() { Exit::Failure.code() } else { 0 };
            return code.max(u8::try_from(error.exit_code()).unwrap_or(u8::MAX)).into();
        }
    };
    let result = match command {
        Command::Run(flags) => run_primary(&flags),
        Command::Check(flags) => check(&flags),
        Command::Topology(flags) => show_topology(flags),
        Command::Stats(flags) => show_stats(&flags),
        Command::Workers(flags) => workers(&flags.action),
        Command::Events(flags) => show_events(&flags),
    };
    match result {
        Ok(()) => Exit::Ok.into(),
        Err((exit, message)) => {
            say(&message);
            exit.into()
        }
    }
}

type Ended = Result<(), (Exit, String)>;

fn failed(error: impl Into<RunError>) -> (Exit, String) {
    let error = error.into();
    (Exit::from(&error), explained(error))
}

fn run_primary(flags: &Flags) -> Ended {
    inherit::note_limits();
    block_terminal_signals().map_err(failed)?;
    let config = Config::load(flags).map_err(failed)?;
    log::begin(config.log.into(), config.log_file.as_deref()).map_err(failed)?;
    let result = dispatch(&config);
    if let (Err((_, message)), Some(_)) = (&result, &config.log_file) {
        tracing::error!("{message}");
    }
    // What is said on standard error comes after what was logged there.
    log::flush();
    result
}

/// Runs a primary, and prints its totals. Its own outcome counts more than whether they could be
/// printed.
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
        // A reader that has gone away did not want them.
        None => match printed {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(not_printed(error)),
            _ => Ok(()),
        },
    }
}

fn check(flags: &Flags) -> Ended {
    let config = Config::load(flags).map_err(failed)?;
    print(&config.to_toml())
}

fn show_topology(flags: PlacementFlags) -> Ended {
    let config = Config::load(&Flags { placement: flags, ..Flags::default() }).map_err(failed)?;
    let interface = Interface::find(&config.interface).map_err(failed)?;
    let queues = interface.select(&config.queues).map_err(failed)?;
    let machine = Machine::discover(Some(&interface)).map_err(failed)?;
    let placement = place(&machine, queues.len(), config.workers, config.cores.as_deref()).map_err(failed)?;
    print(&topology::show(&machine, &interface, &queues, &placement))
}

fn show_stats(flags: &StatsFlags) -> Ended {
    let mut earlier = None;
    loop {
        let report = report_of(&flags.primary)?;
        if flags.json {
            print(&(to_json(&report)? + "\n"))?;
        } else {
            if flags.watch.is_some() && io::stdout().is_terminal() {
                print::clear().map_err(not_printed)?;
            }
            print(&report::render(&report, earlier.as_ref()))?;
        }
        let Some(seconds) = flags.watch else { return Ok(()) };
        earlier = Some(report);
        std::thread::sleep(Duration::from_secs(seconds));
    }
}

fn workers(action: &WorkersAction) -> Ended {
    let (flags, order) = match action {
        WorkersAction::List { primary, json } => {
            let report = report_of(primary)?;
            let members: Vec<_> = report.members().collect();
            return print(&if *json { to_json(&members)? + "\n" } else { report::render_members(&report) });
        }
        WorkersAction::Add { count, order } => (order, WorkersOrder::Add(usize::from(*count))),
        WorkersAction::Drain(flags) => (&flags.order, WorkersOrder::Drain(flags.member.clone())),
        WorkersAction::Restart(flags) => (&flags.order, WorkersOrder::Restart(flags.member.clone())),
        WorkersAction::Remove(flags) => (&flags.order, WorkersOrder::Remove(flags.member.clone())),
    };
    let before = report_of(&flags.primary)?;
    let socket = flags.primary.socket();
    let request = Request::Workers(order.clone());
    let members = match client::ask(&socket, &request).map_err(|error| no_answer(&socket, &error))? {
        Reply::Ordered(members) => members,
        _ => return Err((Exit::Failure, format!("{} answered something else", socket.display()))),
    };
    let pid_before = |id: &str| before.member(id).map_or(0, |member| member.pid);
    let come = matches!(order, WorkersOrder::Add(_) | WorkersOrder::Restart(_));
    for id in members {
        if !flags.no_wait {
            wait_for(&flags.primary, &id, pid_before(&id), come)?;
        }
        print(&format!("{id}\n"))?;
    }
    Ok(())
}

/// Waits until a member has another process than `before`, or none; and, if it is to `come`, until that runs.
fn wait_for(primary: &PrimaryFlags, id: &str, before: u32, come: bool) -> Ended {
    loop {
        let member = report_of(primary)?.member(id).cloned().unwrap_or_default();
        let state = member.state.as_str();
        let done = if come {
            member.pid != before && state == "running"
        } else {
            member.pid == 0 || member.pid != before
        };
        if done {
            return Ok(());
        }
        if come && member.pid == 0 && matches!(state, "crashed" | "failed" | "stopped" | "vacant") {
            let how = member.last_exit.unwrap_or_else(|| "see its primary's log".into());
            return Err((Exit::Workers, format!("member {id} is {state}: {how}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How often a follower asks for what is new.
const FOLLOW: Duration = Duration::from_millis(200);

fn show_events(flags: &EventsFlags) -> Ended {
    let socket = flags.primary.socket();
    let mut last = 0;
    loop {
        let page: journal::Page = match client::ask(&socket, &Request::Events(last)) {
            Ok(Reply::Events(page)) => {
                serde_json::from_value(page).map_err(|error| (Exit::Failure, error.to_string()))?
            }
            Ok(_) => return Err((Exit::Failure, format!("{} answered something else", socket.display()))),
            // It has been there: now it has ended.
            Err(error) if last > 0 && is_gone(&error) => return Ok(()),
            Err(error) => return Err(no_answer(&socket, &error)),
        };
        if page.missed > 0 {
            say(&format!("{} older entries are no longer kept", page.missed));
        }
        for entry in &page.entries {
            print(&if flags.json { to_json(entry)? + "\n" } else { entry.to_string() + "\n" })?;
            last = entry.number;
        }
        if !flags.follow {
            return Ok(());
        }
        std::thread::sleep(FOLLOW);
    }
}

fn report_of(primary: &PrimaryFlags) -> Result<report::Report, (Exit, String)> {
    let socket = primary.socket();
    client::ask_for_report(&socket).map_err(|error| no_answer(&socket, &error))
}

/// What it means that a primary did not answer as it should.
fn no_answer(socket: &Path, error: &ProtocolError) -> (Exit, String) {
    match error {
        error if is_gone(error) => (
            Exit::Failure,
            format!(
                "no primary answers on {}: start one with `xfan run`, or name its socket",
                socket.display()
            ),
        ),
        ProtocolError::Io(io) if io.kind() == std::io::ErrorKind::PermissionDenied => (
            Exit::Permission,
            format!(
                "no permission to use {}: root and the workers' user may, and whom [control] in its configuration names",
                socket.display()
            ),
        ),
        ProtocolError::Refused(refusal) if refusal.code == RefusalCode::Forbidden => {
            (Exit::Permission, error.to_string())
        }
        _ => (Exit::Failure, error.to_string()),
    }
}

/// Whether there is no primary, or no longer.
fn is_gone(error: &ProtocolError) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    match error {
        ProtocolError::Closed => true,
        ProtocolError::Io(io) => matches!(io.kind(), NotFound | ConnectionRefused),
        _ => false,
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<String, (Exit, String)> {
    let json = serde_json::to_string(value).map_err(|error| (Exit::Failure, error.to_string()))?;
    Ok(escaped_json(&json))
}

/// Prints; a reader that has gone away ends the program, quietly.
///
/// # Errors
/// Standard output does not take it.
fn print(text: &str) -> Ended {
    match print::print(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(not_printed),
    }
}

fn not_printed(error: io::Error) -> (Exit, String) {
    (Exit::Failure, format!("cannot print: {error}"))
}
