//! Queries a link by its index. One RTM_GETLINK returns flags, MTU and counters. See rtnetlink(7).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

// The sizes of `struct nlmsghdr`, `struct ifinfomsg` and `struct rtattr` in bytes.
const MESSAGE_HEADER: usize = 16;
const LINK_HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// Masks out the type bits that mark an attribute as nested or as in network byte order.
const TYPE_MASK: u16 = 0x3fff;
/// As in linux/if_link.h.
const IFLA_XDP_ATTACHED: u16 = 2;
/// The size of the buffer for an answer in bytes: far more than one link needs. The request
/// excludes the data of virtual functions, which can be long.
const ANSWER: usize = 64 << 10;

/// The RX counters of `struct rtnl_link_stats64`: name, and index among its u64 fields.
const STATISTICS: [(&str, usize); 10] = [
    ("rx_packets", 0),
    ("rx_errors", 4),
    ("rx_dropped", 6),
    ("rx_length_errors", 10),
    ("rx_over_errors", 11),
    ("rx_crc_errors", 12),
    ("rx_frame_errors", 13),
    ("rx_fifo_errors", 14),
    ("rx_missed_errors", 15),
    ("rx_nohandler", 23),
];

/// The state of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The administrator has set the link up (`ip link set … up`).
    pub up: bool,
    /// The link has a carrier: its other end is up.
    pub carrier: bool,
    /// The link is in promiscuous mode.
    pub promiscuous: bool,
    /// An XDP program is attached.
    pub xdp: bool,
    /// The kernel's RX counters by name, and `carrier_lost`.
    pub counters: BTreeMap<String, u64>,
}

/// A netlink socket that queries one link.
#[derive(Debug)]
pub struct LinkSocket {
    socket: OwnedFd,
    index: u32,
    sequence: u32,
}

impl LinkSocket {
    /// Opens a socket to query the link with this index in the calling thread's network namespace.
    ///
    /// # Errors
    /// The errors of socket(2), connect(2) and setsockopt(2).
    pub fn of(index: u32) -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // The kernel has queued the answer when `send` returns. If it had no memory, `recv` times
        // out.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(1))?;
        Ok(LinkSocket { socket, index, sequence: 0 })
    }

    /// Queries the link.
    ///
    /// # Errors
    /// ENODEV if the link does not exist; any other error of the kernel; EAGAIN if no answer comes.
    pub fn ask(&mut self) -> io::Result<Link> {
        self.sequence = self.sequence.wrapping_add(1);
        send(self.socket.as_raw_fd(), &request(self.index, self.sequence), MsgFlags::empty())?;
        let mut answer = vec![0; ANSWER];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::MSG_TRUNC)?;
            let bytes = answer.get(..length).ok_or_else(|| invalid("the answer is too long"))?;
            // Skip late answers to earlier requests.
            if field(bytes, 8) == Some(self.sequence) {
                return parse(bytes);
            }
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("RTM_GETLINK: {what}"))
}

/// An RTM_GETLINK request for the link with this index.
fn request(index: u32, sequence: u32) -> [u8; MESSAGE_HEADER + LINK_HEADER] {
    let mut message = [0; MESSAGE_HEADER + LINK_HEADER];
    let mut put = |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &32u32.to_ne_bytes());
    put(4, &libc::RTM_GETLINK.to_ne_bytes());
    put(6, &1u16.to_ne_bytes()); // NLM_F_REQUEST
    put(8, &sequence.to_ne_bytes());
    put(MESSAGE_HEADER + 4, &index.to_ne_bytes());
    message
}

/// The u32 at this offset.
fn field(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The attributes in these bytes: type and value. Stops at the first truncated attribute.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, value))
    })
}

fn parse(message: &[u8]) -> io::Result<Link> {
    let kind = message.get(4..).and_then(<[u8]>::first_chunk).map(|kind| u16::from_ne_bytes(*kind));
    if kind == Some(2) {
        // NLMSG_ERROR: a negative error number.
        let code = field(message, MESSAGE_HEADER).ok_or_else(|| invalid("the error is truncated"))?;
        return Err(io::Error::from_raw_os_error(code.cast_signed().wrapping_neg()));
    }
    if kind != Some(libc::RTM_NEWLINK) {
        return Err(invalid("the answer is another message"));
    }
    let flags =
        field(message, MESSAGE_HEADER + 8).ok_or_else(|| invalid("the answer is truncated"))?.cast_signed();
    let mut link = Link { up: flags & libc::IFF_UP != 0, ..Link::default() };
    for (kind, value) in attributes(message.get(MESSAGE_HEADER + LINK_HEADER..).unwrap_or_default()) {
        let number = || field(value, 0).unwrap_or_default();
        match kind {
            libc::IFLA_MTU => link.mtu = number(),
            libc::IFLA_CARRIER => link.carrier = value.first().is_some_and(|&carrier| carrier != 0),
            libc::IFLA_PROMISCUITY => link.promiscuous = number() > 0,
            libc::IFLA_CARRIER_DOWN_COUNT => {
                link.counters.insert("carrier_lost".into(), number().into());
            }
            libc::IFLA_XDP => {
                let attached = |(kind, value): (u16, &[u8])| {
                    kind == IFLA_XDP_ATTACHED && value.first().is_some_and(|&mode| mode != 0)
                };
                link.xdp = attributes(value).any(attached);
            }
            libc::IFLA_STATS64 => {
                let (words, _) = value.as_chunks::<8>();
                let counter = |&(name, index): &(&str, usize)| {
                    Some((name.to_owned(), u64::from_ne_bytes(*words.get(index)?)))
                };
                link.counters.extend(STATISTICS.iter().filter_map(counter));
            }
            _ => {}
        }
    }
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap();
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// A message of the kernel with these flags and attributes.
    fn message(kind: u16, flags: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = request(5, 1).to_vec();
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[24..28].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(attributes.concat());
        bytes
    }

    #[test]
    fn the_loopback_is_up_and_has_every_counter() {
        let index = nix::net::if_::if_nametoindex("lo").unwrap();
        let mut socket = LinkSocket::of(index).unwrap();
        for _ in 0..2 {
            let link = socket.ask().unwrap();
            assert!(link.mtu > 0 && !link.xdp, "{link:?}");
            for (name, _) in STATISTICS {
                assert!(link.counters.contains_key(name), "{name}: {link:?}");
            }
        }
        let error = LinkSocket::of(0x7fff_fff0).unwrap().ask().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn flags_and_attributes_become_fields() {
        let statistics: Vec<u8> = (100..125u64).flat_map(u64::to_ne_bytes).collect();
        let attributes = [
            attribute(libc::IFLA_IFNAME, b"eth1\0"),
            attribute(libc::IFLA_MTU, &3000u32.to_ne_bytes()),
            attribute(libc::IFLA_CARRIER, &[1]),
            attribute(libc::IFLA_PROMISCUITY, &2u32.to_ne_bytes()),
            attribute(libc::IFLA_XDP | 0x8000, &attribute(IFLA_XDP_ATTACHED, &[1])),
            attribute(libc::IFLA_STATS64, &statistics),
        ];
        let whole = message(libc::RTM_NEWLINK, libc::IFF_UP.cast_unsigned(), &attributes);
        let link = parse(&whole).unwrap();
        let Link { mtu, up, carrier, promiscuous, xdp, counters } = &link;
        assert_eq!((*mtu, *up, *carrier, *promiscuous, *xdp), (3000, true, true, true, true));
        assert_eq!((counters["rx_dropped"], counters["rx_nohandler"]), (106, 123));
        // An older kernel has fewer counters, and a message may be truncated anywhere.
        for length in 0..whole.len() {
            let _ = parse(&whole[..length]);
        }
        let none = parse(&message(libc::RTM_NEWLINK, 0, &[attribute(libc::IFLA_XDP, &[])])).unwrap();
        assert_eq!(none, Link::default());
    }

    #[test]
    fn errors_of_the_kernel_are_returned() {
        let mut refused = message(2, 0, &[]);
        refused[16..20].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(parse(&refused).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(parse(&message(3, 0, &[])).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
