//! The primary takes no kernel lock that a peer can hold indefinitely.

use std::os::fd::OwnedFd;
use std::thread;

use nix::sys::signal::Signal;
use xfan_shm::layout::{Up, VERSION};
use xfan_shm::protocol::{self, Attach, Reply, Request};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::proc::{pid_of, signal};
use xfan_tests::replay::send_synthetic;
use xfan_tests::stuck::StuckPage;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

/// Attaches. Returns the worker's own segment and its mapping.
fn attach(control: &OwnedFd) -> (OwnedFd, Up) {
    let attach = Attach { version: VERSION, group: None, member: None, token: None, program: "guest".into() };
    let (reply, fds) = protocol::ask(control, &Request::Attach(attach)).unwrap();
    let Reply::Attached(attached) = reply else { panic!("{reply:?}") };
    let up = fds.into_iter().nth(2).unwrap();
    let mapped = Up::open(&up, attached.geometry).unwrap();
    (up, mapped)
}

#[test]
fn a_locked_segment_blocks_only_its_worker() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("max_workers = 3").unwrap().with("-n 2");
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let (control, page) = (primary.dial(), StuckPage::new().unwrap());
    let (up, _mapped) = attach(&control);
    thread::scope(|scope| {
        scope.spawn(|| page.write_to(&up, 64));
        page.wait_for_reader().unwrap();
        // From now on an attempt to seal the segment blocks.
        let (reply, _) = protocol::ask(&control, &Request::Ready).unwrap();
        let Reply::Refused(refusal) = reply else { panic!("{reply:?}") };
        assert!(refusal.message.contains("has not sealed its own segment"), "{}", refusal.message);
        // The primary continues: it answers, notices a death and starts another worker.
        let before = pid_of(&primary.report(), 0);
        signal(before, Signal::SIGKILL);
        primary.report_when(|report| {
            let member = &report.groups[0].members[0];
            member.state == "running" && member.pid != before
        });
        send_synthetic(&namespace, 8);
        assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
        page.release();
    });
    assert_eq!(primary.stop().0.code, Some(0));
}
