//! The pcapng format.

use std::io::BufRead;

use super::bytes::{Numbers, read_bytes, read_or_end, skip};
use super::{Failure, MAX_PACKET_BYTES, Packet, malformed, too_long};

pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;
pub(super) const INTERFACE_DESCRIPTION: u32 = 1;
/// The obsolete packet block.
pub(super) const PACKET: u32 = 2;
pub(super) const SIMPLE_PACKET: u32 = 3;
pub(super) const ENHANCED_PACKET: u32 = 6;
/// Bytes of a block's type, and of its length at both ends.
const BLOCK_FRAME: u32 = 12;
/// Bytes of the fixed part of an enhanced or obsolete packet block, without those of
/// [`BLOCK_FRAME`].
const PACKET_HEADER: usize = 20;
/// The longest block to read, in bytes with options, as in libpcap.
const MAX_BLOCK_BYTES: u32 = 1 << 24;

/// An interface description block of a pcapng file.
struct Interface {
    link_type: u32,
    /// 0: no limit.
    snap_bytes: u32,
    with_fcs: bool,
}

/// The current section: its byte order and the interfaces described so far.
pub(super) struct Section {
    numbers: Numbers,
    interfaces: Vec<Interface>,
}

impl Section {
    /// Reads a section header block after its type.
    pub(super) fn read(file: &mut dyn BufRead) -> Result<Self, Failure> {
        let mut length = [0; 4];
        file.read_exact(&mut length)?;
        Ok(Self { numbers: section_header(file, length)?, interfaces: Vec::new() })
    }

    /// Reads up to the next packet, of this section or a later one; `None` at the end of the file.
    pub(super) fn next_packet(&mut self, file: &mut dyn BufRead) -> Result<Option<Packet>, Failure> {
        loop {
            let mut head = [0; 8];
            if !read_or_end(file, &mut head)? {
                return Ok(None);
            }
            let kind = self.numbers.u32(&head, 0);
            if kind == SECTION_HEADER {
                self.numbers = section_header(file, [head[4], head[5], head[6], head[7]])?;
                self.interfaces.clear();
                continue;
            }
            let length = body_length(self.numbers.u32(&head, 4))?;
            if !matches!(kind, INTERFACE_DESCRIPTION | PACKET | SIMPLE_PACKET | ENHANCED_PACKET) {
                skip(file, length)?;
                block_end(file, self.numbers, length)?;
                continue;
            }
            if length > MAX_BLOCK_BYTES {
                return malformed(format!(
                    "a pcapng block is said to have {length} bytes: the file is broken"
                ));
            }
            let body = read_bytes(file, length)?;
            block_end(file, self.numbers, length)?;
            match kind {
                INTERFACE_DESCRIPTION => self.interfaces.push(interface(self.numbers, &body)?),
                SIMPLE_PACKET => return simple_packet(self.numbers, body, self.interfaces.first()).map(Some),
                _ => return packet(self.numbers, body, kind, &self.interfaces).map(Some),
            }
        }
    }
}

/// Reads a section header block after its type and length. The block also sets the byte order,
/// which applies to its own length.
fn section_header(file: &mut dyn BufRead, length: [u8; 4]) -> Result<Numbers, Failure> {
    let mut magic = [0; 4];
    file.read_exact(&mut magic)?;
    let numbers = match u32::from_be_bytes(magic) {
        0x1a2b_3c4d => Numbers::Big,
        0x4d3c_2b1a => Numbers::Little,
        _ => return malformed("a pcapng section has no byte order"),
    };
    let length = body_length(numbers.u32(&length, 0))?;
    if length < 16 {
        return malformed("a pcapng section header is too short");
    }
    skip(file, length - 4)?;
    block_end(file, numbers, length)?;
    Ok(numbers)
}

/// The length of a block without the bytes of [`BLOCK_FRAME`].
fn body_length(length: u32) -> Result<u32, Failure> {
    match length.checked_sub(BLOCK_FRAME) {
        Some(body) if body % 4 == 0 => Ok(body),
        _ => malformed(format!("a pcapng block is said to have {length} bytes: the file is broken")),
    }
}

fn block_end(file: &mut dyn BufRead, numbers: Numbers, body: u32) -> Result<(), Failure> {
    let mut length = [0; 4];
    file.read_exact(&mut length)?;
    match numbers.u32(&length, 0) == body + BLOCK_FRAME {
        true => Ok(()),
        false => malformed("the two lengths of a pcapng block differ: the file is broken"),
    }
}

fn interface(numbers: Numbers, body: &[u8]) -> Result<Interface, Failure> {
    const FCS_LENGTH: u16 = 13;
    if body.len() < 8 {
        return malformed("a pcapng interface description is too short");
    }
    let with_fcs = option(numbers, &body[8..], FCS_LENGTH).is_some_and(|value| value.first() > Some(&0));
    let (link_type, snap_bytes) = (numbers.u16(body, 0).into(), numbers.u32(body, 4));
    Ok(Interface { link_type, snap_bytes, with_fcs })
}

/// The value of the first option of this code.
fn option(numbers: Numbers, mut options: &[u8], wanted: u16) -> Option<&[u8]> {
    const END: u16 = 0;
    while options.len() >= 4 {
        let (code, length) = (numbers.u16(options, 0), usize::from(numbers.u16(options, 2)));
        match code {
            END => return None,
            _ if code == wanted => return options.get(4..4 + length),
            _ => options = options.get(4 + length.next_multiple_of(4)..)?,
        }
    }
    None
}

/// Reads a simple packet block. It has no captured length: the interface's snap length gives it.
/// The data is padded to 4 bytes.
fn simple_packet(
    numbers: Numbers,
    mut body: Vec<u8>,
    interface: Option<&Interface>,
) -> Result<Packet, Failure> {
    let Some(interface) = interface else { return malformed("the next packet has no interface") };
    if body.len() < 4 {
        return malformed("a pcapng packet block is too short");
    }
    let (length, snap) = (numbers.u32(&body, 0) as usize, interface.snap_bytes as usize);
    body.drain(..4);
    let length = if snap == 0 { length } else { length.min(snap) };
    if length > body.len() {
        return malformed("the next packet is longer than its pcapng block");
    }
    body.truncate(length);
    Ok(Packet { bytes: body, link_type: interface.link_type, with_fcs: interface.with_fcs })
}

/// Reads an enhanced or obsolete packet block, which have the same layout.
fn packet(numbers: Numbers, mut body: Vec<u8>, kind: u32, all: &[Interface]) -> Result<Packet, Failure> {
    const FLAGS: u16 = 2;
    if body.len() < PACKET_HEADER {
        return malformed("a pcapng packet block is too short");
    }
    let number = if kind == PACKET { numbers.u16(&body, 0).into() } else { numbers.u32(&body, 0) };
    let Some(interface) = all.get(number as usize) else {
        return malformed(format!(
            "the next packet is of interface {number}, which the file does not describe"
        ));
    };
    let length = numbers.u32(&body, 12);
    if length > MAX_PACKET_BYTES {
        return malformed(too_long(length));
    }
    let end = PACKET_HEADER + length as usize;
    if end > body.len() {
        return malformed("the next packet is longer than its pcapng block");
    }
    // The packet's flags give the length of its FCS; if it is 0, the interface's option gives it.
    let options = body.get(PACKET_HEADER + (length as usize).next_multiple_of(4)..).unwrap_or_default();
    let flags = option(numbers, options, FLAGS).filter(|value| value.len() == 4);
    let with_fcs = interface.with_fcs || flags.is_some_and(|flags| numbers.u32(flags, 0) & 0x1e0 != 0);
    body.truncate(end);
    body.drain(..PACKET_HEADER);
    Ok(Packet { bytes: body, link_type: interface.link_type, with_fcs })
}
