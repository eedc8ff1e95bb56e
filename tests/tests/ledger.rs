//! However a run ends, the ledger balances and nothing is left behind.

use std::net::UdpSocket;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::report::Member;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::generator::{End, Generator, Load};
use xfan_tests::leftovers;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Folder, Launch, Primary};
use xfan_tests::proc::{signal, stop};
use xfan_tests::process::{Exit, Process, binary};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::tx::TxSocket;
use xfan_tests::veth::{Veth, VethConfig, network};

const PACKETS: u64 = 600;

fn frames() -> Vec<Vec<u8>> {
    traffic::synthetic(60, 600, 5).frames
}

fn replay(namespace: &Netns, frames: &[Vec<u8>]) {
    namespace.run(|| Replay::onto("tx0").run(frames)).unwrap();
}

/// Starts a primary with two workers on two queues.
fn start(namespace: &Netns, folder: Folder) -> Primary {
    let launch = Launch::within(namespace, folder).with("-n 2").config("restart = 'no'").unwrap();
    launch.worker("xfan-count", "").unwrap().start().unwrap()
}

/// Waits until no process is left in the namespace, no segment is mapped and no XDP program is
/// attached, so that the queues can be bound: a process takes time to end.
fn wait_until_nothing_is_left(namespace: &Netns) {
    let program = || leftovers::xdp_program(namespace, "rx0").unwrap();
    while !leftovers::processes_in(namespace).is_empty() || program().is_some() {
        std::thread::sleep(Duration::from_millis(5));
    }
    namespace.run(|| [0, 1].map(|queue| TxSocket::open("rx0", queue).unwrap()));
}

/// Before it exits, the primary reaps its workers and detaches the XDP program.
fn assert_nothing_is_left(namespace: &Netns, folder: &Folder) {
    assert_eq!(leftovers::processes_in(namespace), Vec::<String>::new());
    assert_eq!(leftovers::xdp_program(namespace, "rx0").unwrap(), None);
    assert!(!folder.socket().exists());
}

fn assert_ended_well(exit: &Exit) {
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{exit:#?}");
    assert!(!exit.stderr.concat().contains("add up"), "{exit:#?}");
}

#[test]
fn sigint_and_sigterm_end_it_and_leave_nothing() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let mut folder = Folder::new().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // The second run binds the first run's queues at once.
        let primary = start(&namespace, folder);
        assert!(leftovers::xdp_program(&namespace, "rx0").unwrap().is_some());
        assert_eq!(leftovers::processes_in(&namespace).len(), 3);
        replay(&namespace, &frames());
        assert_balanced(&primary.report_after(PACKETS, false), PACKETS);
        let (exit, kept) = primary.end(signal);
        assert_ended_well(&exit);
        assert_eq!(exit.packets(), PACKETS);
        assert_nothing_is_left(&namespace, &kept);
        folder = kept;
    }
    wait_until_nothing_is_left(&namespace);
}

/// Signals that arrive before the primary handles them stay pending, blocked in all threads. A
/// thread that did not block them would end the process, and the socket would stay.
#[test]
fn lanes_block_all_signals() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace, Folder::new().unwrap());
    let threads = std::fs::read_dir(format!("/proc/{}/task", primary.process.pid())).unwrap();
    let mut lanes = 0;
    for thread in threads {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit('\t').next().unwrap().to_owned()
        };
        if field("Name:").starts_with("lane-") {
            let blocked = u64::from_str_radix(&field("SigBlk:"), 16).unwrap();
            for signal in [Signal::SIGINT, Signal::SIGTERM] {
                assert_eq!(blocked >> (signal as u32 - 1) & 1, 1, "{signal} {status}");
            }
            lanes += 1;
        }
    }
    assert_eq!(lanes, 2);
    let (exit, _folder) = primary.stop();
    assert_ended_well(&exit);
}

#[test]
fn truncated_packets_are_counted_and_reported() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace, Folder::new().unwrap());
    let (from, to) = ("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:53".parse().unwrap());
    let whole = traffic::udp(from, to, &[7; 1400]);
    // This is what a driver with short buffers delivers, to queue 0 and to queue 1.
    let cut = whole[..1024].to_vec();
    replay(&namespace, &[whole.clone(), cut.clone(), whole.clone(), cut.clone(), whole, cut]);
    let report = primary.report_after(6, true);
    assert_eq!(report.lanes().map(|lane| lane.cut).sum::<u64>(), 3);
    assert_balanced(&report, 6);
    let mut told = 0;
    for lane in report.lanes().filter(|lane| lane.cut > 0) {
        let queue = format!("queue {}: ", lane.queue);
        let line = primary.process.wait_for_line(&queue).unwrap();
        let (packets, rest) = line.split_once(&queue).unwrap().1.split_once(' ').unwrap();
        assert!(rest.starts_with("packets arrived cut") && rest.contains("frame_size = 4096"), "{line}");
        told += packets.parse::<u64>().unwrap();
    }
    // The next log line, a second later, reports the packets since.
    assert!((1..=3).contains(&told), "{told}");
    assert_ended_well(&primary.stop().0);
}

#[test]
fn a_primary_stops_cleanly_under_a_flood() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace, Folder::new().unwrap());
    let generator =
        namespace.run(|| Generator::start(&Load::onto("tx0", End::After(Duration::MAX)))).unwrap();
    primary.report_when(|report| report.totals().0 > 10_000);
    let (exit, folder) = primary.stop();
    assert_ended_well(&exit);
    assert_nothing_is_left(&namespace, &folder);
    generator.stop().unwrap();
}

#[test]
fn a_worker_that_ignores_sigterm_is_killed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config("stop_timeout = '3s'").unwrap();
    let primary = launch.hostile_worker("deaf").unwrap().start().unwrap();
    replay(&namespace, &frames());
    let report = primary.balanced_report_when(|report| {
        report.totals().0 == PACKETS && report.groups[0].members[1].backlog == 0
    });
    assert_balanced(&report, PACKETS);
    let [deaf, other] = [0, 1].map(|index| report.groups[0].members[index].clone());
    assert_eq!((deaf.backlog, deaf.committed, deaf.backlog + other.committed), (deaf.delivered, 0, PACKETS));
    assert!(deaf.delivered > 0);

    let (exit, folder) = primary.stop();
    assert_ended_well(&exit);
    let stderr = exit.stderr.join("\n");
    let killed = |member: &str| {
        let why = "worker killed: did not end within 3s of SIGTERM";
        exit.stderr.iter().any(|line| line.contains(member) && line.contains(why))
    };
    assert!(killed("default/0") && !killed("default/1"), "{stderr}");
    assert_eq!(exit.packets(), other.committed);
    assert_nothing_is_left(&namespace, &folder);
}

#[test]
fn a_second_signal_kills_remaining_workers() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").config("stop_timeout = '600s'").unwrap();
    let primary = launch.hostile_worker("deaf").unwrap().start().unwrap();
    replay(&namespace, &frames());
    let report = primary
        .report_when(|report| report.totals().0 == PACKETS && report.groups[0].members[1].backlog == 0);
    let other = report.groups[0].members[1].clone();

    kill(primary.process.pid(), Signal::SIGTERM).unwrap();
    primary.report_when(|report| report.groups[0].members[0].state == "draining");
    // The second signal kills all workers that still run, which should be only the deaf one.
    let other_pid = Pid::from_raw(i32::try_from(other.pid).unwrap());
    while kill(other_pid, None).is_ok() {
        thread::sleep(Duration::from_millis(5));
    }
    let (exit, folder) = primary.end(Signal::SIGINT);
    assert_ended_well(&exit);
    let stderr = exit.stderr.join("\n");
    assert!(stderr.contains("worker killed: the primary got a second stop signal"), "{stderr}");
    assert_eq!(exit.packets(), other.committed);
    assert_nothing_is_left(&namespace, &folder);
}

#[test]
fn a_killed_primary_returns_traffic_to_the_kernel() {
    let _watchdog = e2e_or_skip!();
    let (sender, receiver) = (Netns::quiet().unwrap(), Netns::quiet().unwrap());
    Veth::create(&VethConfig::queues(2), &sender, &receiver).unwrap();
    sender.ip("address add 192.0.2.1/24 dev tx0").unwrap();
    receiver.ip("address add 192.0.2.2/24 dev rx0").unwrap();
    let to = receiver.run(|| UdpSocket::bind("192.0.2.2:9")).unwrap();
    let from = sender.run(|| UdpSocket::bind("192.0.2.1:0")).unwrap();
    to.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let knock = || {
        from.send_to(b"knock", "192.0.2.2:9").unwrap();
        to.recv(&mut [0; 8]).is_ok()
    };
    while !knock() {}

    let primary = start(&receiver, Folder::new().unwrap());
    // One more packet may have been in flight; now the workers get them.
    while to.recv(&mut [0; 8]).is_ok() {}
    assert!(!knock());
    primary.report_when(|report| report.totals().0 == 1);
    let generator = sender.run(|| Generator::start(&Load::onto("tx0", End::After(Duration::MAX)))).unwrap();
    primary.report_when(|report| report.totals().0 > 10_000);
    let (exit, folder) = primary.end(Signal::SIGKILL);
    assert_eq!(exit.signal, Some(libc::SIGKILL));
    drop(generator);

    // Its workers end with it; so do the XDP program and the sockets. The socket's file remains.
    wait_until_nothing_is_left(&receiver);
    while !knock() {}

    // The next primary starts at once, despite the old socket file.
    assert!(folder.socket().exists());
    let primary = start(&receiver, folder);
    assert!(!knock());
    assert_balanced(&primary.report_after(1, true), 1);
    let (exit, folder) = primary.stop();
    assert_ended_well(&exit);
    assert_nothing_is_left(&receiver, &folder);
    while !knock() {}
}

#[test]
fn packets_of_a_killed_worker_go_to_the_other() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace, Folder::new().unwrap());
    let frames = frames();
    replay(&namespace, &frames);
    let report = primary.report_after(PACKETS, true);
    let [share, rest] = [0, 1].map(|index| report.groups[0].members[index].committed);
    assert!(share > 0 && rest > 0 && share + rest == PACKETS, "{report:#?}");

    let victim = report.groups[0].members[0].pid;
    stop(victim);
    replay(&namespace, &frames);
    let report = primary.balanced_report_when(|report| {
        report.totals().0 == 2 * PACKETS && report.groups[0].members[1].backlog == 0
    });
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(report.groups[0].members[0].backlog, share);

    signal(victim, Signal::SIGKILL);
    let gone = |member: &Member| member.state == "crashed" && member.backlog == 0;
    let report = primary.balanced_report_when(|report| {
        let [victim, survivor] = [0, 1].map(|index| &report.groups[0].members[index]);
        gone(victim) && survivor.committed == 2 * rest + share
    });
    assert_balanced(&report, 2 * PACKETS);
    let [victim, survivor] = [0, 1].map(|index| &report.groups[0].members[index]);
    assert_eq!((victim.committed, victim.requeued, victim.lost, victim.buckets), (share, share, 0, 0));
    assert_eq!((survivor.delivered, survivor.buckets), (2 * rest + share, 4096));
    assert!(report.lanes().all(|lane| lane.frames.lent == 0));

    // The survivor gets every flow.
    replay(&namespace, &frames);
    let report = primary.report_after(3 * PACKETS, true);
    assert_balanced(&report, 3 * PACKETS);
    assert_eq!(report.groups[0].members[1].committed, 2 * rest + share + PACKETS);
    assert_eq!(report.groups[0].members[0].delivered, 2 * share);
    assert_eq!(report.totals().2, 0, "{report:#?}");
    let (exit, folder) = primary.stop();
    assert_ended_well(&exit);
    assert_eq!(exit.packets(), 2 * rest + share + PACKETS);
    assert_nothing_is_left(&namespace, &folder);
}

#[test]
fn a_primary_without_workers_left_exits_with_an_error() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace, Folder::new().unwrap());
    for member in &primary.report().groups[0].members {
        signal(member.pid, Signal::SIGKILL);
    }
    let socket = primary.socket();
    let exit = primary.process.wait();
    assert_eq!(exit.code, Some(6), "{exit:#?}");
    let stderr = exit.stderr.join("\n");
    assert!(stderr.contains("xfan: no worker is left: the last one, default/"), "{stderr}");
    assert!(stderr.contains("ended (signal: 9 (SIGKILL))"), "{stderr}");
    assert!(!socket.exists());
    wait_until_nothing_is_left(&namespace);
}

#[test]
fn attached_workers_notice_the_primarys_end() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let primary = Launch::on(&namespace).unwrap().with("-n 2").start().unwrap();
        let mut command = namespace.command(binary("xfan-count").unwrap());
        command.arg("--socket").arg(primary.socket());
        let worker = Process::spawn(command).unwrap();
        primary.report_when(|report| report.groups[0].members[0].state == "running");
        replay(&namespace, &frames());
        let report = primary.report_after(PACKETS, true);
        assert_balanced(&report, PACKETS);
        assert_eq!(report.groups[0].members[0].committed, PACKETS);
        assert_eq!(report.groups[0].members[1].state, "vacant");

        let (exit, _folder) = primary.end(signal);
        let worker = worker.wait();
        if signal == Signal::SIGTERM {
            assert_ended_well(&exit);
            assert_eq!(worker.code, Some(0), "{worker:?}");
        } else {
            assert_eq!(worker.code, Some(1), "{worker:?}");
            assert!(worker.stderr.concat().contains("the dispatcher is gone"), "{worker:?}");
        }
        assert_eq!(worker.packets(), PACKETS);
        wait_until_nothing_is_left(&namespace);
    }
}

#[test]
fn packets_longer_than_a_frame_are_counted() {
    let _watchdog = e2e_or_skip!();
    for (mode, mtu) in [("native", 3000), ("generic", 3000)] {
        let namespace = network(2);
        let config = format!("frame_size = 2048\nxdp_mode = '{mode}'");
        let launch = Launch::on(&namespace).unwrap().config(&config).unwrap();
        let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
        for interface in ["tx0", "rx0"] {
            namespace.ip(&format!("link set dev {interface} mtu {mtu}")).unwrap();
        }
        // A frame of 2,048 bytes holds 1,792 bytes beside its headroom.
        let of = |length: usize| {
            traffic::udp("10.0.0.1:7".parse().unwrap(), "10.0.0.2:9".parse().unwrap(), &vec![0; length - 42])
        };
        let lengths = [60, 1792, 1793, 1800, 2048, 3014];
        let frames: Vec<_> = lengths.iter().cycle().take(60).map(|&length| of(length)).collect();
        replay(&namespace, &frames);
        let report = primary.report_after(20, true);
        let count = |field: fn(&xfan::report::Lane) -> u64| report.lanes().map(field).sum::<u64>();
        assert_eq!(count(|lane| lane.xdp.drop_too_long), 40, "{mode}: {report:#?}");
        assert_eq!(count(|lane| lane.kernel.rx_dropped), 0, "{mode}");
        assert_eq!(count(|lane| lane.received), 20, "{mode}");
        let (exit, _folder) = primary.stop();
        assert_ended_well(&exit);
        assert!(exit.stdout.concat().contains("longer than a frame 40"), "{exit:#?}");
    }
}
