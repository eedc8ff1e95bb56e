//! How a worker waits while its rings are empty: it spins, then yields, then sleeps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::time::TimeSpec;
use xfan_shm::bell;
use xfan_shm::clock::ticks_per_ns;

/// Longest sleep, and longest time between two polls of the control socket. It bounds how late a
/// worker notices a dead dispatcher or a lost wake-up, at the cost of ten wake-ups a second.
pub(crate) const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// The times of each step in ticks, and the descriptors that end a sleep.
#[derive(Debug)]
pub(crate) struct Idle {
    /// Idle time up to which to spin.
    spin: u64,
    /// Idle time up to which to yield.
    yielding: u64,
    /// Time between two polls of the control socket.
    look: u64,
    control: OwnedFd,
    doorbell: OwnedFd,
    /// When a scan first found the rings empty since the last packet.
    since: Option<u64>,
    /// When the control socket was last polled.
    looked: u64,
    /// Whether the dispatcher has closed the connection.
    hung_up: bool,
}

/// What to do next while idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Spin,
    Yield,
    Sleep,
}

/// How a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The doorbell rang.
    Rung,
    /// A signal interrupted it.
    Interrupted,
    /// The time is over, or the dispatcher closed the connection.
    Other,
}

impl Idle {
    pub(crate) fn new(spin_ns: u64, yield_ns: u64, control: OwnedFd, doorbell: OwnedFd) -> Self {
        let spin = ticks(Duration::from_nanos(spin_ns));
        Idle {
            spin,
            yielding: spin.saturating_add(ticks(Duration::from_nanos(yield_ns))),
            look: ticks(LONGEST_SLEEP),
            control,
            doorbell,
            since: None,
            looked: 0,
            hung_up: false,
        }
    }

    pub(crate) fn control(&self) -> &OwnedFd {
        &self.control
    }

    /// Ends the idle time: a scan found packets.
    #[inline(always)]
    pub(crate) fn end(&mut self) {
        self.since = None;
    }

    /// Notes that the rings are empty at `now`. Returns since when they are.
    pub(crate) fn begin(&mut self, now: u64) -> u64 {
        *self.since.get_or_insert(now)
    }

    /// What to do after `idle_for` ticks of idle time.
    pub(crate) fn step(&self, idle_for: u64) -> Step {
        match idle_for {
            short if short < self.spin => Step::Spin,
            short if short < self.yielding => Step::Yield,
            _ => Step::Sleep,
        }
    }

    /// Whether a poll has found that the dispatcher closed the connection.
    pub(crate) fn has_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Polls the control socket if the last poll was long ago, so that a worker that never sleeps
    /// also notices a dead dispatcher. Returns whether this poll found the connection closed.
    pub(crate) fn look(&mut self, now: u64) -> io::Result<bool> {
        if now.wrapping_sub(self.looked) < self.look || self.hung_up {
            return Ok(false);
        }
        self.looked = now;
        let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::empty())];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(_) => self.hung_up = has_ended(&fds[0]),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(self.hung_up)
    }

    /// Sleeps until the doorbell rings, the dispatcher closes the connection, a signal arrives, or
    /// `limit` is over.
    pub(crate) fn sleep(&mut self, limit: Duration) -> io::Result<Wake> {
        let limit = TimeSpec::from(limit.min(LONGEST_SLEEP));
        // Of the control socket only the hang-up matters, which poll(2) always reports.
        let mut fds = [
            PollFd::new(self.doorbell.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.as_fd(), PollFlags::empty()),
        ];
        match ppoll(&mut fds, Some(limit), None) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Wake::Interrupted),
            Err(errno) => return Err(errno.into()),
        }
        let rung = fds[0].any().unwrap_or(true);
        self.hung_up |= has_ended(&fds[1]);
        if !rung {
            return Ok(Wake::Other);
        }
        bell::silence(&self.doorbell);
        Ok(Wake::Rung)
    }
}

/// Whether poll(2) reported a hang-up or an error of a descriptor that was polled for no events.
fn has_ended(fd: &PollFd<'_>) -> bool {
    fd.revents().is_none_or(|events| !events.is_empty())
}

/// Converts a duration to ticks; `u64::MAX` if it is too long.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(crate) fn ticks(duration: Duration) -> u64 {
    (duration.as_nanos() as f64 * ticks_per_ns()) as u64
}

/// Converts ticks to a duration, rounded up by a microsecond, so that a sleep of this duration does
/// not end too early.
pub(crate) fn duration(ticks: u64) -> Duration {
    Duration::from_nanos(xfan_shm::clock::ticks_to_ns(ticks)).saturating_add(Duration::from_micros(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EventFd;

    fn idle(spin_ns: u64, yield_ns: u64) -> Idle {
        Idle::new(spin_ns, yield_ns, EventFd::new().unwrap().into(), EventFd::new().unwrap().into())
    }

    #[test]
    fn spins_then_yields_then_sleeps() {
        let idle = idle(1_000, 2_000);
        let step = |ns| idle.step(ticks(Duration::from_nanos(ns)));
        assert_eq!(
            [step(0), step(900), step(1_100), step(2_900), step(3_100)],
            [Step::Spin, Step::Spin, Step::Yield, Step::Yield, Step::Sleep]
        );
    }

    #[test]
    fn infinite_times_do_not_overflow() {
        assert_eq!(idle(u64::MAX, u64::MAX).step(1 << 60), Step::Spin);
        assert_eq!(ticks(Duration::MAX), u64::MAX);
        assert!(duration(u64::MAX) > Duration::from_secs(1));
    }
}
