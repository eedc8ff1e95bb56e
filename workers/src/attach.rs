//! Becoming a member: the conversation on the control socket.

use std::env;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use xfan_shm::clock;
use xfan_shm::layout::{Down, LayoutError, Up, VERSION};
use xfan_shm::limits::explained;
use xfan_shm::protocol::{
    self, Attach, ENV_CONTROL_FD, ENV_MEMBER, ENV_SOCKET, ENV_SURVIVE, ENV_TOKEN, ProtocolError, RefusalCode,
    Reply, Request,
};
use xfan_shm::segment::{self, Mapping};

use crate::inherited;
use crate::leave::Leave;
use crate::worker::Worker;
use crate::{DEFAULT_BATCH, MAX_BATCH};

/// How long the dispatcher may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two tries to find the next dispatcher; each pause is twice as long as the one before.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// A dispatcher that begins sets its socket's permissions within this time.
const MOMENT: Duration = Duration::from_secs(1);

/// Why a worker could not attach.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Neither the environment nor the program names a control socket.
    #[error(
        "no control socket: {ENV_SOCKET} is not set. `xfan run … -- COMMAND` sets it for the workers it starts; \
         to join a running dispatcher, name its socket, such as /run/xfan/IFACE.sock"
    )]
    NoSocket,
    /// Nothing listens there.
    #[error(
        "no dispatcher listens on {0}: start one with `xfan run -i IFACE …`, or name the socket of the one that runs"
    )]
    NoDispatcher(PathBuf),
    /// The socket's permissions forbid it.
    #[error(
        "no permission to connect to {0}: run as the user or group that owns the socket and may enter its directory, or as root"
    )]
    Permission(PathBuf),
    /// Connecting failed otherwise.
    #[error("cannot connect to {}: {}", .0.display(), explained(.1))]
    Connect(PathBuf, #[source] io::Error),
    /// The environment names a descriptor that is no connection.
    #[error(
        "{ENV_CONTROL_FD} names descriptor {number} as the connection to the dispatcher, but {reason}: whatever starts this \
         worker for `xfan run` must leave that descriptor open. Without {ENV_CONTROL_FD}, the worker connects to {ENV_SOCKET}"
    )]
    Inherited {
        /// What the environment says.
        number: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The dispatcher said no, and why.
    #[error("the dispatcher refused this worker: {message}")]
    Refused {
        /// The kind of refusal.
        code: RefusalCode,
        /// A sentence.
        message: String,
    },
    /// No answer.
    #[error(
        "{0} did not answer within {seconds} s: see in its log whether the dispatcher is well",
        seconds = PATIENCE.as_secs()
    )]
    NoAnswer(PathBuf),
    /// The conversation broke.
    #[error("the conversation with {0} failed: {1}")]
    Protocol(PathBuf, #[source] ProtocolError),
    /// The answer was none to this question.
    #[error(
        "{0} answered something else than was asked: is an xfan dispatcher of the same release behind it?"
    )]
    Unexpected(PathBuf),
    /// The rings are not what was announced.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Its segment cannot be sealed.
    #[error("cannot seal this worker's segment: {0}; the kernel must be Linux 5.1 or later")]
    Seal(#[source] io::Error),
    /// The packet memory cannot be mapped.
    #[error("cannot map the packet memory: {}", explained(.0))]
    Umem(#[source] io::Error),
    /// The thread cannot run where the dispatcher wants it.
    #[error(
        "cannot run on core {0}, which the dispatcher gave this worker: it is offline or outside this process' \
         cpuset (see `taskset -p`); choose others with `xfan run --cores`"
    )]
    Core(usize),
    /// A batch size outside the limits.
    #[error("a batch of {0} packets is not possible: 1 to {MAX_BATCH}")]
    Batch(usize),
    /// A signal asked the worker to leave while it looked for the next dispatcher.
    #[error("told to leave while there was no dispatcher")]
    Leaving,
    /// The signal handlers cannot be installed.
    #[error("cannot install handlers for SIGTERM and SIGINT: {}", explained(.0))]
    Signals(#[source] io::Error),
}

/// How a worker is to attach; made by [`Worker::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    socket: Option<PathBuf>,
    group: Option<String>,
    member: Option<String>,
    token: Option<String>,
    /// The environment may name an inherited connection.
    inherited: bool,
    program: Option<String>,
    pub(crate) batch: usize,
    leave_on_signals: bool,
    pub(crate) survival: Option<Duration>,
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

    /// The dispatcher's control socket. Without it, the environment says where, which member, and with what token.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.socket = Some(path.into());
        self
    }

    /// The group to join; the dispatcher's first otherwise.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// The member to become, such as `default/0`; any vacant one otherwise.
    pub fn member(mut self, member: impl Into<String>) -> Self {
        self.member = Some(member.into());
        self
    }

    /// The program's name, for the dispatcher's log; the executable's file name otherwise.
    pub fn program(mut self, name: impl Into<String>) -> Self {
        self.program = Some(name.into());
        self
    }

    /// Most packets in a batch, 1 to [`MAX_BATCH`]; [`DEFAULT_BATCH`] otherwise.
    pub fn batch(mut self, packets: usize) -> Self {
        self.batch = packets;
        self
    }

    /// Leaves on SIGTERM and SIGINT: the first makes [`Worker::recv`] do what [`Worker::request_detach`] does, the
    /// second ends the process at once. Without this, signals are the program's own affair.
    pub fn leave_on_signals(mut self) -> Self {
        self.leave_on_signals = true;
        self
    }

    /// Attaches, and pins the calling thread to the core that the dispatcher names.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn attach(mut self) -> Result<Worker, AttachError> {
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
        self.join(|| Leave::new(leave_on_signals).map_err(AttachError::Signals))
    }

    /// Attaches to the dispatcher that has taken the place of one that is gone: as the member that the worker was, if it can be
    /// had, else as any. Tries until there is one, for `patience` at most.
    pub(crate) fn join_next(
        mut self,
        member: String,
        leave: &Leave,
        patience: Duration,
    ) -> Result<Worker, AttachError> {
        let start = Instant::now();
        let mut pause = SHORTEST_PAUSE;
        self.member = Some(member);
        // Only one whose workers survive it has written this down for the next.
        self.token.take_if(|_| self.survival.is_none());
        let mut denied = None;
        loop {
            if leave.is_due() {
                return Err(AttachError::Leaving);
            }
            let mut joined = self.clone().join(|| Ok(leave.afresh()));
            if joined.as_ref().is_err_and(AttachError::is_about_the_member) {
                let any = Builder { member: None, token: None, ..self.clone() };
                joined = any.join(|| Ok(leave.afresh()));
            }
            let error = match joined {
                Err(error) => error,
                joined => return joined,
            };
            // The socket is not the workers' before the dispatcher has made it so.
            if matches!(error, AttachError::Permission(_)) {
                denied.get_or_insert_with(Instant::now);
            } else {
                denied = None;
            }
            let stays_denied = denied.is_some_and(|since| since.elapsed() >= MOMENT);
            if !error.may_pass() || stays_denied || start.elapsed() >= patience {
                return Err(error);
            }
            std::thread::sleep(pause.min(patience.saturating_sub(start.elapsed())));
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    fn join(self, leave: impl FnOnce() -> Result<Leave, AttachError>) -> Result<Worker, AttachError> {
        let path = self.socket.clone().ok_or(AttachError::NoSocket)?;
        // The clock and the handlers before the dispatcher knows us: from then on it may ask us to stop, and packets may come.
        clock::ticks_per_ns();
        let inherited = if self.inherited { inherited::connect(&path)? } else { None };
        let control = inherited.map_or_else(|| dial(&path), Ok)?;
        // But not before there is a dispatcher: who tries until there is one must still end by a signal.
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
        // The dispatcher believes nothing of a segment into which holes can be punched.
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
        Ok(Worker::new(self, attached, umem, down, own, control, doorbell, leave))
    }
}

impl AttachError {
    /// Whether another member may be had.
    fn is_about_the_member(&self) -> bool {
        use RefusalCode::{Forbidden, Occupied, UnknownMember};
        matches!(self, AttachError::Refused { code: Forbidden | Occupied | UnknownMember, .. })
    }

    /// Whether it may be otherwise soon: there is no dispatcher yet, it is just going, or all places are taken.
    fn may_pass(&self) -> bool {
        use RefusalCode::{Closing, Occupied};
        match self {
            AttachError::NoDispatcher(_) | AttachError::NoAnswer(_) | AttachError::Permission(_) => true,
            AttachError::Protocol(_, error) => matches!(error, ProtocolError::Closed),
            AttachError::Refused { code, .. } => matches!(code, Closing | Occupied),
            _ => false,
        }
    }
}

fn program_name() -> String {
    let path = env::current_exe().unwrap_or_default();
    path.file_name().map_or_else(|| "worker".into(), |name| name.to_string_lossy().into_owned())
}

/// Connects to the control socket.
pub(crate) fn dial(path: &Path) -> Result<OwnedFd, AttachError> {
    let failed = |errno: Errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => AttachError::NoDispatcher(path.into()),
        Errno::EACCES | Errno::EPERM => AttachError::Permission(path.into()),
        _ => AttachError::Connect(path.into(), errno.into()),
    };
    let control =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    be_patient(&control).map_err(failed)?;
    connect(control.as_raw_fd(), &UnixAddr::new(path).map_err(failed)?).map_err(failed)?;
    Ok(control)
}

/// Has the kernel wait for a peer, but not for ever.
pub(crate) fn be_patient(socket: impl AsFd) -> nix::Result<()> {
    let patience = TimeVal::milliseconds(i64::try_from(PATIENCE.as_millis()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    setsockopt(&socket, sockopt::SendTimeout, &patience)
}

/// Sends the request and waits for what the dispatcher says to it.
pub(crate) fn ask(
    control: impl AsFd,
    request: &Request,
    path: &Path,
) -> Result<(Reply, Vec<OwnedFd>), AttachError> {
    protocol::ask(&control, request).map_err(|error| {
        if error.would_block() {
            AttachError::NoAnswer(path.into())
        } else {
            AttachError::Protocol(path.into(), error)
        }
    })
}

/// Pins the calling thread.
fn pin(core: usize) -> Result<(), AttachError> {
    /// Cores that a `cpu_set_t` has room for.
    const CORES: usize = 1024;
    if core < CORES && core_affinity::set_for_current(CoreId { id: core }) {
        Ok(())
    } else {
        Err(AttachError::Core(core))
    }
}
