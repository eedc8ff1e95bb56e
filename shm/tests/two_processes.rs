//! The ring between two real processes, in segments such as the dispatcher and a worker share. Each
//! of a hundred million descriptors arrives once, in order and complete. Each frame comes back
//! once, in order, also from a worker that is killed.
//!
//! The consuming process is this test program itself, started with an environment variable. Its
//! standard input is the control socket.
#![cfg(not(any(miri, loom)))]

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};
use xfan_shm::ids::{LaneId, PortId, UmemOffset};
use xfan_shm::layout::{Down, Geometry, SharedRing, Up};
use xfan_shm::protocol::{self, MAX_REQUEST};
use xfan_shm::ring::{Consumer, Producer, RingMemory};
use xfan_shm::{Descriptor, segment};

const ENV_CONSUMER: &str = "XFAN_TEST_CONSUMER";

/// Largest batch of both sides.
const BATCH: u32 = 64;

/// The consumer's task.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Job {
    geometry: Geometry,
    /// Position at which the ring starts.
    start: u32,
    /// Descriptors to take.
    items: u32,
}

/// Descriptor number `n`. No two neighbours agree in any field.
fn numbered(n: u32) -> Descriptor {
    let [port, flags, ..] = n.wrapping_mul(0x9e37_79b9).to_be_bytes();
    let length = u16::try_from(n % 65_521).expect("less than 2^16");
    Descriptor {
        offset: UmemOffset(n),
        time: !n,
        length,
        port: PortId(port),
        flags: flags & 0x7f,
        hash: n.rotate_left(13) ^ 0x5bd1_e995,
    }
}

/// Pseudorandom sizes of batches, 1 to [`BATCH`], by xorshift.
struct Batches(u32);

impl Batches {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        1 + self.0 % BATCH
    }
}

/// Waits for the other process: spins first, then yields, since the two may share a core.
#[derive(Default)]
struct Idle(u32);

impl Idle {
    fn wait(&mut self) {
        self.0 += 1;
        if self.0 < 50 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }

    fn over(&mut self) {
        self.0 = 0;
    }
}

/// The consuming process. Run as a test, without the environment variable, it does nothing.
#[test]
fn consumer() {
    if std::env::var_os(ENV_CONSUMER).is_none() {
        return;
    }
    let socket = std::io::stdin();
    let (job, fds) = protocol::receive::<Job>(&socket, MAX_REQUEST).unwrap();
    let [down, up] = <[OwnedFd; 2]>::try_from(fds).unwrap();
    let (down, up) = (Down::open(down, job.geometry).unwrap(), Up::open(up, job.geometry).unwrap());
    let ring = SharedRing::new(&down, &up, LaneId(0));
    ring.consumer().store(job.start, std::sync::atomic::Ordering::Release);
    let mut consumer = Consumer::starting_at(ring, job.start);
    protocol::send(&socket, &"ready", &[]).unwrap();

    let (mut batches, mut idle) = (Batches(1), Idle::default());
    let mut next = 0;
    while next < job.items {
        let wanted = batches.next().min(job.items - next);
        let mut seen = 0;
        while seen < wanted {
            let Some(descriptor) = consumer.peek(seen) else { break };
            assert_eq!(descriptor, numbered(next + seen));
            seen += 1;
        }
        if seen == 0 {
            idle.wait();
        } else {
            idle.over();
            consumer.commit(seen);
            next += seen;
            up.counter(0).1.store(next.into(), std::sync::atomic::Ordering::Relaxed);
        }
    }
    assert_eq!(consumer.peek(0), None);
    protocol::send(&socket, &next, &[]).unwrap();
}

/// A consuming process, and the producing end of its ring.
struct Peer {
    process: Child,
    socket: OwnedFd,
    up: Up,
    producer: Producer<SharedRing>,
}

impl Peer {
    fn start(job: Job) -> Self {
        let down_fd = segment::create("down", job.geometry.down_bytes()).unwrap();
        let up_fd = segment::create("up", job.geometry.up_bytes()).unwrap();
        let down = Down::create(&down_fd, job.geometry).unwrap();
        let up = Up::create(&up_fd, job.geometry).unwrap();
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "consumer"])
            .env(ENV_CONSUMER, "1")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let read_only = segment::reopen_read_only(&down_fd).unwrap();
        protocol::send(&socket, &job, &[read_only.as_fd(), up_fd.as_fd()]).unwrap();
        let (ready, _) = protocol::receive::<String>(&socket, MAX_REQUEST).unwrap();
        assert_eq!(ready, "ready");
        let producer = Producer::starting_at(SharedRing::new(&down, &up, LaneId(0)), job.start);
        Peer { process, socket, up, producer }
    }

    /// Pushes descriptors until `items` are pushed, `stop` returns `true` or the consumer has
    /// exited. Checks those that come back, where `returned` is the number of the next one. Returns
    /// how many were pushed.
    fn produce(&mut self, items: u32, returned: &mut u32, mut stop: impl FnMut() -> bool) -> u32 {
        let (mut batches, mut idle) = (Batches(7), Idle::default());
        let mut pushed = 0;
        while pushed < items && !stop() {
            let batch = batches.next().min(items - pushed);
            let mut left = batch;
            while left > 0 && self.producer.push(numbered(pushed)) {
                pushed += 1;
                left -= 1;
            }
            if left > 0 && self.take_back(returned) == 0 {
                idle.wait();
                if idle.0.is_multiple_of(4096) && self.process.try_wait().unwrap().is_some() {
                    break; // the ring stays full for ever
                }
            } else {
                idle.over();
            }
        }
        pushed
    }

    fn take_back(&mut self, returned: &mut u32) -> u32 {
        let count = self.producer.take_back(|offset| {
            assert_eq!(offset, numbered(*returned).offset);
            *returned += 1;
        });
        count.unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A start position from which a ring of `slots` slots wraps around after about half of `items`.
fn start_before_wrap(items: u32, slots: u32) -> u32 {
    0u32.wrapping_sub(items / 2).next_multiple_of(2 * slots)
}

#[test]
fn a_hundred_million_descriptors_arrive_once_in_order() {
    // A small ring needs a hand-over between the processes every few descriptors, so it gets fewer.
    let mut total = 0;
    for (slots, items) in [(8, 500_000), (64, 3_500_000), (512, 16_000_000), (8192, 80_000_000)] {
        let start = start_before_wrap(items, slots);
        let mut peer = Peer::start(Job { geometry: Geometry { lanes: 1, slots }, start, items });
        let mut returned = 0;
        assert_eq!(peer.produce(items, &mut returned, || false), items);
        let (taken, _) = protocol::receive::<u32>(&peer.socket, MAX_REQUEST).unwrap();
        assert_eq!(taken, items);
        peer.take_back(&mut returned);
        assert_eq!((returned, peer.producer.lent()), (items, 0));
        assert!(peer.process.wait().unwrap().success());
        total += items;
    }
    assert_eq!(total, 100_000_000);
}

#[test]
fn a_killed_consumer_loses_no_descriptor() {
    for round in 0..20u32 {
        let slots = if round % 2 == 0 { 16 } else { 4096 };
        let start = start_before_wrap(100_000, slots);
        let mut peer = Peer::start(Job { geometry: Geometry { lanes: 1, slots }, start, items: u32::MAX });
        let pid = nix::unistd::Pid::from_raw(peer.process.id().try_into().unwrap());
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(500 * u64::from(round)));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        });
        let mut returned = 0;
        let pushed = peer.produce(u32::MAX, &mut returned, || killer.is_finished());
        killer.join().unwrap();
        peer.process.wait().unwrap();

        // First the last of what it committed, then everything else.
        peer.take_back(&mut returned);
        let committed = returned;
        let uncommitted = peer.producer.take_all(|descriptor| {
            assert_eq!(descriptor, numbered(returned));
            returned += 1;
        });
        assert_eq!((returned, committed + uncommitted), (pushed, pushed));
        // The consumer counts after each commit. If it died in between, its count is a batch
        // behind.
        let counted = u32::try_from(peer.up.counter(0).1.load(std::sync::atomic::Ordering::Relaxed)).unwrap();
        assert!((counted..=counted + BATCH).contains(&committed), "{committed} committed, {counted} counted");
        assert_eq!(peer.producer.free_slots(), slots);
    }
}
