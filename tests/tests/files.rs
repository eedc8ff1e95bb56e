//! Files and descriptors: whose they are, what a full disk and a low limit do, and what is left of
//! them.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan_shm::protocol::{self, MAX_REPLY, Reply};
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{FlowRecord, Launch, Primary};
use xfan_tests::process::{Process, binary};
use xfan_tests::replay::{OpenReplay, Replay};
use xfan_tests::tmpfs::Tmpfs;
use xfan_tests::traffic;
use xfan_tests::veth::{Veth, VethConfig};

/// The workers' user, where nobody has called sudo.
const NOBODY: u32 = 65534;

fn network() -> Netns {
    Veth::in_namespace(&VethConfig::queues(1)).unwrap().0
}

/// Permissions, owner.
fn mode(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.uid())
}

fn beside(socket: &Path, more: &str) -> PathBuf {
    PathBuf::from(format!("{}{more}", socket.display()))
}

/// A command with a umask.
fn with_umask(command: &mut Command, umask: u32) {
    // SAFETY: one system call, without pointers.
    unsafe {
        command.pre_exec(move || {
            libc::umask(umask);
            Ok(())
        });
    }
}

/// A command that may have so many descriptors open.
fn with_limit(command: &mut Command, soft: u64, hard: u64) {
    // SAFETY: one system call.
    unsafe {
        command.pre_exec(move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from));
    }
}

#[test]
fn whatever_the_umask_modes_are_as_documented() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    for umask in [0, 0o027, 0o077] {
        let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
        let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
        let primary = launch.spawn_with(|command| with_umask(command, umask)).unwrap();
        primary.process.wait_for_line(" running ").unwrap();
        let socket = primary.socket();
        assert_eq!(mode(socket.parent().unwrap()), (0o755, 0), "umask {umask:03o}");
        assert_eq!(mode(&socket), (0o600, NOBODY), "umask {umask:03o}");
        assert_eq!(mode(&beside(&socket, ".workers")), (0o600, 0), "umask {umask:03o}");
        let (exit, _folder) = primary.stop();
        assert_eq!(exit.code, Some(0), "{exit:#?}");
        assert_eq!(fs::read_dir(socket.parent().unwrap()).unwrap().count(), 0);
    }
}

#[test]
fn a_folder_that_others_may_write_to_is_refused() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    for mode in [0o777, 0o775, 0o1777] {
        let launch = Launch::on(&namespace).unwrap();
        let folder = launch.socket().parent().unwrap().to_owned();
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
        let exit = launch.run().unwrap();
        let (stderr, path) = (exit.stderr.join("\n"), folder.display());
        assert_eq!(exit.code, Some(2), "{stderr}");
        let message = format!(
            "xfan: no control socket: directory {path} (owner root, mode {mode:04o}) can be changed by"
        );
        assert!(stderr.contains(&message), "{stderr}");
    }
}

#[test]
fn links_in_place_of_its_files_are_not_followed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
    let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
    let (socket, target) = (launch.socket(), launch.folder().join("target"));
    fs::create_dir(socket.parent().unwrap()).unwrap();
    fs::write(&target, "[]").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o600)).unwrap();
    let note = beside(&socket, ".workers");
    for link in [&note, &beside(&socket, ".workers.new")] {
        symlink(&target, link).unwrap();
    }
    // The socket's own place.
    symlink(&target, &socket).unwrap();
    let exit = Process::spawn(launch.command().unwrap()).unwrap().wait();
    assert_eq!(exit.code, Some(2), "{exit:#?}");
    assert!(exit.stderr.join("\n").contains("exists and is no socket"), "{exit:#?}");
    fs::remove_file(&socket).unwrap();

    let primary = launch.start().unwrap();
    assert!(fs::symlink_metadata(&note).unwrap().is_file());
    assert_eq!((fs::read_to_string(&target).unwrap().as_str(), mode(&target)), ("[]", (0o600, 0)));
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(fs::read_to_string(&target).unwrap(), "[]");
}

#[test]
fn a_full_disk_leaves_no_half_note_and_is_named() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
    let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
    let run = launch.socket().parent().unwrap().to_owned();
    fs::create_dir(&run).unwrap();
    let disk = Tmpfs::mount(&run, 64, 0o755).unwrap();
    disk.fill().unwrap();
    let primary = launch.start().unwrap();
    let line = primary.process.wait_for_line("the next primary will not find the workers").unwrap();
    assert!(line.contains("No space left on device"), "{line}");
    let names = || {
        let mut names: Vec<_> = fs::read_dir(&run)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["filler", "xfan.sock"]);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(names(), ["filler"]);
}

#[test]
fn what_a_killed_primary_left_half_written_goes_at_the_next_start() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    // Also at the start of one that has no workers to write down.
    let launch = Launch::on(&namespace).unwrap();
    let half = beside(&launch.socket(), ".workers.new");
    fs::create_dir(half.parent().unwrap()).unwrap();
    fs::write(&half, "[{\"member\":\"defa").unwrap();
    let primary = launch.start().unwrap();
    assert!(!half.exists());
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_limit_of_descriptors_that_does_not_suffice_is_named() {
    let _watchdog = e2e_or_skip!(300);
    for (queues, workers) in [(1, 1), (4, 3)] {
        let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(queues)).unwrap();
        let mut refused = 0;
        for limit in 8.. {
            let launch = Launch::on(&namespace).unwrap().with(&format!("-n {workers}"));
            let launch = launch.worker("xfan-count", "").unwrap();
            let primary = launch.spawn_with(|command| with_limit(command, limit, limit)).unwrap();
            match primary.process.wait_for_line(" running ") {
                Ok(_) => {
                    // Enough for a tool as well.
                    primary.report();
                    let exit = primary.stop().0;
                    assert_eq!(exit.code, Some(0), "{exit:#?}");
                    assert!(!exit.stderr.join("\n").contains("Too many open files"), "{exit:#?}");
                    break;
                }
                Err(error) => {
                    refused += 1;
                    let named = format!("RLIMIT_NOFILE of this process is {limit} (ulimit -n, LimitNOFILE=)");
                    assert!(error.to_string().contains(&named), "{limit}: {error}");
                }
            }
        }
        assert!(refused > 20, "{refused}");
    }
}

/// Connections beyond what a low limit has room for: the primary says which limit it is, once, and
/// goes on.
/// Limits the descriptors that a running process may have open.
fn limit_process(pid: Pid, limit: u64) {
    let mut limits = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let (pid, resource) = (pid.as_raw(), libc::RLIMIT_NOFILE);
    // SAFETY: the kernel reads and writes no more than `limits`, where a pointer leads there.
    let done = unsafe {
        let read = libc::prlimit(pid, resource, std::ptr::null(), &raw mut limits);
        limits.rlim_cur = limit;
        read | libc::prlimit(pid, resource, &raw const limits, std::ptr::null_mut())
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

#[test]
fn connections_beyond_the_limit_of_descriptors_wait_and_it_is_named() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let primary = Launch::on(&namespace).unwrap().start().unwrap();
    let pid = primary.process.pid();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let highest = open.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max().unwrap();
    // Room for a few connections.
    let limit = highest + 3;
    limit_process(pid, limit);
    let silent: Vec<_> = (0..60).map(|_| primary.dial()).collect();
    let line = primary.process.wait_for_line("the control socket cannot accept a connection").unwrap();
    assert!(
        line.contains(&format!("RLIMIT_NOFILE of this process is {limit} (ulimit -n, LimitNOFILE=)")),
        "{line}"
    );
    drop(silent);
    primary.report();
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(exit.stderr.join("\n").matches("cannot accept a connection").count(), 1, "{exit:#?}");
}

#[test]
fn connections_leave_descriptors_for_all_else() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap();
    let primary = launch.spawn_with(|command| with_limit(command, 64, 64)).unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    let silent: Vec<_> = (0..4).map(|_| primary.dial()).collect();
    let refused = primary.dial();
    let Reply::Refused(refusal) = protocol::receive::<Reply>(&refused, MAX_REPLY).unwrap().0 else {
        panic!("there are four already")
    };
    assert_eq!(
        refusal.message,
        "there are 4 connections of root, which is the limit: close some, or raise the limit of open files, of which it \
         is a part: RLIMIT_NOFILE is 64 (ulimit -n, LimitNOFILE=)"
    );
    drop(silent);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(!exit.stderr.join("\n").contains("cannot accept a connection"), "{exit:#?}");
}

#[test]
fn a_worker_without_descriptors_says_which_limit_it_is() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let primary = Launch::on(&namespace).unwrap().start().unwrap();
    let mut refused = 0;
    for limit in 4.. {
        let mut command = Command::new(binary("xfan-count").unwrap());
        command.arg("--attach").arg(primary.socket());
        with_limit(&mut command, limit, limit);
        let mut worker = Process::spawn(command).unwrap();
        let attached = || {
            let report = primary.report();
            let mut members = report.groups.iter().flat_map(|group| &group.members);
            members.any(|member| {
                member.state == "running" && member.pid == worker.pid().as_raw().cast_unsigned()
            })
        };
        let runs = loop {
            if attached() {
                break true;
            }
            if fs::read_to_string(format!("/proc/{}/stat", worker.pid())).unwrap_or_default().contains(") Z ")
            {
                break false;
            }
            std::thread::yield_now();
        };
        // It may have attached, and fail behind that.
        worker.signal(Signal::SIGTERM);
        let exit = worker.wait();
        if runs && exit.code == Some(0) {
            break;
        }
        refused += 1;
        let stderr = exit.stderr.join("\n");
        assert!(
            stderr.contains(&format!("RLIMIT_NOFILE of this process is {limit} (ulimit -n")),
            "{limit}: {stderr}"
        );
    }
    assert!(refused > 2, "{refused}");
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Soft and hard limit of open files of a process.
fn limits(pid: u32) -> Vec<String> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().skip(3).take(2).map(str::to_owned).collect()
}

#[test]
fn a_low_soft_limit_is_raised_for_the_primary_alone() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let primary = launch.spawn_with(|command| with_limit(command, 20, 3000)).unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    let pid = primary.process.pid().as_raw().cast_unsigned();
    assert_eq!(limits(pid), ["3000", "3000"]);
    for member in &primary.report().groups[0].members {
        assert_eq!(limits(member.pid), ["20", "3000"]);
    }
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Frames of as many flows, of which `first` is the number of the first.
fn frames(first: u32, count: u32) -> Vec<Vec<u8>> {
    let server: SocketAddr = "10.9.255.255:53".parse().unwrap();
    let client = |flow: u32| {
        let [_, _, high, low] = flow.to_be_bytes();
        SocketAddr::from(([10, 8, high, low], 4000))
    };
    (first..first + count).map(|flow| traffic::udp(client(flow), server, &[7; 30])).collect()
}

fn sender(namespace: &Netns) -> OpenReplay {
    namespace.run(|| Replay::onto("tx0").open()).unwrap()
}

fn send(sender: &mut OpenReplay, frames: &[Vec<u8>]) {
    assert_eq!(sender.run(frames).unwrap().packets, frames.len() as u64);
}

fn counter(primary: &Primary, name: &str) -> u64 {
    primary.report().groups[0].members[0].counters.get(name).copied().unwrap_or_default()
}

fn wait_for(primary: &Primary, name: &str, value: u64) {
    primary.report_when(|report| report.groups[0].members[0].counters.get(name) == Some(&value));
}

/// The packets in the records of a file, every line of which is a whole one.
fn packets_in(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "it ends in the middle of a line");
    let record =
        |line| serde_json::from_str::<FlowRecord>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    text.lines().map(|line| record(line).packets).sum()
}

/// `xfan-flow` on a disk with room for some 100 records, to which 350 flows of one packet each have
/// come.
fn on_a_full_disk(namespace: &Netns) -> (Primary, Tmpfs, PathBuf) {
    let launch = Launch::on(namespace).unwrap().with("-n 1");
    let launch = launch.worker("xfan-flow", "--output FOLDER/disk/flows --idle-timeout 1ms").unwrap();
    let folder = launch.folder().join("disk");
    fs::create_dir(&folder).unwrap();
    let disk = Tmpfs::mount(&folder, 32, 0o777).unwrap();
    let (primary, path) = (launch.start().unwrap(), folder.join("flows"));
    let mut sender = sender(namespace);
    send(&mut sender, &frames(0, 300));
    wait_for(&primary, "flows_expired", 300);
    let waiting = counter(&primary, "records_waiting");
    assert!(waiting > 0 && waiting < 300, "{waiting}");
    assert_eq!(packets_in(&path) + waiting, 300);
    // It goes on receiving, and trying.
    send(&mut sender, &frames(300, 50));
    wait_for(&primary, "flows_expired", 350);
    (primary, disk, path)
}

#[test]
fn flow_records_wait_while_the_disk_is_full() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let (primary, disk, path) = on_a_full_disk(&namespace);
    disk.resize(1024).unwrap();
    wait_for(&primary, "records_waiting", 0);
    assert_eq!(packets_in(&path), 350);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let stderr = exit.stderr.join("\n");
    let said = format!("cannot write flow records to {}: No space left on device", path.display());
    assert_eq!(stderr.matches(&said).count(), 1, "{stderr}");
    assert_eq!(stderr.matches("takes flow records again; lost are 0, of 0 packets").count(), 1, "{stderr}");
    assert!(stderr.contains("flows written 350 (expired 350, evicted 0)"), "{stderr}");
    assert!(stderr.contains("records lost 0 of 0 packets (waiting at the end 0)"), "{stderr}");
    assert_eq!(packets_in(&path), 350);
}

#[test]
fn flow_records_that_a_full_disk_never_takes_are_counted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let (primary, _disk, path) = on_a_full_disk(&namespace);
    let (exit, _folder) = primary.stop();
    let (stderr, lost) = (exit.stderr.join("\n"), 350 - packets_in(&path));
    assert!(
        stderr.contains(&format!("records lost {lost} of {lost} packets (waiting at the end {lost})")),
        "{stderr}"
    );
    assert!(
        stderr.contains(&format!("xfan-flow: cannot write flow records to {}: No space", path.display())),
        "{stderr}"
    );
    assert!(stderr.contains("exit status: 1"), "{stderr}");
}

fn hang_up(primary: &Primary) {
    let pid = primary.report().groups[0].members[0].pid;
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGHUP).unwrap();
}

#[test]
fn rotated_files_hold_every_record_once() {
    const ROTATIONS: usize = 10;
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let launch = Launch::on(&namespace).unwrap().with("-n 1");
    let launch = launch.worker("xfan-flow", "--output FOLDER/flows --max-flows 16").unwrap();
    let primary = launch.start().unwrap();
    let path = primary.folder().join("flows");
    let old = |number: usize| primary.folder().join(format!("flows.{number}"));
    let (rotated, mut tx) = (AtomicBool::new(false), sender(&namespace));
    let sent = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut sent = 0;
            while !rotated.load(Ordering::Relaxed) {
                send(&mut tx, &frames(sent % 60_000, 500));
                sent += 500;
                primary.report_after(sent.into(), true);
            }
            sent
        });
        for number in 0..ROTATIONS {
            while fs::metadata(&path).unwrap().len() == 0 {
                std::thread::yield_now();
            }
            fs::rename(&path, old(number)).unwrap();
            hang_up(&primary);
            while !path.exists() {
                std::thread::yield_now();
            }
        }
        rotated.store(true, Ordering::Relaxed);
        sending.join().unwrap()
    });
    // No new file can be made: the old one goes on.
    fs::rename(&path, old(ROTATIONS)).unwrap();
    fs::create_dir(&path).unwrap();
    hang_up(&primary);
    let line = primary.process.wait_for_line(" anew: ").unwrap();
    assert!(line.contains("Is a directory"), "{line}");
    send(&mut tx, &frames(0, 100));
    primary.report_after(u64::from(sent) + 100, true);
    let files: Vec<_> = (0..=ROTATIONS).map(old).collect();
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let packets: Vec<_> = files.iter().map(|file| packets_in(file)).collect();
    assert!(packets.iter().all(|packets| *packets > 0), "{packets:?}");
    assert_eq!(packets.iter().sum::<u64>(), u64::from(sent) + 100);
    let stderr = exit.stderr.join("\n");
    assert!(
        stderr.contains("records lost 0 of 0 packets") && !stderr.contains("its process ended"),
        "{stderr}"
    );
}

#[test]
fn sighup_ends_no_bundled_worker() {
    let _watchdog = e2e_or_skip!();
    let namespace = network();
    let mut sender = sender(&namespace);
    for (program, arguments) in [("xfan-count", ""), ("xfan-flow", "--output -")] {
        let launch = Launch::on(&namespace).unwrap().with("-n 1").worker(program, arguments).unwrap();
        let primary = launch.start().unwrap();
        let pid = primary.report().groups[0].members[0].pid;
        for sent in [100, 200] {
            hang_up(&primary);
            send(&mut sender, &frames(0, 100));
            primary.report_after(sent, true);
        }
        assert_eq!(primary.report().groups[0].members[0].pid, pid, "{program}");
        let (exit, _folder) = primary.stop();
        assert_eq!(exit.code, Some(0), "{exit:#?}");
        assert!(!exit.stderr.join("\n").contains("its process ended"), "{exit:#?}");
    }
}
