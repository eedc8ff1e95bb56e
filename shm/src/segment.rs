//! A segment: a piece of shared memory that one process writes and others read.
//!
//! It is a memfd, sealed against shrinking and growing, so that no peer can pull the memory out from under a mapping,
//! and of mode 0600, so that an unprivileged process which is given a read-only descriptor of it cannot reopen it for writing.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, munmap};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::ftruncate;

/// Smallest page of any machine, in bytes.
const PAGE: usize = 4096;

/// Memory shared with another process, mapped into this one until it is dropped.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is plain memory owned by this value; all shared access to its contents is through raw
// pointers or atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `fd` read-only.
    ///
    /// # Errors
    /// If the descriptor cannot be mapped, or holds fewer bytes than that.
    pub fn read_only(fd: impl AsFd, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::PROT_READ)
    }

    /// Maps the first `length` bytes of `fd` for reading and writing.
    ///
    /// # Errors
    /// If the descriptor cannot be mapped for writing, or holds fewer bytes than that.
    pub fn read_write(fd: impl AsFd, length: usize) -> io::Result<Self> {
        Self::map(fd, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn map(fd: impl AsFd, length: usize, protection: ProtFlags) -> io::Result<Self> {
        let size = fstat(&fd)?.st_size;
        // Beyond the end of the file lies a SIGBUS.
        if usize::try_from(size).unwrap_or(0) < length {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the segment has {size} bytes, its geometry needs {length}"),
            ));
        }
        let bytes = NonZeroUsize::new(length)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a segment of 0 bytes"))?;
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let address =
            unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE, fd, 0) }?;
        Ok(Mapping { address: address.cast(), length })
    }

    /// Has the kernel map every page now, and keep it mapped. Pages that somebody took away before
    /// come back as zeros.
    ///
    /// # Errors
    /// If the pages cannot be locked: the process has neither `CAP_IPC_LOCK` nor enough
    /// `RLIMIT_MEMLOCK`. They are mapped all the same, but may be swapped out later.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: the range is that of this mapping.
        let locked = unsafe { mlock(self.address.cast(), self.length) };
        for offset in (0..self.length).step_by(PAGE) {
            // SAFETY: in bounds; a volatile load of one byte, which others may store to.
            unsafe { self.address.add(offset).read_volatile() };
        }
        Ok(locked?)
    }

    /// The first byte. The memory may change at any time and may be read-only.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, and whoever derived pointers from it holds the mapping alive.
        let _ = unsafe { munmap(self.address.cast(), self.length) };
    }
}

/// Creates a segment of `length` zeroed bytes that can be neither shrunk nor grown, of mode 0600.
///
/// # Errors
/// Whatever the system calls say; mostly that there is no memory.
pub fn create(name: &str, length: usize) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let length = i64::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    ftruncate(&fd, length)?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(fd)
}

/// Forbids every further writable mapping of and write to a segment that [`create`] made, to root
/// as well, and any further sealing. It also forbids punching holes, by which a writer could take
/// pages away from everybody else's mapping (fallocate(2), `MADV_REMOVE`). Writable mappings that
/// exist stay. For a segment whose writer has mapped it.
///
/// # Errors
/// EPERM if the segment was sealed against sealing before. EINVAL before Linux 5.1.
pub fn seal_against_further_writers(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL))?;
    Ok(())
}

/// Whether a segment's writer has done so. Unlike sealing, asking takes no lock of the file, which
/// whoever can write to the file can hold for as long as they like: a write(2) holds it while it
/// reads its buffer, and that may be a mapping of a file system of their own.
///
/// # Errors
/// Whatever the system call says.
pub fn is_sealed_against_further_writers(fd: impl AsFd) -> io::Result<bool> {
    let seals = SealFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GET_SEALS)?);
    Ok(seals.contains(SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL))
}

/// Opens the memory behind `fd` again, read-only: what another process may be given.
///
/// # Errors
/// Whatever `open` says, for example when /proc is not mounted.
pub fn reopen_read_only(fd: impl AsFd) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    OpenOptions::new().read(true).open(path).map(OwnedFd::from)
}

/// Opens the shared anonymous mapping that begins at `address` in this process, read-only, and takes every access by
/// others from it (mode 0600): so memory that a library mapped can be given to another process.
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
        // SAFETY: both mappings live and are 8,192 bytes long; nobody else knows of them.
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
    fn after_the_last_seal_not_even_its_owner_can_map_it_writable() {
        let fd = create("xfan-test", 4096).unwrap();
        let writer = Mapping::read_write(&fd, 4096).unwrap();
        seal_against_further_writers(&fd).unwrap();
        assert_eq!(Mapping::read_write(&fd, 4096).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let reader = Mapping::read_only(&fd, 4096).unwrap();
        // SAFETY: both mappings live and are 4,096 bytes long; nobody else knows of them.
        unsafe {
            writer.address().write_volatile(9);
            assert_eq!(reader.address().read_volatile(), 9);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "memfd")]
    fn no_writer_can_take_pages_away_after_the_last_seal() {
        use nix::fcntl::{FallocateFlags, fallocate};
        use nix::sys::mman::{MmapAdvise, madvise};
        let fd = create("xfan-test", 8192).unwrap();
        let writer = Mapping::read_write(&fd, 8192).unwrap();
        let reader = Mapping::read_only(&fd, 8192).unwrap();
        let punch = || {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&fd, flags, 0, 4096)
        };
        // SAFETY: nobody has a reference into the mapping.
        let remove = || unsafe { madvise(writer.address().cast(), 4096, MmapAdvise::MADV_REMOVE) };
        // SAFETY: the mapping lives and is 8,192 bytes long; nobody else knows of it.
        unsafe { writer.address().add(4096).write_volatile(5) };
        assert_eq!((punch(), remove()), (Ok(()), Ok(())));
        assert!(!is_sealed_against_further_writers(&fd).unwrap());
        seal_against_further_writers(&fd).unwrap();
        assert!(is_sealed_against_further_writers(&fd).unwrap());
        assert_eq!((punch(), remove()), (Err(Errno::EPERM), Err(Errno::EPERM)));
        reader.lock().unwrap();
        // SAFETY: both mappings live and are 8,192 bytes long; nobody else knows of them.
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
