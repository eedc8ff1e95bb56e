//! What xfan prints to its standard output.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use xfan::report::Report;
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::proc::{pid_of, signal};
use xfan_tests::process::{Process, binary};
use xfan_tests::veth::network;

use super::{Bare, full_disk, honest};

#[test]
fn unprinted_totals_do_not_change_the_exit_code() {
    let _watchdog = e2e_or_skip!();
    // Exit code 6: no worker is left.
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap();
    let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
    for (stdout, stderr) in
        [(Stdio::from(full_disk()), Stdio::null()), (full_disk().into(), full_disk().into())]
    {
        let again = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap();
        let again = again.with("-n 1").worker("xfan-count", "").unwrap();
        let mut primary = Bare::spawn(again, Stdio::null(), stdout, stderr);
        let report = primary.started();
        signal(pid_of(&report, 0), Signal::SIGKILL);
        assert_eq!(primary.child.wait().unwrap().code(), Some(6));
    }
    // Exit code 1: everything worked, but the totals could not be printed.
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
fn tools_report_that_they_cannot_print() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
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
    // A failing standard error does not change the code either.
    let mut command = Command::new(binary("xfan").unwrap());
    command.args(["stats", "--socket", "/nowhere"]).stdout(Stdio::null()).stderr(full_disk());
    assert_eq!(command.status().unwrap().code(), Some(1));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn names_cannot_inject_terminal_escapes() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let name = "e\u{1b}[7m\u{202e}\u{9b}2";
    namespace.ip("link set rx0 down").unwrap();
    namespace.ip(&format!("link set rx0 name {name} up")).unwrap();
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
            assert_eq!(report.ports[0].name, name, "JSON has the unchanged name");
        }
    }
    let exit = primary.end(Signal::SIGTERM);
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    plain(&exit.stdout);
    plain(&exit.stderr);
}
