//! The other process of `xfan-bench ring`: it does what it is told on its standard input, a control socket.

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

/// What the other process is to do next.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Answer so many pings on the line.
    Line { trips: u64 },
    /// Answer so many pings on the two lines.
    Lines { trips: u64 },
    /// Send back so many descriptors.
    Echo { trips: u64 },
    /// Take descriptors, the first of number `first`, in bursts of up to `burst`, up to the [`LAST`]; answer [`Taken`].
    Take { first: u32, burst: u32 },
}

/// The answer to [`Task::Take`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Taken {
    /// Number of the descriptor after the last.
    pub(super) next: u32,
    /// Whether all were in order and whole.
    pub(super) intact: bool,
}

/// The descriptor that is sent as number `n`.
#[inline(always)]
pub(super) fn numbered(n: u32) -> Descriptor {
    Descriptor { offset: UmemOffset(n), time: 7, length: 60, port: PortId(1), flags: 0, hash: !n }
}

/// Bare cache lines: one that both processes write, what two CPUs can do at best; and two with one writer each, what
/// they can do at best if neither may write the other's memory, as dispatcher and worker may not.
pub(super) struct SharedLine(Mapping);

impl SharedLine {
    /// Bytes of its segment.
    pub(super) const BYTES: usize = 4096;
    const PONG: u64 = 1 << 63;

    pub(super) fn map(fd: impl AsFd) -> std::io::Result<Self> {
        Mapping::read_write(fd, Self::BYTES).map(SharedLine)
    }

    /// Line 0 has two writers, 1 the first process, 2 the second.
    #[inline(always)]
    fn word(&self, line: usize) -> &AtomicU64 {
        // SAFETY: the mapping is a page long and aligned to one, writable, and outlives the borrow; 128-byte lines 0 to 2
        // lie in it; both processes access these words atomically only.
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

/// Runs the other process, on CPU 1, until the first one closes the socket.
///
/// # Errors
/// What went wrong, as a sentence.
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

/// The next message with its geometry and `N` descriptors.
fn given<const N: usize>(socket: impl AsFd) -> Result<(Geometry, [OwnedFd; N]), Failure> {
    let (geometry, fds) = protocol::receive(socket, MAX_REQUEST)?;
    let fds = fds.try_into().map_err(|_| "ring-peer is for xfan-bench ring alone")?;
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
