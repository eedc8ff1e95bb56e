//! Where a lane takes its packets from: a socket, or memory.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use xfan_shm::ids::UmemOffset;

use crate::memory::frames::Frames;

/// A received packet: where it lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// UMEM offset of its first byte.
    pub offset: UmemOffset,
    /// Its length in bytes.
    pub length: u32,
}

/// The lane's side of an RX queue.
pub trait PacketSource {
    /// Takes packets, at most as many as fit into `batch`; returns how many.
    fn receive(&mut self, batch: &mut [Received]) -> usize;

    /// Posts `count` free frames for future packets, or fewer if fewer are free or fit the FILL
    /// ring.
    fn post(&mut self, frames: &mut Frames, count: u32);

    /// Sleeps until there are packets, `doorbell` is rung, or `timeout` has passed.
    fn wait(&mut self, doorbell: BorrowedFd<'_>, timeout: Duration);
}
