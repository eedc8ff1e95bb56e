//! The identity of a flow: its 5-tuple. For ICMP, the type of a message and the type of its answer
//! take the place of the ports.
//!
//! Zeek, Suricata and the Community ID identify flows in the same way. The dispatcher ignores the
//! types: it only has to send all packets of a flow to one worker.

use xfan_worker::packet::{FlowKey, ICMP, ICMPV6, Packet, SCTP, TCP, UDP};

/// A flow, seen in the direction of one of its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// The 5-tuple. Ports are 0 where there are none.
    pub key: FlowKey,
    /// What the two port numbers of `key` are.
    pub ports: Ports,
}

/// The meaning of a flow's two port numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// There are none: the packet is a fragment or cut off before its ports, or the Community ID
    /// defines no ports for the protocol.
    None,
    /// The ports of both endpoints, or the type of an ICMP message and the type of its answer.
    Pair,
    /// The type and code of an ICMP message that has no answer. The reverse direction is another
    /// flow.
    OneWay,
}

impl FlowId {
    /// The flow of a packet, in the packet's direction.
    pub fn of(packet: &Packet<'_>) -> Self {
        let key = packet.key;
        match (key.protocol, packet.payload) {
            _ if packet.fragment => FlowId { key, ports: Ports::None },
            (TCP | UDP | SCTP, [_, _, _, _, ..]) => FlowId { key, ports: Ports::Pair },
            (ICMP, [kind, code, ..]) => Self::of_message(key, *kind, *code, &ICMP_ANSWERS),
            (ICMPV6, [kind, code, ..]) => Self::of_message(key, *kind, *code, &ICMPV6_ANSWERS),
            _ => FlowId { key, ports: Ports::None },
        }
    }

    fn of_message(key: FlowKey, kind: u8, code: u8, answers: &[(u8, u8)]) -> Self {
        let (ports, counterpart) = match counterpart(answers, kind) {
            Some(answer) => (Ports::Pair, answer),
            None => (Ports::OneWay, code),
        };
        let key = FlowKey { source_port: kind.into(), destination_port: counterpart.into(), ..key };
        FlowId { key, ports }
    }

    /// A value that is equal for all packets of a flow, and different for any other flow.
    pub fn canonical(self) -> Self {
        match self.ports {
            Ports::OneWay => self,
            Ports::None | Ports::Pair => FlowId { key: self.key.canonical().0, ..self },
        }
    }
}

/// Types of ICMP requests and their answers: echo, router discovery, time stamp, information,
/// address mask.
const ICMP_ANSWERS: [(u8, u8); 5] = [(8, 0), (10, 9), (13, 14), (15, 16), (17, 18)];
/// Types of ICMPv6 requests and their answers: echo, multicast listeners, router discovery,
/// neighbour discovery, node information, home agent discovery.
const ICMPV6_ANSWERS: [(u8, u8); 6] =
    [(128, 129), (130, 131), (133, 134), (135, 136), (139, 140), (144, 145)];

/// The type of the answer to messages of type `kind`, or the type of the request that they answer.
fn counterpart(answers: &[(u8, u8)], kind: u8) -> Option<u8> {
    answers.iter().find_map(|&(request, answer)| match kind {
        _ if kind == request => Some(answer),
        _ if kind == answer => Some(request),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message from 10.0.0.1 to 10.0.0.2, or with `back` in the other direction.
    fn message(protocol: u8, back: bool, payload: &[u8]) -> Packet<'_> {
        let key = FlowKey {
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            source_port: 0,
            destination_port: 0,
            protocol,
        };
        Packet { key: if back { key.reversed() } else { key }, fragment: false, payload }
    }

    fn ports(packet: &Packet<'_>) -> (u16, u16, Ports) {
        let FlowId { key, ports } = FlowId::of(packet);
        (key.source_port, key.destination_port, ports)
    }

    #[test]
    fn a_message_and_its_answer_are_one_flow() {
        for (protocol, request, answer) in [(ICMP, 8, 0), (ICMP, 13, 14), (ICMPV6, 128, 129)] {
            let (there, back) = ([request, 0, 1, 1], [answer, 0, 1, 1]);
            let (there, back) = (message(protocol, false, &there), message(protocol, true, &back));
            assert_eq!(ports(&there), (request.into(), answer.into(), Ports::Pair));
            assert_eq!(ports(&back), (answer.into(), request.into(), Ports::Pair));
            assert_eq!(FlowId::of(&there).canonical(), FlowId::of(&back).canonical());
        }
    }

    #[test]
    fn other_types_and_reverse_requests_are_other_flows() {
        let ids = [(8, 0, false), (8, 0, true), (13, 0, false), (3, 1, false), (3, 1, true), (1, 3, true)]
            .map(|(kind, code, back)| FlowId::of(&message(ICMP, back, &[kind, code])).canonical());
        for (number, id) in ids.iter().enumerate() {
            assert!(!ids[..number].contains(id), "{id:?}");
        }
        assert_eq!(ports(&message(ICMP, false, &[3, 1])), (3, 1, Ports::OneWay));
    }

    #[test]
    fn fragments_and_cut_off_messages_have_no_ports() {
        let whole = message(ICMPV6, false, &[128, 0, 1, 1]);
        for packet in [Packet { fragment: true, ..whole }, message(ICMPV6, false, &[128])] {
            assert_eq!(ports(&packet), (0, 0, Ports::None));
        }
        let reserved = FlowId::of(&message(ICMPV6, false, &[0, 0]));
        assert_eq!((reserved.key, reserved.ports), (whole.key, Ports::OneWay));
    }
}
