//! A private network namespace, removed when dropped.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use crate::command::{self, CommandError, ip};

const PREFIX: &str = "xfan-t-";
const DIRECTORY: &str = "/run/netns";

/// The names of all namespaces that this process has made and not yet removed.
static ALIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A network namespace, named `xfan-t-PID-NUMBER`.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

/// Why there is no namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A tool did not make the namespace, or did not set it up.
    #[error("cannot make a network namespace: {0}; this needs root")]
    Command(#[from] CommandError),
    /// The namespace was made and could not be opened.
    #[error("network namespace {name} cannot be opened: {source}")]
    Open {
        /// The namespace's name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

impl Netns {
    /// Makes a namespace with only a loopback interface, which is up.
    ///
    /// # Errors
    /// `ip` is missing, or the caller is not root.
    pub fn new() -> Result<Self, NetnsError> {
        static SWEEP: Once = Once::new();
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(remove_orphans);

        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        ip(&format!("netns add {name}"))?;
        alive().insert(name.clone());
        let opened = File::open(format!("{DIRECTORY}/{name}"));
        let file = opened.map_err(|source| {
            remove(&name);
            NetnsError::Open { name: name.clone(), source }
        })?;
        let namespace = Self { name, file };
        namespace.ip("link set dev lo up")?;
        Ok(namespace)
    }

    /// Makes a namespace in which the kernel sends nothing by itself, so that packets can be
    /// counted exactly: IPv6, with its router solicitations and multicast reports, is off on every
    /// interface.
    ///
    /// # Errors
    /// As [`Netns::new`].
    pub fn quiet() -> Result<Self, NetnsError> {
        let namespace = Self::new()?;
        for interface in ["all", "default"] {
            let setting = format!("net.ipv6.conf.{interface}.disable_ipv6=1");
            command::run(namespace.command("sysctl").args(["-qw", &setting]))?;
        }
        Ok(namespace)
    }

    /// The name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a new thread inside the namespace and passes on its result or its panic.
    /// Sockets and eBPF links that it opens stay in the namespace wherever they are used later.
    ///
    /// # Panics
    /// The namespace cannot be entered: the caller is not root.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            enter(self.file.as_raw_fd())
                .unwrap_or_else(|error| panic!("namespace {} cannot be entered: {error}", self.name));
            work()
        };
        let thread = std::thread::current();
        std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name(thread.name().unwrap_or("netns").into());
            let handle = builder.spawn_scoped(scope, inside).expect("a thread can be started");
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that runs inside the namespace, with the `/sys` that belongs to it, like `ip netns
    /// exec`. The namespace must live until the command is spawned.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = self.file.as_raw_fd();
        // SAFETY: between fork and exec `enter` makes plain system calls on constants and on a
        // copied descriptor; it takes no lock and allocates nothing.
        unsafe { command.pre_exec(move || enter(namespace)) };
        command
    }

    /// Runs `ip` with the words of `arguments` inside the namespace.
    ///
    /// # Errors
    /// As [`command::run`].
    pub fn ip(&self, arguments: &str) -> Result<String, CommandError> {
        command::run(self.command("ip").args(arguments.split_whitespace()))
    }

    /// Runs `ethtool` with the words of `arguments` inside the namespace.
    ///
    /// # Errors
    /// As [`command::run`].
    pub fn ethtool(&self, arguments: &str) -> Result<String, CommandError> {
        command::run(self.command("ethtool").args(arguments.split_whitespace()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Removes every namespace that this process has made. For the end of a process that runs no
/// destructors.
pub fn remove_all() {
    let names: Vec<String> = alive().iter().cloned().collect();
    names.iter().for_each(|name| remove(name));
}

fn alive() -> std::sync::MutexGuard<'static, BTreeSet<String>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(name: &str) {
    if alive().remove(name)
        && let Err(error) = ip(&format!("netns del {name}"))
    {
        eprintln!("cannot remove network namespace {name}: {error}");
    }
}

/// Removes the namespaces of processes that were killed before they could clean up.
fn remove_orphans() {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            // Another test may be removing it at the same time, which is fine.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// Moves the calling thread into a network namespace, and into a new mount namespace whose `/sys`
/// shows the network namespace's interfaces.
fn enter(namespace: RawFd) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let none = std::ptr::null::<libc::c_char>();
    let (sys, sysfs) = (c"/sys".as_ptr(), c"sysfs".as_ptr());
    // SAFETY: every pointer is null where mount(2) allows it, or a constant string that ends in a
    // null byte; the calls do not touch this process's memory.
    unsafe {
        check(libc::setns(namespace, libc::CLONE_NEWNET))?;
        check(libc::unshare(libc::CLONE_NEWNS))?;
        check(libc::mount(none, c"/".as_ptr(), none, libc::MS_SLAVE | libc::MS_REC, none.cast()))?;
        libc::umount2(sys, libc::MNT_DETACH); // may fail: /sys is not mounted
        check(libc::mount(sysfs, sys, sysfs, 0, none.cast()))
    }
}
