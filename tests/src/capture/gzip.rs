//! The content of a file that may be gzipped.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use super::{Failure, malformed};

/// Other compression formats: magic number, name, and the command that decompresses.
pub(super) const COMPRESSED: [(&[u8], &str, &str); 6] = [
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x02\x21\x4c\x18", "lz4", "lz4 -dc"),
    (b"\xfd7zXZ", "xz", "xz -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"PK\x03\x04", "zip", "unzip -p"),
];

/// Decompresses gzip, and reports broken gzip data as such, not as a broken capture.
struct Gunzip<R>(MultiGzDecoder<R>);

impl<R: BufRead> Read for Gunzip<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let broken = |reason: &dyn std::fmt::Display| {
            io::Error::new(io::ErrorKind::InvalidData, format!("the gzip data is broken: {reason}"))
        };
        self.0.read(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => broken(&"it is cut off"),
            io::ErrorKind::InvalidInput => broken(&error),
            _ => error,
        })
    }
}

/// The file's content, decompressed if it is gzipped.
pub(super) fn uncompressed(file: File) -> Result<Box<dyn BufRead>, Failure> {
    const GZIP: [u8; 2] = [0x1f, 0x8b];
    let mut file = BufReader::with_capacity(1 << 16, file);
    // The first read of a pipe may return fewer bytes than a magic number has.
    let mut start = Vec::new();
    file.by_ref().take(8).read_to_end(&mut start)?;
    if start.is_empty() {
        return malformed("the file is empty; it should be a pcap or pcapng file");
    }
    if let Some((_, name, tool)) = COMPRESSED.iter().find(|(magic, ..)| start.starts_with(magic)) {
        return malformed(format!("it is compressed with {name}, only gzip can be read: use `{tool}` first"));
    }
    let gzipped = start.starts_with(&GZIP);
    let file = io::Cursor::new(start).chain(file);
    Ok(if gzipped { Box::new(BufReader::new(Gunzip(MultiGzDecoder::new(file)))) } else { Box::new(file) })
}
