//! The worker: its rings, and the loop that finds packets in them.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use xfan_shm::Descriptor;
use xfan_shm::clock::{BusyMeter, ticks};
use xfan_shm::doorbell::Sleeper;
use xfan_shm::ids::{LaneId, UmemOffset};
use xfan_shm::layout::{COUNTERS, Down, Phase, SharedRing, Up, counter_name_is_valid};
use xfan_shm::protocol::{self, Attached, ProtocolError, Request};
use xfan_shm::ring::Consumer;
use xfan_shm::segment::Mapping;

use crate::attach::{AttachError, Builder};
use crate::batch::Batch;
use crate::counter::{Counter, CounterError};
use crate::idle::{self, Idle, Step, Wake};
use crate::leave::Leave;
use crate::{MAX_BATCH, Received};

/// After asking to leave: how long to wait for the dispatcher's word when no packet comes any more.
const FAREWELL: Duration = Duration::from_secs(2);

/// A member of a dispatcher's group, and the packets that come to it.
pub struct Worker {
    // Known since the attach.
    builder: Builder,
    member: String,
    ports: Vec<String>,
    core: Option<usize>,
    batch: usize,
    umem: Mapping,
    down: Down,
    up: Up,
    published: Vec<String>,
    // Changes with every batch.
    rings: Vec<Consumer<SharedRing>>,
    descriptors: Box<[Descriptor; MAX_BATCH]>,
    /// The ring to look into first; while there is a batch, the one it is from.
    lane: usize,
    heartbeat: u64,
    meter: BusyMeter,
    // For when there is nothing to do.
    idle: Idle,
    sleeper: Sleeper,
    wakeups: u64,
    leave: Leave,
    // What `Batch::leave_open` left: so many packets of `lane`, and the ticks when the look for them began.
    open: u32,
    open_since: u64,
}

/// Why [`Worker::recv`] cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// The dispatcher has died or closed the connection. All its packets are committed.
    #[error("the dispatcher is gone: it died, or it ended this worker's membership")]
    PrimaryGone,
    /// The dispatcher has ended this worker's membership: it hung, or did not leave as it was told. Its packets are others' now; what was
    /// read of the last batch may be of other packets.
    #[error(
        "the dispatcher has ended this worker's membership, since it hung or did not leave when it was to; its packets have \
         gone to others"
    )]
    Evicted,
    /// A descriptor leads out of the packet memory. Nothing behind it in that lane can be received.
    #[error(
        "lane {lane} sent a corrupt descriptor: {length} bytes at offset {offset}, but the packet memory has {umem_bytes} bytes. \
         This is a fault of the dispatcher; please report it"
    )]
    Corrupt {
        /// The lane whose ring holds it.
        lane: LaneId,
        /// Where the packet is said to begin.
        offset: UmemOffset,
        /// How long it is said to be.
        length: u16,
        /// How long the packet memory is.
        umem_bytes: usize,
    },
    /// A system call failed.
    #[error("cannot {0}: {1}")]
    System(&'static str, #[source] io::Error),
}

/// What waiting came to.
enum Turn {
    /// So many packets, in a look that began at these ticks.
    Packets(u64, u32),
    Idle,
    Closed,
}

impl Worker {
    /// Attaches to the dispatcher that started this process, as the member that it was started for; the environment says
    /// which. Pins the calling thread to the core that the dispatcher names.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn attach() -> Result<Worker, AttachError> {
        Worker::builder().attach()
    }

    /// Attaches to the dispatcher behind the control socket `path`, as any vacant member.
    ///
    /// # Errors
    /// [`AttachError`]
    pub fn attach_to(path: impl Into<PathBuf>) -> Result<Worker, AttachError> {
        Worker::builder().socket(path).attach()
    }

    /// Attaches with more to say.
    pub fn builder() -> Builder {
        Builder::new()
    }

    #[allow(clippy::too_many_arguments)] // one caller
    pub(crate) fn new(
        builder: Builder,
        attached: Attached,
        umem: Mapping,
        down: Down,
        up: Up,
        control: OwnedFd,
        doorbell: OwnedFd,
        leave: Leave,
    ) -> Self {
        let rings = (0..attached.geometry.lanes)
            .map(|lane| Consumer::new(SharedRing::new(&down, &up, LaneId(lane))))
            .collect();
        Worker {
            batch: builder.batch,
            builder,
            member: attached.member,
            ports: attached.ports,
            core: attached.core,
            umem,
            down,
            up,
            published: Vec::new(),
            rings,
            descriptors: Box::new([Descriptor::default(); MAX_BATCH]),
            lane: 0,
            heartbeat: 0,
            meter: BusyMeter::new(),
            idle: Idle::new(attached.spin_ns, attached.yield_ns, control, doorbell),
            sleeper: Sleeper::default(),
            wakeups: 0,
            leave,
            open: 0,
            open_since: 0,
        }
    }

    /// After [`RecvError::PrimaryGone`] or [`RecvError::Evicted`]: attaches to the dispatcher that listens on the same socket now, or will
    /// within `patience`, as the member that it was if that can be had, else as any. Meanwhile the kernel has the traffic. For workers
    /// that came by themselves, and for those that a dispatcher started and that [survive](Self::survival) it.
    ///
    /// Counters are to be made anew.
    ///
    /// # Errors
    /// [`AttachError`]; [`AttachError::Leaving`] if a signal asked the worker to leave. It may be tried again.
    pub fn reattach(&mut self, patience: Duration) -> Result<(), AttachError> {
        *self = self.builder.clone().join_next(self.member.clone(), &self.leave, patience)?;
        Ok(())
    }

    /// How long a worker that a dispatcher started is to look for the next one when that is gone (`survive = true` in its
    /// configuration): the patience for [`reattach`](Self::reattach). None: it is to end then.
    pub fn survival(&self) -> Option<Duration> {
        self.builder.survival
    }

    /// The member it is, such as `default/0`.
    pub fn member(&self) -> &str {
        &self.member
    }

    /// The core that the thread which attached is pinned to, if any.
    pub fn core(&self) -> Option<usize> {
        self.core
    }

    /// Number of lanes that serve it.
    pub fn lanes(&self) -> usize {
        self.rings.len()
    }

    /// Names of the dispatcher's interfaces.
    pub fn ports(&self) -> &[String] {
        &self.ports
    }

    /// Publishes a counter with value 0: `xfan stats` shows it under its name.
    ///
    /// # Errors
    /// [`CounterError`] if the name is not possible or taken, or there are too many.
    pub fn counter(&mut self, name: &str) -> Result<Counter, CounterError> {
        if !counter_name_is_valid(name) {
            return Err(CounterError::Name(name.into()));
        }
        if self.published.iter().any(|taken| taken == name) {
            return Err(CounterError::Taken(name.into()));
        }
        let index = self.published.len();
        if index == COUNTERS {
            return Err(CounterError::Full(name.into()));
        }
        self.up.publish_counter(index, name);
        self.published.push(name.into());
        Ok(Counter::new(&self.up, index))
    }

    /// Returns the packets that are there, at most a batch, all from one lane; lanes take turns. If there are none, waits for
    /// `timeout`: spinning, yielding and sleeping for as long as the dispatcher's configuration says. With a timeout of
    /// zero it does none of these.
    ///
    /// Finding packets costs no system call, lock or allocation.
    ///
    /// # Errors
    /// [`RecvError`]
    #[inline]
    pub fn recv(&mut self, timeout: Duration) -> Result<Received<'_>, RecvError> {
        self.beat();
        if self.leave.is_due() {
            self.request_detach()?;
        }
        let start = ticks();
        let count = self.scan()?;
        // After the look: what it found may have come for the next worker in this place.
        if self.is_evicted() {
            return Err(RecvError::Evicted);
        }
        if count > 0 {
            self.idle.end();
            return Ok(Received::Packets(Batch::new(self, start, count)));
        }
        Ok(match self.wait(timeout)? {
            Turn::Packets(start, count) => Received::Packets(Batch::new(self, start, count)),
            Turn::Idle => Received::Idle,
            Turn::Closed => Received::Closed,
        })
    }

    /// Asks the dispatcher to let this worker go. Packets that are on their way still come: keep receiving until
    /// [`Received::Closed`], then drop the worker, and nothing is lost. Should the dispatcher not answer,
    /// that comes when no packet has come for 2 seconds. Asking again does nothing.
    ///
    /// # Errors
    /// [`RecvError::System`] if the request cannot be sent. If the dispatcher is gone, that is no error here:
    /// [`recv`](Self::recv) will tell.
    pub fn request_detach(&mut self) -> Result<(), RecvError> {
        if !self.leave.begin(ticks()) {
            return Ok(());
        }
        match protocol::send(self.idle.control(), &Request::Detach, &[]) {
            Ok(()) | Err(ProtocolError::Closed) => Ok(()),
            Err(ProtocolError::Io(error)) => Err(RecvError::System("ask the dispatcher to let go", error)),
            Err(other) => Err(RecvError::System("ask the dispatcher to let go", io::Error::other(other))),
        }
    }

    /// Gives back the first `packets` of those that [`Batch::leave_open`] left. If it left fewer, nothing happens, and the error
    /// says how many there are.
    #[doc(hidden)]
    #[inline]
    pub fn commit_open(&mut self, packets: usize) -> Result<(), usize> {
        let open = self.open;
        match u32::try_from(packets) {
            Ok(0) => Ok(()),
            Ok(packets) if packets == open => {
                self.commit(self.open_since, open);
                Ok(())
            }
            Ok(packets) if packets < open => {
                self.open_since = self.commit_first(self.open_since, packets);
                self.open = open - packets;
                Ok(())
            }
            _ => Err(open as usize),
        }
    }

    /// Looks into each ring once, beginning where it is due, and copies and checks what it finds in the first that is not
    /// empty. Returns how many these are.
    #[inline]
    fn scan(&mut self) -> Result<u32, RecvError> {
        let lanes = self.rings.len();
        for turn in 0..lanes {
            let lane = self.lane + turn;
            let lane = if lane < lanes { lane } else { lane - lanes };
            let (umem, umem_bytes) = (self.umem.address().as_ptr(), self.umem.length());
            let mut corrupt = None;
            let places = &mut self.descriptors[..self.batch];
            #[allow(clippy::cast_possible_truncation)] // at most MAX_BATCH
            let limit = places.len() as u32;
            let count = self.rings[lane].scan(limit, |number, descriptor| {
                let Descriptor { offset, length, .. } = descriptor;
                if u64::from(offset.0) + u64::from(length) > umem_bytes as u64 {
                    corrupt = Some((offset, length));
                    return false; // what came before it is good
                }
                prefetch(umem.wrapping_add(offset.index()));
                if let Some(place) = places.get_mut(number) {
                    *place = descriptor;
                }
                true
            });
            if let (0, Some((offset, length))) = (count, corrupt) {
                return Err(RecvError::Corrupt { lane: lane_id(lane), offset, length, umem_bytes });
            }
            if count > 0 {
                self.lane = lane;
                return Ok(count);
            }
        }
        Ok(0)
    }

    /// Waits until there are packets, no longer than `timeout`.
    #[inline(never)]
    fn wait(&mut self, timeout: Duration) -> Result<Turn, RecvError> {
        let entered = ticks();
        let limit = idle::ticks(timeout);
        loop {
            // Both are read before the rings: what was pushed before them is seen by this scan.
            let closing = self.down.phase() == Phase::Closing;
            let hung_up = self.idle.has_hung_up();
            let now = ticks();
            let count = self.scan()?;
            if self.is_evicted() {
                // Whoever asked to leave has left.
                let asked = self.leave.since().is_some();
                return if asked { Ok(Turn::Closed) } else { Err(RecvError::Evicted) };
            }
            if count > 0 {
                self.idle.end();
                return Ok(Turn::Packets(now, count));
            }
            let idle_since = self.idle.begin(now);
            if closing || self.farewell_is_over(now, idle_since) {
                return Ok(Turn::Closed);
            }
            if hung_up {
                let asked = self.leave.since().is_some();
                return if asked { Ok(Turn::Closed) } else { Err(RecvError::PrimaryGone) };
            }
            if self.idle.look(now).map_err(|error| RecvError::System("look at the control socket", error))? {
                continue;
            }
            let waited = now.saturating_sub(entered);
            if waited >= limit {
                return Ok(Turn::Idle);
            }
            match self.idle.step(now.saturating_sub(idle_since)) {
                Step::Spin => std::hint::spin_loop(),
                Step::Yield => std::thread::yield_now(),
                Step::Sleep => {
                    if self.sleep(idle::duration(limit - waited))? == Wake::Interrupted {
                        return Ok(Turn::Idle);
                    }
                }
            }
            self.beat();
            if self.leave.is_due() {
                self.request_detach()?;
            }
        }
    }

    /// Announces the sleep, looks once more, and sleeps if there is still nothing.
    fn sleep(&mut self, limit: Duration) -> Result<Wake, RecvError> {
        self.sleeper.announce(self.up.epoch());
        let idle =
            self.rings.iter().all(|ring| ring.peek(0).is_none()) && self.down.phase() == Phase::Running;
        let wake = if idle { self.idle.sleep(limit) } else { Ok(Wake::Other) };
        self.sleeper.awake(self.up.epoch());
        let wake = wake.map_err(|error| RecvError::System("sleep", error))?;
        if wake == Wake::Rung {
            self.wakeups += 1;
            self.up.wakeups().store(self.wakeups, Ordering::Relaxed);
        }
        Ok(wake)
    }

    /// Whether the dispatcher has been asked to let go, and neither it nor a packet has come for too long.
    fn farewell_is_over(&self, now: u64, idle_since: u64) -> bool {
        self.leave
            .since()
            .is_some_and(|since| now.saturating_sub(since.max(idle_since)) > idle::ticks(FAREWELL))
    }

    /// Shows the dispatcher that this worker goes round.
    #[inline(always)]
    fn beat(&mut self) {
        self.heartbeat += 1;
        self.up.heartbeat().store(self.heartbeat, Ordering::Relaxed);
    }

    /// Gives back all `count` packets of the current batch, found in a look that began at `start`; the next lane's turn.
    #[inline(always)]
    pub(crate) fn commit(&mut self, start: u64, count: u32) {
        self.commit_first(start, count);
        self.lane = if self.lane + 1 < self.rings.len() { self.lane + 1 } else { 0 };
    }

    /// Gives back the first `count` packets of the current batch. The lane stays the current one, whose next packets are those
    /// behind them. Returns the ticks until which the time is accounted for.
    #[inline(always)]
    pub(crate) fn commit_first(&mut self, start: u64, count: u32) -> u64 {
        self.rings[self.lane].commit(count);
        self.open = 0;
        let end = ticks();
        self.meter.add(start, end, count);
        self.up.busy_ticks().store(self.meter.busy_ticks(), Ordering::Relaxed);
        end
    }

    /// Remembers the first `count` packets of the current batch for [`commit_open`](Self::commit_open).
    #[inline(always)]
    pub(crate) fn leave_open(&mut self, start: u64, count: u32) {
        (self.open, self.open_since) = (count, start);
    }

    #[inline(always)]
    pub(crate) fn umem(&self) -> NonNull<u8> {
        self.umem.address()
    }

    /// Whether the dispatcher has ended its membership, so that its packets are others' by now. What was read of packets before this
    /// said no, was read of them.
    #[inline(always)]
    pub fn is_evicted(&self) -> bool {
        // What was read of packets before this is not read after it.
        fence(Ordering::Acquire);
        self.down.phase() == Phase::Over
    }

    /// The lane of the current batch.
    #[inline(always)]
    pub(crate) fn lane(&self) -> LaneId {
        lane_id(self.lane)
    }

    /// The first `count` descriptors of the current batch.
    #[inline(always)]
    pub(crate) fn descriptors(&self, count: u32) -> &[Descriptor] {
        &self.descriptors[..count as usize]
    }
}

/// The lane of the ring with this index.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // there are as many rings as a u32 says
fn lane_id(ring: usize) -> LaneId {
    LaneId(ring as u32)
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("member", &self.member)
            .field("lanes", &self.lanes())
            .finish_non_exhaustive()
    }
}

/// Asks for the line at `address` to be brought near. Any address will do: it is not dereferenced.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch does not fault, and every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
