//! Overload: a slow worker loses its own packets and nobody else's, and every packet is accounted for.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::generator::{self, End, Load};
use xfan_tests::leftovers;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::process::Exit;
use xfan_tests::traffic;
use xfan_tests::tx::TxSocket;
use xfan_tests::veth::{Veth, VethConfig};

/// Slots of each ring in these tests.
const SLOTS: u64 = 256;
/// Frames sent at once: fewer than a ring has slots, so that whoever keeps up has room for all of them.
const CHUNK: usize = 200;
/// Small rings, and the same flows to the same workers in every run.
const CONFIG: &str = "ring_slots = 256\nhash_key = '000102030405060708090a0b0c0d0e0f'\nstop_timeout = '5s'";

fn network(queues: u32) -> Netns {
    Veth::in_namespace(&VethConfig::queues(queues)).unwrap().0
}

fn members(report: &Report) -> [&Member; 2] {
    report.groups[0].members.iter().collect::<Vec<_>>().try_into().unwrap()
}

/// Sends all frames through each socket, and waits after each chunk until `fast` has committed all it got.
fn send(primary: &Primary, sockets: &mut [TxSocket], frames: &[Vec<u8>], fast: &[usize]) {
    for chunk in frames.chunks(CHUNK) {
        let before: u64 = primary.report().lanes().map(|lane| lane.xdp.redirect).sum();
        for socket in &mut *sockets {
            chunk.iter().for_each(|frame| socket.send(frame).unwrap());
            socket.finish().unwrap();
        }
        let sent = before + (chunk.len() * sockets.len()) as u64;
        primary.report_when(|report| {
            report.totals().0 == sent && fast.iter().all(|&place| members(report)[place].backlog == 0)
        });
    }
}

/// A worker for `launch` that is `xfan-count`, with `arguments` if it is the first member.
fn first_member_with(launch: &Launch<'_>, arguments: &str) -> PathBuf {
    let count = launch.within_reach("xfan-count").unwrap();
    let count = count.display().to_string();
    let script = format!(
        "#!/bin/sh\ncase $XFAN_MEMBER in\n*/0) exec {count} {arguments} ;;\n*) exec {count} ;;\nesac\n"
    );
    let path = launch.folder().join("worker.sh");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What a member's `xfan-count` printed in the end.
fn counted(exit: &Exit, member: &str) -> u64 {
    let totals = exit.json().into_iter();
    let totals: Vec<_> = totals.filter(|totals| totals["member"] == member).collect();
    assert_eq!(totals.len(), 1, "{exit:#?}");
    totals[0]["packets"].as_u64().unwrap()
}

#[test]
fn a_worker_that_sleeps_drops_only_its_own_packets() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap().config(CONFIG).unwrap().with("-n 2");
    let worker = first_member_with(&launch, "--sleep-per-batch 1h");
    let primary = launch.worker(worker.to_str().unwrap(), "").unwrap().start().unwrap();

    let frames = traffic::synthetic(100, 1500, 1).frames;
    let mut sockets = [namespace.run(|| TxSocket::open("tx0", 0)).unwrap()];
    send(&primary, &mut sockets, &frames, &[1]);

    let report = primary.report();
    assert_balanced(&report, 1500);
    let [slow, fast] = members(&report);
    // It holds what it has room for, and gives nothing back.
    assert_eq!((slow.delivered, slow.backlog, slow.committed), (SLOTS, SLOTS, 0));
    assert_eq!(
        (fast.dropped, fast.delivered, fast.committed),
        (0, fast.committed, 1500 - SLOTS - slow.dropped)
    );
    assert!(fast.delivered > 0 && slow.dropped > 0, "both have flows: {report:#?}");
    assert_eq!(report.groups[0].lanes[0].dropped["ring_full"], slow.dropped);
    assert_eq!(
        (report.groups[0].lanes[0].dropped["no_worker"], u64::from(report.ports[0].lanes[0].frames.lent)),
        (0, SLOTS)
    );

    // It does not wake up for SIGTERM either: what it held is lost, and counted.
    let fast_delivered = fast.delivered;
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!(counted(&exit, "default/1"), fast_delivered);
}

#[test]
fn a_stopped_worker_drops_only_its_own_packets_and_goes_on_when_continued() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config(CONFIG).unwrap().with("-n 2");
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let frames = traffic::synthetic(100, 1200, 2).frames;
    // Every frame goes to both lanes.
    let mut sockets = namespace.run(|| [0, 1].map(|queue| TxSocket::open("tx0", queue).unwrap()));
    send(&primary, &mut sockets, &frames, &[0, 1]);
    let report = primary.report();
    assert_balanced(&report, 2400);
    let [slow, fast] = members(&report);
    assert_eq!((slow.committed + fast.committed, slow.dropped + fast.dropped), (2400, 0));
    // What one lane has for each in one round.
    let (slow_share, fast_share) = (slow.committed / 2, fast.committed / 2);
    assert!(slow_share > SLOTS && fast_share > 0, "both have flows: {report:#?}");

    let pid = Pid::from_raw(i32::try_from(slow.pid).unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    while leftovers::state(slow.pid) != Some('T') {
        std::thread::yield_now();
    }
    send(&primary, &mut sockets, &frames, &[1]);
    let report = primary.report();
    assert_balanced(&report, 4800);
    let [slow, fast] = members(&report);
    assert_eq!((slow.delivered, slow.committed), (2 * (slow_share + SLOTS), 2 * slow_share));
    assert_eq!((slow.backlog, slow.dropped), (2 * SLOTS, 2 * (slow_share - SLOTS)));
    assert_eq!((fast.delivered, fast.committed, fast.dropped), (4 * fast_share, 4 * fast_share, 0));
    for (lane, of_group) in report.lanes().zip(&report.groups[0].lanes) {
        assert_eq!(of_group.dropped["ring_full"], slow_share - SLOTS);
        assert_eq!(u64::from(lane.frames.lent), SLOTS);
    }

    kill(pid, Signal::SIGCONT).unwrap();
    primary.balanced_report_when(|report| members(report)[0].backlog == 0);
    send(&primary, &mut sockets, &frames, &[0, 1]);
    let report = primary.report();
    assert_balanced(&report, 7200);
    let [slow, fast] = members(&report);
    assert_eq!((slow.committed, slow.dropped), (4 * slow_share + 2 * SLOTS, 2 * (slow_share - SLOTS)));
    assert_eq!((fast.committed, fast.dropped), (6 * fast_share, 0));
    assert!(report.lanes().all(|lane| lane.frames.lent == 0));

    let committed = (slow.committed, fast.committed);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!((counted(&exit, "default/0"), counted(&exit, "default/1")), committed);
}

#[test]
fn what_the_kernel_drops_is_counted_to_the_last_packet() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap().config("rx_ring = 64\nring_slots = 64").unwrap();
    let mut primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let frames = traffic::synthetic(100, 1000, 3).frames;
    let mut socket = namespace.run(|| TxSocket::open("tx0", 0)).unwrap();

    // A primary that does not run leaves the kernel the frames it has posted, and no more.
    primary.process.signal(Signal::SIGSTOP);
    while leftovers::state(primary.process.pid().as_raw().unsigned_abs()) != Some('T') {
        std::thread::yield_now();
    }
    frames.iter().for_each(|frame| socket.send(frame).unwrap());
    socket.finish().unwrap();
    primary.process.signal(Signal::SIGCONT);

    let report = primary.report_after(1000, true);
    assert_balanced(&report, 1000);
    let lane = &report.ports[0].lanes[0];
    assert_eq!((lane.received, report.groups[0].lanes[0].delivered), (64, 64));
    assert_eq!(lane.kernel.rx_dropped + lane.kernel.rx_ring_full, 1000 - 64);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_flood_on_slow_workers_is_accounted_for_to_the_last_packet() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config(CONFIG).unwrap().with("-n 2");
    let worker = first_member_with(&launch, "--sleep-per-batch 2ms");
    let primary = launch.worker(worker.to_str().unwrap(), "").unwrap().start().unwrap();
    let mut sent = 0;
    let [slow, fast] = loop {
        for cpu in [0, 1] {
            let load = Load { cpu, flows: 500, ..Load::onto("tx0", End::Frames(60_000)) };
            sent += namespace.run(|| generator::run(&load)).unwrap().sent;
        }
        let report = primary.report_after(sent, true);
        assert_balanced(&report, sent);
        let [slow, fast] = members(&report).map(Clone::clone);
        assert_eq!((slow.delivered, fast.delivered), (slow.committed, fast.committed));
        // Where the flood keeps the lanes from running, it is the kernel that drops.
        if slow.dropped > 0 {
            break [slow, fast];
        }
    };
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!(counted(&exit, "default/0"), slow.committed);
    assert_eq!(counted(&exit, "default/1"), fast.committed);
}
