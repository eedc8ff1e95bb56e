//! Tests of [`Packet::parse`] and [`is_cut`].

use super::*;
use crate::ip::{HOP_BY_HOP, MAX_EXTENSION_HEADERS};
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
    first[3] = 0; // an atomic fragment: a complete datagram
    assert_eq!(ports_of(&frame(&[], IPV6, &v6(44, &first))), (UDP, 0x1234, 80, false));
}

#[test]
fn walks_extension_headers() {
    // Hop-by-hop options, then routing.
    let mut chain = vec![43, 0, 0, 0, 0, 0, 0, 0];
    // Routing of 16 bytes, then destination options.
    chain.extend([60, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // Destination options, then authentication.
    chain.extend([51, 0, 0, 0, 0, 0, 0, 0]);
    // Authentication of 12 bytes, then TCP.
    chain.extend([TCP, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    chain.extend(PORTS);
    assert_eq!(ports_of(&frame(&[], IPV6, &v6(0, &chain))), (TCP, 0x1234, 80, false));
}

#[test]
fn walks_no_more_extension_headers_than_the_limit() {
    let chain = |headers: usize| {
        let destinations = [[60, 0, 0, 0, 0, 0, 0, 0], [UDP, 0, 0, 0, 0, 0, 0, 0]];
        let mut chain = [destinations[0]].repeat(headers - 1).concat();
        chain.extend(destinations[1]);
        chain.extend(PORTS);
        frame(&[], IPV6, &v6(60, &chain))
    };
    assert_eq!(ports_of(&chain(MAX_EXTENSION_HEADERS)), (UDP, 0x1234, 80, false));
    assert_eq!(ports_of(&chain(MAX_EXTENSION_HEADERS + 1)), (60, 0, 0, false));
}

#[test]
fn ethernet_padding_is_not_payload() {
    let mut frame = frame(&[], IPV4, &v4(UDP, 0, &[]));
    frame.extend([0xff; 26]);
    assert_eq!(Packet::parse(&frame).unwrap().payload, &[] as &[u8]);
    assert_eq!(ports_of(&frame), (UDP, 0, 0, false));
}

#[test]
fn the_trailer_of_an_empty_ipv6_packet_is_not_payload() {
    let empty = |next: u8, behind: &[u8]| {
        let mut packet = v6(next, behind);
        packet[4..6].fill(0);
        frame(&[], IPV6, &packet)
    };
    let trailer = empty(UDP, &PORTS);
    assert_eq!(ports_of(&trailer), (UDP, 0, 0, false));
    assert_eq!(Packet::parse(&trailer).unwrap().payload, &[] as &[u8]);
    // Hop-by-hop options without a length.
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
    // After padding of one byte and of several bytes.
    assert_eq!(ports_of(&jumbo(&[0, 0, 1, 2, 0, 0, 0, 0, 0xc2, 4, 0, 1, 0, 0], &PORTS)), whole);
    // An option of another length, or the ninth option, is ignored.
    assert_eq!(ports_of(&jumbo(&[0xc2, 3, 0, 1, 0, 0], &PORTS)), (HOP_BY_HOP, 0, 0, false));
    assert_eq!(
        ports_of(&jumbo(&[0, 0, 0, 0, 0, 0, 0, 0, 0xc2, 4, 0, 1, 0, 0], &PORTS)),
        (HOP_BY_HOP, 0, 0, false)
    );
}

#[test]
fn ipv4_total_length_0_or_below_its_header_is_handled() {
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
fn extension_headers_beyond_the_payload_are_not_read() {
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
    // No length, or an impossible one.
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
fn only_whole_tcp_segments_have_flags() {
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
    // Few cases under Miri, which is slow. No failure files: Miri's isolation forbids writing them.
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 16 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_bytes_make_the_parser_panic(
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
