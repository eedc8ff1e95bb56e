//! A stream to systemd's journal, for processes that systemd has not started itself.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, UnixAddr, connect, shutdown};

use crate::print::write_whole;

/// The socket on which the journal listens.
pub const SOCKET: &str = "/run/systemd/journal/stdout";

/// Opens a stream whose lines the journal records with the identifier `xfan-MEMBER`.
///
/// # Errors
/// The errors of connect(2): ENOENT or ECONNREFUSED if no journal listens on `socket`.
pub fn open(socket: &Path, member: &str) -> io::Result<OwnedFd> {
    // If the journal's backlog is full, connect(2) fails with EAGAIN instead of blocking.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(socket)?)?;
    shutdown(stream.as_raw_fd(), Shutdown::Read)?;
    // Identifier, unit, priority (informational), whether lines begin with a priority, and whether
    // the journal forwards them to syslog, the kernel log and the console.
    let description = format!("xfan-{}\n\n6\n1\n0\n0\n0\n", member.replace('/', "-"));
    write_whole(&stream, description.as_bytes()).map_err(|(_, error)| error)?;
    fcntl(&stream, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_stream_begins_with_its_description() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdout");
        assert_eq!(open(&path, "default/0").unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let stream = open(&path, "default/0").unwrap();
        nix::unistd::write(&stream, b"hello\n").unwrap();
        drop(stream);
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xfan-default-0\n\n6\n1\n0\n0\n0\nhello\n");
    }
}
