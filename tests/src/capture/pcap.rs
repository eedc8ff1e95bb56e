//! The pcap format.

use std::io::BufRead;

use super::bytes::{Numbers, read_bytes, read_or_end};
use super::{Failure, MAX_PACKET_BYTES, Packet, malformed, too_long};

/// The file header.
pub(super) struct Header {
    numbers: Numbers,
    link_type: u32,
    with_fcs: bool,
}

impl Header {
    /// Reads the file header after its magic number; `None` if that is no magic number of pcap.
    pub(super) fn read(file: &mut dyn BufRead, magic: [u8; 4]) -> Result<Option<Self>, Failure> {
        let numbers = match u32::from_be_bytes(magic) {
            // In micro- and in nanoseconds.
            0xa1b2_c3d4 | 0xa1b2_3c4d => Numbers::Big,
            0xd4c3_b2a1 | 0x4d3c_b2a1 => Numbers::Little,
            // The packets of this format have longer headers.
            0xa1b2_cd34 | 0x34cd_b2a1 => {
                return malformed(
                    "it is of the old \"modified pcap\" format: convert it with `editcap -F pcap` first",
                );
            }
            _ => return Ok(None),
        };
        let mut header = [0; 20];
        file.read_exact(&mut header)?;
        let (major, minor) = (numbers.u16(&header, 0), numbers.u16(&header, 2));
        if (major, minor) != (2, 4) {
            return malformed(format!("it is a pcap file of version {major}.{minor}; 2.4 can be read"));
        }
        // This word holds the link type, a flag that the FCS length is known, and the FCS length.
        let word = numbers.u32(&header, 16);
        let with_fcs = word & 1 << 26 != 0 && word >> 28 != 0;
        Ok(Some(Self { numbers, link_type: word & 0xffff, with_fcs }))
    }

    /// Reads the next packet; `None` at the end of the file.
    pub(super) fn next_packet(&self, file: &mut dyn BufRead) -> Result<Option<Packet>, Failure> {
        let mut header = [0; 16];
        if !read_or_end(file, &mut header)? {
            return Ok(None);
        }
        let length = self.numbers.u32(&header, 8);
        if length > MAX_PACKET_BYTES {
            return malformed(too_long(length));
        }
        let bytes = read_bytes(file, length)?;
        Ok(Some(Packet { bytes, link_type: self.link_type, with_fcs: self.with_fcs }))
    }
}
