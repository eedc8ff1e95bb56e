//! What a worker writes to its own descriptors 0 to 2.

use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use xfan_tests::e2e_or_skip;
use xfan_tests::leftovers::processes_of;
use xfan_tests::proc::{pid_of, signal};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

use super::{
    Bare, PACKETS, PAUSE, assert_nothing_forged, assert_served, copy_to, hostile, member, plain, relayed,
    text_when,
};

/// The worker's descriptors share nothing with the primary's.
#[test]
fn a_worker_can_misuse_only_its_own_descriptors() {
    let _watchdog = e2e_or_skip!(240);
    for (deed, outcomes) in [
        ("shut", "ENOTSOCK done done"),
        ("truncate", "EINVAL EINVAL EINVAL"),
        ("read", "ENODATA ENODATA ENODATA"),
        ("stop", "ENOTTY ENOTTY ENOTTY"),
        ("close", ""),
    ] {
        let namespace = network(2);
        // All descriptors of the primary are one terminal, file or socket that accepts everything.
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
                // Something that a worker could read.
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
        signal(pid_of(&report, 0), Signal::SIGUSR1);
        let done = text_when(&log, "deed done");
        let said = plain(&done).into_iter().find(|line| line.contains("deed done")).unwrap();
        assert!(said.trim_end().ends_with(outcomes), "{deed}: {said}");
        assert_served(&namespace, &mut primary);
        assert_eq!(primary.stop(), Some(0), "{deed}");
        // The log is complete, from its first line to its last.
        let text = plain(&text_when(&log, "frames   total")).join("\n");
        assert!(
            text.contains(" INFO running ") && text.contains("default/1 stdout: {\"bytes\":"),
            "{deed}: {text}"
        );
        drop(kept);
    }
}

#[test]
fn a_worker_that_fills_its_output_blocks_nobody() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = hostile(&namespace, "fill", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
    let done = relayed(&text_when(&log, "deed done"));
    assert!(done.last().unwrap().ends_with("stderr: deed done: done done done"), "{done:?}");
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    // Both unterminated lines were cut.
    let text = fs::read_to_string(&log).unwrap();
    assert_nothing_forged(&text);
    let cut = format!(": {} … (cut)", "x".repeat(4096));
    let lines = relayed(&text);
    let long: Vec<_> = lines.iter().filter(|line| line.contains("xxx")).collect();
    assert_eq!(long.len(), 2, "{text}");
    assert!(long.iter().all(|line| line.ends_with(&cut)), "{long:?}");
}

/// A writer can hold the lock of a pipe by splicing from a socket that stays empty.
#[test]
fn a_locked_output_affects_only_its_worker() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = hostile(&namespace, "splice", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
    text_when(&log, "deed done");
    assert_served(&namespace, &mut primary);
    // The last line of the honest worker is relayed while the hostile one still runs.
    signal(pid_of(&report, 1), Signal::SIGTERM);
    text_when(&log, "default/1 stdout: {\"bytes\":");
    assert_eq!(member(&primary.report_when(|_| true), 0).state, "running");
    assert_eq!(primary.stop(), Some(0));
}

#[test]
fn a_worker_that_forges_lines_is_quoted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = hostile(&namespace, "forge", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
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
fn a_flood_of_output_is_counted_and_bounded() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = hostile(&namespace, "flood", "");
    let (mut primary, log) = Bare::with_log(launch);
    let report = primary.started();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
    primary.report_when(|report| member(report, 0).output_dropped > 10_000);
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    let text = fs::read_to_string(&log).unwrap();
    assert_nothing_forged(&text);
    // Each line is in the log, or counted as dropped.
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
    // The last line of the honest worker is in the log as well.
    assert!(lines.iter().any(|line| line.starts_with("default/1 stdout: {\"bytes\":")), "{text}");
}

#[test]
fn the_last_output_of_a_worker_is_relayed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = hostile(&namespace, "leave", "");
    let primary = launch.start().unwrap();
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", primary.process.pid())).unwrap().count();
    let before = descriptors();
    let report = primary.report();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
    primary.process.wait_for_line("default/0 stdout: last words").unwrap();
    primary
        .report_when(|report| member(report, 0).state == "stopped" || member(report, 0).state == "crashed");
    // The primary closes its sockets, which ends the child that is still writing.
    while descriptors() >= before {
        std::thread::sleep(PAUSE);
    }
    send_synthetic(&namespace, 6);
    let report = primary.report_after(PACKETS, true);
    assert_eq!(member(&report, 1).committed, PACKETS);
    let (exit, folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let program = folder.join("xfan-hostile");
    while !processes_of(&program).is_empty() {
        std::thread::sleep(PAUSE);
    }
}
