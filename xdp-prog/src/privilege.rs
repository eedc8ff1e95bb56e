//! Which capabilities the calling thread lacks for loading and attaching an XDP program.

use std::fmt;
use std::fs;

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_BPF: u64 = 1 << 39;

/// Says, to the end of a sentence, what to do about the kernel's refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lacking {
    effective: u64,
}

impl Lacking {
    /// Looks at the calling thread's effective capabilities.
    pub(crate) fn of_this_thread() -> Self {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        Self { effective: effective.unwrap_or(0) }
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has = |capabilities| self.effective & capabilities != 0;
        // CAP_SYS_ADMIN stands in for CAP_BPF, but nothing for CAP_NET_ADMIN.
        let lacks = match (has(CAP_BPF | CAP_SYS_ADMIN), has(CAP_NET_ADMIN)) {
            (false, false) => "this process lacks CAP_BPF (or CAP_SYS_ADMIN) and CAP_NET_ADMIN",
            (false, true) => "this process lacks CAP_BPF (or CAP_SYS_ADMIN)",
            (true, false) => "this process lacks CAP_NET_ADMIN",
            (true, true) => {
                return f.write_str(
                    "this process has CAP_BPF or CAP_SYS_ADMIN, and CAP_NET_ADMIN, but not in the initial user \
                     namespace, or kernel lockdown or a security module forbids it: run it outside of the \
                     container or allow it there",
                );
            }
        };
        write!(f, "{lacks}: run it as root or grant them")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        for (effective, expected) in [
            (0, "lacks CAP_BPF (or CAP_SYS_ADMIN) and CAP_NET_ADMIN:"),
            (CAP_NET_ADMIN, "lacks CAP_BPF (or CAP_SYS_ADMIN):"),
            (CAP_BPF, "lacks CAP_NET_ADMIN:"),
            (CAP_SYS_ADMIN, "lacks CAP_NET_ADMIN:"),
            (CAP_BPF | CAP_NET_ADMIN, "security module"),
        ] {
            let text = Lacking { effective }.to_string();
            assert!(text.contains(expected), "{effective:#x}: {text}");
        }
    }
}
