//! IP: protocol numbers, IPv6 extension headers, the length of jumbograms.

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Protocol number of DCCP.
pub const DCCP: u8 = 33;
/// Protocol number of ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Protocol number of SCTP.
pub const SCTP: u8 = 132;
/// Protocol number of UDP-Lite.
pub const UDP_LITE: u8 = 136;

/// Largest number of IPv6 extension headers to walk. By RFC 8200, senders use at most these six:
/// hop-by-hop, destination twice, routing, fragment, authentication. The XDP program is compiled
/// with this limit. Each further header costs the kernel's verifier two thirds more steps: 177,000
/// with six and 495,000 with eight, of at most one million.
pub const MAX_EXTENSION_HEADERS: usize = 6;
/// Largest number of IPv6 hop-by-hop options to read in search of a jumbogram's length. Hosts send
/// one or two, plus padding. The XDP program is compiled with this limit.
pub const MAX_OPTIONS: usize = 8;
/// Protocol number of the IPv6 hop-by-hop options header.
pub(crate) const HOP_BY_HOP: u8 = 0;

/// Whether a protocol's header begins with two 16-bit ports.
#[inline(always)]
pub fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | DCCP | SCTP | UDP_LITE)
}

/// The payload length, in bytes, of an IPv6 packet whose header has length 0: the value of its
/// jumbo payload option, or 0 if it has none. `next` is the type of the header that `payload`
/// begins with.
pub(crate) fn jumbo_length(next: u8, payload: &[u8]) -> usize {
    const PAD_1: u8 = 0;
    const JUMBO_PAYLOAD: u8 = 0xc2;
    let (HOP_BY_HOP, [_, units, ..]) = (next, payload) else { return 0 };
    let end = (8 + usize::from(*units) * 8).min(payload.len());
    let mut options = &payload[2..end];
    for _ in 0..MAX_OPTIONS {
        let length = match options {
            [PAD_1, ..] => 1,
            [JUMBO_PAYLOAD, 4, a, b, c, d, ..] => return u32::from_be_bytes([*a, *b, *c, *d]) as usize,
            [_, length, ..] => 2 + usize::from(*length),
            _ => break,
        };
        options = options.get(length..).unwrap_or_default();
    }
    0
}

/// Walks IPv6 extension headers. Returns the protocol after them, whether the packet is a fragment,
/// and the bytes after the headers. If the packet is cut off within a header, or the chain is too
/// long, returns the protocol of the first header that was not read.
pub(crate) fn skip_extension_headers(first: u8, mut rest: &[u8]) -> (u8, bool, &[u8]) {
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    let mut protocol = first;
    for _ in 0..MAX_EXTENSION_HEADERS {
        let length = match (protocol, rest) {
            (HOP_BY_HOP | ROUTING | DESTINATION, [_, units, ..]) => 8 + usize::from(*units) * 8,
            (AUTHENTICATION, [_, units, ..]) => 8 + usize::from(*units) * 4,
            (FRAGMENT, [next, _, high, low, _, _, _, _, behind @ ..]) => {
                // 13 bits of offset, 2 reserved bits, 1 "more" bit. If offset and "more" are 0, the
                // packet is an atomic fragment: a complete datagram.
                if u16::from_be_bytes([*high, *low]) & 0xfff9 != 0 {
                    return (*next, true, behind);
                }
                8
            }
            _ => break,
        };
        let Some(behind) = rest.get(length..) else { break };
        (protocol, rest) = (rest[0], behind);
    }
    (protocol, false, rest)
}
