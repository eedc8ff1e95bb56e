//! The receiving end of a worker: its rings, and the packets that the current batch holds.

use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use xfan_shm::Descriptor;
use xfan_shm::clock::{BusyMeter, ticks};
use xfan_shm::ids::LaneId;
use xfan_shm::layout::{Down, Phase, SharedRing, Up};
use xfan_shm::ring::Consumer;
use xfan_shm::segment::Mapping;

use crate::MAX_BATCH;
use crate::error::RecvError;

/// The rings of a worker, one for each lane, and the memory that their descriptors point into.
pub(crate) struct Receiver {
    // Fixed while the worker is a member.
    umem: Mapping,
    pub(crate) down: Down,
    pub(crate) up: Up,
    ports: Vec<String>,
    batch: usize,
    // Changes with every batch.
    rings: Vec<Consumer<SharedRing>>,
    descriptors: Box<[Descriptor; MAX_BATCH]>,
    /// The lane of the current batch. Without a batch: the lane whose ring is scanned first.
    lane: usize,
    heartbeat: u64,
    meter: BusyMeter,
    // What `leave_open` left: this many packets of `lane`, and when the scan that found them began.
    open: u32,
    open_since: u64,
}

impl Receiver {
    /// The receiving end of `lanes` rings. `batch` is the largest number of packets in a batch.
    pub(crate) fn new(
        umem: Mapping,
        down: Down,
        up: Up,
        lanes: u32,
        ports: Vec<String>,
        batch: usize,
    ) -> Self {
        let rings = (0..lanes).map(|lane| Consumer::new(SharedRing::new(&down, &up, LaneId(lane)))).collect();
        Receiver {
            umem,
            down,
            up,
            ports,
            batch,
            rings,
            descriptors: Box::new([Descriptor::default(); MAX_BATCH]),
            lane: 0,
            heartbeat: 0,
            meter: BusyMeter::new(),
            open: 0,
            open_since: 0,
        }
    }

    /// Scans the rings once, beginning with the one whose turn it is. Copies the descriptors of the
    /// first ring that is not empty, at most a batch, and checks that they point into the packet
    /// memory. Returns how many it copied.
    #[inline]
    pub(crate) fn scan(&mut self) -> Result<u32, RecvError> {
        let lanes = self.rings.len();
        for turn in 0..lanes {
            let lane = self.lane + turn;
            let lane = if lane < lanes { lane } else { lane - lanes };
            let (umem, umem_bytes) = (self.umem.address().as_ptr(), self.umem.length());
            let mut corrupt = None;
            let copies = &mut self.descriptors[..self.batch];
            #[allow(clippy::cast_possible_truncation)] // at most MAX_BATCH
            let limit = copies.len() as u32;
            let count = self.rings[lane].scan(limit, |number, descriptor| {
                let Descriptor { offset, length, .. } = descriptor;
                if u64::from(offset.0) + u64::from(length) > umem_bytes as u64 {
                    corrupt = Some((offset, length));
                    return false; // the packets before this one are valid
                }
                prefetch(umem.wrapping_add(offset.index()));
                if let Some(copy) = copies.get_mut(number) {
                    *copy = descriptor;
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

    /// Whether no ring holds a packet.
    pub(crate) fn is_empty(&self) -> bool {
        self.rings.iter().all(|ring| ring.peek(0).is_none())
    }

    /// Shows the dispatcher that the receive loop of this worker still runs.
    #[inline(always)]
    pub(crate) fn beat(&mut self) {
        self.heartbeat += 1;
        self.up.heartbeat().store(self.heartbeat, Ordering::Relaxed);
    }

    /// Commits all `count` packets of the current batch, and passes the turn to the next lane.
    /// `start` is when the scan that found them began, in ticks.
    #[inline(always)]
    pub(crate) fn commit(&mut self, start: u64, count: u32) {
        self.commit_first(start, count);
        self.lane = if self.lane + 1 < self.rings.len() { self.lane + 1 } else { 0 };
    }

    /// Commits the first `count` packets of the current batch. The next scan begins with the same
    /// lane, and so with the packets that remain. Returns the current time in ticks: busy time is
    /// accounted for up to that point.
    #[inline(always)]
    pub(crate) fn commit_first(&mut self, start: u64, count: u32) -> u64 {
        self.rings[self.lane].commit(count);
        self.open = 0;
        let end = ticks();
        self.meter.add(start, end, count);
        self.up.busy_ticks().store(self.meter.busy_ticks(), Ordering::Relaxed);
        end
    }

    /// Remembers the first `count` packets of the current batch for
    /// [`commit_open`](Self::commit_open).
    #[inline(always)]
    pub(crate) fn leave_open(&mut self, start: u64, count: u32) {
        (self.open, self.open_since) = (count, start);
    }

    /// Commits the first `packets` of those that [`leave_open`](Self::leave_open) remembered. If
    /// there are fewer, commits nothing and returns their number as the error.
    #[inline(always)]
    pub(crate) fn commit_open(&mut self, packets: usize) -> Result<(), usize> {
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

    /// First byte of the packet memory.
    #[inline(always)]
    pub(crate) fn umem(&self) -> NonNull<u8> {
        self.umem.address()
    }

    /// See [`Worker::is_evicted`](crate::Worker::is_evicted).
    #[inline(always)]
    pub(crate) fn is_evicted(&self) -> bool {
        // Acquire: orders the reads of packet data before this call before the load of the phase.
        // The dispatcher sets the phase (`Down::set_phase`) before it reuses the frames. So if the
        // phase is not `Over`, the data that was read is that of this worker's packets.
        fence(Ordering::Acquire);
        self.down.phase() == Phase::Over
    }

    /// Number of lanes.
    pub(crate) fn lanes(&self) -> usize {
        self.rings.len()
    }

    /// The lane of the current batch.
    #[inline(always)]
    pub(crate) fn lane(&self) -> LaneId {
        lane_id(self.lane)
    }

    /// Names of the interfaces that the descriptors' port numbers refer to.
    pub(crate) fn ports(&self) -> &[String] {
        &self.ports
    }

    /// The first `count` descriptors of the current batch.
    #[inline(always)]
    pub(crate) fn descriptors(&self, count: u32) -> &[Descriptor] {
        &self.descriptors[..count as usize]
    }
}

/// The lane of the ring with this index.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // the number of rings is a u32
fn lane_id(ring: usize) -> LaneId {
    LaneId(ring as u32)
}

/// Prefetches the cache line at `address`, which need not be valid: a prefetch does not
/// dereference it.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the intrinsic requires SSE, which is part of x86-64. It accepts any address,
        // because a prefetch cannot fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
