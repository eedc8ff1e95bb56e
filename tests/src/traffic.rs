//! Frames made by code, with correct lengths and checksums, and whole captures of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{
    Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv6FragmentHeader, PacketBuilder, PacketBuilderStep,
};

use crate::capture::Capture;

/// The MAC address that frames come from.
pub const CLIENT_MAC: [u8; 6] = [0x02, 0x78, 0x66, 0x61, 0x6e, 0x01];
/// The MAC address that frames go to. It is nobody's, so that a kernel that sees them ignores them.
pub const SERVER_MAC: [u8; 6] = [0x02, 0x78, 0x66, 0x61, 0x6e, 0x02];
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
const HOP_LIMIT: u8 = 64;

/// One half of an ICMP or ICMPv6 echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// The request.
    Request,
    /// The reply.
    Reply,
}

/// A UDP datagram.
///
/// # Panics
/// The addresses are of different families, or the payload is longer than a datagram can be.
pub fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let packet = between(source.ip(), destination.ip()).udp(source.port(), destination.port());
    written(|frame| packet.write(frame, payload))
}

/// A TCP segment: the first of a connection (SYN) if `sequence` is 0, otherwise one with data (ACK,
/// PSH).
///
/// # Panics
/// As [`udp`].
pub fn tcp(source: SocketAddr, destination: SocketAddr, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let segment =
        between(source.ip(), destination.ip()).tcp(source.port(), destination.port(), sequence, 64240);
    let segment = if sequence == 0 { segment.syn() } else { segment.ack(1).psh() };
    written(|frame| segment.write(frame, payload))
}

/// An ICMP or ICMPv6 echo request or reply.
///
/// # Panics
/// As [`udp`].
pub fn echo(source: IpAddr, destination: IpAddr, half: Echo, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let packet = between(source, destination);
    let packet = match (half, source) {
        (Echo::Request, IpAddr::V4(_)) => packet.icmpv4_echo_request(1, sequence),
        (Echo::Reply, IpAddr::V4(_)) => packet.icmpv4_echo_reply(1, sequence),
        (Echo::Request, IpAddr::V6(_)) => {
            let packet = packet.icmpv6_echo_request(1, sequence);
            return written(|frame| packet.write(frame, payload));
        }
        (Echo::Reply, IpAddr::V6(_)) => {
            let packet = packet.icmpv6_echo_reply(1, sequence);
            return written(|frame| packet.write(frame, payload));
        }
    };
    written(|frame| packet.write(frame, payload))
}

/// `frame` with VLAN tags, outermost first: (ethertype of the tag, such as 0x8100, and VLAN
/// number).
pub fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(ETHERNET - 2);
    let tags = tags.iter().flat_map(|(ethertype, vlan)| [ethertype.to_be_bytes(), vlan.to_be_bytes()]);
    [addresses, &tags.flatten().collect::<Vec<u8>>(), rest].concat()
}

/// `frame` with another destination MAC address.
pub fn addressed(mut frame: Vec<u8>, destination: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&destination);
    frame
}

/// The fragments of an untagged IPv4 or IPv6 frame, each with at most `piece` bytes of its payload.
///
/// # Panics
/// `piece` is not a multiple of 8, or the frame is not IP.
pub fn fragments(frame: &[u8], piece: usize) -> Vec<Vec<u8>> {
    assert!(piece > 0 && piece.is_multiple_of(8), "fragments begin at multiples of 8 bytes, not of {piece}");
    let (headers, number, payload) = IpHeaders::from_slice(&frame[ETHERNET..])
        .map(|(headers, payload)| (headers, payload.ip_number, payload.payload))
        .expect("the frame is an IP packet");
    let pieces = payload.chunks(piece).enumerate();
    let count = payload.len().div_ceil(piece);
    pieces
        .map(|(index, bytes)| {
            let offset = u16::try_from(index * piece / 8).expect("an offset within an IP packet");
            let offset = offset.try_into().expect("an offset within an IP packet");
            let more = index + 1 < count;
            let mut headers = headers.clone();
            match &mut headers {
                IpHeaders::Ipv4(ip, _) => (ip.fragment_offset, ip.more_fragments) = (offset, more),
                IpHeaders::Ipv6(_, extensions) => {
                    extensions.fragment = Some(Ipv6FragmentHeader::new(number, offset, more, 0x7866_616e));
                }
            }
            headers.set_next_headers(number);
            headers.set_payload_len(bytes.len()).expect("a fragment is shorter than the packet");
            let mut fragment = frame[..ETHERNET].to_vec();
            headers.write(&mut fragment).expect("writing to a Vec cannot fail");
            fragment.extend(bytes);
            fragment
        })
        .collect()
}

/// A capture of `packets` frames of `flows` flows, the same for the same `seed`: TCP, UDP and
/// echoes, IPv4 and IPv6, some with a VLAN tag, both directions, frames of 42 to 1,500 bytes. Every
/// flow appears if there are enough packets.
pub fn synthetic(flows: u32, packets: u32, seed: u64) -> Capture {
    Capture { frames: synthetic_frames(flows, packets, seed).collect() }
}

/// The frames of [`synthetic`], made one by one.
pub fn synthetic_frames(flows: u32, packets: u32, seed: u64) -> impl Iterator<Item = Vec<u8>> {
    let mut random = Random(seed);
    (0..packets).map(move |number| {
        let flow = if number < flows { number } else { random.below(flows) };
        random_frame(flow, number, &mut random)
    })
}

fn random_frame(flow: u32, sequence: u32, random: &mut Random) -> Vec<u8> {
    let v6 = flow % 4 == 3;
    let (client, server) = if v6 {
        let prefix = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0).to_bits();
        (Ipv6Addr::from_bits(prefix | u128::from(flow) << 16).into(), Ipv6Addr::from_bits(prefix | 1).into())
    } else {
        (Ipv4Addr::from_bits(0x0a00_0000 | flow).into(), IpAddr::from(Ipv4Addr::new(198, 18, 0, 1)))
    };
    let port = 1024 + (flow.wrapping_mul(0x9e37) % 60_000) as u16;
    let (mut from, mut to) = (SocketAddr::new(client, port), SocketAddr::new(server, 443));
    let backwards = random.below(2) == 1;
    if backwards {
        (from, to) = (to, from);
    }
    let payload: Vec<u8> = (0..random.below(1400)).map(|_| random.next().to_le_bytes()[0]).collect();
    let frame = match flow % 10 {
        0..=4 => tcp(from, to, sequence, &payload),
        5..=8 => udp(from, to, &payload),
        _ => {
            let half = if backwards { Echo::Reply } else { Echo::Request };
            echo(from.ip(), to.ip(), half, (sequence & 0xffff) as u16, &payload)
        }
    };
    if flow % 8 == 6 { tagged(&frame, &[(0x8100, 42)]) } else { frame }
}

/// An Ethernet and an IP header from one address to another.
fn between(source: IpAddr, destination: IpAddr) -> PacketBuilderStep<IpHeaders> {
    let ethernet: PacketBuilderStep<Ethernet2Header> = PacketBuilder::ethernet2(CLIENT_MAC, SERVER_MAC);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet.ipv4(source.octets(), destination.octets(), HOP_LIMIT)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethernet.ipv6(source.octets(), destination.octets(), HOP_LIMIT)
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
}

fn written<E: std::fmt::Debug>(write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Vec<u8> {
    let mut frame = Vec::new();
    write(&mut frame).expect("the payload fits");
    frame
}

/// SplitMix64: small, and the same on every platform.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u32) -> u32 {
        u32::try_from(self.next() % u64::from(limit.max(1))).expect("less than a u32")
    }
}

/// The IPv4 header that [`crate::generator`] sends, without checksum and client.
pub(crate) fn ipv4_header(destination: Ipv4Addr, payload: u16) -> Ipv4Header {
    Ipv4Header::new(payload, HOP_LIMIT, IpNumber::UDP, [0; 4], destination.octets())
        .expect("the payload is short")
}
