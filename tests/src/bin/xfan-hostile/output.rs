//! What a worker can do with its descriptors 0 to 2.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use clap::ValueEnum;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::termios::{FlowArg, tcflow};

use crate::Outcome;
use crate::membership::pending_signals;

/// A misuse.
#[derive(Clone, Copy, ValueEnum)]
pub enum Deed {
    /// Shuts them down; standard error, to which it writes the results, in one direction only.
    Shut,
    /// Makes writes to them fail instead of block, and writes until one fails.
    Fill,
    /// Truncates the files behind them.
    Truncate,
    /// Reads from them.
    Read,
    /// Stops the terminal behind them.
    Stop,
    /// Closes them.
    Close,
    /// Writes lines that look like another process's, and terminal escape sequences.
    Forge,
    /// Writes lines without a pause until SIGTERM.
    Flood,
    /// If standard output is a pipe, holds its lock until SIGTERM.
    Splice,
    /// Writes an unterminated line and ends; its child keeps the descriptors.
    Leave,
}

/// The forged output: on a terminal it looks like a line of the primary's; it ends with bytes that
/// are not text.
const FORGED: &[u8] =
    b"\x1b[1A\x1b[2K\r2026-01-01T00:00:00.000000Z ERROR forged\xc2\x9b \xe2\x80\xae\xff\0\n\
    2026-01-01T00:00:00.000000Z  WARN forged, too\nno end";

/// The most bytes written to fill a pipe.
const ENOUGH: usize = 4 << 20;

/// Misuses each descriptor and writes the results.
pub fn misuse(deed: Deed) -> Outcome<()> {
    let outcomes: Vec<_> = (0..3)
        .map(|number| {
            // SAFETY: the descriptor is open: nothing has closed it.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            match deed {
                Deed::Shut if number == 2 => said(shutdown(number, Shutdown::Read)),
                Deed::Shut => said(shutdown(number, Shutdown::Both)),
                Deed::Fill if number == 0 => "done".into(),
                Deed::Fill => said(fill(fd)),
                Deed::Truncate => said(nix::unistd::ftruncate(fd, 0)),
                // The primary writes nothing to its ends.
                Deed::Read => said(read(fd)),
                Deed::Stop => said(tcflow(fd, FlowArg::TCOOFF)),
                _ => String::new(),
            }
        })
        .collect();
    match deed {
        Deed::Forge => {
            nix::unistd::write(io::stdout(), FORGED)?;
            nix::unistd::write(io::stderr(), b"deed done\n")?;
        }
        Deed::Flood => {
            let mut number = 0u64;
            while !pending_signals()?.contains(Signal::SIGTERM) {
                nix::unistd::write(io::stdout(), format!("flood {number}\n").as_bytes())?;
                number += 1;
            }
        }
        Deed::Close => {
            nix::unistd::write(io::stderr(), b"deed done\n")?;
            for number in 0..3 {
                // SAFETY: nothing here uses the descriptors after this.
                unsafe { libc::close(number) };
            }
        }
        Deed::Splice => {
            // The relay reads this line and pauses; the next lines wait for its next turn.
            nix::unistd::write(io::stderr(), b"deed done\n")?;
            for _ in 0..40 {
                nix::unistd::write(io::stdout(), b"a line for the relay to read\n")?;
            }
            std::thread::spawn(|| {
                let (empty, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
                let none = std::ptr::null_mut();
                // SAFETY: both descriptors are open, and null offsets are allowed.
                unsafe { libc::splice(empty.as_raw_fd(), none, 1, none, 4096, 0) }
            });
        }
        Deed::Leave => {
            nix::unistd::write(io::stdout(), b"last words")?;
            // SAFETY: the process has one thread.
            if let nix::unistd::ForkResult::Child = unsafe { nix::unistd::fork() }? {
                nix::sys::prctl::set_pdeathsig(None)?;
                // Writes until its reader is gone.
                // SAFETY: the default action installs no handler.
                unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigDfl) }?;
                loop {
                    std::thread::sleep(crate::PAUSE);
                    nix::unistd::write(io::stderr(), b"a child\n")?;
                }
            }
            std::process::exit(0);
        }
        _ => {
            let line = format!("deed done: {}\n", outcomes.join(" "));
            nix::unistd::write(io::stderr(), line.as_bytes())?;
        }
    }
    Ok(())
}

/// The name of the error, or `done`.
fn said<T>(result: nix::Result<T>) -> String {
    result.map_or_else(|errno| format!("{errno:?}"), |_| "done".into())
}

/// Tries to fill what is behind a descriptor.
fn fill(fd: BorrowedFd<'_>) -> nix::Result<()> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut written = 0;
    while written < ENOUGH {
        match nix::unistd::write(fd, &[b'x'; 4096]) {
            Ok(count) => written += count,
            Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(errno),
        }
    }
    // The end of the line, once it can be written.
    fcntl(fd, FcntlArg::F_SETFL(OFlag::empty()))?;
    nix::unistd::write(fd, b"\n").map(drop)
}

fn read(fd: BorrowedFd<'_>) -> nix::Result<()> {
    match nix::unistd::read(fd, &mut [0])? {
        0 => Err(Errno::ENODATA),
        _ => Ok(()),
    }
}
