//! A batch's three steps: take its frames from the kernel, read and describe its packets, push their descriptors.
//!
//! Three loops rather than one: so the processor works at several packets at once, and what each needs fits into its
//! registers. They are functions of what they use rather than of the lane: so the compiler knows that what they
//! write is not what they read.

#![allow(unsafe_code, reason = "reads packet memory, writes ring slots")]

use std::mem::MaybeUninit;

use xfan_packet::is_cut;
use xfan_shm::Descriptor;
use xfan_shm::ring::Reserved;

use super::{Link, MAX_BATCH};
use crate::lane::{BucketTable, HashKey};
use crate::memory::frames::Frames;
use crate::memory::umem::PacketMemory;
use crate::port::source::Received;

/// Sums of one batch.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) bytes: u64,
    pub(super) ring_full: u64,
    pub(super) no_worker: u64,
    pub(super) frame_owner: u64,
    pub(super) unparsed: u64,
    pub(super) cut: u64,
    /// Members that got packets, as bits.
    pub(super) touched: u64,
}

/// What all descriptors of a batch have in common.
#[derive(Clone, Copy)]
pub(super) struct Stamp {
    pub(super) time: u32,
    pub(super) port: u8,
}

/// Takes the packets' frames from the kernel and asks for their headers. Returns how many these are: at the front
/// of `batch`, from which those are taken out whose frames the kernel did not have.
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
        // SAFETY: the ledger says that the kernel had the frame and has handed it over; nobody else gets it before its
        // descriptor is pushed.
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

/// Pushes each descriptor into the ring of the member that takes it. All slots are reserved before one is filled: so
/// their lines, which the workers' caches have, come at the same time. The first is filled last, and with it a
/// worker sees all of its slots.
#[inline(never)]
pub(super) fn push(
    frames: &mut Frames,
    table: &BucketTable,
    members: &mut [Option<Link>; 256],
    descriptors: &mut [Descriptor],
    sums: &mut Sums,
) {
    let mut slots = [const { MaybeUninit::<Reserved>::uninit() }; MAX_BATCH];
    let (mut touched, mut reserved) = (0u64, 0);
    for number in 0..descriptors.len().min(MAX_BATCH) {
        let Descriptor { hash, offset, .. } = descriptors[number];
        let place = table.member(hash);
        let Some(link) = &mut members[usize::from(place)] else {
            sums.no_worker += 1;
            frames.give_back(offset);
            continue;
        };
        touched |= 1u64.wrapping_shl(u32::from(place));
        let Some(slot) = link.link.ring.reserve().or_else(|| link.reserve_again(frames)) else {
            sums.ring_full += 1;
            frames.give_back(offset);
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

/// Asks for a packet's first line.
#[inline(always)]
fn prefetch(memory: &PacketMemory, offset: u32) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let line = memory.base().as_ptr().wrapping_add(offset as usize);
        // SAFETY: a prefetch of any address faults never.
        unsafe { _mm_prefetch(line.cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (memory, offset);
}
