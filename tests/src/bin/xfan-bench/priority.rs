//! Raises the scheduling priority so far that nothing else on the machine takes whole time slices
//! from the measurement. It never uses a real-time class: threads that wait by yielding would
//! starve the machine.
//!
//! Where the kernel groups the tasks of a session (sched(7), autogroup), a task's nice value counts
//! only within its session, and sessions share the CPUs evenly. The session's own nice value is
//! therefore set too, if the session is only this program's.

use std::fs;
use std::io;

use nix::unistd::{getpid, getsid, setsid};

/// The highest of the ordinary priorities.
const NICE: i32 = -20;

/// Raises the priority of the calling thread and of everything it starts, permanently. Prints a
/// message if it cannot.
pub fn raise() {
    // SAFETY: the call takes no pointers. 0 means the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } < 0 {
        return say(&format!("{}; run it with sudo", io::Error::last_os_error()));
    }
    let grouping = fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled").unwrap_or_default();
    if grouping.trim() != "1" {
        return;
    }
    if setsid().is_err() && getsid(None) != Ok(getpid()) {
        return say(
            "it shares its session with the shell; run it with scripts/bench, or with `setsid --wait`",
        );
    }
    if let Err(error) = fs::write("/proc/self/autogroup", NICE.to_string()) {
        say(&format!("/proc/self/autogroup: {error}"));
    }
}

fn say(reason: &str) {
    eprintln!(
        "xfan-bench: cannot raise the priority, so other load on this machine will affect the figures: {reason}"
    );
}
