//! How the primary watches its interface, and reports what it finds.

use std::time::{Duration, Instant};

use crate::control::error::PrimaryError;
use crate::control::primary::Primary;
use crate::lane::handle::LaneHandle;
use crate::port::Port;
use crate::port::watch::{ArrivalsChange, Change, Watch, unaccounted};
use crate::report::{Level, Notice, Xdp};

/// The time from one check for lost packets to the next.
const PERIOD: Duration = Duration::from_secs(1);

impl Primary {
    /// Opens all descriptors for watching the interface, so that none has to be opened later.
    pub(super) fn begin_watching(&mut self, had_carrier: bool) -> std::io::Result<()> {
        let Some(port) = &self.port else { return Ok(()) };
        self.watch = Some(Watch::begin(&port.interface, port.expected(), had_carrier)?);
        self.arrivals = self.lanes.handles.iter().map(LaneHandle::arrivals).collect();
        self.say_what_is_new(true);
        Ok(())
    }

    /// Ends the primary if its interface is gone, and takes over a new name.
    pub(super) fn look_for_interface(&mut self) -> Result<(), PrimaryError> {
        let (Some(watch), Some(port)) = (&mut self.watch, &mut self.port) else { return Ok(()) };
        let Some(name) = watch.name(&self.name) else {
            return Err(PrimaryError::Vanished(self.name.clone()));
        };
        if name != self.name {
            let detail = format!("{} was renamed to {name}: xfan continues with it", self.name);
            port.interface.name.clone_from(&name);
            self.name = name;
            tracing::warn!(interface = self.name, "{detail}; the control socket keeps its path");
            self.journal.write(None, std::process::id(), "interface", detail);
        }
        Ok(())
    }

    /// Looks at the interface about once a second, and reports changes.
    pub(super) fn look_at_interface(&mut self) {
        if self.watch.as_mut().is_some_and(Watch::look) {
            self.say_what_is_new(false);
        }
    }

    /// Checks about once a second whether redirected packets arrive.
    pub(super) fn look_for_lost_packets(&mut self) {
        let now = Instant::now();
        if self.arrivals.is_empty() || now < self.next_reading {
            return;
        }
        self.next_reading = now + PERIOD;
        // Read before the lanes' counters, so that packets redirected in between do not seem lost.
        let (served, unserved) = self.port.as_ref().map(Port::counters).unwrap_or_default();
        if let Some(watch) = &mut self.watch {
            watch.program_has_seen(served.iter().map(Xdp::seen).sum::<u64>() + unserved.seen());
        }
        for ((lane, arrivals), xdp) in self.lanes.handles.iter_mut().zip(&mut self.arrivals).zip(served) {
            let detail = match arrivals.observe(now, lane.read(xdp.redirect)) {
                None => continue,
                Some(ArrivalsChange::Begins(lost)) => {
                    let notice = unaccounted(lane.queue, lost);
                    tracing::error!(interface = self.name, queue = lane.queue.0, lost, "{notice}");
                    notice.to_string()
                }
                Some(ArrivalsChange::Ends(lost)) => {
                    let queue = lane.queue;
                    tracing::warn!(
                        interface = self.name,
                        queue = queue.0,
                        lost,
                        "packets of the queue arrive again"
                    );
                    format!("packets of queue {queue} arrive again; {lost} were lost")
                }
            };
            self.journal.write(None, std::process::id(), "unaccounted", detail);
        }
    }

    /// Checks about once a second that no worker has changed the priority of the session that it
    /// shares with the primary.
    pub(super) fn look_at_autogroup(&mut self) {
        let shared = self.spawner.as_ref().is_some_and(|spawner| !spawner.command.own_session);
        if let Some(changed) = shared.then(|| self.autogroup.check(Instant::now())).flatten() {
            tracing::warn!("{changed}");
            self.journal.write(None, std::process::id(), "autogroup", changed.to_string());
        }
    }

    /// Whether all packets that were redirected have been received, counted as dropped, or are
    /// known to be lost.
    pub(super) fn all_arrived(&mut self) -> bool {
        let Some(port) = &self.port else { return true };
        let (served, _) = port.counters();
        self.lanes.handles.iter_mut().zip(&self.arrivals).zip(served).all(|((lane, arrivals), xdp)| {
            let reading = lane.read(xdp.redirect);
            reading.accounted + arrivals.lost() >= reading.redirected
        })
    }

    /// All conditions that affect packets now, most important first.
    pub(super) fn notices(&self) -> Vec<Notice> {
        let lossy = self.lanes.handles.iter().zip(&self.arrivals).filter(|(_, arrivals)| arrivals.is_lossy());
        let mut notices: Vec<_> =
            lossy.map(|(lane, arrivals)| unaccounted(lane.queue, arrivals.lost())).collect();
        notices.extend(self.watch.as_ref().map(Watch::conditions).unwrap_or_default());
        notices.sort_by_key(|notice| std::cmp::Reverse(notice.level));
        notices
    }

    /// Reports new conditions. Those found at the start may be intended.
    fn say_what_is_new(&mut self, at_start: bool) {
        let changes = self.watch.as_mut().map(Watch::changes).unwrap_or_default();
        for change in changes {
            let interface = &self.name;
            let detail = match change {
                Change::Begins(notice) => {
                    let level = if at_start { notice.level } else { notice.level.max(Level::Warn) };
                    match level {
                        Level::Error => tracing::error!(interface, "{notice}"),
                        Level::Warn => tracing::warn!(interface, "{notice}"),
                        Level::Info => tracing::info!(interface, "{notice}"),
                    }
                    if level == Level::Info {
                        continue;
                    }
                    notice.to_string()
                }
                Change::Ends(Notice { what, .. }) => {
                    tracing::info!(interface, "over: {what}");
                    format!("over: {what}")
                }
            };
            self.journal.write(None, std::process::id(), "interface", detail);
        }
    }
}
