//! What the primary must be allowed to do at the start, and what each of its threads, and each worker, keeps of that.

#![allow(unsafe_code, reason = "prctl(2), capget(2) and capset(2)")]

use std::io;

use crate::host::sys::bits_of_status;

/// Capabilities, their numbers (capabilities(7)), and what they are for.
const NEEDED: [(&str, u8, &str); 10] = [
    ("CAP_NET_ADMIN", 12, "attach the XDP program"),
    ("CAP_NET_RAW", 13, "make AF_XDP sockets"),
    ("CAP_BPF", 39, "load the XDP program"),
    ("CAP_PERFMON", 38, "have it walk packet headers"),
    ("CAP_SYS_ADMIN", 21, "hand the packet memory to workers"),
    ("CAP_SETUID", 7, "run workers as an unprivileged user"),
    ("CAP_SETGID", 6, "run workers as an unprivileged user"),
    ("CAP_CHOWN", 0, "give workers the control socket"),
    ("CAP_KILL", 5, "end workers of another user"),
    ("CAP_SETPCAP", 8, "give up capabilities"),
];

const CAP_DAC_OVERRIDE: u8 = 1;
const CAP_KILL: u8 = 5;
const CAP_SETGID: u8 = 6;
const CAP_SETUID: u8 = 7;
const CAP_NET_ADMIN: u8 = 12;
const CAP_SYS_NICE: u8 = 23;
const CAP_BPF: u8 = 39;

/// What the control thread still does once packets come: detach the XDP program and restore offloads; change the map of
/// sockets; start workers again, as another user and with the normal priority; end workers.
const OF_CONTROL: [u8; 6] = [CAP_NET_ADMIN, CAP_BPF, CAP_SETUID, CAP_SETGID, CAP_SYS_NICE, CAP_KILL];

/// The highest number that a capability can have.
const LAST: u8 = 63;

/// No capabilities.
pub const NONE: u64 = 0;

/// What the thread of the control socket keeps: to send a report that is larger than a socket's
/// usual buffer (`SO_SNDBUFFORCE`).
pub const OF_SOCKET: u64 = 1 << CAP_NET_ADMIN;

/// The capabilities that the control thread keeps once packets come. With `overriding` also the one that root needs to remove
/// something from a folder that is another user's, or closed to writing, as the root of the cgroups is.
pub fn of_control(overriding: bool) -> u64 {
    let all = OF_CONTROL.iter().chain(overriding.then_some(&CAP_DAC_OVERRIDE));
    all.fold(NONE, |all, bit| all | 1 << bit)
}

/// Empties the bounding set of the calling thread, so that no program it executes gains a capability. Async-signal-safe.
///
/// # Errors
/// EPERM without CAP_SETPCAP, unless the set is empty already.
pub fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..=LAST {
        let capability = libc::c_ulong::from(capability);
        // SAFETY: no pointers. The answer is negative where there is no such capability.
        if unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) } > 0
            // SAFETY: no pointers.
            && unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Has the calling thread give up all capabilities but those in `kept` that it has, for good. Async-signal-safe.
///
/// # Errors
/// Whatever capset(2) says.
pub fn keep_capabilities(kept: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`: two times effective, permitted, inheritable.
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut sets = [0u32; 6];
    // SAFETY: both pointers lead to structures as capget(2) describes them.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [low, high] = [kept, kept >> 32].map(|bits| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0));
    let permitted = [sets[1] & low, sets[4] & high];
    sets = [permitted[0], permitted[0], 0, permitted[1], permitted[1], 0];
    // SAFETY: both pointers lead to structures as capset(2) describes them.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointers.
    if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has the calling thread, which is not to start programs or touch the interface, give up all
/// capabilities. Without `CAP_SETPCAP` the bounding set stays; [`check_privileges`] refuses that.
pub fn drop_all_capabilities() {
    drop_capabilities_but(NONE);
}

/// As [`drop_all_capabilities`], but for those in `kept`.
pub fn drop_capabilities_but(kept: u64) {
    let bounding = empty_bounding_set().or_else(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Ok(()),
        _ => Err(error),
    });
    if let Err(error) = keep_capabilities(kept).and(bounding) {
        tracing::warn!("a thread cannot give up its capabilities: {error}");
    }
}

/// The primary may not do what it has to.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("xfan run lacks {}: start it with sudo", list(.0))]
pub struct PrivilegeError(Vec<(&'static str, &'static str)>);

fn list(missing: &[(&str, &str)]) -> String {
    let each: Vec<_> = missing.iter().map(|(name, purpose)| format!("{name} (to {purpose})")).collect();
    each.join(", ")
}

/// Checks the effective capabilities of this process.
///
/// # Errors
/// [`PrivilegeError`] names each one missing and what it is for.
pub fn check_privileges() -> Result<(), PrivilegeError> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing(effective(&status))
}

/// The effective set, as bits.
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
