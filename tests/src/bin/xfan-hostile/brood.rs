//! Processes that are to outlive this one.

use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{ForkResult, Pid, fork, getpid, setpgid, setsid};

use crate::Outcome;

/// How long a process lives that nobody ends: longer than any test, but not for ever, should a test
/// end before its primary has.
const LIFE: Duration = Duration::from_secs(900);

/// What a descendant does to be overlooked.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Disguise {
    /// Nothing: it stays in the group.
    None,
    /// It is of a session of its own.
    Session,
    /// It is of a group of its own, and has a child and a grandchild in other groups.
    Family,
    /// It is another process all the time: each starts the next and ends.
    Comet,
}

/// Starts a daemon, whose parent is gone at once, and prints `daemon PID` for it and each descendant.
pub fn hatch(disguise: Disguise) -> Outcome<()> {
    // SAFETY: there is one thread.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        nix::sys::wait::waitpid(child, None)?;
        return Ok(());
    }
    // SAFETY: there is one thread.
    if let ForkResult::Parent { .. } = unsafe { fork() }? {
        std::process::exit(0);
    }
    let all = nix::sys::signal::SigSet::all();
    all.thread_block()?;
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn) }?;
    nix::sys::prctl::set_pdeathsig(None)?;
    // Who leaves the group may be killed at once: first it says that it is there.
    announce();
    match disguise {
        Disguise::None => {}
        Disguise::Session => drop(setsid()?),
        Disguise::Family => {
            for _ in 0..2 {
                // SAFETY: there is one thread.
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
            // SAFETY: there is one thread.
            while Instant::now() < end && matches!(unsafe { fork() }?, ForkResult::Child) {}
            std::process::exit(0);
        }
    }
    sleep()
}

/// Starts up to `count` processes that sleep; how many it could.
pub fn swarm(count: u32) -> u32 {
    for started in 0..count {
        // SAFETY: there is one thread.
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
