//! The conversation on the control socket: `SOCK_SEQPACKET`, one JSON value per message, descriptors as `SCM_RIGHTS`.
//!
//! A worker sends [`Request::Attach`] and gets [`Reply::Attached`] with four descriptors, in this
//! order: the packet memory (read-only), its down segment (read-only), its up segment, the
//! sleeper's end of its [`bell`](crate::bell). It maps them, seals its own, and sends [`Request::Ready`]; with
//! [`Reply::Joined`] packets come. The connection stays open for as long as the worker works; its
//! end is the end of the worker.
//!
//! A worker that the dispatcher started need not connect: it inherits a descriptor that is
//! connected already ([`ENV_CONTROL_FD`]). Through it, [`Request::Connect`] gets a connection of
//! its own, by [`Reply::Connected`]: others may have the inherited descriptor too, such as the
//! shell that started the worker, and it would not hang up with the worker.
//!
//! An operator's tool sends [`Request::Stats`] and gets [`Reply::Stats`], likewise
//! [`Request::Events`], or [`Request::Workers`] and gets [`Reply::Ordered`].

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::layout::Geometry;
use crate::limits::explained;

/// Where the primary of an interface listens, unless its configuration says otherwise.
#[must_use]
pub fn default_socket(interface: &str) -> PathBuf {
    Path::new("/run/xfan").join(format!("{interface}.sock"))
}

/// Environment: where the control socket is.
pub const ENV_SOCKET: &str = "XFAN_SOCKET";
/// Environment: the member that a supervised worker is to take, such as `default/0`.
pub const ENV_MEMBER: &str = "XFAN_MEMBER";
/// Environment: what proves that a process was started for that member.
pub const ENV_TOKEN: &str = "XFAN_TOKEN";
/// Environment: the descriptor that a supervised worker has inherited, connected to the dispatcher.
pub const ENV_CONTROL_FD: &str = "XFAN_CONTROL_FD";
/// Environment: for how many seconds a worker whose primary has died is to look for the next one; not set: it is to end.
pub const ENV_SURVIVE: &str = "XFAN_SURVIVE";

/// Longest request, in bytes. Replies may be longer.
pub const MAX_REQUEST: usize = 16 << 10;
/// Longest reply, in bytes.
pub const MAX_REPLY: usize = 4 << 20;
/// Descriptors that come with [`Reply::Attached`].
pub const ATTACHED_FDS: usize = 4;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Become a member.
    Attach(Attach),
    /// The segments are mapped, and the worker has sealed its own
    /// ([`seal_against_further_writers`](crate::segment::seal_against_further_writers)): let packets
    /// come.
    Ready,
    /// Another connection to the dispatcher; through an inherited one only.
    Connect,
    /// Leave: no more packets, please; [`Phase::Closing`](crate::layout::Phase::Closing) follows when the last is in the rings.
    Detach,
    /// Report on everything.
    Stats,
    /// What happened after the entry of this number; 0: all that is kept.
    Events(u64),
    /// Change who works; for root.
    Workers(WorkersOrder),
}

/// What an operator wants of the workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkersOrder {
    /// Start so many more.
    Add(usize),
    /// Give this member no new packets; when it has finished what it has, it leaves, and stays away.
    Drain(String),
    /// The same, and then start it again.
    Restart(String),
    /// The same, and then give up its place, to whoever comes.
    Remove(String),
}

/// A worker introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// [`VERSION`](crate::layout::VERSION) of the worker.
    pub version: u32,
    /// The group to join; none: the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The member whose place it takes, such as `default/0`; none: any vacant one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// Proof that it may, from [`ENV_TOKEN`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Name of its program, for people.
    pub program: String,
}

/// What the dispatcher answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Welcome.
    Attached(Attached),
    /// The worker is a member: packets come.
    Joined,
    /// A new connection, with the reply as its only descriptor.
    Connected,
    /// No.
    Refused(Refusal),
    /// The report, see the documentation of `xfan stats --json`.
    Stats(serde_json::Value),
    /// A part of the journal, see the documentation of `xfan events --json`.
    Events(serde_json::Value),
    /// An operator's order is being carried out, on these members.
    Ordered(Vec<String>),
}

/// All that a worker needs, beside the descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The member it is now, such as `default/0`.
    pub member: String,
    /// Interface names; a descriptor's `port` is an index into them.
    pub ports: Vec<String>,
    /// Sizes of its segments.
    #[serde(flatten)]
    pub geometry: Geometry,
    /// Length of the packet memory in bytes.
    pub umem_bytes: u64,
    /// The core it is to run on.
    pub core: Option<usize>,
    /// How long to spin when there is nothing to do, in nanoseconds.
    pub spin_ns: u64,
    /// How long to yield after that, in nanoseconds, before sleeping.
    pub yield_ns: u64,
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people: a sentence.
    pub message: String,
}

/// Kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The two speak different versions.
    Version,
    /// There is no such member.
    UnknownMember,
    /// There is no such group.
    UnknownGroup,
    /// There is nothing to be done, or no way to do it.
    Impossible,
    /// The member has a worker, or all have.
    Occupied,
    /// This user or process may not.
    Forbidden,
    /// The message made no sense here.
    Malformed,
    /// The dispatcher is stopping.
    Closing,
}

/// A message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The other side has closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// A message longer than allowed.
    #[error("a message longer than {0} bytes")]
    TooLong(usize),
    /// Not what was expected.
    #[error("a message that makes no sense: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The other side will not.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// The system call failed.
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
    /// Whether a non-blocking socket had nothing, or no room.
    pub fn would_block(&self) -> bool {
        matches!(self, ProtocolError::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether a message did not fit the send buffer, however empty.
    pub fn is_too_long(&self) -> bool {
        matches!(self, ProtocolError::Io(error) if error.raw_os_error() == Some(Errno::EMSGSIZE as i32))
    }
}

/// Sends one message with descriptors.
///
/// # Errors
/// [`ProtocolError::Closed`], [`ProtocolError::Io`] (also when a non-blocking socket has no room)
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

/// Sends a request and receives the answer, with its descriptors.
///
/// # Errors
/// [`ProtocolError`]
pub fn ask(socket: impl AsFd, request: &Request) -> Result<(Reply, Vec<OwnedFd>), ProtocolError> {
    // Who refuses a connection may have hung up before the request came. Its word is there all the same …
    match send(&socket, request, &[]) {
        Ok(()) | Err(ProtocolError::Closed) => {}
        Err(error) => return Err(error),
    }
    match receive(&socket, MAX_REPLY) {
        // … behind an error that the kernel tells once, and first (unix(7): ECONNRESET).
        Err(ProtocolError::Closed) => receive(&socket, MAX_REPLY),
        result => result,
    }
}

/// Receives one message of at most `limit` bytes, and its descriptors. Descriptors beyond
/// [`ATTACHED_FDS`] are closed by the kernel, those the caller does not want by dropping them.
///
/// # Errors
/// [`ProtocolError`]
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

/// One message: its length, whether it was cut off, and its descriptors. nix gives no descriptors when there were too many of
/// them, or too many files open, and leaves open those that fitted: a peer could use them all up. Hence libc.
fn receive_bytes(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> Result<(usize, bool, Vec<OwnedFd>), ProtocolError> {
    /// Room for the descriptors, aligned as control messages are.
    #[repr(C)]
    union Control {
        _header: libc::cmsghdr,
        bytes: [u8; 64],
    }
    #[allow(clippy::cast_possible_truncation)] // 16
    const FDS_BYTES: u32 = (ATTACHED_FDS * size_of::<RawFd>()) as u32;
    // SAFETY: pure arithmetic.
    const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(FDS_BYTES) } as usize;
    const _: () = assert!(CONTROL_BYTES <= size_of::<Control>());

    let mut control = Control { bytes: [0; 64] };
    let mut buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a struct of integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut buffer;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let length = loop {
        // SAFETY: the header points to `bytes` and `control`, with their lengths; both outlive the call.
        let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(length) {
            Ok(length) => break length,
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last().into()),
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled in `message` and as much of `control` as its `msg_controllen` says; the walk
    // stays within that.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the walk gives null or a whole header in `control`.
        let found = unsafe { header.read() };
        if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: pure arithmetic.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (found.cmsg_len as usize).saturating_sub(empty) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: `count` descriptors follow the header, and need not be aligned; the kernel has just installed
                // them for us, so nobody else owns them.
                fds.push(unsafe {
                    OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().add(index).read_unaligned())
                });
            }
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    // Fewer than there was room for: this process may have no more open.
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
    fn messages_and_descriptors_arrive_whole() {
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
    fn what_is_wrong_has_a_name() {
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
    fn a_refusal_is_heard_also_of_one_that_has_hung_up_without_listening() {
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
    fn more_descriptors_than_wanted_are_all_closed() {
        let (a, b) = pair();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send(&a, &Request::Stats, &[writer.as_fd(); ATTACHED_FDS + 3]).unwrap();
        drop(writer);
        let (_, fds) = receive::<Request>(&b, MAX_REQUEST).unwrap();
        assert_eq!(fds.len(), ATTACHED_FDS);
        drop(fds);
        // The end of the file, which only comes when nobody has the writing end any more.
        assert_eq!(io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
    }
}
