//! What a dispatcher may have left behind.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::command::CommandError;
use crate::netns::Netns;

/// The processes in a namespace as `PID NAME`, without zombies.
pub fn processes_in(namespace: &Netns) -> Vec<String> {
    let Ok(wanted) = fs::metadata(format!("/run/netns/{}", namespace.name())) else { return Vec::new() };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok())
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|found| found.ino() == wanted.ino())
        })
        // A process may end between the two reads; then it has no state.
        .filter_map(|pid| (state(pid)? != 'Z').then(|| name(pid)).flatten())
        .collect()
}

/// The processes that run a program.
pub fn processes_of(program: &Path) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)).collect()
}

/// The state of a process as in `ps`: `R`, `S`, `T` (stopped), `Z` (zombie); `None` if it does not
/// exist.
pub fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn name(pid: u32) -> Option<String> {
    Some(format!("{pid} {}", fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim()))
}

/// The XDP program on an interface, as `ip` describes it; `None` if there is none.
///
/// # Errors
/// `ip` is missing, or there is no such interface.
pub fn xdp_program(namespace: &Netns, interface: &str) -> Result<Option<String>, CommandError> {
    let text = namespace.ip(&format!("-details link show dev {interface}"))?;
    Ok(text.lines().map(str::trim).find(|line| line.contains("prog/xdp")).map(str::to_owned))
}
