//! What the primary and its workers write: it ends nobody, forges nothing, and the exit code stays
//! right.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::termios::{FlowArg, SetArg, cfmakeraw, tcflow, tcgetattr, tcsetattr};
use nix::unistd::Pid;
use xfan::control::client::ask_for_report;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::Launch;
use xfan_tests::process::{Process, binary};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::{Veth, VethConfig};

const PACKETS: u64 = 600;
const PAUSE: Duration = Duration::from_millis(5);

fn network() -> Netns {
    Veth::in_namespace(&VethConfig::queues(2)).unwrap().0
}

fn member(report: &Report, place: usize) -> &Member {
    &report.groups[0].members[place]
}

fn pid_of(member: &Member) -> Pid {
    Pid::from_raw(i32::try_from(member.pid).unwrap())
}

/// `xfan run` whose descriptors are the test's choice. Dropping it kills it and what it started.
struct Bare<'a> {
    child: Child,
    launch: Launch<'a>,
}

impl<'a> Bare<'a> {
    fn spawn(launch: Launch<'a>, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Self {
        let mut command = launch.command().unwrap();
        command.stdin(stdin).stdout(stdout).stderr(stderr).process_group(0);
        // SAFETY: between fork and exec it makes system calls on constants.
        unsafe { command.pre_exec(|| xfan::host::sys::close_on_exec_from(3)) };
        Bare { child: command.spawn().unwrap(), launch }
    }

    /// Its standard error is a file, whose name is returned, too.
    fn with_log(launch: Launch<'a>) -> (Self, PathBuf) {
        let log = launch.folder().join("log");
        let file = OpenOptions::new().append(true).create(true).open(&log).unwrap();
        (Bare::spawn(launch, Stdio::null(), Stdio::null(), file.into()), log)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Its report, once `ready` says so.
    fn report_when(&mut self, ready: impl Fn(&Report) -> bool) -> Report {
        loop {
            assert_eq!(self.child.try_wait().unwrap(), None, "it goes on");
            if let Ok(report) = ask_for_report(&self.launch.socket())
                && ready(&report)
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
            matches!(asked, Ok(xfan_shm::protocol::Reply::Events(page)) if page.to_string().contains("packets come"))
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

/// A hostile worker and an honest one.
fn hostile<'a>(namespace: &'a Netns, deed: &str, config: &str) -> Launch<'a> {
    let config = format!("stop_timeout = '2s'\nrestart = 'no'\n{config}");
    let launch = Launch::on(namespace).unwrap().config(&config).unwrap();
    launch.with("-n 2").hostile_worker(&format!("output {deed}")).unwrap()
}

/// Packets flow, and the honest worker gets all of its own.
fn assert_served(namespace: &Netns, primary: &mut Bare<'_>) {
    send_synthetic(namespace, 6);
    let report = primary.report_when(|report| {
        report.totals().0 == PACKETS && member(report, 1).backlog == 0 && report.imbalances().is_empty()
    });
    assert_balanced(&report, PACKETS);
    let [hostile, honest] = [0, 1].map(|place| member(&report, place));
    assert_eq!(hostile.committed, 0);
    assert_eq!((honest.committed, honest.dropped), (PACKETS - hostile.delivered, 0));
    assert!(honest.committed > 0);
}

/// Lines of a log that are the members', without their times.
fn relayed(log: &str) -> Vec<String> {
    let rest = log.lines().filter_map(|line| line.split_once(' ').map(|(_, rest)| rest));
    rest.filter(|rest| rest.starts_with("default/")).map(str::to_owned).collect()
}

/// Every line begins with the primary's time.
fn assert_nothing_forged(log: &str) {
    for line in log.lines() {
        assert!(line.len() > 28 && line.starts_with("20") && line[..27].ends_with('Z'), "{line:?} in\n{log}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

/// A file, once it has a line with `pattern`.
fn text_when(path: &Path, pattern: &str) -> String {
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if text.contains(pattern) {
            return text;
        }
        std::thread::sleep(PAUSE);
    }
}

/// The misdeeds are done on descriptors that have nothing to do with the primary's.
#[test]
fn a_worker_that_misuses_its_descriptors_misuses_only_its_own() {
    let _watchdog = e2e_or_skip!(240);
    for (deed, outcomes) in [
        ("shut", "ENOTSOCK ENOTSOCK ENOTSOCK"),
        ("truncate", "EINVAL EINVAL EINVAL"),
        ("read", "ENODATA EBADF EBADF"),
        ("stop", "ENOTTY ENOTTY ENOTTY"),
        ("close", ""),
    ] {
        let namespace = network();
        // All that the primary has is one terminal, file or socket, which takes everything.
        let launch = hostile(&namespace, deed, "");
        let log = launch.folder().join("log");
        let (kept, given): (Option<OwnedFd>, OwnedFd) = match deed {
            "shut" => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                copy_to(ours.into(), &log);
                (None, theirs.into())
            }
            "read" | "stop" => {
                let terminal = openpty(None, None).unwrap();
                let mut raw = tcgetattr(&terminal.slave).unwrap();
                cfmakeraw(&mut raw);
                tcsetattr(&terminal.slave, SetArg::TCSANOW, &raw).unwrap();
                // There is something to read.
                nix::unistd::write(&terminal.master, b"secret").unwrap();
                copy_to(terminal.master, &log);
                (Some(terminal.slave.try_clone().unwrap()), terminal.slave)
            }
            _ => {
                let file = OpenOptions::new().read(true).append(true).create(true).open(&log).unwrap();
                (None, file.into())
            }
        };
        let stdio = || Stdio::from(given.try_clone().unwrap());
        let mut primary = Bare::spawn(launch, stdio(), stdio(), stdio());
        let report = primary.started();
        kill(pid_of(member(&report, 0)), Signal::SIGUSR1).unwrap();
        let done = text_when(&log, "deed done");
        let said = plain(&done).into_iter().find(|line| line.contains("deed done")).unwrap();
        assert!(said.trim_end().ends_with(outcomes), "{deed}: {said}");
        assert_served(&namespace, &mut primary);
        assert_eq!(primary.stop(), Some(0), "{deed}");
        // From its first line to its last.
        let text = plain(&text_when(&log, "frames   total")).join("\n");
        assert!(
            text.contains(" INFO running ") && text.contains("default/1 stdout: {\"bytes\":"),
            "{deed}: {text}"
        );
        drop(kept);
    }
}

/// A log's lines without colours.
fn plain(log: &str) -> Vec<String> {
    let mut text = log.to_owned();
    for code in ["0", "2", "31", "32", "33"] {
        text = text.replace(&format!("\x1b[{code}m"), "");
    }
    text.lines().map(str::to_owned).collect()
}

/// Has a thread write all that can be read into a file.
fn copy_to(from: OwnedFd, path: &Path) {
    let (mut from, mut file) = (File::from(from), File::create(path).unwrap());
    std::thread::spawn(move || {
        // A terminal ends with an error.
        let _ = std::io::copy(&mut from, &mut file);
    });
}

#[test]
fn a_worker_that_fills_its_pipe_blocks_nobody() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = hostile(&namespace, "fill", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    kill(pid_of(member(&report, 0)), Signal::SIGUSR1).unwrap();
    let done = relayed(&text_when(&log, "deed done"));
    assert!(done.last().unwrap().ends_with("stderr: deed done: done done done"), "{done:?}");
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    // Both lines without end were cut.
    let text = fs::read_to_string(&log).unwrap();
    assert_nothing_forged(&text);
    let cut = format!(": {} … (cut)", "x".repeat(4096));
    let lines = relayed(&text);
    let long: Vec<_> = lines.iter().filter(|line| line.contains("xxx")).collect();
    assert_eq!(long.len(), 2, "{text}");
    assert!(long.iter().all(|line| line.ends_with(&cut)), "{long:?}");
}

#[test]
fn a_worker_that_forges_lines_is_quoted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = hostile(&namespace, "forge", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    kill(pid_of(member(&report, 0)), Signal::SIGUSR1).unwrap();
    text_when(&log, "deed done");
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    let text = fs::read_to_string(&log).unwrap();
    assert_nothing_forged(&text);
    let lines = relayed(&text);
    let of_hostile: Vec<_> = lines.iter().filter(|line| line.starts_with("default/0 ")).collect();
    assert_eq!(
        of_hostile,
        [
            r"default/0 stdout: \x1b[1A\x1b[2K\r2026-01-01T00:00:00.000000Z ERROR forged\u{9b} \u{202e}\xff\x00",
            "default/0 stdout: 2026-01-01T00:00:00.000000Z  WARN forged, too",
            "default/0 stderr: deed done",
            "default/0 stdout: no end",
        ]
    );
}

#[test]
fn a_worker_that_floods_is_counted_and_the_log_stays_readable() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = hostile(&namespace, "flood", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    kill(pid_of(member(&report, 0)), Signal::SIGUSR1).unwrap();
    primary.report_when(|report| member(report, 0).output_dropped > 10_000);
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    let text = fs::read_to_string(&log).unwrap();
    assert_nothing_forged(&text);
    // Each line is there, or counted.
    let lines = relayed(&text);
    let numbers: Vec<u64> =
        lines.iter().filter_map(|line| line.strip_prefix("default/0 stdout: flood ")?.parse().ok()).collect();
    let told: u64 = text
        .lines()
        .filter(|line| {
            line.contains("lines of the worker's output were dropped") && line.contains("default/0")
        })
        .map(|line| line.split_once("dropped=").unwrap().1.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert!(numbers.len() >= 1000 && told > 10_000, "{} {told}", numbers.len());
    assert!(numbers.is_sorted() && *numbers.last().unwrap() < numbers.len() as u64 + told);
    // What the honest one says in the end is there, too.
    assert!(lines.iter().any(|line| line.starts_with("default/1 stdout: {\"bytes\":")), "{text}");
}

#[test]
fn the_last_words_are_relayed_and_a_child_that_keeps_the_pipe_keeps_nothing_waiting() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = hostile(&namespace, "leave", "");
    let primary = launch.start().unwrap();
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", primary.process.pid())).unwrap().count();
    let before = descriptors();
    let report = primary.report();
    kill(pid_of(member(&report, 0)), Signal::SIGUSR1).unwrap();
    primary.process.wait_for_line("default/0 stdout: last words").unwrap();
    primary
        .report_when(|report| member(report, 0).state == "stopped" || member(report, 0).state == "crashed");
    // Its pipes are closed, and the child, which writes on, ends by that.
    while descriptors() >= before {
        std::thread::sleep(PAUSE);
    }
    send_synthetic(&namespace, 6);
    let report = primary.report_after(PACKETS, true);
    assert_eq!(member(&report, 1).committed, PACKETS);
    let (exit, folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let program = folder.join("xfan-hostile");
    let runs = || procs_of(&program);
    while runs() > 0 {
        std::thread::sleep(PAUSE);
    }
}

fn procs_of(program: &Path) -> usize {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    processes.filter(|entry| fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program)).count()
}

/// A pipe that is full, and that nobody reads.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&writer, &[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer)
}

fn honest(namespace: &Netns) -> Launch<'_> {
    Launch::on(namespace).unwrap().with("-n 2 --log debug").worker("xfan-count", "").unwrap()
}

/// Whatever is behind its descriptors.
fn assert_goes_on_without(stdout: impl Into<Stdio>, stderr: impl Into<Stdio>, code: i32) {
    let namespace = network();
    let mut primary = Bare::spawn(honest(&namespace), Stdio::null(), stdout.into(), stderr.into());
    primary.started();
    send_synthetic(&namespace, 6);
    let all = |report: &Report| {
        report.totals() == (PACKETS, PACKETS, 0)
            && member(report, 0).committed + member(report, 1).committed == PACKETS
    };
    let report = primary.report_when(all);
    assert_balanced(&report, PACKETS);
    assert_eq!(primary.stop(), Some(code));
}

fn full_disk() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn a_full_disk_behind_the_log_ends_nothing() {
    let _watchdog = e2e_or_skip!();
    assert_goes_on_without(Stdio::null(), full_disk(), 0);
}

#[test]
fn a_closed_pipe_behind_the_log_ends_nothing() {
    let _watchdog = e2e_or_skip!();
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    drop(reader);
    // Nor does one that the totals go to: whoever closed it did not want them.
    assert_goes_on_without(writer.try_clone().unwrap(), writer, 0);
}

#[test]
fn a_full_pipe_behind_log_and_totals_ends_or_stops_nothing() {
    let _watchdog = e2e_or_skip!();
    let (_reader, writer) = full_pipe();
    assert_goes_on_without(writer.try_clone().unwrap(), writer, 1);
}

#[test]
fn a_primary_without_descriptors_runs() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = honest(&namespace);
    let inner = launch.command().unwrap();
    let mut shell = namespace.command("sh");
    shell.args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"]).arg(inner.get_program()).args(inner.get_args());
    let child = shell.process_group(0).spawn().unwrap();
    let mut primary = Bare { child, launch };
    primary.started();
    send_synthetic(&namespace, 6);
    let report = primary.report_when(|report| report.totals() == (PACKETS, PACKETS, 0));
    assert_eq!(report.log_lines_lost, 0);
    assert_eq!(primary.stop(), Some(0));
}

#[test]
fn a_stopped_terminal_stops_nobody_and_the_lines_come_when_it_goes_on() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let terminal = openpty(None, None).unwrap();
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    let given = terminal.slave.try_clone().unwrap();
    let kept = xfan_tests::primary::Folder::new().unwrap();
    let log = kept.join("log");
    let mut primary = Bare::spawn(honest(&namespace), Stdio::null(), Stdio::null(), given.into());
    primary.started();
    send_synthetic(&namespace, 6);
    let report = primary.report_when(|report| report.totals() == (PACKETS, PACKETS, 0));
    assert_balanced(&report, PACKETS);
    copy_to(terminal.master.try_clone().unwrap(), &log);
    tcflow(&terminal.slave, FlowArg::TCOON).unwrap();
    let text = plain(&text_when(&log, " running")).join("\n");
    assert!(text.contains(" INFO running interface="), "{text}");
    // It ends also if it is stopped again.
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    assert_eq!(primary.stop(), Some(0));
    fs::remove_file(log).unwrap();
}

#[test]
fn a_terminal_for_foreground_jobs_only_does_not_stop_the_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = honest(&namespace);
    let log = launch.folder().join("typescript");
    let inner = launch.command().unwrap();
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().unwrap());
    let words: Vec<_> = std::iter::once(inner.get_program()).chain(inner.get_args()).map(quoted).collect();
    // In a session of its own, with a terminal of its own, in the background.
    let script = format!("stty tostop; set -m; {} & wait", words.join(" "));
    let mut session = namespace.command("script");
    session.args(["-qfc", &script]).arg(&log).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let mut primary = Bare { child: session.spawn().unwrap(), launch };
    let report = primary.started();
    send_synthetic(&namespace, 6);
    primary.report_when(|report| report.totals() == (PACKETS, PACKETS, 0));
    kill(Pid::from_raw(i32::try_from(report.pid).unwrap()), Signal::SIGTERM).unwrap();
    let text = text_when(&log, "frames   total");
    assert!(plain(&text).join("\n").contains(" INFO running "), "{text}");
    primary.child.wait().unwrap();
}

#[test]
fn the_outcome_decides_the_exit_code_whatever_becomes_of_the_totals() {
    let _watchdog = e2e_or_skip!();
    // No worker is left: 6.
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap();
    let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
    for (stdout, stderr) in
        [(Stdio::from(full_disk()), Stdio::null()), (full_disk().into(), full_disk().into())]
    {
        let again = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap();
        let again = again.with("-n 1").worker("xfan-count", "").unwrap();
        let mut primary = Bare::spawn(again, Stdio::null(), stdout, stderr);
        let report = primary.started();
        kill(pid_of(member(&report, 0)), Signal::SIGKILL).unwrap();
        assert_eq!(primary.child.wait().unwrap().code(), Some(6));
    }
    // All went well, but the totals are nowhere: 1.
    let log = launch.folder().join("log");
    let mut primary =
        Bare::spawn(launch, Stdio::null(), full_disk().into(), File::create(&log).unwrap().into());
    primary.started();
    assert_eq!(primary.stop(), Some(1));
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("ERROR the totals cannot be printed: No space left on device"), "{text}");
    assert!(text.ends_with("xfan: cannot print: No space left on device (os error 28)\n"), "{text}");
}

#[test]
fn tools_that_cannot_print_say_so() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let primary = honest(&namespace).start().unwrap();
    let socket = primary.socket();
    let run = |arguments: &str, stdout: Stdio| {
        let mut command = Command::new(binary("xfan").unwrap());
        command.args(arguments.split_whitespace()).stdout(stdout).stderr(Stdio::piped());
        if !arguments.starts_with('-') && !arguments.starts_with("check") {
            command.arg("--socket").arg(&socket);
        }
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for arguments in
        ["stats", "stats --json", "events", "events --json", "workers list", "check -i rx0", "--help"]
    {
        let (code, said) = run(arguments, full_disk().into());
        assert_eq!(code, Some(1), "{arguments}: {said}");
        if arguments != "--help" {
            assert_eq!(said, "xfan: cannot print: No space left on device (os error 28)\n", "{arguments}");
        }
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        if arguments != "--help" {
            assert_eq!(run(arguments, writer.into()), (Some(0), String::new()), "{arguments}");
        }
    }
    // Nor does a failing standard error change the code.
    let mut command = Command::new(binary("xfan").unwrap());
    command.args(["stats", "--socket", "/nowhere"]).stdout(Stdio::null()).stderr(full_disk());
    assert_eq!(command.status().unwrap().code(), Some(1));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn lost_lines_are_counted_and_told_once_the_log_can_be_written() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = honest(&namespace);
    let log = launch.folder().join("xfan.log");
    // It is found full when the primary starts.
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let refused = launch.config(&format!("[log]\nfile = '{}'", log.display())).unwrap();
    let exit = refused.run().unwrap();
    assert_eq!(exit.code, Some(2), "a symbolic link is not followed: {exit:#?}");
    assert!(exit.stderr.last().unwrap().contains("cannot open the log file"), "{exit:#?}");

    let launch = honest(&namespace);
    let log = launch.folder().join("xfan.log");
    let small = launch.folder().join("small");
    fs::create_dir(&small).unwrap();
    // A file system of one page, which is full at once.
    let mounted = Mounted::tmpfs(&small, "4k");
    fs::write(small.join("filler"), vec![0; 4096]).unwrap();
    let launch = launch.config(&format!("[log]\nfile = '{}'", small.join("xfan.log").display())).unwrap();
    let primary = launch.spawn().unwrap();
    let report = |ready: &dyn Fn(&Report) -> bool| loop {
        match ask_for_report(&primary.socket()) {
            Ok(report) if ready(&report) => return report,
            _ => std::thread::sleep(PAUSE),
        }
    };
    let lost =
        report(&|report| report.log_lines_lost >= 5 && member(report, 1).state == "running").log_lines_lost;
    fs::remove_file(small.join("filler")).unwrap();
    let text = text_when(&small.join("xfan.log"), "lines of this log were lost");
    let told: u64 = text.split(" WARN ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(told >= lost, "{text}");
    assert_nothing_forged(&text);
    assert_eq!(primary.report().log_lines_lost, told);
    let shown = Process::spawn({
        let mut command = Command::new(binary("xfan").unwrap());
        command.args(["stats", "--socket"]).arg(primary.socket());
        command
    });
    let shown = shown.unwrap().wait().stdout;
    assert!(shown.contains(&format!("log      {told} lines lost")), "{shown:#?}");
    assert_eq!(primary.stop().0.code, Some(0));
    drop(mounted);
    assert!(!log.exists());
}

/// A small file system, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: &Path, size: &str) -> Self {
        let size = format!("size={size},mode=755");
        nix::mount::mount(Some("tmpfs"), path, Some("tmpfs"), nix::mount::MsFlags::empty(), Some(&*size))
            .unwrap();
        Mounted(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn sighup_opens_the_files_anew_and_ends_nothing() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap();
    let folder = launch.folder().to_owned();
    let path = |name: &str| folder.join(name);
    let config = format!(
        "worker_output = '{}'\n[log]\nfile = '{}'",
        path("out-{member}").display(),
        path("xfan.log").display()
    );
    let launch = launch.config(&config).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let primary = launch.spawn().unwrap();
    text_when(&path("xfan.log"), " running ");
    assert_eq!(fs::metadata(path("xfan.log")).unwrap().permissions().mode() & 0o7777, 0o640);
    let names = ["xfan.log", "out-default-0", "out-default-1"];
    for name in names {
        fs::rename(path(name), path(&format!("{name}.1"))).unwrap();
    }
    kill(primary.process.pid(), Signal::SIGHUP).unwrap();
    let text = text_when(&path("xfan.log"), "SIGHUP");
    // Both catch it: they have no files of their own to open, and go on.
    assert!(text.contains("SIGHUP: files are opened anew workers_told=2"), "{text}");
    send_synthetic(&namespace, 6);
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    let counted = [0, 1].map(|place| member(&report, place).committed);
    let (exit, _folder) = primary.stop();
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:#?}");
    for (place, counted) in counted.into_iter().enumerate() {
        let text = fs::read_to_string(path(&format!("out-default-{place}"))).unwrap();
        let totals: serde_json::Value = serde_json::from_str(&text).expect("the line as it was written");
        assert_eq!((totals["packets"].as_u64(), text.lines().count()), (Some(counted), 1));
        assert_eq!(fs::metadata(path(&format!("out-default-{place}.1"))).unwrap().len(), 0);
    }
    let before = fs::read_to_string(path("xfan.log.1")).unwrap();
    assert!(before.contains(" running ") && !before.contains("SIGHUP"), "{before}");
}

#[test]
fn sighup_reaches_the_workers_that_catch_it() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().with("-n 1");
    let count = launch.within_reach("xfan-count").unwrap();
    let script = launch.folder().join("worker");
    // The shell is the worker's process, and catches the signal; the program is its child.
    fs::write(
        &script,
        format!("#!/bin/sh\ntrap 'echo opened anew' HUP\n{} &\nwait; wait\n", count.display()),
    )
    .unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let primary = launch.worker(script.to_str().unwrap(), "").unwrap().start().unwrap();
    kill(primary.process.pid(), Signal::SIGHUP).unwrap();
    primary.process.wait_for_line("SIGHUP: files are opened anew workers_told=1").unwrap();
    primary.process.wait_for_line("default/0 stdout: opened anew").unwrap();
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn sighup_while_starting_and_stopping_ends_nothing() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config("stop_timeout = '1s'").unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().spawn().unwrap();
    let pid = primary.process.pid();
    // From when its own code runs: it blocks the signal at once.
    let blocks = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & 1 != 0
    };
    while !blocks() && ask_for_report(&primary.socket()).is_err() {}
    kill(pid, Signal::SIGHUP).unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    primary.process.wait_for_line("SIGHUP: files are opened anew").unwrap();
    // A stopped worker makes the end take a while.
    let report = primary.report();
    kill(pid_of(member(&report, 0)), Signal::SIGSTOP).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    primary.report_when(|report| member(report, 1).state != "running");
    kill(pid, Signal::SIGHUP).unwrap();
    let told =
        |lines: &[String]| lines.iter().filter(|line| line.contains("SIGHUP: files are opened anew")).count();
    while told(&primary.process.stderr()) < 2 {
        std::thread::yield_now();
    }
    let exit = primary.stop().0;
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:#?}");
    assert_eq!(told(&exit.stderr), 2, "{exit:#?}");
}

#[test]
fn one_file_for_all_workers_has_their_names_before_each_line() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap();
    let file = launch.folder().join("workers.log");
    let config = format!("worker_output = '{}'", file.display());
    let launch = launch.config(&config).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let (exit, folder) = launch.start().unwrap().stop();
    assert_eq!(exit.code, Some(0));
    let text = fs::read_to_string(folder.join("workers.log")).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    for (place, line) in lines.iter().enumerate() {
        let rest = line.strip_prefix(&format!("default/{place} stdout: ")).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(rest).unwrap()["packets"], 0);
    }
    assert_eq!((lines.len(), fs::metadata(&file).unwrap().mode() & 0o7777), (2, 0o640));
}

#[test]
fn an_output_that_cannot_be_is_refused_before_anything_starts() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let refused = |config: &str| {
        let launch = Launch::on(&namespace).unwrap().config(config).unwrap();
        let exit = launch.worker("xfan-count", "").unwrap().run().unwrap();
        assert_eq!(exit.code, Some(2), "{exit:#?}");
        exit.stderr.last().unwrap().clone()
    };
    let said = refused("worker_output = '/nowhere/{member}'");
    assert!(said.contains("cannot open the workers' output file /nowhere/default-0: No such file"), "{said}");
    let said = refused("survive = true\nworker_output = '/tmp/all'");
    assert!(said.contains("put {member} into worker_output (/tmp/all)"), "{said}");
    if !Path::new("/run/systemd/journal/stdout").exists() {
        let said = refused("worker_output = 'journal'");
        assert!(said.contains("systemd's journal does not listen on /run/systemd/journal/stdout"), "{said}");
    }
}

#[test]
fn each_worker_has_a_stream_of_its_own_to_the_journal() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = honest(&namespace).config("worker_output = 'journal'").unwrap();
    let journal = UnixListener::bind(launch.folder().join("stdout")).unwrap();
    // Where the journal would be is the test's folder, for this process alone.
    let (run, folder) = (launch.command().unwrap(), launch.folder().display().to_string());
    let mut command = namespace.command("unshare");
    let script =
        "mount -t tmpfs none /run && mkdir /run/systemd && ln -s $0 /run/systemd/journal && exec \"$@\"";
    command.args(["-m", "sh", "-c", script, &folder]).arg(run.get_program()).args(run.get_args());
    let child = command.process_group(0).stdin(Stdio::null()).spawn().unwrap();
    let mut primary = Bare { child, launch };
    primary.started();
    assert_eq!(primary.stop(), Some(0));
    journal.set_nonblocking(true).unwrap();
    let streams = std::iter::from_fn(|| journal.accept().ok()).map(|(mut stream, _)| {
        let mut text = String::new();
        stream.set_nonblocking(false).unwrap();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    // One of each is that of the check at the start.
    let mut with_totals: Vec<_> = streams.filter(|text| text.contains("\"packets\":0")).collect();
    with_totals.sort();
    for (place, text) in with_totals.iter().enumerate() {
        assert!(text.starts_with(&format!("xfan-default-{place}\n\n6\n1\n0\n0\n0\n{{")), "{text}");
    }
    assert_eq!(with_totals.len(), 2);
}

#[test]
fn surviving_workers_write_to_files_of_their_own_and_go_on_without_a_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    for output in ["log", "FOLDER/out-{member}"] {
        let launch = Launch::on(&namespace).unwrap();
        let output = output.replace("FOLDER", &launch.folder().display().to_string());
        let config = format!("survive = true\nworker_output = '{output}'");
        let launch = launch.config(&config).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
        let primary = launch.start().unwrap();
        let before: Vec<_> = primary.report().groups[0].members.iter().map(|member| member.pid).collect();
        let folder = primary.kill();
        let launch = Launch::within(&namespace, folder).config(&config).unwrap().with("-n 2");
        let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
        send_synthetic(&namespace, 6);
        let report = primary.report_after(PACKETS, true);
        let after: Vec<_> = report.groups[0].members.iter().map(|member| member.pid).collect();
        assert_eq!(before, after);
        let counted: Vec<_> = report.groups[0].members.iter().map(|member| member.committed).collect();
        let (exit, folder) = primary.stop();
        assert_eq!(exit.code, Some(0));
        let null = exit.stderr.iter().any(|line| line.contains("their output goes to /dev/null"));
        assert_eq!(null, output == "log", "{exit:#?}");
        for (place, counted) in counted.into_iter().enumerate().filter(|_| output != "log") {
            let text = fs::read_to_string(folder.join(&format!("out-default-{place}"))).unwrap();
            assert!(text.contains(&format!("\"packets\":{counted}")), "{text}");
        }
    }
}

#[test]
fn a_file_that_takes_no_more_blocks_nobody() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let kept = xfan_tests::primary::Folder::new().unwrap();
    let fifo = kept.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    // Somebody opens it to read, and never does.
    let _reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let launch = hostile(&namespace, "flood", &format!("worker_output = '{}'", fifo.display()));
    let log = launch.folder().join("log");
    let mut primary = Bare::spawn(launch, Stdio::null(), Stdio::null(), File::create(log).unwrap().into());
    let report = primary.started();
    kill(pid_of(member(&report, 0)), Signal::SIGUSR1).unwrap();
    primary.report_when(|report| member(report, 0).output_dropped > 10_000);
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    fs::remove_file(fifo).unwrap();
}

#[test]
fn names_of_interfaces_and_programs_steer_no_terminal() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let name = "e\u{1b}[7m\u{202e}\u{9b}2";
    xfan_tests::command::run(Command::new("ip").args([
        "netns",
        "exec",
        namespace.name(),
        "ip",
        "link",
        "set",
        "rx0",
        "down",
    ]))
    .unwrap();
    xfan_tests::command::run(Command::new("ip").args([
        "netns",
        "exec",
        namespace.name(),
        "ip",
        "link",
        "set",
        "rx0",
        "name",
        name,
        "up",
    ]))
    .unwrap();
    let run = |arguments: &[&str]| {
        let mut command = namespace.command(binary("xfan").unwrap());
        command.args(arguments);
        Process::spawn(command).unwrap()
    };
    let plain = |lines: &[String]| {
        let steering = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
        assert!(!lines.iter().any(|line| line.contains(steering)), "{lines:?}");
    };
    let shown = run(&["topology", "-i", name]).wait();
    assert_eq!(shown.code, Some(0), "{shown:#?}");
    plain(&shown.stdout);
    let folder = xfan_tests::primary::Folder::new().unwrap();
    let socket = folder.socket();
    let socket = socket.to_str().unwrap();
    let primary = run(&["run", "-i", name, "--socket", socket]);
    primary.wait_for_line(" running ").unwrap();
    for arguments in
        [&["stats"][..], &["stats", "--json"], &["workers", "list"], &["events"], &["events", "--json"]]
    {
        let mut all = arguments.to_vec();
        all.extend(["--socket", socket]);
        let exit = run(&all).wait();
        assert_eq!(exit.code, Some(0));
        plain(&exit.stdout);
        if arguments == ["stats", "--json"] {
            let report: Report = serde_json::from_str(&exit.stdout[0]).unwrap();
            assert_eq!(report.ports[0].name, name, "for machines it is whole");
        }
    }
    let exit = primary.end(Signal::SIGTERM);
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    plain(&exit.stdout);
    plain(&exit.stderr);
}
