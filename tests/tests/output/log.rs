//! The primary's log and totals on a full disk, a closed or full pipe, or a stopped terminal.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{FlowArg, tcflow};
use xfan::control::client::ask_for_report;
use xfan::report::Report;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::proc::signal;
use xfan_tests::process::{Process, binary};
use xfan_tests::replay::send_synthetic;
use xfan_tests::tmpfs::Tmpfs;
use xfan_tests::veth::network;

use super::{
    Bare, PACKETS, PAUSE, assert_nothing_forged, copy_to, full_disk, honest, member, plain, text_when,
};

/// A full pipe that nobody reads.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&writer, &[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer)
}

/// Checks that a primary with these descriptors dispatches everything and ends with `code`.
fn assert_works_with(stdout: impl Into<Stdio>, stderr: impl Into<Stdio>, code: i32) {
    let namespace = network(2);
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

#[test]
fn a_full_disk_under_the_log_is_survived() {
    let _watchdog = e2e_or_skip!();
    assert_works_with(Stdio::null(), full_disk(), 0);
}

#[test]
fn a_closed_log_pipe_is_survived() {
    let _watchdog = e2e_or_skip!();
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    drop(reader);
    // A closed pipe for the totals is no error either: its reader did not want them.
    assert_works_with(writer.try_clone().unwrap(), writer, 0);
}

#[test]
fn a_full_pipe_does_not_block_the_primary() {
    let _watchdog = e2e_or_skip!();
    let (_reader, writer) = full_pipe();
    assert_works_with(writer.try_clone().unwrap(), writer, 1);
}

#[test]
fn a_primary_without_descriptors_runs() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
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
fn a_stopped_terminal_does_not_block_the_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
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
    // The primary ends even if the terminal is stopped again.
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    assert_eq!(primary.stop(), Some(0));
    fs::remove_file(log).unwrap();
}

#[test]
fn tostop_does_not_stop_a_background_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = honest(&namespace);
    let log = launch.folder().join("typescript");
    let inner = launch.command().unwrap();
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().unwrap());
    let words: Vec<_> = std::iter::once(inner.get_program()).chain(inner.get_args()).map(quoted).collect();
    // In the background of a new session with its own terminal.
    let script = format!("stty tostop; set -m; {} & wait", words.join(" "));
    let mut session = namespace.command("script");
    session.args(["-qfc", &script]).arg(&log).stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let mut primary = Bare { child: session.spawn().unwrap(), launch };
    let report = primary.started();
    send_synthetic(&namespace, 6);
    primary.report_when(|report| report.totals() == (PACKETS, PACKETS, 0));
    signal(report.pid, Signal::SIGTERM);
    let text = text_when(&log, "frames   total");
    assert!(plain(&text).join("\n").contains(" INFO running "), "{text}");
    primary.child.wait().unwrap();
}

#[test]
fn lost_log_lines_are_counted_and_reported() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = honest(&namespace);
    let log = launch.folder().join("xfan.log");
    // A symbolic link is refused at the start.
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let refused = launch.config(&format!("[log]\nfile = '{}'", log.display())).unwrap();
    let exit = refused.run().unwrap();
    assert_eq!(exit.code, Some(2), "a symbolic link is not followed: {exit:#?}");
    assert!(exit.stderr.last().unwrap().contains("cannot open the log file"), "{exit:#?}");

    let launch = honest(&namespace);
    let log = launch.folder().join("xfan.log");
    let small = launch.folder().join("small");
    fs::create_dir(&small).unwrap();
    // A file system of one page, which `filler` fills.
    let disk = Tmpfs::mount(&small, 4, 0o755).unwrap();
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
    drop(disk);
    assert!(!log.exists());
}
