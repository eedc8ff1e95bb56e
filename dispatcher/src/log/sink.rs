//! The destination of lines: standard error, or a file that can be reopened by its name.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::print::write_whole;

/// Permissions of files created here, whatever the umask: logs may hold names and addresses, so
/// that only the owner and the group may read them.
const MODE: u32 = 0o640;

/// An open file, or standard error.
#[derive(Debug)]
pub struct Sink {
    fd: OwnedFd,
    /// `None`: standard error.
    path: Option<PathBuf>,
    /// The last write ended in the middle of a line.
    torn: bool,
}

impl Sink {
    /// Standard error.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn stderr() -> io::Result<Self> {
        Ok(Sink { fd: io::stderr().as_fd().try_clone_to_owned()?, path: None, torn: false })
    }

    /// An open descriptor.
    #[cfg(test)]
    pub fn of(fd: OwnedFd) -> Self {
        Sink { fd, path: None, torn: false }
    }

    /// The file at this path, opened to append.
    ///
    /// # Errors
    /// As [`open_to_append`].
    pub fn file(path: &Path) -> io::Result<Self> {
        Ok(Sink { fd: open_to_append(path)?.into(), path: Some(path.to_owned()), torn: false })
    }

    /// Reopens the file by its path, if the sink is a file. After an error, the old file stays in
    /// use.
    ///
    /// # Errors
    /// As [`open_to_append`].
    pub fn reopen(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            self.fd = open_to_append(path)?.into();
            self.torn = false;
        }
        Ok(())
    }

    /// Writes whole lines. If the previous write ended in the middle of a line, a line break comes
    /// first.
    ///
    /// # Errors
    /// The errors of write(2). Some of the lines may have been written.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        let separated = self.torn.then(|| [b"\n", lines].concat());
        match write_whole(&self.fd, separated.as_deref().unwrap_or(lines)) {
            Ok(()) => {
                self.torn = false;
                Ok(())
            }
            Err((written, error)) => {
                self.torn |= written > 0;
                Err(error)
            }
        }
    }
}

/// Opens a file to append to it. A file that does not exist is created with permissions 0640,
/// whatever the umask.
///
/// # Errors
/// The errors of open(2), among them ELOOP for a symbolic link and ENXIO for a FIFO without a
/// reader. A file with more than one hard link is refused: another user may have created the link
/// to make the primary, which may run as root, write to that file.
pub fn open_to_append(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let open =
        |new: bool| OpenOptions::new().append(true).create_new(new).mode(MODE).custom_flags(flags).open(path);
    let file = match open(true) {
        Ok(file) => {
            file.set_permissions(Permissions::from_mode(MODE))?;
            file
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(false)?,
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.nlink() > 1 {
        return Err(io::Error::other("it is a hard link to another file"));
    }
    // O_NONBLOCK was for open(2) only. Writes may block.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn files_get_their_mode_and_links_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        open_to_append(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, MODE);
        let (soft, hard) = (folder.path().join("soft"), folder.path().join("hard"));
        std::os::unix::fs::symlink(&path, &soft).unwrap();
        std::fs::hard_link(&path, &hard).unwrap();
        assert_eq!(open_to_append(&soft).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(open_to_append(&path).unwrap_err().to_string().contains("hard link"));
    }

    #[test]
    fn a_torn_line_is_ended_before_the_next() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut sink = Sink { fd: writer.into(), path: None, torn: true };
        sink.write(b"whole\n").unwrap();
        sink.write(b"second\n").unwrap();
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "\nwhole\nsecond\n");
    }
}
