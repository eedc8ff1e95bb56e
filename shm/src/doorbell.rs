//! The doorbell: wakes a sleeping consumer at most once per sleep, and never while it is awake.
//!
//! The sleeper owns a *sleep epoch*, a counter that only the sleeper writes. Odd means asleep.
//!
//! ```text
//! sleeper                                   ringer
//!   epoch → odd                               publish work
//!   fence(SeqCst)                             fence(SeqCst)
//!   check for work again; none → sleep        epoch odd, and not yet rung for it? → ring
//!   awake: epoch → even
//! ```
//!
//! One of the two fences comes first. If it is the sleeper's, the ringer sees the odd epoch and
//! rings. If it is the ringer's, the sleeper sees the work. Each ringer remembers the epoch that it
//! last rang for, so it rings at most once per sleep, however much work arrives. Every sleep also
//! has an upper bound: a peer that lies about its epoch causes a delay and nothing else.

use crate::sync::{AtomicU32, Ordering, fence};

/// The sleeper's end.
#[derive(Debug, Default)]
pub struct Sleeper {
    epoch: u32,
}

impl Sleeper {
    /// Announces that the caller is about to sleep. The caller must then check for work once more,
    /// sleep only if there is none, and call [`awake`](Self::awake) in either case.
    #[inline]
    pub fn announce(&mut self, epoch: &AtomicU32) {
        self.epoch = self.epoch.wrapping_add(1) | 1;
        epoch.store(self.epoch, Ordering::Relaxed);
        // SeqCst: pairs with the fence in `Ringer::fence`.
        fence(Ordering::SeqCst);
    }

    /// Announces that the caller is awake again.
    #[inline]
    pub fn awake(&mut self, epoch: &AtomicU32) {
        self.epoch = self.epoch.wrapping_add(1) & !1;
        epoch.store(self.epoch, Ordering::Relaxed);
    }
}

/// The ringer's end. A ringer needs one for each sleeper that it wakes.
#[derive(Debug, Default)]
pub struct Ringer {
    rung: u32,
}

impl Ringer {
    /// Orders all work published before this call against all epochs read after it. Call it once
    /// per batch, then [`must_ring`](Self::must_ring) for each sleeper that got work.
    #[inline(always)]
    pub fn fence() {
        // SeqCst: pairs with the fence in `Sleeper::announce`.
        fence(Ordering::SeqCst);
    }

    /// Whether the caller must ring now. Returns `true` once per sleep.
    #[inline(always)]
    pub fn must_ring(&mut self, epoch: &AtomicU32) -> bool {
        let epoch = epoch.load(Ordering::Relaxed);
        if epoch & 1 == 0 || epoch == self.rung {
            return false;
        }
        self.rung = epoch;
        true
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn rings_once_per_sleep_and_never_when_awake() {
        let epoch = AtomicU32::new(0);
        let (mut sleeper, mut ringer) = (Sleeper::default(), Ringer::default());
        assert!(!ringer.must_ring(&epoch));
        for _ in 0..3 {
            sleeper.announce(&epoch);
            assert!(ringer.must_ring(&epoch));
            assert!(!ringer.must_ring(&epoch));
            sleeper.awake(&epoch);
            assert!(!ringer.must_ring(&epoch));
            assert!(!Ringer::default().must_ring(&epoch));
        }
    }
}
