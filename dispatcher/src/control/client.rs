//! The client of the control socket that the tools use: one request, one reply.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use xfan_shm::protocol::{self, ProtocolError, Reply, Request};

/// How long a tool waits for the reply. Even a primary under load replies much sooner: one that
/// takes longer hangs.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Requests the report of the primary on the control socket `path`.
///
/// # Errors
/// Those of [`ask`].
pub fn ask_for_report(path: &Path) -> Result<crate::report::Report, ProtocolError> {
    match ask(path, &Request::Stats)? {
        Reply::Stats(report) => Ok(serde_json::from_value(report)?),
        _ => Err(io::Error::other("the primary sent an unexpected reply").into()),
    }
}

/// Sends a request to the primary on the control socket `path`, and returns the reply.
///
/// # Errors
/// [`ProtocolError`]. The kind is [`io::ErrorKind::NotFound`] or
/// [`io::ErrorKind::ConnectionRefused`] if there is no primary. A refusal is an error, too.
pub fn ask(path: &Path, request: &Request) -> Result<Reply, ProtocolError> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let timeout = TimeVal::seconds(i64::try_from(TIMEOUT.as_secs()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
    let exchange = || {
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        protocol::ask(&socket, request)
    };
    let (reply, _) = exchange().map_err(|error| match error {
        error if error.would_block() => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{} did not answer within {TIMEOUT:?}", path.display()),
        )
        .into(),
        error => error,
    })?;
    match reply {
        Reply::Refused(refusal) => Err(ProtocolError::Refused(refusal)),
        reply => Ok(reply),
    }
}
