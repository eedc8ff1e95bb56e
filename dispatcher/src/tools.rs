//! The commands that ask a running primary: `stats`, `events` and `workers`.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use xfan::cli::{EventsFlags, PrimaryFlags, StatsFlags, WorkersAction};
use xfan::control::{client, history};
use xfan::exit::Exit;
use xfan::print::say;
use xfan::text::escaped_json;
use xfan::{print, report};
use xfan_shm::protocol::{ProtocolError, RefusalCode, Reply, Request, WorkersOrder};

use crate::{Ended, Failed, print, print_failed};

/// The time between two requests of `events --follow`: a person sees no delay, and the primary
/// hardly notices.
const FOLLOW: Duration = Duration::from_millis(200);
/// The time between two requests of `workers` while it waits for an order to be carried out.
const WAIT: Duration = Duration::from_millis(20);

/// Prints the counters, once or repeatedly.
pub fn stats(flags: &StatsFlags) -> Ended {
    let mut earlier = None;
    loop {
        let report = report_of(&flags.primary)?;
        if flags.json {
            print(&(to_json(&report)? + "\n"))?;
        } else {
            if flags.watch.is_some() && io::stdout().is_terminal() {
                print::clear().map_err(print_failed)?;
            }
            print(&report::render(&report, earlier.as_ref()))?;
        }
        let Some(seconds) = flags.watch else { return Ok(()) };
        earlier = Some(report);
        std::thread::sleep(Duration::from_secs(seconds));
    }
}

/// Lists the workers, or carries out an order and prints the members that it changed.
pub fn workers(action: &WorkersAction) -> Ended {
    let (flags, order) = match action {
        WorkersAction::List { primary, json } => return list_workers(primary, *json),
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
        _ => return Err(unexpected_reply(&socket)),
    };
    let pid_before = |id: &str| before.member(id).map_or(0, |member| member.pid);
    let starts = matches!(order, WorkersOrder::Add(_) | WorkersOrder::Restart(_));
    for id in members {
        if !flags.no_wait {
            wait_for(&flags.primary, &id, pid_before(&id), starts)?;
        }
        print(&format!("{id}\n"))?;
    }
    Ok(())
}

fn list_workers(primary: &PrimaryFlags, json: bool) -> Ended {
    let report = report_of(primary)?;
    let members: Vec<_> = report.members().collect();
    print(&if json { to_json(&members)? + "\n" } else { report::render_members(&report) })
}

/// Waits until the process `before` of a member is gone; if the order `starts` a worker, until the
/// member runs another process.
fn wait_for(primary: &PrimaryFlags, id: &str, before: u32, starts: bool) -> Ended {
    loop {
        let member = report_of(primary)?.member(id).cloned().unwrap_or_default();
        let state = member.state.as_str();
        let done = if starts {
            member.pid != before && state == "running"
        } else {
            member.pid == 0 || member.pid != before
        };
        if done {
            return Ok(());
        }
        if starts && member.pid == 0 && matches!(state, "crashed" | "failed" | "stopped" | "vacant") {
            let how = member.last_exit.unwrap_or_else(|| "see its primary's log".into());
            return Err((Exit::Workers, format!("member {id} is {state}: {how}")));
        }
        std::thread::sleep(WAIT);
    }
}

/// Prints the event history, and new entries as they come if asked to follow.
pub fn events(flags: &EventsFlags) -> Ended {
    let socket = flags.primary.socket();
    let (mut primary, mut last) = (None, 0);
    loop {
        let page: history::Page = match client::ask(&socket, &Request::Events(last)) {
            Ok(Reply::Events(page)) => {
                serde_json::from_value(page).map_err(|error| (Exit::Failure, error.to_string()))?
            }
            Ok(_) => return Err(unexpected_reply(&socket)),
            // The primary replied before, and has ended since.
            Err(error) if primary.is_some() && is_gone(&error) => return Ok(()),
            Err(error) => return Err(no_answer(&socket, &error)),
        };
        if primary.replace(page.primary).is_some_and(|before| before != page.primary) && last > 0 {
            // Another primary has an event history of its own. Read it from its beginning.
            last = 0;
            continue;
        }
        if page.missed > 0 {
            say(&format!("{} older events are no longer kept", page.missed));
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

fn report_of(primary: &PrimaryFlags) -> Result<report::Report, Failed> {
    let socket = primary.socket();
    client::ask_for_report(&socket).map_err(|error| no_answer(&socket, &error))
}

fn unexpected_reply(socket: &Path) -> Failed {
    (Exit::Failure, format!("{} sent an unexpected reply", socket.display()))
}

/// Explains why a request failed.
fn no_answer(socket: &Path, error: &ProtocolError) -> Failed {
    let socket = socket.display();
    match error {
        error if is_gone(error) => (
            Exit::Failure,
            format!("no primary answers on {socket}: start one with `xfan run`, or name its socket"),
        ),
        ProtocolError::Io(io) if io.kind() == io::ErrorKind::PermissionDenied => (
            Exit::Permission,
            format!(
                "no permission to use {socket}: only root, the workers' user, and the users that [control] in \
                 its configuration names may"
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

fn to_json(value: &impl serde::Serialize) -> Result<String, Failed> {
    let json = serde_json::to_string(value).map_err(|error| (Exit::Failure, error.to_string()))?;
    Ok(escaped_json(&json))
}
