//! Cgroups for primaries under test. All other primaries see no cgroup hierarchy.

use std::cell::RefCell;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use xfan::report::Report;

use crate::primary::{Launch, Primary};
use crate::proc::check;

/// Makes a command see a cgroup hierarchy: in its own mount namespace, below `folder`.
///
/// # Panics
/// The mount point cannot be made.
pub fn with_cgroups(command: &mut Command, folder: &Path) {
    let point = folder.join("cgroup");
    fs::create_dir_all(&point).unwrap();
    let point = std::ffi::CString::new(point.to_str().unwrap()).unwrap();
    let mount = move || {
        let (kind, none) = (c"cgroup2".as_ptr(), std::ptr::null());
        // SAFETY: the strings end in a null byte; this file system has no options.
        check(unsafe { libc::mount(kind, point.as_ptr(), kind, 0, none) }.into())
    };
    // SAFETY: the closure makes one system call, on a string that exists before the fork.
    unsafe { command.pre_exec(mount) };
}

/// The cgroup hierarchy. It has no mount point, so other tests do not see it.
#[derive(Debug)]
pub struct Hierarchy {
    /// The path of its root, through the descriptor of the mount.
    pub path: PathBuf,
    _mount: OwnedFd,
    /// The cgroups that primaries of this test have made.
    seen: RefCell<Vec<PathBuf>>,
}

impl Drop for Hierarchy {
    /// Kills what is left in them, so that no process outlives a failed test.
    fn drop(&mut self) {
        for folder in self.seen.take() {
            let _ = fs::write(folder.join("cgroup.kill"), "1");
        }
    }
}

impl Hierarchy {
    /// Opens the whole hierarchy.
    ///
    /// # Panics
    /// The kernel has no cgroup v2, or the caller is not root.
    pub fn open() -> Self {
        /// The value in linux/mount.h.
        const FSCONFIG_CMD_CREATE: libc::c_int = 6;
        const CLOEXEC: libc::c_int = 1;
        let none = std::ptr::null::<libc::c_char>();
        let fd = |result: i64| {
            check(result).unwrap();
            // SAFETY: the kernel has just made the descriptor, and nothing else owns it.
            unsafe { OwnedFd::from_raw_fd(i32::try_from(result).unwrap()) }
        };
        // SAFETY: the strings end in a null byte or are null, as fsconfig(2) requires for this
        // command.
        let mount = unsafe {
            let system = fd(libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), CLOEXEC));
            let raw = system.as_raw_fd();
            check(libc::syscall(libc::SYS_fsconfig, raw, FSCONFIG_CMD_CREATE, none, none, 0)).unwrap();
            fd(libc::syscall(libc::SYS_fsmount, raw, CLOEXEC, 0))
        };
        Hierarchy {
            path: format!("/proc/self/fd/{}", mount.as_raw_fd()).into(),
            _mount: mount,
            seen: RefCell::default(),
        }
    }

    /// The folder of a primary's cgroups in this hierarchy; the report has the path as the primary
    /// sees it.
    ///
    /// # Panics
    /// The primary has no cgroups.
    pub fn folder(&self, report: &Report, primary: &Primary) -> PathBuf {
        let seen =
            PathBuf::from(report.groups[0].confinement.cgroups.clone().expect("the primary has cgroups"));
        let folder = self.path.join(seen.strip_prefix(primary.folder().join("cgroup")).unwrap());
        self.seen.borrow_mut().push(folder.clone());
        folder
    }
}

/// Whether systemd runs, which would first have to delegate a cgroup.
pub fn systemd_runs() -> bool {
    let runs = Path::new("/run/systemd/system").exists();
    if runs {
        eprintln!("skipped: systemd has not delegated the cgroup of this test");
    }
    runs
}

/// Starts a primary that has cgroups for its workers.
///
/// # Panics
/// The primary does not start.
pub fn start_in_cgroups(launch: Launch<'_>) -> Primary {
    let folder = launch.folder().to_owned();
    launch.start_with(|command| with_cgroups(command, &folder)).unwrap()
}

/// The names of the folders in a folder, sorted.
///
/// # Panics
/// A name is not UTF-8.
pub fn subfolders(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
