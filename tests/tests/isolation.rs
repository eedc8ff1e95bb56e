//! A worker can spoil nothing but itself: not the packets, not another's segments, not the primary.

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
use xfan_tests::veth::{Veth, VethConfig};

const PACKETS: u64 = 600;

/// A hostile worker and an honest one, on two queues.
fn start(way: &str) -> (Netns, Primary) {
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
    let launch = Launch::on(&namespace)
        .unwrap()
        .config("max_workers = 3\nstop_timeout = '200ms'\nrestart = 'no'")
        .unwrap();
    let primary = launch.with("-n 2").hostile_worker(way).unwrap().start().unwrap();
    (namespace, primary)
}

#[test]
fn an_unprivileged_worker_can_change_nothing_but_its_own_segment() {
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
                ("take pages away", "EACCES"),
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
    // To its own it may write through the mapping that it has, and nothing else.
    expect(
        "up ",
        &[
            ("map writable", "EPERM"),
            ("make a mapping writable", "EACCES"),
            ("take pages away", "EACCES"),
            ("take pages away from within", "EPERM"),
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
    let not_yours =
        |place: &str| format!("member {place} is for the process that the primary started for it");
    expect(
        "take ",
        &[
            ("other's place without a token", &not_yours("default/1")),
            ("other's place with our token", &not_yours("default/1")),
            ("our place without a token", &not_yours("default/0")),
            ("our place again", "member default/0 has a worker"),
            (
                "any place",
                "this primary starts its own workers: beside them may join root, and whom allow_users and allow_groups in [control] of its configuration name",
            ),
            ("a place that is not there", "there is no member default/9: they are default/0 to default/2"),
        ],
    );
    // Nor through the connection that it inherited.
    let for_0 = "this connection is for member default/0";
    let mut expect = |what: &str, outcome: &str| {
        expected.insert(format!("inherited {what}"), outcome.to_owned());
    };
    expect("takes our place again", "member default/0 has a worker");
    expect("takes other's place", for_0);
    expect("takes a vacant place", for_0);
    expect("orders", "only root may add, drain, restart or remove workers: use sudo");
    expect("makes connections", "4");
    expect("made takes other's place", for_0);
    expect("makes too many", "this worker has 4 connections, which is the limit: close some");
    // Since Linux 6.16 the kernel refuses them.
    let passed = report["inherited passes descriptors"].clone();
    assert!(passed == "done" || passed.contains("Operation not permitted"), "{passed}");
    expect("passes descriptors", &passed);
    assert_eq!(report, expected);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn noise_in_a_segment_evicts_its_writer_alone() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("noise 7");
    send_synthetic(&namespace, 6);
    let report = primary
        .report_when(|report| report.totals().0 == PACKETS && report.groups[0].members[1].backlog == 0);
    let [share, rest] = [0, 1].map(|place| report.groups[0].members[place].delivered);
    assert!(share > 0 && rest > 0 && share + rest == PACKETS, "{report:#?}");

    primary.unleash();
    let gone = |member: &Member| member.state == "crashed" && member.backlog == 0;
    let report = primary.balanced_report_when(|report| {
        gone(&report.groups[0].members[0]) && report.groups[0].members[1].committed == PACKETS
    });
    assert_balanced(&report, PACKETS);
    let [liar, other] = [0, 1].map(|place| &report.groups[0].members[place]);
    assert_eq!((liar.committed, liar.requeued, liar.lost, liar.backlog, liar.buckets), (0, share, 0, 0, 0));
    assert_eq!((other.delivered, other.buckets, other.state.as_str()), (PACKETS, 4096, "running"));
    assert!(report.lanes().all(|lane| lane.frames.lent == 0));

    // It is killed, and the other gets every flow.
    send_synthetic(&namespace, 6);
    let report = primary.report_after(2 * PACKETS, true);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(report.totals(), (2 * PACKETS, 2 * PACKETS, 0));
    assert_eq!(report.groups[0].members[1].committed, 2 * PACKETS);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let stderr = exit.stderr.join("\n");
    assert_eq!(stderr.matches("its consumer index made no sense: evicted").count(), 1, "{stderr}");
}

#[test]
fn a_worker_that_jams_its_doorbell_stops_nobody() {
    let _watchdog = e2e_or_skip!();
    let (namespace, primary) = start("jam");
    primary.unleash();
    primary.process.wait_for_line("jammed").unwrap();
    send_synthetic(&namespace, 6);
    let report = primary.balanced_report_when(|report| {
        report.totals().0 == PACKETS && report.groups[0].members[1].backlog == 0
    });
    assert_balanced(&report, PACKETS);
    let [jammer, other] = [0, 1].map(|place| &report.groups[0].members[place]);
    assert_eq!(
        (jammer.backlog, other.committed, other.dropped),
        (jammer.delivered, PACKETS - jammer.delivered, 0)
    );
    assert!(jammer.delivered > 0 && jammer.wakeups > 0, "{report:#?}");
    assert_eq!(primary.stop().0.code, Some(0));
}

fn open_descriptors(primary: &Primary) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", primary.process.pid())).unwrap().count()
}

#[test]
fn floods_on_the_control_socket_are_counted_and_stop_nobody() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
    let launch = Launch::on(&namespace).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let primary = launch.start().unwrap();
    let before = open_descriptors(&primary);
    // Many systems allow a process 1,024 descriptors unless it asks for more.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();

    // Connections by the thousand that say nothing: of root, which these are, there can be 64 at a time.
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
    // Messages by the thousand that make no sense, and then workers that are not wanted.
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
    // They do not push what matters out of the journal.
    let Ok(Reply::Events(page)) =
        xfan::control::client::ask(&primary.socket(), &protocol::Request::Events(0))
    else {
        panic!("it tells what happened")
    };
    let page: xfan::control::journal::Page = serde_json::from_value(page).unwrap();
    assert_eq!((page.missed, page.entries.iter().filter(|entry| entry.event == "attached").count()), (0, 2));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn messages_that_make_no_sense_are_answered_and_forgotten() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
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

    // An empty message and a hang-up say the same. Descriptors, which nobody asked for, are refused by the kernel
    // (from 6.16 on) or closed.
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
    // Many at once that say nothing.
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
