//! Leaving: whether a signal asked for it, and since when the dispatcher knows.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The state of a worker's request to leave.
#[derive(Debug)]
pub(crate) struct Leave {
    /// Set by the signal handlers; `None` without handlers.
    signalled: Option<Arc<AtomicBool>>,
    /// When the worker asked the dispatcher, in ticks.
    since: Option<u64>,
}

impl Leave {
    /// The state before any request. With `on_signals`, installs handlers for SIGTERM and SIGINT.
    pub(crate) fn new(on_signals: bool) -> io::Result<Self> {
        if !on_signals {
            return Ok(Leave { signalled: None, since: None });
        }
        let signalled = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // The handler registered first runs first. It terminates the process only if an earlier
            // signal has set the flag.
            flag::register_conditional_shutdown(signal, 128 + signal, signalled.clone())?;
            flag::register(signal, signalled.clone())?;
        }
        Ok(Leave { signalled: Some(signalled), since: None })
    }

    /// Whether a signal asked the worker to leave and the dispatcher does not know yet.
    #[inline(always)]
    pub(crate) fn is_due(&self) -> bool {
        match &self.signalled {
            Some(signalled) => self.since.is_none() && signalled.load(Ordering::Relaxed),
            None => false,
        }
    }

    /// The state before any request, with the same signal handlers: for the next dispatcher.
    pub(crate) fn afresh(&self) -> Self {
        Leave { signalled: self.signalled.clone(), since: None }
    }

    /// Notes that the worker asks the dispatcher now. Returns `false` if it has asked before.
    pub(crate) fn begin(&mut self, now: u64) -> bool {
        let first = self.since.is_none();
        self.since.get_or_insert(now);
        first
    }

    /// When the worker asked the dispatcher, in ticks.
    pub(crate) fn since(&self) -> Option<u64> {
        self.since
    }
}
