//! Table of verdicts: what the program does with each kind of frame. BPF_PROG_TEST_RUN runs it in
//! the kernel. It is loaded by aya, to show that the object does not depend on one loader.

mod common;

use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::{Array, MapData, PerCpuArray, XskMap};
use aya::programs::Xdp;
use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions};
use common::frame::*;
use common::{in_own_namespace, make_veth, xdp_socket};
use xfan_xdp::{OBJECT, PassRule, QueueCounters, rule_table};

/// Queues of the interface. The last one has no socket.
const QUEUES: u32 = 4;
const NO_SOCKET: u32 = QUEUES - 1;
/// Longest packet that a frame of the sockets can hold, in bytes.
const MAX_LENGTH: usize = 3500;

/// Size of `struct pass_rules`.
const RULE_TABLE_BYTES: usize = 1 + 256 + 3 * 8192;

const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;
const QINQ_OLD: u16 = 0x9100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Redirect,
    PassNonIp,
    PassNd,
    PassRule,
    PassNoSocket,
    DropTooLong,
}
use Outcome::*;

impl Outcome {
    fn verdict(self) -> u32 {
        const XDP_DROP: u32 = 1;
        const XDP_PASS: u32 = 2;
        const XDP_REDIRECT: u32 = 4;
        match self {
            Redirect => XDP_REDIRECT,
            DropTooLong => XDP_DROP,
            _ => XDP_PASS,
        }
    }

    /// What a packet with this outcome adds to the counters of its queue.
    fn counted(self) -> QueueCounters {
        QueueCounters::from_words(
            [Redirect, PassNonIp, PassNd, PassRule, PassNoSocket, DropTooLong].map(|o| u64::from(o == self)),
        )
    }
}

struct Row {
    what: &'static str,
    frame: Vec<u8>,
    queue: u32,
    rules: &'static [&'static str],
    expected: Outcome,
}

fn row(what: &'static str, frame: Vec<u8>, expected: Outcome) -> Row {
    Row { what, frame, queue: 0, rules: &[], expected }
}

impl Row {
    fn queue(self, queue: u32) -> Self {
        Self { queue, ..self }
    }

    fn rules(self, rules: &'static [&'static str]) -> Self {
        Self { rules, ..self }
    }
}

/// Frames of different lengths. The size of a socket's frame limits redirected packets only.
fn frame_size_rows() -> Vec<Row> {
    let of = |ethertype: u16, mut frame: Vec<u8>, length: usize| {
        frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
        frame.resize(length, 0);
        frame
    };
    let udp = |length| of(ETHERTYPE_IPV4, v4(UDP, &ports(1, 53)), length);
    vec![
        row("IPv4, as long as a frame holds", udp(MAX_LENGTH), Redirect),
        row("IPv4, longer by a byte", udp(MAX_LENGTH + 1), DropTooLong),
        row("IPv4, much longer", udp(3700), DropTooLong),
        row("longer, without a socket", udp(MAX_LENGTH + 1), PassNoSocket).queue(NO_SOCKET),
        row("longer, passed by a rule", udp(MAX_LENGTH + 1), PassRule).rules(&["udp/53"]),
        row("longer, not IP", of(0x88cc, padded(0x88cc), MAX_LENGTH + 1), PassNonIp),
    ]
}

/// Frames that no rule applies to.
fn link_rows() -> Vec<Row> {
    let tagged = |tags: &[u16]| ethernet(tags, ETHERTYPE_IPV4, &ipv4(UDP, &ports(1, 2)));
    vec![
        row("ARP", padded(0x0806), PassNonIp),
        row("LLDP", padded(0x88cc), PassNonIp),
        row("MPLS", padded(0x8847), PassNonIp),
        row("PPPoE", padded(0x8864), PassNonIp),
        row("PTP", padded(0x88f7), PassNonIp),
        row("spanning tree: 802.3 length", padded(0x0026), PassNonIp),
        row("ARP behind a VLAN tag", ethernet(&[VLAN], 0x0806, &[0; 46]), PassNonIp),
        row("ARP behind two VLAN tags", ethernet(&[QINQ, VLAN], 0x0806, &[0; 46]), PassNonIp),
        row("IPv4", tagged(&[]), Redirect),
        row("IPv4 behind a VLAN tag", tagged(&[VLAN]), Redirect),
        row("IPv4 behind a service tag", tagged(&[QINQ]), Redirect),
        row("IPv4 behind an old QinQ tag", tagged(&[QINQ_OLD]), Redirect),
        row("IPv4 behind two VLAN tags", tagged(&[VLAN, VLAN]), Redirect),
        row("IPv4 in QinQ", tagged(&[QINQ, VLAN]), Redirect),
        row("IPv4 in old QinQ", tagged(&[QINQ_OLD, VLAN]), Redirect),
        row("IPv4 behind three tags", tagged(&[QINQ, VLAN, VLAN]), PassNonIp),
        row("IPv6 in QinQ", ethernet(&[QINQ, VLAN], ETHERTYPE_IPV6, &ipv6(UDP, 64, &ports(1, 2))), Redirect),
        row("Ethernet header alone, ARP", ethernet(&[], 0x0806, &[]), PassNonIp),
        row("VLAN tag cut short", cut(tagged(&[VLAN]), 17), PassNonIp),
        row("second VLAN tag cut short", cut(tagged(&[QINQ, VLAN]), 21), PassNonIp),
        row("second VLAN tag missing", cut(tagged(&[QINQ, VLAN]), 18), PassNonIp),
    ]
}

fn ip_rows() -> Vec<Row> {
    let largest = vec![0; 3400];
    let udp = || v4(UDP, &ports(1, 2));
    vec![
        row("IPv4 TCP", v4(TCP, &ports(1, 2)), Redirect),
        row("IPv4 SCTP", v4(SCTP, &ports(1, 2)), Redirect),
        row("IPv4 ICMP echo", v4(ICMP, &icmp(8)), Redirect),
        row("IPv4 GRE", v4(GRE, &[0; 8]), Redirect),
        row("IPv4 of an unknown protocol", v4(253, &[]), Redirect),
        row(
            "IPv4 with options",
            ethernet(&[], ETHERTYPE_IPV4, &ipv4_with(UDP, 0, 10, &ports(1, 2))),
            Redirect,
        ),
        row("IPv4 fragment", ethernet(&[], ETHERTYPE_IPV4, &ipv4_with(UDP, 185, 0, &[0; 64])), Redirect),
        row("IPv4 of the largest size", v4(UDP, &largest), Redirect),
        row("IPv4 without its header", ethernet(&[], ETHERTYPE_IPV4, &[]), Redirect),
        row("IPv4 header cut short", cut(udp(), 14 + 19), Redirect),
        row("IPv4 with version 5", with_byte(udp(), 14, 0x55), Redirect),
        row("IPv4 with a header of 4 words", with_byte(udp(), 14, 0x44), Redirect),
        row("IPv6 TCP", v6(TCP, &ports(1, 2)), Redirect),
        row("IPv6 UDP", v6(UDP, &ports(1, 2)), Redirect),
        row("IPv6 SCTP", v6(SCTP, &ports(1, 2)), Redirect),
        row("IPv6 echo request", v6(ICMPV6, &icmp(128)), Redirect),
        row("IPv6 fragment", v6(FRAGMENT, &fragment(UDP, 185, &[0; 64])), Redirect),
        row("IPv6 of the largest size", v6(UDP, &largest), Redirect),
        row("IPv6 without its header", ethernet(&[], ETHERTYPE_IPV6, &[]), Redirect),
        row("IPv6 header cut short", cut(v6(UDP, &ports(1, 2)), 14 + 39), Redirect),
        row("IPv6 with version 4", with_byte(v6(UDP, &ports(1, 2)), 14, 0x45), Redirect),
        row("queue 1", udp(), Redirect).queue(1),
        row("queue 2", udp(), Redirect).queue(2),
        row("IPv4, queue without a socket", udp(), PassNoSocket).queue(NO_SOCKET),
        row("IPv6, queue without a socket", v6(UDP, &ports(1, 2)), PassNoSocket).queue(NO_SOCKET),
        row("ARP, queue without a socket", padded(0x0806), PassNonIp).queue(NO_SOCKET),
    ]
}

fn neighbour_discovery_rows() -> Vec<Row> {
    let nd = |kind: u8| ethernet(&[], ETHERTYPE_IPV6, &ipv6(ICMPV6, 255, &icmp(kind)));
    let tagged = ethernet(&[QINQ, VLAN], ETHERTYPE_IPV6, &ipv6(ICMPV6, 255, &icmp(135)));
    let behind_options = ipv6(HOP_BY_HOP, 255, &extension(ICMPV6, 0, &icmp(135)));
    vec![
        row("multicast listener done", nd(132), Redirect),
        row("router solicitation", nd(133), PassNd),
        row("router advertisement", nd(134), PassNd),
        row("neighbour solicitation", nd(135), PassNd),
        row("neighbour advertisement", nd(136), PassNd),
        row("redirect message", nd(137), PassNd),
        row("router renumbering", nd(138), Redirect),
        row("neighbour solicitation in QinQ", tagged, PassNd),
        row("neighbour solicitation, queue without a socket", nd(135), PassNd).queue(NO_SOCKET),
        row("neighbour solicitation of the type byte alone", cut(nd(135), 14 + 41), PassNd),
        row("neighbour solicitation without its type", cut(nd(135), 14 + 40), Redirect),
        row("neighbour solicitation that a router forwarded", v6(ICMPV6, &icmp(135)), Redirect),
        row(
            "neighbour solicitation behind an extension header",
            ethernet(&[], ETHERTYPE_IPV6, &behind_options),
            Redirect,
        ),
        row("UDP that looks like neighbour solicitation", v6(UDP, &icmp(135)), Redirect),
        row("neighbour solicitation before any rule", nd(135), PassNd).rules(&["icmpv6"]),
    ]
}

fn ipv4_rule_rows() -> Vec<Row> {
    let with = |offset: u16, options: u8| {
        ethernet(&[], ETHERTYPE_IPV4, &ipv4_with(TCP, offset, options, &ports(50_000, 22)))
    };
    let qinq = ethernet(&[QINQ, VLAN], ETHERTYPE_IPV4, &ipv4(TCP, &ports(50_000, 22)));
    vec![
        row("icmp: echo", v4(ICMP, &icmp(8)), PassRule).rules(&["icmp"]),
        row("icmp: UDP", v4(UDP, &ports(1, 2)), Redirect).rules(&["icmp"]),
        row("icmp: queue without a socket", v4(ICMP, &icmp(8)), PassRule).rules(&["icmp"]).queue(NO_SOCKET),
        row("icmp: fragment", ethernet(&[], ETHERTYPE_IPV4, &ipv4_with(ICMP, 9, 0, &[0; 8])), PassRule)
            .rules(&["icmp"]),
        row("253: by number", v4(253, &[]), PassRule).rules(&["253"]),
        row("255: last entry", v4(255, &[]), PassRule).rules(&["255"]),
        row("gre, esp: GRE", v4(GRE, &[0; 8]), PassRule).rules(&["gre", "esp"]),
        row("ah: AH", v4(AH, &authentication(TCP, 4, &ports(1, 2))), PassRule).rules(&["ah"]),
        row("tcp: TCP", v4(TCP, &ports(1, 2)), PassRule).rules(&["tcp"]),
        row("tcp: header cut short", v4(TCP, &[0; 3]), PassRule).rules(&["tcp"]),
        row("tcp/22: to port 22", with(0, 0), PassRule).rules(&["tcp/22"]),
        row("tcp/22: in QinQ", qinq, PassRule).rules(&["tcp/22"]),
        row("tcp/22: with options", with(0, 10), PassRule).rules(&["tcp/22"]),
        row("tcp/22: to port 23", v4(TCP, &ports(50_000, 23)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: to port 22 + 256", v4(TCP, &ports(50_000, 278)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: from port 22", v4(TCP, &ports(22, 50_000)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: UDP", v4(UDP, &ports(50_000, 22)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: SCTP", v4(SCTP, &ports(50_000, 22)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: later fragment", with(1, 0), Redirect).rules(&["tcp/22"]),
        row("tcp/22: first fragment", with(0x2000, 0), PassRule).rules(&["tcp/22"]),
        row("tcp/22: don't fragment", with(0x4000, 0), PassRule).rules(&["tcp/22"]),
        row("tcp/22: last offset", with(0x1fff, 0), Redirect).rules(&["tcp/22"]),
        row("tcp/22: ports alone", cut(with(0, 0), 14 + 20 + 4), PassRule).rules(&["tcp/22"]),
        row("tcp/22: ports cut short", cut(with(0, 0), 14 + 20 + 3), Redirect).rules(&["tcp/22"]),
        row("tcp/22: options cut short", cut(with(0, 10), 14 + 59), Redirect).rules(&["tcp/22"]),
        row("tcp/22: header of 4 words", with_byte(with(0, 0), 14, 0x44), Redirect).rules(&["tcp/22"]),
        row("tcp/22: version 6", with_byte(with(0, 0), 14, 0x65), Redirect).rules(&["tcp/22"]),
        row("udp/53: to port 53", v4(UDP, &ports(1, 53)), PassRule).rules(&["tcp/22", "udp/53"]),
        row("udp/53: TCP", v4(TCP, &ports(1, 53)), Redirect).rules(&["tcp/22", "udp/53"]),
        row("sctp/65535: to the last port", v4(SCTP, &ports(1, 65_535)), PassRule).rules(&["sctp/65535"]),
        row("udp/1: to the first port", v4(UDP, &ports(1, 1)), PassRule).rules(&["udp/1"]),
        row("udp/1: to port 0", v4(UDP, &ports(1, 0)), Redirect).rules(&["udp/1"]),
        row("tcp and tcp/22: to port 80", v4(TCP, &ports(1, 80)), PassRule).rules(&["tcp/22", "tcp"]),
        row("no rules any more", with(0, 0), Redirect),
    ]
}

fn ipv6_rule_rows() -> Vec<Row> {
    let tcp = || ports(50_000, 22);
    let chain = |headers: usize| {
        let inner = extension(TCP, 0, &tcp());
        let content = (1..headers).fold(inner, |content, _| extension(DESTINATION_OPTIONS, 0, &content));
        v6(DESTINATION_OPTIONS, &content)
    };
    let mixed = v6(
        HOP_BY_HOP,
        &extension(ROUTING, 1, &extension(FRAGMENT, 2, &fragment(AH, 0, &authentication(TCP, 4, &tcp())))),
    );
    vec![
        row("tcp/22: IPv6", v6(TCP, &tcp()), PassRule).rules(&["tcp/22"]),
        row("tcp/22: IPv6 to port 23", v6(TCP, &ports(1, 23)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: IPv6 from port 22", v6(TCP, &ports(22, 1)), Redirect).rules(&["tcp/22"]),
        row("tcp/22: IPv6 ports cut short", v6(TCP, &tcp()[..3]), Redirect).rules(&["tcp/22"]),
        row("tcp/22: IPv6 with version 4", with_byte(v6(TCP, &tcp()), 14, 0x45), Redirect).rules(&["tcp/22"]),
        row("icmpv6: echo", v6(ICMPV6, &icmp(128)), PassRule).rules(&["icmpv6"]),
        row("icmp: is not ICMPv6", v6(ICMPV6, &icmp(128)), Redirect).rules(&["icmp"]),
        row("icmpv6: listener report", v6(HOP_BY_HOP, &extension(ICMPV6, 0, &icmp(143))), PassRule)
            .rules(&["icmpv6"]),
        row("tcp/22: hop-by-hop, routing, fragment, AH", mixed, PassRule).rules(&["tcp/22"]),
        row("tcp/22: AH", v6(AH, &authentication(TCP, 4, &tcp())), PassRule).rules(&["tcp/22"]),
        row("ah: AH", v6(AH, &authentication(TCP, 4, &tcp())), PassRule).rules(&["ah"]),
        row("esp: ESP", v6(50, &[0; 24]), PassRule).rules(&["esp"]),
        row("tcp/22: one extension header", chain(1), PassRule).rules(&["tcp/22"]),
        row("tcp/22: six extension headers", chain(6), PassRule).rules(&["tcp/22"]),
        row("tcp/22: seven extension headers", chain(7), Redirect).rules(&["tcp/22"]),
        row("tcp/22: longest extension header", v6(ROUTING, &extension(TCP, 255, &tcp())), PassRule)
            .rules(&["tcp/22"]),
        row(
            "tcp/22: extension header cut short",
            cut(v6(ROUTING, &extension(TCP, 2, &tcp())), 14 + 63),
            Redirect,
        )
        .rules(&["tcp/22"]),
        row("tcp: extension header of one byte", cut(chain(1), 14 + 41), Redirect).rules(&["tcp"]),
        row("tcp/22: first fragment", v6(FRAGMENT, &fragment(TCP, 0, &tcp())), PassRule).rules(&["tcp/22"]),
        row("tcp/22: later fragment", v6(FRAGMENT, &fragment(TCP, 1, &tcp())), Redirect).rules(&["tcp/22"]),
        row("tcp: later fragment", v6(FRAGMENT, &fragment(TCP, 1, &tcp())), PassRule).rules(&["tcp"]),
        row(
            "tcp: later fragment of which the rest is no header",
            v6(FRAGMENT, &fragment(ROUTING, 1, &extension(TCP, 0, &tcp()))),
            Redirect,
        )
        .rules(&["tcp"]),
        row("tcp/22: fragment header cut short", v6(FRAGMENT, &[TCP, 0, 0, 0, 0, 0, 0]), Redirect)
            .rules(&["tcp/22"]),
        row("udp: no next header", v6(59, &[]), Redirect).rules(&["udp"]),
    ]
}

/// Bytes after the packet in its frame are ignored: padding, or a link-layer trailer.
fn length_rows() -> Vec<Row> {
    let tcp = || ports(50_000, 22);
    let short = |total: u16| with_length(v4(TCP, &tcp()), total);
    let options =
        |total: u16| with_length(ethernet(&[], ETHERTYPE_IPV4, &ipv4_with(TCP, 0, 10, &tcp())), total);
    let plain = |length: u16| with_length(v6(TCP, &tcp()), length);
    let chained = |length: u16| with_length(v6(ROUTING, &extension(TCP, 0, &tcp())), length);
    let fragmented = |length: u16| with_length(v6(FRAGMENT, &fragment(TCP, 0, &tcp())), length);
    let jumbo = |options: &[u8]| with_length(v6(HOP_BY_HOP, &hop_by_hop(TCP, options, &tcp())), 0);
    let discovery = ethernet(&[], ETHERTYPE_IPV6, &ipv6(ICMPV6, 255, &icmp(135)));
    let rows = vec![
        row("IPv4: ports at the packet's end", short(24), PassRule),
        row("IPv4: ports half behind it", short(23), Redirect),
        row("IPv4: ports behind it", short(20), Redirect),
        row("IPv4: packet shorter than its header", short(19), Redirect),
        row("IPv4: total length 0", short(0), PassRule),
        row("IPv4: packet longer than its frame", short(1500), PassRule),
        row("IPv4: ports at the packet's end, options", options(64), PassRule),
        row("IPv4: ports half behind it, options", options(63), Redirect),
        row("IPv6: ports at the packet's end", plain(4), PassRule),
        row("IPv6: ports half behind it", plain(3), Redirect),
        row("IPv6: payload length 0", plain(0), Redirect),
        row("IPv6: packet longer than its frame", plain(1500), PassRule),
        row("IPv6: extension header, ports at the packet's end", chained(12), PassRule),
        row("IPv6: extension header, ports half behind it", chained(11), Redirect),
        row("IPv6: extension header half behind the packet", chained(7), Redirect),
        row("IPv6: fragment header, ports at the packet's end", fragmented(12), PassRule),
        row("IPv6: fragment header half behind the packet", fragmented(7), Redirect),
        row("IPv6: jumbo payload", jumbo(&[0xc2, 4, 0, 1, 0, 0]), PassRule),
        row("IPv6: jumbo payload, ports at its end", jumbo(&[0xc2, 4, 0, 0, 0, 12]), PassRule),
        row("IPv6: jumbo payload, ports half behind it", jumbo(&[0xc2, 4, 0, 0, 0, 11]), Redirect),
        row(
            "IPv6: jumbo payload behind padding",
            jumbo(&[0, 0, 1, 2, 0, 0, 0, 0, 0xc2, 4, 0, 1, 0, 0]),
            PassRule,
        ),
        row(
            "IPv6: jumbo payload behind eight options",
            jumbo(&[0, 0, 0, 0, 0, 0, 0, 0, 0xc2, 4, 0, 1, 0, 0]),
            Redirect,
        ),
        row("IPv6: options without a jumbo payload", jumbo(&[1, 4, 0, 0, 0, 0]), Redirect),
        row("IPv6: jumbo payload option of 3 bytes", jumbo(&[0xc2, 3, 0, 1, 0, 0]), Redirect),
    ];
    let mut rows: Vec<Row> = rows.into_iter().map(|row| row.rules(&["tcp/22"])).collect();
    rows.push(row("tcp: IPv4 packet shorter than its header", short(10), PassRule).rules(&["tcp"]));
    rows.push(row("tcp: IPv6 of payload length 0", plain(0), PassRule).rules(&["tcp"]));
    rows.push(row("neighbour solicitation behind the packet", with_length(discovery, 0), Redirect));
    rows
}

/// The program as aya loads it, with sockets for all queues but the last.
struct Loaded {
    ebpf: Ebpf,
    ifindex: u32,
}

impl Loaded {
    fn new(ifindex: u32) -> Self {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("xsks", QUEUES)
            .map_max_entries("counters", QUEUES + 1)
            .override_global("max_length", &u32::try_from(MAX_LENGTH).unwrap(), true)
            .load(OBJECT)
            .unwrap();
        let program: &mut Xdp = ebpf.program_mut("xfan_steer").unwrap().try_into().unwrap();
        program.load().unwrap();
        Self { ebpf, ifindex }
    }

    fn insert_socket(&mut self, queue: u32, socket: &OwnedFd) {
        let mut sockets = XskMap::try_from(self.ebpf.map_mut("xsks").unwrap()).unwrap();
        sockets.set(queue, socket.as_fd(), 0).unwrap();
    }

    fn set_rules(&mut self, rules: &[&str]) {
        let rules: Vec<PassRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let table: [u8; RULE_TABLE_BYTES] = rule_table(&rules).try_into().unwrap();
        let mut map: Array<&mut MapData, [u8; RULE_TABLE_BYTES]> =
            self.ebpf.map_mut(".bss").unwrap().try_into().unwrap();
        map.set(0, table, 0).unwrap();
    }

    fn counters(&self) -> Vec<QueueCounters> {
        let map: PerCpuArray<&MapData, [u64; 6]> = self.ebpf.map("counters").unwrap().try_into().unwrap();
        let entry = |entry| {
            let mut sum = QueueCounters::default();
            map.get(&entry, 0).unwrap().iter().for_each(|&words| sum += QueueCounters::from_words(words));
            sum
        };
        (0..=QUEUES).map(entry).collect()
    }

    /// Runs the program on a frame as if `queue` had received it. Returns the verdict.
    fn run(&self, frame: &[u8], queue: u32) -> Result<u32, aya::programs::ProgramError> {
        let program: &Xdp = self.ebpf.program("xfan_steer").unwrap().try_into().unwrap();
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        let length = u32::try_from(frame.len()).unwrap();
        let context = [0, length, 0, self.ifindex, queue, 0].map(u32::to_ne_bytes).concat();
        let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), ..Default::default() };
        program.test_run(options).map(|result| result.return_value)
    }
}

#[test]
fn every_frame_gets_its_verdict_and_counts_once() {
    in_own_namespace(|| {
        let mut loaded = Loaded::new(make_veth(QUEUES));
        let sockets: Vec<_> = (0..NO_SOCKET).map(|_| xdp_socket().unwrap()).collect();
        for (queue, socket) in (0..).zip(&sockets) {
            loaded.insert_socket(queue, socket);
        }
        let tables = [
            link_rows,
            frame_size_rows,
            ip_rows,
            neighbour_discovery_rows,
            ipv4_rule_rows,
            ipv6_rule_rows,
            length_rows,
        ];
        let rows: Vec<Row> = tables.iter().flat_map(|table| table()).collect();
        let mut expected = loaded.counters();
        let mut wrong = Vec::new();
        for row in &rows {
            loaded.set_rules(row.rules);
            let verdict = loaded.run(&row.frame, row.queue).unwrap_or_else(|e| panic!("{}: {e:?}", row.what));
            let counters = loaded.counters();
            expected[row.queue as usize + 1] += row.expected.counted();
            if verdict != row.expected.verdict() || counters != expected {
                wrong.push(format!("{}: wanted {:?}, verdict {verdict}", row.what, row.expected));
            }
            expected = counters;
        }
        assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
        println!("{} rows", rows.len());
    });
}

#[test]
fn only_neighbour_discovery_types_pass() {
    in_own_namespace(|| {
        let loaded = Loaded::new(make_veth(QUEUES));
        for kind in 0..=255 {
            let frame = ethernet(&[], ETHERTYPE_IPV6, &ipv6(ICMPV6, 255, &icmp(kind)));
            let before = loaded.counters()[1];
            loaded.run(&frame, 0).unwrap();
            let passed = loaded.counters()[1].pass_nd - before.pass_nd;
            assert_eq!(passed == 1, (133..=137).contains(&kind), "type {kind}");
        }
    });
}

#[test]
fn packets_of_a_later_queue_pass_and_count_apart() {
    in_own_namespace(|| {
        let loaded = Loaded::new(make_veth(QUEUES + 2));
        let beyond = |outcome: Outcome| {
            let mut counters = vec![QueueCounters::default(); QUEUES as usize + 1];
            counters[0] = outcome.counted();
            counters
        };
        assert_eq!(loaded.run(&v4(UDP, &ports(1, 2)), QUEUES).unwrap(), PassNoSocket.verdict());
        assert_eq!(loaded.counters(), beyond(PassNoSocket));
        assert_eq!(loaded.run(&padded(0x0806), QUEUES + 1).unwrap(), PassNonIp.verdict());
        assert_eq!(loaded.counters()[0].passed(), 2);
    });
}

#[test]
fn packets_of_a_closed_socket_pass_to_the_kernel() {
    in_own_namespace(|| {
        let mut loaded = Loaded::new(make_veth(QUEUES));
        let socket = xdp_socket().unwrap();
        loaded.insert_socket(0, &socket);
        let frame = v4(UDP, &ports(1, 2));
        assert_eq!(loaded.run(&frame, 0).unwrap(), Redirect.verdict());
        drop(socket);
        assert_eq!(loaded.run(&frame, 0).unwrap(), PassNoSocket.verdict());
    });
}
