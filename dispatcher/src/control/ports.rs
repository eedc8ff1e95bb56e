//! The ports of a primary, and how it watches their interfaces.

use std::time::{Duration, Instant};

use xfan_shm::ids::PortId;

use crate::control::error::PrimaryError;
use crate::control::lanes::Lanes;
use crate::lane::handle::LaneHandle;
use crate::port::watch::{Arrivals, ArrivalsChange, Change, Watch, has_carrier, unaccounted};
use crate::port::{Port, PortError};
use crate::report::{self, Level, Notice, Xdp};

/// The time from one check for lost packets to the next.
const PERIOD: Duration = Duration::from_secs(1);

/// A port to be.
#[derive(Debug)]
pub struct PortParts {
    /// Interface name, for the report.
    pub name: String,
    /// The interface. `None`: packets come from memory.
    pub port: Option<Port>,
}

/// A port of a running primary.
#[derive(Debug)]
pub(super) struct PortState {
    id: PortId,
    pub(super) name: String,
    /// The interface. `None`: packets come from memory.
    pub(super) port: Option<Port>,
    /// Watches the interface; `None` before [`open`](Self::open).
    watch: Option<Watch>,
    /// For each of its lanes, in order: whether redirected packets arrive.
    arrivals: Vec<Arrivals>,
    next_reading: Instant,
}

/// Something to log and to write to the event history.
#[derive(Debug)]
pub(super) struct News {
    pub(super) event: &'static str,
    pub(super) detail: String,
}

impl PortState {
    pub(super) fn new(id: PortId, parts: PortParts, now: Instant) -> Self {
        let PortParts { name, port } = parts;
        PortState { id, name, port, watch: None, arrivals: Vec::new(), next_reading: now }
    }

    /// How packets come in, for logs and reports.
    pub(super) fn mode(&self) -> String {
        self.port.as_ref().map_or_else(|| "memory".to_owned(), Port::mode)
    }

    /// Attaches the XDP program, and opens all descriptors for watching the interface, so that none
    /// has to be opened later. Packets come with [`let_in`](Self::let_in).
    pub(super) fn open(&mut self, lanes: &Lanes) -> Result<Vec<News>, PrimaryError> {
        let Some(port) = &mut self.port else { return Ok(Vec::new()) };
        let had_carrier = has_carrier(port.interface.index);
        port.attach()?;
        self.watch = Some(Watch::begin(&port.interface, port.expected(), had_carrier)?);
        self.arrivals = lanes.of(self.id).map(LaneHandle::arrivals).collect();
        Ok(self.changes(true))
    }

    /// Lets packets in, or has them pass to the kernel.
    pub(super) fn let_in(&self, wanted: bool) -> Result<(), PortError> {
        match &self.port {
            Some(port) if wanted => port.open(),
            Some(port) => port.shut(),
            None => Ok(()),
        }
    }

    /// Detaches the XDP program, after a last look at the counters: detaching resets those of some
    /// drivers.
    pub(super) fn close(&mut self, patience: Duration) {
        self.count_now(patience);
        if let Some(port) = &mut self.port {
            port.close();
        }
    }

    /// Reads the counters of the interface once more.
    pub(super) fn count_now(&mut self, patience: Duration) {
        if let Some(watch) = &mut self.watch {
            watch.count_now(patience);
        }
    }

    /// Takes over a new name of the interface.
    ///
    /// # Errors
    /// [`PrimaryError::Vanished`]
    pub(super) fn look_for_interface(&mut self) -> Result<Option<News>, PrimaryError> {
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
        Ok(Some(News { event: "interface", detail }))
    }

    /// Checks about once a second whether redirected packets arrive.
    pub(super) fn look_for_lost_packets(&mut self, lanes: &mut Lanes) -> Vec<News> {
        let now = Instant::now();
        if self.arrivals.is_empty() || now < self.next_reading {
            return Vec::new();
        }
        self.next_reading = now + PERIOD;
        // Read before the lanes' counters, so that packets redirected in between do not seem lost.
        let (served, unserved) = self.counters();
        if let Some(watch) = &mut self.watch {
            watch.program_has_seen(served.iter().map(Xdp::seen).sum::<u64>() + unserved.seen());
        }
        let (interface, mut news) = (&self.name, Vec::new());
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
            news.push(News { event: "unaccounted", detail });
        }
        news
    }

    /// Looks at the interface about once a second. Returns what has changed.
    pub(super) fn look(&mut self) -> Vec<News> {
        if self.watch.as_mut().is_some_and(Watch::look) { self.changes(false) } else { Vec::new() }
    }

    /// Logs new conditions. Those found at the start may be intended.
    fn changes(&mut self, at_start: bool) -> Vec<News> {
        let changes = self.watch.as_mut().map(Watch::changes).unwrap_or_default();
        let (interface, mut news) = (&self.name, Vec::new());
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
            news.push(News { event: "interface", detail });
        }
        news
    }

    /// Whether all packets that were redirected have been received, counted as dropped, or are
    /// known to be lost.
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

    /// The XDP program's counters: of each lane's queue, and of all other queues.
    fn counters(&self) -> (Vec<Xdp>, Xdp) {
        self.port.as_ref().map(Port::counters).unwrap_or_default()
    }

    /// What is known of it.
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

    /// All conditions that affect packets now, most important first.
    fn notices(&self, lanes: &Lanes) -> Vec<Notice> {
        let lossy = lanes.of(self.id).zip(&self.arrivals).filter(|(_, arrivals)| arrivals.is_lossy());
        let mut notices: Vec<_> =
            lossy.map(|(lane, arrivals)| unaccounted(lane.queue, arrivals.lost())).collect();
        notices.extend(self.watch.as_ref().map(Watch::conditions).unwrap_or_default());
        notices.sort_by_key(|notice| std::cmp::Reverse(notice.level));
        notices
    }
}
