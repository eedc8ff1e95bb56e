//! How a sleeping consumer is woken: at most once per sleep, and never when it is awake.
//!
//! The sleeper owns a *sleep epoch*, a counter that only it writes: odd means asleep.
//!
//! ```text
//! sleeper                                   ringer
//!   epoch → odd                               publish work
//!   fence(SeqCst)                             fence(SeqCst)
//!   look for work again; none → sleep         epoch odd, and not rung for it yet? → ring
//!   awake: epoch → even
//! ```
//!
//! Of the two fences one comes first. If the sleeper's does, the ringer sees the odd epoch and rings; if the
//! ringer's does, the sleeper sees the work. Each ringer keeps the epoch it last rang for, so a sleeper is rung at most
//! once per ringer and sleep, however much work arrives. Every sleep also has an upper bound: a peer that
//! lies about its epoch costs a delay and nothing more.

use crate::sync::{AtomicU32, Ordering, fence};

/// The sleeper's end.
#[derive(Debug, Default)]
pub struct Sleeper {
    epoch: u32,
}

impl Sleeper {
    /// Announces that the caller is about to sleep. It must look for work once more before it does, and call
    /// [`awake`](Self::awake) afterwards in any case.
    #[inline]
    pub fn announce(&mut self, epoch: &AtomicU32) {
        self.epoch = self.epoch.wrapping_add(1) | 1;
        epoch.store(self.epoch, Ordering::Relaxed);
        // Pairs with `Ringer::fence`.
        fence(Ordering::SeqCst);
    }

    /// Announces that the caller is awake again.
    #[inline]
    pub fn awake(&mut self, epoch: &AtomicU32) {
        self.epoch = self.epoch.wrapping_add(1) & !1;
        epoch.store(self.epoch, Ordering::Relaxed);
    }
}

/// The ringer's end: one for each sleeper it may have to wake.
#[derive(Debug, Default)]
pub struct Ringer {
    rung: u32,
}

impl Ringer {
    /// Orders all work published before it against the epochs read after it: call it once per batch, then
    /// [`must_ring`](Self::must_ring) for each sleeper that got work.
    #[inline(always)]
    pub fn fence() {
        // Pairs with the fence in `Sleeper::announce`.
        fence(Ordering::SeqCst);
    }

    /// Whether the sleeper must be rung now; the answer is `true` once per sleep.
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
