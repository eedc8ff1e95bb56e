//! The program's counters: what happened to each packet of a queue.

use std::mem::{offset_of, size_of};
use std::ops::AddAssign;

use crate::object::skeleton::types;

/// Packets of one RX queue by outcome, since the program was loaded. Each packet is counted in
/// exactly one field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Redirected to the queue's AF_XDP socket. The socket may have dropped some of them, because
    /// its FILL ring was empty or its RX ring full. Its own statistics count these.
    pub redirect: u64,
    /// Passed to the kernel, because they are neither IPv4 nor IPv6, such as ARP and LLDP, or end
    /// within the link header.
    pub pass_non_ip: u64,
    /// Passed to the kernel, because they are IPv6 neighbour or router discovery.
    pub pass_nd: u64,
    /// Passed to the kernel by a [`PassRule`](crate::PassRule).
    pub pass_rule: u64,
    /// Passed to the kernel, because the queue has no socket.
    pub pass_no_socket: u64,
    /// Dropped, because they are longer than a frame of the socket can hold.
    pub drop_too_long: u64,
}

const WORDS: usize = size_of::<types::queue_counters>() / size_of::<u64>();
const _: () = assert!(size_of::<QueueCounters>() == size_of::<types::queue_counters>());
const _: () = assert!(offset_of!(types::queue_counters, redirect) == 0);
const _: () = assert!(offset_of!(types::queue_counters, pass_non_ip) == 8);
const _: () = assert!(offset_of!(types::queue_counters, pass_nd) == 16);
const _: () = assert!(offset_of!(types::queue_counters, pass_rule) == 24);
const _: () = assert!(offset_of!(types::queue_counters, pass_no_socket) == 32);
const _: () = assert!(offset_of!(types::queue_counters, drop_too_long) == 40);

impl QueueCounters {
    /// The counters in the words of one CPU's value of an entry in the program's `counters` map.
    /// For loaders other than [`SteerProgram`](crate::SteerProgram). Entry `queue + 1` belongs to
    /// `queue`.
    pub fn from_words(words: [u64; WORDS]) -> Self {
        let [redirect, pass_non_ip, pass_nd, pass_rule, pass_no_socket, drop_too_long] = words;
        Self { redirect, pass_non_ip, pass_nd, pass_rule, pass_no_socket, drop_too_long }
    }

    /// The counters in the bytes of the map's value. Fields beyond the last byte are zero.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<{ size_of::<u64>() }>();
        let mut values = [0; WORDS];
        for (value, word) in values.iter_mut().zip(words) {
            *value = u64::from_ne_bytes(*word);
        }
        Self::from_words(values)
    }

    /// Number of packets passed to the kernel, for any reason.
    pub fn passed(&self) -> u64 {
        self.pass_non_ip + self.pass_nd + self.pass_rule + self.pass_no_socket
    }
}

impl AddAssign for QueueCounters {
    fn add_assign(&mut self, other: Self) {
        self.redirect += other.redirect;
        self.pass_non_ip += other.pass_non_ip;
        self.pass_nd += other.pass_nd;
        self.pass_rule += other.pass_rule;
        self.pass_no_socket += other.pass_no_socket;
        self.drop_too_long += other.drop_too_long;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_fields_in_order() {
        let bytes: Vec<u8> = (1..=6_u64).flat_map(u64::to_ne_bytes).collect();
        let mut counters = QueueCounters::from_bytes(&bytes);
        assert_eq!(
            counters,
            QueueCounters {
                redirect: 1,
                pass_non_ip: 2,
                pass_nd: 3,
                pass_rule: 4,
                pass_no_socket: 5,
                drop_too_long: 6
            }
        );
        assert_eq!(counters.passed(), 14);
        counters += counters;
        assert_eq!((counters.redirect, counters.passed()), (2, 28));
    }
}
