//! Attributes that a worker process must not inherit from the primary or from what started it:
//! scheduling, resource limits, signal settings, keyring.
//!
//! exec(2) preserves them. [`reset_attributes`] therefore runs between fork and exec, and gives
//! each attribute the value that a new login would have. The worker keeps the working directory,
//! the namespaces and the core-dump limit of the primary.

#![allow(unsafe_code, reason = "raw system calls between fork and exec")]

use std::io;
use std::sync::OnceLock;

/// The number of resource limits of getrlimit(2). Linux numbers them from 0.
const LIMITS: usize = 16;

/// The resource limits with which the primary was started.
static AT_START: OnceLock<[libc::rlimit; LIMITS]> = OnceLock::new();

/// `oom_score_adj` of the primary: the kernel prefers any other process unless the primary uses 90%
/// of all memory. With -1000, the kernel would kill everything else before a primary that leaks.
const OOM_PRIMARY: i32 = -900;

/// `oom_score_adj` of workers, as if each used another 30% of all memory: the kernel kills a worker
/// before other services.
const OOM_WORKER: &[u8] = b"300";

/// Saves the resource limits of this process for its workers. Call it before anything changes them.
pub fn save_limits() {
    AT_START.get_or_init(read_limits);
}

fn read_limits() -> [libc::rlimit; LIMITS] {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let mut limits = [unlimited; LIMITS];
    for (limit, number) in limits.iter_mut().zip(0..) {
        // SAFETY: `limit` outlives the call. A kernel with fewer limits fails with EINVAL.
        unsafe { libc::getrlimit(number, limit) };
    }
    limits
}

/// The resource limits of a worker process. The primary computes them before fork(2).
#[derive(Clone, Copy, Debug)]
pub struct Rlimits {
    limits: [libc::rlimit; LIMITS],
}

impl Rlimits {
    /// Takes the saved limits, but allows no real-time priority, no raised priority, and at most
    /// `data` bytes of private memory.
    pub fn new(data: Option<u64>) -> Self {
        let mut limits = *AT_START.get_or_init(read_limits);
        let mut set = |resource: libc::__rlimit_resource_t, most: libc::rlim_t| {
            let limit = &mut limits[resource as usize];
            limit.rlim_max = limit.rlim_max.min(most);
            limit.rlim_cur = limit.rlim_cur.min(limit.rlim_max);
        };
        set(libc::RLIMIT_RTPRIO, 0);
        set(libc::RLIMIT_NICE, 0);
        if let Some(bytes) = data {
            set(libc::RLIMIT_DATA, bytes);
        }
        Rlimits { limits }
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Like [`check`], but ignores that the primary lacks a capability, and that the kernel was built
/// without a feature. In these cases the worker keeps the inherited value.
fn check_if_able(result: libc::c_long) -> io::Result<()> {
    match check(result) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Gives the inherited attributes of the calling process the values of a new login. Call it while
/// the process still has the primary's capabilities. Async-signal-safe.
///
/// # Errors
/// The errors of sched_setscheduler(2), setpriority(2), setrlimit(2) and rt_sigaction(2), among
/// others.
pub fn reset_attributes(rlimits: &Rlimits) -> io::Result<()> {
    /// A mask of 8,192 CPUs: the most for which Linux can be built.
    const ALL_CPUS: [u8; 1024] = [0xff; 1024];
    /// The kernel's default.
    const TIMER_SLACK_NS: libc::c_ulong = 50_000;
    /// As in linux/ioprio.h.
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    write_oom_score(OOM_WORKER)?;
    let normal = libc::sched_param { sched_priority: 0 };
    // SAFETY: `normal` and `ALL_CPUS` outlive the calls, which read no more than their sizes. The
    // null pointer stands for the empty set of nodes. The other calls take no pointers.
    unsafe {
        check_if_able(libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_OTHER, &raw const normal))?;
        check_if_able(libc::setpriority(libc::PRIO_PROCESS, 0, 0).into())?;
        check_if_able(libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0))?;
        let (length, cpus) = (ALL_CPUS.len(), ALL_CPUS.as_ptr());
        check_if_able(libc::syscall(libc::SYS_sched_setaffinity, 0, length, cpus))?;
        let nodes = std::ptr::null::<libc::c_ulong>();
        check_if_able(libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_DEFAULT, nodes, 0))?;
        // After the scheduling class, since real-time threads have no timer slack.
        check_if_able(libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0).into())?;
        check_if_able(libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0).into())?;
        check_if_able(libc::personality(0).into())?;
        libc::umask(0o022);
    }
    // The caller sets the limit of open files later: descriptors above it must first be marked.
    let limits = rlimits.limits.iter().zip(0..).filter(|(_, number)| *number != libc::RLIMIT_NOFILE);
    for (limit, number) in limits {
        // SAFETY: `limit` outlives the call.
        check_if_able(unsafe { libc::setrlimit(number, limit) }.into())?;
    }
    default_signals()
}

/// Makes the process ignore and block no signal. exec(2) resets handlers, but preserves ignored and
/// blocked signals.
fn default_signals() -> io::Result<()> {
    /// The kernel's `struct sigaction`, which is at most this long. All zeroes mean `SIG_DFL`.
    const DEFAULT: [u64; 4] = [0; 4];
    /// The size of the kernel's signal mask in bytes.
    const MASK_BYTES: usize = 8;
    for signal in (1..=64).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP)) {
        let (new, old) = (DEFAULT.as_ptr(), std::ptr::null_mut::<u64>());
        // sigaction(3) would refuse the signals that the C library reserves.
        // SAFETY: `new` is as long as the kernel reads, and a null `old` is not written to.
        check(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, MASK_BYTES) })?;
    }
    let (none, old) = (DEFAULT.as_ptr(), std::ptr::null_mut::<u64>());
    // SAFETY: the kernel reads a mask of `MASK_BYTES`, and a null `old` is not written to.
    check(unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, none, old, MASK_BYTES) })
}

/// Replaces the session keyring of the calling process, which comes from what started the primary,
/// by a new, empty one. Async-signal-safe.
///
/// Call it before the process changes its user: the keyring counts against the key quota of the
/// caller's user, and workers can use up that of their own. The worker possesses the keyring, and
/// so may use it, although it belongs to another user.
///
/// # Errors
/// The errors of keyctl_join_session_keyring(3), except ENOSYS.
pub fn leave_keyring() -> io::Result<()> {
    let name = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name means an anonymous keyring.
    let joined = unsafe {
        libc::syscall(libc::SYS_keyctl, libc::c_long::from(libc::KEYCTL_JOIN_SESSION_KEYRING), name)
    };
    match check(joined) {
        // The kernel was built without keyrings.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result,
    }
}

/// Writes the calling process' `oom_score_adj`, if permitted. Async-signal-safe.
fn write_oom_score(value: &[u8]) -> io::Result<()> {
    // SAFETY: the path is a C string literal; `value` has `value.len()` bytes; the descriptor is
    // closed once.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Ok(()); // /proc is not mounted
        }
        let written = libc::write(fd, value.as_ptr().cast(), value.len());
        let result = check_if_able(written as libc::c_long);
        libc::close(fd);
        result
    }
}

/// Protects this process from the OOM killer, unless it already has a lower `oom_score_adj`.
///
/// # Errors
/// The errors of write(2) to `oom_score_adj`: EACCES without CAP_SYS_RESOURCE.
pub fn protect_from_oom() -> io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let now: i32 = std::fs::read_to_string(FILE)?.trim().parse().unwrap_or(0);
    if now > OOM_PRIMARY { std::fs::write(FILE, OOM_PRIMARY.to_string()) } else { Ok(()) }
}

/// Excludes shared memory from core dumps of this process and its workers: packet memory is large,
/// and packets may be confidential.
///
/// # Errors
/// The errors of write(2) to `coredump_filter`.
pub fn exclude_packets_from_core_dumps() -> io::Result<()> {
    // The default of core(5) without anonymous shared mappings: anonymous private mappings, ELF
    // headers, private huge pages.
    std::fs::write("/proc/self/coredump_filter", "0x31")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_get_the_limits_of_the_start() {
        save_limits();
        let (now, rlimits) = (read_limits(), Rlimits::new(Some(4096)));
        let get = |limits: &[libc::rlimit; LIMITS], resource: libc::__rlimit_resource_t| {
            let limit = limits[resource as usize];
            (limit.rlim_cur, limit.rlim_max)
        };
        assert_eq!(get(&rlimits.limits, libc::RLIMIT_RTPRIO), (0, 0));
        assert_eq!(get(&rlimits.limits, libc::RLIMIT_NICE), (0, 0));
        assert_eq!(get(&rlimits.limits, libc::RLIMIT_DATA), (4096, 4096));
        assert_eq!(get(&rlimits.limits, libc::RLIMIT_NOFILE), get(&now, libc::RLIMIT_NOFILE));
    }
}
