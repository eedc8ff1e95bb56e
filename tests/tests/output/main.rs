//! What the primary and its workers write: failures of an output end no process, a worker cannot
//! forge lines, and the exit code stays right.

mod log;
mod printing;
mod sighup;
mod worker;
mod worker_output;

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use xfan::control::client::ask_for_report;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::netns::Netns;
use xfan_tests::primary::Launch;
use xfan_tests::replay::send_synthetic;

const PACKETS: u64 = 600;

const PAUSE: Duration = Duration::from_millis(5);

fn member(report: &Report, index: usize) -> &Member {
    &report.groups[0].members[index]
}

/// `xfan run` with descriptors that the test chooses. Dropping it kills its process group.
struct Bare<'a> {
    child: Child,
    launch: Launch<'a>,
}

impl<'a> Bare<'a> {
    fn spawn(launch: Launch<'a>, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Self {
        let mut command = launch.command().unwrap();
        command.stdin(stdin).stdout(stdout).stderr(stderr).process_group(0);
        // SAFETY: between fork and exec the closure makes one system call on constants.
        unsafe { command.pre_exec(|| xfan::host::sys::close_on_exec_from(3)) };
        Bare { child: command.spawn().unwrap(), launch }
    }

    /// Spawns it with a file as standard error; returns the file's path as well.
    fn with_log(launch: Launch<'a>) -> (Self, PathBuf) {
        let log = launch.folder().join("log");
        let file = OpenOptions::new().append(true).create(true).open(&log).unwrap();
        (Bare::spawn(launch, Stdio::null(), Stdio::null(), file.into()), log)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Waits until `ready` accepts its report, and returns it.
    fn report_when(&mut self, ready: impl Fn(&Report) -> bool) -> Report {
        loop {
            assert_eq!(self.child.try_wait().unwrap(), None, "it keeps running");
            // The counters are not read at one instant: wait until their sums hold.
            if let Ok(report) = ask_for_report(&self.launch.socket())
                && ready(&report)
                && report.imbalances().is_empty()
            {
                return report;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until packets are let in.
    fn started(&mut self) -> Report {
        let events = self.launch.socket();
        self.report_when(|_| {
            let asked = xfan::control::client::ask(&events, &xfan_shm::protocol::Request::Events(0));
            matches!(asked, Ok(xfan_shm::protocol::Reply::Events(page)) if page.to_string().contains("packets are redirected"))
        })
    }

    fn stop(&mut self) -> Option<i32> {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Bare<'_> {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Prepares a primary with a hostile and an honest worker.
fn hostile<'a>(namespace: &'a Netns, deed: &str, config: &str) -> Launch<'a> {
    let config = format!("stop_timeout = '2s'\nrestart = 'no'\n{config}");
    let launch = Launch::on(namespace).unwrap().config(&config).unwrap();
    launch.with("-n 2").hostile_worker(&format!("output {deed}")).unwrap()
}

/// Checks that packets flow, and that the honest worker gets all of its packets.
fn assert_served(namespace: &Netns, primary: &mut Bare<'_>) {
    send_synthetic(namespace, 6);
    let report = primary.report_when(|report| {
        report.totals().0 == PACKETS && member(report, 1).backlog == 0 && report.imbalances().is_empty()
    });
    assert_balanced(&report, PACKETS);
    let [hostile, honest] = [0, 1].map(|index| member(&report, index));
    assert_eq!(hostile.committed, 0);
    assert_eq!((honest.committed, honest.dropped), (PACKETS - hostile.delivered, 0));
    assert!(honest.committed > 0);
}

/// The members' lines in a log, without their times.
fn relayed(log: &str) -> Vec<String> {
    let rest = log.lines().filter_map(|line| line.split_once(' ').map(|(_, rest)| rest));
    rest.filter(|rest| rest.starts_with("default/")).map(str::to_owned).collect()
}

/// Checks that every line begins with the primary's time, and that none has control characters.
fn assert_nothing_forged(log: &str) {
    for line in log.lines() {
        assert!(line.len() > 28 && line.starts_with("20") && line[..27].ends_with('Z'), "{line:?} in\n{log}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

/// Waits until a file contains `pattern`, and returns its text.
fn text_when(path: &Path, pattern: &str) -> String {
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if text.contains(pattern) {
            return text;
        }
        std::thread::sleep(PAUSE);
    }
}

/// The lines of a log without colours.
fn plain(log: &str) -> Vec<String> {
    let mut text = log.to_owned();
    for code in ["0", "2", "31", "32", "33"] {
        text = text.replace(&format!("\x1b[{code}m"), "");
    }
    text.lines().map(str::to_owned).collect()
}

/// Starts a thread that copies everything readable to a file.
fn copy_to(from: OwnedFd, path: &Path) {
    let (mut from, mut file) = (File::from(from), File::create(path).unwrap());
    std::thread::spawn(move || {
        // The end of a terminal is an error.
        let _ = std::io::copy(&mut from, &mut file);
    });
}

fn honest(namespace: &Netns) -> Launch<'_> {
    Launch::on(namespace).unwrap().with("-n 2 --log debug").worker("xfan-count", "").unwrap()
}

fn full_disk() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}
