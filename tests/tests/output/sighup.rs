//! SIGHUP opens log and output files anew.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::{Signal, kill};
use xfan::control::client::ask_for_report;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::proc::{pid_of, signal};
use xfan_tests::process::write_script;
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

use super::{PACKETS, member, text_when};

#[test]
fn sighup_reopens_the_files_and_ends_nothing() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
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
    // Both workers catch the signal; they have no files of their own to reopen.
    assert!(text.contains("SIGHUP: files are reopened workers_signalled=2"), "{text}");
    send_synthetic(&namespace, 6);
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    let counted = [0, 1].map(|index| member(&report, index).committed);
    let (exit, _folder) = primary.stop();
    assert_eq!((exit.code, exit.stderr.len()), (Some(0), 0), "{exit:#?}");
    for (index, counted) in counted.into_iter().enumerate() {
        let text = fs::read_to_string(path(&format!("out-default-{index}"))).unwrap();
        let totals: serde_json::Value = serde_json::from_str(&text).expect("an unchanged line");
        assert_eq!((totals["packets"].as_u64(), text.lines().count()), (Some(counted), 1));
        assert_eq!(fs::metadata(path(&format!("out-default-{index}.1"))).unwrap().len(), 0);
    }
    let before = fs::read_to_string(path("xfan.log.1")).unwrap();
    assert!(before.contains(" running ") && !before.contains("SIGHUP"), "{before}");
}

#[test]
fn sighup_reaches_the_workers_that_catch_it() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 1");
    let count = launch.within_reach("xfan-count").unwrap();
    let script = launch.folder().join("worker");
    // The worker's process is the shell, which catches the signal; the program is its child.
    write_script(&script, &format!("trap 'echo opened anew' HUP\n{} &\nwait; wait", count.display()));
    let primary = launch.worker(script.to_str().unwrap(), "").unwrap().start().unwrap();
    kill(primary.process.pid(), Signal::SIGHUP).unwrap();
    primary.process.wait_for_line("SIGHUP: files are reopened workers_signalled=1").unwrap();
    primary.process.wait_for_line("default/0 stdout: opened anew").unwrap();
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn sighup_while_starting_and_stopping_ends_nothing() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config("stop_timeout = '1s'").unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().spawn().unwrap();
    let pid = primary.process.pid();
    // The primary's code blocks the signal first of all, so the block shows that the code runs.
    let blocks = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & 1 != 0
    };
    while !blocks() && ask_for_report(&primary.socket()).is_err() {}
    kill(pid, Signal::SIGHUP).unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    primary.process.wait_for_line("SIGHUP: files are reopened").unwrap();
    // A stopped worker delays the end.
    let report = primary.report();
    signal(pid_of(&report, 0), Signal::SIGSTOP);
    kill(pid, Signal::SIGTERM).unwrap();
    primary.report_when(|report| member(report, 1).state != "running");
    kill(pid, Signal::SIGHUP).unwrap();
    let told =
        |lines: &[String]| lines.iter().filter(|line| line.contains("SIGHUP: files are reopened")).count();
    while told(&primary.process.stderr()) < 2 {
        std::thread::yield_now();
    }
    let exit = primary.stop().0;
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:#?}");
    assert_eq!(told(&exit.stderr), 2, "{exit:#?}");
}
