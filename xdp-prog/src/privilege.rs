//! The capabilities for loading and attaching an XDP program that the calling thread lacks.

use std::fmt;
use std::fs;

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_PERFMON: u64 = 1 << 38;
const CAP_BPF: u64 = 1 << 39;

/// The required capabilities, each with those of which one suffices. CAP_PERFMON is required
/// because headers have variable lengths: without it, the verifier refuses packet pointers that a
/// processor could misuse speculatively.
const NEEDED: [(&str, u64); 3] = [
    ("CAP_BPF", CAP_BPF | CAP_SYS_ADMIN),
    ("CAP_PERFMON", CAP_PERFMON | CAP_SYS_ADMIN),
    ("CAP_NET_ADMIN", CAP_NET_ADMIN),
];

/// The required capabilities that a thread lacks. Displays as the end of a sentence that says what
/// to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lacking(Vec<&'static str>);

impl Lacking {
    /// Reads the effective capabilities of the calling thread.
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

    /// Whether the thread has all required capabilities.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str(
                "it has the capabilities, but not in the initial user namespace, or kernel lockdown or a security \
                 module forbids it: run it outside of the container, or grant the permission there",
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
    fn the_text_names_missing_capabilities() {
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
