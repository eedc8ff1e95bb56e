//! Overload: a slow worker loses only its own packets, and every packet is accounted for.

use std::path::PathBuf;

use nix::sys::signal::Signal;
use xfan::report::{Member, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::generator::{self, End, Load};
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::{signal, stop};
use xfan_tests::process::write_script;
use xfan_tests::traffic;
use xfan_tests::tx::TxSocket;
use xfan_tests::veth::network;

/// The slots of each ring in these tests.
const SLOTS: u64 = 256;
/// Frames sent at once: fewer than the slots of a ring, so that a worker that keeps up drops none.
const CHUNK: usize = 200;
/// Small rings, and the same flows for the same workers in every run.
const CONFIG: &str = "ring_slots = 256\nhash_key = '000102030405060708090a0b0c0d0e0f'\nstop_timeout = '5s'";

fn members(report: &Report) -> [&Member; 2] {
    report.groups[0].members.iter().collect::<Vec<_>>().try_into().unwrap()
}

/// Sends all frames through each socket. After each chunk it waits until the workers in `fast` have
/// committed everything they got.
fn send(primary: &Primary, sockets: &mut [TxSocket], frames: &[Vec<u8>], fast: &[usize]) {
    for chunk in frames.chunks(CHUNK) {
        let before: u64 = primary.report().lanes().map(|lane| lane.xdp.redirect).sum();
        for socket in &mut *sockets {
            chunk.iter().for_each(|frame| socket.send(frame).unwrap());
            socket.finish().unwrap();
        }
        let sent = before + (chunk.len() * sockets.len()) as u64;
        primary.report_when(|report| {
            report.totals().0 == sent && fast.iter().all(|&index| members(report)[index].backlog == 0)
        });
    }
}

/// A worker command that runs `xfan-count`, with `arguments` for the first member.
fn first_member_with(launch: &Launch<'_>, arguments: &str) -> PathBuf {
    let count = launch.within_reach("xfan-count").unwrap();
    let count = count.display().to_string();
    let script = format!("case $XFAN_MEMBER in\n*/0) exec {count} {arguments} ;;\n*) exec {count} ;;\nesac");
    let path = launch.folder().join("worker.sh");
    write_script(&path, &script);
    path
}

#[test]
fn a_sleeping_worker_drops_only_its_own_packets() {
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
    // Its ring is full, and it commits nothing.
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

    // It does not react to SIGTERM either: the packets in its ring are counted as lost.
    let fast_delivered = fast.delivered;
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!(exit.totals_of("default/1").0, fast_delivered);
}

#[test]
fn a_stopped_worker_drops_only_its_own_packets() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config(CONFIG).unwrap().with("-n 2");
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let frames = traffic::synthetic(100, 1200, 2).frames;
    // Both lanes get every frame.
    let mut sockets = namespace.run(|| [0, 1].map(|queue| TxSocket::open("tx0", queue).unwrap()));
    send(&primary, &mut sockets, &frames, &[0, 1]);
    let report = primary.report();
    assert_balanced(&report, 2400);
    let [slow, fast] = members(&report);
    assert_eq!((slow.committed + fast.committed, slow.dropped + fast.dropped), (2400, 0));
    // One lane's packets for each worker in one round.
    let (slow_share, fast_share) = (slow.committed / 2, fast.committed / 2);
    assert!(slow_share > SLOTS && fast_share > 0, "both have flows: {report:#?}");

    let pid = slow.pid;
    stop(pid);
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

    signal(pid, Signal::SIGCONT);
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
    assert_eq!((exit.totals_of("default/0").0, exit.totals_of("default/1").0), committed);
}

#[test]
fn every_packet_that_the_kernel_drops_is_counted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap().config("rx_ring = 64\nring_slots = 64").unwrap();
    let mut primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let frames = traffic::synthetic(100, 1000, 3).frames;
    let mut socket = namespace.run(|| TxSocket::open("tx0", 0)).unwrap();

    // While the primary is stopped, the kernel has only the frames that were posted before.
    stop(primary.process.pid().as_raw().unsigned_abs());
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
fn every_packet_of_a_flood_is_accounted_for() {
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
        // If the flood keeps the lanes from running, the kernel drops packets instead.
        if slow.dropped > 0 {
            break [slow, fast];
        }
    };
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!(exit.totals_of("default/0").0, slow.committed);
    assert_eq!(exit.totals_of("default/1").0, fast.committed);
}
