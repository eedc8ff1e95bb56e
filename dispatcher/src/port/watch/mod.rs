//! Watches the interface while a primary runs: its settings, its counters, and whether redirected
//! packets arrive.
//!
//! The control thread checks often whether the interface still exists, which takes no lock. All
//! other queries take RTNL, a kernel lock that other processes may hold for seconds. A separate
//! thread therefore makes them, about once a second.

mod arrivals;
mod conditions;
mod differences;
mod driver;
mod drop_counters;
mod link;
mod presence;
mod unseen;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::host::interface::Interface;
use crate::host::privileges::drop_all_capabilities;
use crate::report::{self, Notice};
use conditions::Seen;
use differences::Differences;
use driver::{Driver, Offloads};
use link::{Link, LinkSocket};
use presence::Presence;
use unseen::Unseen;

pub use arrivals::{Arrivals, Change as ArrivalsChange, Reading};
pub use conditions::{Change, Expected, unaccounted};

/// The time from one look at the interface to the next. Each look takes RTNL, which other processes
/// need.
const PERIOD: Duration = Duration::from_secs(1);
/// How long the first look may take before the start goes on without it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a link may take to come up again after attaching the program has reset it: a NIC may
/// negotiate for some seconds.
const RESET: Duration = Duration::from_secs(6);

/// Whether an interface has a carrier; `false` also if the query fails.
pub fn has_carrier(index: u32) -> bool {
    LinkSocket::of(index).and_then(|mut link| link.ask()).is_ok_and(|link| link.carrier)
}

/// Watches an interface, for the control thread.
#[derive(Debug)]
pub struct Watch {
    presence: Presence,
    expected: Expected,
    orders: mpsc::Sender<()>,
    looks: mpsc::Receiver<Option<Look>>,
    /// A look was ordered, and its result has not arrived yet. The next look is due at `next`.
    waiting: bool,
    next: Instant,
    seen: Option<Seen>,
    /// Until this time a missing carrier is not reported: the link may still be resetting.
    carrier_due: Option<Instant>,
    reported: conditions::Reported,
    counters: Counters,
    /// By the index of an interface below this one.
    below: BTreeMap<u32, Counters>,
    unseen: Unseen,
    /// Failed queries that have been reported.
    unreadable: BTreeSet<&'static str>,
}

/// The increase of an interface's counters.
#[derive(Debug)]
struct Counters {
    name: String,
    driver: String,
    of_interface: Differences,
    of_driver: Differences,
}

impl Counters {
    fn of(interface: &Interface) -> Self {
        Counters {
            name: interface.name.clone(),
            driver: interface.driver.clone(),
            of_interface: Differences::default(),
            of_driver: Differences::default(),
        }
    }

    /// Takes a reading of the driver's counters: only those of drops count.
    fn update_driver(&mut self, mut counters: BTreeMap<String, u64>) {
        counters.retain(|counter, _| {
            drop_counters::is_one(&self.driver, counter) || drop_counters::may_be_one(counter)
        });
        self.of_driver.update(counters);
    }

    /// The increases since the start, for the report.
    fn since_start(&self) -> report::Nic {
        let driver = self.of_driver.since_start().iter();
        report::Nic {
            interface: self.of_interface.since_start().clone(),
            driver: driver
                .filter(|(name, since)| drop_counters::is_one(&self.driver, name) || **since > 0)
                .map(|(name, since)| (name.clone(), *since))
                .collect(),
            below: BTreeMap::new(),
        }
    }
}

/// The result of one look.
#[derive(Debug)]
struct Look {
    name: String,
    link: io::Result<Link>,
    rx_queues: io::Result<Option<u32>>,
    offloads: io::Result<Offloads>,
    counters: io::Result<BTreeMap<String, u64>>,
    /// The interfaces below, without those that cannot be read.
    below: Vec<LookBelow>,
}

/// The counters of an interface below.
#[derive(Debug)]
struct LookBelow {
    index: u32,
    of_interface: BTreeMap<String, u64>,
    of_driver: BTreeMap<String, u64>,
}

/// The descriptors that a look uses, on the thread that looks.
struct Looker {
    presence: Presence,
    link: LinkSocket,
    driver: Driver,
    /// The interfaces below, with their indices.
    below: Vec<(u32, Presence, LinkSocket)>,
}

impl Looker {
    /// Makes all queries. `None`: the interface no longer exists, or was renamed meanwhile: ethtool
    /// queries go by name.
    fn look(&mut self) -> Option<Look> {
        let name = self.presence.name().ok()??;
        let look = Look {
            link: self.link.ask(),
            rx_queues: self.driver.rx_queues(&name),
            offloads: self.driver.offloads(&name),
            counters: self.driver.counters(&name),
            below: self.look_below(),
            name,
        };
        (self.presence.name().ok()?? == look.name).then_some(look)
    }

    fn look_below(&mut self) -> Vec<LookBelow> {
        let driver = &self.driver;
        let look = |(index, presence, link): &mut (u32, Presence, LinkSocket)| {
            let name = presence.name().ok()??;
            let (of_interface, of_driver) = (link.ask().ok()?.counters, driver.counters(&name));
            Some(LookBelow { index: *index, of_interface, of_driver: of_driver.unwrap_or_default() })
        };
        self.below.iter_mut().filter_map(look).collect()
    }
}

impl Watch {
    /// Starts to watch an interface of the calling thread's network namespace. Counters start at
    /// zero now.
    ///
    /// Attach the program and bind the sockets first: both reset the counters of some drivers. Many
    /// drivers also reset the link, so if the interface `had_carrier` before, a missing carrier is
    /// not reported at once.
    ///
    /// # Errors
    /// No descriptor or thread is left.
    pub fn begin(interface: &Interface, expected: Expected, had_carrier: bool) -> io::Result<Self> {
        let index = interface.index;
        let below = interface.all_below();
        let open =
            |below: &Interface| Ok((below.index, Presence::of(below.index)?, LinkSocket::of(below.index)?));
        let mut looker = Looker {
            presence: Presence::of(index)?,
            link: LinkSocket::of(index)?,
            driver: Driver::open()?,
            below: below.iter().map(open).collect::<io::Result<_>>()?,
        };
        let (orders, ordered) = mpsc::channel();
        let (answers, looks) = mpsc::channel();
        // The thread ends when `orders` is dropped; nothing joins it, since it may wait for RTNL.
        std::thread::Builder::new().name("watch".into()).spawn(move || {
            drop_all_capabilities();
            while ordered.recv().is_ok() && answers.send(looker.look()).is_ok() {}
        })?;
        let mut watch = Watch {
            presence: Presence::of(index)?,
            expected,
            orders,
            looks,
            waiting: false,
            next: Instant::now(),
            seen: None,
            carrier_due: had_carrier.then(|| Instant::now() + RESET),
            reported: conditions::Reported::default(),
            counters: Counters::of(interface),
            below: below.iter().map(|below| (below.index, Counters::of(below))).collect(),
            unseen: Unseen::default(),
            unreadable: BTreeSet::new(),
        };
        watch.look_now(PATIENCE);
        Ok(watch)
    }

    /// The interface's name; `None` if the interface no longer exists. If the query fails for
    /// another reason, returns `known`.
    pub fn name(&mut self, known: &str) -> Option<String> {
        self.presence.name().unwrap_or_else(|error| {
            self.cannot_read("the name", known, &error);
            Some(known.to_owned())
        })
    }

    /// Looks, and waits for the result for at most `patience`.
    fn look_now(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        let take = |watch: &mut Self| {
            let left = until.saturating_duration_since(Instant::now());
            if let Ok(look) = watch.looks.recv_timeout(left) {
                watch.take(look);
            }
        };
        if self.waiting {
            take(self);
        }
        if !self.waiting {
            self.order();
            take(self);
        }
    }

    /// Reads the counters once more, at the end. Settings stay as last seen: they now change
    /// because the primary itself detaches from the interface.
    pub fn count_now(&mut self, patience: Duration) {
        let seen = self.seen.clone();
        self.look_now(patience);
        self.seen = seen;
    }

    /// Takes results, and orders the next look when it is due. Returns whether a result has arrived
    /// since the last call.
    pub fn look(&mut self) -> bool {
        let mut news = false;
        while let Ok(look) = self.looks.try_recv() {
            self.take(look);
            news = true;
        }
        if !self.waiting && Instant::now() >= self.next {
            self.order();
        }
        news
    }

    fn order(&mut self) {
        self.next = Instant::now() + PERIOD;
        self.waiting = self.orders.send(()).is_ok();
    }

    fn take(&mut self, look: Option<Look>) {
        self.waiting = false;
        let Some(Look { name, link, rx_queues, offloads, counters, below }) = look else { return };
        for LookBelow { index, of_interface, of_driver } in below {
            if let Some(counters) = self.below.get_mut(&index) {
                counters.of_interface.update(of_interface);
                counters.update_driver(of_driver);
            }
        }
        let mut seen = self.seen.take();
        match link {
            Ok(mut link) => {
                self.counters.of_interface.update(link.counters.clone());
                link.carrier |= self.carrier_due.is_some_and(|due| Instant::now() < due);
                seen.get_or_insert_default().link = link;
            }
            Err(error) => self.cannot_read("flags and counters", &name, &error),
        }
        match counters {
            Ok(counters) => self.counters.update_driver(counters),
            Err(error) => self.cannot_read("the driver's counters", &name, &error),
        }
        if let Some(seen) = &mut seen {
            match rx_queues {
                Ok(count) => seen.rx_queues = count,
                Err(error) => self.cannot_read("the RX queues", &name, &error),
            }
            match offloads {
                Ok(offloads) => seen.offloads = offloads,
                Err(error) => self.cannot_read("the offloads", &name, &error),
            }
            seen.name = name;
        }
        self.seen = seen;
    }

    /// Reports each failing query once. Ignores ENODEV: [`name`](Self::name) detects that the
    /// interface no longer exists.
    fn cannot_read(&mut self, what: &'static str, interface: &str, error: &io::Error) {
        if error.raw_os_error() != Some(libc::ENODEV) && self.unreadable.insert(what) {
            tracing::warn!(
                interface,
                "cannot read {what} of the interface: {error}; xfan continues without them"
            );
        }
    }

    /// All current conditions of the interface.
    pub fn conditions(&self) -> Vec<Notice> {
        let Some(seen) = &self.seen else { return Vec::new() };
        conditions::conditions(seen, &self.expected, self.unseen.is_so())
    }

    /// Takes the number of packets that the XDP program has seen so far.
    pub fn program_has_seen(&mut self, packets: u64) {
        let counted = self.counters.of_interface.since_start();
        let count = |name: &str| counted.get(name).copied().unwrap_or_default();
        let received = ["rx_packets", "rx_dropped", "rx_missed_errors", "rx_over_errors", "rx_fifo_errors"];
        self.unseen.observe(received.into_iter().map(count).sum(), packets);
    }

    /// The changes of conditions to report now.
    pub fn changes(&mut self) -> Vec<Change> {
        self.reported.changes(&self.conditions(), Instant::now())
    }

    /// The counters of the kernel and the driver for dropped packets, since the start.
    pub fn nic(&self) -> report::Nic {
        let below = self.below.values().map(|below| (below.name.clone(), below.since_start())).collect();
        report::Nic { below, ..self.counters.since_start() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_reset_at_start_is_not_reported() {
        let interface = Interface::find("lo").unwrap();
        assert!(!has_carrier(0x7fff_fff0));
        let expected = Expected { queues: vec![xfan_shm::ids::QueueId(0)], max_mtu: 1770 };
        for had_carrier in [false, true] {
            let mut watch = Watch::begin(&interface, expected.clone(), had_carrier).unwrap();
            let said = |watch: &mut Watch| {
                watch.take(Some(Look {
                    name: "lo".into(),
                    link: Ok(Link { mtu: 1500, up: true, xdp: true, ..Link::default() }),
                    rx_queues: Ok(None),
                    offloads: Ok(Offloads::default()),
                    counters: Ok(BTreeMap::new()),
                    below: Vec::new(),
                }));
                watch.conditions().iter().any(|notice| notice.topic == "carrier")
            };
            assert_eq!(said(&mut watch), !had_carrier);
            // Unless it does not come back.
            watch.carrier_due = watch.carrier_due.map(|_| Instant::now());
            assert!(said(&mut watch));
        }
    }
}
