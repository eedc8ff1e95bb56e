//! A worker can damage only itself: not the packets, not another worker's segments, not the
//! primary.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{MsgFlags, send};
use xfan::report::Member;
use xfan_shm::protocol::{self, MAX_REPLY, Reply};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

/// Starts a primary with a hostile and an honest worker, on two queues.
fn start(way: &str) -> (Netns, Primary) {
    let namespace = network(2);
    let launch = Launch::on(&namespace)
        .unwrap()
        .config("max_workers = 3\nstop_timeout = '200ms'\nrestart = 'no'")
        .unwrap();
    let primary = launch.with("-n 2").hostile_worker(way).unwrap().start().unwrap();
    (namespace, primary)
}

#[test]
fn a_worker_can_write_only_to_its_own_segment() {
    let _watchdog = e2e_or_skip!();
    let (_namespace, primary) = start("probe");
    let report: BTreeMap<String, String> =
        serde_json::from_str(&primary.printed("descriptors at start")).unwrap();

    let mut expected = BTreeMap::new();
    let mut expect = |prefix: &str, outcomes: &[(&str, &str)]| {
        expected.extend(
            outcomes.iter().map(|(what, outcome)| (format!("{prefix}{what}"), (*outcome).to_owned())),
        );
    };
    expect("", &[("descriptors at start", "0 1 2 control")]);
    let none = "0000000000000000";
    let nobody = "65534 65534 65534 65534";
    expect("status ", &[("Uid", nobody), ("Gid", nobody), ("Groups", ""), ("NoNewPrivs", "1")]);
    expect("status ", &[("CapInh", none), ("CapPrm", none), ("CapEff", none), ("CapAmb", none)]);
    for segment in ["umem ", "down "] {
        expect(
            segment,
            &[
                ("map writable", "EACCES"),
                ("make a mapping writable", "EACCES"),
                ("remove pages", "EACCES"),
                ("open for writing", "EACCES"),
                ("open for both", "EACCES"),
                ("write", "EBADF"),
                ("shrink", "EINVAL"),
                ("grow", "EINVAL"),
                ("shrink by path", "EACCES"),
                ("grow by writing beyond the end", "EBADF"),
                ("punch a hole", "EBADF"),
                ("seal", "EPERM"),
                ("change the mode", "EPERM"),
                ("change the mode by path", "EPERM"),
            ],
        );
    }
    // The worker can write to its own segment only through the mapping that it has.
    expect(
        "up ",
        &[
            ("map writable", "EPERM"),
            ("make a mapping writable", "EACCES"),
            ("remove pages", "EACCES"),
            ("remove pages through the mapping", "EPERM"),
            ("punch a hole", "EPERM"),
            ("write", "EPERM"),
            ("seal", "EPERM"),
            ("open for writing", "EACCES"),
            ("open for both", "EACCES"),
            ("shrink", "EPERM"),
            ("grow", "EPERM"),
            ("shrink by path", "EACCES"),
            ("grow by writing beyond the end", "EPERM"),
            ("change the mode", "EPERM"),
            ("change the mode by path", "EPERM"),
        ],
    );
    expect(
        "primary ",
        &[
            ("list descriptors", "EACCES"),
            ("list mappings", "EACCES"),
            ("read memory", "EACCES"),
            ("read environment", "EACCES"),
            ("trace", "EPERM"),
            ("take a descriptor", "EPERM"),
            ("kill", "EPERM"),
        ],
    );
    expect("peer ", &[("open down", "EPERM"), ("open up", "EPERM")]);
    let not_yours = |id: &str| format!("member {id} is for the process that the primary started for it");
    expect(
        "take ",
        &[
            ("other member without a token", &not_yours("default/1")),
            ("other member with our token", &not_yours("default/1")),
            ("our member without a token", &not_yours("default/0")),
            ("our member again", "member default/0 has a worker"),
            (
                "any member",
                "this primary starts its own workers: only root and the users in allow_users and allow_groups in [control] of its configuration may attach others",
            ),
            ("a member that does not exist", "there is no member default/9: they are default/0 to default/2"),
        ],
    );
    // The inherited connection does not allow it either.
    let for_0 = "this connection is for member default/0";
    let mut expect = |what: &str, outcome: &str| {
        expected.insert(format!("inherited {what}"), outcome.to_owned());
    };
    expect("takes our member again", "member default/0 has a worker");
    expect("takes other member", for_0);
    expect("takes a vacant member", for_0);
    expect("orders", "only root may add, drain, restart or remove workers: use sudo");
    expect("makes connections", "4");
    expect("made takes other member", for_0);
    expect("makes too many", "this worker has 4 connections, which is the limit: close some");
    // Linux 6.16 and later refuse them.
    let passed = report["inherited passes descriptors"].clone();
    assert!(passed == "done" || passed.contains("Operation not permitted"), "{passed}");
    expect("passes descriptors", &passed);
    assert_eq!(report, expected);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn noise_in_a_segment_evicts_only_its_writer() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("noise 7");
    send_synthetic(&namespace, 6);
    let report = primary
        .report_when(|report| report.totals().0 == PACKETS && report.groups[0].members[1].backlog == 0);
    let [share, rest] = [0, 1].map(|index| report.groups[0].members[index].delivered);
    assert!(share > 0 && rest > 0 && share + rest == PACKETS, "{report:#?}");

    primary.unleash();
    let gone = |member: &Member| member.state == "crashed" && member.backlog == 0;
    let report = primary.balanced_report_when(|report| {
        gone(&report.groups[0].members[0]) && report.groups[0].members[1].committed == PACKETS
    });
    assert_balanced(&report, PACKETS);
    let [liar, other] = [0, 1].map(|index| &report.groups[0].members[index]);
    assert_eq!((liar.committed, liar.requeued, liar.lost, liar.backlog, liar.buckets), (0, share, 0, 0, 0));
    assert_eq!((other.delivered, other.buckets, other.state.as_str()), (PACKETS, 4096, "running"));
    assert!(report.lanes().all(|lane| lane.frames.lent == 0));

    // The hostile worker is killed, and the other gets every flow.
    send_synthetic(&namespace, 6);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(report.totals(), (2 * PACKETS, 2 * PACKETS, 0));
    assert_eq!(report.groups[0].members[1].committed, 2 * PACKETS);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let stderr = exit.stderr.join("\n");
    assert_eq!(
        stderr.matches("worker evicted: impossible consumer index: lane of queue ").count(),
        1,
        "{stderr}"
    );
}

#[test]
fn a_jammed_doorbell_affects_only_its_worker() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("jam");
    primary.unleash();
    primary.process.wait_for_line("jammed").unwrap();
    send_synthetic(&namespace, 6);
    let report = primary.balanced_report_when(|report| {
        report.totals().0 == PACKETS && report.groups[0].members[1].backlog == 0
    });
    assert_balanced(&report, PACKETS);
    let [jammer, other] = [0, 1].map(|index| &report.groups[0].members[index]);
    assert_eq!(
        (jammer.backlog, other.committed, other.dropped),
        (jammer.delivered, PACKETS - jammer.delivered, 0)
    );
    assert!(jammer.delivered > 0 && jammer.wakeups > 0, "{report:#?}");
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Each ring makes the kernel look at many epoll entries, with interrupts off.
#[test]
fn a_worker_with_a_slow_bell_is_evicted() {
    let _watchdog = e2e_or_skip!(240);
    let (namespace, primary) = start("wakeful");
    primary.unleash();
    primary.printed(" waiters");
    let mut sent = 0;
    let evicted = |line: &String| line.contains("worker evicted: waking it took too long");
    while !primary.process.stderr().iter().any(evicted) {
        send_synthetic(&namespace, 6);
        sent += PACKETS;
        // The hostile worker takes no packets, and is not rung once its rings are full.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    let report = primary.report_when(|report| report.groups[0].members[0].state == "crashed");
    // It was rung only a few times, although it claimed to fall asleep every few milliseconds.
    assert!(report.groups[0].members[0].wakeups < 100, "{report:#?}");
    // From then on, the other worker gets every packet.
    let before = primary.report_after(sent, true);
    send_synthetic(&namespace, 6);
    let report = primary.report_after(sent + PACKETS, true);
    assert_balanced(&report, sent + PACKETS);
    let [before, after] = [&before, &report].map(|report| report.groups[0].members[1].committed);
    assert_eq!(after - before, PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

fn open_descriptors(primary: &Primary) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", primary.process.pid())).unwrap().count()
}

#[test]
fn control_socket_floods_are_counted_and_harmless() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let primary = launch.start().unwrap();
    let before = open_descriptors(&primary);
    // Many systems limit a process to 1,024 descriptors unless it raises its soft limit.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();

    // 2,000 silent connections of root, which may have 64 at a time.
    let silent: Vec<_> = (0..2000).map(|_| primary.dial()).collect();
    let refused = |control: &OwnedFd| {
        matches!(
            protocol::ask(control, &protocol::Request::Stats),
            Ok((Reply::Refused(refusal), _)) if refusal.message.contains("there are 64 connections of root")
        )
    };
    assert!(refused(silent.last().unwrap()));
    send_synthetic(&namespace, 6);
    drop(silent);
    while open_descriptors(&primary) > before {
        std::thread::yield_now();
    }
    // 2,000 malformed messages, then refused workers.
    for _ in 0..2000 {
        let control = primary.dial();
        send(control.as_raw_fd(), b"{\"attach\":", MsgFlags::MSG_NOSIGNAL).unwrap();
        assert!(matches!(protocol::receive::<Reply>(&control, MAX_REPLY).unwrap().0, Reply::Refused(_)));
    }
    for _ in 0..500 {
        let control = primary.dial();
        send(control.as_raw_fd(), b"{\"attach\":{\"version\":99,\"program\":\"x\"}}", MsgFlags::MSG_NOSIGNAL)
            .unwrap();
        assert!(matches!(protocol::receive::<Reply>(&control, MAX_REPLY).unwrap().0, Reply::Refused(_)));
    }
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert_eq!(report.totals(), (PACKETS, PACKETS, 0));
    let control = report.control;
    assert!((1900..=1999).contains(&control.too_many), "{control:?}");
    assert_eq!((control.malformed, control.refused, control.forbidden), (2000, 500, 0));
    // They do not push other events out of the event history.
    let page = primary.history();
    assert_eq!((page.missed, page.entries.iter().filter(|entry| entry.event == "attached").count()), (0, 2));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn malformed_messages_are_answered_and_dropped() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let primary = launch.start().unwrap();
    let before = open_descriptors(&primary);

    let deep = "[".repeat(10_000);
    let long = format!("{{\"attach\":{{\"version\":1,\"program\":\"{}\"}}}}", "x".repeat(20_000));
    let refused = |message: &[u8]| {
        let control = primary.dial();
        send(control.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL).unwrap();
        match protocol::receive::<Reply>(&control, MAX_REPLY).unwrap().0 {
            Reply::Refused(refusal) => refusal.message,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(long.as_bytes()), "received a message longer than 16384 bytes");
    let messages: [&[u8]; 8] = [
        b"hello",
        b"\0",
        b"\xff\xfe\xfd",
        b"{\"attach\":{\"version\":1,",
        b"{\"attach\":{\"version\":-1,\"program\":\"x\"}}",
        b"{\"destroy\":{}}",
        b"{\"attached\":{}}",
        deep.as_bytes(),
    ];
    for message in messages {
        let answer = refused(message);
        assert!(answer.starts_with("received an invalid message: "), "{answer}");
    }
    let version = b"{\"attach\":{\"version\":99,\"member\":\"default/9\",\"program\":\"x\"}}";
    assert_eq!(refused(version), "there is no member default/9: they are default/0 to default/3");

    // An empty message means the same as a hang-up. The kernel refuses unexpected descriptors (6.16
    // and later), or the primary closes them.
    let control = primary.dial();
    send(control.as_raw_fd(), b"", MsgFlags::MSG_NOSIGNAL).unwrap();
    assert!(matches!(protocol::receive::<Reply>(&control, MAX_REPLY), Err(protocol::ProtocolError::Closed)));
    drop(primary.dial());
    let control = primary.dial();
    for _ in 0..3 {
        let _ = protocol::send(&control, &protocol::Request::Detach, &[control.as_fd(); 8]);
    }
    protocol::send(&control, &protocol::Request::Stats, &[]).unwrap();
    assert!(matches!(protocol::receive::<Reply>(&control, MAX_REPLY).unwrap().0, Reply::Stats(_)));
    // Many silent connections at once.
    let silent: Vec<_> = (0..50).map(|_| primary.dial()).collect();
    primary.report();
    drop((silent, control));

    send_synthetic(&namespace, 6);
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert_eq!(report.totals(), (PACKETS, PACKETS, 0));
    while open_descriptors(&primary) > before {
        std::thread::yield_now();
    }
    assert_eq!(primary.stop().0.code, Some(0));
}
