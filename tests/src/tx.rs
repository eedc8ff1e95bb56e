//! Sends frames through one TX queue, each exactly once.
//!
//! An AF_XDP socket in copy mode, bound to queue q, transmits with that queue's number, whatever
//! the frame; on a veth the peer receives it on its RX queue q. Frames are handed over one by one,
//! so that the kernel's answer refers to a single frame (`__xsk_generic_xmit`,
//! `__dev_direct_xmit`):
//!
//! | sendto(2) | the frame | action |
//! |---|---|---|
//! | 0 | was accepted by the driver | count it |
//! | EBUSY | was refused by the driver (a full ring) and freed | send it again |
//! | EAGAIN, ENOBUFS | is still in the TX ring: no buffer is free for it | try again |
//! | anything else | is lost with the socket | fail |
//!
//! The kernel completes a frame when the packet made of it is freed. Once all are completed, all
//! have left the veth, the receiver's XDP program has handled them, and nothing is in flight.

use std::io::{self, Write};
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use xfan_shm::ids::UmemOffset;
use xsk_rs::FrameDesc;

use crate::link::{Link, LinkError};
use crate::xsk::{FRAME_BYTES, Xsk};
pub use crate::xsk::{MAX_FRAME_BYTES, XskError};

/// The most frames in flight.
const FRAMES: NonZeroU32 = NonZeroU32::new(256).expect("not 0");
/// The shortest frame: an Ethernet header.
const MIN_FRAME_BYTES: usize = 14;
/// How long the other side may refuse one frame, or hold the frames in flight, before sending
/// fails.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_micros(50);

/// A socket that sends on one queue.
pub struct TxSocket {
    queue: u32,
    interface: String,
    max_frame_bytes: usize,
    xsk: Xsk,
    /// Frames that the socket owns, and not the kernel.
    free: Vec<FrameDesc>,
    sent: u64,
    refused: u64,
}

impl AsRawFd for TxSocket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.xsk.rx.fd().as_raw_fd()
    }
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
pub enum TxError {
    /// The interface does not exist.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The queue has no socket.
    #[error(transparent)]
    Bind(#[from] XskError),
    /// The interface has no such queue.
    #[error(
        "{interface} has {queues} TX queues in use, so there is no queue {queue}; see `ethtool -l {interface}`"
    )]
    NoQueue {
        /// The interface.
        interface: String,
        /// The queue that was requested.
        queue: u32,
        /// Queues in use.
        queues: u32,
    },
    /// The frame is too long or too short.
    #[error(
        "a frame of {bytes} bytes cannot be sent on {interface}: it takes {MIN_FRAME_BYTES} to {limit}; the limit is \
         the MTU and 18 (raise it on both ends: ip link set dev {interface} mtu N), at most {MAX_FRAME_BYTES}"
    )]
    Length {
        /// The interface.
        interface: String,
        /// The frame's length.
        bytes: usize,
        /// The longest frame at present.
        limit: usize,
    },
    /// The other side accepts nothing.
    #[error(
        "queue {queue} of {interface} refused a frame for {} s: is the peer up, and its MTU not smaller?",
        PATIENCE.as_secs()
    )]
    Refused {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// The receiver holds packets.
    #[error(
        "{frames} frames sent on queue {queue} of {interface} were not completed after {} s: the receiver holds them",
        PATIENCE.as_secs()
    )]
    Uncompleted {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// Frames that were not completed.
        frames: usize,
    },
    /// The kernel refuses to send.
    #[error("sending on queue {queue} of {interface}: {source}")]
    Send {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// Why.
        source: io::Error,
    },
}

impl TxSocket {
    /// Opens queue `queue` of `interface` in the namespace of the calling thread.
    ///
    /// # Errors
    /// The interface or its queue does not exist, another socket holds it, or privileges are
    /// missing.
    pub fn open(interface: &str, queue: u32) -> Result<Self, TxError> {
        let link = Link::named(interface)?;
        if queue >= link.tx_queues {
            let queues = link.tx_queues;
            return Err(TxError::NoQueue { interface: interface.into(), queue, queues });
        }
        let xsk = Xsk::bind(interface, queue, FRAMES)?;
        let free = xsk.frames.clone();
        let max_frame_bytes = link.max_frame_bytes().min(MAX_FRAME_BYTES);
        Ok(Self { queue, interface: interface.into(), max_frame_bytes, xsk, free, sent: 0, refused: 0 })
    }

    /// The number of its queue.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Frames sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// How many times the driver refused a frame, which was then sent again.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Checks that a frame of `bytes` can be sent.
    ///
    /// # Errors
    /// It is too long or too short for the interface.
    pub fn check_length(&self, bytes: usize) -> Result<(), TxError> {
        if (MIN_FRAME_BYTES..=self.max_frame_bytes).contains(&bytes) {
            return Ok(());
        }
        Err(TxError::Length { interface: self.interface.clone(), bytes, limit: self.max_frame_bytes })
    }

    /// Sends one frame, waiting while the receiver is full. On success the driver has accepted the
    /// frame, once; on error it has not.
    ///
    /// # Errors
    /// The frame's length is out of range, the receiver accepts nothing for too long, or the
    /// interface is down or gone.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), TxError> {
        self.check_length(frame.len())?;
        let begin = Instant::now();
        self.submit(frame)?;
        loop {
            match self.push() {
                Ok(()) => {
                    self.sent += 1;
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    self.refused += 1;
                    self.wait(begin)?;
                    self.submit(frame)?;
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => {
                    self.wait(begin)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let (interface, queue) = (self.interface.clone(), self.queue);
                    return Err(TxError::Send { interface, queue, source });
                }
            }
        }
    }

    /// Waits until every frame sent has left the veth and has been handled by the receiver's XDP
    /// program, or freed.
    ///
    /// # Errors
    /// The receiver holds frames for too long.
    pub fn finish(&mut self) -> Result<(), TxError> {
        self.reclaim_until(FRAMES.get() as usize)
    }

    /// Copies `frame` into free memory and appends it to the TX ring.
    fn submit(&mut self, frame: &[u8]) -> Result<(), TxError> {
        self.reclaim_until(1)?;
        let mut descriptor = self.free.pop().expect("one was waited for");
        // SAFETY: the descriptor is of this memory, and as it was in `free` neither the kernel nor
        // anyone else uses the frame.
        let mut data = unsafe { self.xsk.umem.data_mut(&mut descriptor) };
        let mut cursor = data.cursor();
        cursor.set_pos(0);
        cursor.write_all(frame).expect("the length was checked against the frame's");
        let offset = UmemOffset(u32::try_from(descriptor.addr()).expect("the memory is small"));
        let length = u32::try_from(frame.len()).expect("the length was checked against the frame's");
        // The kernel owns the frame until it comes back through the COMPLETION ring.
        assert!(self.xsk.tx.push(offset, length), "the TX ring has a slot for every frame");
        self.xsk.tx.publish();
        Ok(())
    }

    /// Makes the kernel transmit what is in the TX ring, and returns its answer.
    fn push(&self) -> io::Result<()> {
        let socket = self.as_raw_fd();
        // SAFETY: the call has no buffer and no address; the descriptor is open as long as `self`
        // lives.
        let result =
            unsafe { libc::sendto(socket, std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn wait(&mut self, begin: Instant) -> Result<(), TxError> {
        if begin.elapsed() > PATIENCE {
            return Err(TxError::Refused { interface: self.interface.clone(), queue: self.queue });
        }
        self.reclaim();
        std::thread::sleep(PAUSE);
        Ok(())
    }

    fn reclaim_until(&mut self, wanted: usize) -> Result<(), TxError> {
        let begin = Instant::now();
        while self.free.len() < wanted {
            self.reclaim();
            if self.free.len() < wanted {
                if begin.elapsed() > PATIENCE {
                    let frames = FRAMES.get() as usize - self.free.len();
                    let (interface, queue) = (self.interface.clone(), self.queue);
                    return Err(TxError::Uncompleted { interface, queue, frames });
                }
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }

    /// Takes back the frames that the kernel has completed.
    fn reclaim(&mut self) {
        let mut completed = [UmemOffset::default(); FRAMES.get() as usize];
        let count = self.xsk.completion.take(&mut completed);
        let frame = |offset: &UmemOffset| self.xsk.frames[(offset.0 / FRAME_BYTES) as usize];
        self.free.extend(completed[..count].iter().map(frame));
    }
}
