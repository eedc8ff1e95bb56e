//! Receive times lie between sending and reading, and never decrease within a lane.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::Signal;
use xfan::report::Report;
use xfan_shm::clock::monotonic_ns;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::{signal, stop};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::veth::network;

/// How much earlier than its arrival a packet's time may be, as documented.
const EARLY_NS: u64 = 2048;

fn start(queues: u32, workers: usize, config: &str) -> (Netns, Primary) {
    let namespace = network(queues);
    let launch = Launch::on(&namespace).unwrap().with(&format!("-n {workers}")).config(config).unwrap();
    let primary = launch.worker("xfan-times", "").unwrap().start().unwrap();
    (namespace, primary)
}

/// What each worker publishes under this name.
fn published(report: &Report, name: &str) -> impl Iterator<Item = u64> {
    let members = report.groups[0].members.iter();
    members.map(|member| member.counters[name]).collect::<Vec<_>>().into_iter()
}

#[test]
fn times_never_decrease_within_a_lane() {
    let _watchdog = e2e_or_skip!();
    const ROUNDS: u64 = 400;
    let (namespace, primary) = start(4, 2, "");
    let frames = traffic::synthetic(60, 64, 5).frames;
    let over = AtomicBool::new(false);
    let begin = monotonic_ns();
    thread::scope(|scope| {
        // With more threads than CPUs, lanes and workers are preempted at any point.
        for _ in 0..2 * thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let sent = namespace.run(|| {
            let mut sender = Replay::onto("tx0").open().unwrap();
            (0..ROUNDS).map(|_| sender.run(&frames).unwrap().packets).sum::<u64>()
        });
        assert_eq!(sent, ROUNDS * 64);
        primary.report_when(|report| report.totals().0 == sent);
        over.store(true, Ordering::Relaxed);
    });
    let report =
        primary.balanced_report_when(|report| published(report, "packets").sum::<u64>() == report.totals().1);
    let end = monotonic_ns();
    assert_balanced(&report, ROUNDS * 64);
    assert_eq!(published(&report, "wrong").sum::<u64>(), 0, "of {} packets", report.totals().1);
    let (first, last) = (published(&report, "first_ns").min(), published(&report, "last_ns").max());
    assert!(first >= Some(begin - EARLY_NS) && last <= Some(end), "{begin} {first:?} {last:?} {end}");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_packet_that_waits_keeps_its_receive_time() {
    let _watchdog = e2e_or_skip!();
    // Longer than 4.29 s, in which 32 bits of nanoseconds wrap.
    let (namespace, primary) =
        start(2, 1, "on_loss = 'hold'\nhold_timeout = '600s'\nrestart_delay = '5s'\nhang_timeout = '0s'");
    let pid = primary.report().groups[0].members[0].pid;
    stop(pid);
    let frames = traffic::synthetic(60, 600, 5).frames;
    let begin = monotonic_ns();
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    primary.report_after(600, false);
    let end = monotonic_ns();
    signal(pid, Signal::SIGKILL);
    let report = primary.report_when(|report| {
        let member = &report.groups[0].members[0];
        member.restarts == 1 && member.counters.get("packets") == Some(&600)
    });
    assert!(monotonic_ns() - end > 1 << 32);
    assert_eq!(published(&report, "wrong").sum::<u64>(), 0);
    let (first, last) = (published(&report, "first_ns").min(), published(&report, "last_ns").max());
    assert!(first >= Some(begin - EARLY_NS) && last <= Some(end), "{begin} {first:?} {last:?} {end}");
    assert_eq!(primary.stop().0.code, Some(0));
}
