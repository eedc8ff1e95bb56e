//! `xfan events --follow` across primaries.

#![allow(unsafe_code, reason = "accept(2) returns a bare descriptor")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept, bind, listen, socket};
use xfan::control::history::{Entry, Page};
use xfan_shm::protocol::{self, MAX_REQUEST, Reply, Request};

fn page(primary: u32, numbers: std::ops::RangeInclusive<u64>) -> Page {
    let entry = |number| Entry {
        number,
        time_ns: 1_700_000_000_000_000_000,
        member: None,
        pid: primary,
        event: "running".into(),
        detail: String::new(),
    };
    Page { primary, entries: numbers.map(entry).collect(), missed: 0 }
}

#[test]
fn the_events_of_the_next_primary_follow_from_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    let follower = Command::new(env!("CARGO_BIN_EXE_xfan"))
        .args(["events", "--json", "--follow", "--socket"])
        .arg(&path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Primary 11 has recorded two events, and ends. Primary 22 has recorded three when it is asked.
    for (after, answer) in [(0, page(11, 1..=2)), (2, page(22, 3..=3)), (0, page(22, 1..=3))] {
        // SAFETY: accept(2) returned a new descriptor, which nobody else owns.
        let connection = unsafe { OwnedFd::from_raw_fd(accept(listener.as_raw_fd()).unwrap()) };
        let (request, _) = protocol::receive::<Request>(&connection, MAX_REQUEST).unwrap();
        assert_eq!(request, Request::Events(after));
        let answer = Reply::Events(serde_json::to_value(answer).unwrap());
        protocol::send(&connection, &answer, &[]).unwrap();
    }
    drop((listener, folder));
    let exit = follower.wait_with_output().unwrap();
    assert!(exit.status.success(), "{exit:?}");
    let lines = String::from_utf8(exit.stdout).unwrap();
    let entries = lines.lines().map(|line| serde_json::from_str::<Entry>(line).unwrap());
    let seen: Vec<_> = entries.map(|entry| (entry.pid, entry.number)).collect();
    assert_eq!(seen, [(11, 1), (11, 2), (22, 1), (22, 2), (22, 3)]);
}
