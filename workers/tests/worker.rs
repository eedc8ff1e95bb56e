//! The worker SDK against a minimal dispatcher (`common`). Needs no privileges.

mod common;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use common::{FRAME, FRAMES, Socket, attach, attached, reply_once, try_attach};
use xfan_shm::Descriptor;
use xfan_shm::clock::{monotonic_ns, stamp};
use xfan_shm::ids::{LaneId, PortId, UmemOffset};
use xfan_shm::layout::{Geometry, Phase, VERSION};
use xfan_shm::protocol::{self, MAX_REQUEST, Refusal, Reply, Request};
use xfan_worker::{AttachError, CounterError, Received, RecvError, RefusalCode, Worker};

const SOON: Duration = Duration::from_millis(5);
const LONG: Duration = Duration::from_secs(30);

/// Receives and commits a batch. Returns the first byte of each packet.
fn contents(worker: &mut Worker) -> Vec<u8> {
    match worker.recv(LONG).unwrap() {
        Received::Packets(batch) => {
            let contents = batch.iter().map(|packet| packet.data()[0]).collect();
            batch.commit();
            contents
        }
        other => panic!("{other:?}"),
    }
}

fn error(socket: &str) -> String {
    Worker::attach_to(socket).unwrap_err().to_string()
}

#[test]
fn a_worker_introduces_itself_and_learns_its_member() {
    let (primary, worker) = try_attach(attached(), |builder| builder.member("ids/3").program("me"));
    let worker = worker.unwrap();
    assert_eq!((worker.member(), worker.core(), worker.lanes()), ("default/0", None, 2));
    assert_eq!(worker.ports(), ["east", "west"]);
    let request = &primary.request;
    assert_eq!(
        (request.version, request.member.as_deref(), request.token.as_deref()),
        (VERSION, Some("ids/3"), None)
    );
    assert_eq!(request.program, "me");
}

#[test]
fn a_worker_is_pinned_to_the_core_it_is_assigned() {
    let core = core_affinity::get_core_ids().unwrap().last().unwrap().id;
    thread::spawn(move || {
        let (_primary, worker) = attach(protocol::Attached { core: Some(core), ..attached() });
        assert_eq!(worker.core(), Some(core));
        let allowed: Vec<_> = core_affinity::get_core_ids().unwrap().iter().map(|core| core.id).collect();
        assert_eq!(allowed, [core]);
    })
    .join()
    .unwrap();
    let (_primary, worker) =
        try_attach(protocol::Attached { core: Some(5000), ..attached() }, |builder| builder);
    assert!(matches!(worker, Err(AttachError::Core(5000))));
}

#[test]
fn packets_are_read_in_place_with_their_metadata() {
    let (mut primary, mut worker) = attach(attached());
    let before = monotonic_ns();
    primary.send(1, 7);
    let flags = Descriptor::UNPARSED | Descriptor::CUT;
    let unparsed = Descriptor { flags, port: PortId(9), ..Descriptor::default() };
    assert!(primary.lanes[1].push(unparsed));
    let Received::Packets(batch) = worker.recv(LONG).unwrap() else { panic!() };
    assert_eq!((batch.len(), batch.is_empty(), batch.lane()), (2, false, LaneId(1)));
    let packets: Vec<_> = batch.iter().collect();
    assert_eq!(packets[0].data(), [7; FRAME]);
    assert_eq!(
        (packets[0].hash(), packets[0].lane(), packets[0].port(), packets[0].port_name()),
        (7, LaneId(1), PortId(1), "west")
    );
    assert!(packets[0].is_parsed() && !packets[1].is_parsed());
    assert!(!packets[0].is_cut() && packets[1].is_cut());
    assert_eq!((packets[1].data(), packets[1].port_name()), (&[] as &[u8], "?"));
    let time = u64::try_from(packets[0].time().as_nanos()).unwrap();
    assert!((before - before % 1024..=monotonic_ns()).contains(&time), "{before} {time}");
    batch.commit();
    assert!(primary.up.busy_ticks().load(Ordering::Relaxed) > 0);
    assert!(primary.up.heartbeat().load(Ordering::Relaxed) > 0);
}

#[test]
fn times_do_not_jump_if_a_lanes_clock_is_ahead() {
    let (mut primary, mut worker) = attach(attached());
    // The clock of lane 0 is a millisecond or more ahead of the worker's. That of lane 1 is right.
    for ahead in [1_000_000, 1_000_000, 2_000_000, 0, 0] {
        let stamped = (monotonic_ns() + ahead) >> 10 << 10;
        let lane = usize::from(ahead == 0);
        assert!(primary.lanes[lane].push(Descriptor { time: stamp(stamped), ..Descriptor::default() }));
        let Received::Packets(batch) = worker.recv(LONG).unwrap() else { panic!() };
        let time = batch.iter().next().unwrap().time();
        assert_eq!(time, Duration::from_nanos(stamped), "{ahead} ns ahead");
        batch.commit();
    }
}

#[test]
fn lanes_take_turns_and_a_commit_gives_frames_back() {
    let (mut primary, worker) = try_attach(attached(), |builder| builder.batch(2));
    let mut worker = worker.unwrap();
    for content in 0..4 {
        primary.send(0, content);
        primary.send(1, 10 + content);
    }
    assert_eq!(contents(&mut worker), [0, 1]);
    assert_eq!((primary.take_back(0), primary.take_back(1)), (2, 0));
    assert_eq!(contents(&mut worker), [10, 11]);
    assert_eq!(contents(&mut worker), [2, 3]);
    assert_eq!(contents(&mut worker), [12, 13]);
    assert_eq!((primary.take_back(0), primary.take_back(1)), (2, 4));
    assert!(matches!(worker.recv(Duration::ZERO).unwrap(), Received::Idle));
}

#[test]
fn rings_are_walked_around_many_times() {
    let (mut primary, mut worker) = attach(attached());
    for content in 0..=u8::MAX {
        primary.send(0, content);
        assert_eq!(contents(&mut worker), [content]);
        assert_eq!(primary.take_back(0), 1);
    }
}

#[test]
fn a_dropped_batch_is_not_committed_and_comes_again() {
    let (mut primary, mut worker) = attach(attached());
    primary.send(0, 1);
    primary.send(1, 9);
    for _ in 0..3 {
        let Received::Packets(batch) = worker.recv(LONG).unwrap() else { panic!() };
        assert_eq!(batch.iter().next().unwrap().data()[0], 1);
    }
    assert_eq!(primary.take_back(0), 0);
    primary.send(0, 2);
    assert_eq!(contents(&mut worker), [1, 2]);
    assert_eq!(primary.take_back(0), 2);
    assert_eq!(contents(&mut worker), [9]);
}

#[test]
fn after_a_partial_commit_the_rest_comes_first() {
    let (mut primary, mut worker) = attach(attached());
    for content in 0..4 {
        primary.send(0, content);
    }
    primary.send(1, 9);
    let commit_first = |worker: &mut Worker, packets| {
        let Received::Packets(batch) = worker.recv(LONG).unwrap() else { panic!() };
        let first = batch.iter().next().unwrap().data()[0];
        batch.commit_first(packets);
        first
    };
    assert_eq!(commit_first(&mut worker, 0), 0);
    assert_eq!(primary.take_back(0), 0);
    assert_eq!(commit_first(&mut worker, 1), 0);
    assert_eq!(primary.take_back(0), 1);
    assert_eq!(commit_first(&mut worker, 2), 1);
    assert_eq!(primary.take_back(0), 2);
    // After a commit of all packets, or of more than there are, it is the next lane's turn.
    assert_eq!(commit_first(&mut worker, usize::MAX), 3);
    assert_eq!(primary.take_back(0), 1);
    primary.send(0, 4);
    assert_eq!(contents(&mut worker), [9]);
    assert_eq!(contents(&mut worker), [4]);
}

#[test]
fn an_open_batch_is_committed_in_parts_up_to_its_end() {
    let (mut primary, mut worker) = attach(attached());
    let leave_open = |worker: &mut Worker, packets| {
        let Received::Packets(batch) = worker.recv(LONG).unwrap() else { panic!() };
        batch.leave_open(packets);
    };
    assert_eq!(worker.commit_open(1), Err(0));
    for content in 0..6 {
        primary.send(0, content);
    }
    leave_open(&mut worker, 4);
    assert_eq!(worker.commit_open(5), Err(4));
    assert_eq!(worker.commit_open(usize::MAX), Err(4));
    assert_eq!((worker.commit_open(0), worker.commit_open(3), primary.take_back(0)), (Ok(()), Ok(()), 3));
    assert_eq!((worker.commit_open(2), worker.commit_open(1), primary.take_back(0)), (Err(1), Ok(()), 1));
    assert_eq!(worker.commit_open(1), Err(0));
    // Not more than was received, and nothing that was committed otherwise.
    leave_open(&mut worker, usize::MAX);
    assert_eq!(worker.commit_open(3), Err(2));
    assert_eq!(contents(&mut worker), [4, 5]);
    assert_eq!(worker.commit_open(1), Err(0));
    assert_eq!(primary.take_back(0), 2);
}

#[test]
fn every_idle_strategy_waits_for_the_timeout() {
    for (spin_ns, yield_ns) in [(0, 0), (u64::MAX, 0), (0, u64::MAX), (1_000_000, 1_000_000)] {
        let (primary, mut worker) = attach(protocol::Attached { spin_ns, yield_ns, ..attached() });
        let start = Instant::now();
        assert!(matches!(worker.recv(SOON).unwrap(), Received::Idle));
        assert!(start.elapsed() >= SOON, "{:?}", start.elapsed());
        assert!(primary.up.heartbeat().load(Ordering::Relaxed) > 0);
        assert_eq!(primary.up.epoch().load(Ordering::Relaxed) & 1, 0, "awake");
        assert_eq!(primary.up.wakeups().load(Ordering::Relaxed), 0);
    }
}

#[test]
fn a_sleeper_keeps_beating_and_the_doorbell_wakes_it() {
    let (mut primary, mut worker) = attach(attached());
    let sleeper = thread::spawn(move || (contents(&mut worker), worker));
    let beats = || primary.up.heartbeat().load(Ordering::Relaxed);
    while beats() < 4 {
        thread::sleep(SOON);
    }
    while primary.up.epoch().load(Ordering::Relaxed) & 1 == 0 {
        thread::yield_now();
    }
    primary.send(1, 5);
    let (contents, worker) = sleeper.join().unwrap();
    assert_eq!(contents, [5]);
    assert!(primary.up.wakeups().load(Ordering::Relaxed) <= 1);
    drop(worker);
}

#[test]
fn the_doorbell_alone_ends_a_sleep() {
    // Only a ring counts as a wake-up. The end of a sleep's time does not.
    let (mut primary, mut worker) = attach(attached());
    let worker = thread::spawn(move || {
        for _ in 0..200 {
            contents(&mut worker);
        }
        worker
    });
    let mut rings = 0;
    for n in 0..200 {
        while primary.up.epoch().load(Ordering::Relaxed) & 1 == 0 {
            thread::yield_now();
        }
        rings += u64::from(primary.send(0, n));
        while primary.take_back(0) == 0 {
            thread::yield_now();
        }
    }
    drop(worker.join().unwrap());
    let wakeups = primary.up.wakeups().load(Ordering::Relaxed);
    assert!((1..=rings).contains(&wakeups), "{wakeups} wake-ups, {rings} rings");
}

#[test]
fn closed_follows_the_backlog() {
    let (mut primary, mut worker) = attach(attached());
    primary.send(0, 1);
    primary.send(1, 2);
    primary.down.set_phase(Phase::Closing);
    drop(primary.connection);
    assert_eq!(contents(&mut worker), [1]);
    assert_eq!(contents(&mut worker), [2]);
    for timeout in [Duration::ZERO, LONG] {
        assert!(matches!(worker.recv(timeout).unwrap(), Received::Closed));
    }
}

#[test]
fn a_dead_dispatcher_is_reported_after_the_backlog() {
    let answers = [(0, 0), (u64::MAX, 0)].map(|(spin_ns, yield_ns)| protocol::Attached {
        spin_ns,
        yield_ns,
        ..attached()
    });
    for answer in answers {
        let (mut primary, mut worker) = attach(answer);
        primary.send(0, 1);
        drop(primary.connection);
        assert_eq!(contents(&mut worker), [1]);
        assert!(matches!(worker.recv(LONG), Err(RecvError::PrimaryGone)));
        assert!(matches!(worker.recv(Duration::ZERO), Err(RecvError::PrimaryGone)));
    }
}

#[test]
fn a_worker_that_never_waits_notices_the_death() {
    let (primary, mut worker) = attach(attached());
    drop(primary.connection);
    while worker.recv(Duration::ZERO).is_ok() {}
}

#[test]
fn a_worker_asks_to_detach_once_and_waits_for_closing() {
    let (mut primary, mut worker) = attach(attached());
    worker.request_detach().unwrap();
    worker.request_detach().unwrap();
    let (request, _) = protocol::receive::<Request>(&primary.connection, MAX_REQUEST).unwrap();
    assert_eq!(request, Request::Detach);
    primary.send(0, 1);
    primary.down.set_phase(Phase::Closing);
    assert_eq!(contents(&mut worker), [1]);
    assert!(matches!(worker.recv(LONG).unwrap(), Received::Closed));
    drop(worker);
    let next = protocol::receive::<Request>(&primary.connection, MAX_REQUEST);
    assert!(matches!(next, Err(protocol::ProtocolError::Closed)), "{next:?}");
}

#[test]
fn an_unanswered_detach_request_times_out() {
    let (_primary, mut worker) = attach(attached());
    worker.request_detach().unwrap();
    assert!(matches!(worker.recv(LONG).unwrap(), Received::Closed));
}

#[test]
fn after_a_detach_request_a_closed_connection_is_fine() {
    let (primary, mut worker) = attach(attached());
    drop(primary.connection);
    worker.request_detach().unwrap();
    assert!(matches!(worker.recv(LONG).unwrap(), Received::Closed));
}

#[test]
fn packets_before_a_corrupt_descriptor_are_received() {
    let (mut primary, mut worker) = attach(attached());
    let offset = UmemOffset(u32::try_from(FRAME * FRAMES - 10).unwrap());
    primary.send(0, 1);
    assert!(primary.lanes[0].push(Descriptor { offset, length: 10, ..Descriptor::default() }));
    assert!(primary.lanes[0].push(Descriptor { offset, length: 11, ..Descriptor::default() }));
    assert_eq!(contents(&mut worker), [1, 0]);
    let error = worker.recv(LONG).unwrap_err();
    assert!(matches!(error, RecvError::Corrupt { lane: LaneId(0), length: 11, .. }), "{error}");
    assert!(error.to_string().contains("11 bytes at offset 4086, but the packet memory has 4096"), "{error}");
    assert_eq!(primary.take_back(0), 2);
    let outside = Descriptor { offset: UmemOffset(u32::MAX), length: u16::MAX, ..Descriptor::default() };
    assert!(primary.lanes[1].push(outside));
    assert!(matches!(worker.recv(LONG), Err(RecvError::Corrupt { .. })));
}

#[test]
fn the_dispatcher_sees_published_counters() {
    let (primary, mut worker) = attach(attached());
    let mut alerts = worker.counter("alerts").unwrap();
    let mut depth = worker.counter("depth").unwrap();
    alerts.add(2);
    alerts.add(3);
    depth.set(9);
    depth.set(4);
    assert_eq!((alerts.get(), depth.get()), (5, 4));
    let seen: Vec<_> = primary.up.published_counters().collect();
    assert_eq!(seen, [("alerts".into(), 5), ("depth".into(), 4)]);
    assert!(matches!(worker.counter("alerts"), Err(CounterError::Taken(_))));
    for name in ["", "Alerts", "a-b", "a_name_of_25_characters__"] {
        assert!(matches!(worker.counter(name), Err(CounterError::Name(_))), "{name}");
    }
    for n in 2..32 {
        worker.counter(&format!("c{n}")).unwrap();
    }
    assert!(matches!(worker.counter("one_more"), Err(CounterError::Full(_))));
}

#[test]
fn errors_say_what_is_wrong_with_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nobody.sock").to_str().unwrap().to_owned();
    assert!(
        error(&path).starts_with(&format!("no dispatcher listens on {path}: start one")),
        "{}",
        error(&path)
    );
    let stale = Socket::new().path;
    assert!(error(stale.to_str().unwrap()).starts_with("no dispatcher listens on"));
    assert!(error(&"x".repeat(200)).contains("cannot connect to"));
    assert!(matches!(Worker::attach(), Err(AttachError::NoSocket)), "unless the tests run under xfan");
    for packets in [0, 257] {
        assert!(matches!(Worker::builder().batch(packets).attach(), Err(AttachError::Batch(_))));
    }
}

#[test]
fn a_refusal_shows_its_reason() {
    let socket = Socket::new();
    let path = socket.path.clone();
    let message = "this dispatcher speaks version 2, the worker version 1".to_owned();
    let dispatcher = reply_once(socket, Reply::Refused(Refusal { code: RefusalCode::Version, message }));
    let error = Worker::attach_to(path).unwrap_err();
    dispatcher.join().unwrap();
    assert!(matches!(error, AttachError::Refused { code: RefusalCode::Version, .. }));
    assert_eq!(
        error.to_string(),
        "the dispatcher refused this worker: this dispatcher speaks version 2, the worker version 1"
    );
}

#[test]
fn a_report_takes_no_membership() {
    let answered = |reply: Reply| {
        let socket = Socket::new();
        let path = socket.path.clone();
        let dispatcher = thread::spawn(move || {
            let (connection, request) = socket.accept();
            assert_eq!(request, Request::Stats);
            protocol::send(&connection, &reply, &[]).unwrap();
        });
        let report = xfan_worker::report(path);
        dispatcher.join().unwrap();
        report
    };
    assert_eq!(answered(Reply::Stats("fine".into())).unwrap(), "fine");
    let refusal = Refusal { code: RefusalCode::Forbidden, message: "not you".into() };
    let error = answered(Reply::Refused(refusal)).unwrap_err();
    assert_eq!(error.to_string(), "the dispatcher refused to report: not you");
    let error = answered(Reply::Attached(attached())).unwrap_err();
    assert!(error.to_string().contains("sent an unexpected reply"), "{error}");
    let error = xfan_worker::report("/nowhere/x.sock").unwrap_err();
    assert!(error.to_string().starts_with("no dispatcher listens on /nowhere/x.sock"), "{error}");
}

#[test]
fn invalid_replies_are_refused() {
    for reply in [Reply::Stats(1.into()), Reply::Attached(attached())] {
        let socket = Socket::new();
        let path = socket.path.clone();
        let dispatcher = reply_once(socket, reply);
        assert!(matches!(Worker::attach_to(path), Err(AttachError::Unexpected(_))));
        dispatcher.join().unwrap();
    }
    let (_primary, worker) =
        try_attach(protocol::Attached { umem_bytes: u64::MAX, ..attached() }, |builder| builder);
    assert!(worker.unwrap_err().to_string().contains("packet memory: the segment has 4096 bytes"));
    let (_primary, worker) = try_attach(
        protocol::Attached { geometry: Geometry { lanes: 2, slots: 8 }, umem_bytes: 0, ..attached() },
        |builder| builder,
    );
    assert!(matches!(worker, Err(AttachError::Umem(_))));
}
