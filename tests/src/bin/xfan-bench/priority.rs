//! Scheduling priority: so high that nothing else on the machine takes whole time slices from what is measured. Never a
//! real-time class: threads that wait by yielding would starve the machine.
//!
//! Where the kernel groups the tasks of a session (sched(7), autogroup), the nice value of a task counts within its session
//! only, and sessions share the CPUs evenly. So the session's own nice value is set too, if the session is ours alone.

use std::fs;
use std::io;

use nix::unistd::{getpid, getsid, setsid};

/// The most urgent of the ordinary priorities.
const NICE: i32 = -20;

/// Raises the priority of the calling thread and of all threads and processes it will start, for good. Says so if it cannot.
pub fn raise() {
    // SAFETY: no pointers. 0 is the calling thread.
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
        "xfan-bench: no priority, so what else runs on this machine will show in the figures: {reason}"
    );
}
