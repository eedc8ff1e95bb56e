//! Ethernet: the ethertype behind the VLAN tags.

/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of IPv6.
pub const IPV6: u16 = 0x86dd;

/// The ethertype of a frame behind up to two VLAN tags, and the offset of its payload in bytes,
/// which is at most the frame's length. `None` if the frame ends before its ethertype.
pub fn ethertype(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = 12;
    for _ in 0..2 {
        let ethertype = u16::from_be_bytes(*frame.get(at..)?.first_chunk()?);
        if !matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            return Some((ethertype, at + 2));
        }
        at += 4;
    }
    Some((u16::from_be_bytes(*frame.get(at..)?.first_chunk()?), at + 2))
}
