//! The bell that a `doorbell` rings: what a sleeper blocks on.
//!
//! It is a pair of connected sockets, since the two sides do not trust each other. Both ends of an eventfd share one set of
//! file flags: a hostile sleeper would make it blocking, fill its counter, and its ringer would sleep for ever. A pipe's
//! reader can hold the pipe's lock for as long as it likes. A socket is the ringer's own, and it is told with every
//! ring not to wait. Nothing can be sent to it either: a descriptor that lay there unread would be closed with the bell, and
//! closing one may block for as long as its maker likes (a lingering TCP socket, a FUSE file).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};

/// Makes a bell: the ringer's end and the sleeper's end. Both are closed on exec.
///
/// # Errors
/// Whatever `socketpair` says; mostly that there are too many open files.
pub fn create() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ringer, sleeper) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    shutdown(ringer.as_raw_fd(), Shutdown::Read)?;
    Ok((ringer, sleeper))
}

/// Rings, and never waits. A sleeper that is gone, or that has not heard some hundred rings before this one, is not
/// rung again: the one has no use for it, the other is awake by now.
#[inline]
pub fn ring(ringer: impl AsFd) {
    let _ = send(ringer.as_fd().as_raw_fd(), &[1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

/// Takes note of all rings so far, and never waits. For a sleeper that waits with a poll of its own.
#[inline]
pub fn silence(sleeper: impl AsFd) {
    let mut rings = [0; 512];
    let _ = recv(sleeper.as_fd().as_raw_fd(), &mut rings, MsgFlags::MSG_DONTWAIT);
}

/// Sleeps until the bell rings, and [silences](silence) it; at most for `limit`, rounded up to milliseconds. A
/// signal ends the sleep too. Says whether it was rung; the other end's close counts as a ring.
///
/// # Errors
/// Whatever `poll` says.
pub fn sleep(sleeper: impl AsFd, limit: Duration) -> io::Result<bool> {
    let limit = PollTimeout::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
    let mut sleepers = [PollFd::new(sleeper.as_fd(), PollFlags::POLLIN)];
    match poll(&mut sleepers, limit) {
        Ok(0) | Err(Errno::EINTR) => Ok(false),
        Ok(_) => {
            silence(&sleeper);
            Ok(true)
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    #[cfg_attr(miri, ignore = "sockets")]
    fn rings_wake_once_and_are_remembered() {
        let (ringer, sleeper) = create().unwrap();
        assert!(!sleep(&sleeper, SHORT).unwrap());
        ring(&ringer);
        ring(&ringer);
        assert!(sleep(&sleeper, LONG).unwrap());
        assert!(!sleep(&sleeper, SHORT).unwrap());
    }

    #[test]
    #[cfg_attr(miri, ignore = "sockets")]
    fn a_sleeper_cannot_hold_its_ringer_up() {
        let (ringer, sleeper) = create().unwrap();
        fcntl(&sleeper, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        for _ in 0..10_000 {
            ring(&ringer); // nobody listens
        }
        assert!(sleep(&sleeper, LONG).unwrap());
        let answer = send(sleeper.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL);
        assert_eq!(answer, Err(Errno::EPIPE), "nothing lies at the ringer's end when it is closed");
        drop(sleeper);
        ring(&ringer); // nobody is there, and no SIGPIPE comes
    }
}
