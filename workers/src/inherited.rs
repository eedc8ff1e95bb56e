//! The connection that a worker inherits from the dispatcher that started it.
//!
//! It stays open until the process ends, and so it says nothing of the worker: others may have it,
//! too, such as the shell that started this process. The worker's own connection is made through
//! it, for which no permission to use the control socket is needed, and which nobody else can use
//! up.

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

use crate::attach::{AttachError, ask, be_patient};

/// Once it has been found.
static INHERITED: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Makes a connection through the inherited one. `None`: there is none, or the dispatcher behind it
/// is gone. `socket` is for errors.
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
                be_patient(&connection).map_err(|errno| AttachError::Connect(socket.into(), errno.into()))?;
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

/// Takes over the descriptor of this number, if it is a connection.
fn take(number: &str) -> Result<OwnedFd, String> {
    let raw: RawFd = number
        .parse()
        .ok()
        .filter(|number| *number >= 0)
        .ok_or_else(|| "that is no number of a descriptor".to_owned())?;
    // SAFETY: the descriptor need not be open: each of these calls says so, and then nothing is
    // done to it. It is borrowed for as long as this function runs.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    let kind = getsockopt(&borrowed, sockopt::SockType).map_err(|errno| match errno {
        Errno::EBADF => "it is not open".to_owned(),
        Errno::ENOTSOCK => "it is no socket".to_owned(),
        errno => errno.to_string(),
    })?;
    let family = getsockname::<SockaddrStorage>(raw).map(|address| address.family());
    if kind != SockType::SeqPacket || family != Ok(Some(AddressFamily::Unix)) {
        return Err("it is another kind of socket".to_owned());
    }
    be_patient(borrowed).map_err(|errno| errno.to_string())?;
    // Not for what this process starts.
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|errno| errno.to_string())?;
    // SAFETY: the environment says that the descriptor is for this, it is what it is said to be,
    // and this is the only place that takes it, once.
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
    fn what_is_no_connection_is_not_taken_and_stays_open() {
        let refused = |number: &str| take(number).unwrap_err();
        for text in ["", "x", "-1", "3.5", "99999999999"] {
            assert_eq!(refused(text), "that is no number of a descriptor");
        }
        assert_eq!(refused("1000000"), "it is not open");
        let file = File::open("/dev/null").unwrap();
        assert_eq!(refused(&file.as_raw_fd().to_string()), "it is no socket");
        let (stream, _peer) = pair(SockType::Stream);
        assert_eq!(refused(&stream.as_raw_fd().to_string()), "it is another kind of socket");
        let internet = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(refused(&internet.as_raw_fd().to_string()), "it is another kind of socket");
        for fd in [file.as_fd(), stream.as_fd(), internet.as_fd()] {
            fcntl(fd, FcntlArg::F_GETFD).unwrap();
        }
    }

    #[test]
    fn a_connection_is_not_for_what_the_worker_starts() {
        let (ours, _theirs) = pair(SockType::SeqPacket);
        let raw = ours.into_raw_fd();
        let taken = take(&raw.to_string()).unwrap();
        assert_eq!(taken.as_raw_fd(), raw);
        assert_eq!(fcntl(&taken, FcntlArg::F_GETFD).unwrap(), FdFlag::FD_CLOEXEC.bits());
    }
}
