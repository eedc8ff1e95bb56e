//! Autogroup: the kernel shares CPU time between sessions first, then between their processes. See
//! sched(7).
//!
//! Each process can set the nice value of its session's autogroup, also a worker that shares the
//! session of the primary: that slows down the lanes. So workers have sessions of their own.
//!
//! Where lanes and workers share CPUs, they share the session as well: a lane that yields would not
//! yield to a worker of another session. The primary then restores the nice value.

use std::io;
use std::time::{Duration, Instant};

const FILE: &str = "/proc/self/autogroup";

/// The time from one check to the next. The kernel throttles changes: without CAP_SYS_ADMIN, one
/// within 0.1 s of another, by any process, fails with EAGAIN.
const PERIOD: Duration = Duration::from_secs(1);

/// Watches the nice value of this process' autogroup.
#[derive(Debug)]
pub struct Autogroup {
    /// The value at the start; `None`: there are no autogroups.
    nice: Option<i32>,
    next: Instant,
}

/// Another process changed the nice value.
#[derive(Debug, thiserror::Error)]
#[error(
    "a process of xfan's session set its autogroup to nice {found} instead of {}: {}",
    wanted,
    match restored {
        Ok(()) => "restored".to_owned(),
        Err(error) => format!("cannot be restored now: {error}"),
    }
)]
pub struct Changed {
    found: i32,
    wanted: i32,
    restored: io::Result<()>,
}

impl Autogroup {
    /// Notes the nice value.
    pub fn begin() -> Self {
        Autogroup { nice: read(), next: Instant::now() }
    }

    /// Checks the nice value once a second, and restores it.
    pub fn check(&mut self, now: Instant) -> Option<Changed> {
        let wanted = self.nice.filter(|_| now >= self.next)?;
        self.next = now + PERIOD;
        let found = read().filter(|&found| found != wanted)?;
        Some(Changed { found, wanted, restored: std::fs::write(FILE, wanted.to_string()) })
    }
}

fn read() -> Option<i32> {
    parse(&std::fs::read_to_string(FILE).ok()?)
}

/// The nice value in a text such as `/autogroup-25 nice 0`.
fn parse(text: &str) -> Option<i32> {
    text.split_once(" nice ")?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nice_value_is_parsed() {
        assert_eq!(parse("/autogroup-755 nice -7\n"), Some(-7));
        assert_eq!(parse(""), None);
    }
}
