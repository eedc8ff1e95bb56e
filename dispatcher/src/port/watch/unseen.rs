//! Whether the XDP program sees the packets that the interface receives.
//!
//! A driver whose queues lost their buffers drops all packets, or does not run the program for
//! them. Then no counter of the program or of a socket moves, and all sums hold.

use std::collections::VecDeque;

/// The condition begins if between each two of this many successive readings …
const READINGS: usize = 4;
/// … at least this many packets came in, and the program saw none. It ends when the program sees
/// one.
const PACKETS: u64 = 10;

/// Compares the packets that came in with those that the program saw.
#[derive(Debug, Default)]
pub struct Unseen {
    /// Packets that came in, dropped ones included; packets the program saw.
    readings: VecDeque<(u64, u64)>,
    is_so: bool,
}

impl Unseen {
    /// Takes a reading, about once a second.
    pub fn observe(&mut self, came_in: u64, seen: u64) {
        if self.readings.len() == READINGS {
            self.readings.pop_front();
        }
        self.readings.push_back((came_in, seen));
        let mut pairs = self.readings.iter().zip(self.readings.iter().skip(1));
        if pairs.clone().any(|(earlier, later)| later.1 != earlier.1) {
            self.is_so = false;
        } else if self.readings.len() == READINGS {
            self.is_so |= pairs.all(|(earlier, later)| later.0 >= earlier.0.saturating_add(PACKETS));
        }
    }

    /// Whether packets came in all the time, and the program has seen none since.
    pub fn is_so(&self) -> bool {
        self.is_so
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
            // That no packet comes in proves nothing.
            ((4000, 100), true),
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
