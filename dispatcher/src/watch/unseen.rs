//! Whether the XDP program sees the packets that the interface receives.
//!
//! A driver whose queues lost their buffers drops all packets, or does not run the program for
//! them. Then no counter of the program or of a socket moves, and all sums hold.

use std::collections::VecDeque;

/// The condition holds if between each two of this many successive readings …
const READINGS: usize = 4;
/// … at least this many packets came in, and the program saw none.
const PACKETS: u64 = 10;

/// Compares the packets that came in with those that the program saw.
#[derive(Debug, Default)]
pub struct Unseen {
    /// Packets that came in, dropped ones included; packets the program saw.
    readings: VecDeque<(u64, u64)>,
}

impl Unseen {
    /// Takes a reading, about once a second.
    pub fn observe(&mut self, came_in: u64, seen: u64) {
        if self.readings.len() == READINGS {
            self.readings.pop_front();
        }
        self.readings.push_back((came_in, seen));
    }

    /// Whether packets come in all the time, and the program sees none.
    pub fn is_so(&self) -> bool {
        let pairs = self.readings.iter().zip(self.readings.iter().skip(1));
        self.readings.len() == READINGS
            && pairs
                .into_iter()
                .all(|(earlier, later)| later.0 >= earlier.0.saturating_add(PACKETS) && later.1 == earlier.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lasts_is_told() {
        let mut unseen = Unseen::default();
        let mut observe = |came_in, seen| {
            unseen.observe(came_in, seen);
            unseen.is_so()
        };
        let all = [
            // It works, and rests; the counters of the NIC come late.
            ((0, 0), false),
            ((90, 100), false),
            ((100, 100), false),
            ((100, 100), false),
            // A few packets come in that do not reach the program.
            ((105, 100), false),
            ((110, 100), false),
            ((115, 100), false),
            // Its queues are deaf.
            ((1000, 100), false),
            ((2000, 100), false),
            ((3000, 100), true),
            ((4000, 100), true),
            // The queues receive again.
            ((5000, 101), false),
            ((6000, 1000), false),
        ];
        for ((came_in, seen), expected) in all {
            assert_eq!(observe(came_in, seen), expected, "{came_in} {seen}");
        }
    }
}
