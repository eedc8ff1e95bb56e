//! Whether the packets that the XDP program redirects to a socket arrive there.
//!
//! For every lane `redirected = received + dropped by the kernel + in flight`. The kernel also
//! drops packets without counting them (`xsk_rcv_check` in net/xdp/xsk.c): when the socket belongs
//! to another device or queue, or is not bound. Two facts tell lost packets from packets in flight:
//!
//! - A lane that has found its RX ring empty twice since an earlier reading has received all
//!   packets redirected before that reading, except the lost ones. Packets received since can hide
//!   a loss.
//! - The number of packets in flight cannot exceed the number of the lane's frames that the kernel
//!   has.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A redirected packet that is not on the RX ring after this time never arrives: the kernel puts it
/// there in the same NAPI poll, which takes milliseconds.
const SETTLED: Duration = Duration::from_secs(2);
/// A loss ends after this time without lost packets.
const QUIET: Duration = Duration::from_secs(5);
/// [`QUIET`] doubles with each loss that ends, up to this: a loss that recurs is reported less and
/// less often.
const LONGEST_QUIET: Duration = Duration::from_secs(60);

/// The counters of a lane, read in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Packets that the XDP program redirected to the socket.
    pub redirected: u64,
    /// How often the lane found its RX ring empty.
    pub emptied: u64,
    /// Packets that the lane received, and packets that the kernel counted as dropped.
    pub accounted: u64,
}

/// A loss has begun or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Packets are being lost: the number of all lost packets.
    Begins(u64),
    /// No packet has been lost for a while: the number of all lost packets.
    Ends(u64),
}

/// Accounts for the redirected packets of one lane.
#[derive(Debug)]
pub struct Arrivals {
    /// The most packets that can be in flight.
    in_flight: u64,
    /// The readings within [`SETTLED`], and the last one before.
    readings: VecDeque<(Instant, Reading)>,
    lost: u64,
    /// When packets were last found lost, and `accounted` at that time; `None` if no loss is going
    /// on.
    lossy: Option<(Instant, u64)>,
    quiet: Duration,
}

impl Arrivals {
    /// Accounts for a lane of which at most `in_flight` packets can be in flight.
    pub fn new(in_flight: u64) -> Self {
        Arrivals { in_flight, readings: VecDeque::new(), lost: 0, lossy: None, quiet: QUIET }
    }

    /// The number of packets that are certainly lost and in no other counter.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether a loss is going on.
    pub fn is_lossy(&self) -> bool {
        self.lossy.is_some()
    }

    /// Takes a reading; returns a change to report.
    pub fn observe(&mut self, now: Instant, reading: Reading) -> Option<Change> {
        self.readings.push_back((now, reading));
        let is_settled = |(time, _): &(Instant, Reading)| now.saturating_duration_since(*time) >= SETTLED;
        while self.readings.get(1).is_some_and(is_settled) {
            self.readings.pop_front();
        }
        let before = self.lost;
        if let Some((_, earlier)) = self.readings.front().filter(|reading| is_settled(reading)) {
            if reading.emptied >= earlier.emptied + 2 {
                self.lost = self.lost.max(earlier.redirected.saturating_sub(reading.accounted));
            }
            let missing =
                self.readings.iter().map(|(_, reading)| reading.redirected.saturating_sub(reading.accounted));
            self.lost = self.lost.max(missing.min().unwrap_or(0).saturating_sub(self.in_flight));
        }
        if self.lost > before {
            let begins = self.lossy.is_none();
            self.lossy = Some((now, reading.accounted));
            return begins.then_some(Change::Begins(self.lost));
        }
        let (since, accounted) = self.lossy?;
        if now.saturating_duration_since(since) < self.quiet || reading.accounted == accounted {
            return None;
        }
        self.lossy = None;
        self.quiet = (2 * self.quiet).min(LONGEST_QUIET);
        Some(Change::Ends(self.lost))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_FLIGHT: u64 = 1000;

    /// Takes one reading for each second: (redirected, emptied, accounted).
    fn observe(arrivals: &mut Arrivals, readings: &[(u64, u64, u64)]) -> Vec<(usize, Change)> {
        let start =
            arrivals.readings.back().map_or_else(Instant::now, |(time, _)| *time + Duration::from_secs(1));
        let each = readings.iter().enumerate();
        each.filter_map(|(second, &(redirected, emptied, accounted))| {
            let now = start + Duration::from_secs(second as u64);
            let reading = Reading { redirected, emptied, accounted };
            Some((second, arrivals.observe(now, reading)?))
        })
        .collect()
    }

    #[test]
    fn a_deaf_queue_is_reported_after_two_seconds() {
        let mut arrivals = Arrivals::new(IN_FLIGHT);
        let changes =
            observe(&mut arrivals, &[(0, 0, 0), (160, 10, 0), (160, 20, 0), (160, 30, 0), (160, 40, 0)]);
        assert_eq!(changes, [(3, Change::Begins(160))]);
        assert_eq!((arrivals.lost(), arrivals.is_lossy()), (160, true));
    }

    #[test]
    fn packets_in_flight_are_not_lost() {
        // The lane never finds its RX ring empty.
        let busy: Vec<_> = (0..100).map(|second| (second * 5000 + IN_FLIGHT, 7, second * 5000)).collect();
        // The lane gets no CPU time.
        let stuck: Vec<_> = (0..100).map(|second| ((second * 100).min(IN_FLIGHT), 7, 0)).collect();
        // The lane keeps up; a few packets are in flight at each reading.
        let idle: Vec<_> = (0..100).map(|second| (second * 5000 + 64, second * 3, second * 5000)).collect();
        for readings in [busy, stuck, idle] {
            let mut arrivals = Arrivals::new(IN_FLIGHT);
            assert_eq!(observe(&mut arrivals, &readings), []);
            assert_eq!(arrivals.lost(), 0);
        }
    }

    #[test]
    fn a_busy_lane_loses_more_than_can_be_in_flight() {
        let mut arrivals = Arrivals::new(IN_FLIGHT);
        let readings: Vec<_> = (0..10).map(|second| (second * 5000, 7, second * 4000)).collect();
        // For two seconds, more than 1,000 packets were missing at every reading.
        assert_eq!(observe(&mut arrivals, &readings), [(4, Change::Begins(1000))]);
        assert_eq!(arrivals.lost(), 6000);
    }

    #[test]
    fn a_loss_ends_when_packets_arrive_again() {
        let mut arrivals = Arrivals::new(IN_FLIGHT);
        observe(&mut arrivals, &[(0, 0, 0), (160, 10, 0), (160, 20, 0), (160, 30, 0)]);
        // No packet arrives, which proves nothing.
        let nothing: Vec<_> = (0..20).map(|second| (160, 40 + 10 * second, 0)).collect();
        assert_eq!(observe(&mut arrivals, &nothing), []);
        let well: Vec<_> = (0..20).map(|second| (160 + second, 300 + 10 * second, second)).collect();
        assert_eq!(observe(&mut arrivals, &well), [(1, Change::Ends(160))]);
        assert_eq!((arrivals.lost(), arrivals.is_lossy()), (160, false));
        // Further lost packets are a new loss.
        let again: Vec<_> = (0..20).map(|second| (200 + second, 600 + 10 * second, 19)).collect();
        assert_eq!(observe(&mut arrivals, &again), [(2, Change::Begins(181))]);
    }
}
