//! Workers that crash or hang: other workers get their packets, and xfan restarts them.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use xfan::control::client;
use xfan::report::{Member, Report};
use xfan_shm::protocol::{Reply, Request, WorkersOrder};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::leftovers::state;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::{exists, pid_of, signal, stop, wait_until};
use xfan_tests::process::{Process, binary};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

fn start(config: &str) -> (Netns, Primary) {
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config(config).unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    (namespace, primary)
}

fn member(report: &Report, index: usize) -> &Member {
    &report.groups[0].members[index]
}

/// The events of the first member.
fn life_of_the_first(primary: &Primary) -> Vec<String> {
    let its =
        primary.history().entries.into_iter().filter(|entry| entry.member.as_deref() == Some("default/0"));
    its.map(|entry| entry.event).collect()
}

fn committed(report: &Report) -> u64 {
    report.groups[0].members.iter().map(|member| member.committed).sum()
}

#[test]
fn a_killed_worker_is_restarted_with_its_share() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("hash_key = '000102030405060708090a0b0c0d0e0f'");
    send_synthetic(&namespace, 5);
    let before = primary.report_after(PACKETS, true);
    assert_balanced(&before, PACKETS);
    let share = member(&before, 0).committed;
    assert!(share > 0 && share < PACKETS);

    signal(pid_of(&before, 0), Signal::SIGKILL);
    let again = |member: &Member| member.restarts == 1 && member.state == "running";
    let report = primary.balanced_report_when(|report| again(member(report, 0)));
    assert_ne!(member(&report, 0).pid, member(&before, 0).pid);
    assert_eq!(member(&report, 0).last_exit.as_deref(), Some("signal: 9 (SIGKILL)"));
    assert_eq!((member(&report, 0).buckets, member(&report, 1).buckets), (2048, 2048));
    send_synthetic(&namespace, 5);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(committed(&report), 2 * PACKETS);
    // It has half of the buckets again, though perhaps not the same ones.
    assert!(member(&report, 0).committed > share);
    assert_eq!((member(&report, 0).lost, member(&report, 0).requeued), (0, 0));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_hung_worker_is_replaced_and_its_packets_requeued() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("hang_timeout = '1s'");
    let before = primary.report();
    stop(pid_of(&before, 0));
    send_synthetic(&namespace, 5);
    let report = primary.balanced_report_when(|report| {
        member(report, 0).hangs == 1 && member(report, 0).state == "running" && committed(report) == PACKETS
    });
    assert_balanced(&report, PACKETS);
    let hung = member(&report, 0);
    assert_eq!((hung.restarts, hung.committed, hung.lost), (1, 0, 0));
    assert!(hung.requeued > 0 && hung.requeued == hung.delivered);
    assert_eq!(member(&report, 1).committed, PACKETS);
    assert_eq!(member(&report, 1).hangs, 0, "having no packets is not hanging");

    send_synthetic(&namespace, 5);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(committed(&report), 2 * PACKETS);
    assert!(member(&report, 0).committed > 0);
    let life = life_of_the_first(&primary);
    let position = |event: &str| life.iter().position(|entry| entry == event).expect(event);
    assert!(position("stalled") < position("hung") && position("hung") < position("died"), "{life:?}");

    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(
        exit.stderr.join("\n").contains("worker hangs: it has packets and has committed none for"),
        "{exit:#?}"
    );
}

#[test]
fn a_hung_guest_reads_no_packets_after_its_eviction() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("hang_timeout = '1s'\nrestart = 'no'");
    let mut command = Command::new(binary("xfan-count").unwrap());
    command.arg("--attach").arg(primary.socket());
    let guest = Process::spawn(command).unwrap();
    let pid = guest.pid().as_raw().cast_unsigned();
    let report =
        primary.report_when(|report| report.groups[0].members.iter().any(|member| member.pid == pid));
    stop(pid_of(&report, 2));
    send_synthetic(&namespace, 5);
    let report =
        primary.balanced_report_when(|report| member(report, 2).hangs == 1 && committed(report) == PACKETS);
    assert_eq!(member(&report, 2).state, "crashed");
    assert!(member(&report, 2).requeued > 0 && member(&report, 2).committed == 0);
    // By now the frames of its former packets hold other packets.
    send_synthetic(&namespace, 5);
    primary.report_after(2 * PACKETS, true);
    signal(pid, Signal::SIGCONT);
    let exit = guest.wait();
    assert_eq!(exit.code, Some(1), "{exit:#?}");
    assert!(exit.stderr.concat().contains("has ended this worker's membership"), "{exit:#?}");
    assert!(exit.stdout.concat().contains("\"packets\":0"), "{exit:#?}");
    assert_eq!(committed(&primary.report()), 2 * PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_worker_that_hides_from_signals_is_killed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "stop_timeout = '300ms'\nhang_timeout = '1s'\nrestart = 'no'";
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config(config).unwrap();
    let primary = launch.hostile_worker("deaf --hidden").unwrap().start().unwrap();
    send_synthetic(&namespace, 5);
    let report = primary
        .balanced_report_when(|report| member(report, 0).last_exit.is_some() && committed(report) == PACKETS);
    assert_eq!((member(&report, 0).hangs, member(&report, 0).committed), (1, 0));
    assert_eq!(member(&report, 0).last_exit.as_deref(), Some("signal: 9 (SIGKILL)"));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_worker_that_exits_leaves_its_share_to_the_other() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config("restart = 'on-failure'").unwrap();
    // The worker's child keeps the connection open.
    let primary = launch.hostile_worker("fork").unwrap().start().unwrap();
    send_synthetic(&namespace, 5);
    signal(pid_of(&primary.report(), 0), Signal::SIGUSR1);
    let report = primary.balanced_report_when(|report| member(report, 0).last_exit.is_some());
    assert_eq!((member(&report, 0).state.as_str(), member(&report, 0).buckets), ("stopped", 0));
    assert_eq!(member(&report, 1).buckets, 4096);
    send_synthetic(&namespace, 5);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!((member(&report, 1).committed, member(&report, 0).lost), (2 * PACKETS, 0));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_worker_that_crashes_too_often_stays_down() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) =
        start("restart_delay = '1ms'\nstart_limit_burst = 3\nstart_limit_interval = '600s'");
    for restarts in 0..3 {
        let report = primary.report_when(|report| {
            member(report, 0).restarts == restarts && member(report, 0).state == "running"
        });
        signal(pid_of(&report, 0), Signal::SIGKILL);
    }
    let report = primary.balanced_report_when(|report| member(report, 0).state == "failed");
    assert_eq!((member(&report, 0).restarts, member(&report, 0).buckets), (2, 0));
    assert_eq!(member(&report, 1).buckets, 4096);
    send_synthetic(&namespace, 5);
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert_eq!(member(&report, 1).committed, PACKETS);

    // When all workers stay down, the primary ends.
    for restarts in 0..3 {
        let report = primary.report_when(|report| {
            member(report, 1).restarts == restarts && member(report, 1).state == "running"
        });
        signal(pid_of(&report, 1), Signal::SIGKILL);
    }
    let exit = primary.process.wait();
    assert_eq!(exit.code, Some(6), "{exit:#?}");
    let stderr = exit.stderr.join("\n");
    assert_eq!(stderr.matches("stays down: started 3 times within 600s").count(), 2, "{stderr}");
    assert!(stderr.contains("no worker is left: the last one, default/1"), "{stderr}");
}

#[test]
fn a_lone_workers_packets_are_lost_when_it_dies() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let before = primary.report();
    stop(pid_of(&before, 0));
    send_synthetic(&namespace, 5);
    primary.report_when(|report| member(report, 0).backlog == PACKETS);
    signal(pid_of(&before, 0), Signal::SIGKILL);
    let report = primary.balanced_report_when(|report| {
        member(report, 0).restarts == 1 && member(report, 0).state == "running"
    });
    assert_balanced(&report, PACKETS);
    assert_eq!((member(&report, 0).lost, member(&report, 0).requeued), (PACKETS, 0));
    send_synthetic(&namespace, 5);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(member(&report, 0).committed, PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn held_packets_wait_for_the_workers_successor() {
    let _watchdog = e2e_or_skip!();
    let key = "hash_key = '000102030405060708090a0b0c0d0e0f'";
    let (namespace, primary) =
        start(&format!("{key}\non_loss = 'hold'\nhold_timeout = '600s'\nrestart_delay = '1s'"));
    let before = primary.report();
    stop(pid_of(&before, 0));
    send_synthetic(&namespace, 5);
    let seen = primary.report_after(PACKETS, false);
    let had = member(&seen, 0).backlog;
    assert!(had > 0 && had < PACKETS);

    signal(pid_of(&before, 0), Signal::SIGKILL);
    primary.report_when(|report| member(report, 0).held);
    // Its flows keep waiting.
    send_synthetic(&namespace, 5);
    let report = primary.balanced_report_when(|report| {
        member(report, 0).restarts == 1 && committed(report) == 2 * PACKETS && !member(report, 0).held
    });
    assert_balanced(&report, 2 * PACKETS);
    let (first, second) = (member(&report, 0), member(&report, 1));
    assert_eq!((first.committed, first.requeued, first.lost, first.dropped), (2 * had, 0, 0, 0));
    assert_eq!((second.committed, second.delivered), (2 * (PACKETS - had), 2 * (PACKETS - had)));
    assert_eq!((first.buckets, second.buckets), (2048, 2048));
    let life = life_of_the_first(&primary);
    let position = |event: &str| life.iter().position(|entry| entry == event).expect(event);
    assert!(position("died") < position("held") && position("held") < position("resumed"), "{life:?}");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn held_packets_are_released_by_timeout_or_order() {
    let _watchdog = e2e_or_skip!();
    // The successor is late, is not due, or an operator drains the member.
    for (config, drain) in [
        ("hold_timeout = '200ms'\nrestart_delay = '60s'", false),
        ("hold_timeout = '600s'\nrestart = 'no'", false),
        ("hold_timeout = '600s'\nrestart_delay = '60s'", true),
    ] {
        let (namespace, primary) = start(&format!("on_loss = 'hold'\n{config}"));
        let before = primary.report();
        stop(pid_of(&before, 0));
        send_synthetic(&namespace, 5);
        let seen = primary.report_after(PACKETS, false);
        let had = member(&seen, 0).backlog;
        assert!(had > 0);
        signal(pid_of(&before, 0), Signal::SIGKILL);
        if drain {
            let report = primary.report_when(|report| member(report, 0).held);
            assert_eq!((member(&report, 0).backlog, member(&report, 0).requeued), (had, 0));
            let order = Request::Workers(WorkersOrder::Drain("default/0".into()));
            assert_eq!(
                client::ask(&primary.socket(), &order).unwrap(),
                Reply::Ordered(vec!["default/0".into()])
            );
        }
        let report = primary.balanced_report_when(|report| committed(report) == PACKETS);
        assert_balanced(&report, PACKETS);
        assert_eq!((member(&report, 0).requeued, member(&report, 0).lost), (had, 0));
        assert_eq!((member(&report, 1).committed, member(&report, 1).buckets), (PACKETS, 4096));
        assert!(!member(&report, 0).held);
        assert_eq!(primary.stop().0.code, Some(0));
    }
}

#[test]
fn held_packets_go_to_the_next_worker_that_joins() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "on_loss = 'hold'\nhold_timeout = '600s'\non_empty = 'pass'";
    let primary = Launch::on(&namespace)
        .unwrap()
        .with("-n 3")
        .config(config)
        .unwrap()
        .start_until_it_answers()
        .unwrap();
    let guest = |name: Option<&str>| {
        let mut command = Command::new(binary("xfan-count").unwrap());
        command.arg("--attach").arg(primary.socket()).args(name.iter().flat_map(|name| ["--member", name]));
        Process::spawn(command).unwrap()
    };
    let running =
        |report: &Report| report.groups[0].members.iter().filter(|member| member.state == "running").count();
    let mut guests = vec![guest(Some("default/1")), guest(Some("default/2"))];
    let before = primary.report_when(|report| running(report) == 2);
    let victims: Vec<u32> = [1, 2].map(|index| member(&before, index).pid).into();
    for index in [1, 2] {
        stop(pid_of(&before, index));
    }
    send_synthetic(&namespace, 5);
    let seen = primary.report_after(PACKETS, false);
    let had = [1, 2].map(|index| member(&seen, index).backlog);
    assert_eq!(had[0] + had[1], PACKETS);
    for pid in victims {
        signal(pid, Signal::SIGKILL);
    }
    primary.report_when(|report| member(report, 1).held && member(report, 2).held);
    // One guest names its member; the other gets the member with held packets, not an unused one.
    guests.push(guest(Some("default/2")));
    let report = primary.balanced_report_when(|report| member(report, 2).committed == had[1]);
    assert!(member(&report, 1).held && member(&report, 1).backlog == had[0]);
    guests.push(guest(None));
    let report = primary.balanced_report_when(|report| committed(report) == PACKETS);
    assert_eq!([1, 2].map(|index| member(&report, index).committed), had);
    assert!(
        report.groups[0]
            .members
            .iter()
            .all(|member| (member.requeued, member.lost, member.held) == (0, 0, false))
    );
    assert_eq!(member(&report, 0).delivered, 0);
    assert_balanced(&report, PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
    for guest in guests.drain(2..) {
        assert_eq!(guest.wait().code, Some(0));
    }
}

#[test]
fn held_packets_go_to_the_others_at_shutdown() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("on_loss = 'hold'\nhold_timeout = '600s'\nrestart_delay = '60s'");
    let before = primary.report();
    stop(pid_of(&before, 0));
    send_synthetic(&namespace, 5);
    let seen = primary.report_after(PACKETS, false);
    signal(pid_of(&before, 0), Signal::SIGKILL);
    primary.report_when(|report| member(report, 0).held);
    let (exit, _) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let sum: u64 = exit.json().iter().filter_map(|line| line["packets"].as_u64()).sum();
    assert_eq!(sum, PACKETS, "{} of them were held: {exit:#?}", member(&seen, 0).backlog);
}

#[test]
fn packets_of_several_go_straight_to_the_survivor() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "on_loss = 'hold'\nhold_timeout = '600s'\nrestart_delay = '60s'\nstop_timeout = '60s'";
    let launch = Launch::on(&namespace).unwrap().with("-n 3").config(config).unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let before = primary.report();
    for index in [0, 1] {
        stop(pid_of(&before, index));
    }
    send_synthetic(&namespace, 5);
    let seen = primary.report_after(PACKETS, false);
    let had = [0, 1].map(|index| member(&seen, index).backlog);
    for index in [0, 1] {
        signal(pid_of(&before, index), Signal::SIGKILL);
    }
    primary.report_when(|report| member(report, 0).held && member(report, 1).held);
    let (exit, _) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    // Neither got the other's packets. The last table has the columns member, pid, core, state,
    // delivered, …
    for (index, had) in had.iter().enumerate() {
        let line = exit.stdout.iter().find(|line| line.starts_with(&format!("default/{index} "))).unwrap();
        assert_eq!(line.split_whitespace().nth(4), Some(&*had.to_string()), "{line}");
    }
    let last = exit.json().into_iter();
    let counted: Vec<_> = last.filter_map(|line| line["packets"].as_u64()).collect();
    assert_eq!(counted, [PACKETS]);
}

#[test]
fn a_worker_that_keeps_reattaching_is_stopped() {
    let _watchdog = e2e_or_skip!();
    for policy in ["requeue", "hold"] {
        let namespace = network(2);
        let config = format!("on_loss = '{policy}'\nhold_timeout = '600s'\nstart_limit_interval = '600s'");
        let launch = Launch::on(&namespace).unwrap().with("-n 2").config(&config).unwrap();
        let primary = launch.hostile_worker("again").unwrap().start().unwrap();
        signal(pid_of(&primary.report(), 0), Signal::SIGUSR1);
        let report = primary.balanced_report_when(|report| member(report, 0).state == "failed");
        assert_eq!((member(&report, 0).buckets, member(&report, 1).buckets), (0, 4096));
        assert_eq!((member(&report, 0).pid, member(&report, 0).restarts), (0, 4));
        assert!(!member(&report, 0).held);
        send_synthetic(&namespace, 5);
        let report = primary.report_after(PACKETS, true);
        assert_balanced(&report, PACKETS);
        assert_eq!(member(&report, 1).committed, PACKETS);
        assert_eq!(primary.stop().0.code, Some(0));
    }
}

/// A PATH that takes so long to search that a new process can be stopped meanwhile.
fn long_path(last: &Path) -> String {
    // A variable has at most 128 KiB.
    format!("{}{}:{}", "/0:".repeat(38_000), last.display(), std::env::var("PATH").unwrap())
}

#[test]
fn a_worker_that_stops_new_processes_stops_nobody_else() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("restart_delay = '100ms'").unwrap();
    let launch = launch.with("-n 2").hostile_worker("stopper").unwrap();
    let program = launch.within_reach("xfan-hostile").unwrap();
    let folder = launch.folder().to_owned();
    let primary = launch
        .start_with(|command| {
            let searched = |argument: &OsStr| {
                if argument == program { "xfan-hostile".into() } else { argument.to_owned() }
            };
            let arguments: Vec<_> = command.get_args().map(searched).collect();
            *command = namespace.command(binary("xfan").unwrap());
            command.args(arguments).env_remove("SUDO_UID").env("PATH", long_path(&folder));
        })
        .unwrap();
    primary.unleash();
    let killed = pid_of(&primary.report(), 1);
    signal(killed, Signal::SIGKILL);
    primary.printed("stopped ");
    primary.process.wait_for_line("was stopped by a signal before it ran its program").unwrap();
    primary.report_when(|report| member(report, 1).state == "running" && pid_of(report, 1) != killed);
    send_synthetic(&namespace, 5);
    assert_balanced(&primary.report_after(PACKETS, false), PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_death_that_a_tracer_hides_is_noticed() {
    let _watchdog = e2e_or_skip!();
    let (_namespace, primary) = start("restart_delay = '100ms'");
    let traced = pid_of(&primary.report(), 0);
    // While this thread traces the worker and does not wait for it, nobody else can.
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: the pointers are null.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, traced.cast_signed(), none, none) };
    assert_eq!(seized, 0, "{}", std::io::Error::last_os_error());
    signal(traced, Signal::SIGKILL);
    let again = |member: &Member| member.restarts == 1 && member.state == "running";
    let report = primary.report_when(|report| again(member(report, 0)));
    assert_eq!(member(&report, 0).last_exit.as_deref(), Some("status unknown"));
    assert_eq!(state(traced), Some('Z'));
    // SAFETY: the pointers are null.
    unsafe { libc::waitpid(traced.cast_signed(), std::ptr::null_mut(), libc::__WALL) };
    wait_until(|| !exists(traced));
    assert_eq!(primary.stop().0.code, Some(0));
}
