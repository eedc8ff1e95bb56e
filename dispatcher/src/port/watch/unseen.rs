//! Whether the XDP program sees the packets that the interface receives.
//!
//! A driver whose queues have lost their buffers drops all packets, or does not run the program for
//! them. No counter of the program or of a socket then moves, so that all sums still hold.

use std::collections::VecDeque;

/// The number of successive readings that must agree before the condition begins: a few seconds,
/// since NICs update their counters late.
const READINGS: usize = 4;
/// The condition begins if the interface receives at least this many packets between each two
/// readings and the program sees none. It ends when the program sees one.
const PACKETS: u64 = 10;

/// Compares the packets that the interface received with those that the program saw.
#[derive(Debug, Default)]
pub struct Unseen {
    /// Packets received, dropped ones included, and packets that the program saw.
    readings: VecDeque<(u64, u64)>,
    is_so: bool,
}

impl Unseen {
    /// Takes a reading, about once a second.
    pub fn observe(&mut self, received: u64, seen: u64) {
        if self.readings.len() == READINGS {
            self.readings.pop_front();
        }
        self.readings.push_back((received, seen));
        let mut pairs = self.readings.iter().zip(self.readings.iter().skip(1));
        if pairs.clone().any(|(earlier, later)| later.1 != earlier.1) {
            self.is_so = false;
        } else if self.readings.len() == READINGS {
            self.is_so |= pairs.all(|(earlier, later)| later.0 >= earlier.0.saturating_add(PACKETS));
        }
    }

    /// Whether the interface keeps receiving packets of which the program sees none.
    pub fn is_so(&self) -> bool {
        self.is_so
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lasting_condition_counts() {
        let mut unseen = Unseen::default();
        let mut observe = |received, seen| {
            unseen.observe(received, seen);
            unseen.is_so()
        };
        let all = [
            // Packets arrive, then stop; the NIC updates its counters late.
            ((0, 0), false),
            ((90, 100), false),
            ((100, 100), false),
            ((100, 100), false),
            // A few packets do not reach the program.
            ((105, 100), false),
            ((110, 100), false),
            ((115, 100), false),
            // No packet reaches the program.
            ((1000, 100), false),
            ((2000, 100), false),
            ((3000, 100), true),
            ((4000, 100), true),
            // No packet arrives, which proves nothing.
            ((4000, 100), true),
            ((4000, 100), true),
            // The program sees packets again.
            ((5000, 101), false),
            ((6000, 1000), false),
        ];
        for ((received, seen), expected) in all {
            assert_eq!(observe(received, seen), expected, "{received} {seen}");
        }
    }
}
