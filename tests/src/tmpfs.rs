//! A disk that can be full: a small file system in memory, visible only to the test that mounts it
//! and its processes.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A file system in memory, mounted until it is dropped.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts a file system of `kib` KiB on a folder, in a new mount namespace of the calling
    /// thread and the processes it starts from then on.
    ///
    /// # Errors
    /// The caller is not root, or the folder does not exist.
    pub fn mount(on: &Path, kib: u32, mode: u32) -> io::Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount("none", Path::new("/"), libc::MS_SLAVE | libc::MS_REC, "")?;
        mount("tmpfs", on, 0, &format!("size={kib}k,mode={mode:o}"))?;
        Ok(Tmpfs(on.to_owned()))
    }

    /// Changes its size.
    ///
    /// # Errors
    /// It contains more than the new size.
    pub fn resize(&self, kib: u32) -> io::Result<()> {
        mount("tmpfs", &self.0, libc::MS_REMOUNT, &format!("size={kib}k"))
    }

    /// Fills it with a file `filler`.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn fill(&self) -> io::Result<()> {
        let mut filler = File::create(self.0.join("filler"))?;
        while filler.write(&[0; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = text(&self.0).map(|path| {
            // SAFETY: the path ends in a null byte; the call does not touch this process's memory.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) }
        });
    }
}

fn text(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn mount(kind: &str, on: &Path, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    let (kind, on, options) = (CString::new(kind)?, text(on)?, CString::new(options)?);
    // SAFETY: the four strings end in a null byte and outlive the call.
    match unsafe { libc::mount(kind.as_ptr(), on.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
