//! How often something that a user can cause is told in the log and in the event history.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Lines of a user that are told at once; later ones once per [`PAUSE`].
const BURST: u32 = 10;
const PAUSE: Duration = Duration::from_secs(1);

/// Users that are told apart. Further ones share one budget.
const USERS: usize = 64;

/// The budget of those that are not told apart: no user has this id (`(uid_t) -1`).
const OTHERS: u32 = u32::MAX;

/// A limit per user, so that nobody's flood hides what others do.
#[derive(Debug, Default)]
pub struct RateLimit {
    users: BTreeMap<u32, Budget>,
}

#[derive(Debug)]
struct Budget {
    lines: u32,
    /// When the next line is added.
    next: Instant,
    suppressed: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Budget { lines: BURST, next: now + PAUSE, suppressed: 0 }
    }

    fn refill(&mut self, now: Instant) {
        while self.lines < BURST && self.next <= now {
            self.lines += 1;
            self.next += PAUSE;
        }
        if self.lines == BURST {
            self.next = now + PAUSE;
        }
    }
}

impl RateLimit {
    /// Whether a line about this user is to be told, and then how many before it were not. `None`:
    /// it is counted.
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

    /// The users of whom lines were not told, though there is room for one now, and how many: so
    /// that the end of a flood is told, too. A user of `None` stands for several.
    pub fn suppressed(&mut self, now: Instant) -> Vec<(Option<u32>, u64)> {
        let mut told = Vec::new();
        for (uid, budget) in &mut self.users {
            budget.refill(now);
            if budget.suppressed > 0 && budget.lines > 0 {
                budget.lines -= 1;
                told.push((Some(*uid).filter(|uid| *uid != OTHERS), std::mem::take(&mut budget.suppressed)));
            }
        }
        told
    }

    fn budget(&mut self, uid: u32, now: Instant) -> &mut Budget {
        if !self.users.contains_key(&uid) && self.users.len() >= USERS {
            // Those that have been quiet for a while are as good as new.
            self.users.retain(|_, budget| {
                budget.refill(now);
                budget.lines < BURST || budget.suppressed > 0
            });
        }
        let full = !self.users.contains_key(&uid) && self.users.len() >= USERS;
        self.users.entry(if full { OTHERS } else { uid }).or_insert_with(|| Budget::new(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_ten_times_and_then_once_a_second() {
        let (mut limit, start) = (RateLimit::default(), Instant::now());
        let told = (0..1000).filter(|_| limit.admit(1, start).is_some()).count();
        assert_eq!(told, 10);
        assert_eq!(limit.suppressed(start), []);
        assert_eq!(limit.admit(1, start + PAUSE), Some(990));
        assert_eq!(limit.admit(1, start + PAUSE), None);
        assert_eq!(limit.suppressed(start + 2 * PAUSE), [(Some(1), 1)]);
        assert_eq!(limit.suppressed(start + 100 * PAUSE), []);
        let told = (0..1000).filter(|_| limit.admit(1, start + 100 * PAUSE).is_some()).count();
        assert_eq!(told, 10);
    }

    #[test]
    fn nobodys_flood_hides_the_first_line_of_another() {
        let (mut limit, now) = (RateLimit::default(), Instant::now());
        for uid in 0..10 {
            assert_eq!((0..100).filter(|_| limit.admit(uid, now).is_some()).count(), 10);
            assert_eq!(limit.admit(100 + uid, now), Some(0));
        }
    }

    #[test]
    fn it_does_not_grow_with_the_number_of_users() {
        let (mut limit, start) = (RateLimit::default(), Instant::now());
        for uid in 0..10_000 {
            limit.admit(uid, start);
        }
        assert!(limit.users.len() <= USERS + 1);
        let late = start + 100 * PAUSE;
        let told = limit.suppressed(late);
        assert_eq!(told, [(None, 10_000 - 64 - 10)]);
        assert_eq!(limit.admit(77_777, late), Some(0));
        assert!(limit.users.contains_key(&77_777), "others are forgotten");
    }
}
