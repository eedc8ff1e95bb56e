//! A batch of packets from one lane, and a packet in it.

use std::cell::Cell;
use std::fmt;
use std::ptr::NonNull;
use std::slice;
use std::time::Duration;

use xfan_shm::Descriptor;
use xfan_shm::clock::{monotonic_ns, stamped_ns};
use xfan_shm::ids::{LaneId, PortId};

use crate::receiver::Receiver;

/// What [`Worker::recv`](crate::Worker::recv) returned.
#[derive(Debug)]
#[must_use = "packets that are not committed come again"]
pub enum Received<'a> {
    /// At least one packet.
    Packets(Batch<'a>),
    /// No packet arrived within the timeout, or a signal interrupted the sleep. Call again.
    Idle,
    /// No more packets will arrive, and all that arrived are committed. Drop the worker.
    Closed,
}

/// Packets that one lane received, in order of reception: at least one.
///
/// [`commit`](Self::commit) gives all of them back, [`commit_first`](Self::commit_first) some of
/// them. Dropping the batch gives nothing back: the next [`Worker::recv`](crate::Worker::recv)
/// returns the same packets again, perhaps followed by more.
///
/// # Examples
///
/// ```no_run
/// # use std::time::Duration;
/// # use xfan_worker::{Received, Worker};
/// # let mut worker = Worker::attach()?;
/// if let Received::Packets(batch) = worker.recv(Duration::from_millis(100))? {
///     for packet in &batch {
///         println!("{} bytes on {}", packet.data().len(), packet.port_name());
///     }
///     batch.commit();
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "packets that are not committed come again"]
pub struct Batch<'a> {
    receiver: &'a mut Receiver,
    umem: NonNull<u8>,
    /// When the scan that found the packets began, in ticks.
    start: u64,
    count: u32,
    /// Monotonic nanoseconds, read when the time of a packet is first asked for.
    now: Cell<Option<u64>>,
}

impl<'a> Batch<'a> {
    /// A batch of the receiver's first `count` descriptors, which [`Receiver::scan`] has checked
    /// against the packet memory.
    #[inline(always)]
    pub(crate) fn new(receiver: &'a mut Receiver, start: u64, count: u32) -> Self {
        let umem = receiver.umem();
        Batch { receiver, umem, start, count, now: Cell::new(None) }
    }

    /// Whether these packets still belong to this worker.
    ///
    /// The dispatcher evicts a worker that hangs for longer than `hang_timeout`, or that does not
    /// leave when asked to. It then gives the packets to other workers and reuses their frames.
    /// If this returns `true`, all data read from the batch so far was data of these packets.
    /// Check it after reading and before acting on the data, where acting on other data would do
    /// harm.
    #[inline]
    pub fn is_current(&self) -> bool {
        !self.receiver.is_evicted()
    }

    /// Commits all packets: the dispatcher may reuse their frames.
    #[inline]
    pub fn commit(self) {
        self.receiver.commit(self.start, self.count);
    }

    /// Commits the first `packets`, or all if the batch has no more than that. The next
    /// [`Worker::recv`](crate::Worker::recv) returns the others again, first.
    ///
    /// # Examples
    ///
    /// Commit what is finished, and receive the rest again:
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use xfan_worker::{Packet, Received, Worker};
    /// # fn accepted(_: Packet<'_>) -> bool { true }
    /// # let mut worker = Worker::attach()?;
    /// if let Received::Packets(batch) = worker.recv(Duration::from_millis(100))? {
    ///     let done = batch.iter().take_while(|packet| accepted(*packet)).count();
    ///     batch.commit_first(done);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn commit_first(self, packets: usize) {
        match u32::try_from(packets) {
            Ok(0) => {}
            Ok(packets) if packets < self.count => {
                self.receiver.commit_first(self.start, packets);
            }
            _ => self.commit(),
        }
    }

    /// Releases the borrow of the worker and commits nothing, for callers that cannot keep a batch,
    /// such as C. [`Worker::commit_open`](crate::Worker::commit_open) commits the first `packets`
    /// later, at once or in parts.
    #[doc(hidden)]
    #[inline]
    pub fn leave_open(self, packets: usize) {
        let packets = u32::try_from(packets).unwrap_or(u32::MAX).min(self.count);
        self.receiver.leave_open(self.start, packets);
    }

    /// Number of packets, at least 1.
    #[inline]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Always `false`: a batch has at least one packet.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The lane that received the packets. Lanes correspond to RX queues, numbered from 0 across
    /// all ports.
    #[inline]
    pub fn lane(&self) -> LaneId {
        self.receiver.lane()
    }

    /// The packets, in order of reception.
    #[inline]
    pub fn iter(&self) -> Packets<'_> {
        Packets { descriptors: self.receiver.descriptors(self.count).iter(), batch: self }
    }

    /// The time, in monotonic nanoseconds, that completes the time stamps of the batch's packets.
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

/// Iterator over the packets of a [`Batch`], in order of reception.
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

/// A packet, read in place from the memory that the NIC or the kernel wrote it to.
///
/// # Examples
///
/// ```no_run
/// # use std::time::Duration;
/// # use xfan_worker::{Received, Worker};
/// use xfan_worker::packet;
///
/// # let mut worker = Worker::attach()?;
/// if let Received::Packets(batch) = worker.recv(Duration::from_millis(100))? {
///     for packet in &batch {
///         if let Some(parsed) = packet::Packet::parse(packet.data()) {
///             println!("{:?}: {} > {}", packet.time(), parsed.key.source, parsed.key.destination);
///         }
///     }
///     batch.commit();
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy)]
pub struct Packet<'b> {
    descriptor: &'b Descriptor,
    batch: &'b Batch<'b>,
}

impl<'b> Packet<'b> {
    /// The bytes of the packet, from the Ethernet header on, without the frame check sequence.
    #[inline(always)]
    pub fn data(&self) -> &'b [u8] {
        let Descriptor { offset, length, .. } = *self.descriptor;
        // SAFETY: `from_raw_parts` requires `length` initialised bytes within one allocation, which
        // nobody writes while the slice lives.
        // - In bounds: `Receiver::scan` checked `offset + length` against the length of the packet
        //   memory. `descriptor` is the private copy that it checked.
        // - Alive: the batch borrows the receiver, which owns the mapping.
        // - Not written: the dispatcher reuses a frame only once it is committed. Committing
        //   consumes the batch, which this slice borrows. An evicted worker is the exception that
        //   `Batch::is_current` documents.
        unsafe { slice::from_raw_parts(self.batch.umem.add(offset.index()).as_ptr(), usize::from(length)) }
    }

    /// Hash of the packet's flow, equal for both directions. It depends on the dispatcher's hash
    /// key, and so differs from one run of the dispatcher to the next.
    #[inline]
    pub fn hash(&self) -> u32 {
        self.descriptor.hash
    }

    /// The lane that received the packet, as in [`Batch::lane`].
    #[inline]
    pub fn lane(&self) -> LaneId {
        self.batch.lane()
    }

    /// The interface that received the packet, as an index into
    /// [`Worker::ports`](crate::Worker::ports).
    #[inline]
    pub fn port(&self) -> PortId {
        self.descriptor.port
    }

    /// Name of the interface that received the packet, such as `eth1`.
    pub fn port_name(&self) -> &'b str {
        self.batch.receiver.ports().get(self.port().index()).map_or("?", String::as_str)
    }

    /// When the dispatcher received the packet, by `CLOCK_MONOTONIC`. The time is a multiple of
    /// 1,024 ns and up to 2 µs early.
    ///
    /// All packets that the dispatcher received together, 64 at most, have the same time. Within a
    /// lane, times never decrease, except that redelivered packets keep theirs
    /// ([`is_redelivered`](Self::is_redelivered)). Between lanes there is no order.
    ///
    /// The packet carries the low bits of its time only. The first call in a batch reads the clock
    /// to complete them. The time is therefore right if the packet was received less than 73
    /// minutes ago. Otherwise it is late by a multiple of 73.3 minutes.
    #[inline]
    pub fn time(&self) -> Duration {
        Duration::from_nanos(stamped_ns(self.descriptor.time, self.batch.now()))
    }

    /// Whether the dispatcher could read a 5-tuple. If not, the packet is not IP, or it is cut off
    /// within its headers, and [`hash`](Self::hash) covers only the addresses that could be read.
    #[inline]
    pub fn is_parsed(&self) -> bool {
        self.descriptor.flags & Descriptor::UNPARSED == 0
    }

    /// Whether [`data`](Self::data) is shorter than the packet's IP length. Such a packet was cut
    /// on its way to this host, or by the NIC's driver. The dispatcher counts and reports these.
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.descriptor.flags & Descriptor::CUT != 0
    }

    /// Whether the packet was sent to another worker before, which was lost without committing it.
    /// That worker may have processed the packet already.
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
