//! Starts worker processes: unprivileged, and without the primary's resources.

#![allow(unsafe_code, reason = "code that runs between fork and exec")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use xfan_shm::limits::explained;
use xfan_shm::protocol::{ENV_CONTROL_FD, ENV_MEMBER, ENV_SOCKET, ENV_SURVIVE, ENV_TOKEN};

use crate::config::WorkerUser;
use crate::host::privileges;
use crate::host::sys;
use crate::process::cgroup::{Cgroup, Limits};
use crate::process::inherit::{self, Fresh};
use crate::process::output::{Output, OutputError, Tap};
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
    /// `None`: an earlier primary started it.
    child: Option<Child>,
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
    /// The primary is not its parent, and does not learn the status.
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
        fresh: Fresh,
    ) -> Result<Self, SpawnError> {
        let (program, arguments) =
            command.command.split_first().map_or(("", &[][..]), |(program, rest)| (program.as_str(), rest));
        let user = &command.user;
        let ends = command.output.open(member)?;
        let mut process = Command::new(program);
        process
            .args(arguments)
            .env_clear()
            .envs(ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .env(ENV_SOCKET, socket)
            .env(ENV_MEMBER, member)
            .env(ENV_TOKEN, token)
            .stdin(Stdio::null())
            .stdout(ends.stdout)
            .stderr(ends.stderr)
            // Workers share the session of the primary. With autogroup (sched(7)), the kernel
            // schedules by session: a lane that yields would not yield to a worker of another
            // session.
            .process_group(0);
        // The worker gets the descriptor under its number in this process. Another number may be in
        // use for the pipe by which the child reports an error before exec.
        let control = control.as_raw_fd();
        process.env(ENV_CONTROL_FD, control.to_string());
        let survive = command.survive;
        let descriptors = sys::original_descriptor_limit();
        if survive {
            process.env(ENV_SURVIVE, SURVIVAL.as_secs().to_string());
        }
        if !user.is_root() {
            process.env("USER", &user.name).env("LOGNAME", &user.name);
        }
        let other = |source| SpawnError::Other { program: program.to_owned(), source };
        let procs = cgroup.as_ref().map(Cgroup::procs).transpose().map_err(other)?;
        let (uid, gid, sandbox) = (user.uid.as_raw(), user.gid.as_raw(), command.sandbox.clone());
        // SAFETY: the closure makes only async-signal-safe calls.
        unsafe {
            process.pre_exec(move || {
                // First the steps that need the primary's capabilities. `shed` comes before the
                // cgroup, since some cgroups refuse real-time processes.
                inherit::shed(&fresh)?;
                if let Some(procs) = &procs {
                    sys::enter_cgroup(procs.as_fd())?;
                }
                privileges::empty_bounding_set()?;
                sys::become_user(uid, gid)?;
                privileges::keep_capabilities(privileges::NONE)?;
                inherit::leave_keyring()?;
                sys::leave_terminal()?;
                nix::sys::prctl::set_no_new_privs()?;
                if !survive {
                    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
                }
                sys::close_on_exec_from(3)?;
                sys::keep_on_exec(control)?;
                sys::set_descriptor_limit(descriptors)?;
                sandbox.as_ref().map_or(Ok(()), Filter::install)
            });
        }
        let child = process.spawn().map_err(|source| {
            let program = program.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => SpawnError::NotFound { program },
                io::ErrorKind::PermissionDenied => {
                    SpawnError::NotExecutable { program, user: user.name.clone(), source }
                }
                _ => SpawnError::Other { program, source },
            }
        })?;
        let mut child = child;
        match sys::pidfd_open(child.id()) {
            Ok(pidfd) => Ok(Process { pid: child.id(), pidfd, child: Some(child), cgroup, _tap: ends.tap }),
            Err(source) => {
                // The child has not been reaped, so its pid still belongs to it.
                let _ = child.kill();
                let _ = child.wait();
                Err(SpawnError::Other { program: program.to_owned(), source })
            }
        }
    }

    /// Adopts a process that an earlier primary started. `cgroup`: its cgroup, if this primary
    /// manages it.
    pub fn adopt(pid: u32, pidfd: OwnedFd, cgroup: Option<Cgroup>) -> Self {
        Process { pid, pidfd, child: None, cgroup, _tap: None }
    }

    /// The cgroup of the process, if it has one of its own.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Whether an earlier primary started the process.
    pub fn is_adopted(&self) -> bool {
        self.child.is_none()
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
            match &self.child {
                // Until it is reaped, its pid belongs to it and to its group.
                Some(child) => {
                    let group = i32::try_from(child.id()).map(nix::unistd::Pid::from_raw);
                    let _ = group.map(|group| nix::sys::signal::killpg(group, Signal::SIGKILL));
                }
                // Another process reaps it. Before Linux 6.9, its group cannot be signalled safely.
                None => {
                    let _ = sys::pidfd_signal_group(self.pidfd.as_fd(), Signal::SIGKILL);
                }
            }
            // The process may have moved to another group.
            self.signal(Signal::SIGKILL);
        }
    }

    /// How the process ended; `None` if it is still running.
    pub fn ended(&mut self) -> Option<Ending> {
        match &mut self.child {
            Some(child) => child.try_wait().ok().flatten().map(Ending::Status),
            None => sys::is_readable(self.pidfd.as_fd()).then_some(Ending::Unknown),
        }
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
