//! Which packets belong together: reading a frame's 5-tuple.
//!
//! The dispatcher and its workers must mean the same by *flow*, so both read frames with [`Packet::parse`].
//!
//! - Ethernet, up to two VLAN tags (802.1Q, 802.1ad), IPv4 or IPv6; IPv6 extension headers are walked.
//! - Ports are those of TCP, UDP, UDP-Lite, SCTP and DCCP. Other protocols have ports 0.
//! - A packet ends where its IP header says, or at the end of its frame if that comes first. Bytes
//!   beyond are padding or a trailer, and never read as ports. IPv6 with a payload length of 0 is
//!   empty, unless a jumbo payload option (RFC 2675) gives the length. IPv4 with a total length of
//!   0, which segmentation offload leaves behind, ends with its frame.
//! - A fragment (also the first) has ports 0: only so do all fragments of a datagram have the same key.
//! - VLAN tags are not part of the key, so a mirrored flow whose directions carry different tags is one flow.

use std::net::IpAddr;

/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of IPv6.
pub const IPV6: u16 = 0x86dd;

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Protocol number of DCCP.
pub const DCCP: u8 = 33;
/// Protocol number of ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Protocol number of SCTP.
pub const SCTP: u8 = 132;
/// Protocol number of UDP-Lite.
pub const UDP_LITE: u8 = 136;

/// Most IPv6 extension headers that are walked; what follows them is left unread.
const MAX_EXTENSION_HEADERS: usize = 8;
/// The most IPv6 hop-by-hop options to read in search of a jumbo payload's length, as in the XDP
/// program.
const MAX_OPTIONS: usize = 8;
/// The IPv6 hop-by-hop options header.
const HOP_BY_HOP: u8 = 0;

/// A directed 5-tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Source port; 0 where there is none.
    pub source_port: u16,
    /// Destination port; 0 where there is none.
    pub destination_port: u16,
    /// Protocol number, after IPv6 extension headers.
    pub protocol: u8,
}

impl FlowKey {
    /// The same flow seen from its other end.
    pub fn reversed(self) -> Self {
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// One key for both directions, and whether it is the reverse of this one.
    pub fn canonical(self) -> (Self, bool) {
        let backwards = (self.source, self.source_port) > (self.destination, self.destination_port);
        if backwards { (self.reversed(), true) } else { (self, false) }
    }
}

/// What can be read of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The flow it belongs to.
    pub key: FlowKey,
    /// Whether it is a fragment of a datagram.
    pub fragment: bool,
    /// What follows the IP headers, as far as it was captured and belongs to the datagram.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Reads an Ethernet frame. `None`: not IP, or cut off within the IP header.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let (ethertype, offset) = ethertype(frame)?;
        let datagram = &frame[offset..];
        match ethertype {
            IPV4 => Self::parse_v4(datagram),
            IPV6 => Self::parse_v6(datagram),
            _ => None,
        }
    }

    fn parse_v4(datagram: &'a [u8]) -> Option<Self> {
        let header: &[u8; 20] = datagram.first_chunk()?;
        let header_bytes = usize::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || header_bytes < 20 {
            return None;
        }
        // A total length of 0 is what segmentation offload leaves behind: then the frame tells the length.
        let total = match be16(header, 2) {
            0 => datagram.len(),
            total => usize::from(total).min(datagram.len()),
        };
        let behind = datagram.get(header_bytes..)?;
        let payload = behind.get(..total.saturating_sub(header_bytes)).unwrap_or(&[]);
        let fragment = be16(header, 6) & 0x3fff != 0;
        let address = |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Some(Self::new(address(12), address(16), header[9], fragment, payload))
    }

    fn parse_v6(datagram: &'a [u8]) -> Option<Self> {
        let header: &[u8; 40] = datagram.first_chunk()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let behind = &datagram[40..];
        let length = match be16(header, 4) {
            0 => jumbo_length(header[6], behind),
            length => length.into(),
        };
        let payload = behind.get(..length).unwrap_or(behind);
        let (protocol, fragment, payload) = skip_extension_headers(header[6], payload);
        let address = |at: usize| {
            let mut octets = [0; 16];
            octets.copy_from_slice(&header[at..at + 16]);
            IpAddr::from(octets)
        };
        Some(Self::new(address(8), address(24), protocol, fragment, payload))
    }

    fn new(source: IpAddr, destination: IpAddr, protocol: u8, fragment: bool, payload: &'a [u8]) -> Self {
        let (source_port, destination_port) = match payload.first_chunk::<4>() {
            Some(ports) if has_ports(protocol) && !fragment => (be16(ports, 0), be16(ports, 2)),
            _ => (0, 0),
        };
        let key = FlowKey { source, destination, source_port, destination_port, protocol };
        Packet { key, fragment, payload }
    }

    /// TCP flags, the 8 bits from CWR to FIN; `None` if it is not TCP, a fragment, or cut off.
    pub fn tcp_flags(&self) -> Option<u8> {
        if self.key.protocol == TCP && !self.fragment { self.payload.get(13).copied() } else { None }
    }
}

/// Whether an Ethernet frame is shorter than the IP packet in it: the IP header, or the length that
/// it gives, extends beyond the frame. The packet was cut on the wire or by the driver.
pub fn is_cut(frame: &[u8]) -> bool {
    let Some((ethertype, offset)) = ethertype(frame) else { return false };
    let datagram = &frame[offset..];
    let length = match (ethertype, datagram.first().map(|byte| byte >> 4)) {
        (IPV4 | IPV6, None) => None,
        (IPV4, Some(4)) => datagram.first_chunk::<20>().map(|header| be16(header, 2).into()),
        (IPV6, Some(6)) => datagram.first_chunk::<40>().map(|header| match be16(header, 4) {
            0 => jumbo_length(header[6], &datagram[40..]).saturating_add(40),
            length => usize::from(length) + 40,
        }),
        _ => return false,
    };
    length.is_none_or(|length| length > datagram.len())
}

/// Whether a protocol's header begins with two 16-bit ports.
#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | DCCP | SCTP | UDP_LITE)
}

/// The ethertype of a frame behind up to two VLAN tags, and where its payload begins.
pub fn ethertype(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = 12;
    for _ in 0..2 {
        let ethertype = u16::from_be_bytes(*frame.get(at..)?.first_chunk()?);
        if !matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            return Some((ethertype, at + 2));
        }
        at += 4;
    }
    Some((u16::from_be_bytes(*frame.get(at..)?.first_chunk()?), at + 2))
}

/// The payload length that the hop-by-hop options give for an IPv6 packet whose header has length
/// 0; 0 without a jumbo payload option.
fn jumbo_length(next: u8, payload: &[u8]) -> usize {
    const PAD_1: u8 = 0;
    const JUMBO_PAYLOAD: u8 = 0xc2;
    let (HOP_BY_HOP, [_, units, ..]) = (next, payload) else { return 0 };
    let end = (8 + usize::from(*units) * 8).min(payload.len());
    let mut options = &payload[2..end];
    for _ in 0..MAX_OPTIONS {
        let length = match options {
            [PAD_1, ..] => 1,
            [JUMBO_PAYLOAD, 4, a, b, c, d, ..] => return u32::from_be_bytes([*a, *b, *c, *d]) as usize,
            [_, length, ..] => 2 + usize::from(*length),
            _ => break,
        };
        options = options.get(length..).unwrap_or_default();
    }
    0
}

/// Walks IPv6 extension headers: the protocol after them, whether this is a fragment, and the rest. Stops early, at
/// the protocol of the header it could not read, where the packet is cut off or the chain too long.
fn skip_extension_headers(first: u8, mut rest: &[u8]) -> (u8, bool, &[u8]) {
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    let mut protocol = first;
    for _ in 0..MAX_EXTENSION_HEADERS {
        let length = match (protocol, rest) {
            (HOP_BY_HOP | ROUTING | DESTINATION, [_, units, ..]) => 8 + usize::from(*units) * 8,
            (AUTHENTICATION, [_, units, ..]) => 8 + usize::from(*units) * 4,
            (FRAGMENT, [next, _, high, low, _, _, _, _, behind @ ..]) => {
                // 13 bits offset, 2 reserved, 1 "more": all 0 is an atomic fragment, a whole datagram.
                if u16::from_be_bytes([*high, *low]) & 0xfff9 != 0 {
                    return (*next, true, behind);
                }
                8
            }
            _ => break,
        };
        let Some(behind) = rest.get(length..) else { break };
        (protocol, rest) = (rest[0], behind);
    }
    (protocol, false, rest)
}

#[inline(always)]
fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(tags: &[u16], ethertype: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 7]);
        }
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn v4(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let fragment = fragment.to_be_bytes();
        let mut packet = vec![
            0x45,
            0,
            total[0],
            total[1],
            0,
            1,
            fragment[0],
            fragment[1],
            64,
            protocol,
            0,
            0,
            10,
            0,
            0,
            1,
            10,
            0,
            0,
            2,
        ];
        packet.extend(payload);
        packet
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], next, 64];
        packet.extend([1; 16]);
        packet.extend([2; 16]);
        packet.extend(payload);
        packet
    }

    const PORTS: [u8; 8] = [0x12, 0x34, 0, 80, 0, 8, 0, 0];

    fn ports_of(frame: &[u8]) -> (u8, u16, u16, bool) {
        let packet = Packet::parse(frame).unwrap();
        (packet.key.protocol, packet.key.source_port, packet.key.destination_port, packet.fragment)
    }

    #[test]
    fn reads_the_tuple_behind_up_to_two_tags() {
        for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100], &[0x9100, 0x8100]] {
            let frame = frame(tags, IPV4, &v4(UDP, 0x4000, &PORTS));
            assert_eq!(ports_of(&frame), (UDP, 0x1234, 80, false));
            assert_eq!(Packet::parse(&frame).unwrap().key.source, IpAddr::from([10, 0, 0, 1]));
        }
        assert_eq!(Packet::parse(&frame(&[0x88a8, 0x8100, 0x8100], IPV4, &v4(UDP, 0, &PORTS))), None);
    }

    #[test]
    fn fragments_have_no_ports() {
        for offset in [0x2000, 1, 0x2001] {
            assert_eq!(ports_of(&frame(&[], IPV4, &v4(UDP, offset, &PORTS))), (UDP, 0, 0, true));
        }
        let mut first = vec![UDP, 0, 0, 1, 0, 0, 0, 9];
        first.extend(PORTS);
        assert_eq!(ports_of(&frame(&[], IPV6, &v6(44, &first))), (UDP, 0, 0, true));
        first[3] = 0; // an atomic fragment
        assert_eq!(ports_of(&frame(&[], IPV6, &v6(44, &first))), (UDP, 0x1234, 80, false));
    }

    #[test]
    fn walks_extension_headers() {
        let mut chain = vec![43, 0, 0, 0, 0, 0, 0, 0]; // hop-by-hop, then routing
        chain.extend([60, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // routing of 16 bytes, then destination
        chain.extend([51, 0, 0, 0, 0, 0, 0, 0]); // destination, then authentication
        chain.extend([TCP, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // authentication of 12 bytes, then TCP
        chain.extend(PORTS);
        assert_eq!(ports_of(&frame(&[], IPV6, &v6(0, &chain))), (TCP, 0x1234, 80, false));
    }

    #[test]
    fn ethernet_padding_is_not_payload() {
        let mut frame = frame(&[], IPV4, &v4(UDP, 0, &[]));
        frame.extend([0xff; 26]);
        assert_eq!(Packet::parse(&frame).unwrap().payload, &[] as &[u8]);
        assert_eq!(ports_of(&frame), (UDP, 0, 0, false));
    }

    #[test]
    fn what_follows_an_ipv6_packet_of_length_0_is_not_payload() {
        let empty = |next: u8, behind: &[u8]| {
            let mut packet = v6(next, behind);
            packet[4..6].fill(0);
            frame(&[], IPV6, &packet)
        };
        let trailer = empty(UDP, &PORTS);
        assert_eq!(ports_of(&trailer), (UDP, 0, 0, false));
        assert_eq!(Packet::parse(&trailer).unwrap().payload, &[] as &[u8]);
        // Hop-by-hop options, but none that gives a length.
        let padding = [&[UDP, 0, 1, 4, 0, 0, 0, 0][..], &PORTS].concat();
        assert_eq!(ports_of(&empty(HOP_BY_HOP, &padding)), (HOP_BY_HOP, 0, 0, false));
    }

    #[test]
    fn a_jumbo_payload_option_gives_the_length() {
        let jumbo = |options: &[u8], behind: &[u8]| {
            let units = u8::try_from((options.len() + 2) / 8 - 1).unwrap();
            let mut packet = v6(HOP_BY_HOP, &[&[UDP, units], options, behind].concat());
            packet[4..6].fill(0);
            frame(&[], IPV6, &packet)
        };
        let whole = (UDP, 0x1234, 80, false);
        assert_eq!(ports_of(&jumbo(&[0xc2, 4, 0, 1, 0, 0], &PORTS)), whole);
        assert_eq!(ports_of(&jumbo(&[0xc2, 4, 0, 0, 0, 16], &PORTS)), whole);
        assert_eq!(ports_of(&jumbo(&[0xc2, 4, 0, 0, 0, 11], &PORTS)), (UDP, 0, 0, false));
        // Behind padding of one byte, and of more.
        assert_eq!(ports_of(&jumbo(&[0, 0, 1, 2, 0, 0, 0, 0, 0xc2, 4, 0, 1, 0, 0], &PORTS)), whole);
        // Another length of the option, or a ninth option, is none.
        assert_eq!(ports_of(&jumbo(&[0xc2, 3, 0, 1, 0, 0], &PORTS)), (HOP_BY_HOP, 0, 0, false));
        assert_eq!(
            ports_of(&jumbo(&[0, 0, 0, 0, 0, 0, 0, 0, 0xc2, 4, 0, 1, 0, 0], &PORTS)),
            (HOP_BY_HOP, 0, 0, false)
        );
    }

    #[test]
    fn ipv4_of_total_length_0_ends_with_its_frame_and_of_less_than_its_header_is_empty() {
        let of_total = |total: u8| {
            let mut packet = v4(TCP, 0, &PORTS);
            packet[2..4].copy_from_slice(&[0, total]);
            ports_of(&frame(&[], IPV4, &packet))
        };
        assert_eq!(of_total(0), (TCP, 0x1234, 80, false));
        for total in [1, 19, 20, 23] {
            assert_eq!(of_total(total), (TCP, 0, 0, false), "{total}");
        }
        assert_eq!(of_total(24), (TCP, 0x1234, 80, false));
        assert_eq!(of_total(255), (TCP, 0x1234, 80, false));
    }

    #[test]
    fn an_extension_header_beyond_the_payload_length_is_not_read() {
        let of_length = |next: u8, length: u8, payload: &[u8]| {
            let mut packet = v6(next, payload);
            packet[5] = length;
            ports_of(&frame(&[], IPV6, &packet))
        };
        let routing = [&[TCP, 0, 0, 0, 0, 0, 0, 0][..], &PORTS].concat();
        assert_eq!(of_length(43, 12, &routing), (TCP, 0x1234, 80, false));
        assert_eq!(of_length(43, 11, &routing), (TCP, 0, 0, false));
        assert_eq!(of_length(43, 7, &routing), (43, 0, 0, false));
        let fragment = [&[TCP, 0, 0, 1, 0, 0, 0, 0][..], &PORTS].concat();
        assert_eq!(of_length(44, 8, &fragment), (TCP, 0, 0, true));
        assert_eq!(of_length(44, 7, &fragment), (44, 0, 0, false));
    }

    #[test]
    fn a_packet_longer_than_its_frame_is_cut() {
        let mut padded = frame(&[0x8100], IPV4, &v4(UDP, 0, &PORTS));
        let whole = padded.len();
        padded.extend([0; 20]);
        for (frame, whole) in [
            (padded, whole),
            (frame(&[], IPV4, &v4(UDP, 0, &PORTS)), 14 + 28),
            (frame(&[0x88a8, 0x8100], IPV6, &v6(UDP, &PORTS)), 14 + 8 + 48),
        ] {
            assert!((whole..=frame.len()).all(|length| !is_cut(&frame[..length])));
            let (_, behind_tags) = ethertype(&frame).unwrap();
            assert!((behind_tags..whole).all(|length| is_cut(&frame[..length])));
            assert!((0..behind_tags).all(|length| !is_cut(&frame[..length])));
        }
        let of_length = |ethertype: u16, mut packet: Vec<u8>, at: usize, length: u16| {
            packet[at..at + 2].copy_from_slice(&length.to_be_bytes());
            is_cut(&frame(&[], ethertype, &packet))
        };
        // No length, or one that makes no sense.
        assert!(!of_length(IPV4, v4(UDP, 0, &PORTS), 2, 0));
        assert!(!of_length(IPV4, v4(UDP, 0, &PORTS), 2, 5));
        assert!(!of_length(IPV6, v6(UDP, &PORTS), 4, 0));
        assert!(of_length(IPV4, v4(UDP, 0, &PORTS), 2, 29));
        assert!(of_length(IPV6, v6(UDP, &PORTS), 4, u16::MAX));
        let jumbo = |length: u8| v6(HOP_BY_HOP, &[&[UDP, 0, 0xc2, 4, 0, 0, 0, length][..], &PORTS].concat());
        assert!(!of_length(IPV6, jumbo(16), 4, 0));
        assert!(of_length(IPV6, jumbo(17), 4, 0));
        // Neither IPv4 nor IPv6.
        assert!(!is_cut(&frame(&[], 0x0806, &v4(UDP, 0, &PORTS)[..10])));
        assert!(!is_cut(&frame(&[], IPV4, &v6(UDP, &PORTS)[..10])));
        assert!(!is_cut(&[0; 5]));
    }

    #[test]
    fn a_header_cut_off_within_its_options_is_not_read() {
        let mut packet = v4(UDP, 0, &PORTS);
        packet[0] = 0x47; // 28 bytes: all that follows the first 20 are options
        assert_eq!(ports_of(&frame(&[], IPV4, &packet)), (UDP, 0, 0, false));
        assert_eq!(Packet::parse(&frame(&[], IPV4, &packet[..27])), None);
    }

    #[test]
    fn tcp_flags_of_whole_tcp_segments_only() {
        let mut segment = [0; 20];
        segment[13] = 0x12;
        let flags = |protocol, fragment| {
            Packet::parse(&frame(&[], IPV4, &v4(protocol, fragment, &segment))).unwrap().tcp_flags()
        };
        assert_eq!(flags(TCP, 0), Some(0x12));
        assert_eq!(flags(UDP, 0), None);
        assert_eq!(flags(TCP, 0x2000), None);
    }

    proptest! {
        // Few cases under Miri, which is slow, and no files of failures, which its isolation forbids.
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 16 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn any_bytes_are_read_without_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            ethertype in prop_oneof![Just(IPV4), Just(IPV6), Just(0x8100), any::<u16>()],
            version in prop_oneof![Just(0x45), Just(0x60), any::<u8>()],
        ) {
            if bytes.len() > 14 {
                bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
                bytes[14] = version;
            }
            if let Some(packet) = Packet::parse(&bytes) {
                let (canonical, reversed) = packet.key.canonical();
                prop_assert_eq!(packet.key.reversed().canonical().0, canonical);
                prop_assert_eq!(if reversed { canonical.reversed() } else { canonical }, packet.key);
            }
        }
    }
}
