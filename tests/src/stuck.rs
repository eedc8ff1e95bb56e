//! A page that blocks its reader until it is released: for locks that the kernel holds while it
//! reads a buffer.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const PAGE: usize = 4096;
/// The values in linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// The size of a message in bytes.
const MESSAGE: usize = 32;

/// An empty page that nobody fills; see userfaultfd(2). It needs CAP_SYS_PTRACE.
#[derive(Debug)]
pub struct StuckPage {
    faults: Mutex<Option<File>>,
    page: NonNull<libc::c_void>,
}

// SAFETY: the mapping and the descriptor are only used by system calls.
unsafe impl Send for StuckPage {}
// SAFETY: as for `Send`.
unsafe impl Sync for StuckPage {}

impl StuckPage {
    /// Maps a page.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made the descriptor, and nothing else owns it.
        let faults = unsafe { File::from_raw_fd(fd) };
        let length = std::num::NonZeroUsize::new(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE;
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let page = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ, flags) }?;
        let mut api = [UFFD_API, 0, 0];
        let mut range = [page.as_ptr() as u64, PAGE as u64, UFFDIO_REGISTER_MODE_MISSING, 0];
        // SAFETY: the kernel reads and writes no more than the structures of these calls.
        let failed = unsafe {
            libc::ioctl(faults.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) != 0
                || libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, range.as_mut_ptr()) != 0
        };
        if failed {
            Err(io::Error::last_os_error())
        } else {
            Ok(StuckPage { faults: Mutex::new(Some(faults)), page })
        }
    }

    /// Writes the page to a file at this offset. Returns once the page is released.
    pub fn write_to(&self, file: &impl AsRawFd, offset: i64) {
        // SAFETY: the buffer is mapped; the kernel waits for its contents. The result does not
        // matter.
        unsafe { libc::pwrite(file.as_raw_fd(), self.page.as_ptr(), 64, offset) };
    }

    /// Waits until a reader is blocked on the page.
    ///
    /// # Errors
    /// read(2) fails.
    pub fn wait_for_reader(&self) -> io::Result<()> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.as_ref().ok_or(io::ErrorKind::NotFound)?.read_exact(&mut [0; MESSAGE])
    }

    /// Lets the blocked readers continue.
    pub fn release(&self) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for StuckPage {
    fn drop(&mut self) {
        // SAFETY: `new` mapped the page, and nobody has a reference into it.
        let _ = unsafe { munmap(self.page, PAGE) };
    }
}
