//! Starts worker processes: unprivileged, and without the primary's resources.

#![allow(unsafe_code, reason = "code that runs between fork and exec")]

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{ENV_CONTROL_FD, ENV_MEMBER, ENV_SOCKET, ENV_SURVIVE, ENV_TOKEN};

use crate::config::WorkerUser;
use crate::host::privileges;
use crate::host::sys;
use crate::process::cgroup::{Cgroup, Limits};
use crate::process::fork::{self, Program, StartError};
use crate::process::inherit::{self, Rlimits};
use crate::process::output::{self, Output, OutputError, Tap};
use crate::process::seccomp::Filter;

/// The variables that workers inherit from the primary's environment. Other variables may contain
/// secrets of root.
const ENVIRONMENT: [&str; 5] = ["PATH", "LANG", "LC_ALL", "TZ", "TERM"];

/// How long a worker that survives its primary tries to reach the next one: long enough to restart
/// a service.
const SURVIVAL: Duration = Duration::from_secs(60);

/// What all workers of a primary have in common.
#[derive(Clone, Debug)]
pub struct WorkerCommand {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The user that they run as.
    pub user: WorkerUser,
    /// Whether they survive the death of the primary, and reconnect to the next one.
    pub survive: bool,
    /// Whether each has a session of its own (see [`crate::host::autogroup`]).
    pub own_session: bool,
    /// The limits of each worker, as far as the system can enforce them.
    pub limits: Limits,
    /// A filter of system calls in addition to that of the primary.
    pub sandbox: Option<Filter>,
    /// The destination of their output.
    pub output: Arc<Output>,
}

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The program does not exist.
    #[error(
        "worker command `{program}` not found: give its full path (sudo searches its own secure_path), \
         or check the name"
    )]
    NotFound {
        /// The program, as configured.
        program: String,
    },
    /// The workers' user may not execute the program.
    #[error(
        "worker command `{program}` cannot be executed by user {user}: {source}; make it executable \
         (chmod a+rx) and every directory above it accessible (chmod a+x), or choose another user with \
         --user"
    )]
    NotExecutable {
        /// The program, as configured.
        program: String,
        /// The workers' user.
        user: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The destination of its output cannot be opened.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The new process did not reach the program. It has been killed.
    #[error(
        "the process for worker command `{program}` {source}, and was killed: another process of user \
         {user} may have stopped it"
    )]
    NotReached {
        /// The program, as configured.
        program: String,
        /// The workers' user.
        user: String,
        /// What happened to it.
        source: StartError,
    },
    /// Any other error.
    #[error("cannot start worker command `{program}`: {}", explained(source))]
    Other {
        /// The program, as configured.
        program: String,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A running worker process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// Whether an earlier primary started it: then another process reaps it.
    adopted: bool,
    /// How it ended, once it is known that it has.
    ending: Option<Ending>,
    /// The cgroup of the process and its descendants, which are killed with it.
    cgroup: Option<Cgroup>,
    /// Dropped with the process: relays its last lines.
    _tap: Option<Tap>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this status.
    Status(ExitStatus),
    /// The primary does not learn the status: it is not the parent, or a process that traces the
    /// worker has not waited for it yet.
    Unknown,
}

impl Ending {
    /// Whether it is known to have ended with status 0.
    pub fn success(&self) -> bool {
        matches!(self, Ending::Status(status) if status.success())
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::Status(status) => status.fmt(f),
            Ending::Unknown => f.write_str("status unknown"),
        }
    }
}

impl Process {
    /// Starts a worker for a member. The worker
    ///
    /// - runs as the configured user, without capabilities and with no way to gain any;
    /// - has its own process group and cgroup, and no controlling terminal: otherwise it could
    ///   inject input into the primary's;
    /// - has the descriptors 0 (/dev/null), 1 and 2 (see [`Output`]) and `control`, its connection;
    /// - has its own environment, and the scheduling and resource limits of a new login;
    /// - gets SIGTERM when the primary dies, unless workers survive that.
    ///
    /// # Errors
    /// [`SpawnError`]
    pub fn spawn(
        command: &WorkerCommand,
        socket: &Path,
        member: &str,
        token: &str,
        control: &OwnedFd,
        cgroup: Option<Cgroup>,
        rlimits: Rlimits,
    ) -> Result<Self, SpawnError> {
        let program = command.command.first().cloned().unwrap_or_default();
        let other = |source| SpawnError::Other { program: program.clone(), source };
        let user = &command.user;
        let ends = command.output.open(member)?;
        // The worker gets the descriptor under its number in this process.
        let control = control.as_raw_fd();
        let mut environment: Vec<(&str, OsString)> =
            ENVIRONMENT.iter().filter_map(|&name| Some((name, std::env::var_os(name)?))).collect();
        environment.extend([
            (ENV_SOCKET, socket.into()),
            (ENV_MEMBER, member.into()),
            (ENV_TOKEN, token.into()),
            (ENV_CONTROL_FD, control.to_string().into()),
        ]);
        let (survive, own_session) = (command.survive, command.own_session);
        if survive {
            environment.push((ENV_SURVIVE, SURVIVAL.as_secs().to_string().into()));
        }
        if !user.is_root() {
            environment.extend(["USER", "LOGNAME"].map(|name| (name, user.name.clone().into())));
        }
        let environment = environment.iter().map(|(name, value)| (*name, value.as_os_str()));
        let stdio = [output::null().map_err(other)?, ends.stdout, ends.stderr];
        let child = Program::new(&command.command, environment, stdio).map_err(other)?;
        let procs = cgroup.as_ref().map(Cgroup::procs).transpose().map_err(other)?;
        let (uid, gid, sandbox) = (user.uid.as_raw(), user.gid.as_raw(), command.sandbox.as_ref());
        let descriptors = sys::original_descriptor_limit();
        let steps = || {
            if own_session {
                nix::unistd::setsid()?;
            } else {
                nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            }
            // First the steps that need the primary's capabilities and quotas. `reset_attributes`
            // comes before the cgroup, since some cgroups refuse real-time processes.
            inherit::reset_attributes(&rlimits)?;
            inherit::leave_keyring()?;
            if let Some(procs) = &procs {
                sys::enter_cgroup(procs.as_fd())?;
            }
            privileges::empty_bounding_set()?;
            sys::become_user(uid, gid)?;
            privileges::keep_capabilities(privileges::NONE)?;
            sys::leave_terminal()?;
            nix::sys::prctl::set_no_new_privs()?;
            if !survive {
                nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
            }
            sys::close_on_exec_from(3)?;
            sys::keep_on_exec(control)?;
            sys::set_descriptor_limit(descriptors)?;
            sandbox.map_or(Ok(()), Filter::install)
        };
        // SAFETY: the closure makes only async-signal-safe calls.
        let (pid, pidfd) = unsafe { child.start(fork::LIMIT, steps) }.map_err(|error| match error {
            StartError::Failed(source) => match source.kind() {
                io::ErrorKind::NotFound => SpawnError::NotFound { program: program.clone() },
                io::ErrorKind::PermissionDenied => {
                    SpawnError::NotExecutable { program: program.clone(), user: user.name.clone(), source }
                }
                _ => other(source),
            },
            source => SpawnError::NotReached { program: program.clone(), user: user.name.clone(), source },
        })?;
        Ok(Process { pid, pidfd, adopted: false, ending: None, cgroup, _tap: ends.tap })
    }

    /// Adopts a process that an earlier primary started. `cgroup`: its cgroup, if this primary
    /// manages it.
    pub fn adopt(pid: u32, pidfd: OwnedFd, cgroup: Option<Cgroup>) -> Self {
        Process { pid, pidfd, adopted: true, ending: None, cgroup, _tap: None }
    }

    /// The cgroup of the process, if it has one of its own.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Whether an earlier primary started the process.
    pub fn is_adopted(&self) -> bool {
        self.adopted
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that becomes readable when the process ends.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Sends a signal to the process, but not to its group: a worker manages its own children.
    pub fn signal(&self, signal: Signal) {
        // The process may have ended.
        let _ = sys::pidfd_signal(self.pidfd.as_fd(), signal);
    }

    /// Whether the process has a handler for a signal.
    pub fn catches(&self, signal: Signal) -> bool {
        let status = std::fs::read(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        catches(&String::from_utf8_lossy(&status), signal)
    }

    /// Kills the process, unless it has ended, and the processes in its cgroup or process group.
    pub fn kill(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        if self.ended().is_none() {
            if self.adopted {
                // Another process reaps it. Before Linux 6.9, its group cannot be signalled safely.
                let _ = sys::pidfd_signal_group(self.pidfd.as_fd(), Signal::SIGKILL);
            } else {
                // Until it is reaped, its pid belongs to it and to its group.
                let _ = killpg(self.as_child(), Signal::SIGKILL);
            }
            // The process may have moved to another group.
            self.signal(Signal::SIGKILL);
        }
    }

    /// How the process ended; `None` if it is still running.
    ///
    /// The pidfd decides. While another process traces the worker, wait(2) does not report its end
    /// before the tracer has waited for it. The orphan reaper reaps it then.
    pub fn ended(&mut self) -> Option<Ending> {
        if self.ending.is_none() && sys::is_readable(self.pidfd.as_fd()) {
            let mut status = 0;
            // SAFETY: the kernel writes to `status`, which outlives the call.
            let reaped = !self.adopted
                && unsafe { libc::waitpid(self.as_child().as_raw(), &raw mut status, libc::WNOHANG) } > 0;
            let ending = if reaped { Ending::Status(ExitStatus::from_raw(status)) } else { Ending::Unknown };
            self.ending = Some(ending);
        }
        self.ending
    }

    fn as_child(&self) -> Pid {
        Pid::from_raw(self.pid.cast_signed())
    }
}

impl Drop for Process {
    /// No worker outlives the primary's interest in it. This does not wait for its end: the primary
    /// reaps all its children.
    fn drop(&mut self) {
        self.kill();
        // Most have ended long before.
        let _ = self.ended();
    }
}

/// Whether the text of a /proc/PID/status lists a handler for a signal.
fn catches(status: &str, signal: Signal) -> bool {
    sys::bits_of_status(status, "SigCgt:") & 1 << (signal as i32 - 1) != 0
}
