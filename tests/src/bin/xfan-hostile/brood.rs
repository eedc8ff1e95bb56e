//! Processes that try to outlive this one.

use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{ForkResult, Pid, fork, getpid, setpgid, setsid};

use crate::Outcome;

/// How long a process lives if nothing ends it: longer than any test, but limited, in case a test
/// ends before its primary.
const LIFE: Duration = Duration::from_secs(900);

/// How a descendant hides.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Disguise {
    /// Not at all: it stays in the process group.
    None,
    /// In its own session.
    Session,
    /// In its own process group, with a child and a grandchild in other groups.
    Family,
    /// As a new process all the time: each starts the next and ends.
    Comet,
}

/// Starts a daemon whose parent ends at once, and prints `daemon PID` for it and each descendant.
pub fn hatch(disguise: Disguise) -> Outcome<()> {
    // SAFETY: the process has one thread.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        nix::sys::wait::waitpid(child, None)?;
        return Ok(());
    }
    // SAFETY: the process has one thread.
    if let ForkResult::Parent { .. } = unsafe { fork() }? {
        std::process::exit(0);
    }
    let all = nix::sys::signal::SigSet::all();
    all.thread_block()?;
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn) }?;
    nix::sys::prctl::set_pdeathsig(None)?;
    // A process that leaves the group may be killed at once, so it announces itself first.
    announce();
    match disguise {
        Disguise::None => {}
        Disguise::Session => drop(setsid()?),
        Disguise::Family => {
            for _ in 0..2 {
                // SAFETY: the process has one thread.
                if let ForkResult::Parent { .. } = unsafe { fork() }? {
                    break;
                }
                announce();
            }
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        }
        Disguise::Comet => {
            setsid()?;
            let end = Instant::now() + LIFE;
            // SAFETY: the process has one thread.
            while Instant::now() < end && matches!(unsafe { fork() }?, ForkResult::Child) {}
            std::process::exit(0);
        }
    }
    sleep()
}

/// Starts up to `count` processes that sleep, and returns how many it could start.
pub fn swarm(count: u32) -> u32 {
    for started in 0..count {
        // SAFETY: the process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => sleep(),
            Ok(ForkResult::Parent { .. }) => {}
            Err(_) => return started,
        }
    }
    count
}

fn announce() {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "daemon {}", getpid()).and_then(|()| out.flush());
}

fn sleep() -> ! {
    std::thread::sleep(LIFE);
    std::process::exit(0)
}
