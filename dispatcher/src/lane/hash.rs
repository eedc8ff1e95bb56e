//! The hash of a packet's flow: equal for both directions, keyed, the same in every lane.
//!
//! The mixing steps of wyhash (Wang Yi, <https://github.com/wangyi-fudan/wyhash>): two words, each
//! under a secret of its own, are multiplied to 128 bits, and the two halves of the product once
//! more, under two other secrets. The lower endpoint comes first, so a flow's two directions hash
//! alike. The key is secret and new at each start: nobody outside can aim flows at one worker. It
//! is no cryptographic hash.
//!
//! Two endpoints under the *same* secret would need no order, but flows whose endpoints differ only
//! in complementary bits then have one sum, and products that differ in a few known bits. One
//! multiplication would not do either: it carries upwards alone, so lower bits of the hash would be
//! the same for all. The tests in `families` look for such families of flows.

use std::net::IpAddr;

use xfan_packet::{FlowKey, Packet, TCP, UDP, ethertype};

/// The secret of the hash, 128 bits spread over six words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKey([u64; 6]);

impl HashKey {
    /// Spreads 128 bits by SplitMix64 (Steele, Lea, Flood: *Fast splittable pseudorandom number
    /// generators*, 2014).
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let (low, high) = bytes.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word: u64, byte| word << 8 | u64::from(*byte));
        let (mut state, high) = (word(low), word(high));
        HashKey(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state ^ high;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }))
    }

    /// Hashes the flow of a frame. The flag says whether a 5-tuple could be read; if not, the hash
    /// is over the Ethernet addresses.
    #[inline(always)]
    pub fn hash_frame(&self, frame: &[u8]) -> (u32, bool) {
        match self.hash_plain(frame) {
            Some(hash) => (hash, true),
            None => self.hash_any(frame),
        }
    }

    /// Hashes nearly every packet there is: Ethernet, IPv4 without options, no fragment, TCP or
    /// UDP, ports in place, and the whole of it in the frame. Two length checks, a few masks.
    #[inline(always)]
    pub fn hash_plain(&self, frame: &[u8]) -> Option<u32> {
        let head = frame.first_chunk::<38>()?;
        let l2 = le64(head, 12); // ethertype, version and header length, type of service, total length, identification
        let l3 = le64(head, 20); // flags and fragment offset, ttl, protocol, checksum, half an address
        let protocol = l3.to_le_bytes()[3];
        // The datagram ends behind the ports, so its length is 24 or more, and within the frame.
        let total = usize::from(u16::from_be_bytes([head[16], head[17]]));
        let beyond_ports = total.wrapping_sub(24);
        if l2 & 0x00ff_ffff != 0x0045_0008
            || l3 & 0xff3f != 0
            || !matches!(protocol, TCP | UDP)
            || beyond_ports > frame.len() - 38
        {
            return None;
        }
        let addresses = le64(head, 26);
        let ports = u32::from_le_bytes([head[34], head[35], head[36], head[37]]);
        let source = addresses << 32 >> 16 | u64::from(ports & 0xffff);
        let destination = addresses >> 32 << 16 | u64::from(ports >> 16);
        Some(self.mix(source, destination, protocol))
    }

    /// Hashes any frame.
    #[cold]
    #[inline(never)]
    pub fn hash_any(&self, frame: &[u8]) -> (u32, bool) {
        match Packet::parse(frame) {
            Some(packet) => (self.hash_key(&packet.key), true),
            None => (self.hash_ethernet(frame), false),
        }
    }

    /// Hashes a flow; equal to [`hash_frame`](Self::hash_frame) of each of its frames.
    pub fn hash_key(&self, key: &FlowKey) -> u32 {
        // Ports as they lie in the packet, so that the fast path needs no byte swap.
        let port = |port: u16| u64::from(u16::from_le_bytes(port.to_be_bytes()));
        let (source_port, destination_port) = (port(key.source_port), port(key.destination_port));
        match (key.source, key.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let address = |octets| u64::from(u32::from_le_bytes(octets)) << 16;
                let (source, destination) = (address(source.octets()), address(destination.octets()));
                self.mix(source | source_port, destination | destination_port, key.protocol)
            }
            (source, destination) => {
                let [.., k4, k5] = self.0;
                let endpoint = |address: IpAddr, port: u64| {
                    let octets = match address {
                        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                        IpAddr::V6(address) => address.octets(),
                    };
                    fold(multiply(le64(&octets, 0) ^ k4, le64(&octets, 8) ^ k5)) ^ port
                };
                self.mix(endpoint(source, source_port), endpoint(destination, destination_port), key.protocol)
            }
        }
    }

    /// Mixes two endpoints, in whatever order, and a protocol. IPv4's endpoints are address and
    /// port in 48 bits, so that the protocol fits above them.
    #[inline(always)]
    fn mix(&self, one: u64, other: u64, protocol: u8) -> u32 {
        let [k0, k1, k2, k3, ..] = self.0;
        let (low, high) = (one.min(other), one.max(other));
        let product = multiply(low ^ k0 ^ u64::from(protocol) << 56, high ^ k1);
        upper(fold(multiply(product.0 ^ k2, product.1 ^ k3)))
    }

    #[cold]
    fn hash_ethernet(&self, frame: &[u8]) -> u32 {
        let mut addresses = [0; 16];
        let known = frame.len().min(12);
        addresses[..known].copy_from_slice(&frame[..known]);
        let (a, b) = (le64(&addresses, 0) << 16 >> 16, le64(&addresses, 6));
        let kind = ethertype(frame).map_or(0, |(ethertype, _)| ethertype);
        self.mix(a, b, kind.to_le_bytes()[0])
    }
}

/// The half of a hash that is kept.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // as said
fn upper(hash: u64) -> u32 {
    (hash >> 32) as u32
}

/// The lower and the upper half of the product.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // taking the halves apart
fn multiply(a: u64, b: u64) -> (u64, u64) {
    let product = u128::from(a) * u128::from(b);
    (product as u64, (product >> 64) as u64)
}

/// One word of a product's halves.
#[inline(always)]
fn fold((low, high): (u64, u64)) -> u64 {
    low ^ high
}

#[inline(always)]
fn le64<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use xfan_packet::{IPV4, IPV6, TCP, UDP, is_cut};

    fn key() -> HashKey {
        HashKey::from_bytes(*b"0123456789abcdef")
    }

    fn addresses() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<(Ipv4Addr, Ipv4Addr)>().prop_map(|(a, b)| (a.into(), b.into())),
            any::<(Ipv6Addr, Ipv6Addr)>().prop_map(|(a, b)| (a.into(), b.into())),
        ]
    }

    fn flows() -> impl Strategy<Value = FlowKey> {
        (addresses(), any::<(u16, u16)>(), prop_oneof![Just(TCP), Just(UDP), Just(132), Just(136), Just(33)])
            .prop_map(|((source, destination), (source_port, destination_port), protocol)| FlowKey {
                source,
                destination,
                source_port,
                destination_port,
                protocol,
            })
    }

    fn frame_of(flow: &FlowKey) -> Vec<u8> {
        let mut frame = vec![0; 12];
        match (flow.source, flow.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend(IPV4.to_be_bytes());
                frame.extend([0x45, 0, 0, 28, 1, 2, 0x40, 0, 64, flow.protocol, 3, 4]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend(IPV6.to_be_bytes());
                frame.extend([0x60, 0, 0, 0, 0, 8, flow.protocol, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            _ => unreachable!("one family"),
        }
        frame.extend(flow.source_port.to_be_bytes());
        frame.extend(flow.destination_port.to_be_bytes());
        frame.extend([0; 4]);
        frame
    }

    proptest! {
        #[test]
        fn both_directions_and_both_paths_agree(flow in flows()) {
            let expected = key().hash_key(&flow);
            prop_assert_eq!(key().hash_key(&flow.reversed()), expected);
            prop_assert_eq!(key().hash_frame(&frame_of(&flow)), (expected, true));
            prop_assert_eq!(key().hash_frame(&frame_of(&flow.reversed())), (expected, true));
            let mut tagged = frame_of(&flow);
            tagged.splice(12..12, [0x81, 0, 0, 9]);
            prop_assert_eq!(key().hash_frame(&tagged), (expected, true));
        }

        /// The fast path takes no frame that the parser would read otherwise.
        #[test]
        fn the_fast_path_reads_what_the_parser_reads(flow in flows(), changes in prop::collection::vec((12usize..46, any::<u8>()), 0..3), cut in 0usize..60) {
            let mut frame = frame_of(&flow);
            for (at, byte) in changes {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            frame.truncate(cut.max(1));
            prop_assert_eq!(key().hash_frame(&frame), key().hash_any(&frame));
            prop_assert!(key().hash_plain(&frame).is_none() || !is_cut(&frame));
        }

        #[test]
        fn any_bytes_hash_without_panic(frame in prop::collection::vec(any::<u8>(), 0..100)) {
            key().hash_frame(&frame);
        }
    }

    /// Sums of addresses and ports that are alike must not make hashes alike.
    #[test]
    fn flows_between_neighbours_without_ports_spread_evenly() {
        let flow = |source: u32, destination: u32| FlowKey {
            source: Ipv4Addr::from(source).into(),
            destination: Ipv4Addr::from(destination).into(),
            source_port: 0,
            destination_port: 0,
            protocol: 50,
        };
        let mesh =
            || (0..128).flat_map(move |a| (0..128).map(move |b| flow(0x0a00_0000 + a, 0x0a00_0100 + b)));
        let opposite = || (0..16_384).map(move |n| flow(0x0a01_0000 + n, 0x0a02_0000 + 16_383 - n));
        for seed in 0..20 {
            let key = HashKey::from_bytes([seed; 16]);
            for flows in [mesh().collect::<Vec<_>>(), opposite().collect()] {
                // 16,384 flows over 16 places: 1,024 each, standard deviation 31.
                let mut places = [0u32; 16];
                for flow in flows {
                    places[(key.hash_key(&flow) >> 28) as usize] += 1;
                }
                assert!(places.iter().all(|count| (824..1224).contains(count)), "{seed}: {places:?}");
            }
        }
    }

    #[test]
    fn the_key_matters_and_flows_spread_evenly() {
        let flow = |n: u32| FlowKey {
            source: Ipv4Addr::from(0x0a00_0000 | n >> 8).into(),
            destination: Ipv4Addr::from(0x0a63_0001).into(),
            source_port: u16::try_from(n & 0xff).unwrap() + 1024,
            destination_port: 80,
            protocol: TCP,
        };
        let other = HashKey::from_bytes([7; 16]);
        assert_ne!(key().hash_key(&flow(1)), other.hash_key(&flow(1)));
        for key in [key(), other] {
            // 65,536 neighbouring flows over 64 places: 1,024 each, standard deviation 32.
            let mut places = [0u32; 64];
            for n in 0..65_536 {
                places[(key.hash_key(&flow(n)) >> 26) as usize] += 1;
            }
            assert!(places.iter().all(|count| (864..1184).contains(count)), "{places:?}");
        }
    }
}
