//! Prints results to standard output and messages to standard error. Each text is one write, and a
//! write error never panics.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::text::{printable, printable_lines};

/// How long a primary that ends waits for its last output: a descriptor may be a full pipe or a
/// stopped terminal.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Prints a text of several lines to standard output.
///
/// # Errors
/// The errors of write(2).
pub fn print(text: &str) -> io::Result<()> {
    write(io::stdout().as_fd(), printable_lines(text).as_bytes())
}

/// Like [`print`](fn@print), but gives up after [`PATIENCE`].
///
/// # Errors
/// The errors of write(2), and [`io::ErrorKind::TimedOut`].
pub fn print_in_time(text: &str) -> io::Result<()> {
    write_in_time(io::stdout().as_fd(), printable_lines(text).into_bytes())
}

/// Clears the terminal.
///
/// # Errors
/// The errors of write(2).
pub fn clear() -> io::Result<()> {
    write(io::stdout().as_fd(), b"\x1b[H\x1b[2J")
}

/// Prints a message of one line to standard error. Gives up after [`PATIENCE`]; ignores errors.
pub fn say(message: &str) {
    let line = format!("xfan: {}\n", printable(message));
    let _ = write_in_time(io::stderr().as_fd(), line.into_bytes());
}

fn write_in_time(fd: BorrowedFd<'_>, bytes: Vec<u8>) -> io::Result<()> {
    let fd = fd.try_clone_to_owned()?;
    let (done, wait) = mpsc::channel();
    std::thread::Builder::new().name("print".into()).spawn(move || done.send(write(fd.as_fd(), &bytes)))?;
    wait.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        let reason = format!("it was not read within {PATIENCE:?}");
        Err(io::Error::new(io::ErrorKind::TimedOut, reason))
    })
}

fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    write_whole(&fd.try_clone_to_owned()?, bytes).map_err(|(_, error)| error)
}

/// Writes all bytes, in one write if possible. Waits also if the descriptor is non-blocking.
///
/// # Errors
/// The errors of write(2), with the number of bytes written before the error.
pub fn write_whole(fd: &OwnedFd, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut written = 0;
    while written < bytes.len() {
        match nix::unistd::write(fd, &bytes[written..]) {
            Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
            Ok(count) => written += count,
            Err(nix::errno::Errno::EINTR) => {}
            // Another process that shares the open file may have set O_NONBLOCK.
            Err(nix::errno::Errno::EAGAIN) => {
                let mut poll = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
                let _ = nix::poll::poll(&mut poll, PollTimeout::NONE);
            }
            Err(errno) => return Err((written, errno.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_non_blocking_descriptor_is_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        let bytes = vec![b'x'; 1 << 20];
        let reading = std::thread::spawn(move || io::copy(&mut { reader }, &mut io::sink()).unwrap());
        write_whole(&writer.into(), &bytes).unwrap();
        assert_eq!(reading.join().unwrap(), 1 << 20);
    }

    #[test]
    fn a_write_that_nobody_reads_times_out() {
        let (_reader, writer) = io::pipe().unwrap();
        let error = write_in_time(writer.as_fd(), vec![b'x'; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write(full.as_fd(), b"x").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }
}
