//! The other process of `xfan-bench ring`. It follows orders on its standard input, a control
//! socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use xfan_shm::Descriptor;
use xfan_shm::ids::{LaneId, PortId, UmemOffset};
use xfan_shm::layout::{Down, Geometry, SharedRing, Up};
use xfan_shm::protocol::{self, MAX_REQUEST, ProtocolError};
use xfan_shm::ring::{Consumer, Producer};
use xfan_shm::segment::Mapping;

use crate::Failure;

/// Flag of the last descriptor of a task.
pub(super) const LAST: u8 = 0x40;

/// The next task of the other process.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Answer this many pings on the line.
    Line { trips: u64 },
    /// Answer this many pings on the two lines.
    Lines { trips: u64 },
    /// Send back this many descriptors.
    Echo { trips: u64 },
    /// Take descriptors, the first with number `first`, in bursts of up to `burst`, up to the
    /// [`LAST`]; answer [`Taken`].
    Take { first: u32, burst: u32 },
}

/// The answer to [`Task::Take`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Taken {
    /// The number after the last descriptor.
    pub(super) next: u32,
    /// Whether all descriptors were in order and unchanged.
    pub(super) intact: bool,
}

/// The descriptor with number `n`.
#[inline(always)]
pub(super) fn numbered(n: u32) -> Descriptor {
    Descriptor { offset: UmemOffset(n), time: 7, length: 60, port: PortId(1), flags: 0, hash: !n }
}

/// Bare cache lines. One is written by both processes, the best that two CPUs can do. Two more have
/// one writer each, the best they can do if neither may write the other's memory, like dispatcher
/// and worker.
pub(super) struct SharedLine(Mapping);

impl SharedLine {
    /// The size of its segment in bytes.
    pub(super) const BYTES: usize = 4096;
    const PONG: u64 = 1 << 63;

    pub(super) fn map(fd: impl AsFd) -> std::io::Result<Self> {
        Mapping::read_write(fd, Self::BYTES).map(SharedLine)
    }

    /// Line 0 has two writers; only the first process writes line 1, only the second line 2.
    #[inline(always)]
    fn word(&self, line: usize) -> &AtomicU64 {
        // SAFETY: the mapping is one page, page-aligned, writable, and outlives the borrow; the
        // 128-byte lines 0 to 2 are within it; both processes access these words only atomically.
        unsafe { self.0.address().add(128 * line).cast().as_ref() }
    }

    /// Sends trip number `trip`, which is not 0, over one line, and waits for its answer.
    #[inline(always)]
    pub(super) fn ping(&self, trip: u64) {
        self.word(0).store(trip, Ordering::Release);
        while self.word(0).load(Ordering::Acquire) != trip | Self::PONG {}
    }

    /// Waits for trip number `trip` and answers it.
    #[inline(always)]
    fn pong(&self, trip: u64) {
        while self.word(0).load(Ordering::Acquire) != trip {}
        self.word(0).store(trip | Self::PONG, Ordering::Release);
    }

    /// Like [`ping`](Self::ping), over two lines.
    #[inline(always)]
    pub(super) fn ping_over_two(&self, trip: u64) {
        self.word(1).store(trip, Ordering::Release);
        while self.word(2).load(Ordering::Acquire) != trip {}
    }

    /// Like [`pong`](Self::pong), over two lines.
    #[inline(always)]
    fn pong_over_two(&self, trip: u64) {
        while self.word(1).load(Ordering::Acquire) != trip {}
        self.word(2).store(trip, Ordering::Release);
    }
}

/// Runs the other process on CPU 1 until the first one closes the socket.
///
/// # Errors
/// A sentence that says what failed.
pub fn serve() -> Result<(), Failure> {
    super::pin(1)?;
    let socket = std::io::stdin();
    let [down, up] = given(&socket)?.1;
    let (_, [down_back, up_back]) = given(&socket)?;
    let (geometry, [line]) = given(&socket)?;
    let (down, up) = (Down::open(down, geometry)?, Up::open(up, geometry)?);
    let mut there = Consumer::new(SharedRing::new(&down, &up, LaneId(0)));
    let (down, up) = (Down::create(down_back, geometry)?, Up::create(up_back, geometry)?);
    let mut back = Producer::new(SharedRing::new(&down, &up, LaneId(0)));
    let line = SharedLine::map(line)?;
    protocol::send(&socket, &(), &[])?;
    loop {
        match protocol::receive(&socket, MAX_REQUEST) {
            Ok((Task::Line { trips }, _)) => (1..=trips).for_each(|trip| line.pong(trip)),
            Ok((Task::Lines { trips }, _)) => (1..=trips).for_each(|trip| line.pong_over_two(trip)),
            Ok((Task::Echo { trips }, _)) => echo(&mut there, &mut back, trips)?,
            Ok((Task::Take { first, burst }, _)) => {
                protocol::send(&socket, &take(&mut there, first, burst), &[])?;
            }
            Err(ProtocolError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives the next message, with its geometry and `N` descriptors.
fn given<const N: usize>(socket: impl AsFd) -> Result<(Geometry, [OwnedFd; N]), Failure> {
    let (geometry, fds) = protocol::receive(socket, MAX_REQUEST)?;
    let fds = fds.try_into().map_err(|_| "only xfan-bench ring may start ring-peer")?;
    Ok((geometry, fds))
}

fn echo(
    there: &mut Consumer<SharedRing>,
    back: &mut Producer<SharedRing>,
    trips: u64,
) -> Result<(), Failure> {
    for _ in 0..trips {
        let packet = loop {
            if let Some(packet) = there.peek(0) {
                break packet;
            }
        };
        while !back.push(packet) {
            back.take_back(|_| ())?;
        }
        there.commit(1);
    }
    Ok(())
}

fn take(there: &mut Consumer<SharedRing>, first: u32, burst: u32) -> Taken {
    let mut taken = Taken { next: first, intact: true };
    loop {
        let (mut seen, mut last) = (0, false);
        while seen < burst && !last {
            let Some(packet) = there.peek(seen) else { break };
            last = packet.flags == LAST;
            taken.intact &= Descriptor { flags: 0, ..packet } == numbered(taken.next);
            taken.next = taken.next.wrapping_add(1);
            seen += 1;
        }
        if seen > 0 {
            there.commit(seen);
        } else {
            std::hint::spin_loop();
        }
        if last {
            return taken;
        }
    }
}
