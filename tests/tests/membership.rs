//! Workers attach and leave while packets flow, by themselves or on an operator's order.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::generator::{End, Generator, Load};
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::signal;
use xfan_tests::process::{Exit, Process, binary, run_as};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;
use xfan_worker::{Received, Worker};

const PACKETS: u64 = 600;
/// The id of the user and group `daemon`, which every Debian has; the other id has no user.
const DAEMON: u32 = 1;
const STRANGER: u32 = 54_321;

fn member<'a>(report: &'a Report, id: &str) -> &'a Member {
    report.member(id).unwrap_or_else(|| panic!("{id} is not in {report:#?}"))
}

fn is(report: &Report, id: &str, state: &str) -> bool {
    report.member(id).is_some_and(|member| member.state == state)
}

/// Starts `xfan-count --attach` as a user and groups.
fn attach(primary: &Primary, ids: (u32, u32), groups: &[u32]) -> Process {
    let mut command = Command::new(primary.folder().join("xfan-count"));
    command.arg("--attach").arg(primary.socket()).args(["--group", "default"]);
    run_as(&mut command, ids.0, ids.1, groups);
    Process::spawn(command).unwrap()
}

/// Runs `xfan workers …` as root.
fn workers(primary: &Primary, arguments: &str) -> Exit {
    let mut command = Command::new(binary("xfan").unwrap());
    command.arg("workers").args(arguments.split_whitespace()).arg("--socket").arg(primary.socket());
    Process::spawn(command).unwrap().wait()
}

fn ordered(primary: &Primary, arguments: &str) -> Vec<String> {
    let exit = workers(primary, arguments);
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    exit.stdout
}

fn refused(primary: &Primary, arguments: &str) -> String {
    let exit = workers(primary, arguments);
    assert_eq!((exit.code, &exit.stdout), (Some(1), &vec![]), "{exit:#?}");
    exit.stderr.concat()
}

#[test]
fn workers_join_and_leave_under_traffic_without_loss() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "[control]\nallow_users = ['daemon']";
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config(config).unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let load = Load { frames_per_second: Some(100_000), ..Load::onto("tx0", End::After(Duration::MAX)) };
    let generator = namespace.run(|| Generator::start(&load)).unwrap();
    primary.report_when(|report| report.totals().0 > 1000);
    assert_eq!(primary.report().groups[0].members.len(), 1, "members that never had a worker are not shown");

    let first = attach(&primary, (DAEMON, DAEMON), &[]);
    let report = primary.report_when(|report| is(report, "default/1", "running"));
    assert_eq!((member(&report, "default/0").buckets, member(&report, "default/1").buckets), (2048, 2048));
    assert!(!member(&report, "default/1").supervised && member(&report, "default/0").supervised);
    let second = attach(&primary, (DAEMON, DAEMON), &[]);
    let report = primary.report_when(|report| is(report, "default/2", "running"));
    let buckets: Vec<_> = report.groups[0].members.iter().map(|member| member.buckets).collect();
    assert_eq!((buckets.iter().sum::<usize>(), buckets.iter().max()), (4096, Some(&1366)));
    primary.report_when(|report| {
        report.groups[0].members.iter().all(|member| member.committed > 1000 && member.delivered > 2000)
    });

    // One worker leaves by itself, the other on an order; both members are vacant again.
    let first = first.end(Signal::SIGTERM);
    assert_eq!(first.code, Some(0), "{first:#?}");
    assert_eq!(ordered(&primary, "drain default/2"), ["default/2"]);
    let second = second.wait();
    assert_eq!(second.code, Some(0), "{second:#?}");
    let report =
        primary.report_when(|report| is(report, "default/1", "vacant") && is(report, "default/2", "vacant"));
    assert_eq!(member(&report, "default/0").buckets, 4096);
    let taken = report.totals().0;
    primary.report_when(|report| report.totals().0 > taken + 1000);

    let sent = generator.stop().unwrap().sent;
    let report = primary.report_after(sent, true);
    assert_balanced(&report, sent);
    for member in &report.groups[0].members {
        assert_eq!((member.lost, member.requeued), (0, 0), "{member:#?}");
    }
    assert_eq!(report.groups[0].lanes.iter().map(|lane| lane.dropped["no_worker"]).sum::<u64>(), 0);
    assert_eq!(first.packets(), member(&report, "default/1").committed);
    assert_eq!(second.packets(), member(&report, "default/2").committed);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn workers_are_added_drained_restarted_and_removed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config("max_workers = 3").unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let shares = || {
        let report = primary.report();
        report.groups[0].members.iter().map(|member| member.buckets).collect::<Vec<_>>()
    };

    assert_eq!(ordered(&primary, "add 2"), ["default/1", "default/2"]);
    assert_eq!(shares().iter().sum::<usize>(), 4096);
    assert!(shares().iter().all(|&share| share >= 1365));
    let answer = refused(&primary, "add");
    assert!(answer.contains("0 of 3 members are vacant") && answer.contains("max_workers"), "{answer}");
    send_synthetic(&namespace, 7);
    let before = primary.report_after(PACKETS, true);
    assert!(before.groups[0].members.iter().all(|member| member.committed > 0));

    assert_eq!(ordered(&primary, "drain default/1"), ["default/1"]);
    let report = primary.report();
    let drained = member(&report, "default/1");
    assert_eq!((drained.state.as_str(), drained.pid, drained.buckets), ("stopped", 0, 0));
    assert_eq!(drained.last_exit.as_deref(), Some("exit status: 0"));
    assert!(refused(&primary, "drain default/1").contains("member default/1 has no worker"));

    // Restarts a running member and a drained one.
    for id in ["default/0", "default/1"] {
        let restarts = member(&primary.report(), id).restarts;
        assert_eq!(ordered(&primary, &format!("restart {id}")), [id]);
        let report = primary.report();
        let member_now = member(&report, id);
        assert_eq!((member_now.state.as_str(), member_now.restarts), ("running", restarts + 1));
        assert_ne!(member_now.pid, member(&before, id).pid);
    }

    // Once a member is removed, even a drained one, any worker may take it.
    assert_eq!(ordered(&primary, "drain default/2"), ["default/2"]);
    assert_eq!(ordered(&primary, "remove default/2"), ["default/2"]);
    let gone = member(&primary.report(), "default/2").clone();
    assert_eq!((gone.state.as_str(), gone.supervised), ("vacant", false));
    let guest = attach(&primary, (0, 0), &[]);
    primary.report_when(|report| is(report, "default/2", "running"));
    assert!(refused(&primary, "restart default/2").contains("was not started by xfan"));
    assert!(
        refused(&primary, "remove default/9")
            .contains("there is no member default/9: they are default/0 to default/2")
    );
    assert_eq!(ordered(&primary, "remove default/2"), ["default/2"]);
    assert_eq!(guest.wait().code, Some(0));

    let list = ordered(&primary, "list").join("\n");
    assert!(list.contains("default/1") && list.contains("running") && list.contains("vacant"), "{list}");
    let list: Vec<Member> = serde_json::from_str(&ordered(&primary, "list --json").concat()).unwrap();
    assert_eq!(list.len(), 3);

    send_synthetic(&namespace, 7);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(report.totals(), (2 * PACKETS, 2 * PACKETS, 0));
    assert!(report.groups[0].members.iter().all(|member| member.lost + member.requeued == 0));

    // With all members drained the primary continues and counts the drops.
    for id in ["default/0", "default/1"] {
        assert_eq!(ordered(&primary, &format!("drain {id}")), [id]);
    }
    send_synthetic(&namespace, 7);
    let report = primary.report_after(3 * PACKETS, true);
    assert_eq!(report.groups[0].lanes.iter().map(|lane| lane.dropped["no_worker"]).sum::<u64>(), PACKETS);
    assert_eq!(ordered(&primary, "restart default/0"), ["default/0"]);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_worker_that_ignores_a_drain_is_killed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config("stop_timeout = '300ms'").unwrap();
    let primary = launch.hostile_worker("deaf").unwrap().start().unwrap();
    send_synthetic(&namespace, 7);
    let settled = |report: &Report| report.totals().0 == PACKETS && member(report, "default/1").backlog == 0;
    let held = member(&primary.report_when(settled), "default/0").backlog;
    assert!(held > 0);
    assert_eq!(ordered(&primary, "drain default/0"), ["default/0"]);
    let report = primary.report_after(PACKETS, true);
    let deaf = member(&report, "default/0");
    assert_eq!((deaf.requeued, deaf.lost, deaf.state.as_str()), (held, 0, "stopped"));
    assert_eq!(deaf.last_exit.as_deref(), Some("signal: 9 (SIGKILL)"));
    assert_eq!(member(&report, "default/1").committed, PACKETS);
    assert_balanced(&report, PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn unauthorized_requests_are_refused_and_counted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "[control]\nallow_groups = ['daemon']";
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config(config).unwrap();
    launch.within_reach("xfan-count").unwrap();
    let tool = launch.within_reach("xfan").unwrap();
    let primary = launch.start().unwrap();

    let stranger = attach(&primary, (STRANGER, STRANGER), &[]).wait();
    assert_eq!(stranger.code, Some(1), "{stranger:#?}");
    let why = "user id 54321 may not use this control socket: only root, the workers' user, and the users in allow_users and \
               allow_groups in [control] of its configuration may";
    assert!(stranger.stderr.concat().contains(why), "{stranger:#?}");
    let control = primary.report().control;
    assert_eq!((control.forbidden, control.too_many, control.malformed), (1, 0, 0));

    // The group is the first of the process or a supplementary one.
    for (ids, groups) in [((STRANGER, DAEMON), vec![]), ((STRANGER, STRANGER), vec![4, DAEMON])] {
        let guest = attach(&primary, ids, &groups);
        primary.report_when(|report| is(report, "default/0", "running"));
        let exit = guest.end(Signal::SIGTERM);
        assert_eq!(exit.code, Some(0), "{exit:#?}");
        primary.report_when(|report| is(report, "default/0", "vacant"));
    }

    // Permission to attach is not permission to give orders.
    let mut command = Command::new(&tool);
    command.args(["workers", "add", "--socket"]).arg(primary.socket()).uid(STRANGER).gid(DAEMON);
    let exit = Process::spawn(command).unwrap().wait();
    assert_eq!(exit.code, Some(3), "{exit:#?}");
    assert!(
        exit.stderr.concat().contains("only root may add, drain, restart or remove workers"),
        "{exit:#?}"
    );
    let answer = refused(&primary, "add");
    assert!(answer.contains("has no command to start workers with"), "{answer}");

    let mut wrong = Command::new(primary.folder().join("xfan-count"));
    wrong.arg("--attach").arg(primary.socket()).args(["--group", "ids"]);
    let exit = Process::spawn(wrong).unwrap().wait();
    assert!(exit.stderr.concat().contains("there is no group ids: the only one is default"), "{exit:#?}");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_guest_reconnects_to_the_next_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2");
    launch.within_reach("xfan-count").unwrap();
    let first = launch.start().unwrap();
    let mut command = Command::new(first.folder().join("xfan-count"));
    command.arg("--attach").arg(first.socket()).args(["--member", "default/1", "--reconnect"]);
    let worker = Process::spawn(command).unwrap();
    first.report_when(|report| is(report, "default/1", "running"));
    send_synthetic(&namespace, 7);
    first.report_after(PACKETS, true);
    let pid = member(&first.report(), "default/1").pid;

    let (exit, folder) = first.end(Signal::SIGKILL);
    assert_eq!(exit.signal, Some(9));
    let second = Launch::within(&namespace, folder).with("-n 2").start().unwrap();
    let report = second.balanced_report_when(|report| is(report, "default/1", "running"));
    assert_eq!(member(&report, "default/1").pid, pid, "the same process is the same member");
    send_synthetic(&namespace, 7);
    let report = second.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert_eq!(member(&report, "default/1").committed, PACKETS);
    // A worker told to leave while there is no primary does not wait for one.
    let (exit, _folder) = second.end(Signal::SIGKILL);
    assert_eq!(exit.signal, Some(9));
    let exit = worker.end(Signal::SIGTERM);
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(exit.packets(), 2 * PACKETS);
}

#[test]
fn ten_thousand_joins_leave_nothing_behind() {
    let _watchdog = e2e_or_skip!(900);
    let namespace = network(2);
    let config = "ring_slots = 64\n[log]\nlevel = 'error'";
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config(config).unwrap();
    let primary = launch.start_until_it_answers().unwrap();
    let pid = primary.process.pid();
    let read = |file: &str| {
        let mut text = String::new();
        std::fs::File::open(format!("/proc/{pid}/{file}")).unwrap().read_to_string(&mut text).unwrap();
        text
    };
    let segments = || read("maps").lines().filter(|line| line.contains("memfd:xfan-")).count();
    let descriptors = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let resident = || {
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let join = || {
        let mut worker = Worker::builder().socket(primary.socket()).attach().unwrap();
        worker.request_detach().unwrap();
        while !matches!(worker.recv(Duration::from_millis(100)).unwrap(), Received::Closed) {}
        drop(worker);
    };
    let at_rest = || primary.report_when(|report| report.groups[0].members[0].state == "vacant");
    at_rest();
    // The last connection may still be closing.
    let before = loop {
        let count = descriptors();
        std::thread::sleep(Duration::from_millis(50));
        if descriptors() == count {
            break count;
        }
    };
    let mut early = 0;
    for number in 0..10_000 {
        join();
        at_rest();
        if number == 1000 {
            early = resident();
        }
    }
    while descriptors() > before {
        std::thread::yield_now();
    }
    assert_eq!(segments(), 0);
    let late = resident();
    assert!(late < early + 1024, "{early} KiB after 1,000 joins, {late} KiB after 10,000");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn the_event_history_is_complete() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "restart_delay = '1ms'\n[control]\nallow_users = ['daemon']";
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config(config).unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let events = |follow: bool| {
        let mut command = Command::new(binary("xfan").unwrap());
        command.args(["events", "--json", "--socket"]).arg(primary.socket());
        command.args(follow.then_some("--follow"));
        Process::spawn(command).unwrap()
    };
    let follower = events(true);
    let first = primary.report().groups[0].members[0].clone();
    assert!(first.resident_bytes > 0 && first.in_state_ns > 0);
    signal(first.pid, Signal::SIGKILL);
    primary.report_when(|report| {
        report.groups[0].members[0].restarts == 1 && is(report, "default/0", "running")
    });
    let guest = attach(&primary, (DAEMON, DAEMON), &[]);
    primary.report_when(|report| is(report, "default/1", "running"));
    ordered(&primary, "drain default/1");
    assert_eq!(guest.wait().code, Some(0));

    let shown = events(false).wait();
    assert_eq!(shown.code, Some(0), "{shown:#?}");
    let parse = |line: &String| serde_json::from_str::<xfan::control::history::Entry>(line).unwrap();
    let entries: Vec<_> = shown.stdout.iter().map(parse).collect();
    assert!(entries.iter().map(|entry| entry.number).eq(1..=entries.len() as u64));
    assert!(entries.is_sorted_by_key(|entry| entry.time_ns));
    let of = |id: Option<&str>| {
        let ours = entries.iter().filter(|entry| entry.member.as_deref() == id);
        let mut events: Vec<_> = ours.map(|entry| entry.event.as_str()).collect();
        // Its connection and its process may end as two events, which are then two entries.
        events.dedup();
        events
    };
    assert_eq!(of(None), ["running", "ordered"]);
    assert_eq!(of(Some("default/0")), ["started", "attached", "died", "started", "attached"]);
    let deaths: Vec<_> = entries.iter().filter(|entry| entry.event == "died").collect();
    assert!(deaths.iter().any(|entry| entry.detail.contains("signal: 9 (SIGKILL)")), "{deaths:#?}");
    assert_eq!(of(Some("default/1")), ["attached", "draining", "vacated"]);

    follower.wait_for_line("vacated").unwrap();
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let followed = follower.wait();
    assert_eq!(followed.code, Some(0), "{followed:#?}");
    assert!(followed.stdout.starts_with(&shown.stdout), "{followed:#?}");
}

#[test]
fn without_workers_packets_pass_to_the_kernel() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 1").config("on_empty = 'pass'").unwrap();
    launch.within_reach("xfan-count").unwrap();
    let primary = launch.start_until_it_answers().unwrap();
    let told = |event: &str, times: usize| {
        let count = || primary.history().entries.iter().filter(|entry| entry.event == event).count();
        while count() != times {
            std::thread::yield_now();
        }
    };
    let passed = |report: &Report| report.lanes().map(|lane| lane.xdp.pass_no_socket).sum::<u64>();

    send_synthetic(&namespace, 7);
    let report = primary.balanced_report_when(|report| passed(report) == PACKETS);
    assert_balanced(&report, 0);
    let guest = attach(&primary, (0, 0), &[]);
    told("running", 1);
    send_synthetic(&namespace, 7);
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert_eq!((report.totals(), passed(&report)), ((PACKETS, PACKETS, 0), PACKETS));
    // The reason for the worker's end makes no difference.
    assert_eq!(guest.end(Signal::SIGKILL).signal, Some(9));
    told("empty", 1);
    send_synthetic(&namespace, 7);
    let report = primary.balanced_report_when(|report| passed(report) == 2 * PACKETS);
    assert_balanced(&report, PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}
