//! What /proc says of other processes, and waiting for it to say so.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::report::Report;

use crate::primary::Primary;

/// The error of the last system call, if it failed.
///
/// # Errors
/// A negative result.
pub fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A small file, trimmed; empty if it cannot be read.
pub fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_default().trim().to_owned()
}

/// A line of /proc/PID/status.
pub fn status(pid: impl std::fmt::Display, name: &str) -> String {
    let status = read(format!("/proc/{pid}/status"));
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// Whether there is such a process, ended or not.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Process id of a member.
pub fn pid_of(report: &Report, member: usize) -> u32 {
    report.groups[0].members[member].pid
}

/// Sends a signal.
///
/// # Panics
/// There is no such process.
pub fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// The daemons that the hostile worker announced, once there are as many.
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

/// Waits, without limit.
pub fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
