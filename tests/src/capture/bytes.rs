//! Numbers and bytes in a file.

use std::io::{self, BufRead, Read};

use super::Failure;

/// The byte order of a file, or of a section of it.
#[derive(Clone, Copy)]
pub(super) enum Numbers {
    Little,
    Big,
}

impl Numbers {
    /// The 32-bit number at `at`. The caller has checked the length.
    pub(super) fn u32(self, bytes: &[u8], at: usize) -> u32 {
        let bytes = bytes[at..at + 4].try_into().expect("four bytes");
        match self {
            Self::Little => u32::from_le_bytes(bytes),
            Self::Big => u32::from_be_bytes(bytes),
        }
    }

    /// The 16-bit number at `at`. The caller has checked the length.
    pub(super) fn u16(self, bytes: &[u8], at: usize) -> u16 {
        let bytes = bytes[at..at + 2].try_into().expect("two bytes");
        match self {
            Self::Little => u16::from_le_bytes(bytes),
            Self::Big => u16::from_be_bytes(bytes),
        }
    }
}

/// Fills `bytes`; false at the end of the file.
pub(super) fn read_or_end(file: &mut dyn BufRead, bytes: &mut [u8]) -> Result<bool, Failure> {
    if file.fill_buf()?.is_empty() {
        return Ok(false);
    }
    file.read_exact(bytes)?;
    Ok(true)
}

pub(super) fn read_bytes(file: &mut dyn BufRead, length: u32) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Skips `bytes`; an error if the file ends before.
pub(super) fn skip(file: &mut dyn BufRead, bytes: u32) -> Result<(), Failure> {
    match io::copy(&mut Read::take(file, bytes.into()), &mut io::sink())? == u64::from(bytes) {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}
