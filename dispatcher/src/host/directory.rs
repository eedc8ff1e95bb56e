//! The directory of the control socket. Every file that the primary creates for itself lies in it.
//!
//! In a directory that other users can write to, they can replace any name: by a link to a file of
//! root, or by a socket of their own. [`Directory::open`] therefore walks the path from `/`, one
//! descriptor for each component, and checks each. All files are opened relative to the last
//! descriptor, so that the directory that is used is the one that was checked.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, User, geteuid, unlinkat};

/// The mode of a directory that xfan creates: workers that run as another user must be able to
/// enter it. Nobody else may list it: who lists a directory can hold its lock for as long as it
/// likes (getdents64(2) into a page of a FUSE file), and the primary needs the lock to create and
/// remove files.
const MODE: u32 = 0o711;

/// The most symbolic links in a path, as in the kernel (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// A directory that only root and the primary's user can change.
#[derive(Clone, Debug)]
pub struct Directory {
    fd: Arc<OwnedFd>,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Other users can replace files in it.
    #[error(
        "directory {} (owner {owner}, mode {mode:04o}) can be changed by users other than root and \
         the one that xfan runs as, who could replace the files of xfan: make root its owner (chown \
         root {0}) and remove write access for all others (chmod go-w {0}), or choose a socket in \
         another directory with --socket",
        path.display()
    )]
    Shared {
        /// Its path.
        path: PathBuf,
        /// The name of its owner.
        owner: String,
        /// Its permissions.
        mode: u32,
    },
    /// It cannot be created or entered.
    #[error("cannot open directory {path}: {source}", path = path.display())]
    Io {
        /// Its path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl Directory {
    /// Opens a directory, and creates it if only the last component of its path is missing.
    ///
    /// The directory, and every directory and link on its path, must belong to root or to the user
    /// of this process. No other user may be able to write to them, except that a parent directory
    /// may be sticky, as `/tmp` is: there, other users cannot replace the next component. The
    /// directory itself must not be writable even if it is sticky: another user could create a file
    /// before xfan does.
    ///
    /// # Errors
    /// [`DirectoryError`]
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let mut rest: VecDeque<OsString> = parts(path).collect();
        let (mut fd, mut at) = (root()?, PathBuf::from("/"));
        let mut links = 0;
        check(&fd, &at, rest.is_empty())?;
        while let Some(name) = rest.pop_front() {
            let here = at.join(&name);
            let fail = |errno: Errno| DirectoryError::Io { path: here.clone(), source: errno.into() };
            let look = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let next = match openat(&fd, name.as_os_str(), look, Mode::empty()) {
                Err(Errno::ENOENT) if rest.is_empty() => make(&fd, &name),
                next => next,
            }
            .map_err(fail)?;
            let kind = kind(&fstat(&next).map_err(fail)?);
            if kind == SFlag::S_IFLNK {
                check(&next, &here, false)?;
                links += 1;
                if links > MAX_LINKS {
                    return Err(fail(Errno::ELOOP));
                }
                let target = PathBuf::from(readlinkat(&next, "").map_err(fail)?);
                if target.is_absolute() {
                    (fd, at) = (root()?, "/".into());
                }
                for part in parts(&target).rev() {
                    rest.push_front(part);
                }
                continue;
            }
            if kind != SFlag::S_IFDIR {
                return Err(fail(Errno::ENOTDIR));
            }
            (fd, at) = (next, here);
            check(&fd, &at, rest.is_empty())?;
        }
        warn_if_listable(&fd, &at);
        Ok(Directory { fd: Arc::new(fd) })
    }

    /// Opens a file in the directory. Does not follow a symbolic link. A file that is created gets
    /// exactly this mode, whatever the umask.
    ///
    /// # Errors
    /// The errors of openat(2) and fchmod(2).
    pub fn open_file(&self, name: &OsStr, flags: OFlag, mode: u32) -> io::Result<OwnedFd> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::from_bits_truncate(mode))?;
        if flags.contains(OFlag::O_CREAT) {
            fchmod(&fd, Mode::from_bits_truncate(mode))?;
        }
        Ok(fd)
    }

    /// The status of a file in the directory. Does not follow a symbolic link.
    ///
    /// # Errors
    /// The errors of fstatat(2).
    pub fn look(&self, name: &OsStr) -> io::Result<FileStat> {
        Ok(fstatat(&self.fd, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// Renames a file in the directory, and replaces a file that already has the new name.
    ///
    /// # Errors
    /// The errors of renameat(2).
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Removes a file from the directory, if it exists.
    ///
    /// # Errors
    /// The errors of unlinkat(2) other than ENOENT.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            result => Ok(result?),
        }
    }
}

/// The type of a file, such as `S_IFDIR`.
pub fn kind(file: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(file.st_mode) & SFlag::S_IFMT
}

/// Sets the mode of the file behind a descriptor, which may have been opened with `O_PATH`.
///
/// # Errors
/// The errors of chmod(2); ENOENT if /proc is not mounted.
pub fn set_mode(fd: &OwnedFd, mode: u32) -> io::Result<()> {
    fs::set_permissions(format!("/proc/self/fd/{}", fd.as_raw_fd()), Permissions::from_mode(mode))
}

fn root() -> Result<OwnedFd, DirectoryError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/", flags, Mode::empty())
        .map_err(|errno| DirectoryError::Io { path: "/".into(), source: errno.into() })
}

/// The components of a path. `..` stays a component: after a link, it means the parent of the
/// link's target.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Creates a directory and opens it.
fn make(parent: &OwnedFd, name: &OsStr) -> nix::Result<OwnedFd> {
    match mkdirat(parent, name, Mode::from_bits_truncate(MODE)) {
        Ok(()) => {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let fd = openat(parent, name, flags, Mode::empty())?;
            // The umask may have removed permissions that workers need.
            fchmod(&fd, Mode::from_bits_truncate(MODE))?;
        }
        Err(Errno::EEXIST) => {} // another primary was faster
        Err(errno) => return Err(errno),
    }
    openat(parent, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// Logs that other users can hold the lock of a directory that xfan did not create.
fn warn_if_listable(fd: &OwnedFd, path: &Path) {
    if let Ok(found) = fstat(fd)
        && found.st_mode & 0o004 != 0
    {
        tracing::warn!(
            path = %path.display(),
            "other users can list the directory of the control socket, and so block the removal and \
             creation of files in it: chmod o-r {}",
            path.display()
        );
    }
}

/// Checks that a directory or link belongs to root or this user, and that nobody else can change
/// it. `last`: it is the directory itself, not one on its path.
fn check(fd: &OwnedFd, path: &Path, last: bool) -> Result<(), DirectoryError> {
    let found = fstat(fd).map_err(|errno| DirectoryError::Io { path: path.into(), source: errno.into() })?;
    let ours = found.st_uid == 0 || found.st_uid == geteuid().as_raw();
    let link = kind(&found) == SFlag::S_IFLNK; // a link has no permissions
    let others_write = found.st_mode & 0o022 != 0 && !link;
    let sticky = found.st_mode & libc::S_ISVTX != 0;
    if ours && (!others_write || sticky && !last) {
        return Ok(());
    }
    let owner = User::from_uid(found.st_uid.into()).ok().flatten();
    let owner = owner.map_or_else(|| found.st_uid.to_string(), |user| user.name);
    Err(DirectoryError::Shared { path: path.into(), owner, mode: found.st_mode & 0o7777 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_directory_writable_by_others_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let (above, folder) = (temporary.path().join("above"), temporary.path().join("above/folder"));
        fs::create_dir_all(&folder).unwrap();
        chmod(&above, 0o755);
        for (mode, usable) in [(0o755, true), (0o700, true), (0o775, false), (0o757, false), (0o1777, false)]
        {
            chmod(&folder, mode);
            let opened = Directory::open(&folder);
            assert_eq!(opened.is_ok(), usable, "{mode:o}");
            if let Err(error) = opened {
                let text = error.to_string();
                let owner = User::from_uid(geteuid()).unwrap().unwrap().name;
                let path = folder.display();
                assert!(
                    text.starts_with(&format!("directory {path} (owner {owner}, mode {mode:04o}) can")),
                    "{text}"
                );
                assert!(text.contains(&format!("(chmod go-w {path})")), "{text}");
            }
        }
        chmod(&folder, 0o755);
        for (mode, usable) in [(0o777, false), (0o775, false), (0o1777, true), (0o711, true)] {
            chmod(&above, mode);
            assert_eq!(Directory::open(&folder).is_ok(), usable, "{mode:o}");
        }
    }

    #[test]
    fn only_the_last_path_component_is_created() {
        let temporary = tempfile::tempdir().unwrap();
        let new = temporary.path().join("new");
        assert!(Directory::open(&new.join("newer")).is_err() && !new.exists());
        Directory::open(&new).unwrap();
        assert_eq!(fs::metadata(&new).unwrap().mode() & 0o7777, 0o711);
        fs::write(new.join("file"), "").unwrap();
        let error = Directory::open(&new.join("file")).unwrap_err().to_string();
        assert!(error.ends_with("/new/file: Not a directory (os error 20)"), "{error}");
    }

    #[test]
    fn links_are_followed_and_their_target_is_checked() {
        let temporary = tempfile::tempdir().unwrap();
        let at = |name: &str| temporary.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        symlink("a/../a/b", at("relative")).unwrap();
        symlink(at("relative"), at("absolute")).unwrap();
        symlink("itself", at("itself")).unwrap();
        for link in ["relative", "absolute"] {
            let folder = Directory::open(&at(link)).unwrap();
            let found = fstat(&*folder.fd).unwrap();
            assert_eq!(found.st_ino, fs::metadata(at("a/b")).unwrap().ino());
        }
        assert!(Directory::open(&at("itself")).unwrap_err().to_string().contains("symbolic links"));
        chmod(&at("a/b"), 0o777);
        assert!(matches!(Directory::open(&at("absolute")), Err(DirectoryError::Shared { .. })));
    }

    #[test]
    fn a_link_of_another_user_is_refused() {
        if !geteuid().is_root() {
            return;
        }
        let temporary = tempfile::tempdir().unwrap();
        let (folder, link) = (temporary.path().join("folder"), temporary.path().join("link"));
        fs::create_dir(&folder).unwrap();
        symlink(&folder, &link).unwrap();
        assert!(Directory::open(&link).is_ok());
        std::os::unix::fs::lchown(&link, Some(4711), None).unwrap();
        assert!(
            matches!(Directory::open(&link), Err(DirectoryError::Shared { owner, .. }) if owner == "4711")
        );
        std::os::unix::fs::chown(&folder, Some(4711), None).unwrap();
        assert!(
            matches!(Directory::open(&folder), Err(DirectoryError::Shared { owner, .. }) if owner == "4711")
        );
    }

    #[test]
    fn files_are_opened_without_links_and_get_their_mode() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = Directory::open(&temporary.path().join("folder")).unwrap();
        let (target, name) = (temporary.path().join("target"), OsStr::new("name"));
        fs::write(&target, "as it was").unwrap();
        symlink(&target, temporary.path().join("folder/name")).unwrap();
        for flags in [OFlag::O_RDONLY, OFlag::O_WRONLY | OFlag::O_CREAT] {
            let error = folder.open_file(name, flags, 0o600).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        }
        assert_eq!(kind(&folder.look(name).unwrap()), SFlag::S_IFLNK);
        folder.remove(name).unwrap();
        folder.remove(name).unwrap();
        folder.open_file(name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL, 0o666).unwrap();
        assert_eq!(folder.look(name).unwrap().st_mode & 0o7777, 0o666, "whatever the umask");
        assert_eq!(fs::read_to_string(&target).unwrap(), "as it was");
    }
}
