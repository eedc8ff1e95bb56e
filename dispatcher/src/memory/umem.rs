//! Packet memory: one UMEM for all lanes, mapped by every worker.

#![allow(unsafe_code, reason = "packet memory is shared with the kernel")]

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use xfan_shm::ids::UmemOffset;
use xfan_shm::segment::{Mapping, open_mapping_read_only, reopen_read_only};
use xsk_rs::config::{FrameSize, QueueSize, UmemConfig};
use xsk_rs::umem::{Umem, UmemCreateError};

/// Packet memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UmemError {
    /// The kernel refused to register it.
    #[error(
        "cannot make {bytes} bytes of packet memory (UMEM): {source}; {reason}. \
         Lower `frames`, `ring_slots` or the number of workers, or raise the memory-lock limit (ulimit -l)"
    )]
    Create {
        /// Size asked for.
        bytes: u64,
        /// What failed.
        source: UmemCreateError,
        /// Why it failed.
        reason: String,
    },
    /// It cannot be handed to workers.
    #[error(
        "cannot open the packet memory for workers: {0}; this needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE"
    )]
    Open(#[source] io::Error),
    /// A size that AF_XDP cannot take.
    #[error("packet memory with frames of {frame_size} bytes and rings of {fill_ring}: {reason}")]
    Config {
        /// Bytes of a frame.
        frame_size: u32,
        /// Entries of the FILL ring.
        fill_ring: u32,
        /// What AF_XDP says.
        reason: String,
    },
}

/// Packet memory and the descriptor by which a worker may map it, read-only.
#[derive(Debug)]
pub struct PacketMemory {
    base: NonNull<u8>,
    length: usize,
    read_only: OwnedFd,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Umem(Umem),
    Mapping(#[allow(dead_code)] Mapping),
}

// SAFETY: `base` leads into memory that `backing` keeps mapped; access is as in `packet`.
unsafe impl Send for PacketMemory {}
// SAFETY: as above.
unsafe impl Sync for PacketMemory {}

impl PacketMemory {
    /// Registers a UMEM of `count` frames.
    ///
    /// # Errors
    /// [`UmemError`]
    pub fn of_sockets(frame_size: u32, count: NonZeroU32, fill_ring: u32) -> Result<Self, UmemError> {
        let invalid = |reason: String| UmemError::Config { frame_size, fill_ring, reason };
        let config = UmemConfig::builder()
            .frame_size(FrameSize::new(frame_size).map_err(|error| invalid(error.to_string()))?)
            .fill_queue_size(QueueSize::new(fill_ring).map_err(|error| invalid(error.to_string()))?)
            // Every lane gets a COMPLETION ring of this size; nothing is transmitted, so it stays
            // empty.
            .comp_queue_size(QueueSize::new(64).map_err(|error| invalid(error.to_string()))?)
            .build()
            .map_err(|error| invalid(error.to_string()))?;
        let length = frame_size as usize * count.get() as usize;
        let (umem, frames) = Umem::new(config, count, false).map_err(|source| UmemError::Create {
            bytes: length as u64,
            reason: std::error::Error::source(&source).map_or_else(String::new, ToString::to_string),
            source,
        })?;
        let first = frames.first().copied().unwrap_or_default();
        // SAFETY: the descriptor is this UMEM's, and nobody uses the memory yet.
        let data = unsafe { umem.data(&first) };
        // A frame's descriptor points behind its headroom; the UMEM begins before that of the
        // first.
        // SAFETY: `addr` bytes lie between the beginning of the UMEM and the data.
        let base = unsafe { NonNull::from(data.contents()).cast::<u8>().sub(first.addr()) };
        let read_only = open_mapping_read_only(base, length).map_err(UmemError::Open)?;
        Ok(PacketMemory { base, length, read_only, backing: Backing::Umem(umem) })
    }

    /// Memory behind no socket: a segment, mapped for writing. For benchmarks and tests of the
    /// dispatch path alone.
    ///
    /// # Errors
    /// [`UmemError::Open`]
    pub fn of_segment(fd: impl AsFd, mapping: Mapping) -> Result<Self, UmemError> {
        let read_only = reopen_read_only(fd).map_err(UmemError::Open)?;
        Ok(PacketMemory {
            base: mapping.address(),
            length: mapping.length(),
            read_only,
            backing: Backing::Mapping(mapping),
        })
    }

    /// The UMEM, if AF_XDP sockets can be bound to it.
    pub fn umem(&self) -> Option<&Umem> {
        match &self.backing {
            Backing::Umem(umem) => Some(umem),
            Backing::Mapping(_) => None,
        }
    }

    /// What a worker is given.
    pub fn read_only_fd(&self) -> BorrowedFd<'_> {
        self.read_only.as_fd()
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// First byte.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The packet of `length` bytes at `offset`; `None` beyond the end.
    ///
    /// # Safety
    /// Nobody writes the packet while the slice is used: its frame is not the kernel's.
    #[inline(always)]
    pub unsafe fn packet(&self, offset: UmemOffset, length: u32) -> Option<&[u8]> {
        if u64::from(offset.0) + u64::from(length) > self.length as u64 {
            return None;
        }
        // SAFETY: in bounds as checked, mapped as long as `self`, and not written by this
        // function's contract.
        Some(unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset.index()), length as usize) })
    }
}
