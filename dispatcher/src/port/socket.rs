//! An AF_XDP socket as a lane sees it: an RX ring, a FILL ring, and a way to sleep.
//!
//! xsk-rs makes the socket, maps its rings and binds it. But its accessors call into C for every
//! descriptor. So the lane accesses its two rings directly ([`rings`]). xsk-rs' handles only keep
//! the rings mapped.

#![allow(unsafe_code, reason = "xsk-rs leaves the lifetime of the UMEM to its caller")]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use xfan_shm::ids::QueueId;
use xsk_rs::config::{BindFlags, Interface, LibxdpFlags, QueueSize, SocketConfig};
use xsk_rs::{CompQueue, FillQueue, RxQueue, Socket, TxQueue};

use crate::config::FrameBudget;
use crate::memory::frames::Frames;
use crate::memory::umem::PacketMemory;
use crate::port::mode::CopyMode;
use crate::port::rings::{self, FillRing, RxRing};
use crate::port::source::{PacketSource, Received};

/// A socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket is bound to the queue.
    #[error(
        "queue {queue} of {interface} is bound by another AF_XDP socket: end the program that holds it \
         (`ss --xdp -p` names it), or leave the queue out with --queues"
    )]
    Busy {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: QueueId,
    },
    /// Zero-copy does not work on this queue.
    #[error(
        "queue {queue} of {interface} cannot be bound in zero-copy mode ({source}): {}",
        why_no_zero_copy(source)
    )]
    NoZeroCopy {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: QueueId,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot bind an AF_XDP socket to queue {queue} of {interface}: {source}")]
    Other {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: QueueId,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket is bound, but its rings cannot be found.
    #[error("cannot find the rings of the AF_XDP socket of queue {queue} of {interface}: {source}")]
    Rings {
        /// Interface name.
        interface: String,
        /// RX queue.
        queue: QueueId,
        /// What is wrong.
        source: io::Error,
    },
}

/// What an errno of bind(2) in zero-copy mode most likely means: the kernel gives no other reason.
fn why_no_zero_copy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the driver or the device does not support it",
        Some(libc::EINVAL) => {
            "the driver supports it, but not as the interface is set up: not with this MTU and frame size, \
             or not for this queue (ethtool -l)"
        }
        Some(libc::ENOMEM | libc::ENOSPC | libc::ENOBUFS) => {
            "the driver has no memory or no queue left for it"
        }
        _ => "the driver refuses it",
    }
}

impl BindError {
    /// `source` is the error of bind(2) for this queue in this mode.
    fn new(interface: &str, queue: QueueId, mode: CopyMode, source: io::Error) -> Self {
        let interface = interface.to_owned();
        match (mode, source.raw_os_error()) {
            (_, Some(libc::EBUSY)) => BindError::Busy { interface, queue },
            // The mode does not cause these errors: the next mode would fail in the same way.
            (CopyMode::Copy, _)
            | (_, None | Some(libc::ENODEV | libc::EPERM | libc::EACCES | libc::EMFILE | libc::ENFILE)) => {
                BindError::Other { interface, queue, source }
            }
            (CopyMode::ZeroCopy, _) => BindError::NoZeroCopy { interface, queue, source },
        }
    }
}

/// An AF_XDP socket bound to one RX queue.
#[derive(Debug)]
pub struct XskSource {
    rx: RxRing,
    fill: FillRing,
    /// These own the socket and keep the rings above mapped.
    handles: Handles,
}

#[derive(Debug)]
struct Handles {
    rx: RxQueue,
    _tx: TxQueue,
    _fill: FillQueue,
    _completion: CompQueue,
}

/// How long a queue may stay busy after its last socket was closed: the kernel releases it in the
/// background, which takes milliseconds, or seconds on a busy machine.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);

impl XskSource {
    /// Binds a socket to `queue`. All sockets of one UMEM share the mode of the first.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind(
        interface: &str,
        queue: QueueId,
        memory: &PacketMemory,
        budget: &FrameBudget,
        mode: CopyMode,
    ) -> Result<Self, BindError> {
        let FrameBudget { rx_ring, fill_ring, .. } = *budget;
        let fail = |source| BindError::new(interface, queue, mode, source);
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
            // SAFETY: this socket's FILL and COMPLETION rings are its own, as no other socket of
            // this UMEM is bound to this queue; frames are posted to it by its lane only.
            match unsafe { Socket::new(config, umem, &name, queue.0) } {
                Ok(parts) => break parts,
                Err(error) => {
                    let source = errno_of(&error);
                    if source.raw_os_error() == Some(libc::EBUSY) && started.elapsed() < BUSY_PATIENCE {
                        if !std::mem::replace(&mut told, true) {
                            tracing::info!(
                                interface,
                                queue = queue.0,
                                "the queue is busy: waiting up to {BUSY_PATIENCE:?} for it"
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
        // SAFETY: the handles, which keep the rings mapped, are kept beside them and never used;
        // the sizes are those that the socket and the UMEM were made with.
        let rings = unsafe { (RxRing::find(rx.fd(), rx_ring), FillRing::find(rx.fd(), fill_ring)) };
        let lost = |source| BindError::Rings { interface: interface.to_owned(), queue, source };
        Ok(XskSource {
            rx: rings.0.map_err(lost)?,
            fill: rings.1.map_err(lost)?,
            handles: Handles { rx, _tx: tx, _fill: fill, _completion: completion },
        })
    }

    /// The two rings, for callers that use them without a lane.
    pub fn rings(&mut self) -> (&mut RxRing, &mut FillRing) {
        (&mut self.rx, &mut self.fill)
    }

    /// A second descriptor of the socket: to register it in the XSKMAP, and to read its statistics.
    /// The queue stays bound until this descriptor is closed as well.
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
        let free = self.fill.free();
        for frame in frames.post(count.min(free)) {
            self.fill.push(*frame);
        }
        self.fill.publish();
        if self.fill.needs_wakeup() {
            // A zero-copy driver that ran out of frames waits for this; in copy mode the flag is
            // never raised.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_called_by_its_own_name() {
        let error =
            |mode, errno| BindError::new("eth1", QueueId(3), mode, io::Error::from_raw_os_error(errno));
        for mode in [CopyMode::ZeroCopy, CopyMode::Copy] {
            assert!(matches!(error(mode, libc::EBUSY), BindError::Busy { .. }));
            let gone = error(mode, libc::ENODEV);
            assert!(matches!(gone, BindError::Other { .. }) && gone.to_string().contains("No such device"));
        }
        let no_zero_copy = |errno| error(CopyMode::ZeroCopy, errno).to_string();
        assert!(no_zero_copy(libc::EOPNOTSUPP).contains("the driver or the device does not support it"));
        assert!(no_zero_copy(libc::EINVAL).contains("not as the interface is set up"));
        assert!(no_zero_copy(libc::ENOMEM).contains("Cannot allocate memory"));
        assert!(matches!(error(CopyMode::Copy, libc::EINVAL), BindError::Other { .. }));
    }
}
