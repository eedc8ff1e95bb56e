//! The control thread's end of a lane: its thread, its commands, its counters.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use xfan_shm::ids::{GroupId, PortId, QueueId};

use crate::host::privileges::drop_all_capabilities;
use crate::lane::{Command, Lane, LaneParts, Shared};
use crate::memory::frames::{Frames, Tally};
use crate::port::rings;
use crate::port::source::PacketSource;
use crate::port::watch::{Arrivals, Reading};
use crate::report;

/// More packets than a driver handles in one round of NAPI.
const ROUND: u64 = 1024;

/// A running lane.
#[derive(Debug)]
pub struct LaneHandle {
    /// The port it belongs to.
    pub port: PortId,
    /// RX queue.
    pub queue: QueueId,
    /// CPU it is pinned on.
    pub core: usize,
    shared: Arc<Shared>,
    issued: u64,
    /// Commands that the queue had no room for, in order.
    pending: VecDeque<Command>,
    /// It got [`Command::Stop`].
    stopping: bool,
    /// Frames that the lane keeps posted to the kernel.
    posted: u32,
    thread: Option<JoinHandle<Frames>>,
    /// For the kernel's statistics; none where packets come from memory.
    socket: Option<OwnedFd>,
    kernel: report::Kernel,
    /// How often the kernel had found the FILL ring empty before packets could arrive: when the
    /// socket was bound.
    fill_ring_empty_before: u64,
    cut: CutReports,
}

/// The state of the reports about packets that arrived cut.
#[derive(Debug)]
struct CutReports {
    /// The number of packets reported so far.
    count: u64,
    /// When the next report is allowed, and the pause after it.
    next: Instant,
    pause: Duration,
}

impl LaneHandle {
    /// Starts a lane on its own thread.
    ///
    /// # Errors
    /// If the lane or its thread cannot be made.
    pub fn spawn<S: PacketSource + Send + 'static>(parts: LaneParts, source: S) -> io::Result<Self> {
        let lane = Lane::new(&parts, source)?;
        let shared = lane.shared().clone();
        let LaneParts { port, queue, core, config, socket, .. } = parts;
        let thread = std::thread::Builder::new().name(format!("lane-{queue}")).spawn(move || {
            if !core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
                tracing::warn!(
                    queue = queue.0,
                    core,
                    "cannot pin the lane on its CPU; it runs wherever the kernel puts it"
                );
            }
            drop_all_capabilities();
            lane.run()
        })?;
        Ok(LaneHandle {
            port,
            queue,
            core,
            shared,
            issued: 0,
            pending: VecDeque::new(),
            stopping: false,
            posted: config.posted,
            thread: Some(thread),
            socket,
            kernel: report::Kernel::default(),
            fill_ring_empty_before: 0,
            cut: CutReports { count: 0, next: Instant::now(), pause: Duration::from_secs(1) },
        })
    }

    /// Hands the lane a command, which it carries out before the next batch. Commands that its
    /// queue has no room for follow in order with [`flush`](Self::flush).
    pub fn command(&mut self, command: Command) {
        self.pending.push_back(command);
        self.issued += 1;
        self.flush();
        self.wake();
    }

    /// Hands over commands that wait for room in the lane's queue.
    pub fn flush(&mut self) {
        while let Some(command) = self.pending.pop_front() {
            if let Err(back) = self.shared.commands.push(command) {
                self.pending.push_front(back);
                return;
            }
        }
    }

    /// Commands handed over so far.
    pub fn issued(&self) -> u64 {
        self.issued
    }

    /// Wakes the lane: it takes back committed frames, and runs its commands.
    pub fn wake(&self) {
        // Even if the counter is full, the doorbell is readable.
        let _ = nix::unistd::write(&self.shared.doorbell, &1u64.to_ne_bytes());
    }

    /// The number of commands that the lane has acknowledged. A lane that has ended counts as
    /// having acknowledged all.
    pub fn acknowledged(&self) -> u64 {
        if self.ended() { u64::MAX } else { self.shared.counters.commands.get() }
    }

    /// An eventfd that is readable once the lane has acknowledged commands.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.shared.acknowledged.try_clone()
    }

    /// Whether the lane has found its RX ring empty since [`Command::Drain`].
    pub fn drained(&self) -> bool {
        self.shared.counters.drained.load(Ordering::Acquire) || self.ended()
    }

    /// Whether its thread has ended. Before [`Command::Stop`], that is a bug.
    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Sends [`Command::Stop`].
    pub fn begin_stop(&mut self) {
        if !std::mem::replace(&mut self.stopping, true) {
            self.refresh_kernel();
            self.command(Command::Stop);
        }
    }

    /// Ends the lane. Returns its ledger, or `None` if the lane panicked. Waits unless the lane has
    /// [ended](Self::ended).
    pub fn stop(&mut self) -> Option<Frames> {
        self.begin_stop();
        while !self.ended() && !self.pending.is_empty() {
            self.flush();
            std::thread::yield_now();
        }
        let frames = self.thread.take()?.join().ok()?;
        self.socket = None;
        Some(frames)
    }

    /// The number of packets that arrived cut since the last report; `None`: nothing to report. The
    /// pause after a report is a second, and doubles each time up to a minute: a driver that cuts
    /// packets does not stop.
    pub fn newly_cut(&mut self, now: Instant) -> Option<u64> {
        let count = self.shared.counters.cut.get();
        if count == self.cut.count || now < self.cut.next {
            return None;
        }
        let reported = std::mem::replace(&mut self.cut.count, count);
        self.cut.next = now + self.cut.pause;
        self.cut.pause = (self.cut.pause * 2).min(Duration::from_secs(60));
        Some(count - reported)
    }

    fn refresh_kernel(&mut self) {
        let Some(statistics) = self.socket.as_ref().and_then(|socket| rings::statistics(socket).ok()) else {
            return;
        };
        self.kernel = report::Kernel {
            rx_dropped: statistics.rx_dropped,
            rx_ring_full: statistics.rx_ring_full,
            fill_ring_empty: statistics.rx_fill_ring_empty_descs.saturating_sub(self.fill_ring_empty_before),
            rx_invalid_descs: statistics.rx_invalid_descs,
        };
    }

    /// Ignores how often the FILL ring was empty so far: packets can arrive only from now on.
    pub fn begin_receiving(&mut self) {
        self.refresh_kernel();
        self.fill_ring_empty_before += self.kernel.fill_ring_empty;
    }

    /// Starts the accounting of packets redirected to this lane.
    pub fn arrivals(&self) -> Arrivals {
        Arrivals::new(u64::from(self.posted) + ROUND)
    }

    /// Reads the lane's counters for [`arrivals`](Self::arrivals). `redirected` is the XDP
    /// program's counter, which must be read first.
    pub fn read(&mut self, redirected: u64) -> Reading {
        let emptied = self.shared.counters.emptied.get();
        let received = self.shared.counters.received.get();
        self.refresh_kernel();
        Reading {
            redirected,
            emptied,
            accounted: received + self.kernel.rx_dropped + self.kernel.rx_ring_full,
        }
    }

    /// The report of the lane: counters of all its packets.
    pub fn report(&mut self, xdp: report::Xdp) -> report::Lane {
        self.refresh_kernel();
        let counters = &self.shared.counters;
        let Tally { total, free, kernel, lent, tx } = counters.tally();
        report::Lane {
            queue: self.queue,
            core: self.core,
            received: counters.received.get(),
            bytes: counters.bytes.get(),
            dropped: BTreeMap::from([("frame_owner".to_owned(), counters.frame_owner.get())]),
            unparsed: counters.unparsed.get(),
            cut: counters.cut.get(),
            batches: counters.batches.get(),
            busy_ns: xfan_shm::clock::ticks_to_ns(counters.busy_ticks.get()),
            sleeps: counters.sleeps.get(),
            kernel: self.kernel,
            unaccounted: 0,
            xdp,
            // Published between batches, when the lane itself has none.
            frames: report::Frames { total, free, kernel, lane: 0, lent, tx },
        }
    }

    /// The report of the lane about one group. `port`: the name of its port.
    pub fn report_of(&self, group: GroupId, port: &str) -> report::GroupLane {
        let mut report =
            report::GroupLane { port: port.to_owned(), queue: self.queue, ..report::GroupLane::default() };
        if let Some(counters) = self.shared.groups.get(group.index()) {
            report.delivered = counters.delivered.get();
            report.dropped = BTreeMap::from([
                ("ring_full".to_owned(), counters.ring_full.get()),
                ("no_worker".to_owned(), counters.no_worker.get()),
            ]);
        }
        report
    }
}

impl Drop for LaneHandle {
    /// Stops the lane, also if starting the other lanes failed.
    fn drop(&mut self) {
        self.stop();
    }
}
