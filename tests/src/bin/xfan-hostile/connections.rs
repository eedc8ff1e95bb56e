//! Connections: more than needed, and through the inherited one.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::Signal;
use xfan_shm::layout::VERSION;
use xfan_shm::protocol::{self, Attach, ENV_CONTROL_FD, MAX_REPLY, Reply, Request};

use crate::Outcome;
use crate::membership::{dial, pending_signals};

/// The inherited connection, named by the environment. It stays open as long as the process runs.
pub fn inherited() -> Outcome<&'static OwnedFd> {
    let number = std::env::var(ENV_CONTROL_FD)?.parse()?;
    // SAFETY: the descriptor is open, and nothing closes it.
    Ok(Box::leak(Box::new(unsafe { OwnedFd::from_raw_fd(number) })))
}

/// Makes a connection through another one. The error is the refusal.
pub fn connect(through: &OwnedFd) -> Outcome<OwnedFd> {
    match protocol::ask(through, &Request::Connect)? {
        (Reply::Connected, fds) => Ok(fds.into_iter().next().ok_or("no descriptor")?),
        (Reply::Refused(refusal), _) => Err(refusal.message.into()),
        (reply, _) => Err(format!("{reply:?}").into()),
    }
}

/// Asks to attach on a connection. The error is the refusal.
pub fn attach_through(control: &OwnedFd, member: Option<&str>) -> Outcome<()> {
    let member = member.map(str::to_owned);
    let attach = Attach { version: VERSION, group: None, member, token: None, program: "hostile".into() };
    match protocol::ask(control, &Request::Attach(attach))?.0 {
        Reply::Refused(refusal) => Err(refusal.message.into()),
        _ => Ok(()),
    }
}

/// Makes `connections` connections in both ways, and returns those that succeeded, for the caller
/// to hold.
pub fn hold(connections: usize) -> Outcome<Vec<OwnedFd>> {
    let inherited = inherited()?;
    let mut held: Vec<_> = (0..connections).filter_map(|_| dial().ok()).collect();
    held.extend((0..connections).map_while(|_| connect(inherited).ok()));
    Ok(held)
}

/// Asks for reports on `connections` connections without a pause, until SIGTERM.
pub fn flood(connections: usize) -> Outcome<()> {
    let inherited = inherited()?;
    let mut asking: Vec<_> = (0..connections).filter_map(|_| dial().ok()).collect();
    asking.extend((0..connections).map_while(|_| connect(inherited).ok()));
    // The connections that were refused hang up.
    asking
        .retain(|control| protocol::ask(control, &Request::Stats).is_ok_and(|(reply, _)| is_report(&reply)));
    println!("floods on {} connections", asking.len());
    let (mut answers, mut reports) = (0, BTreeSet::new());
    for round in 0..u64::MAX {
        for control in &asking {
            protocol::send(control, &Request::Stats, &[])?;
        }
        for control in &asking {
            if let (Reply::Stats(report), _) = protocol::receive(control, MAX_REPLY)? {
                answers += 1;
                reports.insert(report["uptime_ns"].as_u64());
            }
        }
        if round == 50 {
            println!("answers {answers} reports {}", reports.len());
        }
        if pending_signals()?.contains(Signal::SIGTERM) {
            break;
        }
    }
    Ok(())
}

/// Has many epoll entries wait for a connection, asks for three reports on it, and prints after how
/// many milliseconds the third arrived.
pub fn ask_slowly() -> Outcome<()> {
    let control = connect(inherited()?)?;
    let waiters = crate::waiters::Waiters::of(&control)?;
    let mut begun = std::time::Instant::now();
    for _ in 0..3 {
        begun = std::time::Instant::now();
        protocol::ask(&control, &Request::Stats)?;
    }
    println!("{} waiters, third report after {} ms", waiters.count, begun.elapsed().as_millis());
    Ok(())
}

fn is_report(reply: &Reply) -> bool {
    matches!(reply, Reply::Stats(_))
}

/// Becomes an honest worker whose inherited connection is another descriptor.
pub fn become_robbed(number: &str) -> Outcome<()> {
    let count = std::env::current_exe()?.with_file_name("xfan-count");
    Err(Command::new(count).env(ENV_CONTROL_FD, number).exec().into())
}
