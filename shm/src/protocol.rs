//! The protocol on the control socket: `SOCK_SEQPACKET`, one JSON value per message, descriptors as
//! `SCM_RIGHTS`.
//!
//! A worker sends [`Request::Attach`] and receives [`Reply::Attached`] with four descriptors, in
//! this order: the packet memory (read-only), its down segment (read-only), its up segment, and the
//! sleeper's end of its [`bell`](crate::bell). The worker maps the segments, seals its own, and
//! sends [`Request::Ready`]. After [`Reply::Joined`], lanes send packets. The connection stays open
//! as long as the worker is a member: closing it ends the membership.
//!
//! A worker that the dispatcher started inherits a connected descriptor ([`ENV_CONTROL_FD`]). Other
//! processes may hold copies of that descriptor, such as the shell that started the worker, so it
//! may stay open after the worker's death. The worker therefore sends [`Request::Connect`] through
//! it, and receives a connection of its own with [`Reply::Connected`].
//!
//! An operator's tool sends [`Request::Stats`], [`Request::Events`] or [`Request::Workers`], and
//! receives [`Reply::Stats`], [`Reply::Events`] or [`Reply::Ordered`].

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::layout::Geometry;
use crate::limits::explained;

/// The default path of the control socket of an interface's dispatcher.
///
/// # Examples
///
/// ```
/// use std::path::Path;
/// use xfan_shm::protocol::default_socket;
///
/// assert_eq!(default_socket("eth1"), Path::new("/run/xfan/eth1.sock"));
/// ```
#[must_use]
pub fn default_socket(interface: &str) -> PathBuf {
    Path::new("/run/xfan").join(format!("{interface}.sock"))
}

/// Environment variable: path of the control socket.
pub const ENV_SOCKET: &str = "XFAN_SOCKET";
/// Environment variable: the member that a supervised worker should become, such as `default/0`.
pub const ENV_MEMBER: &str = "XFAN_MEMBER";
/// Environment variable: a token that proves that the process was started for that member.
pub const ENV_TOKEN: &str = "XFAN_TOKEN";
/// Environment variable: number of the inherited descriptor that is connected to the dispatcher.
pub const ENV_CONTROL_FD: &str = "XFAN_CONTROL_FD";
/// Environment variable: for how many seconds a worker should look for the next dispatcher when its
/// own is gone. If it is not set, the worker should exit.
pub const ENV_SURVIVE: &str = "XFAN_SURVIVE";

/// Longest request, in bytes. Requests hold a few names, and the dispatcher allocates this much for
/// whoever may connect.
pub const MAX_REQUEST: usize = 16 << 10;
/// Longest reply, in bytes. A report has some kilobytes for each lane and member.
pub const MAX_REPLY: usize = 4 << 20;
/// Number of descriptors sent with [`Reply::Attached`].
pub const ATTACHED_FDS: usize = 4;

/// A request of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Makes the client a member.
    Attach(Attach),
    /// Has lanes send packets: the worker has mapped the segments and sealed its own
    /// ([`seal_against_further_writers`](crate::segment::seal_against_further_writers)).
    Ready,
    /// Asks for another connection to the dispatcher. Valid on an inherited connection only.
    Connect,
    /// Ends the membership. The dispatcher sends no more packets, and sets
    /// [`Phase::Closing`](crate::layout::Phase::Closing) once the last one is in the rings.
    Detach,
    /// Asks for the report.
    Stats,
    /// Asks for the entries of the event history after the one with this number; 0 for all that are
    /// kept.
    Events(u64),
    /// Starts, drains, restarts or removes workers. For root only.
    Workers(WorkersOrder),
}

/// An operator's order about workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkersOrder {
    /// Starts this many more workers.
    Add(usize),
    /// Drains this member: sends it no new packets, lets its worker finish, and does not restart
    /// it.
    Drain(String),
    /// Drains this member, then starts its worker again.
    Restart(String),
    /// Drains this member, then frees its slot, so that any worker may attach as this member.
    Remove(String),
}

impl fmt::Display for WorkersOrder {
    /// As on the command line, such as `drain default/0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkersOrder::Add(count) => write!(f, "add {count}"),
            WorkersOrder::Drain(member) => write!(f, "drain {member}"),
            WorkersOrder::Restart(member) => write!(f, "restart {member}"),
            WorkersOrder::Remove(member) => write!(f, "remove {member}"),
        }
    }
}

/// The introduction of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The worker's [`VERSION`](crate::layout::VERSION).
    pub version: u32,
    /// The group to join. `None`: the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The member to become, such as `default/0`. `None`: any vacant one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// The token that proves that the worker was started for that member, from [`ENV_TOKEN`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Name of the worker's program, for logs and reports.
    pub program: String,
}

/// A reply of the dispatcher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The worker is accepted. [`ATTACHED_FDS`] descriptors come with this reply.
    Attached(Attached),
    /// The worker is a member, and lanes send packets.
    Joined,
    /// A new connection, which is the only descriptor that comes with this reply.
    Connected,
    /// The request is refused.
    Refused(Refusal),
    /// The report, as `xfan stats --json` documents it.
    Stats(serde_json::Value),
    /// Entries of the event history, as `xfan events --json` documents them.
    Events(serde_json::Value),
    /// The order is being carried out on these members.
    Ordered(Vec<String>),
}

/// What a worker must know, besides the descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The member that the worker now is, such as `default/0`.
    pub member: String,
    /// Names of the interfaces. A descriptor's `port` is an index into them.
    pub ports: Vec<String>,
    /// Geometry of the worker's segments.
    #[serde(flatten)]
    pub geometry: Geometry,
    /// Length of the packet memory in bytes.
    pub umem_bytes: u64,
    /// The core to run on, if the dispatcher assigns one.
    pub core: Option<usize>,
    /// How long to spin while the rings are empty, in nanoseconds.
    pub spin_ns: u64,
    /// How long to yield after that and before sleeping, in nanoseconds.
    pub yield_ns: u64,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind of refusal, for programs.
    pub code: RefusalCode,
    /// The reason, as a sentence for people.
    pub message: String,
}

/// The kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// Worker and dispatcher have different versions.
    Version,
    /// No member has that name.
    UnknownMember,
    /// No group has that name.
    UnknownGroup,
    /// The order cannot be carried out in the member's current state.
    Impossible,
    /// The member already has a worker, or every member has one.
    Occupied,
    /// The user or process has no permission.
    Forbidden,
    /// The message is invalid, or not expected at this point.
    Malformed,
    /// The dispatcher is stopping.
    Closing,
}

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The peer closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The message is longer than the limit, in bytes.
    #[error("received a message longer than {0} bytes")]
    TooLong(usize),
    /// The message is not JSON, or not of the expected type.
    #[error("received an invalid message: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The peer refused the request.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// A system call failed.
    #[error("control socket: {}", explained(.0))]
    Io(#[from] io::Error),
}

impl From<Errno> for ProtocolError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ECONNRESET | Errno::EPIPE => ProtocolError::Closed,
            _ => ProtocolError::Io(errno.into()),
        }
    }
}

impl ProtocolError {
    /// Whether a non-blocking socket had no message to receive, or its send buffer was full. On a
    /// blocking socket: whether its timeout expired.
    pub fn would_block(&self) -> bool {
        matches!(self, ProtocolError::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether a message is longer than the send buffer, even an empty one.
    pub fn is_too_long(&self) -> bool {
        matches!(self, ProtocolError::Io(error) if error.raw_os_error() == Some(Errno::EMSGSIZE as i32))
    }
}

/// Sends one message, with copies of the descriptors `fds`.
///
/// # Errors
/// [`ProtocolError::Closed`] if the peer has closed the connection. [`ProtocolError::Io`] if the
/// system call fails, also because the send buffer of a non-blocking socket is full.
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ProtocolError> {
    let bytes = serde_json::to_vec(message)?;
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Sends a request and receives the reply with its descriptors.
///
/// # Errors
/// As [`send`] and [`receive`].
pub fn ask(socket: impl AsFd, request: &Request) -> Result<(Reply, Vec<OwnedFd>), ProtocolError> {
    // A dispatcher that refuses a connection may have closed it before the request was sent. Its
    // reply can still be received …
    match send(&socket, request, &[]) {
        Ok(()) | Err(ProtocolError::Closed) => {}
        Err(error) => return Err(error),
    }
    match receive(&socket, MAX_REPLY) {
        // … after an error that the kernel reports once, before the reply (unix(7): ECONNRESET).
        Err(ProtocolError::Closed) => receive(&socket, MAX_REPLY),
        result => result,
    }
}

/// Receives one message of at most `limit` bytes, and its descriptors. The kernel closes
/// descriptors beyond [`ATTACHED_FDS`].
///
/// # Errors
/// - [`ProtocolError::Closed`] if the peer has closed the connection.
/// - [`ProtocolError::TooLong`] if the message is longer than `limit`.
/// - [`ProtocolError::Malformed`] if the message is not a `T` in JSON.
/// - [`ProtocolError::Io`] if the system call fails, or if this process can open no more
///   descriptors.
pub fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
    limit: usize,
) -> Result<(T, Vec<OwnedFd>), ProtocolError> {
    let mut bytes = vec![0; limit];
    let (length, truncated, fds) = receive_bytes(socket.as_fd(), &mut bytes)?;
    if length == 0 {
        return Err(ProtocolError::Closed);
    }
    if truncated {
        return Err(ProtocolError::TooLong(limit));
    }
    Ok((serde_json::from_slice(&bytes[..length])?, fds))
}

/// Receives one message. Returns its length, whether it was truncated, and its descriptors.
///
/// This calls libc, because `nix::sys::socket::recvmsg` leaks descriptors: if the peer sends too
/// many, or this process can open no more, nix returns none and leaves those open that were
/// received. A peer could exhaust the process's descriptors in this way.
fn receive_bytes(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> Result<(usize, bool, Vec<OwnedFd>), ProtocolError> {
    /// A buffer for the descriptors, aligned for control messages.
    #[repr(C)]
    union Control {
        _header: libc::cmsghdr,
        bytes: [u8; 64],
    }
    #[allow(clippy::cast_possible_truncation)] // 16
    const FDS_BYTES: u32 = (ATTACHED_FDS * size_of::<RawFd>()) as u32;
    // SAFETY: `CMSG_SPACE` only computes a size. It is unsafe as a binding of a C macro.
    const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(FDS_BYTES) } as usize;
    const _: () = assert!(CONTROL_BYTES <= size_of::<Control>());

    let mut control = Control { bytes: [0; 64] };
    let mut buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: `zeroed` requires a type for which all zeros are valid: integers and raw pointers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut buffer;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let length = loop {
        // SAFETY: `recvmsg` requires a header whose pointers and lengths describe writable memory:
        // they describe `buffer`, through it `bytes`, and `control`, which all outlive the call.
        let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(length) {
            Ok(length) => break length,
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last().into()),
        }
    };
    let mut fds = Vec::new();
    // SAFETY: `CMSG_FIRSTHDR` requires a header that `recvmsg` has filled in: its `msg_controllen`
    // is the part of `control` that the kernel wrote.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: `read` requires a valid, aligned pointer: `CMSG_FIRSTHDR` and `CMSG_NXTHDR`
        // return null or an aligned header that lies within `control`.
        let found = unsafe { header.read() };
        if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: `CMSG_LEN` only computes a size.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (found.cmsg_len as usize).saturating_sub(empty) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the reads stay within the message, whose length says that `count`
                // descriptors follow the header; they need no alignment. `from_raw_fd` requires an
                // open descriptor without another owner: the kernel has just installed it.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().add(index).read_unaligned())
                });
            }
        }
        // SAFETY: as for `CMSG_FIRSTHDR`; `header` is a header of this message.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    // Descriptors were discarded although the buffer could hold more: this process can open no
    // more.
    if message.msg_flags & libc::MSG_CTRUNC != 0 && fds.len() < ATTACHED_FDS {
        return Err(Errno::EMFILE.into());
    }
    Ok((length, message.msg_flags & libc::MSG_TRUNC != 0, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    #[cfg_attr(miri, ignore = "sockets")]
    fn messages_and_descriptors_arrive_complete() {
        let (a, b) = pair();
        let request = Request::Attach(Attach {
            version: 1,
            group: None,
            member: Some("default/0".into()),
            token: None,
            program: "me".into(),
        });
        send(&a, &request, &[a.as_fd(), b.as_fd()]).unwrap();
        send(&a, &Request::Stats, &[]).unwrap();
        let (got, fds) = receive::<Request>(&b, MAX_REQUEST).unwrap();
        assert_eq!((got, fds.len()), (request, 2));
        let (got, fds) = receive::<Request>(&b, MAX_REQUEST).unwrap();
        assert_eq!((got, fds.len()), (Request::Stats, 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "sockets")]
    fn every_failure_has_its_own_error() {
        let (a, b) = pair();
        send(&a, &"x".repeat(100), &[]).unwrap();
        assert!(matches!(receive::<Request>(&b, 50), Err(ProtocolError::TooLong(50))));
        send(&a, &"hello", &[]).unwrap();
        assert!(matches!(receive::<Request>(&b, 50), Err(ProtocolError::Malformed(_))));
        drop(a);
        assert!(matches!(receive::<Request>(&b, 50), Err(ProtocolError::Closed)));
        assert!(matches!(send(&b, &1, &[]), Err(ProtocolError::Closed)));
    }

    #[test]
    #[cfg_attr(miri, ignore = "sockets")]
    fn a_refusal_before_the_hang_up_is_received() {
        for asked_before in [false, true] {
            let (a, b) = pair();
            if asked_before {
                send(&a, &Request::Detach, &[]).unwrap();
            }
            let refusal = Refusal { code: RefusalCode::Forbidden, message: "no".into() };
            send(&b, &Reply::Refused(refusal.clone()), &[]).unwrap();
            drop(b);
            assert_eq!(ask(&a, &Request::Stats).unwrap().0, Reply::Refused(refusal));
            assert!(matches!(ask(&a, &Request::Stats), Err(ProtocolError::Closed)));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "sockets")]
    fn excess_descriptors_are_closed() {
        let (a, b) = pair();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send(&a, &Request::Stats, &[writer.as_fd(); ATTACHED_FDS + 3]).unwrap();
        drop(writer);
        let (_, fds) = receive::<Request>(&b, MAX_REQUEST).unwrap();
        assert_eq!(fds.len(), ATTACHED_FDS);
        drop(fds);
        // End of file: every copy of the writing end is closed.
        assert_eq!(io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
    }
}
