//! System calls that no crate here wraps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor of a process, readable when it has ended. See pidfd_open(2).
///
/// # Errors
/// Whatever the kernel says; ESRCH if there is no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Signals the process behind a pidfd; never another that got its number. See pidfd_send_signal(2).
///
/// # Errors
/// Whatever the kernel says; ESRCH if it has ended.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    send_signal(pidfd, signal, 0)
}

/// Signals the process group that the process behind a pidfd leads.
///
/// # Errors
/// Whatever the kernel says; ESRCH if there is none; EINVAL before Linux 6.9.
pub fn pidfd_signal_group(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    /// As in linux/pidfd.h.
    const PIDFD_SIGNAL_PROCESS_GROUP: u32 = 1 << 2;
    send_signal(pidfd, signal, PIDFD_SIGNAL_PROCESS_GROUP)
}

/// Whether a descriptor is readable now; of a pidfd: whether the process has ended.
pub fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = [PollFd::new(fd, PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn send_signal(pidfd: BorrowedFd<'_>, signal: Signal, flags: u32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means "as kill(2) would fill it".
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as i32, none, flags) }
    {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Marks every descriptor from `first` on close-on-exec. Async-signal-safe.
///
/// # Errors
/// The errors of close_range(2) or getrlimit(2).
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Linux has the flag since 5.11, and the call since 5.9.
            error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                close_on_exec_one_by_one(first)
            }
            error => Err(error),
        },
    }
}

/// Does the same as [`close_on_exec_from`], by one system call for each possible descriptor.
fn close_on_exec_one_by_one(first: u32) -> io::Result<()> {
    // SAFETY: `limit` is a valid place for the answer.
    let limit = unsafe {
        let mut limit = std::mem::zeroed::<libc::rlimit>();
        match libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) {
            0 => limit.rlim_cur,
            _ => return Err(io::Error::last_os_error()),
        }
    };
    for fd in first..u32::try_from(limit).unwrap_or(u32::MAX) {
        let Ok(fd) = i32::try_from(fd) else { break };
        // SAFETY: no pointers; EBADF where nothing is open.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// More descriptors than a primary ever has open. No more are asked for: before Linux 5.11 all that
/// are possible are looked at whenever a worker is started.
const DESCRIPTORS: u64 = 1 << 16;

/// Soft and hard limit of open files before [`raise_descriptor_limit`].
static ORIGINAL_LIMIT: OnceLock<(u64, u64)> = OnceLock::new();

/// Raises this process' limit of open files as far as it may, to 65,536 at most, and returns what
/// it is then.
pub fn raise_descriptor_limit() -> u64 {
    let (soft, hard) = original_descriptor_limit();
    let most = soft.max(hard.min(DESCRIPTORS));
    if set_descriptor_limit((most, hard)).is_ok() { most } else { soft }
}

/// The soft and hard limit of open files that this process was started with: what its workers get.
pub fn original_descriptor_limit() -> (u64, u64) {
    *ORIGINAL_LIMIT.get_or_init(|| getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 4096)))
}

/// Sets the soft and hard limit of open files. Async-signal-safe.
///
/// # Errors
/// Whatever setrlimit(2) says.
pub fn set_descriptor_limit((soft, hard): (u64, u64)) -> io::Result<()> {
    Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?)
}

/// Has a descriptor stay open on exec. Async-signal-safe.
///
/// # Errors
/// EBADF if it is not open.
pub fn keep_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A set of bits out of the text of /proc/PID/status (proc_pid_status(5)), by its name, such as
/// `SigCgt:`; empty if it is not there.
pub fn bits_of_status(status: &str, name: &str) -> u64 {
    let bits = status.lines().find_map(|line| line.strip_prefix(name));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// Blocks SIGINT, SIGTERM and SIGHUP for the calling thread and those it makes, or unblocks them:
/// between something that must be cleaned up and a handler that sees to it, a signal would end the
/// process at once. Workers start with no signals blocked.
///
/// # Errors
/// Whatever the kernel says.
pub fn block_signals(block: bool) -> io::Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    if block {
        signals.thread_block()?
    } else {
        signals.thread_unblock()?
    }
    Ok(())
}

/// Blocks SIGHUP, until [`block_signals`] unblocks it, and SIGTTOU for good, for the calling thread
/// and those it makes. So the first ends nothing while the primary starts, and a terminal that only
/// its foreground job may write to (`stty tostop`) stops nobody.
///
/// # Errors
/// Whatever the kernel says.
pub fn block_terminal_signals() -> io::Result<()> {
    Ok([Signal::SIGHUP, Signal::SIGTTOU].into_iter().collect::<SigSet>().thread_block()?)
}

/// Has the kernel refuse messages with descriptors to this Unix socket and to what it accepts; unread ones would be closed by
/// whoever closes the socket, and closing a descriptor may block for as long as its maker likes.
///
/// # Errors
/// ENOPROTOOPT before Linux 6.16.
pub fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    /// As in asm-generic/socket.h; libc has no name for it yet.
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

/// Has the current tokio runtime watch a descriptor.
///
/// # Errors
/// Whatever epoll(7) says.
///
/// # Panics
/// Outside of a runtime.
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and the same, for as long as it lives, and the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Moves the calling process into the cgroup whose `cgroup.procs` this is. Async-signal-safe.
///
/// # Errors
/// Whatever cgroups(7) says.
pub fn enter_cgroup(entrance: BorrowedFd<'_>) -> io::Result<()> {
    let own = b"0";
    // SAFETY: the kernel reads one byte.
    match unsafe { libc::write(entrance.as_raw_fd(), own.as_ptr().cast(), own.len()) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the calling process, which has one thread, be a user's alone: real, effective and saved ids, and no supplementary groups.
/// Async-signal-safe.
///
/// # Errors
/// EPERM without CAP_SETUID and CAP_SETGID; EAGAIN where a limit forbids.
pub fn become_user(uid: libc::uid_t, gid: libc::gid_t) -> io::Result<()> {
    // Not by the C library, which would look for the other threads of the process that was forked.
    // SAFETY: the pointer to no groups is null.
    let done = unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives up the calling process' controlling terminal, if it has one. For a process that leads no session this is for
/// good, and without effect on the others of its session. Async-signal-safe.
///
/// # Errors
/// Whatever ioctl_tty(2) says.
pub fn leave_terminal() -> io::Result<()> {
    // SAFETY: the path is a constant that ends in a null byte.
    let fd = unsafe { libc::open(c"/dev/tty".as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Ok(()); // it has none
    }
    // SAFETY: the kernel has just made it, nobody else owns it.
    let terminal = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: no pointers.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCNOTTY) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a process of its own, which the descriptors of other tests do not meet.
    #[test]
    fn both_ways_close_all_descriptors_on_exec() {
        use std::os::unix::process::CommandExt;
        for one_by_one in [false, true] {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "ls /proc/$$/fd"]);
            // SAFETY: async-signal-safe calls only; the descriptor that dup2 makes is closed on exec, as is tested.
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
