//! Capabilities: which ones the primary needs to start, and which ones its threads and workers
//! keep.

#![allow(unsafe_code, reason = "prctl(2), capget(2) and capset(2)")]

use std::io;

use crate::host::sys::bits_of_status;

// The numbers of capabilities: capabilities(7), linux/capability.h.
const CAP_CHOWN: u8 = 0;
const CAP_DAC_OVERRIDE: u8 = 1;
const CAP_KILL: u8 = 5;
const CAP_SETGID: u8 = 6;
const CAP_SETUID: u8 = 7;
const CAP_SETPCAP: u8 = 8;
const CAP_NET_ADMIN: u8 = 12;
const CAP_NET_RAW: u8 = 13;
const CAP_IPC_LOCK: u8 = 14;
const CAP_SYS_ADMIN: u8 = 21;
const CAP_SYS_NICE: u8 = 23;
const CAP_SYS_RESOURCE: u8 = 24;
const CAP_PERFMON: u8 = 38;
const CAP_BPF: u8 = 39;

/// The capabilities that a primary needs to start: name, number and purpose.
const NEEDED: [(&str, u8, &str); 10] = [
    ("CAP_NET_ADMIN", CAP_NET_ADMIN, "attach the XDP program"),
    ("CAP_NET_RAW", CAP_NET_RAW, "make AF_XDP sockets"),
    ("CAP_BPF", CAP_BPF, "load the XDP program"),
    ("CAP_PERFMON", CAP_PERFMON, "let the XDP program parse headers"),
    ("CAP_SYS_ADMIN", CAP_SYS_ADMIN, "share packet memory with workers"),
    ("CAP_SETUID", CAP_SETUID, "run workers as an unprivileged user"),
    ("CAP_SETGID", CAP_SETGID, "run workers as an unprivileged user"),
    ("CAP_CHOWN", CAP_CHOWN, "let workers use the control socket"),
    ("CAP_KILL", CAP_KILL, "stop workers of another user"),
    ("CAP_SETPCAP", CAP_SETPCAP, "drop capabilities"),
];

/// The capabilities that the control thread keeps while packets arrive. It detaches the XDP program
/// and restores offloads, changes the map of sockets, starts workers again as another user and with
/// normal priority, and stops workers. With these, if they were granted: CAP_SYS_RESOURCE raises
/// the minimum of their `oom_score_adj`, which they would inherit from the primary, and
/// CAP_IPC_LOCK locks the segments of workers that attach later.
const OF_CONTROL: [u8; 8] =
    [CAP_NET_ADMIN, CAP_BPF, CAP_SETUID, CAP_SETGID, CAP_SYS_NICE, CAP_SYS_RESOURCE, CAP_IPC_LOCK, CAP_KILL];

/// The highest number that a capability can have: the sets have 64 bits.
const LAST: u8 = 63;

/// The empty set of capabilities.
pub const NONE: u64 = 0;

/// The set that the thread of the control socket keeps. `SO_SNDBUFFORCE` needs it, for reports that
/// are larger than the default send buffer.
pub const OF_SOCKET: u64 = 1 << CAP_NET_ADMIN;

/// The set that the control thread keeps while packets arrive. `overriding` adds
/// CAP_DAC_OVERRIDE: without it, root cannot remove entries of a directory that belongs to another
/// user or is not writable, such as the root of the cgroup hierarchy.
pub fn of_control(overriding: bool) -> u64 {
    let all = OF_CONTROL.iter().chain(overriding.then_some(&CAP_DAC_OVERRIDE));
    all.fold(NONE, |all, bit| all | 1 << bit)
}

/// Empties the bounding set of the calling thread, so that no program that it executes can gain a
/// capability. Async-signal-safe.
///
/// # Errors
/// EPERM without CAP_SETPCAP, unless the set is already empty.
pub fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..=LAST {
        let capability = libc::c_ulong::from(capability);
        // SAFETY: no pointers. The result is negative if the capability does not exist.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) } > 0
            // SAFETY: no pointers.
            && unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Drops all capabilities of the calling thread except those in `kept`, permanently.
/// Async-signal-safe.
///
/// # Errors
/// The errors of capget(2), capset(2) and prctl(2).
pub fn keep_capabilities(kept: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`: effective, permitted, inheritable for the lower 32 bits, then
    /// the same for the upper 32 bits.
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut sets = [0u32; 6];
    // SAFETY: both pointers point to structures with the layout that capget(2) describes.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [low, high] = [kept, kept >> 32].map(|bits| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0));
    let permitted = [sets[1] & low, sets[4] & high];
    sets = [permitted[0], permitted[0], 0, permitted[1], permitted[1], 0];
    // SAFETY: both pointers point to structures with the layout that capset(2) describes.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Drops all capabilities of the calling thread. For threads that neither start programs nor change
/// the interface.
///
/// Without CAP_SETPCAP the bounding set stays as it is; [`check_privileges`] refuses to start so.
pub fn drop_all_capabilities() {
    drop_capabilities_but(NONE);
}

/// Like [`drop_all_capabilities`], but keeps the capabilities in `kept`.
pub fn drop_capabilities_but(kept: u64) {
    let bounding = empty_bounding_set().or_else(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Ok(()),
        _ => Err(error),
    });
    if let Err(error) = keep_capabilities(kept).and(bounding) {
        tracing::warn!("a thread could not drop its capabilities: {error}");
    }
}

/// Capabilities are missing that a primary needs to start.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("xfan run lacks {}: start it with sudo", list(.0))]
pub struct PrivilegeError(Vec<(&'static str, &'static str)>);

fn list(missing: &[(&str, &str)]) -> String {
    let each: Vec<_> = missing.iter().map(|(name, purpose)| format!("{name} (to {purpose})")).collect();
    each.join(", ")
}

/// Checks that this process has the capabilities that a primary needs to start.
///
/// # Errors
/// [`PrivilegeError`] names each missing capability and its purpose.
pub fn check_privileges() -> Result<(), PrivilegeError> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing(effective(&status))
}

/// The effective set in the text of /proc/PID/status.
fn effective(status: &str) -> u64 {
    bits_of_status(status, "CapEff:")
}

fn missing(effective: u64) -> Result<(), PrivilegeError> {
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(_, bit, _)| effective & 1 << bit == 0)
        .map(|(name, _, purpose)| (*name, *purpose))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(PrivilegeError(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_capability_is_named() {
        assert_eq!(effective("Name:\txfan\nCapEff:\t000001ffffffffff\n"), 0x1ff_ffff_ffff);
        assert_eq!(missing(u64::MAX), Ok(()));
        let error = missing(!(1 << 13)).unwrap_err().to_string();
        assert_eq!(error, "xfan run lacks CAP_NET_RAW (to make AF_XDP sockets): start it with sudo");
        assert_eq!(missing(0).unwrap_err().0.len(), NEEDED.len());
    }
}
