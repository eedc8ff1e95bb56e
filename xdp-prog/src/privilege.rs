//! Which capabilities the calling thread lacks for loading and attaching an XDP program.

use std::fmt;
use std::fs;

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_PERFMON: u64 = 1 << 38;
const CAP_BPF: u64 = 1 << 39;

/// What is needed, each with the capabilities of which one will do. CAP_PERFMON, since headers have variable
/// length: to others, the verifier forbids packet pointers that a speculating processor might misuse.
const NEEDED: [(&str, u64); 3] = [
    ("CAP_BPF", CAP_BPF | CAP_SYS_ADMIN),
    ("CAP_PERFMON", CAP_PERFMON | CAP_SYS_ADMIN),
    ("CAP_NET_ADMIN", CAP_NET_ADMIN),
];

/// The needed capabilities that a thread lacks. Says, as the end of a sentence, what to do about a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lacking(Vec<&'static str>);

impl Lacking {
    /// Looks at the calling thread's effective capabilities.
    pub(crate) fn of_this_thread() -> Self {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        Self::among(effective.unwrap_or(0))
    }

    fn among(effective: u64) -> Self {
        let lacking = NEEDED.iter().filter(|(_, suffices)| effective & suffices == 0);
        Self(lacking.map(|&(name, _)| name).collect())
    }

    /// Whether it lacks none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str(
                "it has the capabilities, but not in the initial user namespace, or kernel lockdown or a security \
                 module forbids it: run it outside of the container, or allow it there",
            ),
            lacking => write!(
                f,
                "it lacks {}: run it as root or grant CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
                lacking.join(" and ")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        for (effective, expected) in [
            (0, "it lacks CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN:"),
            (CAP_NET_ADMIN, "it lacks CAP_BPF and CAP_PERFMON:"),
            (CAP_NET_ADMIN | CAP_BPF, "it lacks CAP_PERFMON:"),
            (CAP_BPF | CAP_PERFMON, "it lacks CAP_NET_ADMIN:"),
            (CAP_SYS_ADMIN, "it lacks CAP_NET_ADMIN:"),
            (CAP_SYS_ADMIN | CAP_NET_ADMIN, "security module"),
            (CAP_BPF | CAP_PERFMON | CAP_NET_ADMIN, "security module"),
        ] {
            let text = Lacking::among(effective).to_string();
            assert!(text.contains(expected), "{effective:#x}: {text}");
        }
    }
}
