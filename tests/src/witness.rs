//! What `xfan-witness` workers saw of the generator's packets: which packets, how often, and in
//! which order.

use std::collections::HashMap;
use std::path::Path;

/// A packet as a worker saw it. The worker may have been killed before it committed the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The packet's number within its stream.
    pub number: u32,
    /// The hash of its flow.
    pub flow: u32,
    /// The generator that sent it, identified by the length of its frames.
    pub stream: u16,
    /// Whether it was marked as redelivered.
    pub redelivered: bool,
}

impl Sighting {
    /// The length of a record in bytes.
    pub const BYTES: usize = 12;

    /// The record in the file.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.number.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flow.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.stream.to_le_bytes());
        bytes[10] = self.redelivered.into();
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Sighting {
            number: word(0),
            flow: word(4),
            stream: u16::from_le_bytes([bytes[8], bytes[9]]),
            redelivered: bytes[10] == 1,
        }
    }
}

/// What all witnesses of a folder saw together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Testimony {
    /// Packets, each counted once.
    pub packets: u64,
    /// Sightings after the first one of a packet.
    pub again: u64,
    /// Sightings marked as redelivered.
    pub redelivered: u64,
    /// The number of witnesses.
    pub witnesses: usize,
    /// Violations, as sentences.
    pub wrong: Vec<String>,
}

/// Reads what the witnesses of a folder wrote.
///
/// Two things are violations: a packet that was seen twice without the mark redelivered, and a
/// packet first seen by a worker after a later packet of its flow.
///
/// # Panics
/// A file cannot be read.
pub fn testimony(folder: &Path) -> Testimony {
    let mut result = Testimony::default();
    // By stream and number: the sightings not marked as redelivered, and all sightings.
    let mut seen: HashMap<u16, Vec<[u8; 2]>> = HashMap::new();
    for entry in std::fs::read_dir(folder).expect("the folder can be listed") {
        let path = entry.expect("the folder can be listed").path();
        if !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("seen-")) {
            continue;
        }
        result.witnesses += 1;
        let mut latest: HashMap<(u16, u32), u32> = HashMap::new();
        let bytes = std::fs::read(&path).expect("the file can be read");
        // A witness killed while writing may leave a partial record; it has not committed that
        // packet.
        for record in bytes.chunks_exact(Sighting::BYTES) {
            let sighting =
                Sighting::from_bytes(record.try_into().expect("the chunk has the length of a record"));
            let Sighting { number, flow, stream, redelivered } = sighting;
            let stream_seen = seen.entry(stream).or_default();
            let index = number as usize;
            if stream_seen.len() <= index {
                stream_seen.resize(index + 1, [0; 2]);
            }
            stream_seen[index][1] = stream_seen[index][1].saturating_add(1);
            if redelivered {
                result.redelivered += 1;
                continue;
            }
            stream_seen[index][0] = stream_seen[index][0].saturating_add(1);
            if let Some(before) = latest.insert((stream, flow), number).filter(|before| *before >= number) {
                result.wrong.push(format!("{}: {sighting:?} after number {before}", path.display()));
            }
        }
    }
    for (stream, packets) in seen {
        for (number, [unmarked, all]) in packets.into_iter().enumerate() {
            result.packets += u64::from(all > 0);
            result.again += u64::from(all.saturating_sub(1));
            if unmarked > 1 {
                result.wrong.push(format!("packet {number} of stream {stream} was seen {unmarked} times"));
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(file: &Path, sightings: &[(u32, bool)]) {
        let records = sightings
            .iter()
            .map(|&(number, redelivered)| Sighting { number, flow: 7, stream: 64, redelivered }.to_bytes());
        std::fs::write(file, [records.flatten().collect::<Vec<_>>(), vec![1, 2, 3]].concat()).unwrap();
    }

    #[test]
    fn each_fault_in_the_packets_is_found() {
        let folder = tempfile::tempdir().unwrap();
        seen(&folder.path().join("seen-1"), &[(0, false), (1, false), (3, false)]);
        seen(&folder.path().join("seen-2"), &[(3, true), (4, false), (2, true)]);
        let good = testimony(folder.path());
        assert_eq!((good.packets, good.again, good.redelivered, good.witnesses), (5, 1, 2, 2));
        assert_eq!(good.wrong, Vec::<String>::new());
        seen(&folder.path().join("seen-3"), &[(5, false), (1, false)]);
        let bad = testimony(folder.path());
        assert_eq!((bad.packets, bad.again, bad.wrong.len()), (6, 2, 2), "{bad:#?}");
    }
}
