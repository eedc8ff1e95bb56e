//! How AF_XDP sockets for sending and receiving are bound.

use std::error::Error;
use std::io;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use xfan::port::rings::{CompletionRing, TxRing};
use xsk_rs::config::{BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig};
use xsk_rs::{CompQueue, FillQueue, FrameDesc, RxQueue, Socket, TxQueue, Umem};

/// Bytes of a frame of packet memory: one page, the most AF_XDP allows.
pub const FRAME_BYTES: u32 = 4096;
/// The longest Ethernet frame in bytes: a frame of packet memory minus the headroom that xsk-rs
/// keeps free.
pub const MAX_FRAME_BYTES: usize = FRAME_BYTES as usize - 256;

/// How long to retry a bind. A closed socket frees its queue later, after RCU and the kernel's lock
/// of all interfaces, which takes seconds on a busy machine.
const BUSY_PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(10);

/// Why there is no socket on a queue.
#[derive(Debug, thiserror::Error)]
#[error("no AF_XDP socket on queue {queue} of {interface}: {reason}{}", hint(.errno))]
pub struct XskError {
    /// The interface.
    pub interface: String,
    /// The queue.
    pub queue: u32,
    /// The error of the library or the kernel.
    pub reason: String,
    /// The kernel's error number, if the kernel refused.
    pub errno: Option<i32>,
}

fn hint(errno: &Option<i32>) -> &'static str {
    match *errno {
        Some(libc::EPERM | libc::EACCES) => "; root or CAP_NET_RAW and CAP_NET_ADMIN are needed",
        Some(libc::EBUSY) => "; another program holds the queue, or this interface in zero-copy mode",
        Some(libc::EINVAL) => "; does the interface have that queue (ethtool -l)?",
        _ => "",
    }
}

/// A socket in copy mode with its own memory, and all frames of that memory, which the caller owns.
pub struct Xsk {
    pub umem: Umem,
    /// The frames in the order of their addresses.
    pub frames: Vec<FrameDesc>,
    pub tx: TxRing,
    pub rx: RxQueue,
    pub fill: FillQueue,
    pub completion: CompletionRing,
    /// Keeps the mappings of the two rings that are accessed directly.
    _mapped: (TxQueue, CompQueue),
}

impl Xsk {
    /// Binds a socket to `queue` of `interface` in the namespace of the calling thread, with
    /// `frame_count` frames (a power of two) and rings with as many slots; the FILL ring has twice
    /// as many.
    pub fn bind(interface: &str, queue: u32, frame_count: NonZeroU32) -> Result<Self, XskError> {
        let failed = |error: &dyn Error| {
            let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
            let reason = source.map_or_else(|| error.to_string(), io::Error::to_string);
            let errno = source.and_then(io::Error::raw_os_error);
            XskError { interface: interface.into(), queue, reason, errno }
        };
        let ring = QueueSize::new(frame_count.get()).map_err(|error| failed(&error))?;
        let fill_ring = QueueSize::new(frame_count.get() * 2).map_err(|error| failed(&error))?;
        let page = FrameSize::new(FRAME_BYTES).map_err(|error| failed(&error))?;
        let umem_config = UmemConfig::builder()
            .frame_size(page)
            .fill_queue_size(fill_ring)
            .comp_queue_size(ring)
            .build()
            .map_err(|error| failed(&error))?;
        let socket_config = SocketConfig::builder()
            .rx_queue_size(ring)
            .tx_queue_size(ring)
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(BindFlags::XDP_COPY | BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let name: Interface = interface.parse().map_err(|error| failed(&error))?;

        let begin = Instant::now();
        loop {
            let (umem, frames) =
                Umem::new(umem_config, frame_count, false).map_err(|error| failed(&error))?;
            // SAFETY: the memory is new and not shared with another socket.
            let error = match unsafe { Socket::new(socket_config, &umem, &name, queue) } {
                Ok((tx_queue, rx, Some((fill, completion_queue)))) => {
                    let entries = frame_count.get();
                    // SAFETY: `_mapped` keeps the rings mapped and is not used otherwise; the sizes
                    // are those of the socket and the memory.
                    let (tx, completion) =
                        unsafe { (TxRing::find(rx.fd(), entries), CompletionRing::find(rx.fd(), entries)) };
                    return Ok(Self {
                        umem,
                        frames,
                        tx: tx.map_err(|error| failed(&error))?,
                        rx,
                        fill,
                        completion: completion.map_err(|error| failed(&error))?,
                        _mapped: (tx_queue, completion_queue),
                    });
                }
                Ok((_, _, None)) => unreachable!("new memory comes with its FILL and COMPLETION rings"),
                Err(error) => failed(&error),
            };
            if error.errno != Some(libc::EBUSY) || begin.elapsed() > BUSY_PATIENCE {
                return Err(error);
            }
            std::thread::sleep(RETRY);
        }
    }
}
