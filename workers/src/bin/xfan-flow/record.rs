//! A flow as one line of JSON.

use std::borrow::Cow;
use std::net::IpAddr;

use serde::Serialize;
use xfan_worker::packet::{FlowKey, ICMP, ICMPV6, SCTP, TCP, UDP};

use crate::community_id::community_id;
use crate::table::Flow;

/// The fields of a line, in order. Ports are 0 for protocols without ports and for fragments. For
/// ICMP, `sport` is the type of the message, and `dport` is the type of its answer, or its code if
/// the type has no answer.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    community_id: String,
    /// `tcp`, `udp`, `icmp`, `icmp6`, `sctp`, or the protocol number.
    proto: Cow<'static, str>,
    /// Sender of the first packet seen.
    src: IpAddr,
    sport: u16,
    dst: IpAddr,
    dport: u16,
    /// Packets of both directions, and their bytes from the Ethernet header on.
    packets: u64,
    bytes: u64,
    /// Seconds since 1970, to the microsecond.
    first: f64,
    last: f64,
    /// Letters of all TCP flags seen, in the order FSRPAUEC. Only for TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_flags: Option<String>,
    /// The member that metered the flow.
    member: &'a str,
}

impl<'a> Record<'a> {
    /// The record of a flow. `epoch` is the wall-clock time of the monotonic clock's zero, in
    /// nanoseconds since 1970.
    pub fn new(flow: &Flow, epoch: u64, member: &'a str) -> Self {
        let FlowKey { source, destination, source_port, destination_port, protocol } = flow.id.key;
        Record {
            community_id: community_id(flow.id),
            proto: protocol_name(protocol),
            src: source,
            sport: source_port,
            dst: destination,
            dport: destination_port,
            packets: flow.packets,
            bytes: flow.bytes,
            first: seconds(epoch.saturating_add(flow.first)),
            last: seconds(epoch.saturating_add(flow.last)),
            tcp_flags: (protocol == TCP).then(|| flag_letters(flow.tcp_flags)),
            member,
        }
    }
}

fn protocol_name(protocol: u8) -> Cow<'static, str> {
    match protocol {
        ICMP => "icmp".into(),
        TCP => "tcp".into(),
        UDP => "udp".into(),
        ICMPV6 => "icmp6".into(),
        SCTP => "sctp".into(),
        other => other.to_string().into(),
    }
}

fn flag_letters(flags: u8) -> String {
    "FSRPAUEC"
        .chars()
        .enumerate()
        .filter(|(bit, _)| flags >> bit & 1 == 1)
        .map(|(_, letter)| letter)
        .collect()
}

/// Nanoseconds in seconds, rounded down to microseconds so that at most 6 decimals are printed.
#[allow(clippy::cast_precision_loss)] // 2⁵³ µs are 285 years
fn seconds(ns: u64) -> f64 {
    (ns / 1000) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow_id::{FlowId, Ports};
    use crate::table::FlowTable;
    use proptest::prelude::*;
    use xfan_worker::packet::{IPV4, IPV6, Packet};

    #[test]
    fn a_line_reads_as_documented() {
        let mut flow = Flow {
            id: FlowId {
                key: FlowKey {
                    source: [128, 232, 110, 120].into(),
                    destination: [66, 35, 250, 204].into(),
                    source_port: 34855,
                    destination_port: 80,
                    protocol: TCP,
                },
                ports: Ports::Pair,
            },
            packets: 3,
            bytes: 190,
            first: 1_000,
            last: 2_500_000_999,
            tcp_flags: 0x12,
        };
        let line = |flow: &Flow| {
            serde_json::to_string(&Record::new(flow, 1_700_000_000_000_000_000, "default/0")).unwrap()
        };
        assert_eq!(
            line(&flow),
            r#"{"community_id":"1:LQU9qZlK+B5F3KDmev6m5PMibrg=","proto":"tcp","src":"128.232.110.120","sport":34855,"#
                .to_owned()
                + r#""dst":"66.35.250.204","dport":80,"packets":3,"bytes":190,"first":1700000000.000001,"#
                + r#""last":1700000002.5,"tcp_flags":"SA","member":"default/0"}"#
        );
        flow.id.key.protocol = 46;
        assert!(line(&flow).contains(r#""proto":"46""#) && !line(&flow).contains("tcp_flags"));
    }

    proptest! {
        #[test]
        fn any_bytes_become_a_line_or_nothing(
            mut bytes in prop::collection::vec(any::<u8>(), 0..120),
            (ethertype, version, next) in prop_oneof![Just((IPV4, 0x45, 23)), Just((IPV6, 0x60, 20)), any::<(u16, u8, u8)>().prop_map(|(a, b, c)| (a, b, usize::from(c)))],
            protocol in prop_oneof![Just(ICMP), Just(TCP), Just(UDP), Just(ICMPV6), Just(SCTP), any::<u8>()],
            time: u64,
        ) {
            if bytes.len() > 14 {
                bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
                bytes[14] = version;
            }
            if let Some(byte) = bytes.get_mut(next) {
                *byte = protocol;
            }
            let mut table = FlowTable::new(1, 1);
            if let Some(packet) = Packet::parse(&bytes) {
                prop_assert_eq!(table.add(&packet, bytes.len(), time), None);
                let flow = table.remove_oldest().unwrap();
                let line = serde_json::to_string(&Record::new(&flow, u64::MAX / 2, "a/0")).unwrap();
                prop_assert!(line.contains(r#""packets":1,"#) && !line.contains('\n'));
            }
        }
    }
}
