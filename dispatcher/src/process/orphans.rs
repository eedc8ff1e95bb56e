//! What workers leave behind: processes whose parent has ended. The kernel hands them to the primary (prctl(2),
//! `PR_SET_CHILD_SUBREAPER`), which waits for those that have ended, and ends the others.
//!
//! Where workers have cgroups, the kernel ends all of a cgroup at once, and the primary only waits. Else it kills one orphan
//! after the other. The children of one that it kills are orphans then, too. A process that starts others faster than that can
//! go on for as long as it does.

use std::collections::HashSet;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid};
use procfs::process::all_processes;

/// Most rounds of killing orphans, which may each leave others: some 10 ms. Who is left by then is met again.
const ROUNDS: usize = 256;

/// Has the kernel hand orphaned descendants to this process.
///
/// # Errors
/// Whatever prctl(2) says.
pub fn adopt_orphans() -> std::io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// Whether it does.
pub fn are_adopted() -> bool {
    nix::sys::prctl::get_child_subreaper().unwrap_or(false)
}

/// The children of this process, which its first thread has all started or been handed.
fn children() -> Vec<Pid> {
    let own = std::process::id();
    let pids: Vec<i32> = match std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")) {
        Ok(list) => list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // CONFIG_PROC_CHILDREN is not set.
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

/// Waits for orphans that have ended, and returns the others. `workers` are the primary's own children.
pub fn reap(workers: &HashSet<u32>) -> Vec<Pid> {
    let mut orphans = children();
    orphans.retain(|&pid| {
        !is_among(workers, pid)
            && matches!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
    });
    orphans
}

/// Kills orphans and their descendants, but for orphans in the process group of a worker that still runs: those are its own to
/// end, as long as it does. Returns how many orphans there still are.
pub fn end(workers: &HashSet<u32>) -> usize {
    for _ in 0..ROUNDS {
        let mut strangers = reap(workers);
        strangers.retain(|&pid| getpgid(Some(pid)).is_ok_and(|group| !is_among(workers, group)));
        if strangers.is_empty() {
            break;
        }
        for pid in strangers {
            // Until this process waits for it, its id is not another's.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    reap(workers).len()
}
