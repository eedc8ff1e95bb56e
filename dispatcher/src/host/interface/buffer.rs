//! Memory for ethtool answers whose length the driver decides.
//!
//! The kernel writes every string and counter that the driver has, even beyond the end of the
//! buffer. A [`GuardedBuffer`] therefore ends at a guard page: there the kernel fails with EFAULT.

#![allow(unsafe_code, reason = "mmap(2), and an ioctl(2) that writes beyond what was asked for")]

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::ioctl::ethtool;

/// The kernel's page size in bytes: 4 KiB, or up to 64 KiB on arm64.
fn page_size() -> usize {
    // SAFETY: no pointers.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// An ethtool query and its answer, followed by an inaccessible page. It is zero at first.
#[derive(Debug)]
pub(crate) struct GuardedBuffer {
    start: NonNull<c_void>,
    /// The requested length in bytes.
    length: usize,
    /// The length of the mapping in bytes, guard page included.
    mapped: usize,
}

impl GuardedBuffer {
    /// Maps a buffer of at least `length` bytes.
    ///
    /// # Errors
    /// The errors of mmap(2) and mprotect(2).
    pub(crate) fn new(length: usize) -> io::Result<Self> {
        let page = page_size();
        let usable = length.next_multiple_of(page);
        let mapped = NonZeroUsize::new(usable + page).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is requested, so the call replaces no existing mapping.
        let start = unsafe { mmap_anonymous(None, mapped, access, MapFlags::MAP_PRIVATE) }?;
        let buffer = GuardedBuffer { start, length, mapped: mapped.get() };
        // SAFETY: this is the last page of our own mapping, and nothing points to it.
        unsafe { mprotect(start.byte_add(usable), page, ProtFlags::PROT_NONE) }?;
        Ok(buffer)
    }

    /// The requested bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `length` bytes are mapped, readable and initialised, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }

    /// Writes a u32 at a byte offset. Panics beyond the requested length.
    pub(crate) fn put(&mut self, at: usize, value: u32) {
        // SAFETY: as in `bytes`, and borrowed exclusively.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast::<u8>(), self.length) };
        bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    /// The u32 at a byte offset; 0 if less than 4 bytes are there.
    pub(crate) fn get(&self, at: usize) -> u32 {
        self.bytes()[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    /// Makes the ethtool query that the buffer holds; the answer replaces it.
    ///
    /// # Errors
    /// The kernel's error; EFAULT if the answer does not fit.
    pub(crate) fn query(&mut self, socket: &OwnedFd, name: &str) -> io::Result<()> {
        // SAFETY: the buffer begins with the number of a command. Whatever the kernel writes beyond
        // the requested length stays within the mapping, or fails at the guard page.
        unsafe { ethtool(socket, name, self.start.as_ptr()) }
    }
}

impl Drop for GuardedBuffer {
    fn drop(&mut self) {
        // SAFETY: `new` mapped it, and no borrow of it is left.
        let _ = unsafe { munmap(self.start, self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_beyond_the_buffer_fails() {
        let buffer = GuardedBuffer::new(100).unwrap();
        let page = page_size();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the kernel writes within the mapping, and fails at the guard page.
        let read =
            unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), buffer.start.as_ptr(), 3 * page) };
        assert!(read <= page.cast_signed(), "{read}");
    }
}
