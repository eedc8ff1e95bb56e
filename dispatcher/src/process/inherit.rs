//! What a worker's process must not inherit: how its primary, or whoever started that, is scheduled, limited and signalled.
//!
//! A process keeps all of this when it executes another program. So [`shed`] runs between fork and exec, and sets each item to
//! what a new login would have. The working directory, the namespaces and the core-dump limit stay those of the primary.

#![allow(unsafe_code, reason = "raw system calls between fork and exec")]

use std::io;
use std::sync::OnceLock;

/// The resource limits of getrlimit(2): Linux numbers them from 0.
const LIMITS: usize = 16;

/// The limits with which the primary was started.
static AT_START: OnceLock<[libc::rlimit; LIMITS]> = OnceLock::new();

/// `oom_score_adj` of the primary: the kernel takes any other process first, unless the primary uses 90% of all memory. Not
/// -1000, with which it would rather kill everything else than a primary that leaks.
const OOM_PRIMARY: i32 = -900;

/// `oom_score_adj` of workers: as if each used 30% more of all memory, so that one of them is chosen before other services.
const OOM_WORKER: &[u8] = b"300";

/// Notes the resource limits of this process. Call it before anything changes them; workers get them as they are noted here.
pub fn note_limits() {
    AT_START.get_or_init(read_limits);
}

fn read_limits() -> [libc::rlimit; LIMITS] {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let mut limits = [unlimited; LIMITS];
    for (limit, number) in limits.iter_mut().zip(0..) {
        // SAFETY: `limit` is a valid place for the answer. No limit has a number that the kernel refuses.
        unsafe { libc::getrlimit(number, limit) };
    }
    limits
}

/// What [`shed`] needs and cannot find out between fork and exec.
#[derive(Clone, Copy, Debug)]
pub struct Fresh {
    limits: [libc::rlimit; LIMITS],
}

impl Fresh {
    /// The limits of the start, without real-time priority and raised nice value; and at most `data` bytes of private memory.
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
        Fresh { limits }
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// As [`check`]. The kernel refuses some changes to a primary that lacks a capability, and does not know others if it was
/// built without them: then the worker keeps what it has.
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

/// Gives the calling process what a new login would have, while it still has the primary's rights. Async-signal-safe.
///
/// # Errors
/// What sched_setscheduler(2), setpriority(2), prlimit(2) and rt_sigaction(2) say.
pub fn shed(fresh: &Fresh) -> io::Result<()> {
    /// As many CPUs as Linux can be built for.
    const ALL_CPUS: [u8; 1024] = [0xff; 1024];
    /// The kernel's own default.
    const TIMER_SLACK_NS: libc::c_ulong = 50_000;
    /// As in linux/ioprio.h.
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    write_oom_score(OOM_WORKER)?;
    let normal = libc::sched_param { sched_priority: 0 };
    // SAFETY: `normal` and `ALL_CPUS` live through the calls, which read no more than their sizes; the null pointer stands for
    // the empty set of nodes; the other calls take no pointers.
    unsafe {
        check_if_able(libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_OTHER, &raw const normal))?;
        check_if_able(libc::setpriority(libc::PRIO_PROCESS, 0, 0).into())?;
        check_if_able(libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0))?;
        let (length, cpus) = (ALL_CPUS.len(), ALL_CPUS.as_ptr());
        check_if_able(libc::syscall(libc::SYS_sched_setaffinity, 0, length, cpus))?;
        let nodes = std::ptr::null::<libc::c_ulong>();
        check_if_able(libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_DEFAULT, nodes, 0))?;
        // Real-time threads have none: after the scheduling class.
        check_if_able(libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0).into())?;
        check_if_able(libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0).into())?;
        check_if_able(libc::personality(0).into())?;
        libc::umask(0o022);
    }
    // That of open files comes last of all: what is to be closed may be above it.
    let limits = fresh.limits.iter().zip(0..).filter(|(_, number)| *number != libc::RLIMIT_NOFILE);
    for (limit, number) in limits {
        // SAFETY: `limit` lives through the call.
        check_if_able(unsafe { libc::setrlimit(number, limit) }.into())?;
    }
    default_signals()
}

/// Has the process that executes a program ignore and block no signal: handlers end with the program before, these do not.
fn default_signals() -> io::Result<()> {
    /// The kernel's own structure, which is no longer than this, with a signal mask of 8 bytes at most. All zero it is `SIG_DFL`.
    const DEFAULT: [u64; 4] = [0; 4];
    const MASK_BYTES: usize = 8;
    for signal in (1..=64).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP)) {
        let (new, old) = (DEFAULT.as_ptr(), std::ptr::null_mut::<u64>());
        // Not by sigaction(3), which refuses the signals that the C library keeps for itself.
        // SAFETY: `new` is as long as the kernel reads, and it writes nothing to a null pointer.
        check(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, MASK_BYTES) })?;
    }
    let (none, old) = (DEFAULT.as_ptr(), std::ptr::null_mut::<u64>());
    // SAFETY: the kernel reads a mask of 8 bytes, and writes nothing to a null pointer.
    check(unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, none, old, MASK_BYTES) })
}

/// Gives the process an empty session keyring of its own, instead of that of whoever started the primary. To be called as the
/// user it is to belong to. Async-signal-safe.
///
/// # Errors
/// What keyctl_join_session_keyring(3) says.
pub fn leave_keyring() -> io::Result<()> {
    let name = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name stands for an anonymous keyring.
    let joined = unsafe {
        libc::syscall(libc::SYS_keyctl, libc::c_long::from(libc::KEYCTL_JOIN_SESSION_KEYRING), name)
    };
    match check(joined) {
        // The kernel has no keyrings.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result,
    }
}

/// Writes the calling process' `oom_score_adj`, if it may. Async-signal-safe.
fn write_oom_score(value: &[u8]) -> io::Result<()> {
    // SAFETY: the path is a constant that ends in a null byte; `value` is as long as is said; the descriptor is closed once.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Ok(()); // no /proc
        }
        let written = libc::write(fd, value.as_ptr().cast(), value.len());
        let result = check_if_able(written as libc::c_long);
        libc::close(fd);
        result
    }
}

/// Protects this process from the OOM killer, unless whoever started it has done more for it already.
///
/// # Errors
/// Whatever the kernel says: EACCES without CAP_SYS_RESOURCE.
pub fn protect_from_oom() -> io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let now: i32 = std::fs::read_to_string(FILE)?.trim().parse().unwrap_or(0);
    if now > OOM_PRIMARY { std::fs::write(FILE, OOM_PRIMARY.to_string()) } else { Ok(()) }
}

/// Leaves shared memory out of the core dumps of this process and its workers: packet memory is as large as it is secret.
///
/// # Errors
/// Whatever the kernel says.
pub fn dump_no_packets() -> io::Result<()> {
    // core(5): anonymous private mappings, ELF headers, private huge pages; the default without anonymous shared mappings.
    std::fs::write("/proc/self/coredump_filter", "0x31")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_start_but_for_real_time_and_memory() {
        note_limits();
        let (now, fresh) = (read_limits(), Fresh::new(Some(4096)));
        let get = |limits: &[libc::rlimit; LIMITS], resource: libc::__rlimit_resource_t| {
            let limit = limits[resource as usize];
            (limit.rlim_cur, limit.rlim_max)
        };
        assert_eq!(get(&fresh.limits, libc::RLIMIT_RTPRIO), (0, 0));
        assert_eq!(get(&fresh.limits, libc::RLIMIT_NICE), (0, 0));
        assert_eq!(get(&fresh.limits, libc::RLIMIT_DATA), (4096, 4096));
        assert_eq!(get(&fresh.limits, libc::RLIMIT_NOFILE), get(&now, libc::RLIMIT_NOFILE));
    }
}
