//! What the kernel lets a process do to others of its user or its session.

use std::fs;
use std::io::ErrorKind;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};

use crate::{Outcome, PAUSE};

/// The most keys that [`use_up_keys`] makes.
const MOST_KEYS: usize = 1000;

/// The number of threads that go on trying to make a key, and the pause between two attempts.
const RETRYING: usize = 8;
const RETRY: Duration = Duration::from_micros(200);

/// Stops a new process that has become this user's, but does not run its program yet. Its name is
/// still that of the primary's thread.
pub fn stop_a_new_process() -> Outcome<()> {
    let primary = getppid();
    let is_new =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "xfan\n");
    loop {
        let children = fs::read_to_string(format!("/proc/{primary}/task/{primary}/children"))?;
        for child in children.split_whitespace().filter(|child| is_new(child)) {
            let pid = Pid::from_raw(child.parse()?);
            if kill(pid, Signal::SIGSTOP).is_err() {
                continue;
            }
            std::thread::sleep(PAUSE);
            if is_new(child) {
                println!("stopped {pid}");
                return Ok(());
            }
            kill(pid, Signal::SIGCONT)?;
        }
    }
}

/// Makes session keyrings until the quota of its user is used up, and returns how many. Each
/// belongs to a thread, which holds it until the process ends. Some threads go on trying, so that
/// no other process gets a key that becomes free.
pub fn use_up_keys() -> usize {
    let (sender, results) = std::sync::mpsc::channel();
    let mut refused = 0;
    for started in 0..MOST_KEYS {
        let sender = sender.clone();
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
            // SAFETY: a null name means an anonymous keyring.
            let join = || unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, 0) };
            let mut joined = join() > 0;
            let _ = sender.send(joined);
            loop {
                std::thread::sleep(if joined { Duration::MAX } else { RETRY });
                joined = join() > 0;
            }
        });
        refused += usize::from(thread.is_err() || results.recv() != Ok(true));
        if refused == RETRYING {
            return started + 1 - refused;
        }
    }
    MOST_KEYS
}

/// Gives the autogroup of its session the lowest priority.
pub fn lower_autogroup() -> Outcome<()> {
    loop {
        match fs::write("/proc/self/autogroup", "19") {
            // The kernel throttles changes by any process.
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            result => return Ok(result?),
        }
    }
}
