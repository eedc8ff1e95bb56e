//! Changes a running primary's kernel objects through copies of its descriptors, as other tools
//! might.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::unistd::Pid;

/// `bpf(2)` commands, as in linux/bpf.h.
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Copies a process's descriptors of one kind: those whose link in `/proc/PID/fd` begins with
/// `link` and whose `fdinfo` contains `info`.
///
/// # Panics
/// The process is gone, or the caller is not root.
fn copies(pid: Pid, link: &str, info: &str) -> Vec<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let pidfd = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) });
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("the process exists").flatten() {
        let number: libc::c_int = entry.file_name().to_string_lossy().parse().expect("a number");
        let is_kind =
            fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with(link));
        let says = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        if is_kind && says.contains(info) {
            // SAFETY: the call takes no pointers.
            found.push(owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) }));
        }
    }
    found
}

fn owned(result: libc::c_long) -> OwnedFd {
    let fd = libc::c_int::try_from(result).expect("a descriptor is an int");
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has just made the descriptor, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn bpf<T>(command: libc::c_int, mut attributes: T) {
    // SAFETY: both callers pass the attributes that their command reads, with their size.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attributes, size_of_val(&attributes)) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Detaches a primary's XDP program, as `bpftool link detach` does.
///
/// # Panics
/// The primary has no program attached.
pub fn detach_program(primary: Pid) {
    let links = copies(primary, "anon_inode:bpf_link", "");
    assert_eq!(links.len(), 1);
    bpf(BPF_LINK_DETACH, [links[0].as_raw_fd(), 0]);
}

/// Copies a primary's AF_XDP sockets.
///
/// # Panics
/// The primary is gone, or the caller is not root.
pub fn sockets(primary: Pid) -> Vec<OwnedFd> {
    let domain = |socket: &OwnedFd| {
        let mut domain: libc::c_int = 0;
        let mut length = libc::socklen_t::try_from(size_of_val(&domain)).expect("a socket length fits");
        // SAFETY: the kernel writes at most `length` bytes to `domain`.
        unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_DOMAIN,
                (&raw mut domain).cast(),
                &raw mut length,
            )
        };
        domain
    };
    let mut sockets = copies(primary, "socket:", "");
    sockets.retain(|socket| domain(socket) == libc::AF_XDP);
    sockets
}

/// Makes a primary's XDP program redirect the packets of `queue` to this socket.
///
/// # Panics
/// The primary has no XSKMAP, or the kernel refuses.
pub fn redirect_to(primary: Pid, queue: u32, socket: &impl AsRawFd) {
    #[repr(C)]
    struct Update {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let maps = copies(primary, "anon_inode:bpf-map", "map_type:\t17\n");
    assert!(!maps.is_empty());
    let (key, value) = (queue, socket.as_raw_fd());
    let address = |at: *const u8| at.addr() as u64;
    bpf(
        BPF_MAP_UPDATE_ELEM,
        Update {
            map: u64::from(maps[0].as_raw_fd().cast_unsigned()),
            key: address((&raw const key).cast()),
            value: address((&raw const value).cast()),
            flags: 0,
        },
    );
}
