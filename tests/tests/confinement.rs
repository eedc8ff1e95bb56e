//! A worker inherits nothing, outlives nobody, and uses up no more than it may; and the primary keeps no right it does not need.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::report::Report;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::veth::{Veth, VethConfig};

const PACKETS: u64 = 600;

fn namespace() -> (Netns, Veth) {
    Veth::in_namespace(&VethConfig::queues(2)).unwrap()
}

fn replay(namespace: &Netns) {
    let frames = traffic::synthetic(60, 600, 6).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_default().trim().to_owned()
}

/// A line of /proc/PID/status.
fn status(pid: impl std::fmt::Display, name: &str) -> String {
    let status = read(format!("/proc/{pid}/status"));
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn pid_of(report: &Report, member: usize) -> u32 {
    report.groups[0].members[member].pid
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// A JSON object of texts that the hostile worker prints.
fn printed(primary: &Primary, part: &str) -> BTreeMap<String, String> {
    serde_json::from_str(&primary.process.wait_for_line(part).unwrap()).unwrap()
}

/// The daemons that the hostile worker announced, once there are as many.
fn daemons(primary: &Primary, count: usize) -> Vec<u32> {
    loop {
        let lines = primary.process.stdout();
        let pids = lines.iter().filter_map(|line| line.strip_prefix("daemon ")?.parse().ok());
        let pids: Vec<u32> = pids.collect();
        if pids.len() >= count {
            return pids;
        }
        std::thread::yield_now();
    }
}

fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// What somebody may have done to the shell that xfan is started from.
fn spoil() -> io::Result<()> {
    // SAFETY: the pointers lead to constants or are null; the calls touch no memory of ours.
    unsafe {
        // For what takes a capability that the caller may lack.
        let adj = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
        libc::write(adj, c"-950".as_ptr().cast(), 4);
        libc::close(adj);
        check(libc::setpriority(libc::PRIO_PROCESS, 0, 7).into())?;
        let priority = libc::sched_param { sched_priority: 1 };
        check(libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority).into())?;
        // The best-effort class, 7.
        check(libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 7))?;
        check(libc::prctl(libc::PR_SET_TIMERSLACK, 1).into())?;
        check(libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0).into())?;
        check(libc::personality(0x004_0000).into())?; // ADDR_NO_RANDOMIZE
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut cpus);
        check(libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus).into())?;
        libc::umask(0o077);
        for ignored in [libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR2, 40] {
            // All zero but the handler, which is SIG_IGN: the kernel's own structure.
            let action: [u64; 4] = [1, 0, 0, 0];
            check(libc::syscall(libc::SYS_rt_sigaction, ignored, action.as_ptr(), 0, 8))?;
        }
        let blocked: u64 = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGCHLD - 1) | 1 << 39;
        check(libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const blocked, 0, 8))?;
        let files = libc::rlimit { rlim_cur: 777, rlim_max: 3000 };
        check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files).into())?;
        let real_time = libc::rlimit { rlim_cur: 20, rlim_max: 20 };
        let _ = libc::setrlimit(libc::RLIMIT_RTPRIO, &raw const real_time);
        let _ = libc::setrlimit(libc::RLIMIT_NICE, &raw const real_time);
        let (kind, name, value) = (c"user".as_ptr(), c"xfan-t-key".as_ptr(), c"secret".as_ptr());
        check(libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, 0))?;
        check(libc::syscall(libc::SYS_add_key, kind, name, value, 6, libc::KEY_SPEC_SESSION_KEYRING))
    }
}

#[test]
fn a_worker_inherits_nothing_of_its_primarys_process() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    let launch = Launch::on(&namespace).unwrap().hostile_worker("traits").unwrap();
    let primary = launch
        .start_with(|command| {
            // SAFETY: async-signal-safe calls only.
            unsafe { command.pre_exec(spoil) };
        })
        .unwrap();
    let mut traits = printed(&primary, "SigIgn");
    let none = "0000000000000000";
    for (name, value) in [
        ("policy", "0"),
        ("nice", "0"),
        ("ioprio", "0"),
        ("timer slack", "50000"),
        ("personality", "0"),
        ("THP_enabled", "1"),
        ("oom_score_adj", "300"),
        ("coredump_filter", "00000031"),
        ("Umask", "0022"),
        // Rust's runtime ignores SIGPIPE, in a worker as in any program.
        ("SigIgn", "0000000000001000"),
        ("CapBnd", none),
        ("CapInh", none),
        ("CapAmb", none),
        ("key of the caller", "false"),
        ("Max open files", "777 3000"),
        ("Max realtime priority", "0 0"),
        ("Max nice priority", "0 0"),
        // It has blocked these itself.
        ("SigBlk", "0000000000004200"),
    ] {
        assert_eq!(traits.remove(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(traits["Cpus_allowed_list"], status("self", "Cpus_allowed_list"));
    // The primary has them: the test would see it.
    let pid = primary.process.pid();
    let ignored = u64::from_str_radix(&status(pid, "SigIgn"), 16).unwrap();
    let spoilt = 1 << (libc::SIGHUP - 1) | 1 << (libc::SIGQUIT - 1) | 1 << (libc::SIGUSR2 - 1) | 1 << 39;
    assert_eq!((status(pid, "Umask").as_str(), ignored & spoilt), ("0077", spoilt));
    assert_eq!(status(pid, "Cpus_allowed_list"), "0");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn the_oom_killer_takes_a_worker_before_the_primary() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    let primary = Launch::on(&namespace).unwrap().worker("xfan-count", "").unwrap().start().unwrap();
    let score = |pid: &dyn std::fmt::Display| read(format!("/proc/{pid}/oom_score_adj"));
    // CAP_SYS_RESOURCE.
    let able = u64::from_str_radix(&status("self", "CapEff"), 16).unwrap() & 1 << 24 != 0;
    let own = if able { "-900".to_owned() } else { score(&"self") };
    eprintln!("CAP_SYS_RESOURCE: {able}");
    assert_eq!(
        (score(&primary.process.pid()), score(&pid_of(&primary.report(), 0))),
        (own, "300".to_owned())
    );
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Has a command run as the user daemon, with all capabilities.
fn as_daemon() -> io::Result<()> {
    // Capabilities survive the change of user only if that is asked for, and execution only as ambient ones.
    // SAFETY: the pointers lead to structures as capget(2) describes them.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
        check(libc::setresgid(1, 1, 1).into())?;
        check(libc::setresuid(1, 1, 1).into())?;
        let (header, mut sets) = ([0x2008_0522u32, 0], [0u32; 6]);
        check(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()))?;
        (sets[0], sets[2], sets[3], sets[5]) = (sets[1], sets[1], sets[4], sets[4]);
        check(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()))?;
        for capability in 0..64 {
            libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0);
        }
    }
    Ok(())
}

#[test]
fn an_unprivileged_primary_has_no_workers_of_its_own_user() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    let start = |user: &str| {
        let launch = Launch::on(&namespace).unwrap().with(user).worker("xfan-count", "").unwrap();
        // The checkout may be closed to others.
        let xfan = launch.within_reach("xfan").unwrap();
        launch.spawn_with(|command| {
            let mut within_reach = namespace.command(xfan);
            within_reach.args(command.get_args()).env_remove("SUDO_UID");
            // SAFETY: async-signal-safe calls only.
            unsafe { within_reach.pre_exec(as_daemon) };
            *command = within_reach;
        })
    };
    let exit = start("--user daemon").unwrap().process.wait();
    assert_eq!(
        (exit.code, exit.stderr.last().unwrap().as_str()),
        (
            Some(2),
            "xfan: workers cannot run as daemon, as whom xfan itself runs: they could write to the packets of all \
             workers. Choose another user with --user, or run xfan as root"
        )
    );
    let exit = start("--user root").unwrap().process.wait();
    let message = exit.stderr.last().unwrap();
    assert!(
        exit.code == Some(2) && message.contains("workers can run as root only if xfan does"),
        "{exit:?}"
    );

    // Another user's are as good as those of a primary of root's.
    let primary = start("--user nobody").unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    let report = primary.report();
    let uid = |pid: &dyn std::fmt::Display| status(pid, "Uid");
    assert_eq!(
        (uid(&primary.process.pid()), uid(&pid_of(&report, 0))),
        ("1\t1\t1\t1".to_owned(), "65534\t65534\t65534\t65534".to_owned())
    );
    signal(pid_of(&report, 0), Signal::SIGKILL);
    primary.report_when(|report| {
        report.groups[0].members[0].restarts == 1 && report.groups[0].members[0].state == "running"
    });
    replay(&namespace);
    assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
    let (exit, home) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(!home.join("xfan.sock").exists());
}

#[test]
fn every_thread_keeps_only_the_capabilities_it_needs() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    let primary =
        Launch::on(&namespace).unwrap().with("-n 2").worker("xfan-count", "").unwrap().start().unwrap();
    let pid = primary.process.pid();
    let threads = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let sets = |task: PathBuf| {
            let task = task.strip_prefix("/proc").unwrap().display().to_string();
            let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| status(&task, set));
            (status(&task, "Name"), sets.map(|set| u64::from_str_radix(&set, 16).unwrap()))
        };
        tasks.map(|task| sets(task.path())).collect::<BTreeMap<_, _>>()
    };
    let capabilities = |bits: &[u32]| bits.iter().fold(0u64, |all, bit| all | 1 << bit);
    // KILL, SETGID, SETUID, NET_ADMIN, SYS_NICE, BPF
    let control = capabilities(&[5, 6, 7, 12, 23, 39]);
    let expected = BTreeMap::from([
        ("xfan".to_owned(), [0, control, control, 0, 0]),
        ("control".to_owned(), [0; 5]),
        ("watch".to_owned(), [0; 5]),
        ("lane-0".to_owned(), [0; 5]),
        ("lane-1".to_owned(), [0; 5]),
    ]);
    assert_eq!(threads(), expected);
    // A worker started with what is left is no other than one started at first.
    let first = primary.report();
    signal(pid_of(&first, 0), Signal::SIGKILL);
    let report = primary.report_when(|report| {
        let member = &report.groups[0].members[0];
        member.state == "running" && member.pid != pid_of(&first, 0)
    });
    for member in [0, 1] {
        let worker = pid_of(&report, member);
        for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(worker, name), "0000000000000000", "{name}");
        }
        assert_eq!(status(worker, "Uid"), "65534\t65534\t65534\t65534");
    }
    replay(&namespace);
    assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
    assert_eq!(threads(), expected);
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Where there are no cgroups: tests run where none are mounted.
#[test]
fn what_a_worker_leaves_behind_ends_without_cgroups() {
    let _watchdog = e2e_or_skip!();
    for (disguise, count, stays) in
        [("none", 1, true), ("session", 1, false), ("family", 3, false), ("comet", 1, false)]
    {
        let (namespace, _veth) = namespace();
        let launch = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap().with("-n 2");
        let way = format!("brood {disguise}");
        let primary = launch.hostile_worker(&way).unwrap().start().unwrap();
        assert_eq!(primary.report().confinement.cgroups, None);
        let daemons = daemons(&primary, count);
        if stays {
            // In the worker's own group, it is the worker's to end, as long as there is one.
            let parent = || status(daemons[0], "PPid");
            wait_until(|| parent() == primary.process.pid().to_string());
            primary.report_when(|report| report.uptime_ns > 1_000_000_000);
            assert!(exists(daemons[0]));
        }
        signal(pid_of(&primary.report(), 0), Signal::SIGUSR1);
        wait_until(|| daemons.iter().all(|&pid| !exists(pid)));
        // Nor is there another of its kind: all that the primary still has is the other worker.
        let own = primary.process.pid();
        let children = || read(format!("/proc/{own}/task/{own}/children"));
        let other = pid_of(&primary.report(), 1).to_string();
        wait_until(|| (0..100).all(|_| children() == other));
        // The other is none the worse for it.
        replay(&namespace);
        let report = primary.report_after(PACKETS, true);
        assert_eq!(report.groups[0].members[1].committed, PACKETS);
        assert_eq!(primary.stop().0.code, Some(0));
    }
}

#[test]
fn nothing_that_workers_started_outlives_the_primary() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    let primary = Launch::on(&namespace).unwrap().hostile_worker("brood none").unwrap().start().unwrap();
    let daemons = daemons(&primary, 1);
    assert_eq!(primary.stop().0.code, Some(0));
    assert!(!exists(daemons[0]));
}

/// Has a primary see a cgroup hierarchy: in its own mount namespace, in its folder.
fn with_cgroups(command: &mut Command, folder: &Path) {
    let point = folder.join("cgroup");
    fs::create_dir_all(&point).unwrap();
    let point = std::ffi::CString::new(point.to_str().unwrap()).unwrap();
    let mount = move || {
        let (kind, none) = (c"cgroup2".as_ptr(), std::ptr::null());
        // SAFETY: the strings end in null bytes; this file system has no options.
        check(unsafe { libc::mount(kind, point.as_ptr(), kind, 0, none) }.into())
    };
    // SAFETY: one system call on a string that was made before.
    unsafe { command.pre_exec(mount) };
}

/// The cgroup hierarchy, mounted nowhere, so that other tests do not see it.
struct Hierarchy {
    /// Through the descriptor of the mount.
    path: PathBuf,
    _mount: OwnedFd,
    /// What primaries of this test have made.
    seen: RefCell<Vec<PathBuf>>,
}

impl Drop for Hierarchy {
    /// A test that fails leaves nothing that forks for ever.
    fn drop(&mut self) {
        for folder in self.seen.take() {
            let _ = fs::write(folder.join("cgroup.kill"), "1");
        }
    }
}

impl Hierarchy {
    fn open() -> Self {
        /// As in linux/mount.h.
        const FSCONFIG_CMD_CREATE: libc::c_int = 6;
        const CLOEXEC: libc::c_int = 1;
        let none = std::ptr::null::<libc::c_char>();
        let fd = |result: i64| {
            check(result).unwrap();
            // SAFETY: the kernel has just made it, nobody else owns it.
            unsafe { OwnedFd::from_raw_fd(i32::try_from(result).unwrap()) }
        };
        // SAFETY: the strings end in null bytes or are null, as fsconfig(2) has it for this command.
        let mount = unsafe {
            let system = fd(libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), CLOEXEC));
            let raw = system.as_raw_fd();
            check(libc::syscall(libc::SYS_fsconfig, raw, FSCONFIG_CMD_CREATE, none, none, 0)).unwrap();
            fd(libc::syscall(libc::SYS_fsmount, raw, CLOEXEC, 0))
        };
        Hierarchy {
            path: format!("/proc/self/fd/{}", mount.as_raw_fd()).into(),
            _mount: mount,
            seen: RefCell::default(),
        }
    }

    /// Where a primary has its workers' cgroups, of which it knows the path where it sees them.
    fn folder(&self, report: &Report, primary: &Primary) -> PathBuf {
        let seen = PathBuf::from(report.confinement.cgroups.clone().expect("there are cgroups"));
        let folder = self.path.join(seen.strip_prefix(primary.folder().join("cgroup")).unwrap());
        self.seen.borrow_mut().push(folder.clone());
        folder
    }
}

/// Where systemd runs, it has to delegate a cgroup first.
fn systemd_runs() -> bool {
    let runs = Path::new("/run/systemd/system").exists();
    if runs {
        eprintln!("not checked: systemd has not delegated the cgroup of this test");
    }
    runs
}

fn start_in_cgroups(launch: Launch<'_>) -> Primary {
    let folder = launch.folder().to_owned();
    launch.start_with(|command| with_cgroups(command, &folder)).unwrap()
}

fn subfolders(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_workers_cgroup_ends_with_it_however_its_processes_hide() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    for (disguise, count) in [("none", 1), ("session", 1), ("family", 3), ("comet", 1)] {
        let (namespace, _veth) = namespace();
        let launch = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap().with("-n 2");
        let primary = start_in_cgroups(launch.hostile_worker(&format!("brood {disguise}")).unwrap());
        let report = primary.report();
        let folder = hierarchy.folder(&report, &primary);
        assert_eq!(subfolders(&folder), ["default-0", "default-1"]);
        let daemons = daemons(&primary, count);
        // Whoever it is that it is now, there is more than the worker.
        let inside = || read(folder.join("default-0/cgroup.procs"));
        wait_until(|| inside().lines().count() > 1);
        assert_eq!(read(folder.join("default-1/cgroup.procs")), pid_of(&report, 1).to_string());
        signal(pid_of(&report, 0), Signal::SIGUSR1);
        wait_until(|| subfolders(&folder) == ["default-1"]);
        assert!(daemons.iter().all(|&pid| !exists(pid)));
        replay(&namespace);
        let report = primary.report_after(PACKETS, true);
        assert_eq!(report.groups[0].members[1].committed, PACKETS);
        assert_eq!(primary.stop().0.code, Some(0));
        assert!(!folder.exists());
    }
}

#[test]
fn the_next_primary_clears_the_cgroups_of_one_that_was_killed() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let (namespace, _veth) = namespace();
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
    let (namespace, _veth) = namespace();
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
    replay(&namespace);
    assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0));
    assert!(!folder.exists(), "{exit:#?}");
}

#[test]
fn limits_are_enforced_where_the_controllers_are() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let available = read(hierarchy.path.join("cgroup.controllers"));
    let has = |controller: &str| available.split_whitespace().any(|word| word == controller);
    eprintln!("controllers: {available:?}");
    let (namespace, _veth) = namespace();
    let start = |way: &str| {
        let settings =
            "restart = 'no'\nworker_memory = '64MiB'\nworker_processes = 20\nworker_cpu_weight = 50";
        let launch = Launch::on(&namespace).unwrap().config(settings).unwrap().with("-n 2");
        start_in_cgroups(launch.hostile_worker(way).unwrap())
    };
    let primary = start("swarm 100");
    let report = primary.report();
    let folder = hierarchy.folder(&report, &primary).join("default-0");
    let confinement = &report.confinement;
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
    // The controller's OOM killer; or, by the limit of each process, the end of a program that gets no memory.
    assert!(
        how.starts_with(if has("memory") { "signal: 9 (SIGKILL)" } else { "signal: 6 (SIGABRT)" }),
        "{how}"
    );
    assert_eq!(report.groups[0].members[1].state, "running");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_primary_makes_room_in_a_cgroup_that_is_its_own() {
    let _watchdog = e2e_or_skip!();
    if systemd_runs() {
        return;
    }
    let hierarchy = Hierarchy::open();
    let unit = hierarchy.path.join(format!("xfan-t-unit-{}", std::process::id()));
    fs::create_dir(&unit).unwrap();
    // As systemd would give it to a unit with Delegate=yes.
    let available = read(hierarchy.path.join("cgroup.controllers"));
    let has_memory = available.split_whitespace().any(|word| word == "memory");
    if has_memory {
        fs::write(hierarchy.path.join("cgroup.subtree_control"), "+memory +pids").unwrap();
    }
    eprintln!("controllers: {available:?}");
    let entrance = fs::OpenOptions::new().write(true).open(unit.join("cgroup.procs")).unwrap();
    let enter = move || {
        // SAFETY: the kernel reads one byte.
        check(unsafe { libc::write(entrance.as_raw_fd(), c"0".as_ptr().cast(), 1) } as i64)
    };
    let (namespace, _veth) = namespace();
    let launch = Launch::on(&namespace).unwrap().config("worker_memory = '64MiB'").unwrap();
    let launch = launch.worker("xfan-count", "").unwrap();
    let folder = launch.folder().to_owned();
    let primary = launch
        .start_with(|command| {
            with_cgroups(command, &folder);
            // SAFETY: one system call.
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
    assert!(report.confinement.limits.iter().any(|limit| limit == expected), "{:?}", report.confinement);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0));
    assert!(subfolders(&unit).is_empty(), "{exit:#?}");
    fs::remove_dir(unit).unwrap();
}

#[test]
fn system_calls_that_nobody_needs_are_refused_to_the_primary_and_workers() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    let start = |sandbox: &str| {
        let launch = Launch::on(&namespace).unwrap().config(&format!("worker_sandbox = {sandbox}")).unwrap();
        launch.hostile_worker("sandbox").unwrap().start().unwrap()
    };
    for sandbox in [false, true] {
        let primary = start(&sandbox.to_string());
        let report = primary.report();
        assert_eq!(report.confinement.sandbox, sandbox);
        for task in fs::read_dir(format!("/proc/{}/task", primary.process.pid())).unwrap().flatten() {
            let task = task.path().strip_prefix("/proc").unwrap().display().to_string();
            assert_eq!((status(&task, "Seccomp"), status(&task, "NoNewPrivs")), ("2".into(), "1".into()));
        }
        let mut answers = printed(&primary, "socket of IPv4");
        for (name, answer) in [
            ("user namespace", "EPERM"),
            ("clone into a namespace", "EPERM"),
            ("clone3", "ENOSYS"),
            ("be traced", "EPERM"),
            ("key", "EPERM"),
            ("keyring", "EPERM"),
            ("userfaultfd", "EPERM"),
            ("socket of Unix", "done"),
        ] {
            assert_eq!(answers.remove(name).as_deref(), Some(answer), "{name}");
        }
        let of_sandbox = |name: &str| (answers[name] == "EPERM", name.to_owned());
        let names = ["socket of IPv4", "socket of IPv6", "socket of netlink", "another keyring"];
        assert_eq!(names.map(of_sandbox), names.map(|name| (sandbox, name.to_owned())));
        if sandbox {
            for name in ["socket of vsock", "bpf", "perf_event_open", "io_uring"] {
                assert_eq!(answers[name], "EPERM", "{name}");
            }
        }
        assert_eq!(primary.stop().0.code, Some(0));
    }
}

#[test]
fn bundled_workers_run_in_the_sandbox() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = namespace();
    for (program, arguments) in [("xfan-count", ""), ("xfan-flow", "--output FOLDER/flows-{member}.json")] {
        let launch = Launch::on(&namespace).unwrap().config("worker_sandbox = true").unwrap().with("-n 2");
        let primary = launch.worker(program, arguments).unwrap().start().unwrap();
        for member in [0, 1] {
            // The primary's two, and its own.
            assert_eq!(status(pid_of(&primary.report(), member), "Seccomp_filters"), "3");
        }
        replay(&namespace);
        let report = primary.report_after(PACKETS, true);
        assert_balanced(&report, PACKETS);
        assert_eq!(report.totals(), (PACKETS, PACKETS, 0));
        assert_eq!(primary.stop().0.code, Some(0));
    }
}
