//! The harness itself, in its own namespaces: what is sent arrives unchanged, once, on the right
//! queue.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use flate2::Compression;
use nix::sys::signal::Signal;
use xfan_tests::capture::Capture;
use xfan_tests::e2e_or_skip;
use xfan_tests::generator::{self, End, Generator, Load, sequence_of};
use xfan_tests::link::Link;
use xfan_tests::netns::Netns;
use xfan_tests::oracle::{self, Expectation};
use xfan_tests::process::{Exit, Process, binary};
use xfan_tests::receiver::{Received, Receiver};
use xfan_tests::replay::{Replay, Spread};
use xfan_tests::traffic;
use xfan_tests::veth::{Veth, VethConfig};

const ALL: [u32; 4] = [0, 1, 2, 3];

/// A pair with four queues, and sockets on all queues of the receiver.
fn network() -> (Netns, Receiver) {
    let (namespace, pair) = Veth::in_namespace(&VethConfig::queues(4)).unwrap();
    assert_eq!((pair.sender.tx_queues, pair.receiver.rx_queues), (4, 4));
    let receiver = namespace.run(|| Receiver::open("rx0", &ALL)).unwrap();
    (namespace, receiver)
}

/// Groups the frames by queue.
fn by_queue(received: Vec<Received>) -> BTreeMap<u32, Vec<Vec<u8>>> {
    let mut queues = BTreeMap::new();
    for Received { queue, bytes } in received {
        queues.entry(queue).or_insert_with(Vec::new).push(bytes);
    }
    queues
}

fn sequences(received: &[Received]) -> BTreeSet<u64> {
    received.iter().map(|frame| sequence_of(&frame.bytes).expect("only the generator sends")).collect()
}

#[test]
fn replayed_frames_arrive_on_the_chosen_queue() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    let frames = traffic::synthetic(100, 1000, 1).frames;
    for queue in ALL {
        let replay = Replay { queues: vec![queue], ..Replay::onto("tx0") };
        let report = namespace.run(|| replay.run(&frames)).unwrap();
        assert_eq!((report.packets, report.queues), (1000, BTreeMap::from([(queue, 1000)])));
        // All frames have arrived when the replay ends: no wait is needed, and no more frames
        // arrive.
        assert_eq!(by_queue(receiver.drain()), BTreeMap::from([(queue, frames.clone())]));
    }
    assert_eq!(receiver.dropped().unwrap(), 0);
}

#[test]
fn a_replay_spreads_and_repeats() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    let frames = traffic::synthetic(50, 600, 2).frames;

    let replay = Replay { loops: 2, ..Replay::onto("tx0") };
    let report = namespace.run(|| replay.run(&frames)).unwrap();
    assert_eq!(report.queues, ALL.map(|queue| (queue, 300)).into());
    for (queue, arrived) in by_queue(receiver.drain()) {
        let sent = frames.iter().skip(queue as usize).step_by(4);
        assert!(arrived.iter().eq(sent.clone().chain(sent)), "queue {queue}");
    }

    let replay = Replay { spread: Spread::Flow, queues: vec![1, 3], ..Replay::onto("tx0") };
    namespace.run(|| replay.run(&frames)).unwrap();
    let queues = by_queue(receiver.drain());
    let flows =
        |queue| queues[&queue].iter().map(|frame| oracle::read(frame, &[]).flow).collect::<BTreeSet<_>>();
    assert_eq!((flows(1).len(), flows(3).len(), flows(1).intersection(&flows(3)).count()), (25, 25, 0));
    assert_eq!(queues.values().map(Vec::len).sum::<usize>(), frames.len());
}

#[test]
fn a_replay_uses_only_active_queues() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    // The generator counts by the sender's queue, however many queues the receiver has.
    namespace.ethtool("-L tx0 tx 1").unwrap();
    let load = Load { cpu: 1, ..Load::onto("tx0", End::Frames(100)) };
    let report = namespace.run(|| generator::run(&load)).unwrap();
    assert_eq!((report.sent, report.queue), (100, 0), "{report:?}");
    assert_eq!(receiver.collect(100).len(), 100);

    namespace.ethtool("-L tx0 tx 2").unwrap();
    let frames = traffic::synthetic(50, 600, 5).frames;
    let report = namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    assert_eq!(report.queues, BTreeMap::from([(0, 300), (1, 300)]));
    assert_eq!(by_queue(receiver.drain()).values().map(Vec::len).sum::<usize>(), 600);
    let replay = Replay { queues: vec![2], ..Replay::onto("tx0") };
    let error = namespace.run(|| replay.run(&frames)).unwrap_err().to_string();
    assert!(error.contains("tx0 has 2 TX queues in use, so there is no queue 2"), "{error}");
}

#[test]
fn the_generator_counts_whichever_queue_receives() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(4) }).unwrap();
    // CPU 1 sends to RX queue 0, which the sender counts as its queue 0.
    namespace.ethtool("-L rx0 rx 1").unwrap();
    let load = Load { cpu: 1, ..Load::onto("tx0", End::Frames(100)) };
    let report = namespace.run(|| generator::run(&load)).unwrap();
    assert_eq!((report.sent, report.queue), (100, 0), "{report:?}");
}

#[test]
fn the_replay_program_sends_a_capture_file() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("made.pcap");
    let run = |name: &str, arguments: &[&str]| {
        let mut command = namespace.command(binary(name).unwrap());
        command.args(arguments);
        Process::spawn(command).unwrap().wait()
    };
    let file_name = file.to_str().unwrap();

    let made = run("xfan-gen", &["--write-pcap", file_name, "--flows", "300", "--packets", "1200", "--json"]);
    assert_eq!(made.code, Some(0), "{made:?}");
    let capture = Capture::read(&file).unwrap();
    assert_eq!(capture, traffic::synthetic(300, 1200, 1));

    let replayed = run("xfan-replay", &["-i", "tx0", "--queues", "0,2", file_name]);
    let report: serde_json::Value = serde_json::from_str(&replayed.stdout.concat()).unwrap();
    assert_eq!(report["packets"], 1200);
    assert_eq!(report["bytes"], capture.bytes());
    assert_eq!(report["queues"], serde_json::json!({ "0": 600, "2": 600 }));
    let received = receiver.drain();
    let arrived = received.iter().map(|frame| frame.bytes.as_slice());
    let sent = capture.frames.iter().map(Vec::as_slice);
    assert_eq!(Expectation::of(arrived, &[]), Expectation::of(sent, &[]));

    let error = run("xfan-replay", &["-i", "tx0", "--queues", "4", file_name]);
    assert_eq!(error.code, Some(1));
    assert!(
        error.stderr.concat().contains("tx0 has 4 TX queues in use, so there is no queue 4"),
        "{error:?}"
    );
    let error = run("xfan-replay", &["-i", "tx9", file_name]);
    assert!(error.stderr.concat().contains("cannot find interface tx9"), "{error:?}");
}

#[test]
fn a_capture_larger_than_memory_is_streamed() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig::queues(4)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("large.pcap.gz");
    // 73 MB of frames in a small file. The program needs 15 MB to start and gets 50 MB.
    let frame = [traffic::SERVER_MAC, traffic::CLIENT_MAC].concat();
    let frame = [&frame[..], &[0x88, 0xb5], &[0; 1500]].concat();
    let part = folder.path().join("part.pcap");
    Capture { frames: vec![frame; 6000] }.write(&part).unwrap();
    let part = std::fs::read(part).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(File::create(&file).unwrap(), Compression::fast());
    gzip.write_all(&part).unwrap();
    for _ in 1..8 {
        gzip.write_all(&part[24..]).unwrap();
    }
    gzip.finish().unwrap();

    let replay = |arguments: &str| {
        let program = binary("xfan-replay").unwrap();
        let (program, file) = (program.display(), file.display());
        let mut command = namespace.command("sh");
        command.args(["-c", &format!("ulimit -v 50000; exec {program} -i tx0 {arguments} {file}")]);
        let exit = Process::spawn(command).unwrap().wait();
        assert_eq!(exit.code, Some(0), "{exit:?}");
        serde_json::from_str::<serde_json::Value>(&exit.stdout.concat()).unwrap()
    };
    let report = replay("");
    assert_eq!((&report["packets"], &report["bytes"]), (&48_000.into(), &(48_000 * 1514).into()));
    assert_eq!(report["queues"], serde_json::json!({ "0": 12000, "1": 12000, "2": 12000, "3": 12000 }));
    let report = replay("--loops 2 --spread flow");
    assert_eq!(report["queues"], serde_json::json!({ "0": 96_000, "1": 0, "2": 0, "3": 0 }));
    let text = namespace.ip("-json -statistics link show dev rx0").unwrap();
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(links[0]["stats64"]["rx"]["packets"], 144_000);
}

#[test]
fn a_capture_larger_than_memory_is_generated() {
    let _watchdog = e2e_or_skip!();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("large.pcap");
    let program = binary("xfan-gen").unwrap();
    let mut command = Command::new("sh");
    let arguments = format!("--write-pcap {} --packets 100000 --json", file.display());
    command.args(["-c", &format!("ulimit -v 50000; exec {} {arguments}", program.display())]);
    let exit = Process::spawn(command).unwrap().wait();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    let report: serde_json::Value = serde_json::from_str(&exit.stdout.concat()).unwrap();
    let bytes = report["bytes"].as_u64().unwrap();
    assert!(bytes > 60_000_000, "{bytes}");
    assert_eq!(std::fs::metadata(file).unwrap().len(), 24 + 100_000 * 16 + bytes);
}

#[test]
fn files_but_not_pipes_are_checked_before_sending() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("late-fault.pcap");
    let mut frames = traffic::synthetic(10, 100, 6).frames;
    frames.push(vec![0; 2000]);
    let run = |frames: &[Vec<u8>], cut: u64, script: &str| {
        Capture { frames: frames.to_vec() }.write(&file).unwrap();
        let written = File::options().write(true).open(&file).unwrap();
        written.set_len(written.metadata().unwrap().len() - cut).unwrap();
        let program = binary("xfan-replay").unwrap();
        let mut command = namespace.command("sh");
        command.env("replay", format!("{} -i tx0", program.display())).env("file", &file);
        command.args(["-c", script]);
        Process::spawn(command).unwrap().wait()
    };
    let error = |exit: Exit, code| {
        assert_eq!(exit.code, Some(code), "{exit:?}");
        exit.stderr.concat()
    };
    let (as_file, as_pipe) = ("$replay $file", "cat $file | $replay --loops 1 /dev/stdin");

    let said = error(run(&frames, 0, as_file), 1);
    assert!(said.contains("packet 101: a frame of 2000 bytes cannot be sent on tx0"), "{said}");
    assert!(said.ends_with("; 0 packets were sent"), "{said}");
    let said = error(run(&frames[..100], 1, as_file), 1);
    assert!(said.contains("after 99 packets: the file is cut off"), "{said}");
    assert!(said.ends_with("; 0 packets were sent"), "{said}");
    let said = error(run(&frames, 0, "cat $file | $replay --loops 2 /dev/stdin"), 1);
    assert!(said.contains("/dev/stdin is no regular file: it can be read and sent only once"), "{said}");
    let said = error(run(&frames, 0, "$replay /nowhere/x.pcap"), 1);
    assert!(said.contains("/nowhere/x.pcap: No such file"), "{said}");
    assert_eq!(receiver.drain(), []);

    let said = error(run(&frames, 0, as_pipe), 1);
    assert!(said.ends_with("; 100 packets were sent"), "{said}");
    let said = error(run(&frames[..100], 1, as_pipe), 1);
    assert!(said.ends_with("; 99 packets were sent"), "{said}");
    assert_eq!(receiver.drain().len(), 199);
    // A file is recognised by any of its names.
    let exit = run(&frames[..100], 0, "$replay --loops 2 /dev/stdin < $file");
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!(receiver.drain().len(), 200);
}

#[test]
fn reference_captures_arrive_unchanged() {
    let _watchdog = e2e_or_skip!();
    let Some(folder) = std::env::var_os("XFAN_PCAPS") else {
        eprintln!("no reference captures: XFAN_PCAPS names no folder with them");
        return;
    };
    let namespace = Netns::quiet().unwrap();
    let config = VethConfig { mtu: 2000, ..VethConfig::queues(4) };
    Veth::create(&config, &namespace, &namespace).unwrap();
    let mut receiver = namespace.run(|| Receiver::open("rx0", &ALL)).unwrap();
    let paths = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "pcap")) {
        let mut frames = Capture::read(&path).unwrap().frames;
        if frames.iter().any(|frame| frame.len() > 2018) {
            // A capture with a frame that is too long is refused before anything is sent.
            let error = namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap_err().to_string();
            assert!(error.contains("bytes cannot be sent on tx0: it takes 14 to 2018"), "{error}");
            assert_eq!(receiver.drain(), []);
            frames.retain(|frame| frame.len() <= 2018);
        }
        let report = namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
        assert_eq!(report.packets, frames.len() as u64);
        for (queue, arrived) in by_queue(receiver.drain()) {
            assert!(arrived.iter().eq(frames.iter().skip(queue as usize).step_by(4)), "{}", path.display());
        }
    }
    assert_eq!(receiver.dropped().unwrap(), 0);
}

#[test]
fn a_pair_connects_two_namespaces() {
    let _watchdog = e2e_or_skip!();
    let (left, right) = (Netns::quiet().unwrap(), Netns::quiet().unwrap());
    Veth::create(&VethConfig::queues(2), &left, &right).unwrap();
    assert!(left.run(|| Link::named("rx0")).is_err());
    let mut receiver = right.run(|| Receiver::open("rx0", &[1])).unwrap();
    let frames = traffic::synthetic(10, 100, 3).frames;
    let replay = Replay { queues: vec![1], ..Replay::onto("tx0") };
    left.run(|| replay.run(&frames)).unwrap();
    assert_eq!(by_queue(receiver.drain()), BTreeMap::from([(1, frames)]));
}

#[test]
fn the_generator_sends_the_exact_number() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    for (cpu, frame_bytes) in [(0, 64), (1, 1514)] {
        let load = Load {
            frame_bytes,
            flows: 100,
            both_directions: true,
            frames_per_second: Some(20_000),
            cpu,
            ..Load::onto("tx0", End::Frames(2000))
        };
        let report = namespace.run(|| generator::run(&load)).unwrap();
        let counts = (report.offered, report.sent, report.refused, report.queue as usize);
        assert_eq!(counts, (2000, 2000, 0, cpu), "{report:?}");

        let received = receiver.collect(2000);
        assert_eq!(sequences(&received), (0..2000).collect());
        assert_eq!(received.len(), 2000);
        assert!(received.iter().all(|frame| frame.queue as usize == cpu));
        assert!(received.iter().all(|frame| frame.bytes.len() == usize::from(frame_bytes)));
        // Twenty rounds over 100 flows, ten of them in the reverse direction.
        let expected = Expectation::of(received.iter().map(|frame| frame.bytes.as_slice()), &[]);
        assert_eq!(expected.flows.len(), 100);
        assert!(expected.flows.values().all(|totals| totals.packets == 20));
        let from_server = received.iter().filter(|frame| frame.bytes[26..30] == [198, 18, 0, 1]);
        assert_eq!(from_server.count(), 1000);
        assert!(received.iter().all(|frame| header_sum(&frame.bytes) == 0xffff), "IPv4 checksums");
    }
    assert_eq!(receiver.dropped().unwrap(), 0);
}

/// The ones' complement sum over an IPv4 header: 0xffff if its checksum is right.
fn header_sum(frame: &[u8]) -> u32 {
    let words = frame[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    words.fold(0, |sum, word| ((sum + word) & 0xffff) + ((sum + word) >> 16))
}

#[test]
fn every_frame_of_a_flood_is_accounted_for() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    let generator =
        namespace.run(|| Generator::start(&Load::onto("tx0", End::After(Duration::MAX)))).unwrap();
    let mut received = Vec::new();
    while received.len() < 20_000 {
        received.extend(receiver.collect(1));
    }
    let report = generator.stop().unwrap();
    assert_eq!(report.offered, report.sent + report.refused);
    // The receiver's socket either delivered or dropped each frame, perhaps only now.
    while received.len() as u64 + receiver.dropped().unwrap() < report.sent {
        received.extend(receiver.drain());
    }
    assert_eq!(received.len() as u64 + receiver.dropped().unwrap(), report.sent);
    let sequences = sequences(&received);
    assert_eq!(sequences.len(), received.len(), "no frame arrives twice");
    assert!(sequences.last() < Some(&report.offered));
}

#[test]
fn a_receiver_without_redirect_support_is_named() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
    let load = Load::onto("tx0", End::Frames(100));
    let error = namespace.run(|| generator::run(&load)).unwrap_err().to_string();
    assert!(error.contains("took none of 100 frames"), "{error}");
    let error =
        namespace.run(|| generator::run(&Load { cpu: 4096, ..load.clone() })).unwrap_err().to_string();
    assert!(error.contains("CPU 4096"), "{error}");
    let load = Load { frame_bytes: 59, ..load };
    let error = namespace.run(|| generator::run(&load)).unwrap_err().to_string();
    assert_eq!(error, "the size of a frame, in bytes without FCS, is 59, but must be 60 to 1514");
}

#[test]
fn a_layer_3_interface_is_named() {
    let _watchdog = e2e_or_skip!();
    let namespace = Netns::quiet().unwrap();
    namespace.ip("tuntap add dev tun0 mode tun").unwrap();
    let error = namespace.run(|| Replay::onto("tun0").run(&[[0; 60]])).unwrap_err().to_string();
    assert_eq!(error, "interface tun0 is of type `none`, not Ethernet");
    let error = namespace.run(|| generator::run(&Load::onto("tun0", End::Frames(1)))).unwrap_err();
    assert_eq!(error.to_string(), "interface tun0 is of type `none`, not Ethernet");
}

#[test]
fn a_held_queue_is_named() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _receiver) = network();
    let error = namespace.run(|| Receiver::open("rx0", &[2])).err().unwrap().to_string();
    assert!(error.starts_with("no AF_XDP socket on queue 2 of rx0"), "{error}");
    assert!(error.contains("another program holds the queue"), "{error}");
}

#[test]
fn a_panic_removes_namespaces_and_processes() {
    let _watchdog = e2e_or_skip!();
    let (name, pid) = (std::sync::Mutex::new(None), std::sync::Mutex::new(None));
    let panic = std::panic::catch_unwind(|| {
        let namespace = Netns::new().unwrap();
        *name.lock().unwrap() = Some(namespace.name().to_string());
        let mut command = namespace.command("sleep");
        command.arg("1000");
        let process = Process::spawn(command).unwrap();
        *pid.lock().unwrap() = Some(process.pid());
        namespace.run(|| panic!("as asked"));
    });
    assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"as asked"));
    let name = name.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).unwrap();
    assert!(!std::path::Path::new("/run/netns").join(&name).exists());
    let pid = pid.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).unwrap();
    assert!(nix::sys::signal::kill(pid, None::<Signal>).is_err());
}

#[test]
fn programs_in_a_namespace_see_its_interfaces() {
    let _watchdog = e2e_or_skip!();
    let (namespace, pair) = Veth::in_namespace(&VethConfig::queues(3)).unwrap();
    let mut command = namespace.command("sh");
    command.args(["-c", "ls -d /sys/class/net/rx0/queues/rx-*; cat /sys/class/net/rx0/ifindex"]);
    let exit = Process::spawn(command).unwrap().wait();
    assert_eq!(exit.stdout.len(), 4, "{exit:?}");
    assert_eq!(exit.stdout[3], pair.receiver.index.to_string());
    let here = namespace.run(|| std::fs::read_to_string("/sys/class/net/tx0/ifindex"));
    assert_eq!(here.unwrap().trim(), pair.sender.index.to_string());
}

#[test]
fn refused_frames_are_resent_and_counted_once() {
    let _watchdog = e2e_or_skip!();
    let (namespace, mut receiver) = network();
    let frames = traffic::synthetic(50, 500, 4).frames;
    namespace.ip("link set dev rx0 down").unwrap();
    let report = std::thread::scope(|scope| {
        let replaying = scope.spawn(|| namespace.run(|| Replay::onto("tx0").run(&frames)));
        let dropped = || {
            let text = namespace.ip("-json -statistics link show dev tx0").unwrap();
            let links: serde_json::Value = serde_json::from_str(&text).unwrap();
            links[0]["stats64"]["tx"]["dropped"].as_u64().unwrap()
        };
        while dropped() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        namespace.ip("link set dev rx0 up").unwrap();
        replaying.join().unwrap().unwrap()
    });
    assert_eq!(report.packets, 500);
    assert!(report.refused > 0);
    for (queue, arrived) in by_queue(receiver.drain()) {
        assert!(arrived.iter().eq(frames.iter().skip(queue as usize).step_by(4)), "queue {queue}");
    }
}

#[test]
#[ignore = "hangs; the next test runs it"]
fn hangs() {
    let _watchdog = e2e_or_skip!(1);
    let namespace = Netns::new().unwrap();
    let mut command = namespace.command("sleep");
    command.arg("1000");
    let process = Process::spawn(command).unwrap();
    println!("namespace {}", namespace.name());
    println!("process {}", process.pid());
    std::thread::sleep(Duration::MAX);
}

#[test]
fn the_watchdog_aborts_a_test_that_hangs() {
    let _watchdog = e2e_or_skip!();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "hangs", "--nocapture"]);
    let exit = Process::spawn(command).unwrap().wait();
    assert_eq!(exit.signal, Some(libc::SIGABRT));
    assert!(exit.stderr.concat().contains("watchdog: hangs hangs, not done after 1 s"), "{exit:?}");
    let said = |what| exit.stdout.iter().find_map(|line| line.rsplit_once(what)).unwrap().1;
    assert!(!std::path::Path::new("/run/netns").join(said("namespace ")).exists());
    // Only its new parent can reap it.
    while is_alive(said("process ")) {
        std::thread::yield_now();
    }
}

/// Whether a process exists and is not a zombie.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
