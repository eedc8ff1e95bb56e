//! A cgroup (version 2) for each worker process. It limits the worker with all its descendants, and
//! kills them at once.
//!
//! ```text
//!  the primary's cgroup at its start    must be delegated by systemd, if systemd runs
//!   └─ xfan-run-xfan-eth1.sock          one for each control socket
//!       ├─ primary                      the primary, if it has to move (see `Cgroups::begin`)
//!       ├─ default-0                    a worker
//!       └─ default-1
//! ```
//!
//! A cgroup is removed when all processes in it have ended. A primary removes the cgroups that a
//! killed predecessor left behind.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::unistd::Pid;

use crate::config::{MAX_CPU, format_list, parse_list};
use crate::host::sys::has_attribute;

/// The limits of a worker and its descendants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes; `None`: no limit.
    pub memory: Option<u64>,
    /// The most processes and threads.
    pub processes: u32,
    /// The share of CPU time when the CPUs are busy, relative to other cgroups, which have 100.
    pub cpu_weight: u32,
    /// The CPUs that workers may not use: each runs a lane.
    pub lanes: Vec<usize>,
}

/// The primary's part of the cgroup hierarchy.
#[derive(Debug)]
pub struct Cgroups {
    shared: Arc<Shared>,
    /// The controllers that are enabled for workers' cgroups.
    controllers: Vec<&'static str>,
    /// The cgroup that the primary left; `None`: it did not move.
    moved_from: Option<PathBuf>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    /// Cgroups to remove once they are empty.
    emptying: Mutex<Vec<PathBuf>>,
}

/// The cgroup of a worker. Dropping it kills every process in it.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
    shared: Arc<Shared>,
}

/// The cgroup of the primary.
///
/// # Errors
/// A sentence that says why the primary cannot create cgroups in it.
fn own() -> Result<PathBuf, String> {
    let text = |file: &str| fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"));
    let (cgroups, mounts) = (text("/proc/self/cgroup")?, text("/proc/self/mountinfo")?);
    let path =
        cgroups.lines().find_map(|line| line.strip_prefix("0::")).ok_or("the kernel has no cgroup v2")?;
    let folder = mounts.lines().filter_map(|line| within(line, path)).find(|folder| is_cgroup(folder));
    let folder = folder.ok_or("no mounted cgroup v2 hierarchy contains xfan's own cgroup")?;
    if Path::new("/run/systemd/system").exists() && !is_delegated(&folder) {
        return Err(format!("systemd has not delegated {} to xfan", folder.display()));
    }
    Ok(folder)
}

/// The directory of a cgroup, if this line of /proc/self/mountinfo mounts a hierarchy that contains
/// it.
fn within(line: &str, cgroup: &str) -> Option<PathBuf> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    let rest = Path::new(cgroup).strip_prefix(root).ok()?;
    // mountinfo escapes spaces: see proc_pid_mountinfo(5).
    let point = point.replace("\\040", " ");
    kind.starts_with("cgroup2 ").then(|| Path::new(&point).join(rest))
}

/// Whether a directory is a cgroup: another file system may be mounted over it.
fn is_cgroup(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|statfs| statfs.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Whether systemd has delegated a cgroup: see CGROUP_DELEGATION in its documentation.
fn is_delegated(folder: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(folder.as_os_str().as_bytes()) else { return false };
    [c"trusted.delegate", c"user.delegate"].into_iter().any(|name| has_attribute(&path, name, b'1'))
}

/// The name for the cgroup of a control socket: `xfan-run-xfan-eth1.sock` for
/// `/run/xfan/eth1.sock`. Two paths never get the same name.
fn name_of(socket: &Path) -> String {
    let bytes = socket.as_os_str().as_bytes();
    let escaped = bytes.strip_prefix(b"/").unwrap_or(bytes).iter().map(|byte| match byte {
        b'/' => "-".to_owned(),
        byte if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_') => char::from(*byte).to_string(),
        byte => format!("\\x{byte:02x}"),
    });
    format!("xfan-{}", escaped.collect::<String>())
}

fn write(folder: &Path, file: &str, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(folder.join(file))?.write_all(value.as_bytes())
}

fn words(folder: &Path, file: &str) -> Vec<String> {
    let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// The mode of a cgroup's directory. Nobody else may list it: who lists a directory can hold its
/// lock for as long as it likes, and the primary needs the lock to create and remove cgroups.
const MODE: u32 = 0o700;

/// Creates a directory, unless it exists.
fn make(folder: &Path) -> io::Result<()> {
    match make_new(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => close_to_others(folder),
        result => result,
    }
}

/// Creates a directory.
fn make_new(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(MODE).create(folder)?;
    // Older kernels ignore the mode.
    close_to_others(folder)
}

fn close_to_others(folder: &Path) -> io::Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(MODE))
}

/// Enables a controller for the cgroups in a directory.
fn enable(folder: &Path, controller: &str) -> io::Result<()> {
    if words(folder, "cgroup.subtree_control").iter().any(|word| word == controller) {
        return Ok(());
    }
    write(folder, "cgroup.subtree_control", &format!("+{controller}"))
}

impl Cgroups {
    /// Creates the cgroup for the workers of the primary that listens on `socket`.
    ///
    /// Only the root cgroup may contain processes while it enables controllers for its children.
    /// The primary may therefore have to move into a child of its cgroup. If other processes share
    /// its cgroup, the limits that need controllers are not available.
    ///
    /// `cpuset`: some worker's limits name CPUs of lanes.
    ///
    /// # Errors
    /// A sentence that says why workers get no cgroups.
    pub fn begin(socket: &Path, cpuset: bool) -> Result<Self, String> {
        let own = own()?;
        let folder = own.join(name_of(socket));
        make(&folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
        let shared = Arc::new(Shared { folder, emptying: Mutex::default() });
        let mut cgroups = Cgroups { shared, controllers: Vec::new(), moved_from: None };
        let mut wanted = vec!["memory", "pids", "cpu"];
        if cpuset {
            wanted.push("cpuset");
        }
        let available = words(&own, "cgroup.controllers");
        for controller in wanted.into_iter().filter(|wanted| available.iter().any(|word| word == wanted)) {
            let mut enabled = enable(&own, controller);
            if enabled.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
                && cgroups.move_primary(&own).is_ok()
            {
                enabled = enable(&own, controller);
            }
            let enabled = enabled.and_then(|()| enable(&cgroups.shared.folder, controller));
            match enabled {
                Ok(()) => cgroups.controllers.push(controller),
                Err(error) => tracing::debug!(
                    controller,
                    "the controller cannot be enabled for workers' cgroups: {error}"
                ),
            }
        }
        Ok(cgroups)
    }

    /// Moves the primary from its cgroup into a child of it.
    fn move_primary(&mut self, own: &Path) -> io::Result<()> {
        if self.moved_from.is_none() {
            let folder = self.shared.folder.join("primary");
            make(&folder)?;
            write(&folder, "cgroup.procs", "0")?;
            self.moved_from = Some(own.to_owned());
        }
        Ok(())
    }

    /// The directory that contains the workers' cgroups.
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// Which of these limits cgroups enforce, and which they do not enforce.
    pub fn in_force(&self, limits: &Limits) -> (Vec<&'static str>, Vec<&'static str>) {
        let wanted = [
            ("worker_memory", "memory", limits.memory.is_some()),
            ("worker_processes", "pids", true),
            ("worker_cpu_weight", "cpu", limits.cpu_weight != 100),
            ("CPUs apart from lanes", "cpuset", !limits.lanes.is_empty()),
        ];
        let wanted = wanted.into_iter().filter(|(.., wanted)| *wanted);
        let (have, lack): (Vec<_>, Vec<_>) =
            wanted.partition(|(_, controller, _)| self.controllers.contains(controller));
        let names = |list: Vec<(&'static str, _, _)>| list.into_iter().map(|(name, ..)| name).collect();
        (names(have), names(lack))
    }

    /// Whether cgroups enforce `worker_memory`.
    pub fn limits_memory(&self) -> bool {
        self.controllers.contains(&"memory")
    }

    /// Creates a cgroup with these limits for a new process of a member, such as `default/0`.
    ///
    /// # Errors
    /// The errors of mkdir(2) and of write(2) to the cgroup's files.
    pub fn make(&self, member: &str, limits: &Limits) -> io::Result<Cgroup> {
        let name = member.replace('/', "-");
        // Processes of the previous worker may still be ending in a cgroup of that name.
        for number in 0.. {
            let name = if number == 0 { name.clone() } else { format!("{name}.{number}") };
            let folder = self.shared.folder.join(name);
            match make_new(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                result => result?,
            }
            let cgroup = Cgroup { folder, shared: self.shared.clone() };
            self.limit(&cgroup.folder, limits)?;
            return Ok(cgroup);
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn limit(&self, folder: &Path, limits: &Limits) -> io::Result<()> {
        let Limits { memory, processes, cpu_weight, lanes } = limits;
        let has = |controller| self.controllers.contains(&controller);
        if has("memory")
            && let Some(bytes) = memory
        {
            write(folder, "memory.max", &bytes.to_string())?;
            // On OOM, kill all processes of the worker: it cannot work with some missing.
            let _ = write(folder, "memory.oom.group", "1");
        }
        if has("pids") {
            write(folder, "pids.max", &processes.to_string())?;
        }
        if has("cpu") {
            write(folder, "cpu.weight", &cpu_weight.to_string())?;
        }
        if has("cpuset") {
            let all = words(&self.shared.folder, "cpuset.cpus.effective").concat();
            let others: Vec<usize> = parse_list(&all, MAX_CPU)
                .unwrap_or_default()
                .into_iter()
                .filter(|cpu| !lanes.contains(cpu))
                .collect();
            if !others.is_empty() {
                write(folder, "cpuset.cpus", &format_list(&others))?;
            }
        }
        Ok(())
    }

    /// The cgroup of a process that an earlier primary started, if it is one of this primary's
    /// cgroups.
    pub fn of(&self, pid: u32) -> Option<Cgroup> {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let name = Path::new(cgroup.lines().find_map(|line| line.strip_prefix("0::"))?).file_name()?;
        let folder = self.shared.folder.join(name);
        let pid = pid.to_string();
        words(&folder, "cgroup.procs").contains(&pid).then(|| Cgroup { folder, shared: self.shared.clone() })
    }

    /// Kills all processes that an earlier primary left in these cgroups, except those in `kept`.
    pub fn clear(&self, kept: &[&Cgroup]) {
        let folders =
            fs::read_dir(&self.shared.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        for folder in folders.filter(|path| path.is_dir() && !path.ends_with("primary")) {
            if kept.iter().all(|cgroup| cgroup.folder != folder) {
                drop(Cgroup { folder, shared: self.shared.clone() });
            }
        }
    }

    /// Removes the cgroups whose processes have ended. Returns whether all are removed.
    pub fn sweep(&self) -> bool {
        let mut emptying = self.shared.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        emptying.retain(|folder| match fs::remove_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                kill_all(folder);
                true
            }
            _ => false,
        });
        emptying.is_empty()
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let folder = &self.shared.folder;
        if let Some(own) = &self.moved_from {
            // Undo the steps of `begin` in reverse order.
            for folder in [folder, own] {
                for controller in &self.controllers {
                    let _ = write(folder, "cgroup.subtree_control", &format!("-{controller}"));
                }
            }
            let _ = write(own, "cgroup.procs", "0");
            let _ = fs::remove_dir(folder.join("primary"));
        }
        if let Err(error) = fs::remove_dir(folder)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %folder.display(), "the cgroup cannot be removed: {error}");
        }
    }
}

impl Cgroup {
    /// Opens `cgroup.procs`: a process that writes `0` to it enters the cgroup.
    ///
    /// # Errors
    /// The errors of open(2).
    pub fn procs(&self) -> io::Result<OwnedFd> {
        Ok(fs::OpenOptions::new().write(true).open(self.folder.join("cgroup.procs"))?.into())
    }

    /// Kills all processes in the cgroup.
    pub fn kill(&self) {
        kill_all(&self.folder);
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        kill_all(&self.folder);
        if fs::remove_dir(&self.folder).is_err() {
            let mut emptying = self.shared.emptying.lock().unwrap_or_else(PoisonError::into_inner);
            emptying.push(self.folder.clone());
        }
    }
}

/// Kills all processes in a cgroup. Before Linux 5.14 it freezes them first, so that none can start
/// another, and kills them one by one.
fn kill_all(folder: &Path) {
    if write(folder, "cgroup.kill", "1").is_ok() {
        return;
    }
    let _ = write(folder, "cgroup.freeze", "1");
    for pid in words(folder, "cgroup.procs").iter().filter_map(|pid| pid.parse().ok()) {
        // Processes in a frozen cgroup end only by a signal, so no other process can have this pid.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_found_below_its_mount_point() {
        let line = |root: &str, point: &str, kind: &str| {
            format!("41 31 0:38 {root} {point} rw,relatime shared:9 - {kind} none rw")
        };
        let found = |line: String, cgroup| within(&line, cgroup).map(|path| path.display().to_string());
        let unified = || line("/", "/sys/fs/cgroup/unified", "cgroup2");
        assert_eq!(found(unified(), "/a.slice/b").unwrap(), "/sys/fs/cgroup/unified/a.slice/b");
        assert_eq!(found(line("/a.slice", "/x\\040y", "cgroup2"), "/a.slice/b").unwrap(), "/x y/b");
        assert_eq!(found(line("/other", "/sys/fs/cgroup", "cgroup2"), "/a.slice/b"), None);
        assert_eq!(found(line("/", "/sys/fs/cgroup/pids", "cgroup"), "/"), None);
        assert_eq!(found("no such line".into(), "/"), None);
    }

    #[test]
    fn different_sockets_have_different_names() {
        assert_eq!(name_of(Path::new("/run/xfan/eth1.sock")), "xfan-run-xfan-eth1.sock");
        let names = ["/a-b/c", "/a/b/c", "/a\\x2db/c", "/ab/c"].map(|path| name_of(Path::new(path)));
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }
}
