//! Confines the workers and the primary, and ends descendants that workers leave behind.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::control::groups::Workers;
use crate::control::primary::Primary;
use crate::host::privileges::{empty_bounding_set, keep_capabilities, of_control};
use crate::process::cgroup::Cgroups;
use crate::process::inherit::Rlimits;
use crate::process::orphans;
use crate::process::spawn::WorkerCommand;
use crate::report::Confinement;

impl Workers {
    /// Prepares to start workers with this command, and logs how they are confined.
    pub(super) fn new(command: WorkerCommand, cgroups: &Result<Cgroups, String>) -> Self {
        let limits = &command.limits;
        let data = limits.memory.filter(|_| !cgroups.as_ref().is_ok_and(Cgroups::limits_memory));
        let (mut have, mut lack) = match cgroups {
            Ok(cgroups) => cgroups.in_force(limits),
            Err(_) => (vec![], vec!["worker_processes"]),
        };
        if cgroups.is_err() && limits.cpu_weight != 100 {
            lack.push("worker_cpu_weight");
        }
        if data.is_some() {
            // The limit applies to each process of a worker, not to all together.
            lack.retain(|name| *name != "worker_memory");
            have.push("worker_memory (for each process)");
        }
        let names = |list: &[&str]| if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        let (in_force, not_enforced) = (names(&have), names(&lack));
        let sandbox = command.sandbox.is_some();
        let advice = if lack.is_empty() {
            ""
        } else {
            "; to have all, run xfan alone in a cgroup v2 that is delegated to it (systemd: Delegate=yes)"
        };
        match cgroups {
            Ok(cgroups) => tracing::info!(
                cgroups = %cgroups.folder().display(), in_force, not_enforced, sandbox,
                "workers are confined{advice}"
            ),
            Err(why_not) => tracing::info!(
                in_force,
                not_enforced,
                sandbox,
                "workers have no cgroups, since {why_not}: descendants that outlive them are killed one by one{advice}"
            ),
        }
        let owned = |list: Vec<&str>| list.into_iter().map(str::to_owned).collect();
        let confinement = Confinement {
            cgroups: cgroups.as_ref().ok().map(|cgroups| cgroups.folder().display().to_string()),
            limits: owned(have),
            not_enforced: owned(lack),
            sandbox,
        };
        Workers { command, rlimits: Rlimits::new(data), confinement }
    }
}

impl Primary {
    /// Reaps orphans, ends those of workers, and removes empty cgroups. Returns whether nothing is
    /// left.
    pub(super) fn reap_orphans(&mut self) -> bool {
        let swept = self.cgroups.as_ref().is_none_or(Cgroups::sweep);
        if !orphans::is_subreaper() {
            return swept;
        }
        let workers: HashSet<u32> = self.processes.values().map(|child| child.process.pid()).collect();
        // With cgroups, orphans end with the cgroup of their worker.
        let left =
            if self.cgroups.is_some() { orphans::reap(&workers).len() } else { orphans::kill_all(&workers) };
        swept && left == 0
    }

    /// Drops the capabilities that only the start needs.
    pub(super) fn drop_startup_capabilities(&self, socket: &Path) {
        if self.ports.iter().all(|port| port.port.is_none()) {
            return; // The source of packets is memory: this process does not belong to the primary alone.
        }
        let own = nix::unistd::geteuid().as_raw();
        // The directories from which the primary removes files at the end: the socket and the
        // cgroups.
        let mut folders =
            [socket, self.cgroups.as_ref().map_or(socket, Cgroups::folder)].into_iter().map(Path::parent);
        let may_write = |folder: &Path| {
            std::fs::metadata(folder).is_ok_and(|folder| folder.uid() == own && folder.mode() & 0o200 != 0)
        };
        let needs_override = !folders.all(|folder| folder.is_none_or(may_write));
        if let Err(error) = empty_bounding_set().and_then(|()| keep_capabilities(of_control(needs_override)))
        {
            tracing::warn!("xfan cannot give up its capabilities: {error}");
        }
    }
}
