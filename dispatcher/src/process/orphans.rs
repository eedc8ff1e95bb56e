//! Orphans: descendants of workers whose parent has ended.
//!
//! The kernel reparents them to the primary (prctl(2), `PR_SET_CHILD_SUBREAPER`), which reaps those
//! that have ended and kills the others.
//!
//! If workers have cgroups, the kernel kills all processes of a cgroup at once, and the primary
//! only reaps them. Otherwise the primary kills one orphan after the other; the children of a
//! killed orphan become orphans in turn. A process that starts others faster than the primary kills
//! them can continue as long as it does so.

use std::collections::HashSet;
use std::os::fd::AsFd;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid};
use procfs::process::all_processes;

use crate::host::sys;

/// The most rounds in one call of [`kill_all`]: each round may leave new orphans. All rounds take
/// some 10 ms; the next call continues.
const MAX_ROUNDS: usize = 256;

/// Makes the kernel reparent orphaned descendants to this process.
///
/// # Errors
/// The errors of prctl(2).
pub fn become_subreaper() -> std::io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// Whether the kernel reparents orphaned descendants to this process.
pub fn is_subreaper() -> bool {
    nix::sys::prctl::get_child_subreaper().unwrap_or(false)
}

/// The children of this process. All of them belong to its first thread, which starts workers and
/// receives orphans.
fn children() -> Vec<Pid> {
    let own = std::process::id();
    let pids: Vec<i32> = match std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")) {
        Ok(list) => list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // The kernel was built without CONFIG_PROC_CHILDREN.
        Err(_) => {
            let all = all_processes().into_iter().flatten().filter_map(|process| process.ok()?.stat().ok());
            all.filter(|stat| u32::try_from(stat.ppid) == Ok(own)).map(|stat| stat.pid).collect()
        }
    };
    pids.into_iter().map(Pid::from_raw).collect()
}

fn is_among(workers: &HashSet<u32>, pid: Pid) -> bool {
    u32::try_from(pid.as_raw()).is_ok_and(|pid| workers.contains(&pid))
}

/// Reaps the orphans that have ended, and returns the others. `workers` are the pids of the
/// workers, which are not orphans.
///
/// An orphan that has ended, but that another process traces, can be reaped only once the tracer
/// has waited for it. It is not among those returned.
pub fn reap(workers: &HashSet<u32>) -> Vec<Pid> {
    let mut orphans = children();
    orphans.retain(|&pid| {
        !is_among(workers, pid)
            && matches!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
            && !has_ended(pid)
    });
    orphans
}

/// Whether a child that was not reaped has ended.
fn has_ended(child: Pid) -> bool {
    sys::pidfd_open(child.as_raw().cast_unsigned()).is_ok_and(|pidfd| sys::is_readable(pidfd.as_fd()))
}

/// Kills orphans and their descendants, except orphans in the process group of a running worker,
/// which that worker manages itself. Returns the number of orphans left.
pub fn kill_all(workers: &HashSet<u32>) -> usize {
    for _ in 0..MAX_ROUNDS {
        let mut orphans = reap(workers);
        orphans.retain(|&pid| getpgid(Some(pid)).is_ok_and(|group| !is_among(workers, group)));
        if orphans.is_empty() {
            break;
        }
        for pid in orphans {
            // No other process can have this pid until this process reaps the orphan.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    reap(workers).len()
}
