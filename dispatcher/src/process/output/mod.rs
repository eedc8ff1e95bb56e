//! The output of workers: what they write to descriptors 1 and 2 (setting `worker_output`).
//!
//! ```text
//!  worker 0 ═ 2 sockets ═► relay ─┐  ┌─► the log: escaped, tagged, rate-limited
//!                        (thread) ├──┤
//!  worker 1 ═ 2 sockets ═► relay ─┘  └─► files, each with a thread: one per member, or one for all
//! ```
//!
//! Each worker has sockets and a relay of its own, so that it cannot disturb the output of another.
//! They are sockets since a writer can hold the lock of a pipe for as long as it likes: it calls
//! splice(2) from a socket that stays empty, and whoever reads the pipe sleeps uninterruptibly.
//!
//! A relay never waits for a file and reads a bounded amount in each turn. All relays together use
//! at most a fifth of a CPU. Lines that do not fit into a queue are dropped and counted.

mod journald;
mod lines;
mod relay;

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};

use crate::config::WorkerOutput;
use crate::host::privileges::drop_all_capabilities;
use crate::host::sys::refuse_descriptors;
use crate::log::{Sink, Writer, open_to_append};
use relay::{Relay, Source, Target};

/// How long an ending primary waits for the relays and the files to write their last lines.
const PATIENCE: Duration = Duration::from_secs(2);

/// The stack of a relay's thread, in bytes. It formats log lines and calls nothing deep.
const STACK: usize = 256 << 10;

/// The placeholder for the member in the name of a file.
const MEMBER: &str = "{member}";

/// Relays the output of all workers.
#[derive(Debug)]
pub struct Output {
    setting: WorkerOutput,
    survive: bool,
    members: Mutex<Members>,
    relays: Mutex<Relays>,
    /// See [`Source::active`].
    active: Arc<AtomicU32>,
}

#[derive(Debug, Default)]
struct Members {
    /// The number of dropped lines of each member.
    dropped: HashMap<String, Arc<AtomicU64>>,
    /// The open files, by path.
    files: HashMap<PathBuf, Arc<Writer>>,
}

/// The running relays.
#[derive(Debug)]
struct Relays {
    /// Writing to one ends a relay.
    ends: Vec<Weak<EventFd>>,
    /// Each relay has a clone: `ended` is disconnected when all have ended. `None`: the primary is
    /// ending.
    running: Option<Sender<Infallible>>,
    ended: Receiver<Infallible>,
}

/// Why the output of workers cannot be written as configured.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A file cannot be opened.
    #[error(
        "cannot open the workers' output file {}: {source}; create its directory, or change worker_output",
        path.display()
    )]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No journal is running.
    #[error(
        "worker_output = \"journal\", but systemd's journal does not listen on {}: {source}; set \
         worker_output to \"log\", \"null\" or a file",
        journald::SOCKET
    )]
    NoJournal {
        /// The system's error.
        source: io::Error,
    },
    /// Workers that outlive the primary would share a file.
    #[error(
        "with survive = true, workers write to their files directly, so that each needs its own: add \
         {MEMBER} to worker_output ({})", path.display()
    )]
    Shared {
        /// The configured path.
        path: PathBuf,
    },
    /// No descriptor or thread is left.
    #[error("cannot relay workers' output: {0}")]
    Io(#[from] io::Error),
}

/// The descriptors that a worker writes to, and the relay's end of them.
pub struct Ends {
    /// Becomes descriptor 1 of the worker.
    pub stdout: OwnedFd,
    /// Becomes descriptor 2 of the worker.
    pub stderr: OwnedFd,
    /// Keeps the relay going while the worker runs; `None`: nothing is relayed.
    pub tap: Option<Tap>,
}

/// Relays the output of one worker. Dropping it relays what is left in the worker's sockets, and
/// closes them.
#[derive(Debug)]
pub struct Tap {
    end: Arc<EventFd>,
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = self.end.write(1);
    }
}

impl Output {
    /// Opens the destinations of these members once, so that an unusable one fails now.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn begin(setting: WorkerOutput, survive: bool, members: &[String]) -> Result<Arc<Self>, OutputError> {
        match &setting {
            WorkerOutput::File(path) if survive && file_of(path, "") == *path => {
                return Err(OutputError::Shared { path: path.clone() });
            }
            WorkerOutput::Log if survive => tracing::warn!(
                "workers that survive this primary cannot write to its log: their output goes to \
                 /dev/null; to keep it, set worker_output to \"journal\", or to a file with {MEMBER} \
                 in its name"
            ),
            _ => {}
        }
        let (running, ended) = channel();
        let relays = Relays { ends: Vec::new(), running: Some(running), ended };
        let output = Arc::new(Output {
            setting,
            survive,
            members: Mutex::default(),
            relays: Mutex::new(relays),
            active: Arc::default(),
        });
        for member in members {
            drop(output.open(member)?);
        }
        Ok(output)
    }

    /// Opens the destination for a worker of this member.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn open(self: &Arc<Self>, member: &str) -> Result<Ends, OutputError> {
        let target = match &self.setting {
            WorkerOutput::Null => return Ok(Ends::both(null()?)?),
            // A socket would break when the primary ends, and SIGPIPE would end the worker.
            WorkerOutput::Log if self.survive => return Ok(Ends::both(null()?)?),
            WorkerOutput::Journal => {
                let stream = journald::open(Path::new(journald::SOCKET), member)
                    .map_err(|source| OutputError::NoJournal { source })?;
                return Ok(Ends::both(stream)?);
            }
            WorkerOutput::File(template) if self.survive => {
                let path = file_of(template, member);
                let file = open_to_append(&path).map_err(|source| OutputError::File { path, source })?;
                return Ok(Ends::both(file.into())?);
            }
            WorkerOutput::Log => Target::Log,
            WorkerOutput::File(template) => {
                let path = file_of(template, member);
                let tagged = path == *template;
                Target::File { file: self.file(path)?, tagged }
            }
        };
        let dropped = self.members().dropped.entry(member.to_owned()).or_default().clone();
        let [(stdout, out), (stderr, error)] = [socket_pair()?, socket_pair()?];
        let end = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let end = Arc::new(end.map_err(io::Error::from)?);
        let (member, active) = (member.to_owned(), self.active.clone());
        self.start(Source { member, target, dropped, sockets: [out, error], end: end.clone(), active })?;
        Ok(Ends { stdout, stderr, tap: Some(Tap { end }) })
    }

    /// Starts a relay. It ends when its end is written to.
    fn start(&self, source: Source) -> io::Result<()> {
        let mut relays = self.relays();
        relays.ends.retain(|end| end.strong_count() > 0);
        relays.ends.push(Arc::downgrade(&source.end));
        let running = relays.running.clone();
        std::thread::Builder::new().name("output".into()).stack_size(STACK).spawn(move || {
            drop_all_capabilities();
            Relay::new(source).run();
            drop(running);
        })?;
        Ok(())
    }

    /// The number of lines of a member's workers that were dropped.
    pub fn dropped(&self, member: &str) -> u64 {
        self.members().dropped.get(member).map_or(0, |dropped| dropped.load(Ordering::Relaxed))
    }

    /// Reopens all files, for example after log rotation.
    pub fn reopen(&self) {
        self.members().files.values().for_each(|file| file.reopen());
    }

    /// Relays the remaining output and stops. Waits at most two seconds.
    pub fn end(&self) {
        let deadline = Instant::now() + PATIENCE;
        {
            let mut relays = self.relays();
            for end in relays.ends.iter().filter_map(Weak::upgrade) {
                let _ = end.write(1);
            }
            relays.running = None;
            let _ = relays.ended.recv_timeout(PATIENCE);
        }
        let files: Vec<_> = self.members().files.values().cloned().collect();
        files.iter().for_each(|file| file.flush(deadline));
    }

    fn file(&self, path: PathBuf) -> Result<Arc<Writer>, OutputError> {
        let mut members = self.members();
        if let Some(file) = members.files.get(&path) {
            return Ok(file.clone());
        }
        let sink = Sink::file(&path).map_err(|source| OutputError::File { path: path.clone(), source })?;
        let file = Arc::new(Writer::start(path.display().to_string(), sink, None)?);
        members.files.insert(path, file.clone());
        Ok(file)
    }

    fn relays(&self) -> MutexGuard<'_, Relays> {
        self.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    fn both(fd: OwnedFd) -> io::Result<Self> {
        Ok(Ends { stdout: fd.try_clone()?, stderr: fd, tap: None })
    }
}

/// Opens /dev/null.
///
/// # Errors
/// The errors of open(2).
pub fn null() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null")?.into())
}

/// The path for a member. `xfan-flow` replaces the placeholder in the same way.
fn file_of(template: &Path, member: &str) -> PathBuf {
    template.to_string_lossy().replace(MEMBER, &member.replace('/', "-")).into()
}

/// Creates a pair of sockets: the worker's end, and the relay's end, which it only reads from.
fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (theirs, ours) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    shutdown(ours.as_raw_fd(), Shutdown::Write)?;
    // Before Linux 6.16, only the relay waits while descriptors in unread messages are closed.
    let _ = refuse_descriptors(ours.as_fd());
    Ok((theirs, ours))
}
