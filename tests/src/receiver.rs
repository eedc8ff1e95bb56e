//! Plain AF_XDP sockets that keep what arrives: which bytes, on which queue. For tests of the traffic tools, and for tests
//! that need a rival who holds the queues.

use std::num::NonZeroU32;
use std::os::fd::AsRawFd;

use aya::maps::{MapData, XskMap};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use xsk_rs::FrameDesc;

use crate::xsk::{Xsk, XskError};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.bpf.o"));

/// Frames of each queue: how many packets it keeps while nobody looks.
pub const FRAMES: NonZeroU32 = NonZeroU32::new(2048).expect("not 0");
/// Most descriptors taken from a ring at once.
const BATCH: usize = 64;
/// Between two looks at the sockets; a packet ends the wait earlier, unless it came on another queue.
const POLL_MILLISECONDS: i32 = 5;

/// A frame that arrived.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Received {
    /// The RX queue it arrived on.
    pub queue: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Sockets on some queues of an interface, and an XDP program that fills them. Queues without one go to the kernel.
pub struct Receiver {
    // In the order in which they must go: the program first.
    _program: Ebpf,
    queues: Vec<Queue>,
}

struct Queue {
    number: u32,
    xsk: Xsk,
}

/// Why nothing can be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiverError {
    /// A queue has no socket.
    #[error(transparent)]
    Bind(#[from] XskError),
    /// The XDP program was refused.
    #[error("the XDP program cannot be put on {interface}: {reason}")]
    Program {
        /// The interface.
        interface: String,
        /// What the loader or the kernel said.
        reason: String,
    },
}

impl Receiver {
    /// Opens `queues` of `interface`, in the namespace of the calling thread.
    ///
    /// # Errors
    /// A queue is held by another socket, or the interface by another XDP program.
    pub fn open(interface: &str, queues: &[u32]) -> Result<Self, ReceiverError> {
        let failed = |error: &dyn std::error::Error| {
            let reason =
                error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
            ReceiverError::Program { interface: interface.into(), reason }
        };
        let mut program = EbpfLoader::new().load(OBJECT).map_err(|error| failed(&error))?;
        let map = program.take_map("SOCKETS").expect("redirect.bpf.c has this map");
        let mut map = XskMap::<MapData>::try_from(map).map_err(|error| failed(&error))?;
        let mut opened = Vec::new();
        for &number in queues {
            let mut queue = Queue { number, xsk: Xsk::bind(interface, number, FRAMES)? };
            let frames = std::mem::take(&mut queue.xsk.frames);
            queue.refill(&frames);
            let socket = queue.xsk.rx.fd().as_raw_fd();
            map.set(number, socket, 0).map_err(|error| failed(&error))?;
            opened.push(queue);
        }
        let redirect: &mut Xdp = program
            .program_mut("redirect")
            .expect("redirect.bpf.c has this program")
            .try_into()
            .map_err(|error| failed(&error))?;
        redirect.load().map_err(|error| failed(&error))?;
        redirect.attach(interface, XdpMode::Driver).map_err(|error| failed(&error))?;
        Ok(Self { _program: program, queues: opened })
    }

    /// What has arrived until now, in the order of arrival on each queue.
    pub fn drain(&mut self) -> Vec<Received> {
        let mut received = Vec::new();
        self.queues.iter_mut().for_each(|queue| queue.drain_into(&mut received));
        received
    }

    /// Waits, without limit, until at least `count` frames have arrived, and returns all that have.
    pub fn collect(&mut self, count: usize) -> Vec<Received> {
        let mut received = self.drain();
        while received.len() < count {
            if let Some(queue) = self.queues.first_mut() {
                // An error is no packet; the loop looks at the rings themselves.
                let _ = queue.xsk.rx.poll(POLL_MILLISECONDS);
            }
            received.extend(self.drain());
        }
        received
    }

    /// Frames that arrived and found no room, by the kernel's counters of all queues.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn dropped(&self) -> std::io::Result<u64> {
        let mut dropped = 0;
        for queue in &self.queues {
            let counters = queue.xsk.rx.fd().xdp_statistics()?;
            // A packet that found the FILL ring empty is in rx_dropped too.
            dropped += counters.rx_dropped() + counters.rx_ring_full();
        }
        Ok(dropped)
    }
}

impl Queue {
    fn drain_into(&mut self, received: &mut Vec<Received>) {
        let mut descriptors = [FrameDesc::default(); BATCH];
        loop {
            // SAFETY: the ring and the descriptors it yields belong to this socket's memory.
            let count = unsafe { self.xsk.rx.consume(&mut descriptors) };
            if count == 0 {
                return;
            }
            for descriptor in &descriptors[..count] {
                // SAFETY: the frame came through the RX ring, so it is ours until it is put into the FILL ring below.
                let bytes = unsafe { self.xsk.umem.data(descriptor) }.contents().to_vec();
                received.push(Received { queue: self.number, bytes });
            }
            self.refill(&descriptors[..count]);
        }
    }

    fn refill(&mut self, descriptors: &[FrameDesc]) {
        // SAFETY: the frames are of this socket's memory, and they are ours: new, or read and no longer referred to.
        let produced = unsafe { self.xsk.fill.produce(descriptors) };
        assert_eq!(produced, descriptors.len(), "the FILL ring holds twice the frames there are");
    }
}
