//! Any message on the control socket is a request, a reply, or an error that names the fault.

#![no_main]

use std::os::fd::AsRawFd;

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use xfan_shm::protocol::{MAX_REPLY, MAX_REQUEST, ProtocolError, Reply, Request, receive};

fuzz_target!(|message: &[u8]| {
    let (peer, ours) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let put = || send(peer.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL).is_ok();
    if put() {
        match receive::<Request>(&ours, MAX_REQUEST) {
            // Decoding what was encoded returns the same message.
            Ok((request, fds)) => {
                assert!(fds.is_empty());
                xfan_shm::protocol::send(&peer, &request, &[]).unwrap();
                assert_eq!(receive::<Request>(&ours, MAX_REPLY).unwrap().0, request);
            }
            Err(ProtocolError::Closed) => assert!(message.is_empty()),
            Err(ProtocolError::TooLong(limit)) => assert!(message.len() > limit),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    if put() {
        let _ = receive::<Reply>(&ours, MAX_REPLY);
    }
});
