//! Direct access to the four rings of an AF_XDP socket.
//!
//! | ring | entries | who produces | here |
//! |---|---|---|---|
//! | [`RxRing`] | received packets | the kernel | take them |
//! | [`FillRing`] | frames for future packets | this process | post them |
//! | [`TxRing`] | packets to transmit | this process | submit them |
//! | [`CompletionRing`] | frames of transmitted packets | the kernel | take them back |
//!
//! libxdp maps them before it binds the socket: kernels before 6.4 refuse to map a ring of a bound
//! socket (`xsk_mmap` in net/xdp/xsk.c: EBUSY). Their addresses are in /proc/self/maps, as mappings
//! of the socket's inode.
//!
//! `linux/if_xdp.h` and Documentation/networking/af_xdp.rst describe the rings: free-running u32
//! producer and consumer indexes, masked at access. Each end caches both indexes and loads the
//! other end's index only when the cached one says empty (or full), as libxdp's
//! `xsk_ring_cons__peek` and `xsk_ring_prod__reserve` do (xdp-tools, headers/xdp/xsk.h).

#![allow(unsafe_code, reason = "the rings of AF_XDP sockets are mapped memory")]

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::stat::fstat;
use procfs::process::{MMapPath, Process};
use xfan_shm::ids::UmemOffset;
use xfan_xdp::MINIMUM_KERNEL;

use crate::port::source::Received;

/// A ring's memory.
#[derive(Debug)]
struct RingMap {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<u8>,
    mask: u32,
}

// SAFETY: the pointers lead into a mapping that whoever made this value keeps.
unsafe impl Send for RingMap {}

impl RingMap {
    /// Finds the ring mapped at file offset `at` of the socket; `offsets` locates its parts.
    fn find(
        socket: &impl AsRawFd,
        offsets: &libc::xdp_ring_offset,
        entries: u32,
        entry_bytes: usize,
        at: u64,
    ) -> io::Result<Self> {
        let place = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
        let needed = place(offsets.desc)? + entries as usize * entry_bytes;
        let (address, length) = mapping(socket, at)?;
        if length < needed {
            return Err(io::Error::other(format!("a ring of {needed} bytes is mapped with {length}")));
        }
        // SAFETY: the kernel says that these offsets lie within the ring's memory, which is mapped
        // as checked.
        let part = |offset: usize| unsafe { address.cast::<u8>().add(offset) };
        Ok(RingMap {
            producer: part(place(offsets.producer)?).cast(),
            consumer: part(place(offsets.consumer)?).cast(),
            flags: part(place(offsets.flags)?).cast(),
            entries: part(place(offsets.desc)?),
            mask: entries - 1,
        })
    }

    #[inline(always)]
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: mapped and aligned by the kernel; accessed atomically on both sides.
        unsafe { self.producer.as_ref() }
    }

    #[inline(always)]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.consumer.as_ref() }
    }

    #[inline(always)]
    fn flags(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.flags.as_ref() }
    }

    /// The entry at a position. Entries are `T`, as `find` was told.
    #[inline(always)]
    fn entry<T>(&self, position: u32) -> NonNull<T> {
        // SAFETY: a masked position is within the ring's entries, of which each is a `T`.
        unsafe { self.entries.cast::<T>().add((position & self.mask) as usize) }
    }
}

/// The end of a ring on which the kernel produces entries of type `T`.
#[derive(Debug)]
struct ConsumerEnd<T> {
    map: RingMap,
    produced: u32,
    consumed: u32,
    entries: PhantomData<T>,
}

impl<T> ConsumerEnd<T> {
    /// As [`RingMap::find`].
    fn find(
        socket: &impl AsRawFd,
        offsets: &libc::xdp_ring_offset,
        entries: u32,
        at: u64,
    ) -> io::Result<Self> {
        let map = RingMap::find(socket, offsets, entries, size_of::<T>(), at)?;
        let consumed = map.consumer().load(Ordering::Relaxed);
        Ok(ConsumerEnd { map, produced: consumed, consumed, entries: PhantomData })
    }

    /// Hands each slot of `batch` the next entry, as long as there are any. Returns their number.
    #[inline(always)]
    fn take<S>(&mut self, batch: &mut [S], mut put: impl FnMut(&mut S, T)) -> usize {
        let mut ready = self.produced.wrapping_sub(self.consumed);
        if ready == 0 {
            // Acquire: pairs with the kernel's smp_store_release in xskq_prod_submit.
            self.produced = self.map.producer().load(Ordering::Acquire);
            ready = self.produced.wrapping_sub(self.consumed);
            if ready == 0 {
                return 0;
            }
        }
        let count = batch.len().min(ready as usize);
        for slot in &mut batch[..count] {
            // SAFETY: the kernel has published this entry, and leaves it alone until the consumer
            // index passes it.
            put(slot, unsafe { self.map.entry::<T>(self.consumed).read() });
            self.consumed = self.consumed.wrapping_add(1);
        }
        // Release: pairs with the kernel's smp_load_acquire of the consumer index; the entries are
        // read.
        self.map.consumer().store(self.consumed, Ordering::Release);
        count
    }
}

/// The end of a ring on which this process produces entries of type `T`.
#[derive(Debug)]
struct ProducerEnd<T> {
    map: RingMap,
    produced: u32,
    consumed: u32,
    entries: PhantomData<T>,
}

impl<T> ProducerEnd<T> {
    /// As [`RingMap::find`].
    fn find(
        socket: &impl AsRawFd,
        offsets: &libc::xdp_ring_offset,
        entries: u32,
        at: u64,
    ) -> io::Result<Self> {
        let map = RingMap::find(socket, offsets, entries, size_of::<T>(), at)?;
        let produced = map.producer().load(Ordering::Relaxed);
        Ok(ProducerEnd { map, produced, consumed: produced, entries: PhantomData })
    }

    /// Entries that can be pushed.
    #[inline(always)]
    fn free(&mut self) -> u32 {
        let size = self.map.mask + 1;
        // Reload below half: the index is a line that the kernel writes.
        if size - self.produced.wrapping_sub(self.consumed) < size / 2 {
            // Acquire: pairs with the kernel's smp_store_release in __xskq_cons_release.
            self.consumed = self.map.consumer().load(Ordering::Acquire);
        }
        size - self.produced.wrapping_sub(self.consumed)
    }

    /// Writes an entry that is free. The kernel sees it after [`publish`](Self::publish).
    #[inline(always)]
    fn push(&mut self, entry: T) {
        // SAFETY: the entry is ours until the producer index passes it.
        unsafe { self.map.entry::<T>(self.produced).write(entry) };
        self.produced = self.produced.wrapping_add(1);
    }

    #[inline(always)]
    fn publish(&mut self) {
        // Release: pairs with the kernel's smp_load_acquire of the producer index.
        self.map.producer().store(self.produced, Ordering::Release);
    }
}

/// Received packets, from the kernel.
#[derive(Debug)]
pub struct RxRing(ConsumerEnd<libc::xdp_desc>);

impl RxRing {
    /// Finds the RX ring of a socket.
    ///
    /// # Safety
    /// The ring has `entries` entries and stays mapped as long as the value lives, and nothing else
    /// takes packets from it.
    ///
    /// # Errors
    /// The ring is not mapped, or a system call fails.
    pub unsafe fn find(socket: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        #[allow(clippy::cast_sign_loss)] // 0
        let at = libc::XDP_PGOFF_RX_RING as u64;
        ConsumerEnd::find(socket, &mmap_offsets(socket)?.rx, entries, at).map(RxRing)
    }

    /// Takes packets, at most as many as fit into `batch`. Returns their number.
    #[inline(always)]
    pub fn receive(&mut self, batch: &mut [Received]) -> usize {
        self.0.take(batch, |packet, descriptor| {
            *packet = Received { offset: offset(descriptor.addr), length: descriptor.len };
        })
    }
}

/// Frames posted to the kernel for future packets.
#[derive(Debug)]
pub struct FillRing(ProducerEnd<u64>);

impl FillRing {
    /// Finds the FILL ring of a socket.
    ///
    /// # Safety
    /// The ring has `entries` entries and stays mapped as long as the value lives, and nothing else
    /// posts frames to it.
    ///
    /// # Errors
    /// The ring is not mapped, or a system call fails.
    pub unsafe fn find(socket: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        let at = libc::XDP_UMEM_PGOFF_FILL_RING;
        ProducerEnd::find(socket, &mmap_offsets(socket)?.fr, entries, at).map(FillRing)
    }

    /// Frames that can be posted.
    #[inline(always)]
    pub fn free(&mut self) -> u32 {
        self.0.free()
    }

    /// Posts a frame, where one is [free](Self::free). The kernel sees it after
    /// [`publish`](Self::publish).
    #[inline(always)]
    pub fn push(&mut self, frame: UmemOffset) {
        self.0.push(u64::from(frame.0));
    }

    /// Hands the posted frames to the kernel.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.0.publish();
    }

    /// Whether the driver must be woken after frames are posted (need_wakeup).
    #[inline(always)]
    pub fn needs_wakeup(&self) -> bool {
        self.0.map.flags().load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// Packets submitted to the kernel for transmission.
#[derive(Debug)]
pub struct TxRing(ProducerEnd<libc::xdp_desc>);

impl TxRing {
    /// Finds the TX ring of a socket.
    ///
    /// # Safety
    /// The ring has `entries` entries and stays mapped as long as the value lives, and nothing else
    /// submits packets to it.
    ///
    /// # Errors
    /// The ring is not mapped, or a system call fails.
    pub unsafe fn find(socket: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        #[allow(clippy::cast_sign_loss)] // positive
        let at = libc::XDP_PGOFF_TX_RING as u64;
        ProducerEnd::find(socket, &mmap_offsets(socket)?.tx, entries, at).map(TxRing)
    }

    /// Submits a packet; `false`: the ring is full. The kernel sees the packet after
    /// [`publish`](Self::publish), and has its frame until the [`CompletionRing`] returns it.
    #[inline(always)]
    pub fn push(&mut self, offset: UmemOffset, length: u32) -> bool {
        if self.0.free() == 0 {
            return false;
        }
        self.0.push(libc::xdp_desc { addr: u64::from(offset.0), len: length, options: 0 });
        true
    }

    /// Hands the submitted packets to the kernel.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.0.publish();
    }
}

/// Frames of transmitted packets, from the kernel.
#[derive(Debug)]
pub struct CompletionRing(ConsumerEnd<u64>);

impl CompletionRing {
    /// Finds the COMPLETION ring of a socket.
    ///
    /// # Safety
    /// The ring has `entries` entries and stays mapped as long as the value lives, and nothing else
    /// takes frames from it.
    ///
    /// # Errors
    /// The ring is not mapped, or a system call fails.
    pub unsafe fn find(socket: &impl AsRawFd, entries: u32) -> io::Result<Self> {
        let at = libc::XDP_UMEM_PGOFF_COMPLETION_RING;
        ConsumerEnd::find(socket, &mmap_offsets(socket)?.cr, entries, at).map(CompletionRing)
    }

    /// Takes back frames, at most as many as fit into `batch`: the offsets of the packets
    /// submitted. Returns their number.
    #[inline(always)]
    pub fn take(&mut self, batch: &mut [UmemOffset]) -> usize {
        self.0.take(batch, |packet, address| *packet = offset(address))
    }
}

/// An address in an aligned UMEM of at most 4 GiB, which has 32 bits.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)]
fn offset(address: u64) -> UmemOffset {
    UmemOffset(address as u32)
}

/// Address and length of the mapping of a socket at file offset `at`.
fn mapping(socket: &impl AsRawFd, at: u64) -> io::Result<(NonNull<c_void>, usize)> {
    let inode = fstat(borrow(socket))?.st_ino;
    let maps = Process::myself().and_then(|process| process.maps()).map_err(io::Error::other)?;
    let path = MMapPath::Path(format!("socket:[{inode}]").into());
    let found = maps.iter().find(|map| map.pathname == path && map.offset == at);
    let (from, to) = found.map(|map| map.address).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("/proc/self/maps shows no ring of socket {inode} at {at:#x}"),
        )
    })?;
    let (from, length) = usize::try_from(from)
        .and_then(|from| Ok((from, usize::try_from(to - from as u64)?)))
        .map_err(io::Error::other)?;
    let address =
        NonNull::new(std::ptr::with_exposed_provenance_mut(from)).ok_or(io::ErrorKind::InvalidData)?;
    Ok((address, length))
}

/// The offsets of the parts of a socket's rings.
fn mmap_offsets(socket: &impl AsRawFd) -> io::Result<libc::xdp_mmap_offsets> {
    get_option(socket, libc::XDP_MMAP_OFFSETS)
}

/// The kernel's counters of a socket.
///
/// # Errors
/// The errors of getsockopt(2).
pub fn statistics(socket: &impl AsRawFd) -> io::Result<libc::xdp_statistics> {
    get_option(socket, libc::XDP_STATISTICS)
}

/// A `SOL_XDP` option of a socket.
fn get_option<T: Copy>(socket: &impl AsRawFd, option: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to `value`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            option,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < size_of::<T>() {
        return Err(io::Error::other(format!(
            "this kernel is too old for xfan, which needs Linux {MINIMUM_KERNEL}: its AF_XDP options \
             are shorter"
        )));
    }
    // SAFETY: zeroed, then written by the kernel; the types used here are plain integers.
    Ok(unsafe { value.assume_init() })
}

/// Wakes a driver that waits for frames.
pub fn kick(socket: &impl AsRawFd) {
    // SAFETY: no buffer is given.
    unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            std::ptr::null_mut(),
            0,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
}

/// Borrows the descriptor of a socket from its owner.
pub fn borrow<T: AsRawFd>(socket: &T) -> BorrowedFd<'_> {
    // SAFETY: `socket` owns the descriptor and is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}
