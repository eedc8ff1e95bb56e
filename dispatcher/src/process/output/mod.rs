//! What workers write to their descriptors 1 and 2 (setting `worker_output`).
//!
//! ```text
//!  worker 0 ══ 2 pipes ══╗              ┌─► the log: escaped, tagged, so many lines a second
//!                        ╠══► relay ────┤
//!  worker 1 ══ 2 pipes ══╝   (thread)   └─► files, each with a thread: one for each member, or for all
//! ```
//!
//! Each worker's pipes are its own: whatever it does to them, it does to itself. The relay never
//! waits for a file, reads a bounded amount of each pipe in turn, and takes a fifth of a CPU at
//! most. Lines that find no room behind it are counted.

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

/// How long the relay may take for the last lines, and the files for theirs.
const PATIENCE: Duration = Duration::from_secs(2);

/// Stands for the member in the name of a file.
const MEMBER: &str = "{member}";

/// Where workers' output goes, and the thread that carries it there.
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
    /// Lines of each member that were dropped.
    dropped: HashMap<String, Arc<AtomicU64>>,
    /// The files, by name.
    files: HashMap<PathBuf, Arc<Writer>>,
}

/// Workers' output cannot go where it is to go.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A file cannot be opened.
    #[error("cannot open the workers' output file {}: {source}; make its folder, or change worker_output", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is no journal.
    #[error(
        "worker_output = \"journal\", but systemd's journal does not listen on {}: {source}; set worker_output to \"log\", \
         \"null\" or a file",
        journald::SOCKET
    )]
    NoJournal {
        /// What the system says.
        source: io::Error,
    },
    /// Workers that survive would share a file.
    #[error(
        "workers that survive (survive = true) write to their files by themselves, so that each needs its own: put {MEMBER} \
         into worker_output ({})", path.display()
    )]
    Shared {
        /// The setting.
        path: PathBuf,
    },
    /// No descriptors or threads are left.
    #[error("cannot relay workers' output: {0}")]
    Io(#[from] io::Error),
}

/// Both ends of what a worker writes to.
pub struct Ends {
    /// What becomes its descriptor 1 …
    pub stdout: Stdio,
    /// … and 2.
    pub stderr: Stdio,
    /// To be kept for as long as the worker runs; none: nothing is relayed.
    pub tap: Option<Tap>,
}

/// A worker's output is relayed. When this is dropped, what the worker has left in its pipes is,
/// and they are closed.
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
    /// Starts to relay. What the members of these names need is opened, to see that it can be.
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
                "workers that survive this primary cannot write to its log: their output goes to /dev/null; worker_output \
                 may be \"journal\", or a file with {MEMBER} in its name"
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

    /// Opens what a worker of this member writes to.
    ///
    /// # Errors
    /// [`OutputError`]
    pub fn open(self: &Arc<Self>, member: &str) -> Result<Ends, OutputError> {
        let target = match &self.setting {
            WorkerOutput::Null => return Ok(Ends::of_null()),
            // A pipe would break with the primary, and take the worker along.
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

    /// Lines of a member's workers that were not relayed.
    pub fn dropped(&self, member: &str) -> u64 {
        self.members().dropped.get(member).map_or(0, |dropped| dropped.load(Ordering::Relaxed))
    }

    /// Opens all files anew.
    pub fn reopen(&self) {
        self.members().files.values().for_each(|file| file.reopen());
    }

    /// Relays what is left, but not for long.
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
        // If the thread is gone, so is all that it relayed.
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

/// Numbers taps.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The file of a member, as `xfan-flow` names its own.
fn file_of(template: &Path, member: &str) -> PathBuf {
    template.to_string_lossy().replace(MEMBER, &member.replace('/', "-")).into()
}

/// A pipe whose end to read from does not block: the worker's end, and ours.
fn pipe() -> io::Result<(OwnedFd, File)> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((writer, reader.into()))
}
