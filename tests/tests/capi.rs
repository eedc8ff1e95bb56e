//! Workers in C, built with what `scripts/install-capi` installs, work like any other worker.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use xfan_tests::balance::assert_balanced;
use xfan_tests::generator::{End, Generator, Load};
use xfan_tests::primary::Launch;
use xfan_tests::proc::signal;
use xfan_tests::process::{Process, binary, write_script};
use xfan_tests::replay::Replay;
use xfan_tests::veth::network;
use xfan_tests::{command, e2e_or_skip, traffic};

const PACKETS: u64 = 600;
/// The root of the repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// How a program links the library.
#[derive(Clone, Copy, PartialEq)]
enum Library {
    Shared,
    Static,
}

/// Installs the library into the folder and builds `examples/count.c` there as a user would.
fn build(folder: &Path, library: Library) -> PathBuf {
    let (prefix, program) = (folder.join("sdk"), folder.join("c-count"));
    let built = binary("libxfan_worker_c.so").unwrap();
    let mut install = Command::new(format!("{ROOT}/scripts/install-capi"));
    install.env_remove("DESTDIR").arg("--from").arg(built.parent().unwrap()).arg(&prefix);
    command::run(&mut install).unwrap();

    let mut pkg_config = Command::new("pkg-config");
    pkg_config.env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")).args(["--cflags", "--libs"]);
    if library == Library::Static {
        pkg_config.arg("--static");
    }
    let flags = command::run(pkg_config.arg("xfan-worker")).unwrap();
    let flags = match library {
        Library::Shared => format!("{flags} -Wl,-rpath,{}", prefix.join("lib").display()),
        Library::Static => flags.replace("-lxfan_worker_c", "-l:libxfan_worker_c.a"),
    };
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-o"]).arg(&program);
    cc.arg(format!("{ROOT}/workers/capi/examples/count.c")).args(flags.split_whitespace());
    command::run(&mut cc).unwrap();
    program
}

fn bytes(frames: &[Vec<u8>]) -> u64 {
    frames.iter().map(|frame| frame.len() as u64).sum()
}

#[test]
fn a_worker_in_c_runs_in_the_sandbox() {
    let _watchdog = e2e_or_skip!(240);
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("worker_sandbox = true").unwrap();
    let program = build(launch.folder(), Library::Shared);
    let primary = launch.worker(program.to_str().unwrap(), "").unwrap().start().unwrap();
    let frames = traffic::synthetic(60, 600, 6).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    let report = primary.report_after(PACKETS, true);
    assert!(report.groups[0].confinement.sandbox);
    assert_balanced(&report, PACKETS);
    let exit = primary.stop().0;
    assert_eq!((exit.code, exit.totals_of("default/0")), (Some(0), (PACKETS, bytes(&frames))));
}

#[test]
fn a_worker_in_c_counts_exactly_and_leaves_on_sigterm() {
    let _watchdog = e2e_or_skip!(240);
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2");
    // The first member is in C, the other in Rust.
    let (c, rust) = (build(launch.folder(), Library::Shared), launch.within_reach("xfan-count").unwrap());
    let script = launch.folder().join("worker");
    let text = format!(
        "case $XFAN_MEMBER in\ndefault/0) exec {} ;;\n*) exec {} ;;\nesac",
        c.display(),
        rust.display()
    );
    write_script(&script, &text);
    let primary = launch.worker(script.to_str().unwrap(), "").unwrap().start().unwrap();
    let report = primary.report();
    let programs: Vec<_> = report.groups[0].members.iter().map(|member| &*member.program).collect();
    assert!(programs[0].ends_with("c-count") && programs[1].ends_with("xfan-count"), "{programs:?}");

    let frames = traffic::synthetic(60, 600, 7).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    let members = &report.groups[0].members;
    assert!(members.iter().all(|member| member.committed > 0), "{members:#?}");
    for member in members {
        assert_eq!(member.counters["packets"], member.committed);
    }
    assert_eq!(members.iter().map(|member| member.counters["bytes"]).sum::<u64>(), bytes(&frames));

    // The first member leaves while packets flow; the other gets its flows.
    let load =
        Load { frames_per_second: Some(50_000), ..Load::onto("tx0", End::After(Duration::from_secs(3600))) };
    let generator = namespace.run(|| Generator::start(&load)).unwrap();
    let before = members[0].committed;
    let report = primary.report_when(|report| report.groups[0].members[0].committed > before + 1000);
    signal(report.groups[0].members[0].pid, Signal::SIGTERM);
    primary.report_when(|report| report.groups[0].members[0].state == "stopped");
    let taken = primary.report().totals().0;
    primary.report_when(|report| report.totals().0 > taken + 1000);
    let sent = generator.stop().unwrap().sent;
    let report = primary.report_after(PACKETS + sent, true);
    assert_balanced(&report, PACKETS + sent);

    let members = &report.groups[0].members;
    assert_eq!(members[0].last_exit.as_deref(), Some("exit status: 0"));
    assert!(members.iter().all(|member| member.requeued + member.lost + member.restarts == 0));
    assert_eq!(report.totals(), (PACKETS + sent, PACKETS + sent, 0));
    let committed = [members[0].committed, members[1].committed];
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let [c, rust] = ["default/0", "default/1"].map(|member| exit.totals_of(member));
    assert_eq!([c.0, rust.0], committed);
    assert_eq!(c.0 + rust.0, PACKETS + sent);
    assert_eq!(c.1 + rust.1, bytes(&frames) + sent * u64::from(load.frame_bytes));
}

#[test]
fn a_statically_linked_worker_in_c_outlives_a_primary() {
    let _watchdog = e2e_or_skip!(240);
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config("max_workers = 1").unwrap();
    let program = build(launch.folder(), Library::Static);
    // A static program does not need the library.
    std::fs::remove_dir_all(launch.folder().join("sdk")).unwrap();
    let primary = launch.start().unwrap();
    let join = || {
        let mut command = Command::new(&program);
        command.arg(primary.socket());
        let worker = Process::spawn(command).unwrap();
        primary.report_when(|report| report.groups[0].members[0].state == "running");
        worker
    };
    let frames = traffic::synthetic(60, 600, 7).frames;
    for round in 1..=2 {
        let worker = join();
        namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
        primary.report_after(round * PACKETS, true);
        let exit = worker.end(Signal::SIGTERM);
        assert_eq!(
            (exit.code, exit.totals_of("default/0")),
            (Some(0), (PACKETS, bytes(&frames))),
            "{exit:#?}"
        );
        let report = primary.balanced_report_when(|report| report.groups[0].members[0].state == "vacant");
        assert_balanced(&report, round * PACKETS);
    }

    // All members have a worker.
    let worker = join();
    let mut command = Command::new(&program);
    command.arg(primary.socket());
    let exit = Process::spawn(command).unwrap().wait();
    assert_eq!((exit.code, exit.stdout.len()), (Some(1), 0));
    assert!(exit.stderr.concat().starts_with("count: cannot attach: the dispatcher refused"), "{exit:#?}");

    // The primary is killed: the worker receives what the primary had sent, then reports the loss.
    primary.end(Signal::SIGKILL);
    let exit = worker.wait();
    assert_eq!(exit.code, Some(1));
    assert!(exit.stderr.concat().contains("count: cannot receive: the dispatcher is gone"), "{exit:#?}");
    assert_eq!(exit.totals_of("default/0"), (0, 0));
}

#[test]
fn a_worker_in_c_survives_the_primary_that_started_it() {
    let _watchdog = e2e_or_skip!(240);
    let namespace = network(2);
    let frames = traffic::synthetic(60, 600, 7).frames;
    let launch = Launch::on(&namespace).unwrap();
    let program = build(launch.folder(), Library::Static);
    let start = |launch: Launch<'_>| {
        let launch = launch.with("-n 1").config("survive = true").unwrap();
        launch.worker(program.to_str().unwrap(), "").unwrap().start().unwrap()
    };
    let first = start(launch);
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    let before = first.report_after(PACKETS, true);
    let second = start(Launch::within(&namespace, first.kill()));
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    let report = second.report_after(PACKETS, true);
    let (before, member) = (&before.groups[0].members[0], &report.groups[0].members[0]);
    assert_eq!((member.pid, member.counters["packets"]), (before.pid, 2 * PACKETS));
    assert_eq!(second.stop().0.code, Some(0));
}

#[test]
fn a_worker_in_c_says_why_it_cannot_attach() {
    // This test needs no privileges, but a C compiler.
    let folder = tempfile::tempdir().unwrap();
    let program = build(folder.path(), Library::Shared);
    let said = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(arguments).env_remove("XFAN_SOCKET");
        let exit = Process::spawn(command).unwrap().wait();
        assert_eq!((exit.code, exit.stdout.len()), (Some(1), 0), "{exit:#?}");
        exit.stderr.concat()
    };
    let text = said(&["/nowhere/xfan.sock"]);
    let expected = "count: cannot attach: no dispatcher listens on /nowhere/xfan.sock: start one with";
    assert!(text.starts_with(expected), "{text}");
    let text = said(&[]);
    assert!(text.starts_with("count: cannot attach: no control socket: XFAN_SOCKET is not set"), "{text}");
}
