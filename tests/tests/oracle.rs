//! The oracle on handmade frames and reference captures. Needs no root.

use std::collections::BTreeSet;
use std::net::IpAddr;

use xfan_tests::capture::Capture;
use xfan_tests::community_id::{community_id, references};
use xfan_tests::oracle::{Expectation, Flow, PassRule, Verdict, read};
use xfan_tests::traffic::{self, Echo};

fn udp4() -> Vec<u8> {
    traffic::udp("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:53".parse().unwrap(), &[7; 100])
}

fn udp6() -> Vec<u8> {
    traffic::udp("[2001:db8::2]:4000".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap(), &[7; 100])
}

fn flow(protocol: u8, one: &str, one_port: u16, other: &str, other_port: u16) -> Flow {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    Flow::between(protocol, (address(one), one_port), (address(other), other_port))
}

/// An IPv6 frame whose payload begins with `headers`; `first` is the type of the first.
fn with_extensions(first: u8, headers: &[u8]) -> Vec<u8> {
    let mut frame = udp6();
    let payload_length = u16::try_from(frame.len() - 54 + headers.len()).unwrap();
    frame[18..20].copy_from_slice(&payload_length.to_be_bytes());
    frame[20] = first;
    frame.splice(54..54, headers.iter().copied());
    frame
}

/// An ICMPv6 message of the given type and hop limit.
fn icmpv6(kind: u8, hop_limit: u8) -> Vec<u8> {
    let address = |text: &str| text.parse().unwrap();
    let mut frame = traffic::echo(address("fe80::2"), address("fe80::1"), Echo::Request, 0, &[0; 24]);
    frame[21] = hop_limit;
    frame[54] = kind;
    frame
}

#[test]
fn both_directions_are_one_flow() {
    let (one, other) = ("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:53".parse().unwrap());
    let frames = [traffic::tcp(one, other, 0, &[]), traffic::tcp(other, one, 1, &[1; 10])];
    let expected = Expectation::of(frames.iter().map(Vec::as_slice), &[]);
    let totals = &expected.flows[&flow(6, "10.0.0.1", 53, "10.0.0.2", 4000)];
    assert_eq!((totals.packets, totals.bytes), (2, 54 + 64));
    assert_eq!(totals.community_ids.len(), 1);
    assert_eq!((expected.redirected, expected.flows.len()), (2, 1));
}

#[test]
fn two_vlan_tags_are_parsed_and_a_third_is_not() {
    let expected = Some(flow(17, "10.0.0.1", 53, "10.0.0.2", 4000));
    for tags in [&[][..], &[(0x8100, 7)], &[(0x88a8, 7), (0x8100, 8)], &[(0x9100, 7), (0x8100, 8)]] {
        let reading = read(&traffic::tagged(&udp4(), tags), &[]);
        assert_eq!((reading.verdict, reading.flow), (Verdict::Redirect, expected), "{tags:?}");
    }
    let thrice = traffic::tagged(&udp4(), &[(0x8100, 7), (0x8100, 8), (0x8100, 9)]);
    assert_eq!(read(&thrice, &[]).verdict, Verdict::NonIp);
    assert_eq!(read(&thrice[..15], &[]).verdict, Verdict::NonIp);
}

#[test]
fn fragments_have_no_ports() {
    for (frame, expected) in [
        (udp4(), flow(17, "10.0.0.1", 0, "10.0.0.2", 0)),
        (udp6(), flow(17, "2001:db8::1", 0, "2001:db8::2", 0)),
    ] {
        let fragments = traffic::fragments(&frame, 48);
        assert_eq!(fragments.len(), 3);
        for fragment in &fragments {
            assert_eq!(read(fragment, &[]).flow, Some(expected));
        }
        let ids: BTreeSet<_> = fragments.iter().map(|fragment| read(fragment, &[]).community_id).collect();
        assert_eq!(ids.len(), 1);
    }
}

#[test]
fn a_packet_ends_where_its_header_says() {
    let of_length = |mut frame: Vec<u8>, at: usize, length: u8| {
        frame[at..at + 2].copy_from_slice(&[0, length]);
        read(&frame, &[]).flow
    };
    let ports =
        [flow(17, "10.0.0.1", 53, "10.0.0.2", 4000), flow(17, "2001:db8::1", 53, "2001:db8::2", 4000)];
    let none = [flow(17, "10.0.0.1", 0, "10.0.0.2", 0), flow(17, "2001:db8::1", 0, "2001:db8::2", 0)];
    for (length, expected) in [(0, ports[0]), (19, none[0]), (23, none[0]), (24, ports[0]), (255, ports[0])] {
        assert_eq!(of_length(udp4(), 16, length), Some(expected), "IPv4, {length} bytes");
    }
    for (length, expected) in [(0, none[1]), (3, none[1]), (4, ports[1]), (255, ports[1])] {
        assert_eq!(of_length(udp6(), 18, length), Some(expected), "IPv6, {length} bytes");
    }
    let jumbo = |options: [u8; 6]| {
        let header = [&[17, 0][..], &options].concat();
        of_length(with_extensions(0, &header), 18, 0)
    };
    assert_eq!(jumbo([0xc2, 4, 0, 1, 0, 0]), Some(ports[1]));
    assert_eq!(jumbo([0xc2, 4, 0, 0, 0, 12]), Some(ports[1]));
    assert_eq!(jumbo([0xc2, 4, 0, 0, 0, 11]), Some(none[1]));
    assert_eq!(jumbo([1, 4, 0, 0, 0, 0]), Some(flow(0, "2001:db8::1", 0, "2001:db8::2", 0)));
}

#[test]
fn an_icmp_request_and_its_reply_are_one_flow() {
    let (one, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let echo = |from, to, half| read(&traffic::echo(from, to, half, 0, &[0; 24]), &[]).flow.unwrap();
    let expected = flow(1, "10.0.0.1", 8, "10.0.0.2", 0);
    assert_eq!(echo(one, other, Echo::Request), expected);
    assert_eq!(echo(other, one, Echo::Reply), expected);
    assert_eq!(echo(other, one, Echo::Request), flow(1, "10.0.0.1", 0, "10.0.0.2", 8));
    let message = |kind, code| {
        let mut frame = icmpv6(kind, 64);
        frame[55] = code;
        frame
    };
    let (unreachable, exceeded) =
        (flow(58, "fe80::2", 1, "fe80::1", 3), flow(58, "fe80::2", 3, "fe80::1", 1));
    assert_eq!(read(&message(1, 3), &[]).flow, Some(unreachable));
    assert_eq!(read(&message(3, 1), &[]).flow, Some(exceeded));
    // The other direction is another flow, even with the numbers exchanged.
    assert_ne!(unreachable, flow(58, "fe80::1", 1, "fe80::2", 3));
    assert_ne!(unreachable, flow(58, "fe80::1", 3, "fe80::2", 1));
    // Fragments and messages truncated within type and code have no numbers.
    let without = Some(flow(58, "fe80::1", 0, "fe80::2", 0));
    assert!(traffic::fragments(&message(1, 3), 16).iter().all(|frame| read(frame, &[]).flow == without));
    assert_eq!(read(&message(1, 3)[..55], &[]).flow, without);
    assert_eq!(read(&message(1, 3)[..56], &[]).flow, Some(unreachable));
}

#[test]
fn extension_headers_are_walked() {
    let expected = Some(flow(17, "2001:db8::1", 53, "2001:db8::2", 4000));
    let mut chain = vec![43, 0, 0, 0, 0, 0, 0, 0]; // hop-by-hop, then routing
    // routing, 16 bytes, then destination
    chain.extend([60, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    chain.extend([51, 0, 0, 0, 0, 0, 0, 0]); // destination, then authentication
    chain.extend([44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // authentication, 12 bytes, then fragment
    chain.extend([17, 0, 0, 0, 0, 0, 0, 9]); // an atomic fragment, then UDP
    assert_eq!(read(&with_extensions(0, &chain), &[]).flow, expected);
    // Each of the 13 bits of the offset, and "more", but not the two reserved bits between.
    for bit in 0..16 {
        let [high, low] = (1u16 << bit).to_be_bytes();
        let frame = with_extensions(44, &[17, 0, high, low, 0, 0, 0, 9]);
        let ports = read(&frame, &[]).flow.unwrap().low.1;
        assert_eq!(ports, if bit == 1 || bit == 2 { 53 } else { 0 }, "bit {bit}");
    }
    // Encryption ends the walk; a truncated chain ends at the header that is incomplete.
    let encrypted = read(&with_extensions(50, &[0; 16]), &[]).flow.unwrap();
    assert_eq!((encrypted.protocol, encrypted.low.1), (50, 0));
    let cut = with_extensions(0, &chain);
    assert_eq!(read(&cut[..54 + 20], &[]).flow.unwrap().protocol, 43);
}

#[test]
fn arp_and_neighbour_discovery_go_to_the_kernel() {
    let mut arp = udp4();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(read(&arp, &[]).verdict, Verdict::NonIp);
    for kind in 133..=137 {
        assert_eq!(read(&icmpv6(kind, 255), &[]).verdict, Verdict::NeighbourDiscovery);
        assert_eq!(read(&icmpv6(kind, 64), &[]).verdict, Verdict::Redirect);
    }
    assert_eq!(read(&icmpv6(132, 255), &[]).verdict, Verdict::Redirect);
    assert_eq!(read(&icmpv6(138, 255), &[]).verdict, Verdict::Redirect);
}

#[test]
fn rules_match_protocol_and_port() {
    let by_port = [PassRule { protocol: 17, port: Some(53) }];
    assert_eq!(read(&udp4(), &by_port).verdict, Verdict::Rule);
    assert_eq!(read(&udp6(), &by_port).verdict, Verdict::Rule);
    assert_eq!(read(&udp4(), &[PassRule { protocol: 17, port: Some(4000) }]).verdict, Verdict::Redirect);
    assert_eq!(read(&udp4(), &[PassRule { protocol: 6, port: None }]).verdict, Verdict::Redirect);
    let fragments = traffic::fragments(&udp4(), 48);
    let verdicts: Vec<_> = fragments.iter().map(|fragment| read(fragment, &by_port).verdict).collect();
    assert_eq!(verdicts, [Verdict::Rule, Verdict::Redirect, Verdict::Redirect]);
}

#[test]
fn frames_with_a_bad_ip_header_have_no_flow() {
    let mut frame = udp4();
    frame[14] = 0x43; // a header of 12 bytes
    let expected = Expectation::of([&frame[..], &udp6()[..30]], &[]);
    assert_eq!((expected.redirected, expected.unreadable, expected.flows.len()), (2, 2, 0));
}

#[test]
fn padding_has_no_ports() {
    let mut frame = udp4();
    frame[16..18].copy_from_slice(&20u16.to_be_bytes()); // nothing follows the IP header
    assert_eq!(read(&frame, &[]).flow.unwrap(), flow(17, "10.0.0.1", 0, "10.0.0.2", 0));
}

#[test]
fn synthetic_traffic_has_both_directions_of_a_flow() {
    let capture = traffic::synthetic(300, 5000, 7);
    assert_eq!(capture, traffic::synthetic(300, 5000, 7));
    assert_ne!(capture, traffic::synthetic(300, 5000, 8));
    let expected = Expectation::of(capture.frames.iter().map(Vec::as_slice), &[]);
    assert_eq!((expected.redirected, expected.flows.len(), expected.unreadable), (5000, 300, 0));
    assert_eq!(expected.redirected_bytes, capture.bytes());
    let protocols: BTreeSet<u8> = expected.flows.keys().map(|flow| flow.protocol).collect();
    assert_eq!(protocols, BTreeSet::from([1, 6, 17, 58]));
    assert!(expected.flows.values().all(|totals| totals.community_ids.len() == 1));
    assert!(capture.frames.iter().all(|frame| (42..=1500).contains(&frame.len())));
}

/// The oracle computes the same set of Community IDs for a reference capture as Zeek.
#[test]
fn community_ids_match_the_references() {
    for reference in references().unwrap() {
        for known in &reference.known {
            let id = community_id(known.protocol, known.source, known.destination, Some(known.ports));
            assert_eq!(id, known.id, "{}", reference.name);
        }
        let capture = Capture::read(&reference.capture).unwrap();
        let readings = capture.frames.iter().map(|frame| read(frame, &[]));
        if reference.known.iter().all(|known| known.has_ports) {
            let ours: BTreeSet<_> = readings.filter_map(|reading| reading.community_id).collect();
            let zeeks: BTreeSet<_> = reference.known.iter().map(|known| known.id.clone()).collect();
            assert_eq!(ours, zeeks, "{}", reference.name);
        } else {
            // These lists give only the number of flows.
            let flows: BTreeSet<_> = readings.filter_map(|reading| reading.flow).collect();
            assert_eq!(flows.len(), reference.known.len(), "{}", reference.name);
        }
    }
}
