//! Captures of both formats, made by hand or by another implementation.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use pcap_file::pcap::PcapHeader;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
use pcap_file::pcapng::blocks::simple_packet::SimplePacketBlock;
use std::borrow::Cow;

use super::bytes::Numbers;
use super::gzip::COMPRESSED;
use super::pcapng::{ENHANCED_PACKET, INTERFACE_DESCRIPTION, PACKET, SECTION_HEADER, SIMPLE_PACKET};
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
fn fcs_bits_are_not_part_of_the_link_type() {
    for numbers in ORDERS {
        for word in [0x4400_0001, 0x2400_0001, 0x0400_0001, 0x4000_0001] {
            assert_eq!(read(&numbers.pcap(0xa1b2_c3d4, word, 0, &frames())).unwrap(), frames(), "{word:x}");
        }
        let file = numbers.pcap(0xa1b2_c3d4, 0x4400_0000 | u32::from(RAW), 0, &frames());
        assert!(fault(&file).contains("packet 1 is of link type RAW"), "{}", fault(&file));
    }
}

#[test]
fn an_announced_and_valid_fcs_is_removed() {
    let longer: Vec<_> = frames().iter().map(|frame| with_fcs(frame)).collect();
    for numbers in ORDERS {
        let pcap = |word| read(&numbers.pcap(0xa1b2_c3d4, word, 0, &longer)).unwrap();
        assert_eq!(pcap(0x4400_0001), frames());
        assert_eq!(pcap(1), longer, "the file does not mention an FCS");
        assert_eq!(pcap(0x0400_0001), longer, "the FCS has no length");

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
fn pcapng_sections_have_their_own_order_and_interfaces() {
    let mut file = Vec::new();
    for numbers in [Numbers::Little, Numbers::Big, Numbers::Little] {
        // Options without an end mark, a time zone, blocks of other types.
        let options = [numbers.option(9, &[9]), numbers.option(10, &[0; 4])].concat();
        file.extend([numbers.section(), numbers.interface(1, 61, &options)].concat());
        file.extend([numbers.block(0xbad, &[1; 8]), numbers.block(5, &[0; 12])].concat());
        file.extend(numbers.packet(0, &frames()[2], &numbers.option(1, b"\xff is no UTF-8")));
        // Truncated to the snap length of 61.
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
fn gzip_with_one_or_more_members_is_read() {
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
fn other_compression_is_reported() {
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
fn a_damaged_file_is_never_read_as_intact() {
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
