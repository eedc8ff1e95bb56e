//! An AF_XDP socket as a lane sees it: an RX ring, a FILL ring, and a way to sleep.
//!
//! xsk-rs makes the socket and binds it. Its accessors are calls into C for every descriptor, though, so the lane maps
//! the two rings it uses a second time and works on them itself ([`rings`]); xsk-rs' own handles on them are kept for
//! their clean-up and never used.

pub mod rings;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xsk_rs::config::{BindFlags, Interface, LibxdpFlags, QueueSize, SocketConfig};
use xsk_rs::{CompQueue, FillQueue, RxQueue, Socket, TxQueue};

use crate::frames::Frames;
use crate::source::{PacketSource, Received};
use crate::umem::PacketMemory;
use rings::{FillRing, RxRing};

/// How packets get from the NIC into the UMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// The NIC writes into the UMEM.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

impl std::fmt::Display for CopyMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CopyMode::ZeroCopy => "zero-copy",
            CopyMode::Copy => "copy",
        })
    }
}

/// A socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else has the queue.
    #[error(
        "queue {queue} of {interface} is bound by another AF_XDP socket: end the program that holds it \
         (`ss --xdp -p` names it), or leave the queue out with --queues"
    )]
    Busy {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: u32,
    },
    /// The driver cannot do zero-copy.
    #[error(
        "queue {queue} of {interface} cannot be bound in zero-copy mode ({source}): use a driver that can, \
         or bind_mode = \"copy\""
    )]
    NoZeroCopy {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot bind an AF_XDP socket to queue {queue} of {interface}: {source}")]
    Other {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An AF_XDP socket bound to one RX queue.
#[derive(Debug)]
pub struct XskSource {
    rx: RxRing,
    fill: FillRing,
    /// Own the socket: the rings above are mappings of its memory.
    handles: Handles,
}

#[derive(Debug)]
struct Handles {
    rx: RxQueue,
    _tx: TxQueue,
    _fill: FillQueue,
    _completion: CompQueue,
}

/// How long a queue may stay busy after its last socket was closed: the kernel lets go of it in the background, which
/// takes milliseconds, or seconds on a machine that is busy itself.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);

impl XskSource {
    /// Binds a socket to `queue`. All sockets of one UMEM share the mode of the first.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind(
        interface: &str,
        queue: u32,
        memory: &PacketMemory,
        rx_ring: u32,
        fill_ring: u32,
        mode: CopyMode,
    ) -> Result<Self, BindError> {
        let fail = |source: io::Error| {
            let interface = interface.to_owned();
            match source.raw_os_error() {
                Some(libc::EBUSY) => BindError::Busy { interface, queue },
                Some(libc::EOPNOTSUPP | libc::EINVAL) if mode == CopyMode::ZeroCopy => {
                    BindError::NoZeroCopy { interface, queue, source }
                }
                _ => BindError::Other { interface, queue, source },
            }
        };
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
        let umem = memory.umem().ok_or_else(|| fail(invalid("the packet memory is no UMEM".into())))?;
        let name: Interface = interface.parse().map_err(|error| fail(invalid(format!("{error}"))))?;
        let flags = match mode {
            CopyMode::ZeroCopy => BindFlags::XDP_ZEROCOPY,
            CopyMode::Copy => BindFlags::XDP_COPY,
        };
        let size = |size| QueueSize::new(size).map_err(|error| fail(invalid(error.to_string())));
        let config = SocketConfig::builder()
            .rx_queue_size(size(rx_ring)?)
            .tx_queue_size(size(64)?)
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(flags | BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let started = std::time::Instant::now();
        let mut told = false;
        let (tx, rx, fill_and_completion) = loop {
            // SAFETY: this socket's FILL and COMPLETION rings are its own, as no other socket of this UMEM is bound to
            // this queue; frames are posted to it by its lane only.
            match unsafe { Socket::new(config, umem, &name, queue) } {
                Ok(parts) => break parts,
                Err(error) => {
                    let source = errno_of(&error);
                    if source.raw_os_error() == Some(libc::EBUSY) && started.elapsed() < BUSY_PATIENCE {
                        if !std::mem::replace(&mut told, true) {
                            tracing::info!(
                                interface,
                                queue,
                                "the queue is busy: waiting {BUSY_PATIENCE:?} for it"
                            );
                        }
                        std::thread::sleep(Duration::from_millis(20));
                        continue;
                    }
                    return Err(fail(source));
                }
            }
        };
        let (fill, completion) = fill_and_completion
            .ok_or_else(|| fail(io::Error::other("the queue has rings already: it is listed twice")))?;
        // SAFETY: the handles that own the socket are kept beside the rings, which are used through these mappings
        // only; the sizes are those that the socket and the UMEM were made with.
        let rings = unsafe { (RxRing::map(rx.fd(), rx_ring), FillRing::map(rx.fd(), fill_ring)) };
        Ok(XskSource {
            rx: rings.0.map_err(fail)?,
            fill: rings.1.map_err(fail)?,
            handles: Handles { rx, _tx: tx, _fill: fill, _completion: completion },
        })
    }

    /// A second descriptor of the socket: to register it in the XSKMAP, and to ask for statistics. The queue stays bound
    /// until it is closed, too.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn second_descriptor(&self) -> io::Result<OwnedFd> {
        rings::borrow(self.handles.rx.fd()).try_clone_to_owned()
    }
}

/// The errno behind xsk-rs' error.
fn errno_of(error: &(dyn std::error::Error + 'static)) -> io::Error {
    let errno = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error);
    errno.map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}

impl PacketSource for XskSource {
    #[inline(always)]
    fn receive(&mut self, batch: &mut [Received]) -> usize {
        self.rx.receive(batch)
    }

    #[inline(always)]
    fn post(&mut self, frames: &mut Frames, count: u32) {
        let room = self.fill.room();
        for offset in frames.post(count.min(room)) {
            self.fill.push(u64::from(*offset));
        }
        self.fill.publish();
        if self.fill.needs_wakeup() {
            // A zero-copy driver that ran out of frames waits for this; in copy mode the flag is never raised.
            rings::kick(self.handles.rx.fd());
        }
    }

    fn wait(&mut self, doorbell: BorrowedFd<'_>, timeout: Duration) {
        let socket = rings::borrow(self.handles.rx.fd());
        let mut fds = [PollFd::new(socket, PollFlags::POLLIN), PollFd::new(doorbell, PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        // Interrupted, timed out or woken: the caller looks for work in each case.
        let _ = poll(&mut fds, timeout);
        if fds[1].any().unwrap_or(false) {
            let _ = nix::unistd::read(doorbell, &mut [0; 8]);
        }
    }
}
