//! The connection that a worker inherits from the dispatcher that started it.
//!
//! The inherited descriptor stays open until the process ends, and other processes may hold copies
//! of it, such as the shell that started this one. Its state therefore says nothing about the
//! worker. The worker asks through it for a connection of its own. That works without permission
//! to use the control socket, and no other process can exhaust it.

use std::env;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use xfan_shm::protocol::{ENV_CONTROL_FD, ProtocolError, Reply, Request};

use crate::connection::{ask, set_timeouts};
use crate::error::AttachError;

/// The inherited connection, once [`connect`] has taken it over.
static INHERITED: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Gets a connection for this worker through the inherited one. Returns `None` if the process
/// inherited none, or if the dispatcher behind it has exited. `socket` is used in errors only.
pub(crate) fn connect(socket: &Path) -> Result<Option<OwnedFd>, AttachError> {
    let mut inherited = INHERITED.lock().unwrap_or_else(PoisonError::into_inner);
    if inherited.is_none() {
        let Some(number) = env::var_os(ENV_CONTROL_FD).filter(|number| !number.is_empty()) else {
            return Ok(None);
        };
        let number = number.to_string_lossy();
        *inherited = Some(
            take(&number).map_err(|reason| AttachError::Inherited { number: number.into_owned(), reason })?,
        );
    }
    let Some(inherited) = inherited.as_ref() else { return Ok(None) };
    match ask(inherited, &Request::Connect, socket) {
        Ok((Reply::Connected, fds)) => match <[OwnedFd; 1]>::try_from(fds) {
            Ok([connection]) => {
                set_timeouts(&connection)
                    .map_err(|errno| AttachError::Connect(socket.into(), errno.into()))?;
                Ok(Some(connection))
            }
            Err(_) => Err(AttachError::Unexpected(socket.into())),
        },
        Ok((Reply::Refused(refusal), _)) => {
            Err(AttachError::Refused { code: refusal.code, message: refusal.message })
        }
        Ok(_) => Err(AttachError::Unexpected(socket.into())),
        Err(AttachError::Protocol(_, ProtocolError::Closed)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes over the descriptor with this number. Fails, and leaves the descriptor as it is, unless it
/// is a Unix socket of type `SOCK_SEQPACKET`.
fn take(number: &str) -> Result<OwnedFd, String> {
    let raw: RawFd = number
        .parse()
        .ok()
        .filter(|number| *number >= 0)
        .ok_or_else(|| "that is not a descriptor number".to_owned())?;
    // SAFETY: `borrow_raw` requires that `raw` is not -1, which the filter above ensures, and that
    // the descriptor stays open while it is borrowed. Nothing in this process owns it yet, so
    // nothing closes it before this function returns. If it is not open at all, the first call
    // below fails with EBADF and the function returns.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    let kind = getsockopt(&borrowed, sockopt::SockType).map_err(|errno| match errno {
        Errno::EBADF => "it is not open".to_owned(),
        Errno::ENOTSOCK => "it is not a socket".to_owned(),
        errno => errno.to_string(),
    })?;
    let family = getsockname::<SockaddrStorage>(raw).map(|address| address.family());
    if kind != SockType::SeqPacket || family != Ok(Some(AddressFamily::Unix)) {
        return Err("it is a socket of another type".to_owned());
    }
    set_timeouts(borrowed).map_err(|errno| errno.to_string())?;
    // The processes that this worker starts must not inherit it.
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|errno| errno.to_string())?;
    // SAFETY: `from_raw_fd` requires that the descriptor is open and that nobody else owns it. The
    // calls above succeeded, so it is open. The environment hands it to this library, and
    // `connect` calls this function until it succeeds once, so it gets one owner.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

    use nix::sys::socket::{SockFlag, socketpair};

    use super::*;

    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).unwrap()
    }

    #[test]
    fn other_descriptors_are_refused_and_stay_open() {
        let refused = |number: &str| take(number).unwrap_err();
        for text in ["", "x", "-1", "3.5", "99999999999"] {
            assert_eq!(refused(text), "that is not a descriptor number");
        }
        assert_eq!(refused("1000000"), "it is not open");
        let file = File::open("/dev/null").unwrap();
        assert_eq!(refused(&file.as_raw_fd().to_string()), "it is not a socket");
        let (stream, _peer) = pair(SockType::Stream);
        assert_eq!(refused(&stream.as_raw_fd().to_string()), "it is a socket of another type");
        let internet = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(refused(&internet.as_raw_fd().to_string()), "it is a socket of another type");
        for fd in [file.as_fd(), stream.as_fd(), internet.as_fd()] {
            fcntl(fd, FcntlArg::F_GETFD).unwrap();
        }
    }

    #[test]
    fn a_taken_connection_is_closed_on_exec() {
        let (ours, _theirs) = pair(SockType::SeqPacket);
        let raw = ours.into_raw_fd();
        let taken = take(&raw.to_string()).unwrap();
        assert_eq!(taken.as_raw_fd(), raw);
        assert_eq!(fcntl(&taken, FcntlArg::F_GETFD).unwrap(), FdFlag::FD_CLOEXEC.bits());
    }
}
