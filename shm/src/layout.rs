//! The layout of a worker's two segments. This is the only module that turns mapped bytes into
//! atomics.
//!
//! ```text
//! down segment, written by the dispatcher   up segment, written by the worker
//!      0  header: magic, version, geometry       0  header, written by the dispatcher at first
//!    128  phase                                128  sleep epoch
//!   4096  ring of lane 0: slots × 16 bytes     256  heartbeat, busy time, wake-ups
//!         ring of lane 1                       384  consumer index of lane 0
//!         …                                    512  consumer index of lane 1, …
//!                                               …   published counters: 32 × (24-byte name, value)
//! ```
//!
//! Words with different writers or different readers are [`LINE`] bytes apart. The geometry is
//! validated once, when the segments are mapped. From then on a private copy of it is used.
//!
//! Only its writer may store to a segment. Every other process maps it read-only, where a store
//! raises SIGSEGV. Rust allows only relaxed atomic loads of read-only memory, so an Acquire load is
//! written as a relaxed load followed by an Acquire fence.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::ids::LaneId;
use crate::ring::{RingMemory, Slot};
use crate::segment::Mapping;

/// Version of the layout and of the protocol on the control socket. Both peers must have the same.
/// Increment it with every incompatible change of either.
pub const VERSION: u32 = 3;

/// Distance in bytes between words that different threads write: two 64-byte cache lines, because
/// processors prefetch lines in pairs.
pub const LINE: usize = 128;

/// Largest number of lanes that can send to a worker: more than the RX queues of most NICs. It
/// keeps the up segment below 40 KiB.
pub const MAX_LANES: u32 = 256;

/// Largest number of slots of a ring: 16 MiB of memory for each lane and worker.
pub const MAX_SLOTS: u32 = 1 << 20;

/// Number of counters that a worker can publish.
pub const COUNTERS: usize = 32;

/// Longest name of a published counter, in bytes: three words.
pub const COUNTER_NAME: usize = 24;

const DOWN_MAGIC: u64 = u64::from_le_bytes(*b"xfandown");
const UP_MAGIC: u64 = u64::from_le_bytes(*b"xfan up\0");
// Offsets in bytes. The rings begin at a page, because their lines have other readers than the
// header.
const RINGS: usize = 4096;
const PHASE: usize = LINE;
const EPOCH: usize = LINE;
const VITALS: usize = 2 * LINE;
const CONSUMERS: usize = 3 * LINE;
const COUNTER: usize = COUNTER_NAME + 8;

/// The numbers that determine the layout and the sizes of both segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// Number of lanes that send to the worker. Each has a ring of its own.
    pub lanes: u32,
    /// Number of slots of each ring, a power of two.
    pub slots: u32,
}

/// A segment cannot be mapped, or its header does not match the announced geometry.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The numbers of lanes or slots are out of range.
    #[error(
        "segments cannot hold {0} lanes of {1} slots: there must be 1 to {MAX_LANES} lanes, and the slots \
         a power of two from 8 to {MAX_SLOTS}"
    )]
    Geometry(u32, u32),
    /// The segment's header does not begin with the magic number.
    #[error("the {0} segment does not begin with its magic number: this is not an xfan segment")]
    Magic(&'static str),
    /// The segment was created by another version.
    #[error(
        "the {0} segment has version {1}, this program speaks version {VERSION}: use builds of the same release"
    )]
    Version(&'static str, u32),
    /// The segment's header differs from the geometry that the dispatcher announced on the control
    /// socket.
    #[error("the {0} segment is for {1:?}, the dispatcher announced {2:?}")]
    Mismatch(&'static str, Geometry, Geometry),
    /// The segment cannot be mapped.
    #[error("cannot map the {0} segment: {1}")]
    Map(&'static str, #[source] io::Error),
}

impl Geometry {
    /// Checks the numbers against the limits: 1 to [`MAX_LANES`] lanes, and a power of two of
    /// slots, from 8 to [`MAX_SLOTS`].
    ///
    /// # Errors
    /// [`LayoutError::Geometry`] if a number is out of range.
    ///
    /// # Examples
    ///
    /// ```
    /// use xfan_shm::layout::Geometry;
    ///
    /// assert!(Geometry { lanes: 2, slots: 8192 }.validated().is_ok());
    /// assert!(Geometry { lanes: 2, slots: 100 }.validated().is_err());
    /// ```
    pub fn validated(self) -> Result<Self, LayoutError> {
        let possible = (1..=MAX_LANES).contains(&self.lanes)
            && (8..=MAX_SLOTS).contains(&self.slots)
            && self.slots.is_power_of_two();
        if possible { Ok(self) } else { Err(LayoutError::Geometry(self.lanes, self.slots)) }
    }

    /// Size of a ring in bytes.
    fn ring_bytes(self) -> usize {
        self.slots as usize * size_of::<Slot>()
    }

    /// Size of the down segment in bytes.
    pub fn down_bytes(self) -> usize {
        RINGS + self.lanes as usize * self.ring_bytes()
    }

    /// Offset of the published counters in the up segment.
    fn counters(self) -> usize {
        CONSUMERS + self.lanes as usize * LINE
    }

    /// Size of the up segment in bytes.
    pub fn up_bytes(self) -> usize {
        self.counters() + COUNTERS * COUNTER
    }
}

/// The state of a worker's membership, which the dispatcher publishes in the down segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Packets keep arriving.
    Running,
    /// The packets in the rings are the last. The worker should commit them and disconnect.
    Closing,
    /// The worker is no longer a member. The packets in the rings go to other workers, and their
    /// frames will be overwritten.
    Over,
}

/// A mapped segment of known geometry.
#[derive(Clone, Debug)]
struct Segment {
    mapping: Arc<Mapping>,
    geometry: Geometry,
}

impl Segment {
    /// The atomic at byte `offset`, which is a constant of this module or computed from the
    /// geometry. Its bounds are checked in debug builds only: no offset depends on bytes that a
    /// peer can write.
    #[inline(always)]
    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= self.mapping.length());
        // SAFETY: `as_ref` requires a valid, aligned pointer to an initialised value.
        // - In bounds: every offset is less than the size that the geometry gives, and `Mapping`
        //   checked that the file has that size.
        // - Aligned: every offset is a multiple of 4, and a mapping begins at a page.
        // - Initialised: any bytes are a valid integer.
        // - Alive: the reference borrows `self`, which owns the mapping.
        // All processes access these words as atomics only.
        unsafe { self.mapping.address().add(offset).cast::<AtomicU32>().as_ref() }
    }

    /// Like [`u32_at`](Self::u32_at), for 8 bytes.
    #[inline(always)]
    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= self.mapping.length());
        // SAFETY: as in `u32_at`, with offsets that are multiples of 8.
        unsafe { self.mapping.address().add(offset).cast::<AtomicU64>().as_ref() }
    }

    fn write_header(&self, magic: u64) {
        self.u32_at(8).store(VERSION, Ordering::Relaxed);
        self.u32_at(12).store(self.geometry.lanes, Ordering::Relaxed);
        self.u32_at(16).store(self.geometry.slots, Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `check_header`. A process that sees the magic
        // number also sees the fields above.
        self.u64_at(0).store(magic, Ordering::Release);
    }

    fn check_header(&self, which: &'static str, magic: u64) -> Result<(), LayoutError> {
        if self.u64_at(0).load(Ordering::Relaxed) != magic {
            return Err(LayoutError::Magic(which));
        }
        // Acquire: pairs with the Release store in `write_header`.
        fence(Ordering::Acquire);
        let version = self.u32_at(8).load(Ordering::Relaxed);
        if version != VERSION {
            return Err(LayoutError::Version(which, version));
        }
        let geometry = Geometry {
            lanes: self.u32_at(12).load(Ordering::Relaxed),
            slots: self.u32_at(16).load(Ordering::Relaxed),
        };
        if geometry != self.geometry {
            return Err(LayoutError::Mismatch(which, geometry, self.geometry));
        }
        Ok(())
    }
}

/// The segment that the dispatcher writes and one worker reads.
#[derive(Clone, Debug)]
pub struct Down(Segment);

impl Down {
    /// For the dispatcher: maps a new segment for writing, and writes its header.
    ///
    /// # Errors
    /// [`LayoutError::Geometry`] if the geometry is out of range, [`LayoutError::Map`] if the
    /// segment cannot be mapped.
    pub fn create(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping = Mapping::read_write(fd, geometry.down_bytes())
            .map_err(|error| LayoutError::Map("down", error))?;
        let segment = Segment { mapping: Arc::new(mapping), geometry };
        segment.write_header(DOWN_MAGIC);
        Ok(Down(segment))
    }

    /// For the worker: maps the segment read-only, and checks its header.
    ///
    /// # Errors
    /// Any [`LayoutError`].
    pub fn open(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_only(fd, geometry.down_bytes()).map_err(|error| LayoutError::Map("down", error))?;
        let segment = Segment { mapping: Arc::new(mapping), geometry };
        segment.check_header("down", DOWN_MAGIC)?;
        Ok(Down(segment))
    }

    /// For the dispatcher: locks the segment in memory, so that no access to it faults. See
    /// [`Mapping::lock`].
    ///
    /// # Errors
    /// As [`Mapping::lock`].
    pub fn lock(&self) -> io::Result<()> {
        self.0.mapping.lock()
    }

    /// Keeps the segment in its pages. See [`Mapping::pin`].
    ///
    /// # Errors
    /// As [`Mapping::pin`].
    pub fn pin(&self) -> io::Result<OwnedFd> {
        self.0.mapping.pin()
    }

    /// For the dispatcher: sets the phase. A worker that sees it also sees everything that the
    /// caller published before.
    pub fn set_phase(&self, phase: Phase) {
        // Release: pairs with the Acquire fence in `phase`.
        self.0.u32_at(PHASE).store(phase as u32, Ordering::Release);
    }

    /// The current phase.
    #[inline]
    pub fn phase(&self) -> Phase {
        let phase = self.0.u32_at(PHASE).load(Ordering::Relaxed);
        // Acquire: pairs with the Release store in `set_phase`.
        fence(Ordering::Acquire);
        match phase {
            0 => Phase::Running,
            1 => Phase::Closing,
            _ => Phase::Over,
        }
    }
}

/// The segment that one worker writes and the dispatcher reads.
#[derive(Clone, Debug)]
pub struct Up(Segment);

impl Up {
    /// For the dispatcher: writes the header of a new segment, and maps it read-only.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare) and [`watch`](Self::watch).
    pub fn create(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        Self::prepare(&fd, geometry)?;
        Self::watch(fd, geometry)
    }

    /// For the dispatcher: writes the header of a new segment. The segment is no longer mapped when
    /// this returns.
    ///
    /// # Errors
    /// [`LayoutError::Geometry`] if the geometry is out of range, [`LayoutError::Map`] if the
    /// segment cannot be mapped.
    pub fn prepare(fd: impl AsFd, geometry: Geometry) -> Result<(), LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_write(fd, geometry.up_bytes()).map_err(|error| LayoutError::Map("up", error))?;
        Segment { mapping: Arc::new(mapping), geometry }.write_header(UP_MAGIC);
        Ok(())
    }

    /// For the dispatcher: maps the segment read-only.
    ///
    /// Check first that the worker has sealed the segment, with
    /// [`is_sealed_against_further_writers`](crate::segment::is_sealed_against_further_writers). As
    /// long as the worker can punch holes into it, it can make every access to the mapping take as
    /// long as it likes.
    ///
    /// # Errors
    /// [`LayoutError::Geometry`] if the geometry is out of range, [`LayoutError::Map`] if the
    /// segment cannot be mapped.
    pub fn watch(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_only(fd, geometry.up_bytes()).map_err(|error| LayoutError::Map("up", error))?;
        Ok(Up(Segment { mapping: Arc::new(mapping), geometry }))
    }

    /// For the worker: maps the segment for writing, and checks its header.
    ///
    /// # Errors
    /// Any [`LayoutError`].
    pub fn open(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_write(fd, geometry.up_bytes()).map_err(|error| LayoutError::Map("up", error))?;
        let segment = Segment { mapping: Arc::new(mapping), geometry };
        segment.check_header("up", UP_MAGIC)?;
        Ok(Up(segment))
    }

    /// For the dispatcher: locks the segment in memory, so that no access to it faults. See
    /// [`Mapping::lock`].
    ///
    /// # Errors
    /// As [`Mapping::lock`].
    pub fn lock(&self) -> io::Result<()> {
        self.0.mapping.lock()
    }

    /// Keeps the segment in its pages. See [`Mapping::pin`].
    ///
    /// # Errors
    /// As [`Mapping::pin`].
    pub fn pin(&self) -> io::Result<OwnedFd> {
        self.0.mapping.pin()
    }

    /// The worker's sleep epoch, see [`doorbell`](crate::doorbell).
    #[inline(always)]
    pub fn epoch(&self) -> &AtomicU32 {
        self.0.u32_at(EPOCH)
    }

    /// A number that grows with every iteration of the worker's receive loop, idle or not.
    #[inline(always)]
    pub fn heartbeat(&self) -> &AtomicU64 {
        self.0.u64_at(VITALS)
    }

    /// Busy time of the worker, in [`clock::ticks`](crate::clock::ticks).
    #[inline(always)]
    pub fn busy_ticks(&self) -> &AtomicU64 {
        self.0.u64_at(VITALS + 8)
    }

    /// How often the doorbell woke the worker.
    #[inline(always)]
    pub fn wakeups(&self) -> &AtomicU64 {
        self.0.u64_at(VITALS + 16)
    }

    /// The name of published counter `index`, as the three words of its bytes, and its value.
    ///
    /// # Panics
    /// If `index` is [`COUNTERS`] or more.
    pub fn counter(&self, index: usize) -> ([&AtomicU64; 3], &AtomicU64) {
        assert!(index < COUNTERS, "counter {index} of {COUNTERS}");
        let at = self.0.geometry.counters() + index * COUNTER;
        let word = |n: usize| self.0.u64_at(at + n * 8);
        ([word(0), word(1), word(2)], word(3))
    }

    /// For the worker: publishes counter `index` under `name`, with value 0. The dispatcher ignores
    /// a counter whose name [is not valid](counter_name_is_valid).
    ///
    /// # Panics
    /// If `index` is [`COUNTERS`] or more, or if the name is longer than [`COUNTER_NAME`] bytes.
    pub fn publish_counter(&self, index: usize, name: &str) {
        let mut bytes = [0; COUNTER_NAME];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let (words, value) = self.counter(index);
        value.store(0, Ordering::Relaxed);
        // The first word is stored last, so a process that sees a name sees all of it.
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)).rev() {
            // Release: pairs with the Acquire fence in `published_counters`.
            word.store(u64::from_le_bytes(bytes.try_into().unwrap_or_default()), Ordering::Release);
        }
    }

    /// The counters published so far, by name. Counters with an invalid name are left out, so every
    /// name is safe to print, whatever the worker wrote.
    pub fn published_counters(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        (0..COUNTERS).filter_map(|index| {
            let (words, value) = self.counter(index);
            let bytes: Vec<u8> = words
                .iter()
                .flat_map(|word| {
                    let bytes = word.load(Ordering::Relaxed).to_le_bytes();
                    // Acquire: pairs with the Release stores in `publish_counter`.
                    fence(Ordering::Acquire);
                    bytes
                })
                .take_while(|byte| *byte != 0)
                .collect();
            let name = String::from_utf8(bytes).ok().filter(|name| counter_name_is_valid(name))?;
            Some((name, value.load(Ordering::Relaxed)))
        })
    }
}

/// Whether a counter may have that name: 1 to [`COUNTER_NAME`] characters of `a-z`, `0-9` and `_`.
pub fn counter_name_is_valid(name: &str) -> bool {
    (1..=COUNTER_NAME).contains(&name.len())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// The ring between one lane and one worker, in the worker's two segments.
#[derive(Debug)]
pub struct SharedRing {
    slots: NonNull<Slot>,
    consumer: NonNull<AtomicU32>,
    /// Number of slots, a power of two, minus one.
    mask: u32,
    /// Keeps the memory mapped.
    _mappings: (Arc<Mapping>, Arc<Mapping>),
}

// SAFETY: a value may move to another thread if that thread may use all it owns. The pointers point
// to atomics, which any thread may access, in mappings that this value keeps alive.
unsafe impl Send for SharedRing {}

impl SharedRing {
    /// The ring between `lane` and the worker.
    ///
    /// # Panics
    /// If the segments differ in geometry, or if `lane` is not less than its number of lanes.
    pub fn new(down: &Down, up: &Up, lane: LaneId) -> Self {
        let geometry = down.0.geometry;
        assert!(geometry == up.0.geometry && lane.0 < geometry.lanes, "lane {lane} of {geometry:?}");
        let ring = RINGS + lane.index() * geometry.ring_bytes();
        // SAFETY: `add` requires that the result stays within the mapping: `ring` plus the size of
        // a ring is at most `down_bytes`, and `Mapping` checked that the file has that size.
        let slots = unsafe { down.0.mapping.address().add(ring) }.cast();
        let consumer = NonNull::from(up.0.u32_at(CONSUMERS + lane.index() * LINE));
        SharedRing {
            slots,
            consumer,
            mask: geometry.slots - 1,
            _mappings: (down.0.mapping.clone(), up.0.mapping.clone()),
        }
    }
}

impl RingMemory for SharedRing {
    #[inline(always)]
    fn slots(&self) -> u32 {
        self.mask + 1
    }

    #[inline(always)]
    fn slot(&self, position: u32) -> &Slot {
        // SAFETY: `add` and `as_ref` require a valid, aligned pointer.
        // - In bounds: the masked position is the number of one of the ring's slots.
        // - Aligned: a mapping begins at a page, and a ring at a multiple of 128 bytes.
        // - Initialised: a slot consists of atomic integers, for which any bytes are valid.
        // - Alive: `_mappings` owns the down segment.
        unsafe { self.slots.add((position & self.mask) as usize).as_ref() }
    }

    #[inline(always)]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: `as_ref` requires a valid pointer: it was made from a reference into the up
        // segment, which `_mappings` owns.
        unsafe { self.consumer.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::UmemOffset;
    use crate::ring::{Consumer, Producer};
    use crate::{Descriptor, segment};

    const GEOMETRY: Geometry = Geometry { lanes: 3, slots: 8 };

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn both_ends_see_the_same_rings_counters_and_phase() {
        let (down_fd, up_fd) = (
            segment::create("down", GEOMETRY.down_bytes()).unwrap(),
            segment::create("up", GEOMETRY.up_bytes()).unwrap(),
        );
        let (down, up) = (Down::create(&down_fd, GEOMETRY).unwrap(), Up::create(&up_fd, GEOMETRY).unwrap());
        let (their_down, their_up) =
            (Down::open(&down_fd, GEOMETRY).unwrap(), Up::open(&up_fd, GEOMETRY).unwrap());
        for lane in 0..3 {
            let mut producer = Producer::new(SharedRing::new(&down, &up, LaneId(lane)));
            let mut consumer = Consumer::new(SharedRing::new(&their_down, &their_up, LaneId(lane)));
            for n in 0..20 {
                let sent = Descriptor { offset: UmemOffset(n), hash: lane, ..Descriptor::default() };
                assert!(producer.push(sent));
                assert_eq!(consumer.peek(0), Some(sent));
                consumer.commit(1);
                assert_eq!(producer.take_back(|_| ()), Ok(1));
            }
        }
        assert_eq!(their_down.phase(), Phase::Running);
        down.set_phase(Phase::Closing);
        assert_eq!(their_down.phase(), Phase::Closing);
        their_up.publish_counter(0, "alerts");
        their_up.publish_counter(1, "a_name_of_24_characters_");
        their_up.publish_counter(2, "no blanks");
        their_up.counter(0).1.store(17, Ordering::Relaxed);
        let seen: Vec<_> = up.published_counters().collect();
        assert_eq!(seen, [("alerts".into(), 17), ("a_name_of_24_characters_".into(), 0)]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn mismatched_segments_are_refused_with_a_reason() {
        let fd = segment::create("down", GEOMETRY.down_bytes()).unwrap();
        let open = |geometry| Down::open(&fd, geometry).unwrap_err().to_string();
        assert!(open(GEOMETRY).contains("not an xfan segment"));
        let down = Down::create(&fd, GEOMETRY).unwrap();
        assert!(open(Geometry { lanes: 2, slots: 8 }).contains("announced"));
        assert!(open(Geometry { lanes: 4, slots: 8 }).contains("bytes, its geometry needs"));
        assert!(open(Geometry { lanes: 4, slots: 9 }).contains("power of two"));
        down.0.u32_at(8).store(9, Ordering::Relaxed);
        assert!(open(GEOMETRY).contains(&format!("version 9, this program speaks version {VERSION}")));
    }
}
