//! The bell that a `doorbell` rings: the socket that a sleeper blocks on.
//!
//! A bell is a pair of connected sockets, because the ringer must not trust the sleeper. With other
//! primitives a hostile sleeper could block its ringer for ever:
//!
//! - Both ends of an eventfd share one set of file flags. The sleeper could make it blocking and
//!   fill its counter.
//! - The reader of a pipe can hold the pipe's lock for as long as it likes.
//!
//! Each end of a socket pair is a file of its own, and every ring is a non-blocking send. The
//! ringer's end cannot receive: otherwise a sleeper could send a file descriptor, the kernel would
//! close that together with the bell, and closing it may block for as long as its creator likes (a
//! lingering TCP socket, a FUSE file).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};

/// Creates a bell. Returns the ringer's end and the sleeper's end, both close-on-exec.
///
/// # Errors
/// The error of socketpair(2), mostly that too many files are open.
pub fn create() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ringer, sleeper) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    shutdown(ringer.as_raw_fd(), Shutdown::Read)?;
    Ok((ringer, sleeper))
}

/// Rings without blocking. Errors are ignored: if the sleeper has closed its end, nobody needs the
/// ring; and if the socket is full of rings, the sleeper is already awake.
#[inline]
pub fn ring(ringer: impl AsFd) {
    let _ = send(ringer.as_fd().as_raw_fd(), &[1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
}

/// Consumes all rings so far without blocking. For a sleeper that calls poll(2) itself.
#[inline]
pub fn silence(sleeper: impl AsFd) {
    let mut rings = [0; 512];
    let _ = recv(sleeper.as_fd().as_raw_fd(), &mut rings, MsgFlags::MSG_DONTWAIT);
}

/// Sleeps until the bell rings, a signal arrives, or `limit`, rounded up to milliseconds, is over.
/// [Silences](silence) the bell. Returns whether it rang. If the ringer has closed its end, that
/// counts as a ring.
///
/// # Errors
/// The error of poll(2).
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
    fn a_sleeper_cannot_block_its_ringer() {
        let (ringer, sleeper) = create().unwrap();
        fcntl(&sleeper, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        for _ in 0..10_000 {
            ring(&ringer); // the sleeper does not read
        }
        assert!(sleep(&sleeper, LONG).unwrap());
        let answer = send(sleeper.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL);
        assert_eq!(answer, Err(Errno::EPIPE), "the ringer's end receives nothing");
        drop(sleeper);
        ring(&ringer); // the other end is closed, and no SIGPIPE arrives
    }
}
