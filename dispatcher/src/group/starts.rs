//! Counts the starts of a worker, and decides whether to restart it. The rules are those of
//! systemd.service(5).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::config::{Policy, Restart};

/// The longest delay before a restart: a worker that fails at every start costs little by then, and
/// an operator who has fixed the cause does not wait long.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// Whether a worker whose process exited is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It stays down, since the setting `restart` does not apply to this exit.
    StayDown,
    /// It is started again after this delay.
    RestartAfter(Duration),
    /// It stays down, since it was started too often.
    GiveUp,
}

/// The starts of one member's processes. Each further attach of a process counts as a start.
#[derive(Clone, Debug, Default)]
pub struct Starts {
    /// The starts within the last `start_limit_interval`.
    recent: VecDeque<Instant>,
    /// The number of starts but the first.
    pub restarts: u64,
    started_before: bool,
}

impl Starts {
    /// Counts a start.
    pub fn count(&mut self, now: Instant) {
        self.restarts += u64::from(self.started_before);
        self.started_before = true;
        self.recent.push_back(now);
    }

    /// Forgets the starts so far, so that an operator's order is not limited by them.
    pub fn reset(&mut self) {
        self.recent.clear();
    }

    /// Decides whether to restart a process that exited.
    pub fn decide(&mut self, restart: &Restart, now: Instant, success: bool) -> Decision {
        match restart.policy {
            Policy::Always => {}
            Policy::OnFailure if !success => {}
            Policy::OnFailure | Policy::No => return Decision::StayDown,
        }
        if self.limit_reached(restart, now) {
            return Decision::GiveUp;
        }
        let recent = u32::try_from(self.recent.len()).unwrap_or(u32::MAX);
        let factor = 1u32.checked_shl(recent.saturating_sub(1)).unwrap_or(u32::MAX);
        Decision::RestartAfter(restart.delay.saturating_mul(factor).min(LONGEST_DELAY))
    }

    /// Whether there were `limit_burst` starts within the last `limit_interval`.
    pub fn limit_reached(&mut self, restart: &Restart, now: Instant) -> bool {
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
    fn the_policy_says_which_exits_cause_a_restart() {
        for (policy, after_success, after_failure) in
            [(Policy::No, false, false), (Policy::OnFailure, false, true), (Policy::Always, true, true)]
        {
            for (success, retry_at) in [(true, after_success), (false, after_failure)] {
                let now = Instant::now();
                let mut starts = Starts::default();
                starts.count(now);
                let verdict = starts.decide(&Restart { policy, ..RESTART }, now, success);
                assert_eq!(verdict != Decision::StayDown, retry_at, "{policy:?}, success {success}");
            }
        }
    }

    #[test]
    fn delays_double_until_the_limit() {
        let now = Instant::now();
        let mut starts = Starts::default();
        for delay in [100, 200, 400] {
            starts.count(now);
            assert_eq!(
                starts.decide(&RESTART, now, false),
                Decision::RestartAfter(Duration::from_millis(delay))
            );
        }
        starts.count(now);
        assert_eq!(starts.decide(&RESTART, now, false), Decision::GiveUp);
        assert_eq!(starts.restarts, 3);
    }

    #[test]
    fn old_starts_do_not_count() {
        let first = Instant::now();
        let mut starts = Starts::default();
        for second in 0..100 {
            let now = first + Duration::from_secs(10 * second);
            starts.count(now);
            assert_eq!(starts.decide(&RESTART, now, false), Decision::RestartAfter(RESTART.delay));
        }
        assert_eq!(starts.recent.len(), 1);
    }

    #[test]
    fn no_delay_is_longer_than_a_minute() {
        let now = Instant::now();
        let mut starts = Starts::default();
        (0..100).for_each(|_| starts.count(now));
        let endless = Restart { limit_burst: u32::MAX, ..RESTART };
        assert_eq!(starts.decide(&endless, now, false), Decision::RestartAfter(LONGEST_DELAY));
    }
}
