//! Tests with families of flows that a sender might choose: under any key, each family must spread
//! over the workers as a random function would spread it.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use xfan_packet::{FlowKey, TCP, UDP};

use xfan_shm::ids::MemberId;

use super::{BucketTable, HashKey};

/// The number of keys that each family is hashed with.
const KEYS: u32 = 64;

/// SplitMix64: the same random numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u32) -> u32 {
        u32::try_from(self.next() % u64::from(limit)).unwrap()
    }

    fn address(&mut self) -> u128 {
        u128::from(self.next()) << 64 | u128::from(self.next())
    }

    fn key(&mut self) -> HashKey {
        HashKey::from_bytes(self.address().to_le_bytes())
    }

    fn end(&mut self) -> End {
        End { address: self.address(), port: u16::try_from(self.below(1 << 16)).unwrap() }
    }

    /// Positions of four to eight bits of an endpoint: adjacent, or random.
    fn bits(&mut self, version: Version) -> Vec<u32> {
        let (width, count) = (version.bits() + 16, 4 + self.below(5));
        if self.below(2) == 0 {
            let first = self.below(width - count);
            return (first..first + count).collect();
        }
        let mut bits = Vec::new();
        while bits.len() < count as usize {
            let bit = self.below(width);
            if !bits.contains(&bit) {
                bits.push(bit);
            }
        }
        bits
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V4,
    V6,
}

impl Version {
    /// Bits of an address.
    fn bits(self) -> u32 {
        if self == Version::V4 { 32 } else { 128 }
    }

    #[allow(clippy::cast_possible_truncation)] // the lower bits are taken
    fn flow(self, source: End, destination: End, protocol: u8) -> FlowKey {
        let address = |end: End| match self {
            Version::V4 => IpAddr::from(Ipv4Addr::from(end.address as u32)),
            Version::V6 => IpAddr::from(Ipv6Addr::from(end.address)),
        };
        FlowKey {
            source: address(source),
            destination: address(destination),
            source_port: source.port,
            destination_port: destination.port,
            protocol,
        }
    }
}

/// An endpoint. IPv4 uses the lower 32 bits of the address.
#[derive(Clone, Copy, Debug)]
struct End {
    address: u128,
    port: u16,
}

impl End {
    /// Sets the bits at the positions `bits` to those of `value`. Positions 0 to 15 are the port,
    /// the others the address.
    fn of_bits(value: u32, bits: &[u32]) -> Self {
        let mut end = End { address: 0, port: 0 };
        for (_, &bit) in bits.iter().enumerate().filter(|(at, _)| value >> at & 1 == 1) {
            if bit < 16 { end.port |= 1 << bit } else { end.address |= 1 << (bit - 16) }
        }
        end
    }

    fn xor(self, other: End) -> End {
        End { address: self.address ^ other.address, port: self.port ^ other.port }
    }

    fn plus(self, other: End) -> End {
        End { address: self.address.wrapping_add(other.address), port: self.port.wrapping_add(other.port) }
    }

    fn minus(self, other: End) -> End {
        End { address: self.address.wrapping_sub(other.address), port: self.port.wrapping_sub(other.port) }
    }

    /// Without the bits of `other`.
    fn without(self, other: End) -> End {
        End { address: self.address & !other.address, port: self.port & !other.port }
    }
}

/// Asserts that a family's flows spread over 2, 3 and 16 workers as a random function would spread
/// them. For each key the test computes Pearson's chi-squared of the workers' loads; for a random
/// function its mean is the number of workers minus one. The sum over all keys may exceed its mean
/// by eight standard deviations. A random function exceeds that once in some 10⁹ families.
fn assert_even(what: &str, flows: impl IntoIterator<Item = FlowKey>, random: &mut Random) {
    let flows: HashSet<FlowKey> = flows.into_iter().map(|flow| flow.canonical().0).collect();
    if flows.len() < 8 {
        return; // the varying bits are outside the address, or the flows differ in direction only
    }
    let keys: Vec<HashKey> = (0..KEYS).map(|_| random.key()).collect();
    for workers in [2, 3, 16] {
        let table = BucketTable::empty().with_members(&(0..workers).map(MemberId).collect::<Vec<_>>());
        let even = f64::from(u32::try_from(flows.len()).unwrap()) / f64::from(workers);
        let (mut sum, mut fullest) = (0.0, 0.0);
        for key in &keys {
            let mut loads = vec![0u32; usize::from(workers)];
            flows.iter().for_each(|flow| loads[table.member(key.hash_key(flow)).index()] += 1);
            sum += loads.iter().map(|load| (f64::from(*load) - even).powi(2) / even).sum::<f64>();
            fullest += f64::from(*loads.iter().max().unwrap()) / even / f64::from(KEYS);
        }
        let mean = f64::from(workers - 1) * f64::from(KEYS);
        assert!(
            sum < mean + 8.0 * (2.0 * mean).sqrt(),
            "{what}: {} flows over {workers} workers; the fullest has {fullest:.2} times the even load, \
             chi-squared is {sum:.0} in place of {mean:.0}",
            flows.len()
        );
    }
}

#[test]
fn endpoints_alike_but_for_complementary_bits_do_not_meet() {
    // Five adjacent bits of the second octet vary. 16 values make 16 flows; the other 16 would make
    // the same flows again, with the ends swapped.
    let end = |value: u32| End { address: 0x0a00_0102 | u128::from(value) << 19, port: 0xc000 };
    let flows: Vec<FlowKey> =
        (0..16).map(|value| Version::V4.flow(end(value), end(31 - value), TCP)).collect();
    let table = BucketTable::empty().with_members(&[0, 1].map(MemberId));
    let mut random = Random(1);
    let keys = (0..1000).map(|_| random.key());
    let member = |key: &HashKey, flow: &FlowKey| table.member(key.hash_key(flow));
    let met = keys.filter(|key| flows.iter().all(|flow| member(key, flow) == member(key, &flows[0]))).count();
    // A random function does this under one key in 32,768.
    assert!(met <= 2, "all 16 flows are at one of two workers under {met} of 1000 keys");
}

#[test]
fn families_of_few_bits_spread_like_random_flows() {
    let mut random = Random(2);
    for round in 0..300 {
        for version in [Version::V4, Version::V6] {
            let (bits, others) = (random.bits(version), random.bits(version));
            let near = random.end();
            // The other end is equal, differs in one bit, or is random.
            let far = match round % 3 {
                0 => near,
                1 => near.xor(End::of_bits(1, &[random.below(version.bits() + 16)])),
                _ => random.end(),
            };
            let x = |value| End::of_bits(value, &bits);
            let mask = x(u32::MAX);
            let half = bits.len() / 2;
            let mut check = |what: &str, ends: &dyn Fn(u32) -> (End, End)| {
                let flow = |value| {
                    let (source, destination) = ends(value);
                    version.flow(source, destination, UDP)
                };
                let what = format!("{version:?}, {what}, bits {bits:?}, {near:x?} and {far:x?}");
                assert_even(&what, (0..1 << bits.len()).map(flow), &mut random);
            };
            check("one end varies", &|value| (near.xor(x(value)), far));
            check("complementary bits", &|value| {
                (near.without(mask).xor(x(value)), far.without(mask).xor(mask).xor(x(value)))
            });
            check("one exclusive or", &|value| (near.xor(x(value)), far.xor(x(value))));
            check("one sum", &|value| (near.plus(x(value)), far.minus(x(value))));
            check("one difference", &|value| (near.plus(x(value)), far.plus(x(value))));
            check("other bits at the other end", &|value| {
                (near.xor(x(value >> half)), far.xor(End::of_bits(value % (1 << half), &others)))
            });
        }
    }
}

#[test]
fn subspaces_spread_like_random_flows() {
    let mut random = Random(3);
    for _ in 0..300 {
        for version in [Version::V4, Version::V6] {
            let (near, far) = (random.end(), random.end());
            // A vector has no bit, one bit, or about half of all bits at each end.
            let mut vector = || {
                let some = |random: &mut Random| match random.below(3) {
                    0 => End { address: 0, port: 0 },
                    1 => End::of_bits(1, &[random.below(version.bits() + 16)]),
                    _ => random.end(),
                };
                (some(&mut random), some(&mut random))
            };
            let vectors: Vec<(End, End)> = (0..8).map(|_| vector()).collect();
            let flows = (0u32..1 << vectors.len()).map(|value| {
                let chosen = vectors.iter().enumerate().filter(|(at, _)| value >> at & 1 == 1);
                let (source, destination) =
                    chosen.fold((near, far), |(a, b), (_, vector)| (a.xor(vector.0), b.xor(vector.1)));
                version.flow(source, destination, TCP)
            });
            assert_even(&format!("{version:?}, span of {vectors:x?}"), flows, &mut random);
        }
    }
}

#[test]
fn sweeps_spread_like_random_flows() {
    let mut random = Random(4);
    for _ in 0..20 {
        for version in [Version::V4, Version::V6] {
            let (near, far) = (random.end(), random.end());
            let mut check = |what: &str, ends: &dyn Fn(u32) -> (End, End)| {
                let flow = |value| {
                    let (source, destination) = ends(value);
                    version.flow(source, destination, UDP)
                };
                let what = format!("{version:?}, {what}, from {near:x?} to {far:x?}");
                assert_even(&what, (0..256).map(flow), &mut random);
            };
            for step in [1u16, 2, 3, 7, 16, 64, 255, 256, 257, 32_769] {
                let at =
                    |value: u32| End { address: 0, port: u16::try_from(value).unwrap().wrapping_mul(step) };
                check(&format!("ports in steps of {step}"), &|value| (near.plus(at(value)), far));
                check(&format!("ports of both ends in steps of {step}"), &|value| {
                    (near.plus(at(value)), far.plus(at(value)))
                });
                let at = |value: u32, shift| End {
                    address: u128::from(value * u32::from(step)) << shift,
                    port: 0,
                };
                for shift in [0, 8, 16, 24, version.bits() - 8] {
                    let what = format!("addresses in steps of {step} << {shift}");
                    check(&what, &|value| (near.plus(at(value, shift)), far));
                    check(&what, &|value| (near.plus(at(value, shift)), far.minus(at(value, shift))));
                }
            }
            check("one product", &|value| {
                let end = |end: End, shift| End { address: end.address << shift, ..end };
                (end(near, value % 16), End { address: far.address >> (value % 16), ..far })
            });
        }
    }
}
