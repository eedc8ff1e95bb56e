//! Packet parsing: the flow that a frame belongs to, and the payload of its packet.
//!
//! The dispatcher and its workers must agree on what a flow is, so both read frames with
//! [`Packet::parse`]. The crate does no I/O and allocates nothing. No input makes it panic.
//!
//! - It reads Ethernet, up to two VLAN tags (802.1Q, 802.1ad), and IPv4 or IPv6. It walks IPv6
//!   extension headers.
//! - TCP, UDP, UDP-Lite, SCTP and DCCP have ports. Packets of other protocols have ports 0.
//! - A packet ends where its IP header says, or at the end of its frame if that comes first. The
//!   bytes after it are padding or a trailer, which are never read as ports. IPv6 with a payload
//!   length of 0 is empty unless a jumbo payload option (RFC 2675) gives the length. IPv4 with a
//!   total length of 0, which segmentation offload leaves behind, ends with its frame.
//! - A fragment, including the first, has ports 0, so that all fragments of a datagram have the
//!   same key.
//! - VLAN tags are not part of the key, so a mirrored flow whose directions carry different tags
//!   is one flow.
//!
//! # Examples
//!
//! ```
//! use xfan_packet::{Packet, UDP};
//!
//! # let mut frame = vec![2; 12];
//! # frame.extend([0x08, 0x00]);
//! # frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
//! # frame.extend([0x12, 0x34, 0, 53, 0, 8, 0, 0]);
//! // `frame` holds a UDP datagram from 10.0.0.1:4660 to 10.0.0.2:53.
//! let packet = Packet::parse(&frame).expect("an IP packet");
//! assert_eq!((packet.key.protocol, packet.key.destination_port), (UDP, 53));
//! assert_eq!(packet.payload.len(), 8);
//! // Both directions have one canonical key.
//! assert_eq!(packet.key.canonical().0, packet.key.reversed().canonical().0);
//! ```

#![forbid(unsafe_code)]

pub mod ethernet;
pub mod flow;
pub mod ip;

use std::net::IpAddr;

use ip::{jumbo_length, skip_extension_headers};

pub use ethernet::{IPV4, IPV6, ethertype};
pub use flow::FlowKey;
pub use ip::{DCCP, ICMP, ICMPV6, SCTP, TCP, UDP, UDP_LITE, has_ports};

/// The IP packet in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The flow that the packet belongs to.
    pub key: FlowKey,
    /// Whether the packet is a fragment of a datagram.
    pub fragment: bool,
    /// The bytes after the IP headers that belong to the packet and are in the frame.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Reads an Ethernet frame. Returns `None` if it is not IP, or is cut off within the IP header.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let (ethertype, offset) = ethertype(frame)?;
        let datagram = &frame[offset..];
        match ethertype {
            IPV4 => Self::parse_v4(datagram),
            IPV6 => Self::parse_v6(datagram),
            _ => None,
        }
    }

    fn parse_v4(datagram: &'a [u8]) -> Option<Self> {
        let header: &[u8; 20] = datagram.first_chunk()?;
        let header_bytes = usize::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || header_bytes < 20 {
            return None;
        }
        // Segmentation offload leaves a total length of 0 behind. The packet then ends with its
        // frame.
        let total = match be16(header, 2) {
            0 => datagram.len(),
            total => usize::from(total).min(datagram.len()),
        };
        let behind = datagram.get(header_bytes..)?;
        let payload = behind.get(..total.saturating_sub(header_bytes)).unwrap_or(&[]);
        let fragment = be16(header, 6) & 0x3fff != 0;
        let address = |at: usize| IpAddr::from([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Some(Self::new(address(12), address(16), header[9], fragment, payload))
    }

    fn parse_v6(datagram: &'a [u8]) -> Option<Self> {
        let header: &[u8; 40] = datagram.first_chunk()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let behind = &datagram[40..];
        let length = match be16(header, 4) {
            0 => jumbo_length(header[6], behind),
            length => length.into(),
        };
        let payload = behind.get(..length).unwrap_or(behind);
        let (protocol, fragment, payload) = skip_extension_headers(header[6], payload);
        let address = |at: usize| {
            let mut octets = [0; 16];
            octets.copy_from_slice(&header[at..at + 16]);
            IpAddr::from(octets)
        };
        Some(Self::new(address(8), address(24), protocol, fragment, payload))
    }

    fn new(source: IpAddr, destination: IpAddr, protocol: u8, fragment: bool, payload: &'a [u8]) -> Self {
        let (source_port, destination_port) = match payload.first_chunk::<4>() {
            Some(ports) if has_ports(protocol) && !fragment => (be16(ports, 0), be16(ports, 2)),
            _ => (0, 0),
        };
        let key = FlowKey { source, destination, source_port, destination_port, protocol };
        Packet { key, fragment, payload }
    }

    /// The TCP flags: the 8 bits from CWR to FIN. `None` if the packet is not TCP, is a fragment,
    /// or is cut off before the flags.
    pub fn tcp_flags(&self) -> Option<u8> {
        if self.key.protocol == TCP && !self.fragment { self.payload.get(13).copied() } else { None }
    }
}

/// Whether an Ethernet frame is shorter than the IP packet in it: the IP header, or the length that
/// it gives, extends beyond the frame. Such a packet was cut on the wire or by the driver. A frame
/// that is not IP is never cut.
pub fn is_cut(frame: &[u8]) -> bool {
    let Some((ethertype, offset)) = ethertype(frame) else { return false };
    let datagram = &frame[offset..];
    let length = match (ethertype, datagram.first().map(|byte| byte >> 4)) {
        (IPV4 | IPV6, None) => None,
        (IPV4, Some(4)) => datagram.first_chunk::<20>().map(|header| be16(header, 2).into()),
        (IPV6, Some(6)) => datagram.first_chunk::<40>().map(|header| match be16(header, 4) {
            0 => jumbo_length(header[6], &datagram[40..]).saturating_add(40),
            length => usize::from(length) + 40,
        }),
        _ => return false,
    };
    length.is_none_or(|length| length > datagram.len())
}

/// The big-endian number at byte `at`, which must lie within `bytes` together with the next byte.
#[inline(always)]
fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests;
