//! The SDK's example programs work as documented.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::{Folder, Launch, Primary};
use xfan_tests::process::{Exit, Process, binary};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

fn frames() -> Vec<Vec<u8>> {
    traffic::synthetic(60, 600, 7).frames
}

fn example(name: &str, socket: &Path, arguments: &str) -> Process {
    let mut command = Command::new(binary(&format!("examples/{name}")).unwrap());
    command.arg("--socket").arg(socket).args(arguments.split_whitespace());
    Process::spawn(command).unwrap()
}

/// The packet lengths that `secondary` printed.
fn lengths(exit: &Exit) -> Vec<usize> {
    let length = |line: &String| line.split_once(" bytes, hash ").unwrap().0.parse().unwrap();
    let mut lengths: Vec<_> = exit.stdout.iter().map(length).collect();
    lengths.sort_unstable();
    lengths
}

fn committed(primary: &Primary) -> u64 {
    primary.report().groups[0].members.iter().map(|member| member.committed).sum()
}

#[test]
fn a_secondary_prints_every_packet_and_leaves() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = Launch::on(&namespace).unwrap().with("-n 1").start().unwrap();
    let secondary = example("secondary", &primary.socket(), "");
    secondary.wait_for_line("as member default/0").unwrap();
    let frames = frames();
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);

    let exit = secondary.end(Signal::SIGTERM);
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let mut sent: Vec<_> = frames.iter().map(Vec::len).collect();
    sent.sort_unstable();
    assert_eq!(lengths(&exit), sent);
    assert!(exit.stdout.iter().any(|line| line.contains(", lane 1, ") && line.ends_with("protocol 6")));
    let report = primary.report_when(|report| report.groups[0].members[0].state == "vacant");
    let member = &report.groups[0].members[0];
    assert_eq!((member.committed, member.requeued, member.lost), (PACKETS, 0, 0));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_secondary_stops_after_a_number_of_packets() {
    let _watchdog = e2e_or_skip!();
    const WANTED: u64 = 101;
    let namespace = network(2);
    let primary = Launch::on(&namespace).unwrap().with("-n 2").start().unwrap();
    let first = example("secondary", &primary.socket(), &format!("--count {WANTED}"));
    let second = example("secondary", &primary.socket(), "");
    for secondary in [&first, &second] {
        secondary.wait_for_line("as member ").unwrap();
    }
    namespace.run(|| Replay::onto("tx0").run(&frames())).unwrap();
    let first = first.wait();
    assert_eq!((first.code, first.stdout.len() as u64), (Some(0), WANTED), "{first:#?}");
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    let lost: u64 = report.groups[0].members.iter().map(|member| member.lost).sum();
    assert_eq!((committed(&primary), lost), (PACKETS, 0));
    let second = second.end(Signal::SIGINT);
    assert_eq!((second.code, second.stdout.len() as u64), (Some(0), PACKETS - WANTED));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_secondary_reports_or_awaits_a_missing_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let folder = Folder::new().unwrap();
    let socket = folder.socket();
    let exit = example("secondary", &socket, "").wait();
    assert_eq!((exit.code, exit.stdout.len()), (Some(1), 0));
    let said = format!("secondary: no dispatcher listens on {}: start one with", socket.display());
    assert!(exit.stderr.concat().contains(&said), "{exit:#?}");
    // The socket's path comes from an option.
    let mut command = Command::new(binary("examples/secondary").unwrap());
    command.arg("no-such-if");
    let exit = Process::spawn(command).unwrap().wait();
    assert!(exit.stderr.concat().contains("no dispatcher listens on /run/xfan/no-such-if.sock"), "{exit:#?}");

    // A waiting process can be ended …
    let mut waiting = example("secondary", &socket, "--wait");
    assert!(waiting.is_running());
    assert_eq!(waiting.end(Signal::SIGTERM).signal, Some(Signal::SIGTERM as i32));
    // … and finds the primary once it starts.
    let waiting = example("secondary", &socket, "--wait --count 600");
    let primary = Launch::within(&namespace, folder).with("-n 1").start().unwrap();
    waiting.wait_for_line("as member default/0").unwrap();
    namespace.run(|| Replay::onto("tx0").run(&frames())).unwrap();
    let exit = waiting.wait();
    assert_eq!((exit.code, exit.stdout.len() as u64), (Some(0), PACKETS), "{:#?}", exit.stderr);
    assert_eq!(committed(&primary), PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_manager_shows_all_members() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 3");
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    namespace.run(|| Replay::onto("tx0").run(&frames())).unwrap();
    let report = primary.report_after(PACKETS, true);

    let exit = example("manager", &primary.socket(), "--once").wait();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(exit.stdout[0].split(',').next(), Some(&*format!("rx0: primary {}", report.pid)));
    let shown: Vec<Vec<_>> = exit.stdout[2..].iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(shown.len(), 3);
    for (line, member) in shown.iter().zip(&report.groups[0].members) {
        let core = member.core.map_or_else(|| "-".into(), |core| core.to_string());
        assert_eq!(line[..4], [&member.id, &member.pid.to_string(), &core, "running"]);
        assert_eq!(line[6..], ["0", "0"], "backlog and dropped");
    }

    // Without --once it runs until the primary ends.
    let manager = example("manager", &primary.socket(), "");
    manager.wait_for_line("default/2").unwrap();
    while manager.stdout().iter().filter(|line| line.starts_with("default/2")).count() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(primary.stop().0.code, Some(0));
    let exit = manager.wait();
    assert_eq!(exit.code, Some(1));
    assert!(exit.stderr.concat().contains("manager: "), "{exit:#?}");

    let exit = example("manager", Path::new("/nowhere/xfan.sock"), "--once").wait();
    assert!(
        exit.stderr.concat().contains("manager: no dispatcher listens on /nowhere/xfan.sock"),
        "{exit:#?}"
    );
}
