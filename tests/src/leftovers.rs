//! What a dispatcher may have left behind.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::command::CommandError;
use crate::netns::Netns;

/// The processes that live in a namespace, as `PID NAME`. Nobody's: those of the dead that wait to be buried.
pub fn processes_in(namespace: &Netns) -> Vec<String> {
    let Ok(wanted) = fs::metadata(format!("/run/netns/{}", namespace.name())) else { return Vec::new() };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok())
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|found| found.ino() == wanted.ino())
        })
        // It may end between two looks; without a state it has.
        .filter_map(|pid| (state(pid)? != 'Z').then(|| name(pid)).flatten())
        .collect()
}

/// The state of a process as in `ps`: `R`, `S`, `T` (stopped), `Z` (dead, not buried). `None`: there is no such process.
pub fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn name(pid: u32) -> Option<String> {
    Some(format!("{pid} {}", fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim()))
}

/// The XDP program on an interface, as `ip` describes it; `None`: there is none.
///
/// # Errors
/// `ip` is missing, or there is no such interface.
pub fn xdp_program(namespace: &Netns, interface: &str) -> Result<Option<String>, CommandError> {
    let text = namespace.ip(&format!("-details link show dev {interface}"))?;
    Ok(text.lines().map(str::trim).find(|line| line.contains("prog/xdp")).map(str::to_owned))
}
