//! A dispatcher under test: `xfan run` in a namespace, with its own folder for its socket and its
//! workers' output.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use xfan::control::client::{ask, ask_for_report};
use xfan::control::history::Page;
use xfan::report::Report;
use xfan_shm::protocol::{Reply, Request};

use crate::netns::Netns;
use crate::oracle::Flow;
use crate::process::{Exit, Process, ProcessError, binary};

/// The pause between two reports while waiting.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

/// A running `xfan run`.
#[derive(Debug)]
pub struct Primary {
    /// The process.
    pub process: Process,
    folder: Folder,
}

/// A new folder that workers of any user can write to, removed when dropped. Beside it is the
/// folder of the control socket, which the dispatcher makes and nobody else can write to.
#[derive(Debug)]
pub struct Folder {
    /// The parent of both. It belongs to the user who runs the tests, as do the folders above.
    whole: tempfile::TempDir,
    shared: PathBuf,
}

impl Folder {
    /// Makes the folder.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn new() -> std::io::Result<Self> {
        let whole = tempfile::Builder::new().prefix("xfan-t-").tempdir()?;
        std::fs::set_permissions(whole.path(), std::fs::Permissions::from_mode(0o755))?;
        let shared = whole.path().join("shared");
        std::fs::create_dir(&shared)?;
        std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o777))?;
        Ok(Folder { whole, shared })
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.shared
    }

    /// The path of `name` in the folder.
    pub fn join(&self, name: &str) -> PathBuf {
        self.shared.join(name)
    }

    /// The path of the control socket beside the folder.
    pub fn socket(&self) -> PathBuf {
        self.whole.path().join("run/xfan.sock")
    }
}

/// The arguments of an `xfan run` that has not started yet.
#[derive(Debug)]
pub struct Launch<'a> {
    namespace: &'a Netns,
    folder: Folder,
    arguments: Vec<String>,
    command: Vec<String>,
}

impl<'a> Launch<'a> {
    /// Prepares `xfan run -i rx0` in a namespace.
    ///
    /// # Errors
    /// Its folder cannot be made.
    pub fn on(namespace: &'a Netns) -> std::io::Result<Self> {
        Ok(Self::within(namespace, Folder::new()?))
    }

    /// As [`on`](Self::on), in the folder of a previous primary, and therefore with the same
    /// control socket.
    pub fn within(namespace: &'a Netns, folder: Folder) -> Self {
        Launch { namespace, folder, arguments: vec![], command: vec![] }
    }

    /// The path of its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The path of its control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.socket()
    }

    /// Adds arguments for `xfan run`, separated by blanks.
    #[must_use]
    pub fn with(mut self, arguments: &str) -> Self {
        self.arguments.extend(arguments.split_whitespace().map(str::to_owned));
        self
    }

    /// Gives it a configuration file with this text.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn config(self, toml: &str) -> std::io::Result<Self> {
        let file = self.folder.join("xfan.toml");
        std::fs::write(&file, toml)?;
        Ok(self.with(&format!("-c {}", file.display())))
    }

    /// Sets the worker's command: one of the workspace's programs or a path, and arguments
    /// separated by blanks, in which `FOLDER` stands for the folder.
    ///
    /// # Errors
    /// The program is not built.
    pub fn worker(mut self, program: &str, arguments: &str) -> Result<Self, ProcessError> {
        let program =
            if program.contains('/') { PathBuf::from(program) } else { self.within_reach(program)? };
        let folder = self.folder.path().display().to_string();
        self.command = vec![program.display().to_string()];
        self.command.extend(arguments.split_whitespace().map(|argument| argument.replace("FOLDER", &folder)));
        Ok(self)
    }

    /// Sets `xfan-hostile` as the worker, with `xfan-count` beside it, which all members except the
    /// first become.
    ///
    /// # Errors
    /// One of the two is not built.
    pub fn hostile_worker(self, way: &str) -> Result<Self, ProcessError> {
        self.within_reach("xfan-count")?;
        self.worker("xfan-hostile", way)
    }

    /// Copies one of the workspace's programs to where every user can execute it: the checkout may
    /// be closed to other users.
    ///
    /// # Errors
    /// The program is not built.
    pub fn within_reach(&self, name: &str) -> Result<PathBuf, ProcessError> {
        let (built, copy) = (binary(name)?, self.folder.join(name));
        if !copy.exists() && std::fs::hard_link(&built, &copy).is_err() {
            std::fs::copy(&built, &copy)
                .map_err(|source| ProcessError::Start { name: name.to_owned(), source })?;
        }
        Ok(copy)
    }

    /// Sets `xfan-flow` as the worker, with one file of records per member, for [`flow_records`].
    ///
    /// # Errors
    /// The program is not built.
    pub fn flow_workers(self, count: usize) -> Result<Self, ProcessError> {
        self.with(&format!("-n {count}")).worker("xfan-flow", "--output FOLDER/flows-{member}.json")
    }

    /// The command, which may be changed before it runs.
    ///
    /// # Errors
    /// `xfan` is not built.
    pub fn command(&self) -> Result<Command, ProcessError> {
        let mut command = self.namespace.command(binary("xfan")?);
        command.args(["run", "-i", "rx0", "--socket"]).arg(self.socket()).args(&self.arguments);
        if !self.command.is_empty() {
            command.arg("--").args(&self.command);
        }
        // The user who runs the tests through sudo must not make a difference.
        command.env_remove("SUDO_UID");
        Ok(command)
    }

    /// Starts it without waiting.
    ///
    /// # Errors
    /// `xfan` is not built or does not start.
    pub fn spawn(self) -> Result<Primary, ProcessError> {
        self.spawn_with(|_| {})
    }

    /// As [`spawn`](Self::spawn), after a change of its command.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn spawn_with(self, change: impl FnOnce(&mut Command)) -> Result<Primary, ProcessError> {
        let mut command = self.command()?;
        change(&mut command);
        Ok(Primary { process: Process::spawn(command)?, folder: self.folder })
    }

    /// As [`start`](Self::start), after a change of its command.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(self, change: impl FnOnce(&mut Command)) -> Result<Primary, ProcessError> {
        let primary = self.spawn_with(change)?;
        primary.process.wait_for_line(" running ")?;
        Ok(primary)
    }

    /// Starts it and waits for its end; for a primary that should refuse to run.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn run(self) -> Result<Exit, ProcessError> {
        Ok(Process::spawn(self.command()?)?.wait())
    }

    /// Starts it and waits until it answers, whether or not packets are let in; for a primary that
    /// logs too little for [`start`](Self::start).
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn start_until_it_answers(self) -> Result<Primary, ProcessError> {
        let primary = self.spawn()?;
        while ask_for_report(&primary.socket()).is_err() {
            std::thread::sleep(PAUSE);
        }
        Ok(primary)
    }

    /// Starts it and waits until packets are let in.
    ///
    /// # Errors
    /// It ends before; the error contains its output.
    pub fn start(self) -> Result<Primary, ProcessError> {
        self.start_with(|_| {})
    }
}

impl Primary {
    /// The path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.socket()
    }

    /// The folder of its workers' output.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Connects to its control socket.
    ///
    /// # Panics
    /// The primary does not listen.
    pub fn dial(&self) -> OwnedFd {
        let control = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(control.as_raw_fd(), &UnixAddr::new(&self.socket()).unwrap()).unwrap();
        control
    }

    /// Lets the hostile worker, the first member, begin.
    ///
    /// # Panics
    /// There is no such worker.
    pub fn unleash(&self) {
        let pid = self.report().groups[0].members[0].pid;
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGUSR1).unwrap();
    }

    /// Waits until a worker prints a line that contains `part`, and returns the line.
    ///
    /// # Panics
    /// The primary ends before.
    pub fn printed(&self, part: &str) -> String {
        let line = self.process.wait_for_line(part).expect("a worker prints the line");
        line.split_once(" stdout: ").expect("the log names the worker").1.to_owned()
    }

    /// Its report.
    ///
    /// # Panics
    /// The primary does not answer.
    pub fn report(&self) -> Report {
        ask_for_report(&self.socket()).expect("the primary answers")
    }

    /// Its event history from the first event.
    ///
    /// # Panics
    /// The primary does not answer.
    pub fn history(&self) -> Page {
        let Ok(Reply::Events(page)) = ask(&self.socket(), &Request::Events(0)) else {
            panic!("the primary returns no event history")
        };
        serde_json::from_value(page).expect("an event history")
    }

    /// Waits until `ready` accepts its report, without limit (the test has a watchdog), and returns
    /// it.
    ///
    /// # Panics
    /// The primary does not answer.
    pub fn report_when(&self, ready: impl Fn(&Report) -> bool) -> Report {
        loop {
            let report = self.report();
            if ready(&report) {
                return report;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// As [`report_when`](Self::report_when), but also waits until the sums hold: the counters are
    /// not read at one instant.
    ///
    /// # Panics
    /// The primary does not answer.
    pub fn balanced_report_when(&self, ready: impl Fn(&Report) -> bool) -> Report {
        self.report_when(|report| ready(report) && report.imbalances().is_empty())
    }

    /// Waits until `packets` have been redirected and are accounted for, that is received or
    /// dropped by the kernel, and, with `committed`, committed by their workers. Returns the
    /// report.
    ///
    /// # Panics
    /// The primary does not answer.
    pub fn report_after(&self, packets: u64, committed: bool) -> Report {
        self.report_when(|report| {
            let redirected: u64 = report.lanes().map(|lane| lane.xdp.redirect).sum();
            let lost: u64 =
                report.lanes().map(|lane| lane.kernel.rx_dropped + lane.kernel.rx_ring_full).sum();
            let backlog: u64 =
                report.groups.iter().flat_map(|group| &group.members).map(|member| member.backlog).sum();
            redirected == packets
                && report.totals().0 + lost == packets
                && (!committed || backlog == 0)
                && report.imbalances().is_empty()
        })
    }

    /// Asks it to end and waits for its end. The folder stays for [`flow_records`].
    pub fn stop(self) -> (Exit, Folder) {
        self.end(Signal::SIGTERM)
    }

    /// Kills it without its workers.
    pub fn kill(self) -> Folder {
        self.process.kill();
        self.folder
    }

    /// Ends it with a signal and waits for its end.
    pub fn end(self, signal: Signal) -> (Exit, Folder) {
        (self.process.end(signal), self.folder)
    }
}

/// A record of `xfan-flow`.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[allow(missing_docs)] // `xfan-flow` documents them
pub struct FlowRecord {
    pub community_id: String,
    pub proto: String,
    pub src: std::net::IpAddr,
    pub sport: u16,
    pub dst: std::net::IpAddr,
    pub dport: u16,
    pub packets: u64,
    pub bytes: u64,
    pub first: f64,
    pub last: f64,
    pub member: String,
}

impl FlowRecord {
    /// Its flow in the oracle's form.
    ///
    /// # Panics
    /// The protocol is neither a known name nor a number.
    pub fn flow(&self) -> Flow {
        let protocol = match self.proto.as_str() {
            "icmp" => 1,
            "tcp" => 6,
            "udp" => 17,
            "icmp6" => 58,
            "sctp" => 132,
            number => number.parse().expect("a protocol's name or number"),
        };
        Flow::between(protocol, (self.src, self.sport), (self.dst, self.dport))
    }
}

/// All records that the [`Launch::flow_workers`] of a primary wrote to its folder.
///
/// # Panics
/// A file cannot be read, or contains something other than records.
pub fn flow_records(folder: &Folder) -> Vec<FlowRecord> {
    let files = std::fs::read_dir(folder.path()).expect("the folder can be listed");
    let is_flows =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("flows-"));
    files
        .map(|entry| entry.expect("the folder can be listed").path())
        .filter(is_flows)
        .flat_map(|path| {
            let text = std::fs::read_to_string(&path).expect("the file can be read");
            text.lines()
                .map(|line| serde_json::from_str(line).expect("a flow record"))
                .collect::<Vec<FlowRecord>>()
        })
        .collect()
}
