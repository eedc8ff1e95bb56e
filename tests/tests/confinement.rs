//! A worker inherits no attribute of the primary, leaves no process behind and stays within its
//! limits. The primary keeps no privilege that it does not need.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use nix::unistd::{Pid, getsid};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::{check, daemons, exists, pid_of, read, signal, status, wait_until};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;

/// Returns a JSON object of strings that the hostile worker prints.
fn printed(primary: &Primary, part: &str) -> BTreeMap<String, String> {
    serde_json::from_str(&primary.printed(part)).unwrap()
}

/// Changes every attribute that a process inherits, as the shell that starts xfan may have done.
fn spoil() -> io::Result<()> {
    // SAFETY: the pointers lead to constants or are null; the calls do not touch this process's
    // memory.
    unsafe {
        // The results of these calls are ignored: the caller may lack the capability.
        let adj = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
        libc::write(adj, c"-950".as_ptr().cast(), 4);
        libc::close(adj);
        check(libc::setpriority(libc::PRIO_PROCESS, 0, 7).into())?;
        let priority = libc::sched_param { sched_priority: 1 };
        check(libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority).into())?;
        // The best-effort class, level 7.
        check(libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 7))?;
        check(libc::prctl(libc::PR_SET_TIMERSLACK, 1).into())?;
        check(libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0).into())?;
        check(libc::personality(0x004_0000).into())?; // ADDR_NO_RANDOMIZE
        let mut cpus: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut cpus);
        check(libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus).into())?;
        libc::umask(0o077);
        for ignored in [libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR2, 40] {
            // The kernel's own structure: all fields are zero but the handler, which is SIG_IGN.
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
fn a_worker_inherits_no_process_attributes() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().hostile_worker("traits").unwrap();
    let primary = launch
        .start_with(|command| {
            // SAFETY: `spoil` makes async-signal-safe calls only.
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
        ("protect from OOM", "permission denied"),
        ("coredump_filter", "00000031"),
        ("Umask", "0022"),
        // Rust's runtime ignores SIGPIPE in every program.
        ("SigIgn", "0000000000001000"),
        ("CapBnd", none),
        ("CapInh", none),
        ("CapAmb", none),
        ("key of the caller", "false"),
        ("Max open files", "777 3000"),
        ("Max realtime priority", "0 0"),
        ("Max nice priority", "0 0"),
        // The worker itself has blocked these.
        ("SigBlk", "0000000000004200"),
    ] {
        assert_eq!(traits.remove(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(traits["Cpus_allowed_list"], status("self", "Cpus_allowed_list"));
    // The primary has them all except SIGHUP, which it handles: the test would notice otherwise.
    let pid = primary.process.pid();
    let ignored = u64::from_str_radix(&status(pid, "SigIgn"), 16).unwrap();
    let spoilt = 1 << (libc::SIGQUIT - 1) | 1 << (libc::SIGUSR2 - 1) | 1 << 39;
    assert_eq!((status(pid, "Umask").as_str(), ignored & spoilt), ("0077", spoilt));
    assert_eq!(status(pid, "Cpus_allowed_list"), "0");
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn the_oom_killer_takes_a_worker_before_the_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = Launch::on(&namespace).unwrap().worker("xfan-count", "").unwrap().start().unwrap();
    let score = |pid: &dyn std::fmt::Display| read(format!("/proc/{pid}/oom_score_adj"));
    let able = may_protect_from_oom();
    let own = if able { "-900".to_owned() } else { score(&"self") };
    eprintln!("CAP_SYS_RESOURCE: {able}");
    assert_eq!(
        (score(&primary.process.pid()), score(&pid_of(&primary.report(), 0))),
        (own, "300".to_owned())
    );
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Whether this process has CAP_SYS_RESOURCE.
fn may_protect_from_oom() -> bool {
    u64::from_str_radix(&status("self", "CapEff"), 16).unwrap() & 1 << 24 != 0
}

#[test]
fn a_restarted_worker_cannot_protect_itself_from_the_oom_killer() {
    let _watchdog = e2e_or_skip!();
    if !may_protect_from_oom() {
        eprintln!("skipped: without CAP_SYS_RESOURCE no process can lower its oom_score_adj");
        return;
    }
    let namespace = network(2);
    let primary = Launch::on(&namespace).unwrap().hostile_worker("traits").unwrap().start().unwrap();
    restart(&primary, 0);
    let answers = || {
        let lines = primary.process.stderr();
        let printed = lines.iter().filter_map(|line| line.split_once("\"protect from OOM\":"));
        printed.map(|(_, rest)| rest.starts_with("\"permission denied\"")).collect::<Vec<_>>()
    };
    wait_until(|| answers().len() == 2);
    assert_eq!(answers(), [true, true]);
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Kills the process of a member, and waits until its successor runs.
fn restart(primary: &Primary, member: usize) {
    let killed = pid_of(&primary.report(), member);
    signal(killed, Signal::SIGKILL);
    primary.report_when(|report| {
        report.groups[0].members[member].state == "running" && pid_of(report, member) != killed
    });
}

/// As a login does. So the primary's keyring counts, and its workers' keyrings count as well.
fn join_a_session_keyring() -> io::Result<()> {
    // SAFETY: a null name means an anonymous keyring.
    unsafe { check(libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, 0)) }
}

#[test]
fn workers_start_though_the_key_quota_of_their_user_is_used_up() {
    let _watchdog = e2e_or_skip!();
    let quota: usize = read("/proc/sys/kernel/keys/maxkeys").parse().unwrap_or(usize::MAX);
    if quota >= 1000 {
        eprintln!("skipped: users may have {quota} keys, more than the hostile worker makes");
        return;
    }
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("restart_delay = '100ms'").unwrap().with("-n 2");
    let primary = launch
        .hostile_worker("keys")
        .unwrap()
        .start_with(|command| {
            // SAFETY: one system call without pointers.
            unsafe { command.pre_exec(join_a_session_keyring) };
        })
        .unwrap();
    primary.unleash();
    let made = primary.printed("made ");
    assert_ne!(made, "made 1000 keyrings");
    restart(&primary, 1);
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Begins a session, as a login does. [`Launch`] has made the process the leader of its own group.
fn begin_session() -> io::Result<()> {
    // SAFETY: the calls take no pointers.
    unsafe {
        check(libc::setpgid(0, libc::getpgid(libc::getppid())).into())?;
        check(libc::setsid().into())
    }
}

/// Starts a primary in a session of its own, with a worker that lowers the priority of its
/// autogroup. Returns the nice value of the primary's autogroup before, and whether the worker is
/// of the same session. `None`: the kernel has no autogroups.
fn lowered_autogroup(namespace: &Netns, config: &str) -> Option<(Primary, String, bool)> {
    if !fs::exists("/proc/self/autogroup").unwrap() {
        eprintln!("skipped: the kernel has no autogroups (CONFIG_SCHED_AUTOGROUP)");
        return None;
    }
    let launch = Launch::on(namespace).unwrap().config(config).unwrap();
    let primary = launch
        .hostile_worker("autogroup")
        .unwrap()
        .start_with(|command| {
            // SAFETY: system calls without pointers.
            unsafe { command.pre_exec(begin_session) };
        })
        .unwrap();
    let session = |pid: i32| getsid(Some(Pid::from_raw(pid))).unwrap();
    let worker = pid_of(&primary.report(), 0).cast_signed();
    let shared = session(worker) == session(primary.process.pid().as_raw());
    let before = autogroup_of(&primary);
    primary.unleash();
    primary.printed("lowered its autogroup");
    Some((primary, before, shared))
}

/// Such as `/autogroup-25 nice 0`.
fn autogroup_of(primary: &Primary) -> String {
    read(format!("/proc/{}/autogroup", primary.process.pid()))
}

#[test]
fn a_worker_cannot_lower_the_priority_of_the_primarys_session() {
    let _watchdog = e2e_or_skip!();
    if std::thread::available_parallelism().unwrap().get() < 2 {
        eprintln!("skipped: the lane and the worker would share the only CPU");
        return;
    }
    let namespace = network(1);
    let Some((primary, before, shared)) = lowered_autogroup(&namespace, "") else { return };
    assert!(!shared);
    assert_eq!(autogroup_of(&primary), before);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_lowered_priority_of_a_shared_session_is_restored() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let Some((primary, before, shared)) = lowered_autogroup(&namespace, "cores = [0]") else { return };
    assert!(shared, "a lane that yields a shared CPU has to yield it to the worker");
    wait_until(|| autogroup_of(&primary) == before);
    primary.process.wait_for_line("set its autogroup to nice 19 instead of 0: restored").unwrap();
    assert!(primary.history().entries.iter().any(|entry| entry.event == "autogroup"));
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Makes a command run as the user daemon with all capabilities.
fn as_daemon() -> io::Result<()> {
    // Capabilities survive the change of user only with KEEPCAPS, and execve only as ambient ones.
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
fn an_unprivileged_primary_refuses_its_own_user() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let start = |user: &str| {
        let launch = Launch::on(&namespace).unwrap().with(user).worker("xfan-count", "").unwrap();
        // Other users may be unable to read the checkout.
        let xfan = launch.within_reach("xfan").unwrap();
        launch.spawn_with(|command| {
            let mut within_reach = namespace.command(xfan);
            within_reach.args(command.get_args()).env_remove("SUDO_UID");
            // SAFETY: `as_daemon` makes async-signal-safe calls only.
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

    // With another user for its workers, it runs like a primary started by root.
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
    send_synthetic(&namespace, 6);
    assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
    let (exit, home) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(!home.join("xfan.sock").exists());
}

#[test]
fn every_thread_keeps_only_the_capabilities_it_needs() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
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
    // KILL, SETGID, SETUID, NET_ADMIN, IPC_LOCK, SYS_NICE, BPF; SYS_RESOURCE if it was granted.
    let granted = if may_protect_from_oom() { 1 << 24 } else { 0 };
    let control = capabilities(&[5, 6, 7, 12, 14, 23, 39]) | granted;
    let expected = BTreeMap::from([
        ("xfan".to_owned(), [0, control, control, 0, 0]),
        ("control".to_owned(), [0, capabilities(&[12]), capabilities(&[12]), 0, 0]),
        ("watch".to_owned(), [0; 5]),
        ("writer".to_owned(), [0; 5]),
        ("output".to_owned(), [0; 5]),
        ("lane-0".to_owned(), [0; 5]),
        ("lane-1".to_owned(), [0; 5]),
    ]);
    assert_eq!(threads(), expected);
    // A restarted worker has the same credentials as the first ones.
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
    send_synthetic(&namespace, 6);
    assert_balanced(&primary.report_after(PACKETS, true), PACKETS);
    assert_eq!(threads(), expected);
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Without cgroups: by default, tests see no cgroup hierarchy.
#[test]
fn a_workers_children_are_killed_without_cgroups() {
    let _watchdog = e2e_or_skip!();
    for (disguise, count, stays) in
        [("none", 1, true), ("session", 1, false), ("family", 3, false), ("comet", 1, false)]
    {
        let namespace = network(2);
        let launch = Launch::on(&namespace).unwrap().config("restart = 'no'").unwrap().with("-n 2");
        let way = format!("brood {disguise}");
        let primary = launch.hostile_worker(&way).unwrap().start().unwrap();
        assert_eq!(primary.report().groups[0].confinement.cgroups, None);
        let daemons = daemons(&primary, count);
        if stays {
            // In the worker's own process group, the worker may keep it as long as it lives.
            let parent = || status(daemons[0], "PPid");
            wait_until(|| parent() == primary.process.pid().to_string());
            primary.report_when(|report| report.uptime_ns > 1_000_000_000);
            assert!(exists(daemons[0]));
        }
        signal(pid_of(&primary.report(), 0), Signal::SIGUSR1);
        wait_until(|| daemons.iter().all(|&pid| !exists(pid)));
        // No other descendant is left: the primary's only child is the other worker.
        let own = primary.process.pid();
        let children = || read(format!("/proc/{own}/task/{own}/children"));
        let other = pid_of(&primary.report(), 1).to_string();
        wait_until(|| (0..100).all(|_| children() == other));
        // The other worker is unaffected.
        send_synthetic(&namespace, 6);
        let report = primary.report_after(PACKETS, true);
        assert_eq!(report.groups[0].members[1].committed, PACKETS);
        assert_eq!(primary.stop().0.code, Some(0));
    }
}

#[test]
fn a_workers_children_do_not_outlive_the_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = Launch::on(&namespace).unwrap().hostile_worker("brood none").unwrap().start().unwrap();
    let daemons = daemons(&primary, 1);
    assert_eq!(primary.stop().0.code, Some(0));
    assert!(!exists(daemons[0]));
}

#[test]
fn unneeded_system_calls_are_refused() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let start = |sandbox: &str| {
        let launch = Launch::on(&namespace).unwrap().config(&format!("worker_sandbox = {sandbox}")).unwrap();
        launch.hostile_worker("sandbox").unwrap().start().unwrap()
    };
    for sandbox in [false, true] {
        let primary = start(&sandbox.to_string());
        let report = primary.report();
        assert_eq!(report.groups[0].confinement.sandbox, sandbox);
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
            ("child of the parent", "EPERM"),
            ("collapse", "EPERM"),
            ("collapse by pidfd", "EPERM"),
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
    let namespace = network(2);
    for (program, arguments) in [("xfan-count", ""), ("xfan-flow", "--output FOLDER/flows-{member}.json")] {
        let launch = Launch::on(&namespace).unwrap().config("worker_sandbox = true").unwrap().with("-n 2");
        let primary = launch.worker(program, arguments).unwrap().start().unwrap();
        for member in [0, 1] {
            // Two filters are the primary's, one is the worker's.
            assert_eq!(status(pid_of(&primary.report(), member), "Seccomp_filters"), "3");
        }
        send_synthetic(&namespace, 6);
        let report = primary.report_after(PACKETS, true);
        assert_balanced(&report, PACKETS);
        assert_eq!(report.totals(), (PACKETS, PACKETS, 0));
        assert_eq!(primary.stop().0.code, Some(0));
    }
}
