//! Reads and writes captures: pcap and pcapng, gzipped or not, byte for byte.
//!
//! The reader is our own: the crate pcap-file rejects valid files (a time zone, options without an
//! end mark), and pcap-parser does not report why it cannot read a file.

mod bytes;
mod gzip;
mod pcap;
mod pcapng;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, BufRead, BufWriter};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcap_file::pcap::{PcapPacket, PcapWriter};
use pcap_file::{DataLink, PcapError};

/// The longest packet in bytes, as in libpcap: a file with a longer one is broken.
const MAX_PACKET_BYTES: u32 = 262_144;
/// Bytes of an Ethernet FCS.
const FCS_BYTES: usize = 4;

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
    Pcap(pcap::Header),
    PcapNg(pcapng::Section),
}

impl Format {
    /// Reads the magic number and the rest of the header that begins with it.
    fn read(file: &mut dyn BufRead) -> Result<Self, Failure> {
        let no_capture = || malformed("it is neither a pcap nor a pcapng file");
        let mut magic = [0; 4];
        match file.read_exact(&mut magic) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return no_capture(),
            result => result?,
        }
        if u32::from_be_bytes(magic) == pcapng::SECTION_HEADER {
            return Ok(Self::PcapNg(pcapng::Section::read(file)?));
        }
        pcap::Header::read(file, magic)?.map_or_else(no_capture, |header| Ok(Self::Pcap(header)))
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
        let opened = gzip::uncompressed(file).and_then(|mut file| {
            let format = Format::read(&mut *file)?;
            Ok((file, format))
        });
        let (file, format) = opened.map_err(|failure| failure.of(path, 0))?;
        Ok(Self { path: path.into(), file, format, frames: 0, over: false })
    }

    fn next_frame(&mut self) -> Result<Option<Vec<u8>>, CaptureError> {
        let packet = match &mut self.format {
            Format::Pcap(header) => header.next_packet(&mut *self.file),
            Format::PcapNg(section) => section.next_packet(&mut *self.file),
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

fn too_long(bytes: u32) -> String {
    format!("the next packet is said to have {bytes} bytes, more than {MAX_PACKET_BYTES}: the file is broken")
}

/// Removes the FCS from a frame that ends in it.
fn without_fcs(frame: &mut Vec<u8>) {
    if let Some((bytes, fcs)) = frame.split_last_chunk::<FCS_BYTES>()
        && crc32fast::hash(bytes).to_le_bytes() == *fcs
    {
        frame.truncate(frame.len() - FCS_BYTES);
    }
}
