//! How this process is scheduled, limited and signalled, as it sees itself.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use crate::Outcome;

/// Every attribute that it may have inherited, by name.
pub fn inherited() -> Outcome<BTreeMap<String, String>> {
    let mut traits = BTreeMap::new();
    let mut tell = |name: &str, value: String| traits.insert(name.to_owned(), value);
    let status = fs::read_to_string("/proc/self/status")?;
    for name in
        ["SigBlk", "SigIgn", "Umask", "Cpus_allowed_list", "CapBnd", "CapInh", "CapAmb", "THP_enabled"]
    {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        tell(name, line.unwrap_or_default().trim().to_owned());
    }
    // SAFETY: the calls take no pointers; -1 may be a nice value.
    unsafe {
        tell("policy", libc::sched_getscheduler(0).to_string());
        tell("nice", libc::getpriority(libc::PRIO_PROCESS, 0).to_string());
        tell("ioprio", libc::syscall(libc::SYS_ioprio_get, 1, 0).to_string());
        tell("timer slack", libc::prctl(libc::PR_GET_TIMERSLACK).to_string());
        tell("personality", libc::personality(0xffff_ffff).to_string());
    }
    for name in ["oom_score_adj", "coredump_filter"] {
        tell(name, fs::read_to_string(format!("/proc/self/{name}"))?.trim().to_owned());
    }
    let protected = fs::write("/proc/self/oom_score_adj", "-900");
    tell("protect from OOM", protected.map_or_else(|error| error.kind().to_string(), |()| "done".into()));
    // /proc/keys shows keys of other users to processes that have them in their session keyring.
    let keys = fs::read_to_string("/proc/keys").unwrap_or_default();
    tell("key of the caller", keys.contains("xfan-t-key").to_string());
    for line in fs::read_to_string("/proc/self/limits")?.lines() {
        // The names contain blanks; soft and hard limit are in columns.
        let (Some(name), Some(values)) = (line.get(..25), line.get(25..)) else { continue };
        let values: Vec<_> = values.split_whitespace().take(2).collect();
        tell(name.trim(), values.join(" "));
    }
    Ok(traits)
}

/// The kernel's answers to calls that the sandbox refuses.
pub fn sandbox() -> BTreeMap<String, String> {
    let mut answers = BTreeMap::new();
    let mut tell = |name: &str, result: i64| {
        let answer = if result < 0 {
            let raw = io::Error::last_os_error().raw_os_error().unwrap_or(0);
            format!("{:?}", nix::errno::Errno::from_raw(raw))
        } else {
            "done".to_owned()
        };
        answers.insert(name.to_owned(), answer);
    };
    // SAFETY: the pointers are null or invalid.
    unsafe {
        let call = |number, first: i64| libc::syscall(number, first, 0, 0, 0, 0, 0);
        tell("socket of IPv4", libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into());
        tell("socket of IPv6", libc::socket(libc::AF_INET6, libc::SOCK_DGRAM, 0).into());
        tell("socket of netlink", libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into());
        tell("socket of vsock", libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0).into());
        tell("socket of Unix", libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).into());
        tell("user namespace", call(libc::SYS_unshare, libc::CLONE_NEWUSER.into()));
        tell("clone into a namespace", call(libc::SYS_clone, (libc::CLONE_NEWUSER | libc::SIGCHLD).into()));
        tell("clone3", call(libc::SYS_clone3, 0));
        tell("be traced", call(libc::SYS_ptrace, libc::PTRACE_TRACEME.into()));
        tell("key", call(libc::SYS_add_key, 0));
        tell("keyring", call(libc::SYS_keyctl, libc::KEYCTL_GET_KEYRING_ID.into()));
        tell("another keyring", call(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING.into()));
        tell("userfaultfd", call(libc::SYS_userfaultfd, 1));
        tell("child of the parent", call(libc::SYS_clone, (libc::CLONE_PARENT | libc::SIGCHLD).into()));
        let collapse = libc::MADV_COLLAPSE;
        tell("collapse", libc::madvise(std::ptr::null_mut(), 0, collapse).into());
        tell("collapse by pidfd", libc::syscall(libc::SYS_process_madvise, -1, 0, 0, collapse, 0));
        tell("bpf", call(libc::SYS_bpf, 0));
        tell("perf_event_open", call(libc::SYS_perf_event_open, 0));
        tell("io_uring", call(libc::SYS_io_uring_setup, 0));
    }
    answers
}
