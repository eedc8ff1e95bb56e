//! Predicts what a capture should lead to. It reads frames with etherparse and shares no code with
//! the code under test.
//!
//! The oracle reads a frame as it is on the wire. These definitions it shares with the product, in
//! words only:
//!
//! - After up to two VLAN tags (0x8100, 0x88a8, 0x9100) comes IPv4 or IPv6; otherwise the frame
//!   goes to the kernel. So do neighbour discovery (ICMPv6 133 to 137 directly after the IPv6
//!   header, hop limit 255) and packets that a rule names.
//! - A flow is the protocol and both endpoints, in either direction. TCP, UDP, DCCP, SCTP and
//!   UDP-Lite have ports. Every fragment, including the first, has ports 0; so does a packet too
//!   short for ports.
//! - For ICMP and ICMPv6 the numbers of the Community ID are the ports: the message's type and the
//!   type of its counterpart. A message without counterpart has its type and code, and the other
//!   direction is another flow.
//! - IPv6 extension headers (hop-by-hop, routing, destination, authentication, fragment) are
//!   walked, 6 at most. The walk ends at a fragment header unless it is an atomic one.
//! - A packet ends where its IP header says, or with its frame. A total length of 0 in IPv4 means
//!   the latter. A payload length of 0 in IPv6 means none, unless a jumbo payload option gives it.
//! - Bytes are the frame's length.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use etherparse::{
    Ethernet2HeaderSlice, IpAuthHeaderSlice, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice,
    Ipv6HeaderSlice, Ipv6RawExtHeaderSlice, SingleVlanHeaderSlice,
};

use crate::community_id::{community_id, is_one_way, numbers};

/// A flow, the same for both directions: the endpoints are in ascending order. For ICMP messages
/// without counterpart the sender comes first. Ports 0 and no ports are the same here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// The protocol number after IPv6 extension headers.
    pub protocol: u8,
    /// The lower endpoint, or the sender.
    pub low: (IpAddr, u16),
    /// The higher endpoint, or the receiver.
    pub high: (IpAddr, u16),
}

impl Flow {
    /// The flow of packets from one endpoint to the other, or back.
    pub fn between(protocol: u8, one: (IpAddr, u16), other: (IpAddr, u16)) -> Self {
        let is_directed = is_one_way(protocol, one.1) && (one.1, other.1) != (0, 0);
        let (low, high) = if is_directed { (one, other) } else { (one.min(other), one.max(other)) };
        Self { protocol, low, high }
    }
}

/// Where a frame should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To a worker.
    Redirect,
    /// To the kernel: it is not IP.
    NonIp,
    /// To the kernel: neighbour or router discovery.
    NeighbourDiscovery,
    /// To the kernel: a rule passes it.
    Rule,
}

/// A rule that leaves packets to the kernel, such as `icmp` or `tcp/22`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassRule {
    /// The protocol number; for IPv6 also the number of an extension header.
    pub protocol: u8,
    /// The destination port; none means every port.
    pub port: Option<u16>,
}

/// The prediction for one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Where it should go.
    pub verdict: Verdict,
    /// Its flow, if it has a readable IP header.
    pub flow: Option<Flow>,
    /// Its Community ID, if it has a flow.
    pub community_id: Option<String>,
    /// Whether the IP packet is longer than what the frame holds of it.
    pub is_cut: bool,
}

/// The prediction for a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// The number of frames.
    pub packets: u64,
    /// Sum of the frames' lengths, in bytes.
    pub bytes: u64,
    /// The Community IDs of its packets: one, unless some packets have ports 0 and others none.
    pub community_ids: BTreeSet<String>,
}

/// The prediction for a series of frames.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expectation {
    /// Frames for the workers.
    pub redirected: u64,
    /// The sum of their lengths, in bytes.
    pub redirected_bytes: u64,
    /// Frames for the kernel that are not IP.
    pub non_ip: u64,
    /// Frames for the kernel that are neighbour discovery.
    pub neighbour_discovery: u64,
    /// Frames for the kernel because of a rule.
    pub rule: u64,
    /// Frames for the workers without a readable IP header, which belong to no flow.
    pub unreadable: u64,
    /// Frames for the workers that do not hold the whole IP packet.
    pub cut: u64,
    /// The flows of the frames for the workers.
    pub flows: BTreeMap<Flow, Totals>,
}

impl Expectation {
    /// Reads `frames` with `rules` in force.
    pub fn of<'a>(frames: impl IntoIterator<Item = &'a [u8]>, rules: &[PassRule]) -> Self {
        let mut expected = Self::default();
        for frame in frames {
            let reading = read(frame, rules);
            match reading.verdict {
                Verdict::NonIp => expected.non_ip += 1,
                Verdict::NeighbourDiscovery => expected.neighbour_discovery += 1,
                Verdict::Rule => expected.rule += 1,
                Verdict::Redirect => {
                    expected.redirected += 1;
                    expected.redirected_bytes += frame.len() as u64;
                    expected.cut += u64::from(reading.is_cut);
                    let Some(flow) = reading.flow else {
                        expected.unreadable += 1;
                        continue;
                    };
                    let totals = expected.flows.entry(flow).or_default();
                    totals.packets += 1;
                    totals.bytes += frame.len() as u64;
                    totals.community_ids.extend(reading.community_id);
                }
            }
        }
        expected
    }
}

/// Reads one frame with `rules` in force.
pub fn read(frame: &[u8], rules: &[PassRule]) -> Reading {
    let network = network_layer(frame);
    let packet = match network {
        Some((0x0800, packet)) => ipv4(packet),
        Some((0x86dd, packet)) => ipv6(packet),
        _ => return Reading { verdict: Verdict::NonIp, flow: None, community_id: None, is_cut: false },
    };
    let is_cut = network.is_some_and(|(ethertype, packet)| ends_behind(ethertype, packet));
    let Some(packet) = packet else {
        return Reading { verdict: Verdict::Redirect, flow: None, community_id: None, is_cut };
    };
    let verdict = if packet.is_neighbour_discovery {
        Verdict::NeighbourDiscovery
    } else if rules.iter().any(|rule| packet.meets(*rule)) {
        Verdict::Rule
    } else {
        Verdict::Redirect
    };
    Reading { verdict, flow: Some(packet.flow()), community_id: Some(packet.community_id()), is_cut }
}

/// Whether an IP packet that begins with `bytes` ends with them.
fn ends_behind(ethertype: u16, bytes: &[u8]) -> bool {
    let version = if ethertype == 0x0800 { 4 } else { 6 };
    match bytes.first() {
        None => true,
        Some(first) if first >> 4 != version => false,
        Some(_) if version == 4 => {
            bytes.len() < 20 || usize::from(u16::from_be_bytes([bytes[2], bytes[3]])) > bytes.len()
        }
        Some(_) => match Ipv6HeaderSlice::from_slice(bytes) {
            Err(_) => true,
            Ok(header) => {
                let payload = &bytes[header.slice().len()..];
                payload_length(&header, payload) > payload.len()
            }
        },
    }
}

/// The ethertype after the tags, and what follows it.
fn network_layer(frame: &[u8]) -> Option<(u16, &[u8])> {
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).ok()?;
    let mut ethertype = ethernet.ether_type().0;
    let mut rest = &frame[ethernet.slice().len()..];
    for _ in 0..2 {
        if matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            let tag = SingleVlanHeaderSlice::from_slice(rest).ok()?;
            ethertype = tag.ether_type().0;
            rest = &rest[tag.slice().len()..];
        }
    }
    Some((ethertype, rest))
}

struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    /// The protocols in the order of the headers; the last one is the packet's.
    chain: Vec<IpNumber>,
    is_fragment: bool,
    is_later_fragment: bool,
    is_neighbour_discovery: bool,
    payload: &'a [u8],
}

fn ipv4(packet: &[u8]) -> Option<Packet<'_>> {
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    let total = match usize::from(header.total_len()) {
        0 => packet.len(), // segmentation offload
        total => total.min(packet.len()),
    };
    Some(Packet {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        chain: vec![header.protocol()],
        is_fragment: header.is_fragmenting_payload(),
        is_later_fragment: header.fragments_offset().value() != 0,
        is_neighbour_discovery: false,
        payload: packet.get(header.slice().len()..total).unwrap_or_default(),
    })
}

fn ipv6(packet: &[u8]) -> Option<Packet<'_>> {
    let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
    let all = &packet[header.slice().len()..];
    let payload = &all[..payload_length(&header, all).min(all.len())];
    let discovery = matches!(payload.first(), Some(133..=137));
    let mut read = Packet {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        chain: vec![header.next_header()],
        is_fragment: false,
        is_later_fragment: false,
        is_neighbour_discovery: header.next_header() == IpNumber::IPV6_ICMP
            && header.hop_limit() == 255
            && discovery,
        payload,
    };
    read.walk_extension_headers();
    Some(read)
}

fn payload_length(header: &Ipv6HeaderSlice<'_>, behind: &[u8]) -> usize {
    match usize::from(header.payload_length()) {
        0 if header.next_header() == IpNumber::IPV6_HEADER_HOP_BY_HOP => jumbo_payload(behind),
        length => length,
    }
}

/// The length that one of the first eight hop-by-hop options gives (RFC 2675), or 0.
fn jumbo_payload(header: &[u8]) -> usize {
    let Ok(header) = Ipv6RawExtHeaderSlice::from_slice(header) else { return 0 };
    let mut options = header.payload().iter().copied();
    for _ in 0..8 {
        let Some(kind) = options.next() else { return 0 };
        if kind == 0 {
            continue; // padding of one byte
        }
        let length = options.next().unwrap_or(0);
        let data: Vec<u8> = options.by_ref().take(length.into()).collect();
        if let (0xc2, Ok(length)) = (kind, <[u8; 4]>::try_from(data)) {
            return usize::try_from(u32::from_be_bytes(length)).expect("32 bits or more");
        }
    }
    0
}

impl Packet<'_> {
    fn walk_extension_headers(&mut self) {
        for _ in 0..6 {
            let (next, length) = match self.protocol() {
                IpNumber::IPV6_HEADER_HOP_BY_HOP
                | IpNumber::IPV6_ROUTE_HEADER
                | IpNumber::IPV6_DESTINATION_OPTIONS => {
                    let Ok(header) = Ipv6RawExtHeaderSlice::from_slice(self.payload) else { return };
                    (header.next_header(), header.slice().len())
                }
                IpNumber::AUTHENTICATION_HEADER => {
                    let Ok(header) = IpAuthHeaderSlice::from_slice(self.payload) else { return };
                    (header.next_header(), header.slice().len())
                }
                IpNumber::IPV6_FRAGMENTATION_HEADER => {
                    let Ok(header) = Ipv6FragmentHeaderSlice::from_slice(self.payload) else { return };
                    self.is_fragment = header.is_fragmenting_payload();
                    self.is_later_fragment = header.fragment_offset().value() != 0;
                    (header.next_header(), header.slice().len())
                }
                _ => return,
            };
            self.chain.push(next);
            self.payload = &self.payload[length..];
            if self.is_fragment {
                return;
            }
        }
    }

    fn protocol(&self) -> IpNumber {
        *self.chain.last().expect("the chain begins with the IP header's protocol")
    }

    /// The first two 16-bit words of the transport header.
    fn words(&self) -> Option<(u16, u16)> {
        let [a, b, c, d] = *self.payload.first_chunk()?;
        Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// The first two numbers of the transport header: two ports, or the type and code of ICMP.
    fn ports(&self) -> Option<(u16, u16)> {
        if self.is_fragment {
            return None;
        }
        match self.protocol() {
            IpNumber::TCP | IpNumber::UDP | IpNumber::DCCP | IpNumber::SCTP | IpNumber::UDP_LITE => {
                self.words()
            }
            IpNumber::ICMP | IpNumber::IPV6_ICMP => {
                self.payload.first_chunk().map(|[kind, code]| (u16::from(*kind), u16::from(*code)))
            }
            _ => None,
        }
    }

    fn flow(&self) -> Flow {
        let protocol = self.protocol().0;
        let (source, destination) = self.ports().map(|ports| numbers(protocol, ports)).unwrap_or_default();
        Flow::between(protocol, (self.source, source), (self.destination, destination))
    }

    fn community_id(&self) -> String {
        community_id(self.protocol().0, self.source, self.destination, self.ports())
    }

    fn meets(&self, rule: PassRule) -> bool {
        let Some(port) = rule.port else {
            return self.chain.iter().any(|protocol| protocol.0 == rule.protocol);
        };
        let words = if self.is_later_fragment { None } else { self.words() };
        self.protocol().0 == rule.protocol && words.is_some_and(|(_, destination)| destination == port)
    }
}
