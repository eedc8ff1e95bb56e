//! The tools' end of the control socket: one question, one answer.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use xfan_shm::protocol::{self, ProtocolError, Reply, Request};

/// How long a tool waits for the primary's answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks the primary on `path` for its report, as a tool does.
///
/// # Errors
/// As [`ask`].
pub fn ask_for_report(path: &Path) -> Result<crate::report::Report, ProtocolError> {
    match ask(path, &Request::Stats)? {
        Reply::Stats(report) => Ok(serde_json::from_value(report)?),
        _ => Err(io::Error::other("the primary answered something else").into()),
    }
}

/// Asks the primary on `path` for something, as a tool does.
///
/// # Errors
/// [`ProtocolError`]; [`io::ErrorKind::NotFound`] or [`io::ErrorKind::ConnectionRefused`] if there
/// is no primary. A refusal is an error with its message.
pub fn ask(path: &Path, request: &Request) -> Result<Reply, ProtocolError> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::seconds(i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    let converse = || {
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        protocol::ask(&socket, request)
    };
    let (reply, _) = converse().map_err(|error| match error {
        error if error.would_block() => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{} did not answer within {PATIENCE:?}", path.display()),
        )
        .into(),
        error => error,
    })?;
    match reply {
        Reply::Refused(refusal) => Err(ProtocolError::Refused(refusal)),
        reply => Ok(reply),
    }
}
