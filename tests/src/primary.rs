//! A dispatcher under test: `xfan run` in a namespace, with a folder of its own for its socket and its workers' output.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use xfan::control::client::ask_for_report;
use xfan::report::Report;

use crate::netns::Netns;
use crate::oracle::Flow;
use crate::process::{Exit, Process, ProcessError, binary};

/// Between two looks at a report, while waiting.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

/// A running `xfan run`.
#[derive(Debug)]
pub struct Primary {
    /// The process.
    pub process: Process,
    folder: Folder,
}

/// A new folder that workers of any user may write to, removed when dropped; beside it one for the
/// control socket, which none may write to, and which the dispatcher has to make.
#[derive(Debug)]
pub struct Folder {
    /// Belongs to who runs the tests, as do the folders above.
    whole: tempfile::TempDir,
    shared: PathBuf,
}

impl Folder {
    /// Makes it.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn new() -> std::io::Result<Self> {
        let whole = tempfile::Builder::new().prefix("xfan-t-").tempdir()?;
        std::fs::set_permissions(whole.path(), std::fs::Permissions::from_mode(0o755))?;
        let shared = whole.path().join("shared");
        std::fs::create_dir(&shared)?;
        std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o777))?;
        Ok(Folder { whole, shared })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.shared
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.shared.join(name)
    }

    /// The control socket beside it.
    pub fn socket(&self) -> PathBuf {
        self.whole.path().join("run/xfan.sock")
    }
}

/// The arguments of an `xfan run` to come.
#[derive(Debug)]
pub struct Launch<'a> {
    namespace: &'a Netns,
    folder: Folder,
    arguments: Vec<String>,
    command: Vec<String>,
}

impl<'a> Launch<'a> {
    /// `xfan run -i rx0` in a namespace.
    ///
    /// # Errors
    /// There is no place for its folder.
    pub fn on(namespace: &'a Netns) -> std::io::Result<Self> {
        Ok(Self::within(namespace, Folder::new()?))
    }

    /// As [`on`](Self::on), in the folder of an earlier one, and so with the same control socket.
    pub fn within(namespace: &'a Netns, folder: Folder) -> Self {
        Launch { namespace, folder, arguments: vec![], command: vec![] }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its control socket.
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
    /// It cannot be written.
    pub fn config(self, toml: &str) -> std::io::Result<Self> {
        let file = self.folder.join("xfan.toml");
        std::fs::write(&file, toml)?;
        Ok(self.with(&format!("-c {}", file.display())))
    }

    /// Sets the worker: one of the workspace's programs or a path, and arguments separated by blanks, in which `FOLDER`
    /// stands for the folder.
    ///
    /// # Errors
    /// It is not built.
    pub fn worker(mut self, program: &str, arguments: &str) -> Result<Self, ProcessError> {
        let program =
            if program.contains('/') { PathBuf::from(program) } else { self.within_reach(program)? };
        let folder = self.folder.path().display().to_string();
        self.command = vec![program.display().to_string()];
        self.command.extend(arguments.split_whitespace().map(|argument| argument.replace("FOLDER", &folder)));
        Ok(self)
    }

    /// Sets `xfan-hostile` as the worker, and puts `xfan-count` beside it, which all members but the first become.
    ///
    /// # Errors
    /// Either is not built.
    pub fn hostile_worker(self, way: &str) -> Result<Self, ProcessError> {
        self.within_reach("xfan-count")?;
        self.worker("xfan-hostile", way)
    }

    /// One of the workspace's programs, where workers' user can execute it: the checkout may be closed to others.
    ///
    /// # Errors
    /// It is not built.
    pub fn within_reach(&self, name: &str) -> Result<PathBuf, ProcessError> {
        let (built, copy) = (binary(name)?, self.folder.join(name));
        if !copy.exists() && std::fs::hard_link(&built, &copy).is_err() {
            std::fs::copy(&built, &copy)
                .map_err(|source| ProcessError::Start { name: name.to_owned(), source })?;
        }
        Ok(copy)
    }

    /// `xfan-flow`, one file of records per member, for [`flow_records`].
    ///
    /// # Errors
    /// It is not built.
    pub fn flow_workers(self, count: usize) -> Result<Self, ProcessError> {
        self.with(&format!("-n {count}")).worker("xfan-flow", "--output FOLDER/flows-{member}.json")
    }

    /// The command, to be changed before it is run.
    ///
    /// # Errors
    /// `xfan` is not built.
    pub fn command(&self) -> Result<Command, ProcessError> {
        let mut command = self.namespace.command(binary("xfan")?);
        command.args(["run", "-i", "rx0", "--socket"]).arg(self.socket()).args(&self.arguments);
        if !self.command.is_empty() {
            command.arg("--").args(&self.command);
        }
        // Who runs the tests by sudo is not to matter.
        command.env_remove("SUDO_UID");
        Ok(command)
    }

    /// Starts it, without waiting for anything.
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

    /// Starts it and waits for its end: for what is to be refused.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn run(self) -> Result<Exit, ProcessError> {
        Ok(Process::spawn(self.command()?)?.wait())
    }

    /// Starts it and waits until it answers, whether or not packets are let in: for one that logs too little for
    /// [`start`](Self::start).
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
    /// It ends before; then the error holds what it wrote.
    pub fn start(self) -> Result<Primary, ProcessError> {
        self.start_with(|_| {})
    }
}

impl Primary {
    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.socket()
    }

    /// The folder of its workers' output.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A connection to its control socket.
    ///
    /// # Panics
    /// It does not listen.
    pub fn dial(&self) -> OwnedFd {
        let control = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(control.as_raw_fd(), &UnixAddr::new(&self.socket()).unwrap()).unwrap();
        control
    }

    /// Has the hostile worker, its first member, begin.
    ///
    /// # Panics
    /// It has none.
    pub fn unleash(&self) {
        let pid = self.report().groups[0].members[0].pid;
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGUSR1).unwrap();
    }

    /// A line that a worker prints, once it has printed one with this in it.
    ///
    /// # Panics
    /// The primary ends before.
    pub fn printed(&self, part: &str) -> String {
        let line = self.process.wait_for_line(part).expect("a worker prints it");
        line.split_once(" stdout: ").expect("the log says who printed it").1.to_owned()
    }

    /// Its report.
    ///
    /// # Panics
    /// It does not answer.
    pub fn report(&self) -> Report {
        ask_for_report(&self.socket()).expect("the primary answers")
    }

    /// Its report, once `ready` says so. Waits without limit, as the test's watchdog sets it.
    ///
    /// # Panics
    /// It does not answer.
    pub fn report_when(&self, ready: impl Fn(&Report) -> bool) -> Report {
        loop {
            let report = self.report();
            if ready(&report) {
                return report;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// As [`report_when`](Self::report_when), once its sums hold, too: its counters are not read at one instant.
    ///
    /// # Panics
    /// It does not answer.
    pub fn balanced_report_when(&self, ready: impl Fn(&Report) -> bool) -> Report {
        self.report_when(|report| ready(report) && report.imbalances().is_empty())
    }

    /// Its report, once `packets` have been redirected and are accounted for: received or dropped by the kernel, and
    /// committed by whom they were delivered to, if `committed`.
    ///
    /// # Panics
    /// It does not answer.
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

    /// Asks it to end, and waits for it. Its folder stays for [`flow_records`].
    pub fn stop(self) -> (Exit, Folder) {
        self.end(Signal::SIGTERM)
    }

    /// Kills it and leaves its workers alone.
    pub fn kill(self) -> Folder {
        self.process.kill();
        self.folder
    }

    /// Ends it by a signal, and waits for it.
    pub fn end(self, signal: Signal) -> (Exit, Folder) {
        (self.process.end(signal), self.folder)
    }
}

/// A record of `xfan-flow`.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[allow(missing_docs)] // as `xfan-flow` documents them
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
    /// Its flow, as the oracle names it.
    ///
    /// # Panics
    /// Its protocol is neither a known name nor a number.
    pub fn flow(&self) -> Flow {
        let protocol = match self.proto.as_str() {
            "icmp" => 1,
            "tcp" => 6,
            "udp" => 17,
            "icmp6" => 58,
            "sctp" => 132,
            number => number.parse().expect("the name or the number of a protocol"),
        };
        Flow::between(protocol, (self.src, self.sport), (self.dst, self.dport))
    }
}

/// What all [`Launch::flow_workers`] of a primary wrote to its folder.
///
/// # Panics
/// A file cannot be read, or holds something else than records.
pub fn flow_records(folder: &Folder) -> Vec<FlowRecord> {
    let files = std::fs::read_dir(folder.path()).expect("the folder is there");
    let is_flows =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("flows-"));
    files
        .map(|entry| entry.expect("it can be listed").path())
        .filter(is_flows)
        .flat_map(|path| {
            let text = std::fs::read_to_string(&path).expect("it can be read");
            text.lines()
                .map(|line| serde_json::from_str(line).expect("a flow record"))
                .collect::<Vec<FlowRecord>>()
        })
        .collect()
}
