//! Where things lie in the two segments of a worker. The only place that turns mapped bytes into atomics.
//!
//! ```text
//! down segment, written by the dispatcher        up segment, written by the worker
//!      0  header: magic, version, geometry            0  header (written once, before the worker has it)
//!    128  phase                                     128  sleep epoch
//!   4096  ring of lane 0: slots × 16 bytes          256  heartbeat, busy time
//!         ring of lane 1 …                          384  consumer index of lane 0, then one line per lane
//!                                                   …    published counters: 32 × (24-byte name, value)
//! ```
//!
//! Words with different writers, and words with different readers, are [`LINE`] bytes apart. The geometry is validated
//! once, when the segments are mapped, and a private copy is used from then on.
//!
//! A segment is stored to by its writer alone. For everyone else its pages are read-only: a store there ends the process
//! by SIGSEGV, and loads are relaxed ones with a fence behind them, as Rust wants it for read-only memory.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::ids::LaneId;
use crate::ring::{RingMemory, Slot};
use crate::segment::Mapping;

/// Version of the layout and of the conversation on the control socket. Both peers must have the same.
pub const VERSION: u32 = 3;

/// Distance between words that different threads write, in bytes: two 64-byte lines, since
/// processors fetch them in pairs.
pub const LINE: usize = 128;

/// Most lanes a worker can be served by.
pub const MAX_LANES: u32 = 256;

/// Most slots a ring can have.
pub const MAX_SLOTS: u32 = 1 << 20;

/// Counters a worker can publish.
pub const COUNTERS: usize = 32;

/// Longest name of a published counter, in bytes.
pub const COUNTER_NAME: usize = 24;

const DOWN_MAGIC: u64 = u64::from_le_bytes(*b"xfandown");
const UP_MAGIC: u64 = u64::from_le_bytes(*b"xfan up\0");
const RINGS: usize = 4096;
const PHASE: usize = LINE;
const EPOCH: usize = LINE;
const VITALS: usize = 2 * LINE;
const CONSUMERS: usize = 3 * LINE;
const COUNTER: usize = COUNTER_NAME + 8;

/// The sizes that both segments follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// Lanes that serve the worker, each with a ring of its own.
    pub lanes: u32,
    /// Slots of each ring: a power of two.
    pub slots: u32,
}

/// A segment is not what its peer said it is.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The geometry is outside the limits.
    #[error(
        "a geometry of {0} lanes and {1} slots is not possible: 1 to {MAX_LANES} lanes, slots a power of two from 8 to {MAX_SLOTS}"
    )]
    Geometry(u32, u32),
    /// The segment's header does not begin as it should.
    #[error("the {0} segment does not begin with its magic number: this is not an xfan segment")]
    Magic(&'static str),
    /// The segment was made by another version.
    #[error(
        "the {0} segment has version {1}, this program speaks version {VERSION}: use builds of the same release"
    )]
    Version(&'static str, u32),
    /// The segment's header contradicts what the dispatcher said on the control socket.
    #[error("the {0} segment is for {1:?}, the dispatcher announced {2:?}")]
    Mismatch(&'static str, Geometry, Geometry),
    /// It cannot be mapped.
    #[error("cannot map the {0} segment: {1}")]
    Map(&'static str, #[source] io::Error),
}

impl Geometry {
    /// Checks the limits.
    ///
    /// # Errors
    /// [`LayoutError::Geometry`]
    pub fn validated(self) -> Result<Self, LayoutError> {
        let possible = (1..=MAX_LANES).contains(&self.lanes)
            && (8..=MAX_SLOTS).contains(&self.slots)
            && self.slots.is_power_of_two();
        if possible { Ok(self) } else { Err(LayoutError::Geometry(self.lanes, self.slots)) }
    }

    /// Bytes of one ring.
    fn ring_bytes(self) -> usize {
        self.slots as usize * size_of::<Slot>()
    }

    /// Bytes of the down segment.
    pub fn down_bytes(self) -> usize {
        RINGS + self.lanes as usize * self.ring_bytes()
    }

    /// Where the published counters begin in the up segment.
    fn counters(self) -> usize {
        CONSUMERS + self.lanes as usize * LINE
    }

    /// Bytes of the up segment.
    pub fn up_bytes(self) -> usize {
        self.counters() + COUNTERS * COUNTER
    }
}

/// What the dispatcher tells a worker through the down segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Packets keep coming.
    Running,
    /// What is in the rings is the last of it: finish, commit, go.
    Closing,
    /// The worker is no longer a member: what is in the rings is others' now, and its memory will be written to.
    Over,
}

/// A mapped segment of known geometry.
#[derive(Clone, Debug)]
struct Segment {
    mapping: Arc<Mapping>,
    geometry: Geometry,
}

impl Segment {
    /// The atomic at byte `offset`, which is a constant of this module or computed from the geometry.
    #[inline(always)]
    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset + 4 <= self.mapping.length());
        // SAFETY: in bounds and aligned as asserted (offsets come from the geometry that the mapping's length was
        // checked against); every process accesses this word atomically only; lives as long as `self`.
        unsafe { self.mapping.address().add(offset).cast::<AtomicU32>().as_ref() }
    }

    /// Like [`u32_at`](Self::u32_at), 8 bytes.
    #[inline(always)]
    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= self.mapping.length());
        // SAFETY: as in `u32_at`.
        unsafe { self.mapping.address().add(offset).cast::<AtomicU64>().as_ref() }
    }

    fn write_header(&self, magic: u64) {
        self.u32_at(8).store(VERSION, Ordering::Relaxed);
        self.u32_at(12).store(self.geometry.lanes, Ordering::Relaxed);
        self.u32_at(16).store(self.geometry.slots, Ordering::Relaxed);
        // Release: pairs with the Acquire fence in `check_header`.
        self.u64_at(0).store(magic, Ordering::Release);
    }

    fn check_header(&self, which: &'static str, magic: u64) -> Result<(), LayoutError> {
        if self.u64_at(0).load(Ordering::Relaxed) != magic {
            return Err(LayoutError::Magic(which));
        }
        // Acquire: pairs with the Release in `write_header`.
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
    /// Maps a fresh segment for writing, as the dispatcher, and writes its header.
    ///
    /// # Errors
    /// [`LayoutError`]
    pub fn create(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping = Mapping::read_write(fd, geometry.down_bytes())
            .map_err(|error| LayoutError::Map("down", error))?;
        let segment = Segment { mapping: Arc::new(mapping), geometry };
        segment.write_header(DOWN_MAGIC);
        Ok(Down(segment))
    }

    /// Maps the segment read-only, as the worker, and checks its header.
    ///
    /// # Errors
    /// [`LayoutError`]
    pub fn open(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_only(fd, geometry.down_bytes()).map_err(|error| LayoutError::Map("down", error))?;
        let segment = Segment { mapping: Arc::new(mapping), geometry };
        segment.check_header("down", DOWN_MAGIC)?;
        Ok(Down(segment))
    }

    /// Makes sure, as the dispatcher, that no access to the segment faults. See [`Mapping::lock`].
    ///
    /// # Errors
    /// As [`Mapping::lock`].
    pub fn lock(&self) -> io::Result<()> {
        self.0.mapping.lock()
    }

    /// Tells the worker, as the dispatcher. What was pushed before is seen by who sees the phase.
    pub fn set_phase(&self, phase: Phase) {
        // Release: pairs with the Acquire in `phase`.
        self.0.u32_at(PHASE).store(phase as u32, Ordering::Release);
    }

    /// What the dispatcher tells the worker.
    #[inline]
    pub fn phase(&self) -> Phase {
        let phase = self.0.u32_at(PHASE).load(Ordering::Relaxed);
        // Acquire: pairs with the Release in `set_phase`.
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
    /// Writes the header of a fresh segment, and maps it, as the dispatcher.
    ///
    /// # Errors
    /// [`LayoutError`]
    pub fn create(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        Self::prepare(&fd, geometry)?;
        Self::watch(fd, geometry)
    }

    /// Writes the header of a fresh segment, as the dispatcher. It is not mapped any more when this
    /// returns.
    ///
    /// # Errors
    /// [`LayoutError`]
    pub fn prepare(fd: impl AsFd, geometry: Geometry) -> Result<(), LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_write(fd, geometry.up_bytes()).map_err(|error| LayoutError::Map("up", error))?;
        Segment { mapping: Arc::new(mapping), geometry }.write_header(UP_MAGIC);
        Ok(())
    }

    /// Maps a segment read-only, as the dispatcher. While a worker can still punch holes into it,
    /// mapping, reading and unmapping it can take as long as the worker likes: see
    /// [`segment::is_sealed_against_further_writers`](crate::segment::is_sealed_against_further_writers).
    ///
    /// # Errors
    /// [`LayoutError`]
    pub fn watch(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_only(fd, geometry.up_bytes()).map_err(|error| LayoutError::Map("up", error))?;
        Ok(Up(Segment { mapping: Arc::new(mapping), geometry }))
    }

    /// Maps the segment for writing, as the worker, and checks its header.
    ///
    /// # Errors
    /// [`LayoutError`]
    pub fn open(fd: impl AsFd, geometry: Geometry) -> Result<Self, LayoutError> {
        let geometry = geometry.validated()?;
        let mapping =
            Mapping::read_write(fd, geometry.up_bytes()).map_err(|error| LayoutError::Map("up", error))?;
        let segment = Segment { mapping: Arc::new(mapping), geometry };
        segment.check_header("up", UP_MAGIC)?;
        Ok(Up(segment))
    }

    /// Makes sure, as the dispatcher, that no access to the segment faults. See [`Mapping::lock`].
    ///
    /// # Errors
    /// As [`Mapping::lock`].
    pub fn lock(&self) -> io::Result<()> {
        self.0.mapping.lock()
    }

    /// The worker's sleep epoch, see `doorbell`.
    #[inline(always)]
    pub fn epoch(&self) -> &AtomicU32 {
        self.0.u32_at(EPOCH)
    }

    /// Grows with every turn of the worker's receive loop, idle or not.
    #[inline(always)]
    pub fn heartbeat(&self) -> &AtomicU64 {
        self.0.u64_at(VITALS)
    }

    /// Busy time of the worker in ticks of [`clock::ticks`](crate::clock::ticks).
    #[inline(always)]
    pub fn busy_ticks(&self) -> &AtomicU64 {
        self.0.u64_at(VITALS + 8)
    }

    /// Times the worker was woken from sleep.
    #[inline(always)]
    pub fn wakeups(&self) -> &AtomicU64 {
        self.0.u64_at(VITALS + 16)
    }

    /// The name of published counter `index`, as three words of its bytes, and its value.
    ///
    /// # Panics
    /// If `index` is [`COUNTERS`] or more.
    pub fn counter(&self, index: usize) -> ([&AtomicU64; 3], &AtomicU64) {
        assert!(index < COUNTERS, "counter {index} of {COUNTERS}");
        let at = self.0.geometry.counters() + index * COUNTER;
        let word = |n: usize| self.0.u64_at(at + n * 8);
        ([word(0), word(1), word(2)], word(3))
    }

    /// Publishes counter `index` under `name` with value 0, as the worker. A name is 1 to [`COUNTER_NAME`]
    /// characters of `a-z`, `0-9` and `_`; any other is not shown.
    ///
    /// # Panics
    /// If `index` is [`COUNTERS`] or more, or the name too long.
    pub fn publish_counter(&self, index: usize, name: &str) {
        let mut bytes = [0; COUNTER_NAME];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let (words, value) = self.counter(index);
        value.store(0, Ordering::Relaxed);
        // The first word last: who sees a name sees all of it.
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)).rev() {
            // Release: pairs with the Acquire fence in `published_counters`.
            word.store(u64::from_le_bytes(bytes.try_into().unwrap_or_default()), Ordering::Release);
        }
    }

    /// The counters published so far. Whatever the worker wrote, names are well-formed.
    pub fn published_counters(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        (0..COUNTERS).filter_map(|index| {
            let (words, value) = self.counter(index);
            let bytes: Vec<u8> = words
                .iter()
                .flat_map(|word| {
                    let bytes = word.load(Ordering::Relaxed).to_le_bytes();
                    // Acquire: pairs with the Release in `publish_counter`.
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

/// Whether a counter may be published under that name.
pub fn counter_name_is_valid(name: &str) -> bool {
    (1..=COUNTER_NAME).contains(&name.len())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// The ring between one lane and one worker, in their two segments.
#[derive(Debug)]
pub struct SharedRing {
    slots: NonNull<Slot>,
    consumer: NonNull<AtomicU32>,
    /// Slots less one; slots are a power of two.
    mask: u32,
    /// Keep the memory mapped.
    _mappings: (Arc<Mapping>, Arc<Mapping>),
}

// SAFETY: the pointers lead into mappings that this value keeps alive, to atomics only.
unsafe impl Send for SharedRing {}

impl SharedRing {
    /// The ring of `lane`.
    ///
    /// # Panics
    /// If the two segments differ in geometry or `lane` is not below its lanes.
    pub fn new(down: &Down, up: &Up, lane: LaneId) -> Self {
        let geometry = down.0.geometry;
        assert!(geometry == up.0.geometry && lane.0 < geometry.lanes, "lane {lane} of {geometry:?}");
        let ring = RINGS + lane.index() * geometry.ring_bytes();
        // SAFETY: `ring + ring_bytes <= down_bytes`, which the mapping's length was checked against.
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
        // SAFETY: masked, so it is one of the ring's slots, which lie in the down segment that `_mappings` keeps alive; the
        // mapping is page-aligned and rings begin at a multiple of 128, so slots are aligned; all access is atomic.
        unsafe { self.slots.add((position & self.mask) as usize).as_ref() }
    }

    #[inline(always)]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: points into the up segment, which `_mappings` keeps alive; all access is atomic.
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
    fn wrong_segments_are_refused_with_a_reason() {
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
