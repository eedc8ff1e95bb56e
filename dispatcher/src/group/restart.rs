//! When a worker that ended is started again, as systemd does it (systemd.service(5)).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::{Policy, Restart};

/// Longest wait before a restart.
const LONGEST: Duration = Duration::from_secs(60);

/// What becomes of a worker whose process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays down: its end was no failure, or restarts are off.
    Stay,
    /// It is started again after this time.
    After(Duration),
    /// It stays down: it was started too often.
    GiveUp,
}

/// The starts of one member's processes, and how often these attached anew.
#[derive(Clone, Debug, Default)]
pub struct Starts {
    /// Those within the last interval.
    recent: VecDeque<Instant>,
    /// All but the first.
    pub restarts: u64,
    started: bool,
}

impl Starts {
    /// A process was started, or attached anew.
    pub fn count(&mut self, now: Instant) {
        self.restarts += u64::from(self.started);
        self.started = true;
        self.recent.push_back(now);
    }

    /// Forgets the starts so far: an operator wants another.
    pub fn forgive(&mut self) {
        self.recent.clear();
    }

    /// The process ended.
    pub fn judge(&mut self, restart: &Restart, now: Instant, success: bool) -> Verdict {
        match restart.policy {
            Policy::Always => {}
            Policy::OnFailure if !success => {}
            Policy::OnFailure | Policy::No => return Verdict::Stay,
        }
        if self.too_many(restart, now) {
            return Verdict::GiveUp;
        }
        let recent = u32::try_from(self.recent.len()).unwrap_or(u32::MAX);
        let times = 1u32.checked_shl(recent.saturating_sub(1)).unwrap_or(u32::MAX);
        Verdict::After(restart.delay.saturating_mul(times).min(LONGEST))
    }

    /// Whether there have been as many as may be lately.
    pub fn too_many(&mut self, restart: &Restart, now: Instant) -> bool {
        while self.recent.front().is_some_and(|start| now.duration_since(*start) >= restart.limit_interval) {
            self.recent.pop_front();
        }
        self.recent.len() as u64 >= u64::from(restart.limit_burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESTART: Restart = Restart {
        policy: Policy::OnFailure,
        delay: Duration::from_millis(100),
        limit_burst: 4,
        limit_interval: Duration::from_secs(10),
    };

    #[test]
    fn the_policy_says_which_ends_count() {
        for (policy, after_success, after_failure) in
            [(Policy::No, false, false), (Policy::OnFailure, false, true), (Policy::Always, true, true)]
        {
            for (success, again) in [(true, after_success), (false, after_failure)] {
                let now = Instant::now();
                let mut starts = Starts::default();
                starts.count(now);
                let verdict = starts.judge(&Restart { policy, ..RESTART }, now, success);
                assert_eq!(verdict != Verdict::Stay, again, "{policy:?}, success {success}");
            }
        }
    }

    #[test]
    fn waits_double_until_the_limit() {
        let now = Instant::now();
        let mut starts = Starts::default();
        for wait in [100, 200, 400] {
            starts.count(now);
            assert_eq!(starts.judge(&RESTART, now, false), Verdict::After(Duration::from_millis(wait)));
        }
        starts.count(now);
        assert_eq!(starts.judge(&RESTART, now, false), Verdict::GiveUp);
        assert_eq!(starts.restarts, 3);
    }

    #[test]
    fn what_is_long_ago_is_forgiven() {
        let first = Instant::now();
        let mut starts = Starts::default();
        for second in 0..100 {
            let now = first + Duration::from_secs(10 * second);
            starts.count(now);
            assert_eq!(starts.judge(&RESTART, now, false), Verdict::After(RESTART.delay));
        }
        assert_eq!(starts.recent.len(), 1);
    }

    #[test]
    fn no_wait_is_longer_than_a_minute() {
        let now = Instant::now();
        let mut starts = Starts::default();
        (0..100).for_each(|_| starts.count(now));
        let endless = Restart { limit_burst: u32::MAX, ..RESTART };
        assert_eq!(starts.judge(&endless, now, false), Verdict::After(LONGEST));
    }
}
