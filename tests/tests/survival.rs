//! Workers that outlive the primary that started them, and go on under the next.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::leftovers;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Folder, Launch, Primary};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::{Veth, VethConfig};

const PACKETS: u64 = 600;

fn network() -> Netns {
    Veth::in_namespace(&VethConfig::queues(2)).unwrap().0
}

/// With two workers; in the folder of the primary before, if there was one.
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

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

/// Two workers of which the first is hostile.
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
fn workers_go_on_under_the_next_primary_which_looks_after_them_as_if_they_were_its_own() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
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
        assert_eq!(member.counters["packets"], 2 * counted, "{}: the process counts on", member.id);
    }

    // One that fails is started again, as this primary's own child; the other goes on through one more primary.
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

    // An ordered end is the workers' end, and nothing is left of the note.
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
fn survivors_that_are_dead_or_stuck_are_replaced() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
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
fn survivors_that_the_next_primary_does_not_want_end() {
    let _watchdog = e2e_or_skip!();
    for (config, arguments) in [("survive = false", ""), ("survive = true", "--sleep-per-batch 1ms")] {
        let namespace = network();
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
    let namespace = network();
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
fn one_that_does_not_want_to_end_is_made_to() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let first = start_hostile(&namespace, None, "deaf", "survive = true");
    let before = pids(&first.report());
    let second = start(&namespace, Some(first.kill()), "stop_timeout = '300ms'");
    // While it runs, and not only when it ends.
    before.into_iter().for_each(wait_for_end);
    assert_eq!(second.stop().0.code, Some(0));
}

#[test]
fn without_survive_workers_end_with_their_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let primary = start(&namespace, None, "");
    let workers = pids(&primary.report());
    let folder = primary.kill();
    workers.into_iter().for_each(wait_for_end);
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().flatten().map(|file| file.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("workers")), "{left:?}");
}
