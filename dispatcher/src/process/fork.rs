//! Starts a program in a new process, and waits a bounded time until it runs.
//!
//! The standard library waits for exec(2) without a bound. Once the new process has changed its
//! user, other processes of that user can stop it, and the waiting thread with it.

#![allow(unsafe_code, reason = "fork(2), and what the new process does before exec(2)")]

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr::null;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, pipe2};

use crate::host::sys;

/// How long a new process may take until it runs its program. It needs milliseconds, or longer if
/// the file system of the program is slow.
pub const LIMIT: Duration = Duration::from_secs(5);

/// The time between two checks whether the process is stopped, in milliseconds.
const STEP: u8 = 10;

/// How long to wait until a killed process has exited. Later, only the orphan reaper can reap it.
const END: Duration = Duration::from_secs(1);

/// What a new process executes.
#[derive(Debug)]
pub struct Program {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    /// Descriptors 0, 1 and 2.
    stdio: [OwnedFd; 3],
}

/// Why a new process does not run its program.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A step before exec(2) failed, or exec(2) itself.
    #[error(transparent)]
    Failed(#[from] io::Error),
    /// The process was stopped, and has been killed.
    #[error("was stopped by a signal before it ran its program")]
    Stopped,
    /// The process took too long, and has been killed.
    #[error("did not run its program within {LIMIT:?}")]
    Late,
}

impl Program {
    /// A program with its arguments, environment, and descriptors 0 to 2. Unless the first argument
    /// contains a slash, the program is searched in the directories of this process' PATH.
    ///
    /// # Errors
    /// `arguments` is empty, or an argument or a variable contains a null byte.
    pub fn new<'a>(
        arguments: &[String],
        environment: impl IntoIterator<Item = (&'a str, &'a OsStr)>,
        stdio: [OwnedFd; 3],
    ) -> io::Result<Self> {
        let variable =
            |(name, value): (&str, &OsStr)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat());
        if arguments.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let arguments = arguments.iter().map(|argument| CString::new(argument.as_bytes()));
        Ok(Program {
            arguments: arguments.collect::<Result<_, _>>()?,
            environment: environment.into_iter().map(variable).collect::<Result<_, _>>()?,
            stdio,
        })
    }

    /// Runs the program in a new process, after `steps` in that process. Returns its pid and pidfd.
    /// A child that does not run its program within `limit` is killed.
    ///
    /// # Safety
    /// `steps` makes only async-signal-safe calls.
    ///
    /// # Errors
    /// [`StartError`]
    pub unsafe fn start(
        &self,
        limit: Duration,
        steps: impl FnMut() -> io::Result<()>,
    ) -> Result<(u32, OwnedFd), StartError> {
        let pointers = |strings: &[CString]| -> Vec<_> {
            strings.iter().map(|string| string.as_ptr()).chain([null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        // exec(2) closes the child's end.
        let (result, report) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
        // SAFETY: the child makes only async-signal-safe calls until exec(2) or _exit(2).
        let pid = match unsafe { libc::fork() } {
            0 => {
                let error = self.run(&arguments, &environment, steps).raw_os_error().unwrap_or(libc::EIO);
                // SAFETY: the kernel reads 4 bytes at `error`. _exit(2) runs no code of the parent.
                unsafe {
                    libc::write(report.as_raw_fd(), (&raw const error).cast(), size_of_val(&error));
                    libc::_exit(127)
                }
            }
            pid => Pid::from_raw(Errno::result(pid).map_err(io::Error::from)?),
        };
        drop(report);
        let number = pid.as_raw().cast_unsigned();
        let started = sys::pidfd_open(number).map_err(StartError::from);
        let started = started.and_then(|pidfd| wait(pid, result.into(), limit).map(|()| (number, pidfd)));
        if started.is_err() {
            end(pid);
        }
        started
    }

    /// Becomes the program. Returns only if that fails. Async-signal-safe.
    fn run(
        &self,
        arguments: &[*const libc::c_char],
        environment: &[*const libc::c_char],
        mut steps: impl FnMut() -> io::Result<()>,
    ) -> io::Error {
        // The standard library opens descriptors 0 to 2 at the start if they are closed. So none of
        // these is overwritten before it is copied.
        for (from, to) in self.stdio.iter().zip(0 as RawFd..) {
            // SAFETY: no pointers.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                return io::Error::last_os_error();
            }
        }
        if let Err(error) = steps() {
            return error;
        }
        // SAFETY: both lists end with a null pointer, and their strings outlive the call. The C
        // library searches PATH without allocating.
        unsafe { libc::execvpe(arguments[0], arguments.as_ptr(), environment.as_ptr()) };
        io::Error::last_os_error()
    }
}

/// Waits until a child has run its program, failed, or cannot be waited for.
fn wait(pid: Pid, mut result: File, limit: Duration) -> Result<(), StartError> {
    let deadline = Instant::now() + limit;
    loop {
        // First this: a child that is stopped after exec(2) has closed its end.
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let stopped = matches!(waitid(Id::Pid(pid), flags), Ok(WaitStatus::Stopped(..)));
        let late = Instant::now() >= deadline;
        match poll(&mut [PollFd::new(result.as_fd(), PollFlags::POLLIN)], STEP) {
            Ok(0) | Err(Errno::EINTR) if stopped => return Err(StartError::Stopped),
            Ok(0) | Err(Errno::EINTR) if late => return Err(StartError::Late),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => {
                let mut error = [0; size_of::<i32>()];
                return match result.read(&mut error)? {
                    0 => Ok(()),
                    _ => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(error)).into()),
                };
            }
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

/// Kills a child, and reaps it if it ends soon.
fn end(pid: Pid) {
    // Until it is reaped, its pid belongs to it.
    let _ = kill(pid, Signal::SIGKILL);
    let given_up = Instant::now() + END;
    while matches!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
        && Instant::now() < given_up
    {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(arguments: &[&str]) -> Program {
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap().into();
        let arguments: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Program::new(&arguments, [("XFAN_T", OsStr::new("7"))], [null(), null(), null()]).unwrap()
    }

    /// The error of a start whose step gets stuck, and whether its process is gone.
    fn stuck(limit: Duration, step: impl FnMut() -> io::Result<()> + Copy) -> StartError {
        let (pid, report) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut step = step;
        // SAFETY: async-signal-safe calls only.
        let error = unsafe {
            program(&["true"]).start(limit, || {
                let pid = libc::getpid();
                libc::write(report.as_raw_fd(), (&raw const pid).cast(), size_of_val(&pid));
                step()
            })
        };
        let mut bytes = [0; 4];
        File::from(pid).read_exact(&mut bytes).unwrap();
        let pid = Pid::from_raw(i32::from_ne_bytes(bytes));
        assert_eq!(waitpid(pid, Some(WaitPidFlag::WNOHANG)), Err(Errno::ECHILD), "it is reaped");
        error.unwrap_err()
    }

    #[test]
    fn a_child_that_is_stopped_before_exec_is_killed() {
        let stop = || {
            // SAFETY: no pointers.
            unsafe { libc::raise(libc::SIGSTOP) };
            Ok(())
        };
        let error = stuck(Duration::from_secs(3600), stop);
        assert_eq!(error.to_string(), "was stopped by a signal before it ran its program");
    }

    #[test]
    fn a_child_that_does_not_reach_exec_in_time_is_killed() {
        let sleep = || {
            // SAFETY: no pointers.
            unsafe { libc::sleep(3600) };
            Ok(())
        };
        assert!(matches!(stuck(Duration::from_millis(50), sleep), StartError::Late));
    }

    #[test]
    fn errors_before_and_of_exec_are_reported() {
        let start = |program: Program, step: fn() -> io::Result<()>| {
            // SAFETY: the steps make no calls.
            match unsafe { program.start(LIMIT, step) }.unwrap_err() {
                StartError::Failed(error) => error.raw_os_error(),
                other => panic!("{other}"),
            }
        };
        let fail = || Err(io::Error::from_raw_os_error(libc::EDQUOT));
        assert_eq!(start(program(&["true"]), fail), Some(libc::EDQUOT));
        assert_eq!(start(program(&["/no/such/program"]), || Ok(())), Some(libc::ENOENT));
        assert_eq!(start(program(&["no-such-program"]), || Ok(())), Some(libc::ENOENT));
        assert_eq!(start(program(&["/dev/null"]), || Ok(())), Some(libc::EACCES));
        assert!(Program::new(&["a\0b".to_owned()], [], program(&["true"]).stdio).is_err());
    }

    #[test]
    fn a_program_gets_its_arguments_environment_and_descriptors() {
        let (output, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut program = program(&["sh", "-c", "echo \"$1 $(env | grep XFAN_T)\"; exit 3", "sh", "one"]);
        program.stdio[1] = writer;
        // SAFETY: the step makes no calls.
        let (pid, pidfd) = unsafe { program.start(LIMIT, || Ok(())) }.unwrap();
        drop(program);
        let mut text = String::new();
        File::from(output).read_to_string(&mut text).unwrap();
        assert_eq!(text, "one XFAN_T=7\n");
        let pid = Pid::from_raw(pid.cast_signed());
        assert_eq!(waitpid(pid, None), Ok(WaitStatus::Exited(pid, 3)));
        assert!(sys::is_readable(pidfd.as_fd()));
    }
}
