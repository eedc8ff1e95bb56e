//! A batch's three steps: take its frames from the kernel, read and describe its packets, push
//! their descriptors into the rings of a group.
//!
//! Three loops rather than one: the processor then works on several packets at once, and the values
//! of each loop fit into its registers. The steps are functions of what they use rather than of the
//! lane: the compiler then knows that what they write is not what they read.

#![allow(unsafe_code, reason = "reads packet memory, writes ring slots")]

use std::mem::MaybeUninit;

use xfan_packet::is_cut;
use xfan_shm::Descriptor;
use xfan_shm::ids::{PortId, UmemOffset};
use xfan_shm::ring::Reserved;

use super::link::{Link, bit};
use super::{BucketTable, HashKey, MAX_BATCH};
use crate::memory::frames::Frames;
use crate::memory::umem::PacketMemory;
use crate::port::source::Received;

/// Sums of one batch, before any group.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) bytes: u64,
    pub(super) frame_owner: u64,
    pub(super) unparsed: u64,
    pub(super) cut: u64,
}

/// Sums of one batch in one group.
#[derive(Default)]
pub(super) struct Pushed {
    pub(super) ring_full: u64,
    pub(super) no_worker: u64,
    /// Members that got packets, as bits.
    pub(super) touched: u64,
}

/// What all descriptors of a batch have in common.
#[derive(Clone, Copy)]
pub(super) struct Stamp {
    pub(super) time: u32,
    pub(super) port: PortId,
}

/// Takes the packets' frames from the kernel and prefetches their headers. Returns how many packets
/// are left at the front of `batch`: it removes those whose frames the kernel did not have.
#[inline(never)]
pub(super) fn accept(
    frames: &mut Frames,
    memory: &PacketMemory,
    batch: &mut [Received],
    sums: &mut Sums,
) -> usize {
    let mut frames = frames.accepting();
    let (mut bytes, mut accepted) = (0, 0);
    for number in 0..batch.len() {
        let packet = batch[number];
        prefetch(memory, packet.offset);
        bytes += u64::from(packet.length);
        if frames.accept(packet.offset).is_ok() {
            if accepted != number {
                batch[accepted] = packet;
            }
            accepted += 1;
        }
    }
    sums.bytes = bytes;
    sums.frame_owner = (batch.len() - accepted) as u64;
    accepted
}

/// Reads each packet, and describes it.
#[inline(never)]
pub(super) fn describe(
    key: &HashKey,
    memory: &PacketMemory,
    batch: &[Received],
    stamp: Stamp,
    descriptors: &mut [Descriptor; MAX_BATCH],
    sums: &mut Sums,
) {
    let Stamp { time, port } = stamp;
    for (&Received { offset, length }, descriptor) in batch.iter().zip(descriptors) {
        // SAFETY: the ledger says that the kernel had the frame and has handed it over; nobody else
        // gets it before its descriptor is pushed.
        let frame = unsafe { memory.packet(offset, length) };
        let (hash, flags) = match frame.and_then(|frame| key.hash_plain(frame)) {
            Some(hash) => (hash, 0),
            None => {
                let frame = frame.unwrap_or(&[]);
                let ((hash, parsed), cut) = (key.hash_any(frame), is_cut(frame));
                sums.unparsed += u64::from(!parsed);
                sums.cut += u64::from(cut);
                let unparsed = if parsed { 0 } else { Descriptor::UNPARSED };
                (hash, unparsed | if cut { Descriptor::CUT } else { 0 })
            }
        };
        #[allow(clippy::cast_possible_truncation)] // a frame has at most 4,096 bytes
        let length = length as u16;
        *descriptor = Descriptor::new(offset, time, length, port, flags, hash);
    }
}

/// Pushes each descriptor into the ring of the member that takes it, and reorders them meanwhile.
/// All slots are reserved before one is filled: so their lines, which the workers' caches have,
/// arrive at the same time. The first is filled last, and with it a worker sees all of its slots.
#[inline(never)]
pub(super) fn push<const SHARED: bool>(
    frames: &mut Frames,
    table: &BucketTable,
    links: &mut [Option<Link>; 256],
    descriptors: &mut [Descriptor],
    sums: &mut Pushed,
) {
    let mut slots = [const { MaybeUninit::<Reserved>::uninit() }; MAX_BATCH];
    let (mut touched, mut reserved) = (0u64, 0);
    for number in 0..descriptors.len().min(MAX_BATCH) {
        let Descriptor { hash, offset, .. } = descriptors[number];
        let member = table.member(hash);
        let Some(link) = &mut links[member.index()] else {
            sums.no_worker += 1;
            frames.give_back_known::<SHARED>(offset);
            continue;
        };
        touched |= bit(member);
        let Some(slot) = link.ring.reserve().or_else(|| link.reserve_again::<SHARED>(frames)) else {
            sums.ring_full += 1;
            frames.give_back_known::<SHARED>(offset);
            continue;
        };
        slots[reserved].write(slot);
        if reserved != number {
            descriptors[reserved] = descriptors[number];
        }
        reserved += 1;
    }
    let reserved = reserved.min(descriptors.len());
    for (slot, descriptor) in slots[..reserved].iter().zip(&descriptors[..reserved]).rev() {
        // SAFETY: that many are written; no member leaves meanwhile.
        unsafe { slot.assume_init().fill(*descriptor) };
    }
    sums.touched = touched;
}

/// Prefetches a packet's first cache line.
#[inline(always)]
fn prefetch(memory: &PacketMemory, offset: UmemOffset) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let line = memory.base().as_ptr().wrapping_add(offset.index());
        // SAFETY: a prefetch cannot fault, whatever the address.
        unsafe { _mm_prefetch(line.cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (memory, offset);
}
