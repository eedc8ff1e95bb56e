//! What a worker does when there is nothing to do: it spins, then yields, then sleeps.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::time::TimeSpec;
use xfan_shm::bell;
use xfan_shm::clock::ticks_per_ns;

/// Longest sleep, and longest time between two looks at the control socket.
pub(crate) const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// When to do what, in ticks, and what wakes a sleeper.
#[derive(Debug)]
pub(crate) struct Idle {
    spin: u64,
    yielding: u64,
    look: u64,
    control: OwnedFd,
    doorbell: OwnedFd,
    /// When the rings were first found empty since the last packet.
    since: Option<u64>,
    /// When the control socket was last looked at.
    looked: u64,
    /// The control socket has hung up.
    hung_up: bool,
}

/// The next thing to do.
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
    /// A signal came.
    Interrupted,
    /// Time ran out, or the control socket has hung up.
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

    /// Packets were found.
    #[inline(always)]
    pub(crate) fn end(&mut self) {
        self.since = None;
    }

    /// The rings are empty at `now`; returns since when they are.
    pub(crate) fn begin(&mut self, now: u64) -> u64 {
        *self.since.get_or_insert(now)
    }

    /// What to do after having been idle for so many ticks.
    pub(crate) fn step(&self, idle_for: u64) -> Step {
        match idle_for {
            short if short < self.spin => Step::Spin,
            short if short < self.yielding => Step::Yield,
            _ => Step::Sleep,
        }
    }

    /// Whether the dispatcher has hung up, as far as is known.
    pub(crate) fn has_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Looks at the control socket if the last look is long ago: who never sleeps must notice too. Returns whether
    /// the dispatcher has just been seen to have hung up.
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

    /// Sleeps until the doorbell rings, the dispatcher hangs up, a signal comes, or `limit` is over.
    pub(crate) fn sleep(&mut self, limit: Duration) -> io::Result<Wake> {
        let limit = TimeSpec::from(limit.min(LONGEST_SLEEP));
        // Of the control socket only its end is of interest, which poll(2) always reports.
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

/// Whether poll(2) reported anything of a descriptor whose data it was not asked about.
fn has_ended(fd: &PollFd<'_>) -> bool {
    fd.revents().is_none_or(|events| !events.is_empty())
}

/// A duration in ticks; `u64::MAX` if it is too long for that.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(crate) fn ticks(duration: Duration) -> u64 {
    (duration.as_nanos() as f64 * ticks_per_ns()) as u64
}

/// Ticks as a duration, rounded up to the next microsecond, so that who sleeps for it does not wake too early.
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
    fn times_without_end_do_not_overflow() {
        assert_eq!(idle(u64::MAX, u64::MAX).step(1 << 60), Step::Spin);
        assert_eq!(ticks(Duration::MAX), u64::MAX);
        assert!(duration(u64::MAX) > Duration::from_secs(1));
    }
}
