//! A descriptor: the 16 bytes that describe a packet on its way to a worker.
//!
//! ```text
//! word 0   bits  0..32  offset of the packet's first byte in the UMEM
//!          bits 32..64  receive time, see `clock::stamp`
//! word 1   bits  0..16  length of the packet in bytes
//!          bits 16..24  ingress port
//!          bits 24..32  flags; bit 31 is the ring's lap mark, see `ring`
//!          bits 32..64  flow hash
//! ```

use crate::ids::{PortId, UmemOffset};

/// The lap mark in word 1. It belongs to the ring, not to the packet.
pub(crate) const LAP: u64 = 1 << 31;

/// A reference to a packet in the UMEM.
///
/// On a little-endian machine its layout in memory is that of its two words, so reading it from a
/// slot is a plain copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Descriptor {
    /// Offset of the packet's first byte in the UMEM, in bytes.
    pub offset: UmemOffset,
    /// Receive time of the packet's batch: the low 32 bits of `CLOCK_MONOTONIC` in units of 1,024
    /// ns, see [`stamp`](crate::clock::stamp).
    pub time: u32,
    /// Length of the packet in bytes.
    pub length: u16,
    /// The interface that received the packet, as the dispatcher numbers them.
    pub port: PortId,
    /// Flags, 7 bits; see the constants of this type.
    pub flags: u8,
    /// Hash of the packet's flow, equal for both directions.
    pub hash: u32,
}

impl Descriptor {
    /// Flag: no 5-tuple could be read. The hash covers only the addresses that could be read.
    pub const UNPARSED: u8 = 1;

    /// Flag: the packet was sent to another worker before, which was lost without committing it and
    /// may have read it.
    pub const REDELIVERED: u8 = 2;

    /// Flag: the packet was cut: its IP length extends beyond the frame.
    pub const CUT: u8 = 4;

    /// A descriptor of these fields. Of `flags`, the lower 7 bits are used.
    #[inline(always)]
    pub fn new(offset: UmemOffset, time: u32, length: u16, port: PortId, flags: u8, hash: u32) -> Self {
        // Assembled in registers, so that the compiler writes it to a slot in two stores.
        let word0 = u64::from(offset.0) | u64::from(time) << 32;
        let low = u64::from(length) | u64::from(port.0) << 16 | u64::from(flags & 0x7f) << 24;
        Descriptor::from_words(word0, low | u64::from(hash) << 32)
    }

    /// The descriptor as the two words of a slot, with the lap mark clear.
    #[inline(always)]
    #[cfg(target_endian = "little")]
    pub(crate) fn to_words(self) -> (u64, u64) {
        // SAFETY: `transmute` requires types of equal size and a valid result. Both types have 16
        // bytes, none of them padding, and any 8 bytes are a valid `u64`.
        let [word0, word1] = unsafe { std::mem::transmute::<Descriptor, [u64; 2]>(self) };
        (word0, word1 & !LAP)
    }

    /// The descriptor as the two words of a slot, with the lap mark clear.
    #[inline(always)]
    #[cfg(not(target_endian = "little"))]
    pub(crate) fn to_words(self) -> (u64, u64) {
        (
            u64::from(self.offset.0) | u64::from(self.time) << 32,
            u64::from(self.length)
                | u64::from(self.port.0) << 16
                | u64::from(self.flags & 0x7f) << 24
                | u64::from(self.hash) << 32,
        )
    }

    /// The offset in a slot's first word.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // extracts a bit field
    pub(crate) fn offset_in(word0: u64) -> UmemOffset {
        UmemOffset(word0 as u32)
    }

    /// A descriptor from the two words of a slot. The caller has cleared the lap mark.
    #[inline(always)]
    #[cfg(target_endian = "little")]
    pub(crate) fn from_words(word0: u64, word1: u64) -> Self {
        const { assert!(size_of::<Descriptor>() == 16) };
        debug_assert_eq!(word1 & LAP, 0);
        // SAFETY: `transmute` requires types of equal size and a valid result. Both types have 16
        // bytes (asserted), none of them padding, and any bytes are valid field values. On a
        // little-endian machine, the fields in declaration order have the layout of the words.
        unsafe { std::mem::transmute::<[u64; 2], Descriptor>([word0, word1]) }
    }

    /// A descriptor from the two words of a slot. The caller has cleared the lap mark.
    #[inline(always)]
    #[cfg(not(target_endian = "little"))]
    #[allow(clippy::cast_possible_truncation)] // extracts bit fields
    pub(crate) fn from_words(word0: u64, word1: u64) -> Self {
        Descriptor {
            offset: UmemOffset(word0 as u32),
            time: (word0 >> 32) as u32,
            length: word1 as u16,
            port: PortId((word1 >> 16) as u8),
            flags: (word1 >> 24) as u8,
            hash: (word1 >> 32) as u32,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // Few cases under Miri, which is slow. No failure files: Miri's isolation forbids writing
        // them.
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 16 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn words_hold_every_field(offset: u32, time: u32, length: u16, port: u8, flags in 0u8..128, hash: u32) {
            let (offset, port) = (UmemOffset(offset), PortId(port));
            let descriptor = Descriptor { offset, time, length, port, flags, hash };
            let (word0, word1) = descriptor.to_words();
            prop_assert_eq!(word1 & LAP, 0);
            prop_assert_eq!(Descriptor::from_words(word0, word1), descriptor);
        }
    }
}
