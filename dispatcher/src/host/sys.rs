//! System calls that no crate of the workspace's dependencies wraps.
//!
//! Functions marked async-signal-safe may run between fork and exec.

#![allow(unsafe_code, reason = "raw system calls")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{SockFlag, accept4};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Opens a pidfd, which becomes readable when the process ends. See pidfd_open(2).
///
/// # Errors
/// The errors of pidfd_open(2); ESRCH if no such process exists.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created the descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process behind a pidfd, never to another process that reuses its pid. See
/// pidfd_send_signal(2).
///
/// # Errors
/// The errors of pidfd_send_signal(2); ESRCH if the process has ended.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    send_signal(pidfd, signal, 0)
}

/// Sends a signal to the process group led by the process behind a pidfd.
///
/// # Errors
/// The errors of pidfd_send_signal(2); ESRCH if the group is empty; EINVAL before Linux 6.9.
pub fn pidfd_signal_group(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    /// As in linux/pidfd.h; libc has no constant for it yet.
    const PIDFD_SIGNAL_PROCESS_GROUP: u32 = 1 << 2;
    send_signal(pidfd, signal, PIDFD_SIGNAL_PROCESS_GROUP)
}

/// Whether a descriptor is readable now. For a pidfd: whether the process has ended.
pub fn is_readable(fd: BorrowedFd<'_>) -> bool {
    is_readable_within(fd, Duration::ZERO)
}

/// Whether a descriptor is readable, or becomes so within this time.
pub fn is_readable_within(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut poll = [PollFd::new(fd, PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, poll_timeout(limit)).is_ok_and(|ready| ready > 0)
}

/// A limit for poll(2), rounded up to milliseconds.
pub fn poll_timeout(limit: Duration) -> PollTimeout {
    PollTimeout::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
}

fn send_signal(pidfd: BorrowedFd<'_>, signal: Signal, flags: u32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed; the kernel then fills it in as kill(2) does.
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, none, flags) }
    {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Marks every descriptor from `first` upwards close-on-exec. Async-signal-safe.
///
/// # Errors
/// The errors of close_range(2) and getrlimit(2).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Linux has close_range(2) since 5.9, and this flag since 5.11.
            error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                close_on_exec_one_by_one(first)
            }
            error => Err(error),
        },
    }
}

/// Like [`close_on_exec_from`], but with one system call for each possible descriptor.
fn close_on_exec_one_by_one(first: u32) -> io::Result<()> {
    // SAFETY: `rlimit` is plain data, and the kernel writes to `limit`, which outlives the call.
    let limit = unsafe {
        let mut limit = std::mem::zeroed::<libc::rlimit>();
        match libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) {
            0 => limit.rlim_cur,
            _ => return Err(io::Error::last_os_error()),
        }
    };
    for fd in first..u32::try_from(limit).unwrap_or(u32::MAX) {
        let Ok(fd) = i32::try_from(fd) else { break };
        // SAFETY: no pointers. A descriptor that is not open fails with EBADF.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// The limit of open files that a primary asks for, if the hard limit allows it: more than it ever
/// opens. A higher limit would cost time: before Linux 5.11, each start of a worker makes one
/// system call for each possible descriptor.
const DESCRIPTORS: u64 = 1 << 16;

/// The soft and hard limit of open files before [`raise_descriptor_limit`] changed them.
static ORIGINAL_LIMIT: OnceLock<(u64, u64)> = OnceLock::new();

/// Raises the soft limit of open files of this process to its hard limit, but at most to 65,536.
/// Returns the soft limit that is in force afterwards.
pub fn raise_descriptor_limit() -> u64 {
    let (soft, hard) = original_descriptor_limit();
    let most = soft.max(hard.min(DESCRIPTORS));
    if set_descriptor_limit((most, hard)).is_ok() { most } else { soft }
}

/// The soft and hard limit of open files with which this process was started. Workers get the same.
pub fn original_descriptor_limit() -> (u64, u64) {
    *ORIGINAL_LIMIT.get_or_init(|| getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 4096)))
}

/// Sets the soft and hard limit of open files. Async-signal-safe.
///
/// # Errors
/// The errors of setrlimit(2).
pub fn set_descriptor_limit((soft, hard): (u64, u64)) -> io::Result<()> {
    Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?)
}

/// Clears the close-on-exec flag of a descriptor. Async-signal-safe.
///
/// # Errors
/// EBADF if the descriptor is not open.
pub fn keep_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads a bit mask, such as `SigCgt:`, from the text of /proc/PID/status (proc_pid_status(5)). 0
/// if the text has no such line.
pub fn bits_of_status(status: &str, name: &str) -> u64 {
    let bits = status.lines().find_map(|line| line.strip_prefix(name));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// Blocks or unblocks SIGINT, SIGTERM and SIGHUP for the calling thread and the threads it starts.
///
/// While they are blocked, no signal ends the process between a change that needs cleaning up and
/// the handler that cleans up. Workers start with no signals blocked.
///
/// # Errors
/// The errors of pthread_sigmask(3).
pub fn block_signals(block: bool) -> io::Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    if block {
        signals.thread_block()?
    } else {
        signals.thread_unblock()?
    }
    Ok(())
}

/// Blocks SIGHUP and SIGTTOU for the calling thread and the threads it starts.
///
/// [`block_signals`] unblocks SIGHUP: until then, it cannot end a primary that is starting. SIGTTOU
/// stays blocked: a terminal with `stty tostop` would otherwise stop a primary in the background
/// that writes to it.
///
/// # Errors
/// The errors of pthread_sigmask(3).
pub fn block_terminal_signals() -> io::Result<()> {
    Ok([Signal::SIGHUP, Signal::SIGTTOU].into_iter().collect::<SigSet>().thread_block()?)
}

/// Makes the kernel refuse messages that carry descriptors to this Unix socket and to the sockets
/// it accepts.
///
/// Closing a socket closes the descriptors in its unread messages, and closing a descriptor can
/// block for as long as its creator wants.
///
/// # Errors
/// ENOPROTOOPT before Linux 6.16.
pub fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    /// As in asm-generic/socket.h; libc has no constant for it yet.
    const SO_PASSRIGHTS: libc::c_int = 83;
    let off: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&off)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes at `off`.
    match unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const off).cast(), length)
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Registers a descriptor with the current tokio runtime.
///
/// # Errors
/// The errors of epoll_ctl(2).
///
/// # Panics
/// The calling thread has no runtime.
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open and the same for as long as it lives; the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Moves the calling process into the cgroup to which this `cgroup.procs` belongs.
/// Async-signal-safe.
///
/// # Errors
/// The errors of write(2) to a `cgroup.procs`, see cgroups(7).
pub fn enter_cgroup(procs: BorrowedFd<'_>) -> io::Result<()> {
    let own = b"0";
    // SAFETY: the kernel reads `own.len()` bytes at `own`.
    match unsafe { libc::write(procs.as_raw_fd(), own.as_ptr().cast(), own.len()) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the real, effective and saved user and group ids of the calling process, which must have
/// only one thread, and removes its supplementary groups. Async-signal-safe.
///
/// # Errors
/// EPERM without CAP_SETUID and CAP_SETGID; EAGAIN if the user has too many processes.
pub fn become_user(uid: libc::uid_t, gid: libc::gid_t) -> io::Result<()> {
    // Raw system calls: the wrappers of the C library would signal the other threads of the process
    // that forked.
    // SAFETY: the pointer to an empty list of groups may be null.
    let done = unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives up the calling process' controlling terminal, if it has one. A process that does not lead
/// its session cannot get one again, and other processes of the session keep theirs.
/// Async-signal-safe.
///
/// # Errors
/// The errors of ioctl_tty(2).
pub fn leave_terminal() -> io::Result<()> {
    // SAFETY: the path is a C string literal.
    let fd = unsafe { libc::open(c"/dev/tty".as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Ok(()); // no controlling terminal
    }
    // SAFETY: the kernel has just created the descriptor; nothing else owns it.
    let terminal = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: no pointers.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCNOTTY) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Accepts a connection of a listening socket; the new socket does not block and is closed on exec.
///
/// # Errors
/// The errors of accept4(2).
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the kernel has just created the descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The supplementary groups of the process at the other end of a Unix socket, as they were when it
/// connected. See `SO_PEERGROUPS` in socket(7).
///
/// # Errors
/// The errors of getsockopt(2).
pub fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    /// The most groups that a process can have, as in linux/limits.h.
    const NGROUPS_MAX: usize = 65_536;
    let mut groups = vec![0u32; 64];
    loop {
        let mut bytes = libc::socklen_t::try_from(size_of_val(&*groups)).map_err(io::Error::other)?;
        // SAFETY: `groups` has as many bytes as `bytes` says, and the kernel fills it with ids.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<u32>();
        match result {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            _ if count > groups.len() && count <= NGROUPS_MAX => groups.resize(count, 0),
            _ => return Err(io::Error::last_os_error()),
        }
    }
}

/// Whether an extended attribute of a file has exactly this one-byte value.
pub fn has_attribute(file: &CStr, name: &CStr, value: u8) -> bool {
    let mut found = 0u8;
    // SAFETY: both strings end in a null byte, and the kernel writes at most one byte to `found`.
    let length = unsafe { libc::getxattr(file.as_ptr(), name.as_ptr(), (&raw mut found).cast(), 1) };
    length == 1 && found == value
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uses a process of its own: the descriptors of other tests do not appear in it.
    #[test]
    fn both_methods_close_descriptors_on_exec() {
        use std::os::unix::process::CommandExt;
        for one_by_one in [false, true] {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "ls /proc/$$/fd"]);
            // SAFETY: the closure makes async-signal-safe calls only. The test checks that the
            // descriptor that dup2 creates is closed on exec.
            unsafe {
                command.pre_exec(move || {
                    if libc::dup2(0, 57) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                    if one_by_one { close_on_exec_one_by_one(3) } else { close_on_exec_from(3) }
                });
            }
            let output = command.output().unwrap();
            let shown = String::from_utf8(output.stdout).unwrap();
            assert!(shown.starts_with("0\n1\n") && !shown.contains("57"), "{one_by_one}: {shown}");
        }
    }
}
