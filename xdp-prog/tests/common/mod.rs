//! Network namespaces, veth pairs and raw sockets for the tests of this crate.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod frame;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs `test` on a thread in a network namespace of its own. The kernel removes the namespace and
/// everything in it when the test ends, also if it fails. Without the required privileges, prints
/// why it skips the test, or fails it if XFAN_REQUIRE_E2E=1 forbids skipping.
pub fn in_own_namespace(test: impl FnOnce() + Send + 'static) {
    let test = move || {
        if let Err(reason) = enter_new_namespace() {
            let required = std::env::var("XFAN_REQUIRE_E2E").is_ok_and(|value| value == "1");
            assert!(!required, "XFAN_REQUIRE_E2E=1, but {reason}");
            eprintln!("skipped: {reason}");
            return;
        }
        test();
    };
    if let Err(panic) = thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

fn enter_new_namespace() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|errno| format!("cannot create a network namespace ({errno}); run as root"))?;
    xdp_socket().map_err(|error| format!("this kernel has no AF_XDP sockets ({error})"))?;
    match xfan_xdp::SteerProgram::load(1, &[], 1792) {
        Err(error @ xfan_xdp::LoadError::Privilege { .. }) => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// One end of a veth pair.
pub const NIC: &str = "nic";
/// The other end of the veth pair.
pub const PEER: &str = "peer";

/// Creates a veth pair whose ends have `queues` queues each and send nothing on their own, and sets
/// it up. Returns the index of `NIC`.
pub fn make_veth(queues: u32) -> u32 {
    let queues = queues.to_string();
    let ends = ["numrxqueues", &queues, "numtxqueues", &queues];
    run(
        "ip",
        &[&["link", "add", NIC], &ends[..], &["type", "veth", "peer", "name", PEER], &ends[..]].concat(),
    );
    for end in [NIC, PEER] {
        // Otherwise the kernel would send router solicitations and multicast reports.
        fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1").unwrap();
        run("ip", &["link", "set", end, "arp", "off", "up"]);
    }
    index_of(NIC)
}

/// Index of an interface in this thread's network namespace.
pub fn index_of(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).unwrap()
}

/// Runs a command that must succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {stderr}", arguments.join(" "));
}

/// An AF_XDP socket that is not bound, which is enough for an entry of the socket map.
pub fn xdp_socket() -> io::Result<OwnedFd> {
    socket(libc::AF_XDP, 0)
}

/// A socket that sends whole frames.
pub struct FrameSender {
    socket: OwnedFd,
    to: libc::sockaddr_ll,
}

impl FrameSender {
    pub fn new(interface: &str) -> Self {
        let to = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).unwrap(),
            sll_protocol: 0,
            sll_ifindex: i32::try_from(index_of(interface)).unwrap(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        Self { socket: socket(libc::AF_PACKET, 0).unwrap(), to }
    }

    pub fn send(&self, frame: &[u8]) {
        let to_bytes = libc::socklen_t::try_from(size_of_val(&self.to)).unwrap();
        // SAFETY: sendto(2) requires pointers to as many bytes as the lengths say: those of `frame`
        // and `to`, which outlive the call.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const self.to).cast(),
                to_bytes,
            )
        };
        assert_eq!(usize::try_from(sent), Ok(frame.len()), "{}", io::Error::last_os_error());
    }
}

fn socket(family: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `from_raw_fd` requires an open descriptor without another owner: the call returned a
    // new one.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
