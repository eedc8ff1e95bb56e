//! What workers leave behind: processes whose parent has ended. The kernel hands them to the primary (prctl(2),
//! `PR_SET_CHILD_SUBREAPER`), which waits for those that have ended, and ends the others.
//!
//! Where workers have cgroups, the kernel ends all of a cgroup at once, and the primary only waits. Else it looks for
//! descendants in /proc. A process that starts others faster than they are found and stopped can escape a round, but it stays a
//! descendant, so that the next round finds it.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use procfs::process::{Process, all_processes};

use crate::sys;

/// Most rounds of stopping descendants before those that are found are killed.
const ROUNDS: usize = 32;

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

/// A process as /proc shows it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    pid: i32,
    parent: i32,
    group: i32,
    /// When it began, in ticks since boot: a process id alone may have become another's.
    began: u64,
    /// It has ended, and its parent has not waited for it.
    ended: bool,
}

impl Seen {
    fn of(process: &Process) -> Option<Self> {
        let stat = process.stat().ok()?;
        let ended = matches!(stat.state, 'Z' | 'X');
        Some(Seen { pid: stat.pid, parent: stat.ppid, group: stat.pgrp, began: stat.starttime, ended })
    }

    /// Signals it, unless its id is another's by now.
    fn signal(&self, signal: Signal) {
        let Ok(pid) = u32::try_from(self.pid) else { return };
        let Ok(pidfd) = sys::pidfd_open(pid) else { return };
        let now = Process::new(self.pid).ok().and_then(|process| Seen::of(&process));
        if now.is_some_and(|now| now.began == self.began) {
            let _ = sys::pidfd_signal(pidfd.as_fd(), signal);
        }
    }
}

fn all() -> Vec<Seen> {
    let processes = all_processes().into_iter().flatten();
    processes.filter_map(|process| Seen::of(&process.ok()?)).collect()
}

/// The children of the calling thread: orphans come to the first thread of a process.
fn children() -> Vec<i32> {
    let own = std::process::id();
    match std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")) {
        Ok(list) => list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // CONFIG_PROC_CHILDREN is not set.
        Err(_) => {
            all().iter().filter(|seen| u32::try_from(seen.parent) == Ok(own)).map(|seen| seen.pid).collect()
        }
    }
}

/// Waits for orphans that have ended. `workers` are the primary's own children. Returns how many orphans there still are.
pub fn reap(workers: &HashSet<u32>) -> usize {
    let is_worker = |pid: i32| u32::try_from(pid).is_ok_and(|pid| workers.contains(&pid));
    let orphans = children().into_iter().filter(|&pid| !is_worker(pid));
    let left = orphans.filter(|&pid| {
        let ended = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        matches!(ended, Ok(nix::sys::wait::WaitStatus::StillAlive))
    });
    left.count()
}

/// Ends orphans and their descendants, but for orphans in the process group of a worker that still runs: those are its own to
/// end, as long as it does.
pub fn end(workers: &HashSet<u32>) {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let is_worker = |pid: i32| u32::try_from(pid).is_ok_and(|pid| workers.contains(&pid));
    let is_root =
        |seen: &Seen| seen.parent == own && !is_worker(seen.pid) && !is_worker(seen.group) && !seen.ended;
    let mut stopped = HashMap::new();
    for _ in 0..ROUNDS {
        let new: Vec<Seen> = family(&all(), is_root)
            .into_iter()
            .filter(|seen| stopped.get(&seen.pid) != Some(&seen.began))
            .collect();
        if new.is_empty() {
            break;
        }
        for seen in new {
            // One that is stopped starts no others.
            seen.signal(Signal::SIGSTOP);
            stopped.insert(seen.pid, seen.began);
        }
    }
    for seen in family(&all(), is_root) {
        seen.signal(Signal::SIGKILL);
    }
}

/// The roots and all their descendants, parents first.
fn family(all: &[Seen], is_root: impl Fn(&Seen) -> bool) -> Vec<Seen> {
    let mut children: HashMap<i32, Vec<Seen>> = HashMap::new();
    all.iter().for_each(|seen| children.entry(seen.parent).or_default().push(*seen));
    let mut family: Vec<Seen> = all.iter().copied().filter(is_root).collect();
    let mut known: HashSet<i32> = family.iter().map(|seen| seen.pid).collect();
    let mut next = 0;
    while let Some(parent) = family.get(next).map(|seen| seen.pid) {
        let of_parent = children.get(&parent).into_iter().flatten();
        family.extend(of_parent.filter(|child| known.insert(child.pid)));
        next += 1;
    }
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_its_roots_and_all_who_descend_from_them() {
        let seen = |pid, parent| Seen { pid, parent, group: pid, began: 1, ended: false };
        let all = [seen(1, 0), seen(7, 3), seen(2, 1), seen(3, 2), seen(4, 1), seen(9, 7), seen(5, 4)];
        let pids = |root| {
            family(&all, |seen: &Seen| seen.pid == root).iter().map(|seen| seen.pid).collect::<Vec<_>>()
        };
        assert_eq!(pids(2), [2, 3, 7, 9]);
        assert_eq!(pids(4), [4, 5]);
        assert!(pids(8).is_empty());
    }
}
