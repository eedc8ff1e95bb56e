//! Becoming a member: the options, and the exchange with the dispatcher.
//!
//! ```text
//! worker                                   dispatcher
//!   Attach: version, group, member    →
//!                                     ←    Attached: geometry, core, four descriptors
//!   map the segments, seal its own,
//!   pin the thread
//!   Ready                             →
//!                                     ←    Joined: lanes now send packets
//! ```

use std::env;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use xfan_shm::clock;
use xfan_shm::layout::{Down, Up, VERSION};
use xfan_shm::protocol::{
    self, Attach, Attached, ENV_MEMBER, ENV_SOCKET, ENV_SURVIVE, ENV_TOKEN, Reply, Request,
};
use xfan_shm::segment::{self, Mapping};

use crate::connection::{ask, dial};
use crate::error::AttachError;
use crate::inherited;
use crate::leave::Leave;
use crate::{DEFAULT_BATCH, MAX_BATCH};

/// First pause between two attempts to reach the next dispatcher. Each pause is twice as long as
/// the previous one. The first is short, because until a worker attaches to it, a restarted
/// dispatcher has nobody to send packets to.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// Longest pause between two attempts: a waiting worker makes ten attempts a second, which costs
/// next to no CPU time.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Time within which a starting dispatcher sets the permissions of its socket. A worker that is
/// denied access for longer than this gives up.
const SOCKET_SETUP_TIME: Duration = Duration::from_secs(1);

/// Options for attaching a worker, made by [`Worker::builder`](crate::Worker::builder).
///
/// Without [`socket`](Self::socket), [`attach`](Self::attach) reads the environment that `xfan run`
/// sets for the workers it starts: the control socket, the member, and the token that proves the
/// worker was started for that member.
///
/// # Examples
///
/// ```no_run
/// use xfan_worker::Worker;
///
/// let mut worker = Worker::builder()
///     .socket("/run/xfan/eth1.sock")
///     .group("ids")
///     .batch(128)
///     .leave_on_signals()
///     .attach()?;
/// println!("attached as {} on core {:?}", worker.member(), worker.core());
/// # Ok::<(), xfan_worker::AttachError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Builder {
    socket: Option<PathBuf>,
    group: Option<String>,
    member: Option<String>,
    token: Option<String>,
    /// Whether to use the inherited connection that the environment may name.
    inherited: bool,
    program: Option<String>,
    pub(crate) batch: usize,
    leave_on_signals: bool,
    pub(crate) survival: Option<Duration>,
}

/// What a worker holds once it is a member.
pub(crate) struct Membership {
    /// The options that the worker attached with.
    pub(crate) builder: Builder,
    pub(crate) attached: Attached,
    pub(crate) umem: Mapping,
    pub(crate) down: Down,
    pub(crate) up: Up,
    pub(crate) control: OwnedFd,
    pub(crate) doorbell: OwnedFd,
    pub(crate) leave: Leave,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Builder {
            socket: None,
            group: None,
            member: None,
            token: None,
            inherited: false,
            program: None,
            batch: DEFAULT_BATCH,
            leave_on_signals: false,
            survival: None,
        }
    }

    /// Sets the dispatcher's control socket, such as `/run/xfan/eth1.sock`. The worker then ignores
    /// the environment. Without this option, the environment names the socket, the member and the
    /// token.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.socket = Some(path.into());
        self
    }

    /// Sets the group to join. The default is the dispatcher's first group.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// Sets the member to become, such as `default/0`. The default is any vacant member.
    pub fn member(mut self, member: impl Into<String>) -> Self {
        self.member = Some(member.into());
        self
    }

    /// Sets the program name that the dispatcher logs and reports. The default is the file name of
    /// the executable.
    pub fn program(mut self, name: impl Into<String>) -> Self {
        self.program = Some(name.into());
        self
    }

    /// Sets the largest number of packets in a batch, 1 to [`MAX_BATCH`]. The default is
    /// [`DEFAULT_BATCH`].
    pub fn batch(mut self, packets: usize) -> Self {
        self.batch = packets;
        self
    }

    /// Has the worker leave on SIGTERM and SIGINT. The first signal makes
    /// [`Worker::recv`](crate::Worker::recv) call
    /// [`Worker::request_detach`](crate::Worker::request_detach). The second one terminates the
    /// process immediately. Without this option, the library handles no signals.
    pub fn leave_on_signals(mut self) -> Self {
        self.leave_on_signals = true;
        self
    }

    /// Joins as [`Builder::attach`] documents, up to the point where a `Worker` can be made.
    pub(crate) fn join(mut self) -> Result<Membership, AttachError> {
        if !(1..=MAX_BATCH).contains(&self.batch) {
            return Err(AttachError::Batch(self.batch));
        }
        if self.socket.is_none() {
            let set = |name| env::var(name).ok().filter(|value| !value.is_empty());
            self.member = self.member.or_else(|| set(ENV_MEMBER));
            self.token = set(ENV_TOKEN);
            self.inherited = true;
            self.survival =
                set(ENV_SURVIVE).and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
            self.socket = env::var_os(ENV_SOCKET).filter(|path| !path.is_empty()).map(PathBuf::from);
        }
        let leave_on_signals = self.leave_on_signals;
        self.join_once(|| Leave::new(leave_on_signals).map_err(AttachError::Signals))
    }

    /// Joins the next dispatcher on the same socket: as `member` if it accepts that, else as any
    /// vacant member. Retries temporary errors until `patience` is over.
    pub(crate) fn join_next(
        mut self,
        member: String,
        leave: &Leave,
        patience: Duration,
    ) -> Result<Membership, AttachError> {
        let start = Instant::now();
        let mut pause = SHORTEST_PAUSE;
        self.member = Some(member);
        // The next dispatcher knows the token only if the last one had its workers survive it.
        self.token.take_if(|_| self.survival.is_none());
        let mut denied = None;
        loop {
            if leave.is_due() {
                return Err(AttachError::Leaving);
            }
            let mut joined = self.clone().join_once(|| Ok(leave.afresh()));
            if joined.as_ref().is_err_and(AttachError::is_about_the_member) {
                let any = Builder { member: None, token: None, ..self.clone() };
                joined = any.join_once(|| Ok(leave.afresh()));
            }
            let error = match joined {
                Err(error) => error,
                joined => return joined,
            };
            // A starting dispatcher creates its socket first and then gives workers access to it.
            if matches!(error, AttachError::Permission(_)) {
                denied.get_or_insert_with(Instant::now);
            } else {
                denied = None;
            }
            let stays_denied = denied.is_some_and(|since| since.elapsed() >= SOCKET_SETUP_TIME);
            if !error.is_temporary() || stays_denied || start.elapsed() >= patience {
                return Err(error);
            }
            std::thread::sleep(pause.min(patience.saturating_sub(start.elapsed())));
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    fn join_once(
        self,
        leave: impl FnOnce() -> Result<Leave, AttachError>,
    ) -> Result<Membership, AttachError> {
        let path = self.socket.clone().ok_or(AttachError::NoSocket)?;
        // Calibrate the clock now: once the dispatcher knows this worker, packets may arrive.
        clock::ticks_per_ns();
        let inherited = if self.inherited { inherited::connect(&path)? } else { None };
        let control = inherited.map_or_else(|| dial(&path), Ok)?;
        // Install the signal handlers after connecting, so that a signal still terminates a worker
        // that has no dispatcher yet, but before the dispatcher knows this worker and may signal
        // it.
        let leave = leave()?;
        let request = Request::Attach(Attach {
            version: VERSION,
            group: self.group.clone(),
            member: self.member.clone(),
            token: self.token.clone(),
            program: self.program.clone().unwrap_or_else(program_name),
        });
        let (attached, fds) = match ask(&control, &request, &path)? {
            (Reply::Attached(attached), fds) => (attached, fds),
            (Reply::Refused(refusal), _) => {
                return Err(AttachError::Refused { code: refusal.code, message: refusal.message });
            }
            _ => return Err(AttachError::Unexpected(path)),
        };
        let Ok([umem, down, up, doorbell]) = <[OwnedFd; protocol::ATTACHED_FDS]>::try_from(fds) else {
            return Err(AttachError::Unexpected(path));
        };
        let umem_bytes = usize::try_from(attached.umem_bytes).unwrap_or(usize::MAX);
        let umem = Mapping::read_only(umem, umem_bytes).map_err(AttachError::Umem)?;
        let down = Down::open(down, attached.geometry)?;
        let own = Up::open(&up, attached.geometry)?;
        // The dispatcher reads no segment that its worker could still punch holes into.
        segment::seal_against_further_writers(&up).map_err(AttachError::Seal)?;
        if let Some(core) = attached.core {
            pin(core)?;
        }
        match ask(&control, &Request::Ready, &path)?.0 {
            Reply::Joined => {}
            Reply::Refused(refusal) => {
                return Err(AttachError::Refused { code: refusal.code, message: refusal.message });
            }
            _ => return Err(AttachError::Unexpected(path)),
        }
        Ok(Membership { builder: self, attached, umem, down, up: own, control, doorbell, leave })
    }
}

/// File name of the executable.
fn program_name() -> String {
    let path = env::current_exe().unwrap_or_default();
    path.file_name().map_or_else(|| "worker".into(), |name| name.to_string_lossy().into_owned())
}

/// Pins the calling thread to `core`.
fn pin(core: usize) -> Result<(), AttachError> {
    /// Number of cores in a `cpu_set_t`: `core_affinity` panics on a higher number.
    const CORES: usize = 1024;
    if core < CORES && core_affinity::set_for_current(CoreId { id: core }) {
        Ok(())
    } else {
        Err(AttachError::Core(core))
    }
}
