//! Builds frames from their headers: `v4(TCP, &ports(1234, 22))`.

#![allow(dead_code, reason = "each test binary uses a part")]

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const GRE: u8 = 47;
pub const ICMPV6: u8 = 58;
pub const SCTP: u8 = 132;
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AH: u8 = 51;
pub const DESTINATION_OPTIONS: u8 = 60;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A frame with MAC addresses, tags (the ethertype of each, outermost first), ethertype and
/// content.
pub fn ethernet(tags: &[u16], ethertype: u16, content: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for (id, tag) in (100_u16..).zip(tags) {
        frame.extend(tag.to_be_bytes());
        frame.extend(id.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(content);
    frame
}

/// An untagged IPv4 packet.
pub fn v4(protocol: u8, content: &[u8]) -> Vec<u8> {
    ethernet(&[], ETHERTYPE_IPV4, &ipv4(protocol, content))
}

/// An untagged IPv6 packet with hop limit 64.
pub fn v6(next: u8, content: &[u8]) -> Vec<u8> {
    ethernet(&[], ETHERTYPE_IPV6, &ipv6(next, 64, content))
}

pub fn ipv4(protocol: u8, content: &[u8]) -> Vec<u8> {
    ipv4_with(protocol, 0, 0, content)
}

/// An IPv4 packet. `offset` is the fragment offset in units of 8 bytes, `option_words` the length
/// of the options in units of 4 bytes. The checksum is 0, since nothing reads it.
pub fn ipv4_with(protocol: u8, offset: u16, option_words: u8, content: &[u8]) -> Vec<u8> {
    let words = 5 + option_words;
    let length = u16::try_from(usize::from(words) * 4 + content.len()).unwrap();
    let mut packet = vec![0x40 | words, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(offset.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.resize(usize::from(words) * 4, 1);
    packet.extend(content);
    packet
}

pub fn ipv6(next: u8, hop_limit: u8, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(content.len()).unwrap().to_be_bytes());
    packet.extend([next, hop_limit]);
    packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    packet.extend(content);
    packet
}

/// An IPv6 extension header of `8 * (1 + more)` bytes.
pub fn extension(next: u8, more: u8, content: &[u8]) -> Vec<u8> {
    let mut header = vec![next, more];
    header.resize(8 * (1 + usize::from(more)), 0);
    header.extend(content);
    header
}

/// An authentication header of `4 * (2 + words)` bytes.
pub fn authentication(next: u8, words: u8, content: &[u8]) -> Vec<u8> {
    let mut header = vec![next, words];
    header.resize(4 * (2 + usize::from(words)), 0);
    header.extend(content);
    header
}

/// An IPv6 fragment header. `offset` is in units of 8 bytes.
pub fn fragment(next: u8, offset: u16, content: &[u8]) -> Vec<u8> {
    let [high, low] = ((offset << 3) | 1).to_be_bytes();
    let mut header = vec![next, 0, high, low, 0, 0, 0, 1];
    header.extend(content);
    header
}

/// The ports that begin a TCP, UDP or SCTP header, and some more bytes.
pub fn ports(source: u16, destination: u16) -> Vec<u8> {
    let mut header = Vec::from(source.to_be_bytes());
    header.extend(destination.to_be_bytes());
    header.resize(20, 0);
    header
}

/// An ICMP or ICMPv6 message.
pub fn icmp(kind: u8) -> Vec<u8> {
    let mut message = vec![kind];
    message.resize(24, 0);
    message
}

/// A frame of this ethertype, such as ARP, padded to the minimum size.
pub fn padded(ethertype: u16) -> Vec<u8> {
    ethernet(&[], ethertype, &[0; 46])
}

/// The first `bytes` bytes of a frame.
pub fn cut(mut frame: Vec<u8>, bytes: usize) -> Vec<u8> {
    assert!(bytes < frame.len());
    frame.truncate(bytes);
    frame
}

/// An untagged frame with this length in its IP header: bytes 16 and 17 for IPv4, 18 and 19 for
/// IPv6.
pub fn with_length(mut frame: Vec<u8>, length: u16) -> Vec<u8> {
    let at = if frame[12..14] == ETHERTYPE_IPV4.to_be_bytes() { 16 } else { 18 };
    frame[at..at + 2].copy_from_slice(&length.to_be_bytes());
    frame
}

/// A hop-by-hop options header with these options, which must fill it.
pub fn hop_by_hop(next: u8, options: &[u8], content: &[u8]) -> Vec<u8> {
    assert_eq!(options.len() % 8, 6);
    let mut header = vec![next, u8::try_from(options.len() / 8).unwrap()];
    header.extend(options);
    header.extend(content);
    header
}

/// The frame with another value of one byte.
pub fn with_byte(mut frame: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    frame[at] = value;
    frame
}
