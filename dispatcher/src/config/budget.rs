//! How many frames a lane needs, so that it has frames even when every ring is full:
//!
//! ```text
//!  frames of a lane  ≥  rx_ring                   posted to the kernel: in the FILL and RX rings
//!                     + batch                     held by the lane
//!                     + max_workers × ring_slots  lent to workers when every ring is full
//! ```
//!
//! So the kernel always has `rx_ring` frames, however slow the workers are. Workers that may join
//! later count: `max_workers`, not `workers`. If `frames` is set to less, xfan refuses to start and
//! names the numbers. In zero-copy mode `rx_ring` is at least the size of the NIC's own RX ring.
//!
//! Packet memory holds the frames of all lanes, each of `frame_size` bytes. Its limit is 4 GiB,
//! because a descriptor holds a 32-bit offset. Where `max_workers` or `ring_slots` is `"auto"`,
//! xfan tries to stay within 1 GiB: it lowers `max_workers` to `workers` at least, and then halves
//! `ring_slots` to 512 at least.

use super::Config;

/// The most bytes of packet memory: a descriptor holds a 32-bit offset.
const UMEM_LIMIT: u64 = 1 << 32;
/// The bytes of packet memory that `"auto"` stays within, if it can.
const AUTO_UMEM: u64 = 1 << 30;
/// `ring_slots = "auto"` where each thread has a CPU of its own.
const AUTO_SLOTS: u32 = 4096;
/// `ring_slots = "auto"` where threads share a CPU: a yield may cost a whole scheduler slice, and
/// the rings must hold the packets of that time.
const AUTO_SLOTS_SHARED: u32 = 8192;
/// The fewest slots that `ring_slots = "auto"` chooses.
const AUTO_SLOTS_MIN: u32 = 512;

/// `max_workers = "auto"`: this many more than `workers`, if they fit [`AUTO_UMEM`].
const AUTO_MORE: usize = 2;
/// The most entries of an RX ring.
const RX_RING_LIMIT: u32 = 32_768;
/// The most members of a group: lanes keep sets of them in a `u64`.
pub const MAX_MEMBERS: usize = 64;

/// The sizes of all rings and of the packet memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameBudget {
    /// Frames of each lane.
    pub frames_per_lane: u32,
    /// The most workers at a time.
    pub max_workers: usize,
    /// Slots of each ring from a lane to a worker.
    pub ring_slots: u32,
    /// Entries of each RX ring, and frames kept posted to the kernel by each lane.
    pub rx_ring: u32,
    /// Entries of each FILL ring.
    pub fill_ring: u32,
    /// Bytes of packet memory: all frames of all lanes. At most 4 GiB.
    pub umem_bytes: u64,
}

/// The sizes that the mode and the NIC determine.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Bytes of a frame.
    pub frame_size: u32,
    /// Frames that the NIC takes for its own RX ring; 0 in copy mode, where it takes none.
    pub nic_ring: u32,
}

/// Why there is no valid number of frames.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// The setting `frames` is smaller than a lane needs.
    #[error(
        "`frames` is {frames} per lane, but a lane needs rx_ring ({rx_ring}) + batch ({batch}) + \
         max_workers ({max_workers}) × ring_slots ({ring_slots}) = {needed}: raise `frames` to {needed}, \
         or lower `max_workers`, `ring_slots` or `rx_ring`"
    )]
    TooFew {
        /// The setting.
        frames: u64,
        /// Frames needed.
        needed: u64,
        /// Frames posted to the kernel.
        rx_ring: u32,
        /// The most packets that a lane takes at once.
        batch: usize,
        /// The most workers at a time.
        max_workers: usize,
        /// Slots per lane and worker.
        ring_slots: u32,
    },
    /// Packet memory would exceed what a descriptor can address.
    #[error(
        "the packet memory would be {lanes} lanes × {frames} frames × {frame_size} bytes = {bytes} bytes, \
         but the limit is {} bytes (4 GiB): lower `ring_slots` (now {ring_slots}), `frames` or `frame_size`, \
         or use fewer `queues` or `max_workers` (now {max_workers})",
        UMEM_LIMIT
    )]
    TooLarge {
        /// Lanes.
        lanes: usize,
        /// Frames per lane.
        frames: u64,
        /// Bytes per frame.
        frame_size: u32,
        /// The product.
        bytes: u64,
        /// The most workers at a time.
        max_workers: usize,
        /// Slots per lane and worker.
        ring_slots: u32,
    },
}

impl FrameBudget {
    /// Sizes all rings and packet memory for `lanes` lanes and `workers` workers. `shared_cores`:
    /// some CPU runs more than one of their threads.
    ///
    /// # Errors
    ///
    /// [`BudgetError`]: `frames` is set and too small, or packet memory would exceed 4 GiB.
    pub fn plan(
        lanes: usize,
        workers: usize,
        config: &Config,
        shared_cores: bool,
        sizes: Sizes,
    ) -> Result<Self, BudgetError> {
        let auto_slots = if shared_cores { AUTO_SLOTS_SHARED } else { AUTO_SLOTS };
        let mut slots = config.group.ring_slots.unwrap_or(auto_slots);
        loop {
            // Members that may never have a worker are given up before slots of rings are.
            let most =
                config.group.max_workers.unwrap_or((workers + AUTO_MORE).min(MAX_MEMBERS)).max(workers);
            let least = config.group.max_workers.map_or(workers, |_| most);
            let mut max_workers = most;
            let last = loop {
                let budget = Self::with_slots(lanes, max_workers, config, slots, sizes);
                // A given number of frames does not shrink: it can only be too small.
                let good = |budget: &Self| budget.umem_bytes <= AUTO_UMEM || config.primary.frames.is_some();
                if budget.as_ref().is_ok_and(good) {
                    return budget;
                }
                if max_workers == least {
                    break budget;
                }
                max_workers -= 1;
            };
            if slots <= AUTO_SLOTS_MIN || config.group.ring_slots.is_some() {
                return last;
            }
            slots /= 2;
        }
    }

    fn with_slots(
        lanes: usize,
        max_workers: usize,
        config: &Config,
        ring_slots: u32,
        Sizes { frame_size, nic_ring }: Sizes,
    ) -> Result<Self, BudgetError> {
        let (rx_ring, batch) = (config.port.rx_ring, config.primary.batch);
        // Drivers fill their RX ring at once. Some never recover from having too few frames then.
        let rx_ring = rx_ring.max(nic_ring.next_power_of_two().min(RX_RING_LIMIT));
        let lent = (max_workers as u64).saturating_mul(u64::from(ring_slots));
        let needed = lent.saturating_add(u64::from(rx_ring) + batch as u64);
        let frames = config.primary.frames.map_or(needed, u64::from);
        if frames < needed {
            return Err(BudgetError::TooFew { frames, needed, rx_ring, batch, max_workers, ring_slots });
        }
        let bytes = (lanes as u64).saturating_mul(frames).saturating_mul(u64::from(frame_size));
        match u32::try_from(frames) {
            Ok(frames_per_lane) if bytes <= UMEM_LIMIT => Ok(Self {
                frames_per_lane,
                max_workers,
                ring_slots,
                rx_ring,
                fill_ring: 2 * rx_ring,
                umem_bytes: bytes,
            }),
            _ => Err(BudgetError::TooLarge { lanes, frames, frame_size, bytes, max_workers, ring_slots }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALL: Sizes = Sizes { frame_size: 2048, nic_ring: 0 };

    fn config(toml: &str) -> Config {
        Config::from_toml_str(&format!("interface = 'eth1'\n{toml}"), "f").unwrap()
    }

    #[test]
    fn auto_is_the_fewest_frames_that_suffice() {
        let budget = FrameBudget::plan(2, 2, &config(""), false, SMALL).unwrap();
        assert_eq!(
            budget,
            FrameBudget {
                frames_per_lane: 4096 + 64 + 4 * 4096,
                max_workers: 4,
                ring_slots: 4096,
                rx_ring: 4096,
                fill_ring: 8192,
                umem_bytes: 2 * 20544 * 2048,
            }
        );
        assert_eq!(FrameBudget::plan(2, 2, &config(""), true, SMALL).unwrap().ring_slots, 8192);
    }

    #[test]
    fn auto_slots_halve_to_fit_a_gibibyte_but_not_below_512() {
        let budget = FrameBudget::plan(16, 16, &config(""), false, SMALL).unwrap();
        assert_eq!(budget.ring_slots, 1024);
        let budget = FrameBudget::plan(32, 48, &config(""), true, SMALL).unwrap();
        assert_eq!(budget.ring_slots, 512);
        assert!(budget.umem_bytes > AUTO_UMEM);
    }

    #[test]
    fn auto_slots_fit_the_frames_that_were_given() {
        let budget = FrameBudget::plan(1, 2, &config("frames = 8000"), true, SMALL).unwrap();
        assert_eq!((budget.frames_per_lane, budget.ring_slots, budget.max_workers), (8000, 1024, 3));
        let budget = FrameBudget::plan(1, 1, &config("frames = 1000000"), false, SMALL).unwrap();
        assert_eq!(budget.ring_slots, 4096);
    }

    #[test]
    fn the_error_of_too_few_frames_names_every_number() {
        let error =
            FrameBudget::plan(1, 2, &config("frames = 4096\nring_slots = 4096"), false, SMALL).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`frames` is 4096 per lane, but a lane needs rx_ring (4096) + batch (64) + max_workers (2) × \
             ring_slots (4096) = 12352: raise `frames` to 12352, or lower `max_workers`, `ring_slots` or `rx_ring`"
        );
    }

    #[test]
    fn the_nics_own_ring_is_filled_too() {
        let of = |nic_ring| {
            let sizes = Sizes { frame_size: 4096, nic_ring };
            let budget = FrameBudget::plan(1, 1, &config("rx_ring = 512"), false, sizes).unwrap();
            (budget.rx_ring, budget.fill_ring, budget.umem_bytes / 4096)
        };
        assert_eq!(of(256), (512, 1024, 512 + 64 + 3 * 4096));
        assert_eq!(of(4096), (4096, 8192, 4096 + 64 + 3 * 4096));
        assert_eq!(of(8160), (8192, 16_384, 8192 + 64 + 3 * 4096));
        assert_eq!(of(1 << 20).0, 32_768);
    }

    #[test]
    fn auto_max_workers_is_two_more_where_memory_allows() {
        let max_workers = |lanes, workers, toml| {
            FrameBudget::plan(lanes, workers, &config(toml), false, SMALL).unwrap().max_workers
        };
        assert_eq!(max_workers(1, 1, ""), 3);
        assert_eq!(max_workers(1, 63, "ring_slots = 64"), 64, "the limit");
        // A gibibyte is 2^19 frames.
        assert_eq!(max_workers(1, 2, "ring_slots = 131072"), 3);
        assert_eq!(max_workers(1, 2, "ring_slots = 262144"), 2, "what is set may exceed 1 GiB");
        assert_eq!(max_workers(1, 2, "max_workers = 9"), 9);
        assert_eq!(max_workers(1, 12, "max_workers = 9"), 12, "-n on the command line wins over it");
    }

    #[test]
    fn packet_memory_fits_32_bit_offsets() {
        let exact = config("frames = 2097152");
        assert_eq!(FrameBudget::plan(1, 1, &exact, false, SMALL).unwrap().umem_bytes, UMEM_LIMIT);
        let error = FrameBudget::plan(2, 1, &exact, false, SMALL).unwrap_err().to_string();
        assert!(error.contains("2 lanes × 2097152 frames × 2048 bytes = 8589934592 bytes"), "{error}");
        assert!(error.contains("4294967296 bytes (4 GiB)"), "{error}");
    }

    proptest! {
        #[test]
        fn no_budget_exceeds_its_limits(
            lanes in 1usize..5000, workers in 1usize..=64, shared: bool,
            rx in 6u32..=15, slots in prop::option::of(6u32..=20), frames in prop::option::of(128u32..=2_097_152),
        ) {
            let mut config = config("");
            config.port.rx_ring = 1 << rx;
            config.group.ring_slots = slots.map(|bits| 1 << bits);
            config.primary.frames = frames;
            if let Ok(budget) = FrameBudget::plan(lanes, workers, &config, shared, SMALL) {
                let lent = budget.max_workers as u64 * u64::from(budget.ring_slots);
                prop_assert!((workers..=workers + 2).contains(&budget.max_workers) && budget.max_workers <= 64);
                prop_assert!(u64::from(budget.frames_per_lane) >= lent + u64::from(budget.rx_ring) + 64);
                prop_assert!(budget.umem_bytes <= UMEM_LIMIT);
                prop_assert_eq!(budget.umem_bytes, lanes as u64 * u64::from(budget.frames_per_lane) * 2048);
                prop_assert!(budget.ring_slots.is_power_of_two());
                prop_assert!(frames.is_none_or(|frames| frames == budget.frames_per_lane));
            }
        }
    }
}
