//! A segment: shared memory that one process writes and others read.
//!
//! A segment is a memfd. It is sealed against shrinking and growing, so that no peer can remove
//! memory from another's mapping. Its mode is 0600, so that an unprivileged process with a
//! read-only descriptor of it cannot reopen it for writing.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, munmap};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{ftruncate, pipe2};

/// Size of the smallest page of any supported machine, in bytes.
const PAGE: usize = 4096;

/// A mapping of memory that is shared with another process. Dropping it unmaps the memory.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a value may move to another thread if that thread may use all it owns. The mapping
// belongs to the process, not to a thread, and any thread may unmap it.
unsafe impl Send for Mapping {}
// SAFETY: threads may share a value if its methods may run concurrently. `address` and `length`
// read fields that never change, and `lock` reads memory that no Rust reference points to.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `fd` read-only.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the file is shorter than `length`,
    /// [`io::ErrorKind::InvalidInput`] if `length` is 0, else the error of mmap(2).
    pub fn read_only(fd: impl AsFd, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::PROT_READ)
    }

    /// Maps the first `length` bytes of `fd` for reading and writing.
    ///
    /// # Errors
    /// As [`read_only`](Self::read_only). [`io::ErrorKind::PermissionDenied`] if the descriptor is
    /// read-only or the segment is sealed against writers.
    pub fn read_write(fd: impl AsFd, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn map(fd: impl AsFd, length: usize, protection: ProtFlags) -> io::Result<Self> {
        let size = fstat(&fd)?.st_size;
        // An access beyond the end of the file would raise SIGBUS.
        if usize::try_from(size).unwrap_or(0) < length {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the segment has {size} bytes, its geometry needs {length}"),
            ));
        }
        let bytes = NonZeroUsize::new(length)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a segment of 0 bytes"))?;
        // SAFETY: `mmap` is unsafe because it may replace an existing mapping at a given address.
        // The address is `None`, so the kernel chooses free address space.
        let address =
            unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE, fd, 0) }?;
        Ok(Mapping { address: address.cast(), length })
    }

    /// Maps every page now and locks it in memory, so that no later access faults. A page that was
    /// removed before, by a hole punched into the segment, comes back as zeros.
    ///
    /// # Errors
    /// The error of mlock(2), if the process has neither `CAP_IPC_LOCK` nor a sufficient
    /// `RLIMIT_MEMLOCK`. The pages are mapped nevertheless, but may be swapped out later.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: `mlock` requires a range of mapped memory: it is that of this mapping.
        let locked = unsafe { mlock(self.address.cast(), self.length) };
        for offset in (0..self.length).step_by(PAGE) {
            // SAFETY: `add` and `read_volatile` require an address within the mapping: `offset` is
            // less than `length`. The load is volatile because other processes may store to it.
            unsafe { self.address.add(offset).read_volatile() };
        }
        Ok(locked?)
    }

    /// Keeps the memory in its pages until what this returns is dropped. Otherwise a process that
    /// maps the segment, even read-only, can have the kernel move it to a huge page
    /// (`MADV_COLLAPSE`, see madvise(2)): locked or not, accesses through this mapping then wait.
    ///
    /// The kernel moves no page that something beside mappings refers to, and checks all pages of a
    /// huge page before it moves one. So one page of each is enough: a pipe refers to it.
    ///
    /// # Errors
    /// The errors of pipe(2) and vmsplice(2); EAGAIN if a pipe cannot be large enough: for 32 MiB it
    /// always is, and without CAP_SYS_RESOURCE up to `fs.pipe-max-size` (see pipe(7)).
    pub fn pin(&self) -> io::Result<OwnedFd> {
        /// Length of a huge page of the smallest kind that holds file pages, in bytes.
        const HUGE_PAGE: usize = 2 << 20;
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let pages = self.length.div_ceil(HUGE_PAGE);
        // If it fails, the size that the pipe has may do.
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(i32::try_from(pages * PAGE).unwrap_or(i32::MAX)));
        for offset in (0..self.length).step_by(HUGE_PAGE) {
            // SAFETY: `add` requires an address within the mapping: `offset` is less than `length`.
            let first = unsafe { self.address.add(offset) };
            let page = libc::iovec { iov_base: first.as_ptr().cast(), iov_len: 1 };
            // SAFETY: `vmsplice` reads one `iovec`, and refers to the page of mapped memory in it.
            if unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const page, 1, libc::SPLICE_F_NONBLOCK) } < 0
            {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(reader)
    }

    /// Address of the first byte, aligned to a page. The memory may change at any time, and it may
    /// be read-only.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Length of the mapping in bytes.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `munmap` requires that the range is this process's and not used afterwards. `map`
        // mapped it, and every type that keeps pointers into it also owns the mapping.
        let _ = unsafe { munmap(self.address.cast(), self.length) };
    }
}

/// Creates a segment of `length` zeroed bytes with mode 0600 that can neither shrink nor grow.
/// `name` appears in `/proc/PID/maps`.
///
/// # Errors
/// The error of the failing system call, mostly that there is not enough memory.
pub fn create(name: &str, length: usize) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let length = i64::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    ftruncate(&fd, length)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(fd)
}

/// Forbids all further writable mappings of, and writes to, a segment made by [`create`]. This
/// applies to every process, including root's. Existing writable mappings remain, so call it once
/// the segment's writer has mapped it.
///
/// The seal also forbids punching holes (fallocate(2), `MADV_REMOVE`), which would remove pages
/// from every other process's mapping. Further seals are forbidden, too.
///
/// # Errors
/// EPERM if the segment was sealed against sealing before. EINVAL before Linux 5.1.
pub fn seal_against_further_writers(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL))?;
    Ok(())
}

/// Whether [`seal_against_further_writers`] was called for a segment.
///
/// Unlike sealing, this query takes no lock of the file. A process that can write to the file can
/// hold that lock for as long as it likes: write(2) holds it while it reads its buffer, and the
/// buffer may be mapped from a file system that the process itself implements.
///
/// # Errors
/// The error of fcntl(2).
pub fn is_sealed_against_further_writers(fd: impl AsFd) -> io::Result<bool> {
    let seals = SealFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GET_SEALS)?);
    Ok(seals.contains(SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL))
}

/// Opens the memory behind `fd` again, read-only. The new descriptor may be sent to another
/// process: unlike a duplicate of `fd`, it does not allow writing.
///
/// # Errors
/// The error of open(2), for example if /proc is not mounted.
pub fn reopen_read_only(fd: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    OpenOptions::new().read(true).open(path).map(OwnedFd::from)
}

/// Opens a shared anonymous mapping of this process, read-only, and sets its mode to 0600. The
/// mapping must begin at `address` and have `length` bytes. In this way, memory that a library
/// mapped can be sent to another process.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] without `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`;
/// [`io::ErrorKind::NotFound`] if no mapping begins there.
pub fn open_mapping_read_only(address: NonNull<u8>, length: usize) -> io::Result<OwnedFd> {
    let start = address.as_ptr() as usize;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + length);
    let file = File::open(path)?;
    fchmod(&file, Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn a_reader_cannot_map_writable_grow_or_shrink() {
        let fd = create("xfan-test", 8192).unwrap();
        let writer = Mapping::read_write(&fd, 8192).unwrap();
        let reader_fd = reopen_read_only(&fd).unwrap();
        let reader = Mapping::read_only(&reader_fd, 8192).unwrap();
        // SAFETY: byte 5,000 lies within both mappings, which are alive. No reference points there.
        unsafe {
            writer.address().add(5000).write_volatile(7);
            assert_eq!(reader.address().add(5000).read_volatile(), 7);
        }
        let denied = Mapping::read_write(&reader_fd, 8192).unwrap_err();
        assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(ftruncate(&reader_fd, 0), Err(Errno::EINVAL));
        assert_eq!(ftruncate(&fd, 4096), Err(Errno::EPERM));
        assert_eq!(ftruncate(&fd, 16384), Err(Errno::EPERM));
    }

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn pinned_pages_are_not_collapsed() {
        const HUGE: usize = 2 << 20;
        let collapse = |pinned: bool| {
            let fd = create("xfan-test", 2 * HUGE).unwrap();
            let writer = Mapping::read_write(&fd, 2 * HUGE).unwrap();
            let reader = Mapping::read_only(reopen_read_only(&fd).unwrap(), 2 * HUGE).unwrap();
            reader.lock().unwrap_or_default();
            let _pin = pinned.then(|| writer.pin().unwrap());
            let space = NonZeroUsize::new(3 * HUGE).unwrap();
            // SAFETY: nothing refers to the address space that the kernel chooses, and the second
            // mapping replaces a part of it. Both live as long as the process.
            unsafe {
                let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS;
                let chosen =
                    nix::sys::mman::mmap_anonymous(None, space, ProtFlags::PROT_NONE, flags).unwrap();
                let aligned = NonZeroUsize::new((chosen.as_ptr() as usize).next_multiple_of(HUGE));
                let length = NonZeroUsize::new(2 * HUGE).unwrap();
                let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
                let view = mmap(aligned, length, ProtFlags::PROT_READ, flags, &fd, 0).unwrap();
                view.cast::<u8>().read_volatile();
                (0..2).map(|part| libc::madvise(view.add(part * HUGE).as_ptr(), HUGE, 25) == 0).collect()
            }
        };
        // More pages than a pipe holds by default.
        let long = create("xfan-test", 20 * HUGE).unwrap();
        Mapping::read_only(&long, 20 * HUGE).unwrap().pin().unwrap();
        let unpinned: Vec<bool> = collapse(false);
        // A kernel before 6.1, or without huge pages in shared memory, collapses nothing.
        println!("collapsed without a pin: {unpinned:?}");
        assert_eq!(collapse(true), [false, false]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn after_sealing_the_owner_cannot_map_for_writing() {
        let fd = create("xfan-test", 4096).unwrap();
        let writer = Mapping::read_write(&fd, 4096).unwrap();
        seal_against_further_writers(&fd).unwrap();
        assert_eq!(Mapping::read_write(&fd, 4096).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let reader = Mapping::read_only(&fd, 4096).unwrap();
        // SAFETY: the first byte lies within both mappings, which are alive. No reference points
        // there.
        unsafe {
            writer.address().write_volatile(9);
            assert_eq!(reader.address().read_volatile(), 9);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn after_sealing_no_writer_can_remove_pages() {
        use nix::fcntl::{FallocateFlags, fallocate};
        use nix::sys::mman::{MmapAdvise, madvise};
        let fd = create("xfan-test", 8192).unwrap();
        let writer = Mapping::read_write(&fd, 8192).unwrap();
        let reader = Mapping::read_only(&fd, 8192).unwrap();
        let punch = || {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&fd, flags, 0, 4096)
        };
        // SAFETY: `MADV_REMOVE` zeroes the range, which lies within the mapping. No reference
        // points there.
        let remove = || unsafe { madvise(writer.address().cast(), 4096, MmapAdvise::MADV_REMOVE) };
        // SAFETY: byte 4,096 lies within the mapping, which is alive. No reference points there.
        unsafe { writer.address().add(4096).write_volatile(5) };
        assert_eq!((punch(), remove()), (Ok(()), Ok(())));
        assert!(!is_sealed_against_further_writers(&fd).unwrap());
        seal_against_further_writers(&fd).unwrap();
        assert!(is_sealed_against_further_writers(&fd).unwrap());
        assert_eq!((punch(), remove()), (Err(Errno::EPERM), Err(Errno::EPERM)));
        reader.lock().unwrap();
        // SAFETY: bytes 0 and 4,096 lie within both mappings, which are alive. No reference points
        // there.
        unsafe {
            assert_eq!([0, 4096].map(|offset| reader.address().add(offset).read_volatile()), [0, 5]);
            writer.address().write_volatile(3);
            assert_eq!(reader.address().read_volatile(), 3);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn a_segment_that_is_too_small_is_refused() {
        let fd = create("xfan-test", 4096).unwrap();
        let error = Mapping::read_only(&fd, 8192).unwrap_err();
        assert_eq!(error.to_string(), "the segment has 4096 bytes, its geometry needs 8192");
    }
}
