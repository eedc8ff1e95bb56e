//! Connections to a dispatcher's control socket.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use xfan_shm::protocol::{self, Reply, Request};

use crate::error::{ANSWER_TIMEOUT, AttachError};

/// Connects to the control socket at `path`.
pub(crate) fn dial(path: &Path) -> Result<OwnedFd, AttachError> {
    let failed = |errno: Errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => AttachError::NoDispatcher(path.into()),
        Errno::EACCES | Errno::EPERM => AttachError::Permission(path.into()),
        _ => AttachError::Connect(path.into(), errno.into()),
    };
    let control =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    set_timeouts(&control).map_err(failed)?;
    connect(control.as_raw_fd(), &UnixAddr::new(path).map_err(failed)?).map_err(failed)?;
    Ok(control)
}

/// Has sending and receiving on `socket` fail after [`ANSWER_TIMEOUT`], instead of blocking for
/// ever.
pub(crate) fn set_timeouts(socket: impl AsFd) -> nix::Result<()> {
    let timeout = TimeVal::milliseconds(i64::try_from(ANSWER_TIMEOUT.as_millis()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    setsockopt(&socket, sockopt::SendTimeout, &timeout)
}

/// Sends `request` and waits for the reply and its descriptors. `path` names the socket in errors.
pub(crate) fn ask(
    control: impl AsFd,
    request: &Request,
    path: &Path,
) -> Result<(Reply, Vec<OwnedFd>), AttachError> {
    protocol::ask(&control, request).map_err(|error| {
        if error.would_block() {
            AttachError::NoAnswer(path.into())
        } else {
            AttachError::Protocol(path.into(), error)
        }
    })
}
