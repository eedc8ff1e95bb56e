//! Community ID, version 1, seed 0: one name for a flow across monitoring tools.
//!
//! <https://github.com/corelight/community-id-spec>

use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

use crate::flow_id::{FlowId, Ports};

/// The Community ID of a flow, the same for both directions.
pub fn community_id(flow: FlowId) -> String {
    let FlowId { key, ports } = flow.canonical();
    let mut sha1 = Sha1::new();
    sha1.update([0, 0]); // the seed
    for address in [key.source, key.destination] {
        match address {
            IpAddr::V4(address) => sha1.update(address.octets()),
            IpAddr::V6(address) => sha1.update(address.octets()),
        }
    }
    sha1.update([key.protocol, 0]);
    match ports {
        Ports::None => {}
        Ports::Pair | Ports::OneWay => {
            sha1.update(key.source_port.to_be_bytes());
            sha1.update(key.destination_port.to_be_bytes());
        }
    }
    format!("1:{}", STANDARD.encode(sha1.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use xfan_worker::packet::{FlowKey, ICMP, ICMPV6, Packet, SCTP, TCP, UDP};

    /// The ID of a flow between two endpoints, checked in both directions. For ICMP, `from` and
    /// `to` are type and code.
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
        let flow = FlowId::of(&Packet { key, fragment: false, payload: &payload });
        let id = community_id(flow);
        if flow.ports != Ports::OneWay {
            assert_eq!(community_id(FlowId { key: flow.key.reversed(), ..flow }), id, "the way back");
        }
        id
    }

    /// The specification hashes ports of TCP, UDP and SCTP only. The expected values are those of
    /// pycommunityid for addresses and protocol.
    #[test]
    fn dccp_and_udp_lite_ports_are_not_hashed() {
        let (one, other) = ("10.1.12.1", "10.1.12.2");
        let (one6, other6) = ("2001:db8::1", "2001:db8::2");
        for (protocol, expected, expected6) in [
            (33, "1:tS1VLPVIHyB/EWpKCtBrjkukjYQ=", "1:oicU5i61bGe5rDPx0iIBuxzgZ80="),
            (136, "1:QVfcEkJLz9ecWKR1tASYJ6wUldA=", "1:dVWiax/gi20RK2zwiTyTECWNAFc="),
        ] {
            for (from, to) in [(0, 0), (5001, 5002), (5002, 5001)] {
                assert_eq!(id(protocol, one, from, other, to), expected);
                assert_eq!(id(protocol, other, from, one, to), expected);
                assert_eq!(id(protocol, one6, from, other6, to), expected6);
                assert_eq!(id(protocol, other6, from, one6, to), expected6);
            }
        }
    }

    #[test]
    fn ids_equal_those_of_the_specification_and_zeek() {
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
