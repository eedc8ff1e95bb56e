//! What a worker may do with its descriptors 0 to 2.

use std::io;
use std::os::fd::BorrowedFd;

use clap::ValueEnum;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::termios::{FlowArg, tcflow};

use crate::Outcome;
use crate::place::pending_signals;

/// One of the things to do.
#[derive(Clone, Copy, ValueEnum)]
pub enum Deed {
    /// Shuts down what is behind them, as if it were a socket.
    Shut,
    /// Has writes to them fail where they would block, and writes until one does.
    Fill,
    /// Truncates what is behind them.
    Truncate,
    /// Reads from them.
    Read,
    /// Stops the terminal behind them.
    Stop,
    /// Closes them.
    Close,
    /// Writes lines that look like another's, and what steers a terminal.
    Forge,
    /// Writes lines without pause until SIGTERM.
    Flood,
    /// Writes a line that has no end, and ends; a child that it leaves keeps the descriptors.
    Leave,
}

/// What the forger writes: on a terminal, a line of the primary's; and then bytes that are no text.
const FORGED: &[u8] =
    b"\x1b[1A\x1b[2K\r2026-01-01T00:00:00.000000Z ERROR forged\xc2\x9b \xe2\x80\xae\xff\0\n\
    2026-01-01T00:00:00.000000Z  WARN forged, too\nno end";

/// Most that is written to fill a pipe.
const ENOUGH: usize = 4 << 20;

/// Does it, and writes what came of it, for each descriptor.
pub fn misuse(deed: Deed) -> Outcome<()> {
    let outcomes: Vec<_> = (0..3)
        .map(|number| {
            // SAFETY: they are open: nothing has closed them.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            match deed {
                Deed::Shut => said(shutdown(number, Shutdown::Both)),
                Deed::Fill if number == 0 => "done".into(),
                Deed::Fill => said(fill(fd)),
                Deed::Truncate => said(nix::unistd::ftruncate(fd, 0)),
                // A pipe is not to be read from at this end, nor what was opened to write.
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
                // SAFETY: nothing here uses them after this.
                unsafe { libc::close(number) };
            }
        }
        Deed::Leave => {
            nix::unistd::write(io::stdout(), b"last words")?;
            // SAFETY: there is one thread.
            if let nix::unistd::ForkResult::Child = unsafe { nix::unistd::fork() }? {
                nix::sys::prctl::set_pdeathsig(None)?;
                // Until nobody reads what it writes.
                // SAFETY: no handler: the default.
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

/// Name of the error, or `done`.
fn said<T>(result: nix::Result<T>) -> String {
    result.map_or_else(|errno| format!("{errno:?}"), |_| "done".into())
}

/// Fills what is behind a descriptor, or tries to.
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
    // The line's end, once there is room.
    fcntl(fd, FcntlArg::F_SETFL(OFlag::empty()))?;
    nix::unistd::write(fd, b"\n").map(drop)
}

fn read(fd: BorrowedFd<'_>) -> nix::Result<()> {
    match nix::unistd::read(fd, &mut [0])? {
        0 => Err(Errno::ENODATA),
        _ => Ok(()),
    }
}
