//! Leaving: who asked for it, since when the dispatcher knows, and when to stop waiting for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// How far the worker is on its way out.
#[derive(Debug)]
pub(crate) struct Leave {
    /// Set by a signal handler.
    signalled: Option<Arc<AtomicBool>>,
    /// When the dispatcher was asked, in ticks.
    since: Option<u64>,
}

impl Leave {
    /// On request only, or also on SIGTERM and SIGINT.
    pub(crate) fn new(on_signals: bool) -> io::Result<Self> {
        if !on_signals {
            return Ok(Leave { signalled: None, since: None });
        }
        let signalled = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // In this order: the handler that ends the process sees what an earlier signal set.
            flag::register_conditional_shutdown(signal, 128 + signal, signalled.clone())?;
            flag::register(signal, signalled.clone())?;
        }
        Ok(Leave { signalled: Some(signalled), since: None })
    }

    /// Whether a signal asks to leave and the dispatcher does not know yet.
    #[inline(always)]
    pub(crate) fn is_due(&self) -> bool {
        match &self.signalled {
            Some(signalled) => self.since.is_none() && signalled.load(Ordering::Relaxed),
            None => false,
        }
    }

    /// As it was before anybody was asked: for the next dispatcher.
    pub(crate) fn afresh(&self) -> Self {
        Leave { signalled: self.signalled.clone(), since: None }
    }

    /// Notes that the dispatcher is being asked now; `false` if it has been before.
    pub(crate) fn begin(&mut self, now: u64) -> bool {
        let first = self.since.is_none();
        self.since.get_or_insert(now);
        first
    }

    /// When the dispatcher was asked, in ticks.
    pub(crate) fn since(&self) -> Option<u64> {
        self.since
    }
}
