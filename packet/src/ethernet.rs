//! Ethernet: the ethertype behind the VLAN tags.

/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of IPv6.
pub const IPV6: u16 = 0x86dd;

/// Largest number of VLAN tags to skip: one, or a service tag and a customer tag (QinQ). The XDP
/// program is compiled with this limit.
pub const MAX_VLAN_TAGS: usize = 2;

/// The ethertype of a frame behind at most [`MAX_VLAN_TAGS`] tags, and the offset of its payload in
/// bytes, which is at most the frame's length. `None` if the frame ends before its ethertype.
pub fn ethertype(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = 12;
    for _ in 0..MAX_VLAN_TAGS {
        let ethertype = u16::from_be_bytes(*frame.get(at..)?.first_chunk()?);
        if !matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            return Some((ethertype, at + 2));
        }
        at += 4;
    }
    Some((u16::from_be_bytes(*frame.get(at..)?.first_chunk()?), at + 2))
}
