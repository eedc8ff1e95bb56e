//! Packets in a file: pcap and pcapng, byte for byte.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pcap_file::pcap::{PcapPacket, PcapReader, PcapWriter};
use pcap_file::pcapng::{Block, PcapNgReader};
use pcap_file::{DataLink, PcapError};

/// First bytes of a pcapng file: the type of its section header block.
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// The Ethernet frames of a capture, in the order of the file. A frame that was cut off when it was captured is what is
/// left of it.
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
    #[error("{}: after {frames} packets: {}; it should be a pcap or pcapng file", path.display(), reason(source))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Packets read before.
        frames: usize,
        /// What is wrong.
        source: PcapError,
    },
    /// The file holds something else than Ethernet frames.
    #[error("{}: its packets are of link type {link_type:?}; only Ethernet can be used", path.display())]
    LinkType {
        /// The file.
        path: PathBuf,
        /// Their link type.
        link_type: DataLink,
    },
}

/// `PcapError` keeps its cause to itself when displayed.
fn reason(error: &PcapError) -> String {
    match error {
        PcapError::IoError(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
            "the file ends in the middle of a packet".into()
        }
        PcapError::IoError(source) => source.to_string(),
        other => other.to_string(),
    }
}

impl Capture {
    /// Reads a pcap or pcapng file, told apart by its first bytes.
    ///
    /// # Errors
    /// The file is unreadable, broken, or holds something else than Ethernet frames.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CaptureError> {
        let path = path.as_ref();
        let io = |source| CaptureError::Io { path: path.into(), source };
        let mut file = File::open(path).map_err(io)?;
        let mut magic = [0; 4];
        let magic_read = file.read(&mut magic).map_err(io)?;
        file.rewind().map_err(io)?;
        let mut capture = Self::default();
        let read = if magic_read == 4 && magic == PCAPNG {
            capture.read_pcapng(file)
        } else {
            capture.read_pcap(file)
        };
        match read {
            Ok(()) => Ok(capture),
            Err(Failure::Pcap(PcapError::IoError(source)))
                if source.kind() != io::ErrorKind::UnexpectedEof =>
            {
                Err(io(source))
            }
            Err(Failure::Pcap(source)) => {
                Err(CaptureError::Malformed { path: path.into(), frames: capture.frames.len(), source })
            }
            Err(Failure::LinkType(link_type)) => Err(CaptureError::LinkType { path: path.into(), link_type }),
        }
    }

    /// Writes a pcap file; the frames are one microsecond apart.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), CaptureError> {
        let path = path.as_ref();
        let io = |source| CaptureError::Io { path: path.into(), source };
        let malformed = |source| CaptureError::Malformed { path: path.into(), frames: 0, source };
        let file = BufWriter::new(File::create(path).map_err(io)?);
        let mut writer = PcapWriter::new(file).map_err(malformed)?;
        let mut time = Duration::ZERO;
        for frame in &self.frames {
            let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            writer.write_packet(&PcapPacket::new(time, length, frame)).map_err(malformed)?;
            time += Duration::from_micros(1);
        }
        writer.into_writer().into_inner().map_err(|error| io(error.into_error()))?;
        Ok(())
    }

    /// Sum of the frames' lengths, in bytes.
    pub fn bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }

    fn read_pcap(&mut self, file: File) -> Result<(), Failure> {
        let mut reader = PcapReader::new(file)?;
        check_link_type(reader.header().datalink)?;
        // Raw: the checked reader refuses packets for what does not concern us, as a snap length of 0.
        while let Some(packet) = reader.next_raw_packet() {
            self.frames.push(packet?.data.into_owned());
        }
        Ok(())
    }

    fn read_pcapng(&mut self, file: File) -> Result<(), Failure> {
        let mut reader = PcapNgReader::new(file)?;
        while let Some(block) = reader.next_block() {
            match block? {
                Block::InterfaceDescription(interface) => check_link_type(interface.linktype)?,
                Block::EnhancedPacket(packet) => self.frames.push(packet.data.into_owned()),
                Block::Packet(packet) => self.frames.push(packet.data.into_owned()),
                Block::SimplePacket(packet) => {
                    // The block tells no captured length, and its data is padded to 4 bytes.
                    let (length, mut data) = (packet.original_len as usize, packet.data.into_owned());
                    let snap_length = reader.interfaces().first().map_or(0, |first| first.snaplen as usize);
                    data.truncate(if snap_length == 0 { length } else { length.min(snap_length) });
                    self.frames.push(data);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

enum Failure {
    Pcap(PcapError),
    LinkType(DataLink),
}

impl From<PcapError> for Failure {
    fn from(error: PcapError) -> Self {
        Self::Pcap(error)
    }
}

fn check_link_type(link_type: DataLink) -> Result<(), Failure> {
    if link_type == DataLink::ETHERNET { Ok(()) } else { Err(Failure::LinkType(link_type)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcap::PcapHeader;
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
    use pcap_file::pcapng::blocks::simple_packet::SimplePacketBlock;
    use std::borrow::Cow;

    fn frames() -> Vec<Vec<u8>> {
        (0..5u8).map(|n| vec![n; 60 + usize::from(n)]).collect()
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
    fn pcapng_blocks_of_either_kind() {
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
    fn errors_name_the_file_and_the_fault() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = || Capture::read(file.path()).unwrap_err().to_string();
        let name = file.path().display().to_string();

        assert!(message().starts_with(&name), "{}", message());
        std::fs::write(file.path(), "no capture at all, only text").unwrap();
        assert!(message().contains("wrong magic number"), "{}", message());

        Capture { frames: frames() }.write(file.path()).unwrap();
        let whole = std::fs::read(file.path()).unwrap();
        std::fs::write(file.path(), &whole[..whole.len() - 1]).unwrap();
        let expected = "after 4 packets: the file ends in the middle of a packet";
        assert!(message().contains(expected), "{}", message());

        let header = PcapHeader { datalink: DataLink::RAW, ..PcapHeader::default() };
        PcapWriter::with_header(file.reopen().unwrap(), header).unwrap();
        assert!(message().contains("only Ethernet can be used"), "{}", message());

        let absent = Capture::read("/nowhere/x.pcap").unwrap_err().to_string();
        assert!(absent.starts_with("/nowhere/x.pcap: No such file"), "{absent}");
    }
}
