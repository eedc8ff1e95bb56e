//! A lane fed from memory: no root, no socket, no thread.

#![allow(unsafe_code, reason = "fakes of the kernel and of workers")]

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::AtomicU64;

use xfan_packet::{FlowKey, TCP};
use xfan_shm::bell;
use xfan_shm::clock::{monotonic_ns, stamped_ns};
use xfan_shm::ids::{GroupId, LaneId, MemberId, UmemOffset};
use xfan_shm::layout::{Down, Geometry, SharedRing, Up};
use xfan_shm::ring::{Consumer, Producer};
use xfan_shm::segment::{self, Mapping};

use super::*;
use crate::lane::counters::{Evidence, MemberCounters};
use crate::memory::frames::Tally;

mod groups;

const FRAME: u32 = 2048;
const POSTED: u32 = 8;
const SLOTS: u32 = 16;
/// Enough for two members of a group, whatever they do.
const FRAMES: u32 = frames_for(2);
const KEY: [u8; 16] = [5; 16];

/// Frames for so many members of all groups.
const fn frames_for(members: u32) -> u32 {
    POSTED + members * SLOTS + 64
}

/// An RX queue in memory.
struct Script {
    packets: VecDeque<Vec<u8>>,
    posted: VecDeque<UmemOffset>,
    memory: Arc<PacketMemory>,
    /// Hands out this frame again, as a broken driver does.
    again: Option<UmemOffset>,
    /// Has each packet arrive this long after the lane has asked for it, and notes when.
    late: Option<(Duration, Arc<AtomicU64>)>,
}

impl PacketSource for Script {
    fn receive(&mut self, batch: &mut [Received]) -> usize {
        if let Some((delay, arrived)) = self.late.as_ref().filter(|_| !self.packets.is_empty()) {
            std::thread::sleep(*delay);
            arrived.store(monotonic_ns(), Ordering::Relaxed);
        }
        let mut count = 0;
        while count < batch.len() && !self.packets.is_empty() {
            let Some(frame) = self.again.take().or_else(|| self.posted.pop_front()) else { break };
            let packet = self.packets.pop_front().unwrap();
            let offset = UmemOffset(frame.0 + 256);
            // SAFETY: the lane posted the frame, so nobody reads it; the packet is shorter than it.
            unsafe {
                let start = self.memory.base().add(offset.index());
                start.as_ptr().copy_from_nonoverlapping(packet.as_ptr(), packet.len());
            }
            batch[count] = Received { offset, length: u32::try_from(packet.len()).unwrap() };
            count += 1;
        }
        count
    }

    fn post(&mut self, frames: &mut Frames, count: u32) {
        self.posted.extend(frames.post(count));
    }

    fn wait(&mut self, _: BorrowedFd<'_>, _: Duration) {}
}

/// A lane and what the control thread has of it.
struct Bench {
    lane: Lane<Script>,
    shared: Arc<Shared>,
}

/// A worker's end.
struct Peer {
    ring: Consumer<SharedRing>,
    up: Up,
    doorbell: OwnedFd,
    counters: Arc<MemberCounters>,
    evidence: Arc<Evidence>,
}

/// A lane that serves one group.
fn bench() -> Bench {
    bench_of(1, FRAMES)
}

/// A lane that serves several groups.
fn bench_of(groups: usize, frames: u32) -> Bench {
    let length = (FRAME * frames) as usize;
    let fd = segment::create("lane-test", length).unwrap();
    let memory = Arc::new(PacketMemory::of_segment(&fd, Mapping::read_write(&fd, length).unwrap()).unwrap());
    let source = Script {
        packets: VecDeque::new(),
        posted: VecDeque::new(),
        memory: memory.clone(),
        again: None,
        late: None,
    };
    let zero = Duration::ZERO;
    let frames = NonZeroU32::new(frames).unwrap();
    let parts = LaneParts {
        port: PortId(3),
        queue: QueueId(0),
        core: 0,
        config: LaneConfig { batch: 64, posted: POSTED, spin: zero, yields: zero, shared: false },
        memory,
        region: Region { base: UmemOffset(0), frame_size: FRAME, frames },
        key: HashKey::from_bytes(KEY),
        groups,
        socket: None,
    };
    let lane = Lane::new(&parts, source).unwrap();
    let shared = lane.shared().clone();
    Bench { lane, shared }
}

/// The only group.
const ONLY: GroupId = GroupId(0);

/// A table of these members.
fn table(members: &[u8]) -> BucketTable {
    let members: Vec<MemberId> = members.iter().copied().map(MemberId).collect();
    BucketTable::empty().with_members(&members)
}

impl Bench {
    fn command(&mut self, command: Command) -> bool {
        self.shared.commands.push(command).unwrap();
        self.lane.run_commands()
    }

    fn join(&mut self, member: u8) -> Peer {
        self.join_as(member, Arc::default())
    }

    /// Another worker joins as the member that these counters are of.
    fn join_as(&mut self, member: u8, counters: Arc<MemberCounters>) -> Peer {
        self.join_in(ONLY, member, counters)
    }

    fn join_in(&mut self, group: GroupId, member: u8, counters: Arc<MemberCounters>) -> Peer {
        let geometry = Geometry { lanes: 1, slots: SLOTS };
        let down_fd = segment::create("down", geometry.down_bytes()).unwrap();
        let up_fd = segment::create("up", geometry.up_bytes()).unwrap();
        let (down, up) = (Down::create(&down_fd, geometry).unwrap(), Up::create(&up_fd, geometry).unwrap());
        let (ringer, doorbell) = bell::create().unwrap();
        let evidence = Arc::<Evidence>::default();
        let link = MemberLink {
            ring: Producer::new(SharedRing::new(&down, &up, LaneId(0))),
            up,
            doorbell: Arc::new(ringer),
            counters: counters.clone(),
            evidence: evidence.clone(),
        };
        self.command(Command::Join { group, member: MemberId(member), link: Box::new(link) });
        let up = Up::open(&up_fd, geometry).unwrap();
        let ring = Consumer::new(SharedRing::new(&Down::open(&down_fd, geometry).unwrap(), &up, LaneId(0)));
        Peer { ring, up, doorbell, counters, evidence }
    }

    fn retire(&mut self, member: u8, others: &[u8]) {
        self.retire_in(ONLY, member, others);
    }

    fn retire_in(&mut self, group: GroupId, member: u8, others: &[u8]) {
        let (member, table) = (MemberId(member), Box::new(table(others)));
        self.command(Command::Retire { group, member, table });
    }

    fn hold(&mut self, member: u8) {
        self.hold_in(ONLY, member);
    }

    fn hold_in(&mut self, group: GroupId, member: u8) {
        self.command(Command::Hold { group, member: MemberId(member) });
    }

    fn steer(&mut self, members: &[u8]) {
        self.steer_in(ONLY, members);
    }

    fn steer_in(&mut self, group: GroupId, members: &[u8]) {
        self.command(Command::Steer { group, table: Box::new(table(members)) });
    }

    /// Feeds packets, one batch after the other, until none is left or no frame.
    fn feed(&mut self, packets: impl IntoIterator<Item = Vec<u8>>) {
        self.lane.source.packets.extend(packets);
        let mut batch = [Received::default(); MAX_BATCH];
        loop {
            let count = self.lane.source.receive(&mut batch);
            if count == 0 {
                break;
            }
            self.lane.dispatch(&mut batch[..count], 77);
        }
        self.balanced();
    }

    /// Both equations, at any time between batches.
    fn balanced(&self) {
        let counters = &self.shared.counters;
        for group in &self.shared.groups {
            let dropped = counters.frame_owner.get() + group.ring_full.get() + group.no_worker.get();
            assert_eq!(counters.received.get(), group.delivered.get() + dropped);
        }
        assert_eq!(self.lane.frames.tally(), self.lane.frames.audit());
        assert_eq!(counters.tally(), self.lane.frames.tally());
    }

    /// The last byte of a packet.
    fn last_byte(&self, descriptor: Descriptor) -> u8 {
        // SAFETY: the lane has not taken the packet back yet.
        let packet =
            unsafe { self.lane.source.memory.packet(descriptor.offset, u32::from(descriptor.length)) };
        *packet.unwrap().last().unwrap()
    }

    /// Packets delivered in the only group.
    fn delivered(&self) -> u64 {
        self.shared.groups[0].delivered.get()
    }

    /// Packets dropped in the only group: `ring_full` and `no_worker`, and before it:
    /// `frame_owner`.
    fn dropped(&self) -> [u64; 3] {
        let [group] = &*self.shared.groups else { panic!("several groups") };
        [group.ring_full.get(), group.no_worker.get(), self.shared.counters.frame_owner.get()]
    }
}

impl Peer {
    /// Takes and commits all packets there are.
    fn take(&mut self) -> Vec<Descriptor> {
        let found: Vec<_> = (0..).map_while(|ahead| self.ring.peek(ahead)).collect();
        self.ring.commit(u32::try_from(found.len()).unwrap());
        found
    }

    /// How often it was rung since the last call.
    fn rung(&self) -> usize {
        nix::sys::socket::recv(
            self.doorbell.as_raw_fd(),
            &mut [0; 8],
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        )
        .unwrap_or(0)
    }
}

/// A flow by number.
fn flow(number: u16) -> FlowKey {
    FlowKey {
        source: Ipv4Addr::new(10, 0, (number >> 8) as u8, (number & 0xff) as u8).into(),
        destination: Ipv4Addr::new(10, 9, 9, 9).into(),
        source_port: number.wrapping_mul(7919),
        destination_port: 443,
        protocol: TCP,
    }
}

/// A TCP packet of a flow.
fn packet(key: FlowKey) -> Vec<u8> {
    let (std::net::IpAddr::V4(source), std::net::IpAddr::V4(destination)) = (key.source, key.destination)
    else {
        unreachable!("IPv4")
    };
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, key.protocol, 0, 0]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(key.source_port.to_be_bytes());
    frame.extend(key.destination_port.to_be_bytes());
    frame.resize(60, 0);
    frame
}

/// Which member takes a flow in a table of these members.
fn member_of(key: &FlowKey, members: &[u8]) -> u8 {
    table(members).member(HashKey::from_bytes(KEY).hash_key(key)).0
}

#[test]
fn both_directions_of_a_flow_reach_one_member() {
    let mut bench = bench();
    let mut peers = [bench.join(0), bench.join(1)];
    bench.steer(&[0, 1]);
    for round in 0..20u16 {
        let keys: Vec<FlowKey> = (0..4).map(|n| flow(round * 4 + n)).collect();
        bench.feed(keys.iter().flat_map(|key| [packet(*key), packet(key.reversed())]));
        for (member, peer) in (0..).zip(&mut peers) {
            let expected: Vec<u32> = keys
                .iter()
                .filter(|key| member_of(key, &[0, 1]) == member)
                .flat_map(|key| [HashKey::from_bytes(KEY).hash_key(key); 2])
                .collect();
            let got = peer.take();
            assert_eq!(got.iter().map(|descriptor| descriptor.hash).collect::<Vec<_>>(), expected);
            assert!(got.iter().all(|d| (d.length, d.port, d.time, d.flags) == (60, PortId(3), 77, 0)));
        }
    }
    bench.lane.settle();
    bench.balanced();
    assert_eq!(bench.delivered(), 160);
    assert_eq!(bench.dropped(), [0, 0, 0]);
    let committed: u64 = peers.iter().map(|peer| peer.counters.committed.get()).sum();
    assert_eq!(committed, 160);
    let tally = bench.lane.frames.tally();
    assert_eq!((tally.kernel, tally.lent), (POSTED, 0));
}

#[test]
fn a_full_ring_costs_only_its_member() {
    let mut bench = bench();
    let (slow, mut quick) = (bench.join(0), bench.join(1));
    bench.steer(&[0, 1]);
    let (mut for_slow, mut for_quick) = (0, 0);
    for n in 0..100 {
        let key = flow(n);
        bench.feed([packet(key)]);
        if member_of(&key, &[0, 1]) == 0 {
            for_slow += 1;
        } else {
            for_quick += 1;
            assert_eq!(quick.take().len(), 1);
        }
        // Whatever workers have, what the kernel needs is there.
        assert_eq!(bench.lane.frames.tally().kernel, POSTED);
    }
    assert!(for_slow > u64::from(SLOTS), "the test needs more packets for the slow one");
    assert_eq!(slow.counters.delivered.get(), u64::from(SLOTS));
    assert_eq!(slow.counters.dropped.get(), for_slow - u64::from(SLOTS));
    assert_eq!((quick.counters.delivered.get(), quick.counters.dropped.get()), (for_quick, 0));
    assert_eq!(bench.dropped(), [for_slow - u64::from(SLOTS), 0, 0]);
}

#[test]
fn packets_without_a_member_are_dropped_and_counted() {
    let mut bench = bench();
    bench.feed((0..20).map(|n| packet(flow(n))));
    assert_eq!(bench.dropped(), [0, 20, 0]);
    // A table that names a member without a worker.
    bench.steer(&[7]);
    bench.feed((0..5).map(|n| packet(flow(n))));
    assert_eq!(bench.dropped(), [0, 25, 0]);
    assert_eq!(
        bench.lane.frames.tally(),
        Tally { total: FRAMES, free: FRAMES - POSTED, kernel: POSTED, lent: 0, tx: 0 }
    );
    assert_eq!(BucketTable::empty().member(0), NOBODY);
}

#[test]
fn packets_of_the_last_member_are_lost_and_freed() {
    let mut bench = bench();
    let mut peer = bench.join(0);
    bench.steer(&[0]);
    bench.feed((0..10).map(|n| packet(flow(n))));
    // It reads ten and commits four.
    assert!(peer.ring.peek(9).is_some());
    peer.ring.commit(4);
    bench.retire(0, &[]);
    bench.balanced();
    let counters = &peer.counters;
    assert_eq!((counters.delivered.get(), counters.committed.get(), counters.lost.get()), (10, 4, 6));
    assert_eq!(bench.lane.frames.tally().lent, 0);
    bench.feed([packet(flow(1))]);
    assert_eq!(bench.dropped(), [0, 1, 0]);
}

#[test]
fn requeued_packets_come_before_newer_ones() {
    let mut bench = bench();
    let (mut gone, mut heir) = (bench.join(0), bench.join(1));
    bench.steer(&[0, 1]);
    bench.feed((0..12).map(numbered));
    let had = gone.counters.delivered.get();
    let own = heir.take().len() as u64;
    assert!(had > 1 && own > 0 && had + own == 12);
    assert!(gone.ring.peek(1).is_some());
    gone.ring.commit(1);
    bench.retire(0, &[1]);
    bench.feed((12..16).map(numbered));

    let counters = &gone.counters;
    assert_eq!((counters.committed.get(), counters.requeued.get(), counters.lost.get()), (1, had - 1, 0));
    let taken = heir.take();
    assert_eq!(taken.len() as u64, had - 1 + 4);
    assert_eq!(heir.counters.delivered.get(), own + had - 1 + 4);
    let numbers: Vec<u8> = taken.iter().map(|descriptor| bench.last_byte(*descriptor)).collect();
    assert!(numbers.is_sorted(), "{numbers:?}");
    for (descriptor, number) in taken.iter().zip(numbers) {
        let flags = if number < 12 { Descriptor::REDELIVERED } else { 0 };
        assert_eq!(descriptor.flags, flags, "packet {number}");
    }
    bench.lane.settle();
    bench.balanced();
    assert_eq!(bench.lane.frames.tally().lent, 0);
    assert_eq!(bench.dropped(), [0, 0, 0]);
}

/// A packet of one of four flows, with its number at the end.
fn numbered(n: u8) -> Vec<u8> {
    let mut packet = packet(flow(u16::from(n % 4)));
    packet.push(n);
    packet
}

#[test]
fn held_packets_reach_the_next_worker_in_order() {
    let mut bench = bench();
    let (mut gone, mut other) = (bench.join(0), bench.join(1));
    bench.steer(&[0, 1]);
    bench.feed((0..12).map(numbered));
    let (had, own) = (gone.counters.delivered.get(), other.take().len() as u64);
    assert!(had > 1 && own > 0);
    assert!(gone.ring.peek(1).is_some());
    gone.ring.commit(1);
    bench.hold(0);
    bench.feed((12..16).map(numbered));
    // It is not dead after all, and goes on as if nothing had happened: nobody listens.
    gone.ring.commit(1);
    bench.lane.settle();
    bench.balanced();
    let counters = gone.counters.clone();
    assert_eq!((counters.committed.get(), counters.requeued.get(), counters.lost.get()), (1, 0, 0));
    let delivered = counters.delivered.get();
    assert!(delivered > had && gone.evidence.impossible_index().is_none());
    assert_eq!(u64::from(bench.lane.frames.tally().lent), delivered - 1 + (16 - delivered - own));

    let mut next = bench.join_as(0, counters.clone());
    bench.feed((16..20).map(numbered));
    let taken = next.take();
    let numbers: Vec<u8> = taken.iter().map(|descriptor| bench.last_byte(*descriptor)).collect();
    let its = |n: &u8| member_of(&flow(u16::from(n % 4)), &[0, 1]) == 0;
    let expected: Vec<u8> = (0..20).filter(its).skip(1).collect();
    assert_eq!(numbers, expected);
    for (descriptor, number) in taken.iter().zip(numbers) {
        let flags = if number < 12 { Descriptor::REDELIVERED } else { 0 };
        assert_eq!(descriptor.flags, flags, "packet {number}");
    }
    other.take();
    bench.lane.settle();
    bench.balanced();
    let expected = expected.len() as u64 + 1;
    assert_eq!((counters.delivered.get(), counters.committed.get()), (expected, expected));
    assert_eq!((counters.requeued.get(), counters.lost.get(), counters.dropped.get()), (0, 0, 0));
    assert_eq!(bench.lane.frames.tally().lent, 0);
}

#[test]
fn a_full_held_ring_fits_into_the_next_one() {
    let mut bench = bench();
    let gone = bench.join(0);
    bench.steer(&[0]);
    bench.feed((0..4).map(numbered));
    bench.hold(0);
    // Once more: nothing has changed.
    bench.feed((4..6).map(numbered));
    bench.hold(0);
    bench.feed((6..20).map(numbered));
    assert_eq!(bench.dropped(), [20 - u64::from(SLOTS), 0, 0]);
    let mut next = bench.join_as(0, gone.counters.clone());
    let taken = next.take();
    assert_eq!(taken.len(), SLOTS as usize);
    assert_eq!(taken.iter().filter(|descriptor| descriptor.flags == Descriptor::REDELIVERED).count(), 4);
    bench.lane.settle();
    bench.balanced();
    let counters = &gone.counters;
    assert_eq!((counters.delivered.get(), counters.committed.get()), (u64::from(SLOTS), u64::from(SLOTS)));
    assert_eq!((counters.dropped.get(), bench.lane.frames.tally().lent), (20 - u64::from(SLOTS), 0));
}

#[test]
fn held_packets_without_a_next_worker_are_requeued() {
    let mut bench = bench();
    let (gone, mut heir) = (bench.join(0), bench.join(1));
    bench.steer(&[0, 1]);
    bench.feed((0..8).map(numbered));
    heir.take();
    let seen = gone.counters.delivered.get();
    bench.hold(0);
    bench.feed((8..12).map(numbered));
    heir.take();
    let held = gone.counters.delivered.get();
    bench.retire(0, &[1]);
    let taken = heir.take();
    assert_eq!((taken.len() as u64, gone.counters.requeued.get(), gone.counters.lost.get()), (held, held, 0));
    let flagged = taken.iter().filter(|descriptor| descriptor.flags == Descriptor::REDELIVERED).count();
    assert_eq!(flagged as u64, seen);
    bench.lane.settle();
    bench.balanced();
    assert_eq!((bench.lane.frames.tally().lent, bench.dropped()), (0, [0, 0, 0]));
}

#[test]
fn packets_that_fit_no_other_ring_are_lost_and_freed() {
    let mut bench = bench();
    let (gone, heir) = (bench.join(0), bench.join(1));
    bench.steer(&[0, 1]);
    bench.feed((0..100).map(|n| packet(flow(n))));
    let slots = u64::from(SLOTS);
    assert_eq!((gone.counters.delivered.get(), heir.counters.delivered.get()), (slots, slots));
    bench.retire(0, &[1]);
    bench.balanced();
    assert_eq!((gone.counters.requeued.get(), gone.counters.lost.get()), (0, slots));
    assert_eq!(u64::from(bench.lane.frames.tally().lent), slots);
}

#[test]
fn an_impossible_index_costs_only_its_worker() {
    let mut bench = bench();
    let (mut liar, mut honest) = (bench.join(0), bench.join(1));
    bench.steer(&[0, 1]);
    bench.feed((0..16).map(|n| packet(flow(n))));
    let had = liar.counters.delivered.get();
    // Further than anything it was given.
    liar.ring.commit(1000);
    bench.lane.settle();
    bench.balanced();
    let lie = liar.evidence.impossible_index().unwrap();
    assert!((lie.consumed, lie.seen) == (0, 1000) && lie.head <= 16, "{lie}");
    assert!(honest.evidence.impossible_index().is_none());
    let count = honest.take().len() as u64;
    assert_eq!((count, honest.counters.delivered.get()), (16 - had, 16 - had));
    // Also if it tells the truth now: nothing is taken back until it is retired, and then all it
    // had goes to the other.
    liar.ring.commit(0u32.wrapping_sub(1000));
    bench.lane.settle();
    assert_eq!(u64::from(bench.lane.frames.tally().lent), had);
    bench.retire(0, &[1]);
    assert_eq!((liar.counters.committed.get(), liar.counters.requeued.get()), (0, had));
    assert_eq!(honest.take().len() as u64, had);
    bench.feed((0..16).map(|n| packet(flow(n))));
    assert_eq!(honest.take().len(), 16);
    assert_eq!(bench.dropped(), [0, 0, 0]);
}

#[test]
fn a_frame_that_was_not_posted_is_not_delivered() {
    let mut bench = bench();
    let mut peer = bench.join(0);
    bench.steer(&[0]);
    bench.feed([packet(flow(1))]);
    let lent = UmemOffset(peer.ring.peek(0).unwrap().offset.0 - 256);
    // The driver hands over the frame that the worker is reading.
    bench.lane.source.again = Some(lent);
    bench.feed([packet(flow(2)), packet(flow(3))]);
    assert_eq!(bench.dropped(), [0, 0, 1]);
    assert_eq!(peer.take().len(), 2);
}

#[test]
fn packets_without_a_tuple_are_flagged() {
    let mut bench = bench();
    let mut peer = bench.join(0);
    bench.steer(&[0]);
    bench.feed([vec![0; 14], vec![0xff; 60], packet(flow(1))]);
    assert_eq!(bench.shared.counters.unparsed.get(), 2);
    let flags: Vec<u8> = peer.take().iter().map(|descriptor| descriptor.flags).collect();
    assert_eq!(flags, [Descriptor::UNPARSED, Descriptor::UNPARSED, 0]);
}

#[test]
fn cut_packets_are_counted_flagged_and_delivered() {
    let mut bench = bench();
    let mut peer = bench.join(0);
    bench.steer(&[0]);
    // 40 bytes of IP behind 14 of Ethernet; what follows is padding.
    let of = |length: usize| packet(flow(1))[..length].to_vec();
    bench.feed([of(60), of(54), of(53), of(37), of(30), of(14)]);
    assert_eq!((bench.shared.counters.cut.get(), bench.shared.counters.unparsed.get()), (4, 2));
    assert_eq!((bench.delivered(), bench.dropped()), (6, [0, 0, 0]));
    const UNPARSED: u8 = Descriptor::UNPARSED;
    const CUT: u8 = Descriptor::CUT;
    let taken = peer.take();
    let flags: Vec<u8> = taken.iter().map(|descriptor| descriptor.flags).collect();
    assert_eq!(flags, [0, 0, CUT, CUT, UNPARSED | CUT, UNPARSED | CUT]);
    // With its ports it is of its flow, cut or not.
    assert!(taken[..3].iter().all(|descriptor| descriptor.hash == taken[0].hash));
}

#[test]
fn only_a_sleeping_worker_is_rung_and_once() {
    let mut bench = bench();
    let peer = bench.join(0);
    bench.steer(&[0]);
    bench.feed([packet(flow(1))]);
    assert_eq!(peer.rung(), 0);
    let mut sleeper = xfan_shm::doorbell::Sleeper::default();
    sleeper.announce(peer.up.epoch());
    bench.feed([packet(flow(2))]);
    bench.feed([packet(flow(3))]);
    assert_eq!((peer.rung(), peer.counters.wakeups.get()), (1, 1));
    sleeper.awake(peer.up.epoch());
    bench.feed([packet(flow(4))]);
    assert_eq!(peer.rung(), 0);
}

#[test]
fn a_packet_has_no_time_before_its_arrival() {
    let mut bench = bench();
    let peer = bench.join(0);
    bench.steer(&[0]);
    let arrived = Arc::<AtomicU64>::default();
    bench.lane.source.late = Some((Duration::from_millis(3), arrived.clone()));
    bench.lane.source.packets.push_back(packet(flow(1)));
    let Bench { lane, shared } = bench;
    let lane = std::thread::spawn(move || lane.run());
    while shared.groups[0].delivered.get() == 0 {
        std::thread::yield_now();
    }
    let time = stamped_ns(peer.ring.peek(0).unwrap().time, monotonic_ns());
    let (arrived, now) = (arrived.load(Ordering::Relaxed), monotonic_ns());
    // A microsecond for the clock, one for the unit.
    assert!(time + 2048 >= arrived && time <= now, "{arrived} {time} {now}");
    shared.commands.push(Command::Stop).unwrap();
    lane.join().unwrap();
}

#[test]
fn stop_retires_all_and_ends_the_loop() {
    let mut bench = bench();
    let peer = bench.join(0);
    bench.steer(&[0]);
    bench.feed((0..3).map(|n| packet(flow(n))));
    bench.shared.commands.push(Command::Stop).unwrap();
    let frames = bench.lane.run();
    assert_eq!(peer.counters.lost.get(), 3);
    assert_eq!(
        frames.audit(),
        Tally { total: FRAMES, free: FRAMES - POSTED, kernel: POSTED, lent: 0, tx: 0 }
    );
}
