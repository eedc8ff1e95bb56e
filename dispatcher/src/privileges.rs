//! What the primary must be allowed to do.

/// Capabilities, their numbers (capabilities(7)), and what they are for.
const NEEDED: [(&str, u8, &str); 9] = [
    ("CAP_NET_ADMIN", 12, "attach the XDP program"),
    ("CAP_NET_RAW", 13, "make AF_XDP sockets"),
    ("CAP_BPF", 39, "load the XDP program"),
    ("CAP_PERFMON", 38, "have it walk packet headers"),
    ("CAP_SYS_ADMIN", 21, "hand the packet memory to workers"),
    ("CAP_SETUID", 7, "run workers as an unprivileged user"),
    ("CAP_SETGID", 6, "run workers as an unprivileged user"),
    ("CAP_CHOWN", 0, "give workers the control socket"),
    ("CAP_KILL", 5, "end workers of another user"),
];

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
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
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
