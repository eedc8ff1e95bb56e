//! Limits the lines that a user can cause in the log and the event history.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The most lines of a user in a burst: enough for the mistakes of a person or a start script.
const BURST: u32 = 10;
/// The time between two lines of a user after a burst.
const INTERVAL: Duration = Duration::from_secs(1);

/// The most users with a budget of their own, which bounds the memory. Further users share one
/// budget.
const USERS: usize = 64;

/// The key of the shared budget. No user has this id (`(uid_t) -1`).
const SHARED: u32 = u32::MAX;

/// A limit for each user, so that lines of one user cannot suppress those of others.
#[derive(Debug, Default)]
pub struct RateLimit {
    users: BTreeMap<u32, Budget>,
}

#[derive(Debug)]
struct Budget {
    /// The number of lines that are allowed now.
    lines: u32,
    /// When one more line is allowed.
    next: Instant,
    /// The number of suppressed lines that are not reported yet.
    suppressed: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Budget { lines: BURST, next: now + INTERVAL, suppressed: 0 }
    }

    fn refill(&mut self, now: Instant) {
        while self.lines < BURST && self.next <= now {
            self.lines += 1;
            self.next += INTERVAL;
        }
        if self.lines == BURST {
            self.next = now + INTERVAL;
        }
    }
}

impl RateLimit {
    /// Asks whether to write a line about this user. Returns the number of lines suppressed before
    /// it, or `None` if this line is suppressed, too.
    pub fn admit(&mut self, uid: u32, now: Instant) -> Option<u64> {
        let budget = self.budget(uid, now);
        budget.refill(now);
        if budget.lines == 0 {
            budget.suppressed += 1;
            return None;
        }
        budget.lines -= 1;
        Some(std::mem::take(&mut budget.suppressed))
    }

    /// Returns the users with suppressed lines about whom a line is allowed now, and the number of
    /// their suppressed lines. So the end of a burst is reported, too. `None`: the users that share
    /// a budget.
    pub fn suppressed(&mut self, now: Instant) -> Vec<(Option<u32>, u64)> {
        let mut reports = Vec::new();
        for (uid, budget) in &mut self.users {
            budget.refill(now);
            if budget.suppressed > 0 && budget.lines > 0 {
                budget.lines -= 1;
                reports
                    .push((Some(*uid).filter(|uid| *uid != SHARED), std::mem::take(&mut budget.suppressed)));
            }
        }
        reports
    }

    fn budget(&mut self, uid: u32, now: Instant) -> &mut Budget {
        if !self.users.contains_key(&uid) && self.users.len() >= USERS {
            // Remove budgets that are full: a new one would be the same.
            self.users.retain(|_, budget| {
                budget.refill(now);
                budget.lines < BURST || budget.suppressed > 0
            });
        }
        let full = !self.users.contains_key(&uid) && self.users.len() >= USERS;
        self.users.entry(if full { SHARED } else { uid }).or_insert_with(|| Budget::new(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_has_ten_lines_and_then_one_a_second() {
        let (mut limit, start) = (RateLimit::default(), Instant::now());
        let written = (0..1000).filter(|_| limit.admit(1, start).is_some()).count();
        assert_eq!(written, 10);
        assert_eq!(limit.suppressed(start), []);
        assert_eq!(limit.admit(1, start + INTERVAL), Some(990));
        assert_eq!(limit.admit(1, start + INTERVAL), None);
        assert_eq!(limit.suppressed(start + 2 * INTERVAL), [(Some(1), 1)]);
        assert_eq!(limit.suppressed(start + 100 * INTERVAL), []);
        let written = (0..1000).filter(|_| limit.admit(1, start + 100 * INTERVAL).is_some()).count();
        assert_eq!(written, 10);
    }

    #[test]
    fn lines_of_one_user_do_not_suppress_those_of_another() {
        let (mut limit, now) = (RateLimit::default(), Instant::now());
        for uid in 0..10 {
            assert_eq!((0..100).filter(|_| limit.admit(uid, now).is_some()).count(), 10);
            assert_eq!(limit.admit(100 + uid, now), Some(0));
        }
    }

    #[test]
    fn memory_does_not_grow_with_the_number_of_users() {
        let (mut limit, start) = (RateLimit::default(), Instant::now());
        for uid in 0..10_000 {
            limit.admit(uid, start);
        }
        assert!(limit.users.len() <= USERS + 1);
        let late = start + 100 * INTERVAL;
        let written = limit.suppressed(late);
        assert_eq!(written, [(None, 10_000 - 64 - 10)]);
        assert_eq!(limit.admit(77_777, late), Some(0));
        assert!(limit.users.contains_key(&77_777), "full budgets are removed");
    }
}
