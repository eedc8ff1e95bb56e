//! How a lane spends its time when there is nothing to do.

use std::time::Duration;

use xfan_shm::clock::ticks_per_ns;

/// What to do when there is nothing to do.
pub(super) enum Turn {
    Settle,
    Spin,
    Yield,
    Sleep,
}

/// Spin, then yield, then sleep. The first idle turn settles accounts, and so does every
/// thousandth.
pub(super) struct Idle {
    since: Option<u64>,
    turns: u32,
    spin: u64,
    yields: u64,
}

impl Idle {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    pub(super) fn new(spin: Duration, yields: Duration) -> Self {
        let in_ticks = |time: Duration| (time.as_nanos() as f64 * ticks_per_ns()) as u64;
        Idle { since: None, turns: 0, spin: in_ticks(spin), yields: in_ticks(spin + yields) }
    }

    #[inline(always)]
    pub(super) fn reset(&mut self) {
        self.since = None;
    }

    #[inline]
    pub(super) fn next(&mut self, now: u64) -> Turn {
        let Some(since) = self.since else {
            (self.since, self.turns) = (Some(now), 0);
            return Turn::Settle;
        };
        self.turns = self.turns.wrapping_add(1);
        let idle = now.wrapping_sub(since);
        if idle >= self.yields {
            Turn::Sleep
        } else if self.turns.is_multiple_of(1024) {
            Turn::Settle
        } else if idle < self.spin {
            Turn::Spin
        } else {
            Turn::Yield
        }
    }
}
