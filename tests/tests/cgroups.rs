//! A worker's cgroup limits it and ends with it, and is removed when the primary ends.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use nix::sys::signal::Signal;
use xfan_tests::balance::assert_balanced;
use xfan_tests::cgroups::{Hierarchy, start_in_cgroups, subfolders, systemd_runs, with_cgroups};
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::proc::{check, daemons, exists, pid_of, read, signal, wait_until};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

#[test]
fn hidden_processes_of_a_worker_die_with_its_cgroup() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    for (disguise, count) in [("none", 1), ("session", 1), ("family", 3), ("comet", 1)] {
        let namespace = network(2);
        let launch = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap().with("-n 2");
        let primary = start_in_cgroups(launch.hostile_worker(&format!("brood {disguise}")).unwrap());
        let report = primary.report();
        let folder = hierarchy.folder(&report, &primary);
        assert_eq!(subfolders(&folder), ["default-0", "default-1"]);
        for folder in [folder.clone(), folder.join("default-0")] {
            let mode = fs::metadata(&folder).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "others cannot open files in it");
        }
        let daemons = daemons(&primary, count);
        // However its processes hide, the cgroup holds more than the worker.
        let inside = || read(folder.join("default-0/cgroup.procs"));
        wait_until(|| inside().lines().count() > 1);
        assert_eq!(read(folder.join("default-1/cgroup.procs")), pid_of(&report, 1).to_string());
        signal(pid_of(&report, 0), Signal::SIGUSR1);
        wait_until(|| subfolders(&folder) == ["default-1"]);
        // The primary reaps them a little later.
        wait_until(|| daemons.iter().all(|&pid| !exists(pid)));
        send_synthetic(&namespace, 6);
        let report = primary.report_after(PACKETS, true);
        assert_eq!(report.groups[0].members[1].committed, PACKETS);
        assert_eq!(primary.stop().0.code, Some(0));
        assert!(!folder.exists());
    }
}

#[test]
fn the_next_primary_removes_cgroups_of_a_killed_one() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().hostile_worker("brood comet").unwrap();
    let primary = start_in_cgroups(launch);
    let folder = hierarchy.folder(&primary.report(), &primary);
    daemons(&primary, 1);
    let home = primary.kill();
    wait_until(|| read(folder.join("default-0/cgroup.events")).contains("populated 1"));
    let launch = Launch::within(&namespace, home).worker("xfan-count", "").unwrap();
    let primary = start_in_cgroups(launch);
    let report = primary.report();
    assert_eq!(hierarchy.folder(&report, &primary), folder);
    wait_until(|| subfolders(&folder).len() == 1);
    let name = subfolders(&folder).remove(0);
    assert_eq!(read(folder.join(name).join("cgroup.procs")), pid_of(&report, 0).to_string());
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0));
    assert!(!folder.exists(), "{exit:#?}");
}

#[test]
fn a_survivor_keeps_its_cgroup_under_the_next_primary() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
    let primary = start_in_cgroups(launch.worker("xfan-count", "").unwrap());
    let before = primary.report();
    let folder = hierarchy.folder(&before, &primary);
    let home = primary.kill();
    let launch = Launch::within(&namespace, home).config("survive = true").unwrap();
    let primary = start_in_cgroups(launch.worker("xfan-count", "").unwrap());
    let report = primary.report();
    assert_eq!(pid_of(&report, 0), pid_of(&before, 0));
    assert_eq!(subfolders(&folder), ["default-0"]);
    assert_eq!(read(folder.join("default-0/cgroup.procs")), pid_of(&report, 0).to_string());
    send_synthetic(&namespace, 6);
    assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0));
    assert!(!folder.exists(), "{exit:#?}");
}

#[test]
fn limits_apply_where_cgroup_controllers_exist() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let available = read(hierarchy.path.join("cgroup.controllers"));
    let has = |controller: &str| available.split_whitespace().any(|word| word == controller);
    eprintln!("controllers: {available:?}");
    let namespace = network(2);
    let start = |way: &str| {
        let settings =
            "restart = 'no'\nworker_memory = '64MiB'\nworker_processes = 20\nworker_cpu_weight = 50";
        let launch = Launch::on(&namespace).unwrap().config(settings).unwrap().with("-n 2");
        start_in_cgroups(launch.hostile_worker(way).unwrap())
    };
    let primary = start("swarm 100");
    let report = primary.report();
    let folder = hierarchy.folder(&report, &primary).join("default-0");
    let confinement = &report.groups[0].confinement;
    for (controller, setting, file, value) in [
        ("memory", "worker_memory", "memory.max", (64 << 20).to_string()),
        ("pids", "worker_processes", "pids.max", "20".to_owned()),
        ("cpu", "worker_cpu_weight", "cpu.weight", "50".to_owned()),
    ] {
        let in_force = confinement.limits.iter().any(|limit| limit == setting);
        assert_eq!(in_force, has(controller), "{setting}: {confinement:?}");
        if in_force {
            assert_eq!(read(folder.join(file)), value);
        }
    }
    if has("pids") {
        signal(pid_of(&report, 0), Signal::SIGUSR1);
        primary.process.wait_for_line("swarm of 19").unwrap();
    }
    assert_eq!(primary.stop().0.code, Some(0));
    let primary = start("glutton 300");
    let report = primary.report();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
    let report = primary.report_when(|report| report.groups[0].members[0].pid == 0);
    let how = report.groups[0].members[0].last_exit.clone().unwrap();
    // Without the memory controller, the limit applies to each process: a failed allocation aborts.
    assert!(
        how.starts_with(if has("memory") { "signal: 9 (SIGKILL)" } else { "signal: 6 (SIGABRT)" }),
        "{how}"
    );
    assert_eq!(report.groups[0].members[1].state, "running");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_primary_uses_a_cgroup_that_is_delegated_to_it() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let unit = hierarchy.path.join(format!("xfan-t-unit-{}", std::process::id()));
    fs::create_dir(&unit).unwrap();
    // This is how systemd sets up a unit with Delegate=yes.
    let available = read(hierarchy.path.join("cgroup.controllers"));
    let has_memory = available.split_whitespace().any(|word| word == "memory");
    if has_memory {
        fs::write(hierarchy.path.join("cgroup.subtree_control"), "+memory +pids").unwrap();
    }
    eprintln!("controllers: {available:?}");
    let entrance = fs::OpenOptions::new().write(true).open(unit.join("cgroup.procs")).unwrap();
    let enter = move || {
        // SAFETY: the kernel reads one byte, which the string has.
        check(unsafe { libc::write(entrance.as_raw_fd(), c"0".as_ptr().cast(), 1) } as i64)
    };
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("worker_memory = '64MiB'").unwrap();
    let launch = launch.worker("xfan-count", "").unwrap();
    let folder = launch.folder().to_owned();
    let primary = launch
        .start_with(|command| {
            with_cgroups(command, &folder);
            // SAFETY: the closure makes one system call.
            unsafe { command.pre_exec(enter) };
        })
        .unwrap();
    let report = primary.report();
    let folder = hierarchy.folder(&report, &primary);
    assert_eq!(folder.parent(), Some(unit.as_path()));
    let (inside, expected) = if has_memory {
        ("primary/cgroup.procs", "worker_memory")
    } else {
        ("../cgroup.procs", "worker_memory (for each process)")
    };
    assert_eq!(read(folder.join(inside)), primary.process.pid().to_string());
    assert!(
        report.groups[0].confinement.limits.iter().any(|limit| limit == expected),
        "{:?}",
        report.groups[0].confinement
    );
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0));
    assert!(subfolders(&unit).is_empty(), "{exit:#?}");
    fs::remove_dir(unit).unwrap();
}
