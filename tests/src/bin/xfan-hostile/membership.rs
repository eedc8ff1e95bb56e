//! The conversation with the dispatcher, and the membership that it grants.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use xfan_shm::layout::{Geometry, Up, VERSION};
use xfan_shm::protocol::{
    self, Attach, Attached, ENV_MEMBER, ENV_SOCKET, ENV_TOKEN, MAX_REPLY, Reply, Request,
};
use xfan_shm::segment::{self, Mapping};

use crate::{Outcome, PAUSE};

pub fn member() -> Option<String> {
    std::env::var(ENV_MEMBER).ok()
}

pub fn token() -> Option<String> {
    std::env::var(ENV_TOKEN).ok()
}

/// Connects to the dispatcher.
pub fn dial() -> Outcome<OwnedFd> {
    let path = std::env::var_os(ENV_SOCKET).ok_or("no socket")?;
    let control = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(control.as_raw_fd(), &UnixAddr::new(path.as_os_str())?)?;
    Ok(control)
}

/// Asks to attach on a new connection. The error is the refusal.
pub fn ask(
    version: u32,
    member: Option<String>,
    token: Option<String>,
) -> Outcome<(OwnedFd, Attached, Vec<OwnedFd>)> {
    let control = dial()?;
    let attach = Attach { version, group: None, member, token, program: "hostile".into() };
    protocol::send(&control, &Request::Attach(attach), &[])?;
    match protocol::receive(&control, MAX_REPLY)? {
        (Reply::Attached(attached), fds) => Ok((control, attached, fds)),
        (Reply::Refused(refusal), _) => Err(refusal.message.into()),
        (reply, _) => Err(format!("{reply:?}").into()),
    }
}

/// Reports that its segments are mapped. The error is the refusal.
pub fn ready(control: &OwnedFd) -> Outcome<()> {
    match protocol::ask(control, &Request::Ready)?.0 {
        Reply::Joined => Ok(()),
        Reply::Refused(refusal) => Err(refusal.message.into()),
        reply => Err(format!("{reply:?}").into()),
    }
}

/// A membership: the connection and the segments.
pub struct Membership {
    pub control: OwnedFd,
    pub geometry: Geometry,
    pub umem_bytes: usize,
    pub umem: OwnedFd,
    pub down: OwnedFd,
    pub up: OwnedFd,
    pub doorbell: OwnedFd,
    /// The worker's own segment, mapped before it is sealed.
    pub segment: Mapping,
    own: Up,
}

impl Membership {
    /// Attaches like any worker.
    pub fn join() -> Outcome<Self> {
        let membership = Self::ask()?;
        membership.seal_and_ready()?;
        Ok(membership)
    }

    /// Seals the worker's own segment as required, and reports that it is ready.
    pub fn seal_and_ready(&self) -> Outcome<()> {
        segment::seal_against_further_writers(&self.up)?;
        ready(&self.control)
    }

    /// Attaches and maps the segments, but neither seals its own nor reports that it is ready.
    pub fn ask() -> Outcome<Self> {
        let (control, attached, fds) = ask(VERSION, member(), token())?;
        let [umem, down, up, doorbell] =
            <[OwnedFd; protocol::ATTACHED_FDS]>::try_from(fds).map_err(|_| "unexpected descriptors")?;
        let umem_bytes = usize::try_from(attached.umem_bytes)?;
        let geometry = attached.geometry;
        let segment = Mapping::read_write(&up, geometry.up_bytes())?;
        let own = Up::open(&up, geometry)?;
        Ok(Membership { control, geometry, umem_bytes, umem, down, up, doorbell, segment, own })
    }

    /// Writes noise over its own segment, including the headers, until SIGTERM.
    pub fn make_noise(&self, seed: u64) -> Outcome<()> {
        let segment = &self.segment;
        let mut state = seed;
        loop {
            for word in 0..segment.length() / 8 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // SAFETY: in bounds and aligned: mappings begin at a page. The worker may write to
                // its own segment.
                unsafe { segment.address().cast::<u64>().add(word).write_volatile(state ^ state >> 29) };
            }
            if pending_signals()?.contains(Signal::SIGTERM) {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Claims to fall asleep repeatedly, and takes note of each ring, until SIGTERM.
    pub fn sleep_again_and_again(&self) -> Outcome<()> {
        let mut epoch = 1;
        while !pending_signals()?.contains(Signal::SIGTERM) {
            self.own.epoch().store(epoch, std::sync::atomic::Ordering::Release);
            epoch = epoch.wrapping_add(2);
            xfan_shm::bell::silence(&self.doorbell);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Makes ringing the doorbell block, if the descriptor allows it, and claims to sleep, so that
    /// the lane rings it.
    pub fn jam(&self) -> Outcome<()> {
        let fd = self.doorbell.as_raw_fd();
        // SAFETY: the call takes no pointers.
        unsafe { libc::fcntl(fd, libc::F_SETFL, 0) };
        let full = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: the buffer has the given length.
        unsafe { libc::write(fd, full.as_ptr().cast(), full.len()) };
        self.own.epoch().store(1, std::sync::atomic::Ordering::Release);
        Ok(())
    }
}

pub fn pending_signals() -> Outcome<SigSet> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the pointer leads to memory for a signal set.
    Errno::result(unsafe { libc::sigpending(set.as_mut_ptr()) })?;
    // SAFETY: the call succeeded and has filled the set.
    Ok(unsafe { SigSet::from_sigset_t_unchecked(set.assume_init()) })
}
