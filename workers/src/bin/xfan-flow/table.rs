//! The flow table: bounded, keyed by the flow's identity, ordered by the time of the last packet.

use hashlink::LruCache;
use xfan_worker::packet::Packet;

use crate::flow_id::FlowId;

/// A flow and its counts. Times are monotonic nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Identity of the flow, in the direction of the first packet seen.
    pub id: FlowId,
    /// Packets of both directions.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
    /// When the first packet was received.
    pub first: u64,
    /// When the last packet was received.
    pub last: u64,
    /// The TCP flags of all packets, combined by OR.
    pub tcp_flags: u8,
}

impl Flow {
    fn new(id: FlowId, time: u64) -> Self {
        Flow { id, packets: 0, bytes: 0, first: time, last: time, tcp_flags: 0 }
    }

    fn add(&mut self, packet: &Packet<'_>, bytes: usize, time: u64) {
        self.packets += 1;
        self.bytes += bytes as u64;
        // Packets of one flow may arrive through several lanes, slightly out of order.
        self.first = self.first.min(time);
        self.last = self.last.max(time);
        self.tcp_flags |= packet.tcp_flags().unwrap_or(0);
    }
}

/// The current flows, by canonical identity, ordered from the longest idle to the most recent.
///
/// The table hashes with a random key of its own, so a sender cannot choose flows that collide.
pub struct FlowTable {
    flows: LruCache<FlowId, Flow>,
    max_flows: usize,
    idle_timeout: u64,
}

impl FlowTable {
    /// A table that holds at most `max_flows` flows, at least 1. A flow expires once it has been
    /// idle for `idle_timeout` nanoseconds.
    pub fn new(max_flows: usize, idle_timeout: u64) -> Self {
        FlowTable { flows: LruCache::new_unbounded(), max_flows: max_flows.max(1), idle_timeout }
    }

    /// Adds a packet of `bytes` bytes, from the Ethernet header on, to its flow. If that needs a
    /// new entry and the table is full, removes and returns the longest idle flow.
    pub fn add(&mut self, packet: &Packet<'_>, bytes: usize, time: u64) -> Option<Flow> {
        let id = FlowId::of(packet);
        let key = id.canonical();
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.add(packet, bytes, time);
            return None;
        }
        let evicted = if self.flows.len() < self.max_flows { None } else { self.remove_oldest() };
        let mut flow = Flow::new(id, time);
        flow.add(packet, bytes, time);
        self.flows.insert(key, flow);
        evicted
    }

    /// Removes and returns the longest idle flow if it has expired at `now`. Call it until it
    /// returns `None`.
    pub fn expire(&mut self, now: u64) -> Option<Flow> {
        let (_, oldest) = self.flows.iter().next()?;
        let over = now.saturating_sub(oldest.last) >= self.idle_timeout;
        if over { self.remove_oldest() } else { None }
    }

    /// Removes and returns the longest idle flow.
    pub fn remove_oldest(&mut self) -> Option<Flow> {
        self.flows.remove_lru().map(|(_, flow)| flow)
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.flows.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xfan_worker::packet::{FlowKey, TCP, UDP};

    fn key(n: u8) -> FlowKey {
        let address = |last| std::net::IpAddr::from([10, 0, 0, last]);
        FlowKey {
            source: address(n),
            destination: address(200),
            source_port: 1000,
            destination_port: 53,
            protocol: UDP,
        }
    }

    fn packet(key: FlowKey) -> Packet<'static> {
        Packet { key, fragment: false, payload: &[0; 20] }
    }

    #[test]
    fn both_directions_are_one_flow_from_the_first_sender() {
        let mut table = FlowTable::new(8, 100);
        assert_eq!(table.add(&packet(key(9).reversed()), 60, 5), None);
        assert_eq!(table.add(&packet(key(9)), 100, 9), None);
        assert_eq!(table.len(), 1);
        let flow = table.remove_oldest().unwrap();
        assert_eq!((flow.id.key, flow.packets, flow.bytes), (key(9).reversed(), 2, 160));
        assert_eq!((flow.first, flow.last), (5, 9));
    }

    #[test]
    fn a_full_table_evicts_the_longest_idle_flow() {
        let mut table = FlowTable::new(2, 100);
        table.add(&packet(key(1)), 60, 1);
        table.add(&packet(key(2)), 60, 2);
        table.add(&packet(key(1)), 60, 3);
        assert_eq!(table.add(&packet(key(3)), 60, 4).unwrap().id.key, key(2));
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn a_flow_expires_when_idle_for_long_enough() {
        let mut table = FlowTable::new(8, 100);
        table.add(&packet(key(1)), 60, 10);
        table.add(&packet(key(2)), 60, 50);
        assert_eq!(table.expire(109), None);
        assert_eq!(table.expire(110).unwrap().id.key, key(1));
        assert_eq!(table.expire(110), None);
        assert_eq!(table.expire(0), None, "the clock went backwards");
    }

    #[test]
    fn tcp_flags_add_up() {
        let mut table = FlowTable::new(8, 100);
        let tcp = FlowKey { protocol: TCP, ..key(1) };
        for flags in [0x02, 0x10] {
            let mut segment = [0; 20];
            segment[13] = flags;
            table.add(&Packet { key: tcp, fragment: false, payload: &segment }, 60, 0);
        }
        assert_eq!(table.remove_oldest().unwrap().tcp_flags, 0x12);
    }

    proptest! {
        /// For any input, the table stays bounded, and every packet and byte is in exactly one
        /// flow.
        #[test]
        fn packets_in_equal_packets_out(
            packets in prop::collection::vec((0u8..12, any::<bool>(), 14usize..2000, 0u64..50), 0..300),
            max_flows in 1usize..8,
            idle_timeout in 1u64..200,
        ) {
            let mut table = FlowTable::new(max_flows, idle_timeout);
            let (mut out, mut sent, mut now) = (Vec::new(), (0, 0), 0);
            for (n, back, bytes, pause) in packets {
                now += pause;
                while let Some(flow) = table.expire(now) {
                    prop_assert!(flow.last + idle_timeout <= now);
                    out.push(flow);
                }
                out.extend(table.add(&packet(if back { key(n).reversed() } else { key(n) }), bytes, now));
                prop_assert!(table.len() <= max_flows);
                sent = (sent.0 + 1, sent.1 + bytes as u64);
            }
            while let Some(flow) = table.remove_oldest() {
                out.push(flow);
            }
            let sum = out.iter().fold((0, 0), |sum, flow| (sum.0 + flow.packets, sum.1 + flow.bytes));
            prop_assert_eq!(sum, sent);
        }
    }
}
