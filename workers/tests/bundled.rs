//! The bundled workers as processes, under a minimal dispatcher (`common`).

mod common;

use std::fs;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use common::{FRAME, Primary, Socket, attached};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan_shm::layout::Phase;
use xfan_shm::protocol::{self, ENV_MEMBER, ENV_SOCKET, ENV_TOKEN, MAX_REQUEST, Request};

/// A worker process and its dispatcher.
struct Run {
    primary: Primary,
    worker: Child,
}

fn start(command: &mut Command) -> Run {
    let socket = Socket::new();
    let worker = command
        .env(ENV_SOCKET, &socket.path)
        .env(ENV_MEMBER, "default/0")
        .env(ENV_TOKEN, "secret")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Run { primary: Primary::answer(&socket, &attached()), worker }
}

impl Run {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.worker.id().try_into().unwrap()), signal).unwrap();
    }

    fn await_detach(&self) {
        let (request, _) = protocol::receive::<Request>(&self.primary.connection, MAX_REQUEST).unwrap();
        assert_eq!(request, Request::Detach);
    }

    fn await_commits(&mut self, packets: u32) {
        let mut committed = 0;
        while committed < packets {
            committed += self.primary.take_back(0) + self.primary.take_back(1);
            thread::yield_now();
        }
    }

    /// Closes the worker and waits for it to exit. Returns its output, also as text: standard
    /// output and standard error.
    fn close(self) -> (Output, String, String) {
        self.primary.down.set_phase(Phase::Closing);
        let output = self.worker.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        (output, out, err)
    }
}

/// A frame with a UDP datagram from 10.0.0.1:4096 to 10.0.0.2:53, or with `back` the reverse.
fn udp(back: bool) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[12..24].copy_from_slice(&[0x08, 0, 0x45, 0, 0, 50, 0, 1, 0, 0, 64, 17]);
    let (from, to) = ([10, 0, 0, 1 + u8::from(back)], [10, 0, 0, 2 - u8::from(back)]);
    let (sport, dport) = if back { ([0, 53], [0x10, 0]) } else { ([0x10, 0], [0, 53]) };
    for (at, bytes) in [(26, &from[..]), (30, &to), (34, &sport), (36, &dport)] {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
    }
    frame
}

#[test]
fn count_leaves_on_sigterm_and_prints_totals() {
    let mut run = start(&mut Command::new(env!("CARGO_BIN_EXE_xfan-count")));
    let request = &run.primary.request;
    assert_eq!((request.member.as_deref(), request.token.as_deref()), (Some("default/0"), Some("secret")));
    run.primary.send_frame(0, &udp(false));
    run.await_commits(1);
    run.signal(Signal::SIGTERM);
    run.await_detach();
    run.primary.send_frame(1, &[0; FRAME]);
    let counters = run.primary.up.clone();
    let (output, out, err) = run.close();
    assert!(output.status.success(), "{err}");
    let sum = 0x0a00_0001 + 0x0a00_0002 + 0x1000_0035;
    let expected =
        format!("{{\"bytes\":128,\"checksum\":{sum},\"member\":\"default/0\",\"other\":1,\"packets\":2}}\n");
    assert_eq!(out, expected);
    let seen: Vec<_> = counters.published_counters().collect();
    assert_eq!(seen, [("packets".into(), 2), ("bytes".into(), 128)]);
}

#[test]
fn a_second_signal_terminates_at_once() {
    let mut run = start(&mut Command::new(env!("CARGO_BIN_EXE_xfan-count")));
    run.primary.send_frame(0, &udp(false));
    run.await_commits(1);
    run.signal(Signal::SIGINT);
    run.await_detach();
    run.signal(Signal::SIGTERM);
    let status = run.worker.wait().unwrap();
    assert_eq!(status.code(), Some(128 + 15));
}

#[test]
fn flow_writes_its_records_when_the_dispatcher_dies() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("{member}.jsonl");
    let mut run = start(Command::new(env!("CARGO_BIN_EXE_xfan-flow")).arg("--output").arg(&template));
    run.primary.send_frame(1, &udp(true));
    run.primary.send_frame(0, &udp(false));
    run.primary.send_frame(0, &[0xff; FRAME]);
    run.await_commits(3);
    let Run { primary, worker } = run;
    let counters = primary.up.clone();
    drop(primary);
    let output = worker.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err.contains(
            "xfan-flow default/0: packets in flows 2, flows written 1 (expired 0, evicted 0), packets of no flow 1 "
        ),
        "{err}"
    );
    assert!(err.contains("xfan-flow: the dispatcher is gone"), "{err}");
    let lines = fs::read_to_string(folder.path().join("default-0.jsonl")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&lines).unwrap();
    for (field, value) in [("proto", "udp"), ("member", "default/0")] {
        assert_eq!(record[field], value);
    }
    for (field, value) in [("packets", 2), ("bytes", 128)] {
        assert_eq!(record[field], value);
    }
    assert!(record["first"].as_f64() <= record["last"].as_f64() && record["first"].as_f64() > Some(1.6e9));
    let seen: Vec<_> = counters.published_counters().collect();
    assert!(seen.contains(&("packets_unparsed".into(), 1)), "{seen:?}");
}

#[test]
fn flow_writes_idle_flows_while_it_runs() {
    let mut run = start(Command::new(env!("CARGO_BIN_EXE_xfan-flow")).args(["--idle-timeout", "10ms"]));
    run.primary.send_frame(0, &udp(false));
    while !run.primary.up.published_counters().any(|counter| counter == ("flows_expired".into(), 1)) {
        thread::yield_now();
    }
    let (output, out, err) = run.close();
    assert!(output.status.success() && err.contains("(expired 1, evicted 0)"), "{err}");
    assert_eq!(out.lines().count(), 1);
}

#[test]
fn bad_arguments_are_named() {
    for (arguments, message) in [
        (["--max-flows", "0"], "0 is not in 1..="),
        (["--idle-timeout", "soon"], "invalid value 'soon' for '--idle-timeout"),
        (["--socket", "/nonexistent/a.sock"], "no dispatcher listens on /nonexistent/a.sock"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_xfan-flow")).args(arguments).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && err.contains(message), "{err}");
    }
}
