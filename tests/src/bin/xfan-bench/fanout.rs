//! The alternative without xfan: AF_PACKET with a TPACKET_V3 ring per process, and
//! PACKET_FANOUT_HASH between the processes.
//!
//! A ring has 32 blocks of 1 MiB. The kernel hands over a block when it is full or 10 ms old, and
//! wakes the process that sleeps in poll(2).

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use xfan_shm::clock::ticks;

use crate::Failure;
use crate::tally::{self, Tally};

const BLOCK_BYTES: u32 = 1 << 20;
const BLOCKS: u32 = 32;
const RING_BYTES: usize = BLOCK_BYTES as usize * BLOCKS as usize;
/// The age in milliseconds at which a block is handed over.
const BLOCK_AGE_MS: u32 = 10;

/// Options of `xfan-bench fanout`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Interface
    #[arg(short, long, value_name = "IFACE")]
    interface: String,
    /// CPU to run on
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpu: usize,
    /// Number of the fanout group, the same for all processes that share the packets
    #[arg(long, default_value_t = 1, value_name = "G")]
    group: u16,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// A sentence that says what failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    let mut meter = tally::begin(options.cpu)?;
    let mut ring = Ring::open(&options.interface, options.group)
        .map_err(|error| format!("no AF_PACKET socket on {}: {error}", options.interface))?;
    tally::say(tally::READY)?;
    let mut tally = Tally::default();
    while tally::goes_on() {
        let start = ticks();
        match ring.read_block(|packet| tally.count(packet)) {
            Some(packets) => meter.add(start, ticks(), packets),
            None => ring.sleep(),
        }
    }
    let drops = ring.drops()?;
    tally.finish(&meter, drops)
}

/// A socket and its ring of blocks.
struct Ring {
    socket: OwnedFd,
    memory: NonNull<u8>,
    /// The next block.
    block: usize,
}

impl Ring {
    fn open(interface: &str, group: u16) -> io::Result<Self> {
        // SAFETY: the call takes no pointers.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made the descriptor, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        set(&socket, libc::PACKET_VERSION, &libc::tpacket_versions::TPACKET_V3)?;
        // SAFETY: `tpacket_req3` has only integers, for which zero is valid.
        let mut request: libc::tpacket_req3 = unsafe { std::mem::zeroed() };
        request.tp_block_size = BLOCK_BYTES;
        request.tp_block_nr = BLOCKS;
        request.tp_frame_size = 2048;
        request.tp_frame_nr = BLOCK_BYTES / 2048 * BLOCKS;
        request.tp_retire_blk_tov = BLOCK_AGE_MS;
        set(&socket, libc::PACKET_RX_RING, &request)?;
        let memory = map(&socket)?;
        let ring = Ring { socket, memory, block: 0 };
        bind(&ring.socket, interface)?;
        set(&ring.socket, libc::PACKET_FANOUT, &(u32::from(group) | libc::PACKET_FANOUT_HASH << 16))?;
        Ok(ring)
    }

    /// Reads the next block, gives it back, and returns its number of packets; `None` if the kernel
    /// still has it.
    fn read_block(&mut self, mut read: impl FnMut(&[u8])) -> Option<u32> {
        let header = self.header();
        // SAFETY: a block's header is mapped and aligned; both sides access the word atomically.
        let status = unsafe { AtomicU32::from_ptr(&raw mut (*header).block_status) };
        // Acquire: pairs with the kernel's barrier before it hands the block over in
        // prb_close_block.
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: the kernel does not write to the block until its status is set below.
        let (packets, first) = unsafe { ((*header).num_pkts, (*header).offset_to_first_pkt) };
        let mut at = self.block * BLOCK_BYTES as usize + first as usize;
        for _ in 0..packets {
            // SAFETY: as above; the block has this many packets, the first one at `first`.
            at += unsafe { self.read_packet(at, &mut read) };
        }
        // Release: everything is read before the kernel writes to the block again.
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.block = (self.block + 1) % BLOCKS as usize;
        Some(packets)
    }

    /// The header of the next block.
    fn header(&self) -> *mut libc::tpacket_hdr_v1 {
        // SAFETY: there are BLOCKS blocks in the mapping, and each begins with a description of
        // this form, the only one.
        unsafe {
            let block = self.memory.as_ptr().add(self.block * BLOCK_BYTES as usize);
            &raw mut (*block.cast::<libc::tpacket_block_desc>()).hdr.bh1
        }
    }

    /// Reads the packet whose header is at `at`; returns the distance to the next header.
    ///
    /// # Safety
    /// There is a packet at `at`, in a block that this process owns.
    #[inline(always)]
    unsafe fn read_packet(&self, at: usize, read: &mut impl FnMut(&[u8])) -> usize {
        // SAFETY: by this function's contract; the kernel wrote the offsets of the packet and the
        // next header.
        unsafe {
            let header = self.memory.as_ptr().add(at).cast::<libc::tpacket3_hdr>();
            let packet = header.cast::<u8>().add(usize::from((*header).tp_mac));
            read(slice::from_raw_parts(packet, (*header).tp_snaplen as usize));
            (*header).tp_next_offset as usize
        }
    }

    /// Sleeps until there is a block or a signal, for a limited time.
    fn sleep(&self) {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        // Interrupted, timed out or woken: the caller checks the ring in each case.
        let _ = poll(&mut fds, PollTimeout::from(100u8));
    }

    /// Packets that the kernel dropped because the ring was full.
    fn drops(&self) -> io::Result<u64> {
        let mut statistics = MaybeUninit::<libc::tpacket_stats_v3>::zeroed();
        let mut length = length_of::<libc::tpacket_stats_v3>();
        // SAFETY: the kernel writes at most `length` bytes to `statistics`.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                statistics.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: zeroed, then written by the kernel; the type has only integers.
        Ok(u64::from(unsafe { statistics.assume_init() }.tp_drops))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: `open` mapped the memory, and nothing else has a pointer into it.
        let _ = unsafe { munmap(self.memory.cast::<c_void>(), RING_BYTES) };
    }
}

/// Maps the ring of a socket.
fn map(socket: &OwnedFd) -> io::Result<NonNull<u8>> {
    let length = NonZeroUsize::new(RING_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    let (access, flags) =
        (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE);
    // SAFETY: no address is requested, so no existing mapping is replaced.
    Ok(unsafe { mmap(None, length, access, flags, socket, 0) }?.cast())
}

/// Makes the socket receive the interface's IPv4 packets.
fn bind(socket: &OwnedFd, interface: &str) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    // SAFETY: `sockaddr_ll` has only integers, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_IP).map_err(io::Error::other)?.to_be();
    address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    let length = length_of::<libc::sockaddr_ll>();
    // SAFETY: the kernel reads `length` bytes, the size of `address`.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets a `SOL_PACKET` option.
fn set<T: Copy>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let value: *const T = value;
    let length = length_of::<T>();
    // SAFETY: the kernel reads `length` bytes, the size of `value`.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, value.cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The size of a type as system calls take it.
#[allow(clippy::cast_possible_truncation)] // a few bytes
const fn length_of<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}
