//! A batch of packets from one lane, and a packet in it.

use std::cell::Cell;
use std::fmt;
use std::ptr::NonNull;
use std::slice;
use std::time::Duration;

use xfan_shm::Descriptor;
use xfan_shm::clock::{monotonic_ns, stamped_ns};
use xfan_shm::ids::{LaneId, PortId};

use crate::worker::Worker;

/// Packets that one lane received, in order of reception: at least one.
///
/// [`commit`](Self::commit) gives them back, [`commit_first`](Self::commit_first) some of them. A batch that is dropped instead gives nothing back; the next
/// [`Worker::recv`] returns the same packets again, and perhaps more.
#[must_use = "packets that are not committed come again"]
pub struct Batch<'a> {
    worker: &'a mut Worker,
    umem: NonNull<u8>,
    /// Ticks when the look for packets began.
    start: u64,
    count: u32,
    /// Monotonic nanoseconds, taken when the first packet's time is asked for.
    now: Cell<Option<u64>>,
}

impl<'a> Batch<'a> {
    /// The first `count` descriptors in the worker's array, which were checked against its packet memory.
    #[inline(always)]
    pub(crate) fn new(worker: &'a mut Worker, start: u64, count: u32) -> Self {
        let umem = worker.umem();
        Batch { worker, umem, start, count, now: Cell::new(None) }
    }

    /// Whether these packets are still this worker's. A worker that stood still for longer than the dispatcher's `hang_timeout`, or did
    /// not leave when it was to, is evicted, its packets go to others, and their memory gets new ones. What was read before this said
    /// yes was read of these packets: ask before acting on it, where a mistake would matter.
    #[inline]
    pub fn is_current(&self) -> bool {
        !self.worker.is_evicted()
    }

    /// Gives all packets back: the dispatcher may use their memory again.
    #[inline]
    pub fn commit(self) {
        self.worker.commit(self.start, self.count);
    }

    /// Gives the first `packets` back, or all if there are not more; the others come again with the next [`Worker::recv`].
    #[inline]
    pub fn commit_first(self, packets: usize) {
        match u32::try_from(packets) {
            Ok(0) => {}
            Ok(packets) if packets < self.count => {
                self.worker.commit_first(self.start, packets);
            }
            _ => self.commit(),
        }
    }

    /// Lets the worker go and commits nothing: for callers that cannot keep a batch, as in C. [`Worker::commit_open`] gives the
    /// first `packets` back, or some of them.
    #[doc(hidden)]
    #[inline]
    pub fn leave_open(self, packets: usize) {
        let packets = u32::try_from(packets).unwrap_or(u32::MAX).min(self.count);
        self.worker.leave_open(self.start, packets);
    }

    /// Number of packets.
    #[inline]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Never: a batch has at least one packet.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The lane that received them, which is to say the RX queue, counted from 0 over all ports.
    #[inline]
    pub fn lane(&self) -> LaneId {
        self.worker.lane()
    }

    /// The packets, in order of reception.
    #[inline]
    pub fn iter(&self) -> Packets<'_> {
        Packets { descriptors: self.worker.descriptors(self.count).iter(), batch: self }
    }

    /// The batch's point in time that packets' times are reckoned from.
    fn now(&self) -> u64 {
        let now = self.now.get().unwrap_or_else(monotonic_ns);
        self.now.set(Some(now));
        now
    }
}

impl fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("lane", &self.lane()).field("packets", &self.len()).finish()
    }
}

impl<'b> IntoIterator for &'b Batch<'_> {
    type Item = Packet<'b>;
    type IntoIter = Packets<'b>;

    #[inline]
    fn into_iter(self) -> Packets<'b> {
        self.iter()
    }
}

/// The packets of a batch, one after the other.
#[derive(Clone, Debug)]
pub struct Packets<'b> {
    descriptors: slice::Iter<'b, Descriptor>,
    batch: &'b Batch<'b>,
}

impl<'b> Iterator for Packets<'b> {
    type Item = Packet<'b>;

    #[inline(always)]
    fn next(&mut self) -> Option<Packet<'b>> {
        let descriptor = self.descriptors.next()?;
        Some(Packet { descriptor, batch: self.batch })
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.descriptors.size_hint()
    }
}

impl ExactSizeIterator for Packets<'_> {}

/// A packet, where the network card put it.
#[derive(Clone, Copy)]
pub struct Packet<'b> {
    descriptor: &'b Descriptor,
    batch: &'b Batch<'b>,
}

impl<'b> Packet<'b> {
    /// Its bytes, from the Ethernet header on, without the frame check sequence.
    #[inline(always)]
    pub fn data(&self) -> &'b [u8] {
        let Descriptor { offset, length, .. } = *self.descriptor;
        // SAFETY: `offset + length` is within the mapped packet memory, as `Worker::scan` checked for every
        // descriptor of a batch on this private copy of it. The batch borrows the worker, which owns the mapping; the
        // dispatcher leaves a frame alone until it is committed, which consumes the batch that this borrows.
        unsafe { slice::from_raw_parts(self.batch.umem.add(offset.index()).as_ptr(), usize::from(length)) }
    }

    /// The hash of its flow, equal for both directions. The dispatcher's key goes into it, so it differs from one start of the
    /// dispatcher to the next.
    #[inline]
    pub fn hash(&self) -> u32 {
        self.descriptor.hash
    }

    /// The lane that received it, as in [`Batch::lane`].
    #[inline]
    pub fn lane(&self) -> LaneId {
        self.batch.lane()
    }

    /// The interface that it came in by, as an index into [`Worker::ports`].
    #[inline]
    pub fn port(&self) -> PortId {
        self.descriptor.port
    }

    /// The name of the interface that it came in by, such as `eth1`.
    pub fn port_name(&self) -> &'b str {
        self.batch.worker.ports().get(self.port().index()).map_or("?", String::as_str)
    }

    /// When the dispatcher received it, by `CLOCK_MONOTONIC`: a multiple of 1,024 ns, up to 2 µs
    /// early. All packets of one batch of the dispatcher, 64 at most, have the same time. Within a
    /// lane times never decrease, except that redelivered packets keep theirs
    /// ([`is_redelivered`](Self::is_redelivered)). Between lanes there is no order.
    ///
    /// The packet carries the low bits. The first call in a batch reads the clock to complete them.
    /// So the time is right if the packet has waited for less than 73 minutes. Otherwise it is late
    /// by a multiple of 73.3 minutes.
    #[inline]
    pub fn time(&self) -> Duration {
        Duration::from_nanos(stamped_ns(self.descriptor.time, self.batch.now()))
    }

    /// Whether the dispatcher could read a 5-tuple. If not, the packet is no IP, or cut off, and
    /// [`hash`](Self::hash) is over what addresses there are.
    #[inline]
    pub fn is_parsed(&self) -> bool {
        self.descriptor.flags & Descriptor::UNPARSED == 0
    }

    /// Whether [`data`](Self::data) is shorter than the packet's IP length. The packet was cut on
    /// its way to this host, or by the network card's driver. The dispatcher counts and reports
    /// that.
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.descriptor.flags & Descriptor::CUT != 0
    }

    /// Whether another worker had this packet before, and is gone without having committed it: it may have read it, and done
    /// with it what this one is about to do.
    #[inline]
    pub fn is_redelivered(&self) -> bool {
        self.descriptor.flags & Descriptor::REDELIVERED != 0
    }
}

impl fmt::Debug for Packet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet")
            .field("lane", &self.lane())
            .field("port", &self.port_name())
            .field("length", &self.descriptor.length)
            .field("hash", &self.hash())
            .finish()
    }
}
