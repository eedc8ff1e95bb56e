//! Flows from the wire to the workers' records: every packet and byte is where an independent
//! parser expects it, and every flow belongs to exactly one worker.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

use xfan::report::{Kernel, Report, Xdp};
use xfan_tests::capture::Capture;
use xfan_tests::community_id::{self, Known, references};
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::oracle::{self, Expectation, Flow, Totals, Verdict};
use xfan_tests::primary::{FlowRecord, Launch, Primary, flow_records};
use xfan_tests::replay::{OpenReplay, Replay};
use xfan_tests::traffic::{self, Echo};
use xfan_tests::veth::{Veth, VethConfig};

/// The largest MTU of a veth with an XDP program, so that the fewest captured frames are too long.
const MTU: u32 = 3498;
/// Packets that a lane and a worker's ring hold. The tests never send more at once, so that none is
/// dropped, however late lanes and workers get a CPU.
const DEPTH: usize = 1024;
const CONFIG: &str = "frame_size = 4096\nrx_ring = 1024\nring_slots = 1024\n";
const KEY: &str = "hash_key = '000102030405060708090a0b0c0d0e0f'\n";

/// A veth pair, and sockets on all queues of its sending end.
struct Network {
    namespace: Netns,
    sender: OpenReplay,
    queues: usize,
}

impl Network {
    fn new(queues: u32) -> Self {
        let namespace = Netns::quiet().unwrap();
        Veth::create(&VethConfig { mtu: MTU, ..VethConfig::queues(queues) }, &namespace, &namespace).unwrap();
        let sender = namespace.run(|| Replay::onto("tx0").open()).unwrap();
        Network { namespace, sender, queues: queues as usize }
    }
}

fn expectation<'a>(frames: impl IntoIterator<Item = &'a Vec<u8>>) -> Expectation {
    Expectation::of(frames.into_iter().map(Vec::as_slice), &[])
}

/// A dispatcher with `xfan-flow` workers, and all frames that were sent to it.
struct Metering<'a> {
    sender: &'a mut OpenReplay,
    primary: Primary,
    /// The frames by queue.
    sent: Vec<Vec<Vec<u8>>>,
}

impl<'a> Metering<'a> {
    fn start(network: &'a mut Network, workers: usize, config: &str) -> Self {
        let Network { namespace, sender, queues } = network;
        let launch = Launch::on(namespace).unwrap().config(&(CONFIG.to_owned() + config)).unwrap();
        let primary = launch.flow_workers(workers).unwrap().start().unwrap();
        Metering { sender, primary, sent: vec![Vec::new(); *queues] }
    }

    /// Sends the frames to the queues in turn and waits until workers have committed all.
    fn replay(&mut self, frames: &[Vec<u8>]) -> Report {
        assert!(frames.len() <= DEPTH, "{} frames might not fit the rings", frames.len());
        let report = self.sender.run(frames).unwrap();
        assert_eq!(report.packets, frames.len() as u64);
        let queues = (0..self.sent.len()).cycle();
        frames.iter().zip(queues).for_each(|(frame, queue)| self.sent[queue].push(frame.clone()));
        self.primary.report_after(expectation(self.sent.iter().flatten()).redirected, true)
    }

    /// Compares a report, taken when workers had committed everything, with what was sent.
    fn check(&self, report: &Report, what: &str) {
        assert_eq!(report.ports[0].lanes.len(), self.sent.len());
        for ((lane, of_group), sent) in report.lanes().zip(&report.groups[0].lanes).zip(&self.sent) {
            let expected = expectation(sent);
            let what = format!("{what}, queue {}", lane.queue);
            assert_eq!(lane.xdp, outcomes(&expected), "{what}");
            assert_eq!(lane.received, expected.redirected, "{what}");
            assert_eq!(lane.bytes, expected.redirected_bytes, "{what}");
            let delivered = (of_group.delivered, lane.unparsed);
            assert_eq!(delivered, (expected.redirected, expected.unreadable), "{what}");
            assert_eq!(lane.cut, expected.cut, "{what}");
            let dropped: u64 = lane.dropped.values().chain(of_group.dropped.values()).sum();
            assert_eq!(dropped, 0, "{what}: {:?} {:?}", lane.dropped, of_group.dropped);
            assert_eq!(lane.kernel, Kernel::default(), "{what}");
        }
        let expected = expectation(self.sent.iter().flatten());
        assert_eq!(report.ports[0].unserved, Xdp::default(), "{what}");
        assert_eq!(report.totals(), (expected.redirected, expected.redirected, 0), "{what}");
        let members = &report.groups[0].members;
        let sum = |of: fn(&xfan::report::Member) -> u64| members.iter().map(of).sum::<u64>();
        assert_eq!(sum(|member| member.delivered), expected.redirected, "{what}");
        assert_eq!(sum(|member| member.committed), expected.redirected, "{what}");
        assert_eq!(sum(|member| member.dropped + member.lost), 0, "{what}");
        assert_eq!(sum(|member| member.counters["packets_unparsed"]), expected.unreadable, "{what}");
    }

    /// Stops the dispatcher, compares the workers' records with what was sent, and returns the
    /// record of each flow.
    fn finish(self) -> BTreeMap<Flow, FlowRecord> {
        let report = self.primary.report();
        let (exit, folder) = self.primary.stop();
        assert_eq!(exit.code, Some(0), "{exit:?}");
        let mut records = BTreeMap::new();
        for record in flow_records(&folder) {
            if let Some(earlier) = records.insert(record.flow(), record) {
                panic!("a flow has a second record, {earlier:?}");
            }
        }
        let expected = expectation(self.sent.iter().flatten());
        assert_eq!(records.keys().collect::<Vec<_>>(), expected.flows.keys().collect::<Vec<_>>());
        for (flow, totals) in &expected.flows {
            let record = &records[flow];
            assert_eq!((record.packets, record.bytes), (totals.packets, totals.bytes), "{flow:?}");
            assert!(totals.community_ids.contains(&record.community_id), "{flow:?}: {record:?}");
            assert!(record.first <= record.last, "{record:?}");
        }
        // The report agrees with what each worker printed.
        for member in &report.groups[0].members {
            let of_member = records.values().filter(|record| record.member == member.id);
            let packets: u64 = of_member.map(|record| record.packets).sum();
            assert_eq!(member.delivered, packets + member.counters["packets_unparsed"], "{}", member.id);
        }
        records
    }
}

/// The counts that the XDP program should have.
fn outcomes(expected: &Expectation) -> Xdp {
    let Expectation { redirected, non_ip, neighbour_discovery, rule, .. } = *expected;
    Xdp {
        drop_too_long: 0,
        redirect: redirected,
        pass: non_ip + neighbour_discovery + rule,
        pass_non_ip: non_ip,
        pass_nd: neighbour_discovery,
        pass_rule: rule,
        pass_no_socket: 0,
    }
}

/// 200 flows of all kinds, interleaved with frames that are hard to parse or belong to the kernel.
fn synthetic() -> Vec<Vec<u8>> {
    let mut frames = traffic::synthetic(200, 900, 1).frames;
    for (number, frame) in oddities().into_iter().enumerate() {
        frames.insert(number * 17 % frames.len(), frame);
    }
    frames
}

fn oddities() -> Vec<Vec<u8>> {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let udp4 = traffic::udp(address("10.9.0.2:4000"), address("10.9.0.1:53"), &[7; 200]);
    let udp6 = traffic::udp(address("[2001:db8::9:2]:4000"), address("[2001:db8::9:1]:53"), &[7; 200]);
    let (near, far) = ("fe80::2".parse().unwrap(), "fe80::1".parse().unwrap());
    let echo = traffic::echo(near, far, Echo::Request, 0, &[0; 24]);
    let with = |frame: &[u8], changes: &[(usize, u8)]| {
        let mut frame = frame.to_vec();
        changes.iter().for_each(|&(at, byte)| frame[at] = byte);
        frame
    };
    let mut frames = vec![
        with(&udp4, &[(12, 0x08), (13, 0x06)]),                        // ARP
        with(&udp4, &[(12, 0x88), (13, 0xcc)]),                        // LLDP
        with(&udp4, &[(14, 0x43)]),                                    // a header of 12 bytes
        with(&udp4, &[(14, 0x65)]),                                    // IPv6, wrong ethertype
        with(&udp4, &[(14, 0x4f), (17, 150)]),                         // 40 bytes of options
        with(&udp4[..40], &[(14, 0x4f)]),                              // cut off within options
        with(&udp4, &[(16, 0), (17, 22)]),                             // padding, no ports
        with(&udp4, &[(23, 6)]),                                       // TCP
        with(&udp4, &[(23, 132)]),                                     // SCTP
        with(&udp4, &[(23, 33)]),                                      // DCCP
        with(&udp6, &[(20, 33)]),                                      // DCCP
        with(&udp4, &[(23, 136)]),                                     // UDP-Lite
        with(&udp4, &[(16, 0), (17, 0)]), // total length 0, as left by segmentation offload
        with(&udp4, &[(16, 0), (17, 19)]), // shorter than its header
        with(&udp4, &[(23, 47)]),         // GRE: no ports
        udp4[..30].to_vec(),              // cut off within the header
        udp4[..36].to_vec(),              // cut off within the ports
        udp4[..14].to_vec(),              // cut off after the Ethernet header
        udp6[..50].to_vec(),              // cut off within the header
        with(&udp6, &[(20, 0), (54, 43), (55, 0), (62, 17), (63, 0)]), // two extension headers
        with(&udp6, &[(20, 60), (54, 17), (55, 99)]), // an extension header longer than the packet
        with(&udp6, &[(20, 59)]),         // no next header
        with(&udp6, &[(18, 0), (19, 0)]), // payload length 0: the rest is a trailer
        with(&udp6, &[(18, 0), (19, 3)]), // the same, ending in the ports
        with(&udp6, &[(18, 0), (19, 7), (20, 44), (54, 17), (57, 1)]), // ending in a fragment header
        // Payload length 0 and hop-by-hop options: padding, a jumbo payload, a jumbo payload of 11
        // bytes
        with(&udp6, &[(18, 0), (19, 0), (20, 0), (54, 17), (55, 0), (56, 1), (57, 4)]),
        with(&udp6, &[(18, 0), (19, 0), (20, 0), (54, 17), (55, 0), (56, 0xc2), (57, 4), (58, 0), (59, 1)]),
        with(
            &udp6,
            &[
                (18, 0),
                (19, 0),
                (20, 0),
                (54, 17),
                (55, 0),
                (56, 0xc2),
                (57, 4),
                (58, 0),
                (59, 0),
                (60, 0),
                (61, 11),
            ],
        ),
        traffic::tagged(&udp4, &[(0x8100, 1), (0x8100, 2), (0x8100, 3)]),
        traffic::tagged(&udp6, &[(0x88a8, 1), (0x8100, 2)]),
        traffic::tagged(&udp4, &[(0x9100, 1), (0x8100, 2)]),
        traffic::tagged(&udp4, &[(0x8100, 1)])[..16].to_vec(), // cut off within the tag
    ];
    for kind in 132..=138 {
        frames.push(with(&echo, &[(54, kind)]));
        frames.push(with(&echo, &[(54, kind), (21, 255)]));
        frames.push(with(&echo, &[(54, kind), (21, 255), (18, 0), (19, 0)]));
    }
    for frame in [&udp4, &udp6] {
        frames.extend(traffic::fragments(frame, 64));
    }
    frames
}

/// The frames of every capture in the folder that `XFAN_PCAPS` names. Frames longer than the veth
/// takes are truncated, with a message.
fn captures() -> Vec<(String, Vec<Vec<u8>>)> {
    let Some(folder) = std::env::var_os(community_id::CAPTURES) else {
        eprintln!("synthetic frames only: {} names no folder with captures", community_id::CAPTURES);
        return Vec::new();
    };
    let is_capture = |path: &Path| path.extension().is_some_and(|kind| kind == "pcap" || kind == "pcapng");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| is_capture(path));
    paths.sort();
    assert!(!paths.is_empty(), "{} names a folder without captures", community_id::CAPTURES);
    paths.into_iter().map(|path| (path.display().to_string(), fitting(&path))).collect()
}

/// The frames of a capture, truncated to what the veth takes: MTU, Ethernet header and one tag.
fn fitting(path: &Path) -> Vec<Vec<u8>> {
    const LIMIT: usize = MTU as usize + 14 + 4;
    let mut frames = Capture::read(path).unwrap().frames;
    for (number, frame) in frames.iter_mut().enumerate().filter(|(_, frame)| frame.len() > LIMIT) {
        let (path, number, bytes) = (path.display(), number + 1, frame.len());
        eprintln!(
            "{path}: frame {number} has {bytes} bytes, truncated to {LIMIT}, the limit for an MTU of {MTU}"
        );
        frame.truncate(LIMIT);
    }
    frames
}

/// Meters all traffic with 1, 2 and 3 workers.
fn all_is_metered(queues: u32) {
    let mut network = Network::new(queues);
    let captures = captures();
    for workers in 1..=3 {
        let mut metering = Metering::start(&mut network, workers, "");
        let report = metering.replay(&synthetic());
        metering.check(&report, "synthetic frames");
        for (path, frames) in &captures {
            let report = metering.replay(frames);
            metering.check(&report, path);
        }
        metering.finish();
    }
}

#[test]
fn one_queue_is_metered_to_the_byte() {
    let _watchdog = e2e_or_skip!();
    all_is_metered(1);
}

#[test]
fn two_queues_are_metered_to_the_byte() {
    let _watchdog = e2e_or_skip!();
    all_is_metered(2);
}

#[test]
fn four_queues_are_metered_to_the_byte() {
    let _watchdog = e2e_or_skip!();
    all_is_metered(4);
}

/// The Community IDs of the packets with this verdict, by flow.
fn ids(frames: &[Vec<u8>], verdict: Verdict) -> BTreeMap<Flow, String> {
    let readings = frames.iter().map(|frame| oracle::read(frame, &[]));
    let readings = readings.filter(|reading| reading.verdict == verdict);
    readings.filter_map(|reading| Some((reading.flow?, reading.community_id?))).collect()
}

#[test]
fn community_ids_are_those_of_zeek() {
    let _watchdog = e2e_or_skip!();
    let mut network = Network::new(1);
    let mut metering = Metering::start(&mut network, 2, "");
    let made_up = synthetic();
    metering.replay(&made_up);
    let references = references().unwrap();
    let captures: Vec<_> = references.iter().map(|reference| fitting(&reference.capture)).collect();
    for frames in &captures {
        metering.replay(frames);
    }
    let records = metering.finish();

    for (flow, id) in ids(&made_up, Verdict::Redirect) {
        assert_eq!(records[&flow].community_id, id, "{flow:?}");
    }
    for (reference, frames) in references.iter().zip(&captures) {
        let metered = ids(frames, Verdict::Redirect);
        for (flow, id) in &metered {
            assert_eq!(records[flow].community_id, *id, "{}: {flow:?}", reference.name);
        }
        if reference.known.iter().any(|known| !known.has_ports) {
            eprintln!("{}: Zeek's list has no ports; compared only with the oracle", reference.name);
            continue;
        }
        let ours: BTreeMap<&str, &FlowRecord> =
            metered.keys().map(|flow| (records[flow].community_id.as_str(), &records[flow])).collect();
        // Zeek also lists neighbour discovery, which goes to the kernel.
        let kernels: BTreeSet<String> = ids(frames, Verdict::NeighbourDiscovery).into_values().collect();
        let zeeks: BTreeMap<&str, &Known> = reference.known.iter().map(|known| (&*known.id, known)).collect();
        let (left, metered): (Vec<_>, Vec<_>) =
            zeeks.iter().partition(|(id, _)| kernels.contains(**id) && !ours.contains_key(**id));
        assert!(!metered.is_empty(), "{}: every flow is neighbour discovery: {left:?}", reference.name);
        assert!(
            ours.keys().eq(metered.iter().map(|(id, _)| *id)),
            "{}: {ours:?} {metered:?}",
            reference.name
        );
        for (id, known) in metered {
            let FlowRecord { src, sport, dst, dport, .. } = *ours[id];
            let zeeks = (known.source, known.destination, known.ports);
            assert_eq!((src, dst, (sport, dport)), zeeks, "{}: {id}", reference.name);
        }
    }
}

/// Flows of every kind with four packets in each direction, so that each direction arrives on each
/// of four queues.
fn conversations() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for number in 0..120u8 {
        let (client, server) = match number % 2 {
            0 => (format!("10.1.{number}.2:{}", 5000 + u16::from(number)), "192.0.2.1:443".to_owned()),
            _ => (format!("[2001:db8:{number}::2]:5000"), "[2001:db8::1]:53".to_owned()),
        };
        let (client, server): (SocketAddr, SocketAddr) = (client.parse().unwrap(), server.parse().unwrap());
        for (from, to, half, vlan) in [(client, server, Echo::Request, 10), (server, client, Echo::Reply, 20)]
        {
            for sequence in 0..4 {
                let payload = vec![number; usize::from(sequence) * 50];
                let frame = match number % 6 {
                    0 | 1 => traffic::tcp(from, to, sequence.into(), &payload),
                    2 | 3 => traffic::udp(from, to, &payload),
                    _ => traffic::echo(from.ip(), to.ip(), half, sequence, &payload),
                };
                // Some mirror ports tag the two directions differently.
                frames.push(if number % 5 == 0 { traffic::tagged(&frame, &[(0x8100, vlan)]) } else { frame });
            }
        }
    }
    frames
}

/// Sends all conversations through four queues, beginning `turn` queues later, and returns the
/// worker of each flow.
fn assignment(network: &mut Network, turn: usize, config: &str) -> BTreeMap<Flow, String> {
    let mut metering = Metering::start(network, 3, config);
    let mut frames = conversations();
    frames.rotate_right(turn);
    let report = metering.replay(&frames);
    metering.check(&report, "conversations");
    // `finish` checks that each flow has one record with all packets of both directions.
    let records = metering.finish();
    assert_eq!(records.len(), 120);
    assert!(records.values().all(|record| record.packets == 8));
    let assignment: BTreeMap<_, _> =
        records.into_iter().map(|(flow, record)| (flow, record.member)).collect();
    let members: BTreeSet<&str> = assignment.values().map(String::as_str).collect();
    assert_eq!(members, BTreeSet::from(["default/0", "default/1", "default/2"]));
    assignment
}

#[test]
fn both_directions_reach_one_worker_from_any_queue() {
    let _watchdog = e2e_or_skip!();
    let mut network = Network::new(4);
    let fixed = assignment(&mut network, 0, KEY);
    // After a restart with the same key, each flow has the same worker, though every queue differs.
    for turn in 1..4 {
        let again = assignment(&mut network, turn, KEY);
        let moved = fixed.iter().filter(|(flow, member)| again[flow] != **member).count();
        assert_eq!(moved, 0, "of {} flows", fixed.len());
    }
    let random = assignment(&mut network, 0, "");
    assert!(random != fixed, "a random key differs from the fixed one");
    assert!(random != assignment(&mut network, 0, ""), "and differs at each start");
}

#[test]
fn fragments_of_a_datagram_reach_one_worker() {
    let _watchdog = e2e_or_skip!();
    let mut network = Network::new(4);
    let mut frames = Vec::new();
    for number in 0..40u8 {
        let (one, other) = match number % 2 {
            0 => (format!("10.2.{number}.2:4000"), "192.0.2.1:53"),
            _ => (format!("[2001:db8:{number}::2]:4000"), "[2001:db8::1]:53"),
        };
        let datagram = traffic::udp(one.parse().unwrap(), other.parse().unwrap(), &[number; 600]);
        let fragments = traffic::fragments(&datagram, 128);
        assert_eq!(fragments.len(), 5, "the number is odd, so that each datagram begins on another queue");
        frames.extend(fragments);
    }
    let mut metering = Metering::start(&mut network, 3, "");
    let report = metering.replay(&frames);
    metering.check(&report, "fragments");
    let expected = expectation(&frames);
    let records = metering.finish();
    assert_eq!(records.len(), 40);
    for (flow, record) in &records {
        let Totals { packets, bytes, .. } = expected.flows[flow];
        assert_eq!((flow.low.1, flow.high.1), (0, 0), "fragments have no ports");
        assert_eq!((record.packets, record.bytes), (packets, bytes));
        assert_eq!(packets, 5);
    }
    let members: BTreeSet<&str> = records.values().map(|record| record.member.as_str()).collect();
    assert_eq!(members.len(), 3, "datagrams are spread");
}
