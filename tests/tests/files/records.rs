//! The flow records of `xfan-flow`.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{FlowRecord, Launch, Primary};
use xfan_tests::proc::signal;
use xfan_tests::replay::{OpenReplay, Replay};
use xfan_tests::tmpfs::Tmpfs;
use xfan_tests::traffic;
use xfan_tests::veth::network;

/// One frame for each of `count` flows, numbered from `first`.
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

/// The sum of the packets in a file's records; every line must be a whole record.
fn packets_in(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "the file ends within a line");
    let record =
        |line| serde_json::from_str::<FlowRecord>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    text.lines().map(|line| record(line).packets).sum()
}

/// Starts `xfan-flow` on a disk that holds some 100 records, and sends 350 flows of one packet
/// each.
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
    // The worker keeps receiving, and retries writing.
    send(&mut sender, &frames(300, 50));
    wait_for(&primary, "flows_expired", 350);
    (primary, disk, path)
}

#[test]
fn flow_records_wait_while_the_disk_is_full() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let (primary, disk, path) = on_a_full_disk(&namespace);
    disk.resize(1024).unwrap();
    wait_for(&primary, "records_waiting", 0);
    assert_eq!(packets_in(&path), 350);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let stderr = exit.stderr.join("\n");
    let said = format!("cannot write flow records to {}: No space left on device", path.display());
    assert_eq!(stderr.matches(&said).count(), 1, "{stderr}");
    assert_eq!(
        stderr.matches("accepts flow records again; 0 records of 0 packets were lost").count(),
        1,
        "{stderr}"
    );
    assert!(stderr.contains("flows written 350 (expired 350, evicted 0)"), "{stderr}");
    assert!(stderr.contains("records lost 0 of 0 packets (unwritten at exit 0)"), "{stderr}");
    assert_eq!(packets_in(&path), 350);
}

#[test]
fn flow_records_lost_to_a_full_disk_are_counted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let (primary, _disk, path) = on_a_full_disk(&namespace);
    let (exit, _folder) = primary.stop();
    let (stderr, lost) = (exit.stderr.join("\n"), 350 - packets_in(&path));
    assert!(
        stderr.contains(&format!("records lost {lost} of {lost} packets (unwritten at exit {lost})")),
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
    signal(pid, Signal::SIGHUP);
}

#[test]
fn rotated_files_hold_every_record_once() {
    const ROTATIONS: usize = 10;
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
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
    // No new file can be made: the worker keeps the old one.
    fs::rename(&path, old(ROTATIONS)).unwrap();
    fs::create_dir(&path).unwrap();
    hang_up(&primary);
    let line = primary.process.wait_for_line("cannot reopen ").unwrap();
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
fn sighup_does_not_end_bundled_workers() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
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
