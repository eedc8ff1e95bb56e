//! Community ID, version 1, seed 0: one name for a flow across monitoring tools.
//!
//! <https://github.com/corelight/community-id-spec>

use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};
use xfan_worker::flow::{FlowKey, ICMP, ICMPV6, Packet, SCTP, TCP, UDP};

/// What stands in the place of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Nothing: a protocol without ports, a fragment, or a packet cut off before them.
    None,
    /// Those of both ends, or an ICMP message's type and the type of its answer.
    Pair(u16, u16),
    /// An ICMP message's type and code, where there is no answer to it: direction counts.
    OneWay(u16, u16),
}

impl Ports {
    /// Reads them, in the direction of the packet.
    pub fn of(packet: &Packet<'_>) -> Self {
        match (packet.key.protocol, packet.payload) {
            _ if packet.fragment => Ports::None,
            (TCP | UDP | SCTP, [_, _, _, _, ..]) => {
                Ports::Pair(packet.key.source_port, packet.key.destination_port)
            }
            (ICMP, [kind, code, ..]) => Self::of_message(*kind, *code, icmp_answer),
            (ICMPV6, [kind, code, ..]) => Self::of_message(*kind, *code, icmp6_answer),
            _ => Ports::None,
        }
    }

    fn of_message(kind: u8, code: u8, answer: fn(u8) -> Option<u8>) -> Self {
        match answer(kind) {
            Some(answer) => Ports::Pair(kind.into(), answer.into()),
            None => Ports::OneWay(kind.into(), code.into()),
        }
    }
}

/// The type of the ICMP message that answers, or is answered by, one of this type.
fn icmp_answer(kind: u8) -> Option<u8> {
    // Echo, router discovery, time stamp, information, address mask.
    const PAIRS: [(u8, u8); 5] = [(8, 0), (10, 9), (13, 14), (15, 16), (17, 18)];
    counterpart(&PAIRS, kind)
}

/// The same for IPv6.
fn icmp6_answer(kind: u8) -> Option<u8> {
    // Echo, multicast listeners, router and neighbour discovery, node information, home agent discovery.
    const PAIRS: [(u8, u8); 6] = [(128, 129), (130, 131), (133, 134), (135, 136), (139, 140), (144, 145)];
    counterpart(&PAIRS, kind)
}

fn counterpart(pairs: &[(u8, u8)], kind: u8) -> Option<u8> {
    pairs.iter().find_map(|&(request, answer)| match kind {
        _ if kind == request => Some(answer),
        _ if kind == answer => Some(request),
        _ => None,
    })
}

/// The Community ID of a flow, of which one packet had `key` and `ports`.
pub fn community_id(key: &FlowKey, ports: Ports) -> String {
    let (mut source, mut destination) = (key.source, key.destination);
    let mut ordered = ports;
    match ports {
        Ports::OneWay(..) => {}
        Ports::None if source > destination => (source, destination) = (destination, source),
        Ports::Pair(from, to) if (source, from) > (destination, to) => {
            (source, destination) = (destination, source);
            ordered = Ports::Pair(to, from);
        }
        Ports::None | Ports::Pair(..) => {}
    }
    let mut sha1 = Sha1::new();
    sha1.update([0, 0]); // the seed
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => sha1.update(address.octets()),
            IpAddr::V6(address) => sha1.update(address.octets()),
        }
    }
    sha1.update([key.protocol, 0]);
    if let Ports::Pair(from, to) | Ports::OneWay(from, to) = ordered {
        sha1.update(from.to_be_bytes());
        sha1.update(to.to_be_bytes());
    }
    format!("1:{}", STANDARD.encode(sha1.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ID of a flow between two ends, seen from either; for ICMP the two numbers are type and code.
    fn id(protocol: u8, source: &str, from: u16, destination: &str, to: u16) -> String {
        let key = FlowKey {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            source_port: from,
            destination_port: to,
            protocol,
        };
        let (high, low) = (from.to_be_bytes(), to.to_be_bytes());
        let payload = match protocol {
            ICMP | ICMPV6 => [high[1], low[1], 0, 0],
            _ => [high[0], high[1], low[0], low[1]],
        };
        let ports = Ports::of(&Packet { key, fragment: false, payload: &payload });
        let id = community_id(&key, ports);
        if let Ports::Pair(from, to) = ports {
            assert_eq!(community_id(&key.reversed(), Ports::Pair(to, from)), id, "the way back");
        }
        id
    }

    #[test]
    fn equals_the_baseline_of_the_specification_and_zeek() {
        let router = "3ffe:507:0:1:200:86ff:fe05:80da";
        let host = "3ffe:507:0:1:260:97ff:fe07:69ea";
        let (near, far) = ("fe80::200:86ff:fe05:80da", "fe80::260:97ff:fe07:69ea");
        let sender = "2001:470:e5bf:dead:4957:2174:e82c:4887";
        for (protocol, source, from, destination, to, expected) in [
            (TCP, "128.232.110.120", 34855, "66.35.250.204", 80, "1:LQU9qZlK+B5F3KDmev6m5PMibrg="),
            (TCP, sender, 63943, "2607:f8b0:400c:c03::1a", 25, "1:/qFaeAR+gFe1KYjMzVDsMv+wgU4="),
            (UDP, "192.168.1.52", 54585, "8.8.8.8", 53, "1:d/FP5EW3wiY1vCndhwleRRKHowQ="),
            (SCTP, "192.168.170.8", 7, "192.168.170.56", 7, "1:MP2EtRCAUIZvTw6MxJHLV7N7JDs="),
            (SCTP, "192.168.170.8", 0, "192.168.170.56", 0, "1:U5cVwrVgLshgANPmc8hKzEcqp1M="),
            (46, "10.1.12.1", 0, "10.1.12.2", 0, "1:KHlLkgoJW7ifUTyTSgyVfkFHzKw="),
            (46, "10.1.12.2", 0, "10.1.12.1", 0, "1:KHlLkgoJW7ifUTyTSgyVfkFHzKw="),
            (ICMP, "192.168.0.89", 8, "192.168.0.1", 0, "1:X0snYXpgwiv9TZtqg64sgzUn6Dk="),
            (ICMP, "192.168.0.1", 0, "192.168.0.89", 0, "1:X0snYXpgwiv9TZtqg64sgzUn6Dk="),
            (ICMP, "10.0.0.1", 11, "10.0.0.2", 0, "1:YHxtAirCG//0OzkcVAukqKQN9xM="),
            (ICMPV6, "3ffe:501:0:1802:260:97ff:feb6:7ff0", 3, router, 0, "1:bnQKq8A2r//dWnkRW2EYcMhShjc="),
            (ICMPV6, "3ffe:501:1800:2345::2", 3, router, 0, "1:2ObVBgIn28oZvibYZhZMBgh7WdQ="),
            (ICMPV6, "3ffe:501:410:0:2c0:dfff:fe47:33e", 1, router, 4, "1:hLZd0XGWojozrvxqE0dWB1iM6R0="),
            (ICMPV6, router, 1, "3ffe:501:4819::42", 4, "1:jwuBy9UWZK1KUFqJV5cHdVpfrlY="),
            (ICMPV6, router, 128, "3ffe:501:0:1001::2", 0, "1:+TW+HtLHvV1xnGhV1lv7XoJrqQg="),
            (ICMPV6, router, 128, host, 0, "1:GpbEQrKqfWtsfsFiqg8fufoZe5Y="),
            (ICMPV6, router, 135, host, 0, "1:ORxAZfN3ld7Sv73/HQTNnvgxbpY="),
            (ICMPV6, router, 135, "ff02::1:ff07:69ea", 0, "1:MEixa66kuz0OMvlQqnAIzP3n2xg="),
            (ICMPV6, host, 135, router, 0, "1:BtEUCMYecYjJ7spEkVZDiCFaMTY="),
            (ICMPV6, host, 3, router, 0, "1:NdobDX8PQNJbAyfkWxhtL2Pqp5w="),
            (ICMPV6, near, 133, "ff02::2", 0, "1:hO+sN4H+MG5MY/8hIrXPqc4ZQz0="),
            (ICMPV6, near, 135, far, 0, "1:dGHyGvjMfljg6Bppwm3bg0LO8TY="),
            (ICMPV6, far, 136, near, 0, "1:dGHyGvjMfljg6Bppwm3bg0LO8TY="),
            (ICMPV6, far, 134, "ff02::1", 0, "1:pkvHqCL88/tg1k4cPigmZXUtL00="),
            (ICMPV6, far, 135, near, 0, "1:zavyT/cezQr1fmImYCwYnMXbgck="),
        ] {
            assert_eq!(
                id(protocol, source, from, destination, to),
                expected,
                "{protocol} {source} {destination}"
            );
        }
    }
}
