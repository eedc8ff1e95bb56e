//! Plain AF_XDP sockets that keep what arrives, by queue. For tests of the traffic tools, and for
//! tests in which another program holds the queues.

use std::num::NonZeroU32;
use std::os::fd::AsRawFd;

use aya::maps::{MapData, XskMap};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use xsk_rs::FrameDesc;

use crate::xsk::{Xsk, XskError};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.bpf.o"));

/// The number of frames of each queue, which is how many packets it holds between two reads.
pub const FRAMES: NonZeroU32 = NonZeroU32::new(2048).expect("not 0");
/// The most descriptors taken from a ring at once.
const BATCH: usize = 64;
/// The longest wait between two checks of the sockets. A packet on the polled queue ends it
/// earlier.
const POLL_MILLISECONDS: i32 = 5;

/// A frame that arrived.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Received {
    /// The RX queue it arrived on.
    pub queue: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Sockets on some queues of an interface, and an XDP program that feeds them. Packets of other
/// queues go to the kernel.
pub struct Receiver {
    // The fields are dropped in this order, and the program must be the first.
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
    /// The kernel or the loader refused the XDP program.
    #[error("cannot attach the XDP program to {interface}: {reason}")]
    Program {
        /// The interface.
        interface: String,
        /// The error of the loader or the kernel.
        reason: String,
    },
}

impl Receiver {
    /// Opens `queues` of `interface` in the namespace of the calling thread.
    ///
    /// # Errors
    /// Another socket holds a queue, or another XDP program the interface.
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

    /// What has arrived so far, in order of arrival on each queue.
    pub fn drain(&mut self) -> Vec<Received> {
        let mut received = Vec::new();
        self.queues.iter_mut().for_each(|queue| queue.drain_into(&mut received));
        received
    }

    /// Waits without limit until at least `count` frames have arrived, and returns all that have.
    pub fn collect(&mut self, count: usize) -> Vec<Received> {
        let mut received = self.drain();
        while received.len() < count {
            if let Some(queue) = self.queues.first_mut() {
                // An error counts as no packet; the loop checks the rings themselves.
                let _ = queue.xsk.rx.poll(POLL_MILLISECONDS);
            }
            received.extend(self.drain());
        }
        received
    }

    /// Frames that arrived and were dropped because no frame or slot was free, by the kernel's
    /// counters of all queues.
    ///
    /// # Errors
    /// The kernel does not report them.
    pub fn dropped(&self) -> std::io::Result<u64> {
        let mut dropped = 0;
        for queue in &self.queues {
            let counters = queue.xsk.rx.fd().xdp_statistics()?;
            // rx_dropped includes packets that found the FILL ring empty.
            dropped += counters.rx_dropped() + counters.rx_ring_full();
        }
        Ok(dropped)
    }
}

impl Queue {
    fn drain_into(&mut self, received: &mut Vec<Received>) {
        let mut descriptors = [FrameDesc::default(); BATCH];
        loop {
            // SAFETY: the ring and its descriptors belong to this socket's memory.
            let count = unsafe { self.xsk.rx.consume(&mut descriptors) };
            if count == 0 {
                return;
            }
            for descriptor in &descriptors[..count] {
                // SAFETY: the frame came through the RX ring, so this socket owns it until it is
                // put into the FILL ring below.
                let bytes = unsafe { self.xsk.umem.data(descriptor) }.contents().to_vec();
                received.push(Received { queue: self.number, bytes });
            }
            self.refill(&descriptors[..count]);
        }
    }

    fn refill(&mut self, descriptors: &[FrameDesc]) {
        // SAFETY: the frames are in this socket's memory, and the caller owns them: they are new,
        // or read and no longer borrowed.
        let produced = unsafe { self.xsk.fill.produce(descriptors) };
        assert_eq!(produced, descriptors.len(), "the FILL ring has two slots per frame");
    }
}
