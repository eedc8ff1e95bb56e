//! Starting worker processes: unprivileged, and with nothing of the primary's but their place.

#![allow(unsafe_code, reason = "code that runs between fork and exec")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// What workers get of the primary's environment: where programs are, and how to write to people. The rest may hold what is
/// root's alone.
const ENVIRONMENT: [&str; 5] = ["PATH", "LANG", "LC_ALL", "TZ", "TERM"];

/// How long a worker that survives its primary looks for the next one.
const SURVIVAL: Duration = Duration::from_secs(60);

/// What all workers of a primary have in common.
#[derive(Clone, Debug)]
pub struct WorkerCommand {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Whom they run as.
    pub user: WorkerUser,
    /// Whether they go on when the primary dies, and look for the next.
    pub survive: bool,
    /// What each may use, as far as the system can limit it.
    pub limits: Limits,
    /// System calls that they are refused beside those that the primary is.
    pub sandbox: Option<Filter>,
    /// What becomes of their output.
    pub output: Arc<Output>,
}

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// There is no such program.
    #[error(
        "worker command `{program}` not found: give its full path (sudo searches its own secure_path), \
         or check the name"
    )]
    NotFound {
        /// As given.
        program: String,
    },
    /// It may not be executed.
    #[error(
        "worker command `{program}` cannot be executed by user {user}: {source}; make it executable (chmod a+rx) and every \
         directory above it enterable (chmod a+x), or choose another user with --user"
    )]
    NotExecutable {
        /// As given.
        program: String,
        /// The workers' user.
        user: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It has nowhere to write to.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Anything else.
    #[error("cannot start worker command `{program}`: {}", explained(source))]
    Other {
        /// As given.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A running worker process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// None: an earlier primary started it.
    child: Option<Child>,
    /// What descends from it is in there, too; killed with it.
    cgroup: Option<Cgroup>,
    /// Has its last lines relayed, when this is dropped.
    _tap: Option<Tap>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As it told the primary, its parent.
    Status(ExitStatus),
    /// It told its parent, which the primary was not.
    Unknown,
}

impl Ending {
    /// Whether it ended with status 0, as far as is known.
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
    /// Starts a worker for the member `member`: as the given user, without capabilities and without
    /// a way to get any, in its own process group and cgroup, without a controlling terminal (so
    /// that it cannot type into the primary's), with descriptors 0 (empty), 1 and 2 (see
    /// [`Output`]) and `control`, its connection, an environment of its own, nothing of how the
    /// primary is scheduled and limited, and told to end when the primary does, unless it is to
    /// survive that.
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
            // No session of its own: where the kernel schedules by session (sched(7), autogroup), a lane that yields would
            // not yield to a worker of another one.
            .process_group(0);
        // Under its number here: another one may be in use for what the child tells its parent
        // until exec.
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
        let entrance = cgroup.as_ref().map(Cgroup::entrance).transpose().map_err(other)?;
        let (uid, gid, sandbox) = (user.uid.as_raw(), user.gid.as_raw(), command.sandbox.clone());
        // SAFETY: the closure only makes system calls that are async-signal-safe.
        unsafe {
            process.pre_exec(move || {
                // What the primary's rights are needed for, comes first. Not every cgroup takes real-time processes.
                inherit::shed(&fresh)?;
                if let Some(entrance) = &entrance {
                    sys::enter_cgroup(entrance.as_fd())?;
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
                // Our own child and not yet waited for: its number is still its own.
                let _ = child.kill();
                let _ = child.wait();
                Err(SpawnError::Other { program: program.to_owned(), source })
            }
        }
    }

    /// A process that an earlier primary started, by its number and descriptor; and its cgroup, if that is one of this primary's.
    pub fn adopt(pid: u32, pidfd: OwnedFd, cgroup: Option<Cgroup>) -> Self {
        Process { pid, pidfd, child: None, cgroup, _tap: None }
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Whether an earlier primary started it.
    pub fn is_adopted(&self) -> bool {
        self.child.is_none()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that is readable once the process has ended.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Signals the process; not its group: what a worker started is the worker's to end.
    pub fn signal(&self, signal: Signal) {
        // It may have ended meanwhile.
        let _ = sys::pidfd_signal(self.pidfd.as_fd(), signal);
    }

    /// Whether the process has a handler for a signal.
    pub fn catches(&self, signal: Signal) -> bool {
        let status = std::fs::read(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        catches(&String::from_utf8_lossy(&status), signal)
    }

    /// Kills the process and what it has left in its cgroup, or in its process group, unless it has ended.
    pub fn kill(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        if self.ended().is_none() {
            match &self.child {
                // Until it is waited for, its number is its own, and its group's.
                Some(child) => {
                    let group = i32::try_from(child.id()).map(nix::unistd::Pid::from_raw);
                    let _ = group.map(|group| nix::sys::signal::killpg(group, Signal::SIGKILL));
                }
                // Others wait for it. Before Linux 6.9 there is no way then.
                None => {
                    let _ = sys::pidfd_signal_group(self.pidfd.as_fd(), Signal::SIGKILL);
                }
            }
            // It may have gone to another group.
            self.signal(Signal::SIGKILL);
        }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<Ending> {
        match &mut self.child {
            Some(child) => child.try_wait().ok().flatten().map(Ending::Status),
            None => sys::is_readable(self.pidfd.as_fd()).then_some(Ending::Unknown),
        }
    }
}

impl Drop for Process {
    /// No worker outlives the primary's interest in it, also when starting the others failed.
    fn drop(&mut self) {
        self.kill();
        let given_up = Instant::now() + Duration::from_secs(1);
        while self.ended().is_none() {
            if Instant::now() >= given_up {
                tracing::error!(
                    pid = self.pid(),
                    "a worker does not end though it was killed: it hangs in the kernel"
                );
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whether a process of this status has a handler for a signal.
fn catches(status: &str, signal: Signal) -> bool {
    sys::bits_of_status(status, "SigCgt:") & 1 << (signal as i32 - 1) != 0
}
