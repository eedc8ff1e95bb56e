//! The ports of a primary, and the monitoring of their interfaces.

use std::time::{Duration, Instant};

use xfan_shm::ids::PortId;

use crate::control::error::PrimaryError;
use crate::control::lanes::Lanes;
use crate::lane::handle::LaneHandle;
use crate::port::watch::{Arrivals, ArrivalsChange, Change, Watch, has_carrier, unaccounted};
use crate::port::{Port, PortError};
use crate::report::{self, Level, Notice, Xdp};

/// The time between two checks for lost packets.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The parts of a port.
#[derive(Debug)]
pub struct PortParts {
    /// The name of the interface, for the report.
    pub name: String,
    /// The interface; `None`: the source of packets is memory.
    pub port: Option<Port>,
}

/// A port of a running primary.
#[derive(Debug)]
pub(super) struct PortState {
    id: PortId,
    pub(super) name: String,
    /// The interface; `None`: the source of packets is memory.
    pub(super) port: Option<Port>,
    /// Monitors the interface; `None` before [`open`](Self::open).
    watch: Option<Watch>,
    /// The accounting of redirected packets, by lane of the port.
    arrivals: Vec<Arrivals>,
    /// When to check for lost packets next.
    next_check: Instant,
}

/// An event of a port, for the event history. The log has it already.
#[derive(Debug)]
pub(super) struct PortEvent {
    pub(super) event: &'static str,
    pub(super) detail: String,
}

impl PortState {
    pub(super) fn new(id: PortId, parts: PortParts, now: Instant) -> Self {
        let PortParts { name, port } = parts;
        PortState { id, name, port, watch: None, arrivals: Vec::new(), next_check: now }
    }

    /// The mode in which packets are received, for logs and reports.
    pub(super) fn mode(&self) -> String {
        self.port.as_ref().map_or_else(|| "memory".to_owned(), Port::mode)
    }

    /// Attaches the XDP program, and opens all descriptors that monitoring needs. Packets pass to
    /// the kernel until [`set_redirection`](Self::set_redirection).
    pub(super) fn open(&mut self, lanes: &Lanes) -> Result<Vec<PortEvent>, PrimaryError> {
        let Some(port) = &mut self.port else { return Ok(Vec::new()) };
        let had_carrier = has_carrier(port.interface.index);
        port.attach()?;
        self.watch = Some(Watch::begin(&port.interface, port.expected(), had_carrier)?);
        self.arrivals = lanes.of(self.id).map(LaneHandle::arrivals).collect();
        Ok(self.changes(true))
    }

    /// Redirects packets to the lanes (`true`), or lets them pass to the kernel.
    pub(super) fn set_redirection(&self, enabled: bool) -> Result<(), PortError> {
        match &self.port {
            Some(port) if enabled => port.open(),
            Some(port) => port.shut(),
            None => Ok(()),
        }
    }

    /// Reads the counters of the interface, and then detaches the XDP program: in some drivers,
    /// detaching resets counters. `timeout`: for the counters.
    pub(super) fn close(&mut self, timeout: Duration) {
        self.count_now(timeout);
        if let Some(port) = &mut self.port {
            port.close();
        }
    }

    /// Reads the counters of the interface. `timeout`: how long this may take.
    pub(super) fn count_now(&mut self, timeout: Duration) {
        if let Some(watch) = &mut self.watch {
            watch.count_now(timeout);
        }
    }

    /// Checks that the interface exists, and adopts its name if that has changed.
    ///
    /// # Errors
    /// [`PrimaryError::Vanished`]
    pub(super) fn check_name(&mut self) -> Result<Option<PortEvent>, PrimaryError> {
        let (Some(watch), Some(port)) = (&mut self.watch, &mut self.port) else { return Ok(None) };
        let Some(name) = watch.name(&self.name) else {
            return Err(PrimaryError::Vanished(self.name.clone()));
        };
        if name == self.name {
            return Ok(None);
        }
        let detail = format!("{} was renamed to {name}: xfan continues with it", self.name);
        port.interface.name.clone_from(&name);
        self.name = name;
        tracing::warn!(interface = self.name, "{detail}; the control socket keeps its path");
        Ok(Some(PortEvent { event: "interface", detail }))
    }

    /// Checks about once a second whether redirected packets arrive. Returns changes.
    pub(super) fn check_arrivals(&mut self, lanes: &mut Lanes) -> Vec<PortEvent> {
        let now = Instant::now();
        if self.arrivals.is_empty() || now < self.next_check {
            return Vec::new();
        }
        self.next_check = now + CHECK_INTERVAL;
        // These are read before the lanes' counters, so that packets redirected in between do not
        // seem lost.
        let (served, unserved) = self.counters();
        if let Some(watch) = &mut self.watch {
            watch.program_has_seen(served.iter().map(Xdp::seen).sum::<u64>() + unserved.seen());
        }
        let (interface, mut events) = (&self.name, Vec::new());
        for ((lane, arrivals), xdp) in lanes.of_mut(self.id).zip(&mut self.arrivals).zip(served) {
            let queue = lane.queue;
            let detail = match arrivals.observe(now, lane.read(xdp.redirect)) {
                None => continue,
                Some(ArrivalsChange::Begins(lost)) => {
                    let notice = unaccounted(queue, lost);
                    tracing::error!(interface, queue = queue.0, lost, "{notice}");
                    notice.to_string()
                }
                Some(ArrivalsChange::Ends(lost)) => {
                    tracing::warn!(interface, queue = queue.0, lost, "packets of the queue arrive again");
                    format!("packets of queue {queue} arrive again; {lost} were lost")
                }
            };
            events.push(PortEvent { event: "unaccounted", detail });
        }
        events
    }

    /// Checks the conditions of the interface about once a second. Returns changes.
    pub(super) fn poll_conditions(&mut self) -> Vec<PortEvent> {
        if self.watch.as_mut().is_some_and(Watch::look) { self.changes(false) } else { Vec::new() }
    }

    /// Logs and returns the changes of conditions. A condition that begins after the start is at
    /// least a warning; one that exists at the start may be intended.
    fn changes(&mut self, at_start: bool) -> Vec<PortEvent> {
        let changes = self.watch.as_mut().map(Watch::changes).unwrap_or_default();
        let (interface, mut events) = (&self.name, Vec::new());
        for change in changes {
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
            events.push(PortEvent { event: "interface", detail });
        }
        events
    }

    /// Whether all redirected packets have been received, were counted as dropped, or are known to
    /// be lost.
    pub(super) fn all_arrived(&self, lanes: &mut Lanes) -> bool {
        if self.port.is_none() {
            return true;
        }
        let (served, _) = self.counters();
        lanes.of_mut(self.id).zip(&self.arrivals).zip(served).all(|((lane, arrivals), xdp)| {
            let reading = lane.read(xdp.redirect);
            reading.accounted + arrivals.lost() >= reading.redirected
        })
    }

    /// The counters of the XDP program: for each lane's queue, and for all other queues.
    fn counters(&self) -> (Vec<Xdp>, Xdp) {
        self.port.as_ref().map(Port::counters).unwrap_or_default()
    }

    /// Makes the report of the port.
    pub(super) fn report(&self, lanes: &mut Lanes) -> report::Port {
        let (served, unserved) = self.counters();
        let mut served = served.into_iter();
        let mut arrivals = self.arrivals.iter();
        let report_of = |lane: &mut LaneHandle| {
            let unaccounted = arrivals.next().map_or(0, Arrivals::lost);
            report::Lane { unaccounted, ..lane.report(served.next().unwrap_or_default()) }
        };
        report::Port {
            name: self.name.clone(),
            mode: self.mode(),
            lanes: lanes.of_mut(self.id).map(report_of).collect(),
            unserved,
            nic: self.watch.as_ref().map(Watch::nic).unwrap_or_default(),
            notices: self.notices(lanes),
        }
    }

    /// All conditions that affect packets now, the most important first.
    fn notices(&self, lanes: &Lanes) -> Vec<Notice> {
        let lossy = lanes.of(self.id).zip(&self.arrivals).filter(|(_, arrivals)| arrivals.is_lossy());
        let mut notices: Vec<_> =
            lossy.map(|(lane, arrivals)| unaccounted(lane.queue, arrivals.lost())).collect();
        notices.extend(self.watch.as_ref().map(Watch::conditions).unwrap_or_default());
        notices.sort_by_key(|notice| std::cmp::Reverse(notice.level));
        notices
    }
}
