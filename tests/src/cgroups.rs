//! Cgroups for primaries under test: hidden from all others, which therefore have none.

use std::cell::RefCell;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use xfan::report::Report;

use crate::primary::{Launch, Primary};
use crate::proc::check;

/// Has a primary see a cgroup hierarchy: in its own mount namespace, in its folder.
///
/// # Panics
/// The folder cannot be made.
pub fn with_cgroups(command: &mut Command, folder: &Path) {
    let point = folder.join("cgroup");
    fs::create_dir_all(&point).unwrap();
    let point = std::ffi::CString::new(point.to_str().unwrap()).unwrap();
    let mount = move || {
        let (kind, none) = (c"cgroup2".as_ptr(), std::ptr::null());
        // SAFETY: the strings end in null bytes; this file system has no options.
        check(unsafe { libc::mount(kind, point.as_ptr(), kind, 0, none) }.into())
    };
    // SAFETY: one system call on a string that was made before.
    unsafe { command.pre_exec(mount) };
}

/// The cgroup hierarchy, mounted nowhere, so that other tests do not see it.
#[derive(Debug)]
pub struct Hierarchy {
    /// Through the descriptor of the mount.
    pub path: PathBuf,
    _mount: OwnedFd,
    /// What primaries of this test have made.
    seen: RefCell<Vec<PathBuf>>,
}

impl Drop for Hierarchy {
    /// A test that fails leaves nothing that forks for ever.
    fn drop(&mut self) {
        for folder in self.seen.take() {
            let _ = fs::write(folder.join("cgroup.kill"), "1");
        }
    }
}

impl Hierarchy {
    /// The whole hierarchy.
    ///
    /// # Panics
    /// The kernel has no cgroup v2, or the caller is not root.
    pub fn open() -> Self {
        /// As in linux/mount.h.
        const FSCONFIG_CMD_CREATE: libc::c_int = 6;
        const CLOEXEC: libc::c_int = 1;
        let none = std::ptr::null::<libc::c_char>();
        let fd = |result: i64| {
            check(result).unwrap();
            // SAFETY: the kernel has just made it, nobody else owns it.
            unsafe { OwnedFd::from_raw_fd(i32::try_from(result).unwrap()) }
        };
        // SAFETY: the strings end in null bytes or are null, as fsconfig(2) has it for this command.
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

    /// Where a primary has its workers' cgroups, of which it knows the path where it sees them.
    ///
    /// # Panics
    /// It has none.
    pub fn folder(&self, report: &Report, primary: &Primary) -> PathBuf {
        let seen = PathBuf::from(report.confinement.cgroups.clone().expect("there are cgroups"));
        let folder = self.path.join(seen.strip_prefix(primary.folder().join("cgroup")).unwrap());
        self.seen.borrow_mut().push(folder.clone());
        folder
    }
}

/// Where systemd runs, it has to delegate a cgroup first.
pub fn systemd_runs() -> bool {
    let runs = Path::new("/run/systemd/system").exists();
    if runs {
        eprintln!("not checked: systemd has not delegated the cgroup of this test");
    }
    runs
}

/// Starts a primary that has cgroups for its workers.
///
/// # Panics
/// It does not start.
pub fn start_in_cgroups(launch: Launch<'_>) -> Primary {
    let folder = launch.folder().to_owned();
    launch.start_with(|command| with_cgroups(command, &folder)).unwrap()
}

/// The names of the folders in a folder.
///
/// # Panics
/// One is not text.
pub fn subfolders(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
