//! What /proc shows about other processes, and waiting for changes.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::report::Report;

use crate::leftovers::state;
use crate::primary::Primary;

/// The error of the last system call if `result` is negative.
///
/// # Errors
/// A negative result.
pub fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The text of a small file, trimmed; empty if it cannot be read.
pub fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_default().trim().to_owned()
}

/// The value of a line in /proc/PID/status.
pub fn status(pid: impl std::fmt::Display, name: &str) -> String {
    let status = read(format!("/proc/{pid}/status"));
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// Whether the process exists, even as a zombie.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The process id of a member.
pub fn pid_of(report: &Report, member: usize) -> u32 {
    report.groups[0].members[member].pid
}

/// Sends a signal.
///
/// # Panics
/// The process does not exist.
pub fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// Stops a process and waits until it is stopped.
///
/// # Panics
/// The process does not exist.
pub fn stop(pid: u32) {
    signal(pid, Signal::SIGSTOP);
    wait_until(|| state(pid) == Some('T'));
}

/// Sets another process's soft limit of open files; returns the previous one.
///
/// # Panics
/// The process does not exist, or the limit is above the hard limit.
pub fn limit_descriptors(pid: Pid, limit: u64) -> u64 {
    let exchange = |new: *const libc::rlimit| {
        let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: both pointers lead to limits of this function or are null, which means none.
        let result = unsafe { libc::prlimit(pid.as_raw(), libc::RLIMIT_NOFILE, new, &raw mut old) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        old
    };
    let old = exchange(std::ptr::null());
    exchange(&libc::rlimit { rlim_cur: limit, ..old });
    old.rlim_cur
}

/// The pids of the daemons that the hostile worker announced; waits until there are `count`.
pub fn daemons(primary: &Primary, count: usize) -> Vec<u32> {
    loop {
        let lines = primary.process.stderr();
        let pids = lines.iter().filter_map(|line| line.split_once(" stdout: daemon ")?.1.parse().ok());
        let pids: Vec<u32> = pids.collect();
        if pids.len() >= count {
            return pids;
        }
        std::thread::yield_now();
    }
}

/// Waits without limit until `done` returns true.
pub fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
