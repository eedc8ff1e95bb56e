//! Workers outlive the primary that started them and continue under the next.

use nix::sys::signal::Signal;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::leftovers;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Folder, Launch, Primary};
use xfan_tests::proc::signal;
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

/// Prepares two workers, in the folder of the previous primary if there was one.
fn launch<'a>(namespace: &'a Netns, folder: Option<Folder>, config: &str) -> Launch<'a> {
    let launch = match folder {
        Some(folder) => Launch::within(namespace, folder),
        None => Launch::on(namespace).unwrap(),
    };
    launch.with("-n 2").config(config).unwrap()
}

fn start(namespace: &Netns, folder: Option<Folder>, config: &str) -> Primary {
    let config = format!("hash_key = '000102030405060708090a0b0c0d0e0f'\n{config}");
    let launch = launch(namespace, folder, &config);
    launch.worker("xfan-count", "").unwrap().start().unwrap()
}

fn members(report: &Report) -> &[Member] {
    &report.groups[0].members
}

fn pids(report: &Report) -> Vec<u32> {
    members(report).iter().map(|member| member.pid).collect()
}

/// Starts two workers, of which the first is hostile.
fn start_hostile(namespace: &Netns, folder: Option<Folder>, way: &str, config: &str) -> Primary {
    launch(namespace, folder, config).hostile_worker(way).unwrap().start().unwrap()
}

/// Waits until a process has ended.
fn wait_for_end(pid: u32) {
    while leftovers::state(pid).is_some_and(|state| state != 'Z') {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn the_next_primary_adopts_surviving_workers() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let first = start(&namespace, None, "survive = true");
    send_synthetic(&namespace, 5);
    let before = first.report_after(PACKETS, true);
    let counted: Vec<u64> = members(&before).iter().map(|member| member.committed).collect();
    assert!(counted.iter().all(|count| *count > 0));

    let folder = first.kill();
    let second = start(&namespace, Some(folder), "survive = true");
    let report = second.report();
    assert_eq!(pids(&report), pids(&before));
    assert!(members(&report).iter().all(|member| member.supervised && member.restarts == 0), "{report:#?}");
    send_synthetic(&namespace, 5);
    let report = second.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    for (member, counted) in members(&report).iter().zip(&counted) {
        assert_eq!(member.committed, *counted, "{}", member.id);
        assert_eq!(member.counters["packets"], 2 * counted, "{}: the process keeps its own count", member.id);
    }

    // A worker that fails is restarted as this primary's own child; the other one continues under a
    // third primary.
    signal(members(&report)[0].pid, Signal::SIGKILL);
    let report = second
        .report_when(|report| members(report)[0].restarts == 1 && members(report)[0].state == "running");
    assert_eq!(members(&report)[0].last_exit.as_deref(), Some("status unknown"));
    let before = report;
    let third = start(&namespace, Some(second.kill()), "survive = true");
    let report = third.report();
    assert_eq!(pids(&report), pids(&before));
    send_synthetic(&namespace, 5);
    let report = third.report_after(PACKETS, true);
    assert_eq!(members(&report)[0].counters["packets"], counted[0]);
    assert_eq!(members(&report)[1].counters["packets"], 3 * counted[1]);

    // An orderly stop ends the workers and removes the note.
    let (exit, folder) = third.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(exit.stdout.iter().any(|line| line.starts_with("default/1 ")), "{exit:#?}");
    assert!(!exit.stdout.iter().any(|line| line.contains("crashed")), "{exit:#?}");
    pids(&report).into_iter().for_each(wait_for_end);
    assert_eq!(leftovers::processes_in(&namespace), Vec::<String>::new());
    let notes = std::fs::read_dir(folder.path()).unwrap().flatten();
    let notes: Vec<_> = notes.filter(|file| file.path().to_string_lossy().contains(".workers")).collect();
    assert!(notes.is_empty(), "{notes:?}");
}

#[test]
fn dead_or_stuck_survivors_are_replaced() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let first = start(&namespace, None, "survive = true");
    let before = pids(&first.report());
    let folder = first.kill();
    signal(before[0], Signal::SIGKILL);
    wait_for_end(before[0]);
    signal(before[1], Signal::SIGSTOP);
    let second = start(&namespace, Some(folder), "survive = true\nstart_timeout = '3s'");
    let report = second.report();
    assert!(pids(&report).iter().all(|pid| !before.contains(pid)), "{before:?} {:?}", pids(&report));
    wait_for_end(before[1]);
    send_synthetic(&namespace, 5);
    let report = second.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert!(members(&report).iter().all(|member| member.committed > 0));
    assert_eq!(second.stop().0.code, Some(0));
}

#[test]
fn survivors_of_another_configuration_are_ended() {
    let _watchdog = e2e_or_skip!();
    for (config, arguments) in [("survive = false", ""), ("survive = true", "--sleep-per-batch 1ms")] {
        let namespace = network(2);
        let first = start(&namespace, None, "survive = true");
        let before = pids(&first.report());
        let folder = first.kill();
        let launch = launch(&namespace, Some(folder), config);
        let second = launch.worker("xfan-count", arguments).unwrap().start().unwrap();
        let now = pids(&second.report());
        assert!(now.iter().all(|pid| !before.contains(pid)), "{before:?} {now:?}");
        before.into_iter().for_each(wait_for_end);
        send_synthetic(&namespace, 5);
        let report = second.report_after(PACKETS, true);
        assert_balanced(&report, PACKETS);
        assert_eq!(pids(&report), now);
        assert_eq!(second.stop().0.code, Some(0));
    }
}

#[test]
fn a_survivor_of_another_release_is_replaced() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let first = start_hostile(&namespace, None, "relic", "survive = true");
    let before = pids(&first.report());
    let second = start_hostile(&namespace, Some(first.kill()), "relic", "survive = true");
    let now = pids(&second.report());
    assert!(now[0] != before[0] && now[1] == before[1], "{before:?} {now:?}");
    wait_for_end(before[0]);
    assert_eq!(second.report().control.refused, 1);
    assert_eq!(second.stop().0.code, Some(0));
}

#[test]
fn a_survivor_that_ignores_sigterm_is_killed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let first = start_hostile(&namespace, None, "deaf", "survive = true");
    let before = pids(&first.report());
    let second = start(&namespace, Some(first.kill()), "stop_timeout = '300ms'");
    // It is killed while the primary runs, not only when the primary ends.
    before.into_iter().for_each(wait_for_end);
    assert_eq!(second.stop().0.code, Some(0));
}

#[test]
fn without_survive_workers_end_with_the_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace, None, "");
    let workers = pids(&primary.report());
    let folder = primary.kill();
    workers.into_iter().for_each(wait_for_end);
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().flatten().map(|file| file.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("workers")), "{left:?}");
}
