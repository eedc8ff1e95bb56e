//! The output of workers: what they write to descriptors 1 and 2 (setting `worker_output`).
//!
//! ```text
//!  worker 0 ══ 2 pipes ══╗              ┌─► the log: escaped, tagged, rate-limited
//!                        ╠══► relay ────┤
//!  worker 1 ══ 2 pipes ══╝   (thread)   └─► files, each with a thread: one per member, or one for all
//! ```
//!
//! Each worker has pipes of its own, so that it cannot disturb the output of another. The relay
//! never waits for a file, reads a bounded amount from each pipe in turn, and uses at most a fifth
//! of a CPU. Lines that do not fit into a queue are dropped and counted.

mod journald;
mod lines;
mod relay;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::config::WorkerOutput;
use crate::host::privileges::drop_all_capabilities;
use crate::log::{Sink, Writer, open_to_append};
use relay::{Command, Relay, Source, Target};

/// How long an ending primary waits for the relay and the files to write their last lines.
const PATIENCE: Duration = Duration::from_secs(2);

/// The placeholder for the member in the name of a file.
const MEMBER: &str = "{member}";

/// Relays the output of all workers.
#[derive(Debug)]
pub struct Output {
    setting: WorkerOutput,
    survive: bool,
    relay: Mutex<Sender<Command>>,
    wake: Arc<EventFd>,
    members: Mutex<Members>,
}

#[derive(Debug, Default)]
struct Members {
    /// The number of dropped lines of each member.
    dropped: HashMap<String, Arc<AtomicU64>>,
    /// The open files, by path.
    files: HashMap<PathBuf, Arc<Writer>>,
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
    pub stdout: Stdio,
    /// Becomes descriptor 2 of the worker.
    pub stderr: Stdio,
    /// Keeps the relay going while the worker runs; `None`: nothing is relayed.
    pub tap: Option<Tap>,
}

/// Relays the output of one worker. Dropping it relays what is left in the worker's pipes, and
/// closes them.
#[derive(Debug)]
pub struct Tap {
    id: u64,
    output: Arc<Output>,
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.output.tell(Command::End(self.id));
    }
}

impl Output {
    /// Starts the relay. Opens the destinations of these members once, so that an unusable one
    /// fails now.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn begin(setting: WorkerOutput, survive: bool, members: &[String]) -> Result<Arc<Self>, OutputError> {
        let (sender, commands) = channel();
        let wake = Arc::new(
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(io::Error::from)?,
        );
        let relay = Relay::new(commands, wake.clone());
        std::thread::Builder::new().name("output".into()).spawn(move || {
            drop_all_capabilities();
            relay.run();
        })?;
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
        let output = Output { setting, survive, relay: Mutex::new(sender), wake, members: Mutex::default() };
        let output = Arc::new(output);
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
            WorkerOutput::Null => return Ok(Ends::of_null()),
            // A pipe would break when the primary ends, and SIGPIPE would end the worker.
            WorkerOutput::Log if self.survive => return Ok(Ends::of_null()),
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
        let [(stdout, out), (stderr, error)] = [pipe()?, pipe()?];
        let id = next_id();
        self.tell(Command::Add(Source {
            id,
            member: member.to_owned(),
            target,
            dropped,
            pipes: [out, error],
        }));
        let tap = Some(Tap { id, output: self.clone() });
        Ok(Ends { stdout: stdout.into(), stderr: stderr.into(), tap })
    }

    /// The number of lines of a member's workers that were dropped.
    pub fn dropped(&self, member: &str) -> u64 {
        self.members().dropped.get(member).map_or(0, |dropped| dropped.load(Ordering::Relaxed))
    }

    /// Reopens all files, for example after log rotation.
    pub fn reopen(&self) {
        self.members().files.values().for_each(|file| file.reopen());
    }

    /// Relays the remaining output and stops. Waits at most for [`PATIENCE`].
    pub fn end(&self) {
        let (done, wait) = channel();
        self.tell(Command::Finish(done));
        let deadline = Instant::now() + PATIENCE;
        let _ = wait.recv_timeout(PATIENCE);
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

    fn tell(&self, command: Command) {
        // The thread ends only after `Finish`, when nothing is left to relay.
        let _ = self.relay.lock().unwrap_or_else(PoisonError::into_inner).send(command);
        let _ = self.wake.write(1);
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    fn of_null() -> Self {
        Ends { stdout: Stdio::null(), stderr: Stdio::null(), tap: None }
    }

    fn both(fd: OwnedFd) -> io::Result<Self> {
        Ok(Ends { stdout: fd.try_clone()?.into(), stderr: fd.into(), tap: None })
    }
}

/// A new id for a tap.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The path for a member. `xfan-flow` replaces the placeholder in the same way.
fn file_of(template: &Path, member: &str) -> PathBuf {
    template.to_string_lossy().replace(MEMBER, &member.replace('/', "-")).into()
}

/// Creates a pipe: the worker's end, and the relay's end, which does not block.
fn pipe() -> io::Result<(OwnedFd, File)> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((writer, reader.into()))
}
