//! Reads and writes captures: pcap and pcapng, gzipped or not, byte for byte.
//!
//! The reader is our own: the crate pcap-file rejects valid files (a time zone, options without an
//! end mark), and pcap-parser does not report why it cannot read a file.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::bufread::MultiGzDecoder;
use pcap_file::pcap::{PcapPacket, PcapWriter};
use pcap_file::{DataLink, PcapError};

/// The longest packet in bytes, as in libpcap: a file with a longer one is broken.
const MAX_PACKET_BYTES: u32 = 262_144;
/// Bytes of an Ethernet FCS.
const FCS_BYTES: usize = 4;

/// Other compression formats: magic number, name, and the command that decompresses.
const COMPRESSED: [(&[u8], &str, &str); 6] = [
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
    (b"\x02\x21\x4c\x18", "lz4", "lz4 -dc"),
    (b"\xfd7zXZ", "xz", "xz -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"PK\x03\x04", "zip", "unzip -p"),
];

/// The Ethernet frames of a capture, in the order of the file. Of a frame that was truncated when
/// it was captured, this is the captured part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    /// The frames, without FCS.
    pub frames: Vec<Vec<u8>>,
}

/// Why a capture could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The file cannot be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is neither pcap nor pcapng, or broken.
    #[error("{}: after {frames} packets: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Packets read before.
        frames: u64,
        /// What is wrong.
        reason: String,
    },
    /// A packet is not an Ethernet frame.
    #[error("{}: packet {number} is of link type {link_type:?}; only Ethernet can be used", path.display())]
    LinkType {
        /// The file.
        path: PathBuf,
        /// The packet's number, from 1.
        number: u64,
        /// Its link type.
        link_type: DataLink,
    },
    /// The frames cannot be put into a pcap file.
    #[error("{}: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PcapError,
    },
}

impl Capture {
    /// Reads a whole file; see [`CaptureReader`].
    ///
    /// # Errors
    /// The file is unreadable or broken, or a packet is not an Ethernet frame.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CaptureError> {
        Ok(Self { frames: CaptureReader::open(path)?.collect::<Result<_, _>>()? })
    }

    /// Writes a pcap file; the frames are one microsecond apart.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), CaptureError> {
        write(path.as_ref(), &self.frames)
    }

    /// Sum of the frames' lengths, in bytes.
    pub fn bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }
}

/// Writes the frames of an iterator to a pcap file; they are one microsecond apart.
///
/// # Errors
/// The file cannot be written.
pub fn write<F: AsRef<[u8]>>(path: &Path, frames: impl IntoIterator<Item = F>) -> Result<(), CaptureError> {
    let io = |source| CaptureError::Io { path: path.into(), source };
    let unwritable = |error| match error {
        PcapError::IoError(source) => io(source),
        source => CaptureError::Unwritable { path: path.into(), source },
    };
    let file = BufWriter::new(File::create(path).map_err(io)?);
    let mut writer = PcapWriter::new(file).map_err(unwritable)?;
    let mut time = Duration::ZERO;
    for frame in frames {
        let frame = frame.as_ref();
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        writer.write_packet(&PcapPacket::new(time, length, frame)).map_err(unwritable)?;
        time += Duration::from_micros(1);
    }
    writer.into_writer().into_inner().map_err(|error| io(error.into_error()))?;
    Ok(())
}

/// Reads the frames of a file one by one, so that it may be larger than memory. An error is the
/// last item.
///
/// If the file says that frames end in their FCS, the reader removes it, since the sender's NIC
/// appends one. If the last four bytes of a frame are not its FCS (the frame was truncated or
/// damaged, or the file is wrong), the reader leaves the frame unchanged.
pub struct CaptureReader {
    path: PathBuf,
    file: Box<dyn BufRead>,
    format: Format,
    frames: u64,
    /// The reader has met an error or the end.
    over: bool,
}

enum Format {
    Pcap(Numbers, PcapHeader),
    PcapNg(Numbers, Vec<Interface>),
}

struct PcapHeader {
    link_type: u32,
    with_fcs: bool,
}

/// An interface description block of a pcapng file.
struct Interface {
    link_type: u32,
    /// 0: no limit.
    snap_bytes: u32,
    with_fcs: bool,
}

/// The byte order of a file, or of a section of it.
#[derive(Clone, Copy)]
enum Numbers {
    Little,
    Big,
}

impl Numbers {
    /// The 32-bit number at `at`. The caller has checked the length.
    fn u32(self, bytes: &[u8], at: usize) -> u32 {
        let bytes = bytes[at..at + 4].try_into().expect("four bytes");
        match self {
            Self::Little => u32::from_le_bytes(bytes),
            Self::Big => u32::from_be_bytes(bytes),
        }
    }

    /// The 16-bit number at `at`. The caller has checked the length.
    fn u16(self, bytes: &[u8], at: usize) -> u16 {
        let bytes = bytes[at..at + 2].try_into().expect("two bytes");
        match self {
            Self::Little => u16::from_le_bytes(bytes),
            Self::Big => u16::from_be_bytes(bytes),
        }
    }
}

/// A frame, and the file's data about it.
struct Packet {
    bytes: Vec<u8>,
    link_type: u32,
    with_fcs: bool,
}

/// Why there is no next packet.
enum Failure {
    Io(io::Error),
    /// What is wrong with the file.
    Malformed(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Self::Malformed("the file is cut off: it ends within a packet or a header".into())
            }
            io::ErrorKind::InvalidData => Self::Malformed(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

fn malformed<T>(reason: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Malformed(reason.into()))
}

impl CaptureReader {
    /// Opens a pcap or pcapng file, gzipped or not. The first bytes tell which.
    ///
    /// # Errors
    /// The file is unreadable, or neither pcap nor pcapng.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CaptureError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| CaptureError::Io { path: path.into(), source })?;
        let opened = uncompressed(file).and_then(|mut file| {
            let format = Format::read(&mut *file)?;
            Ok((file, format))
        });
        let (file, format) = opened.map_err(|failure| failure.of(path, 0))?;
        Ok(Self { path: path.into(), file, format, frames: 0, over: false })
    }

    fn next_frame(&mut self) -> Result<Option<Vec<u8>>, CaptureError> {
        let packet = match &mut self.format {
            Format::Pcap(numbers, header) => next_pcap(&mut *self.file, *numbers, header),
            Format::PcapNg(numbers, interfaces) => next_pcapng(&mut *self.file, numbers, interfaces),
        };
        let Some(mut packet) = packet.map_err(|failure| failure.of(&self.path, self.frames))? else {
            return Ok(None);
        };
        self.frames += 1;
        let link_type = DataLink::from(packet.link_type);
        if link_type != DataLink::ETHERNET {
            let (path, number) = (self.path.clone(), self.frames);
            return Err(CaptureError::LinkType { path, number, link_type });
        }
        if packet.with_fcs {
            without_fcs(&mut packet.bytes);
        }
        Ok(Some(packet.bytes))
    }
}

impl Iterator for CaptureReader {
    type Item = Result<Vec<u8>, CaptureError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let next = self.next_frame();
        self.over = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

impl Failure {
    fn of(self, path: &Path, frames: u64) -> CaptureError {
        let path = path.into();
        match self {
            Self::Io(source) => CaptureError::Io { path, source },
            Self::Malformed(reason) => CaptureError::Malformed { path, frames, reason },
        }
    }
}

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
fn uncompressed(file: File) -> Result<Box<dyn BufRead>, Failure> {
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

impl Format {
    /// Reads the magic number and, of a pcap file, the rest of the file header.
    fn read(file: &mut dyn BufRead) -> Result<Self, Failure> {
        let no_capture = || malformed("it is neither a pcap nor a pcapng file");
        let mut magic = [0; 4];
        match file.read_exact(&mut magic) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return no_capture(),
            result => result?,
        }
        let numbers = match u32::from_be_bytes(magic) {
            SECTION_HEADER => {
                let mut length = [0; 4];
                file.read_exact(&mut length)?;
                return Ok(Self::PcapNg(section_header(file, length)?, Vec::new()));
            }
            // In micro- and in nanoseconds.
            0xa1b2_c3d4 | 0xa1b2_3c4d => Numbers::Big,
            0xd4c3_b2a1 | 0x4d3c_b2a1 => Numbers::Little,
            // The packets of this format have longer headers.
            0xa1b2_cd34 | 0x34cd_b2a1 => {
                return malformed(
                    "it is of the old \"modified pcap\" format: convert it with `editcap -F pcap` first",
                );
            }
            _ => return no_capture(),
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
        Ok(Self::Pcap(numbers, PcapHeader { link_type: word & 0xffff, with_fcs }))
    }
}

/// Fills `bytes`; false at the end of the file.
fn read_or_end(file: &mut dyn BufRead, bytes: &mut [u8]) -> Result<bool, Failure> {
    if file.fill_buf()?.is_empty() {
        return Ok(false);
    }
    file.read_exact(bytes)?;
    Ok(true)
}

fn read_bytes(file: &mut dyn BufRead, length: u32) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn next_pcap(
    file: &mut dyn BufRead,
    numbers: Numbers,
    capture: &PcapHeader,
) -> Result<Option<Packet>, Failure> {
    let mut header = [0; 16];
    if !read_or_end(file, &mut header)? {
        return Ok(None);
    }
    let length = numbers.u32(&header, 8);
    if length > MAX_PACKET_BYTES {
        return malformed(too_long(length));
    }
    let bytes = read_bytes(file, length)?;
    Ok(Some(Packet { bytes, link_type: capture.link_type, with_fcs: capture.with_fcs }))
}

fn too_long(bytes: u32) -> String {
    format!("the next packet is said to have {bytes} bytes, more than {MAX_PACKET_BYTES}: the file is broken")
}

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
/// The obsolete packet block.
const PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
const ENHANCED_PACKET: u32 = 6;
/// Bytes of a block's type, and of its length at both ends.
const BLOCK_FRAME: u32 = 12;
/// Bytes of the fixed part of an enhanced or obsolete packet block, without those of
/// [`BLOCK_FRAME`].
const PACKET_HEADER: usize = 20;
/// The longest block to read, in bytes with options, as in libpcap.
const MAX_BLOCK_BYTES: u32 = 1 << 24;

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

fn skip(file: &mut dyn BufRead, bytes: u32) -> Result<(), Failure> {
    match io::copy(&mut Read::take(file, bytes.into()), &mut io::sink())? == u64::from(bytes) {
        true => Ok(()),
        false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
}

fn next_pcapng(
    file: &mut dyn BufRead,
    numbers: &mut Numbers,
    interfaces: &mut Vec<Interface>,
) -> Result<Option<Packet>, Failure> {
    loop {
        let mut head = [0; 8];
        if !read_or_end(file, &mut head)? {
            return Ok(None);
        }
        let kind = numbers.u32(&head, 0);
        if kind == SECTION_HEADER {
            *numbers = section_header(file, [head[4], head[5], head[6], head[7]])?;
            interfaces.clear();
            continue;
        }
        let length = body_length(numbers.u32(&head, 4))?;
        if !matches!(kind, INTERFACE_DESCRIPTION | PACKET | SIMPLE_PACKET | ENHANCED_PACKET) {
            skip(file, length)?;
            block_end(file, *numbers, length)?;
            continue;
        }
        if length > MAX_BLOCK_BYTES {
            return malformed(format!("a pcapng block is said to have {length} bytes: the file is broken"));
        }
        let body = read_bytes(file, length)?;
        block_end(file, *numbers, length)?;
        match kind {
            INTERFACE_DESCRIPTION => interfaces.push(interface(*numbers, &body)?),
            SIMPLE_PACKET => return simple_packet(*numbers, body, interfaces.first()).map(Some),
            _ => return packet(*numbers, body, kind, interfaces).map(Some),
        }
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

/// Removes the FCS from a frame that ends in it.
fn without_fcs(frame: &mut Vec<u8>) {
    if let Some((bytes, fcs)) = frame.split_last_chunk::<FCS_BYTES>()
        && crc32fast::hash(bytes).to_le_bytes() == *fcs
    {
        frame.truncate(frame.len() - FCS_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use pcap_file::pcap::PcapHeader;
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
    use pcap_file::pcapng::blocks::simple_packet::SimplePacketBlock;
    use std::borrow::Cow;

    use super::*;

    const ORDERS: [Numbers; 2] = [Numbers::Little, Numbers::Big];
    const RAW: u16 = 101;

    impl Numbers {
        fn put(self, number: u32) -> [u8; 4] {
            match self {
                Self::Little => number.to_le_bytes(),
                Self::Big => number.to_be_bytes(),
            }
        }

        fn put_u16(self, number: u16) -> [u8; 2] {
            match self {
                Self::Little => number.to_le_bytes(),
                Self::Big => number.to_be_bytes(),
            }
        }

        /// A pcap file with packets that were `cut` bytes longer.
        fn pcap(self, magic: u32, link_word: u32, cut: u32, frames: &[Vec<u8>]) -> Vec<u8> {
            let mut file = [self.put(magic), [[2, 0], [4, 0]].concat().try_into().unwrap()].concat();
            if matches!(self, Self::Big) {
                file[4..].copy_from_slice(&[0, 2, 0, 4]);
            }
            file.extend([0, 0, 65535, link_word].map(|number| self.put(number)).concat());
            for frame in frames {
                let length = u32::try_from(frame.len()).unwrap();
                file.extend([1, 999_999_999, length, length + cut].map(|number| self.put(number)).concat());
                file.extend(frame);
            }
            file
        }

        fn block(self, kind: u32, body: &[u8]) -> Vec<u8> {
            let padding = body.len().next_multiple_of(4) - body.len();
            let length = self.put(u32::try_from(body.len() + padding + 12).unwrap());
            [&self.put(kind), &length, body, &vec![0; padding], &length].concat()
        }

        fn section(self) -> Vec<u8> {
            let version = [self.put_u16(1), self.put_u16(0)].concat();
            self.block(SECTION_HEADER, &[&self.put(0x1a2b_3c4d)[..], &version, &[0xff; 8]].concat())
        }

        fn interface(self, link_type: u16, snap: u32, options: &[u8]) -> Vec<u8> {
            let body = [&self.put_u16(link_type)[..], &[0; 2], &self.put(snap), options].concat();
            self.block(INTERFACE_DESCRIPTION, &body)
        }

        fn option(self, code: u16, value: &[u8]) -> Vec<u8> {
            let length = self.put_u16(u16::try_from(value.len()).unwrap());
            let padding = vec![0; value.len().next_multiple_of(4) - value.len()];
            [&self.put_u16(code)[..], &length, value, &padding].concat()
        }

        fn packet(self, interface: u32, frame: &[u8], options: &[u8]) -> Vec<u8> {
            let length = u32::try_from(frame.len()).unwrap();
            let header = [interface, 0, 1, length, length].map(|number| self.put(number)).concat();
            let padding = vec![0; frame.len().next_multiple_of(4) - frame.len()];
            self.block(ENHANCED_PACKET, &[&header[..], frame, &padding, options].concat())
        }
    }

    fn frames() -> Vec<Vec<u8>> {
        (0..5u8).map(|n| vec![n; 60 + usize::from(n)]).collect()
    }

    fn with_fcs(frame: &[u8]) -> Vec<u8> {
        [frame, &crc32fast::hash(frame).to_le_bytes()].concat()
    }

    fn read(bytes: &[u8]) -> Result<Vec<Vec<u8>>, CaptureError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Capture::read(file.path()).map(|capture| capture.frames)
    }

    fn fault(bytes: &[u8]) -> String {
        read(bytes).unwrap_err().to_string()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn pcap_round_trip() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let capture = Capture { frames: frames() };
        capture.write(file.path()).unwrap();
        assert_eq!(Capture::read(file.path()).unwrap(), capture);
        assert_eq!(capture.bytes(), 60 + 61 + 62 + 63 + 64);
    }

    #[test]
    fn pcap_of_every_byte_order_and_precision() {
        for numbers in ORDERS {
            for magic in [0xa1b2_c3d4, 0xa1b2_3c4d] {
                assert_eq!(read(&numbers.pcap(magic, 1, 0, &frames())).unwrap(), frames(), "{magic:x}");
            }
            let modified = fault(&numbers.pcap(0xa1b2_cd34, 1, 0, &frames()));
            assert!(modified.contains("\"modified pcap\" format: convert it"), "{modified}");
        }
        assert_eq!(read(&Numbers::Little.pcap(0xa1b2_c3d4, 1, 9000, &frames())).unwrap(), frames());
        let none = read(&Numbers::Little.pcap(0xa1b2_c3d4, 1, 0, &[])).unwrap();
        assert_eq!(none, Vec::<Vec<u8>>::new());
    }

    #[test]
    fn the_fcs_bits_of_a_link_type_word_are_no_link_type() {
        for numbers in ORDERS {
            for word in [0x4400_0001, 0x2400_0001, 0x0400_0001, 0x4000_0001] {
                assert_eq!(
                    read(&numbers.pcap(0xa1b2_c3d4, word, 0, &frames())).unwrap(),
                    frames(),
                    "{word:x}"
                );
            }
            let file = numbers.pcap(0xa1b2_c3d4, 0x4400_0000 | u32::from(RAW), 0, &frames());
            assert!(fault(&file).contains("packet 1 is of link type RAW"), "{}", fault(&file));
        }
    }

    #[test]
    fn an_fcs_is_left_off_where_the_file_says_so_and_it_is_one() {
        let longer: Vec<_> = frames().iter().map(|frame| with_fcs(frame)).collect();
        for numbers in ORDERS {
            let pcap = |word| read(&numbers.pcap(0xa1b2_c3d4, word, 0, &longer)).unwrap();
            assert_eq!(pcap(0x4400_0001), frames());
            assert_eq!(pcap(1), longer, "nobody speaks of an FCS");
            assert_eq!(pcap(0x0400_0001), longer, "it has no length");

            let pcapng = |interface: &[u8], packet: &[u8]| {
                let interface = numbers.interface(1, 0, interface);
                let packets = longer.iter().map(|frame| numbers.packet(0, frame, packet));
                read(&[numbers.section(), interface, packets.collect::<Vec<_>>().concat()].concat()).unwrap()
            };
            let (some, none) = (numbers.option(13, &[4]), numbers.option(13, &[0]));
            let flags = |flags| numbers.option(2, &numbers.put(flags));
            assert_eq!(pcapng(&some, &[]), frames());
            assert_eq!(pcapng(&none, &[]), longer);
            assert_eq!(pcapng(&[], &flags(4 << 5)), frames());
            assert_eq!(pcapng(&[], &flags(1)), longer);
        }
        let damaged: Vec<_> = longer.iter().map(|frame| frame[..frame.len() - 1].to_vec()).collect();
        assert_eq!(read(&Numbers::Little.pcap(0xa1b2_c3d4, 0x4400_0001, 0, &damaged)).unwrap(), damaged);
    }

    #[test]
    fn pcapng_as_another_implementation_writes_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut writer = PcapNgWriter::new(file.reopen().unwrap()).unwrap();
        writer.write_pcapng_block(InterfaceDescriptionBlock::new(DataLink::ETHERNET, 0)).unwrap();
        for (number, frame) in frames().iter().enumerate() {
            let (length, data) = (u32::try_from(frame.len()).unwrap(), Cow::Borrowed(&frame[..]));
            if number % 2 == 0 {
                let block = SimplePacketBlock { original_len: length, data };
                writer.write_pcapng_block(block).unwrap();
            } else {
                let timestamp = Duration::ZERO;
                let options = Vec::new();
                let block =
                    EnhancedPacketBlock { interface_id: 0, timestamp, original_len: length, data, options };
                writer.write_pcapng_block(block).unwrap();
            }
        }
        assert_eq!(Capture::read(file.path()).unwrap().frames, frames());
    }

    #[test]
    fn pcapng_sections_have_their_own_byte_order_and_interfaces() {
        let mut file = Vec::new();
        for numbers in [Numbers::Little, Numbers::Big, Numbers::Little] {
            // Options without an end mark, a time zone, blocks that concern nobody here.
            let options = [numbers.option(9, &[9]), numbers.option(10, &[0; 4])].concat();
            file.extend([numbers.section(), numbers.interface(1, 61, &options)].concat());
            file.extend([numbers.block(0xbad, &[1; 8]), numbers.block(5, &[0; 12])].concat());
            file.extend(numbers.packet(0, &frames()[2], &numbers.option(1, b"\xff is no UTF-8")));
            // Cut to the snap length of 61.
            file.extend(numbers.block(SIMPLE_PACKET, &[&numbers.put(64)[..], &frames()[4][..61]].concat()));
            let mut old = [numbers.put_u16(0), numbers.put_u16(0xffff)].concat();
            old.extend([0, 1, 60, 60].map(|number| numbers.put(number)).concat());
            file.extend(numbers.block(PACKET, &[&old[..], &frames()[0]].concat()));
        }
        let section = [frames()[2].clone(), vec![4; 61], frames()[0].clone()];
        assert_eq!(read(&file).unwrap(), [&section[..], &section, &section].concat());
    }

    #[test]
    fn only_interfaces_in_use_must_be_ethernet() {
        let numbers = Numbers::Little;
        let head = [numbers.section(), numbers.interface(RAW, 0, &[]), numbers.interface(1, 0, &[])].concat();
        let packet = |interface| numbers.packet(interface, &frames()[0], &[]);
        assert_eq!(read(&[head.clone(), packet(1)].concat()).unwrap(), frames()[..1]);
        let both = fault(&[head.clone(), packet(1), packet(0)].concat());
        assert!(both.ends_with("packet 2 is of link type RAW; only Ethernet can be used"), "{both}");
        let none = fault(&[head, packet(1), packet(2)].concat());
        assert!(none.contains("after 1 packets: the next packet is of interface 2, which"), "{none}");
        let none = fault(&[numbers.section(), packet(0)].concat());
        assert!(none.contains("after 0 packets: the next packet is of interface 0, which"), "{none}");
    }

    #[test]
    fn gzipped_in_one_or_more_members() {
        let pcap = Numbers::Little.pcap(0xa1b2_c3d4, 1, 0, &frames());
        assert_eq!(read(&gzip(&pcap)).unwrap(), frames());
        let (one, other) = pcap.split_at(100);
        assert_eq!(read(&[gzip(one), gzip(other)].concat()).unwrap(), frames());
        let numbers = Numbers::Big;
        let pcapng = [numbers.section(), numbers.interface(1, 0, &[]), numbers.packet(0, &frames()[1], &[])];
        assert_eq!(read(&gzip(&pcapng.concat())).unwrap(), frames()[1..2]);

        let whole = gzip(&pcap);
        for length in [2, 10, whole.len() / 2, whole.len() - 1] {
            let cut = fault(&whole[..length]);
            assert!(cut.ends_with("the gzip data is broken: it is cut off"), "{length}: {cut}");
        }
        let mut wrong = whole.clone();
        *wrong.last_mut().unwrap() ^= 1;
        assert!(fault(&wrong).contains("the gzip data is broken: corrupt"), "{}", fault(&wrong));
        let inner = fault(&gzip(b"no capture"));
        assert!(inner.ends_with("it is neither a pcap nor a pcapng file"), "{inner}");
    }

    #[test]
    fn other_compression_is_named() {
        for (magic, name, tool) in COMPRESSED {
            let message = fault(&[magic, &[0; 8]].concat());
            assert!(message.contains(&format!("compressed with {name}")), "{message}");
            assert!(message.contains(&format!("use `{tool}` first")), "{message}");
        }
    }

    #[test]
    fn errors_name_the_file_and_the_fault() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = || Capture::read(file.path()).unwrap_err().to_string();
        let name = file.path().display().to_string();

        assert!(message().starts_with(&name), "{}", message());
        assert!(message().contains("the file is empty"), "{}", message());
        for text in ["no capture at all, only text", "no"] {
            std::fs::write(file.path(), text).unwrap();
            assert!(message().contains("it is neither a pcap nor a pcapng file"), "{}", message());
        }

        Capture { frames: frames() }.write(file.path()).unwrap();
        let whole = std::fs::read(file.path()).unwrap();
        std::fs::write(file.path(), &whole[..whole.len() - 1]).unwrap();
        let expected = "after 4 packets: the file is cut off: it ends within a packet";
        assert!(message().contains(expected), "{}", message());

        let header = PcapHeader { version_minor: 2, ..PcapHeader::default() };
        PcapWriter::with_header(file.reopen().unwrap(), header).unwrap();
        assert!(message().contains("it is a pcap file of version 2.2; 2.4 can be read"), "{}", message());

        let absent = Capture::read("/nowhere/x.pcap").unwrap_err().to_string();
        assert!(absent.starts_with("/nowhere/x.pcap: No such file"), "{absent}");
    }

    #[test]
    fn a_broken_file_is_never_read_as_a_whole_one() {
        let numbers = Numbers::Little;
        let head = [numbers.section(), numbers.interface(1, 0, &[])].concat();
        let packet = numbers.packet(0, &frames()[0], &[]);
        let pcapng = [head.clone(), packet.clone()].concat();
        let pcap = numbers.pcap(0xa1b2_c3d4, 1, 0, &frames()[..1]);
        for (whole, ends) in [(&pcapng, [28, head.len()]), (&pcap, [24, 24])] {
            for length in (1..whole.len()).filter(|length| !ends.contains(length)) {
                assert!(read(&whole[..length]).is_err(), "{length} bytes");
            }
        }
        // Each number in turn becomes the largest: an error or another packet follows, but no large
        // allocation.
        for whole in [&pcapng, &pcap] {
            for at in (0..whole.len()).step_by(4) {
                let mut wrong = whole.clone();
                wrong[at..at + 4].fill(0xff);
                if let Ok(frames) = read(&wrong) {
                    assert!(frames.iter().all(|frame| frame.len() <= 60), "at {at}");
                }
            }
        }
        let mut long = pcap.clone();
        long[32..36].copy_from_slice(&numbers.put(1 << 30));
        assert!(fault(&long).contains("said to have 1073741824 bytes, more than 262144"), "{}", fault(&long));
        let mut differ = pcapng;
        *differ.last_mut().unwrap() = 1;
        assert!(fault(&differ).contains("the two lengths of a pcapng block differ"), "{}", fault(&differ));
    }
}
