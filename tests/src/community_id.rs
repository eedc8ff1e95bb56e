//! Community ID version 1, written from its specification and independently of the workers' code,
//! and the lists of IDs that come with reference captures.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use sha1::{Digest as _, Sha1};

/// The variable that names the folder with reference captures.
pub const CAPTURES: &str = "XFAN_PCAPS";

/// Computes the Community ID (seed 0) of a packet from `source` to `destination`. `ports` are the
/// two 16-bit numbers of TCP, UDP and SCTP, or the type and code of ICMP and ICMPv6; none if the
/// packet has none. The specification does not cover ports of other protocols, such as DCCP and
/// UDP-Lite; they are ignored.
pub fn community_id(protocol: u8, source: IpAddr, destination: IpAddr, ports: Option<(u16, u16)>) -> String {
    let one_way = ports.is_some_and(|(kind, _)| is_one_way(protocol, kind));
    let ports = ports.filter(|_| has_ports(protocol)).map(|ports| numbers(protocol, ports));
    let (from, to) = (octets(source), octets(destination));
    let (source_port, destination_port) = ports.unwrap_or_default();
    let ordered = one_way || (&from, source_port) <= (&to, destination_port);

    let mut hash = Sha1::new();
    hash.update(0u16.to_be_bytes()); // the seed
    hash.update(if ordered { &from } else { &to });
    hash.update(if ordered { &to } else { &from });
    hash.update([protocol, 0]);
    if ports.is_some() {
        let (first, second) =
            if ordered { (source_port, destination_port) } else { (destination_port, source_port) };
        hash.update(first.to_be_bytes());
        hash.update(second.to_be_bytes());
    }
    format!("1:{}", base64::engine::general_purpose::STANDARD.encode(hash.finalize()))
}

fn has_ports(protocol: u8) -> bool {
    matches!(protocol, 1 | 6 | 17 | 58 | 132)
}

/// Pairs of ICMP types, request and reply: echo, timestamp, information, router discovery, address
/// mask.
const ICMP_PAIRS: [(u16, u16); 5] = [(8, 0), (13, 14), (15, 16), (10, 9), (17, 18)];
/// Such pairs for ICMPv6: echo, router and neighbour discovery, multicast listeners, node
/// information, home agents.
const ICMPV6_PAIRS: [(u16, u16); 6] =
    [(128, 129), (133, 134), (135, 136), (130, 131), (139, 140), (144, 145)];

/// The numbers that take the place of ports for a packet with these first two numbers (as in
/// [`community_id`]). For a paired ICMP message they are its type and the type of its counterpart.
pub fn numbers(protocol: u8, (first, second): (u16, u16)) -> (u16, u16) {
    for &(request, answer) in pairs(protocol) {
        if first == request {
            return (request, answer);
        }
        if first == answer {
            return (answer, request);
        }
    }
    (first, second)
}

/// Whether a packet is an ICMP message of a type that has no counterpart.
pub fn is_one_way(protocol: u8, kind: u16) -> bool {
    let pairs = pairs(protocol);
    !pairs.is_empty() && pairs.iter().all(|&(request, answer)| kind != request && kind != answer)
}

fn pairs(protocol: u8) -> &'static [(u16, u16)] {
    match protocol {
        1 => &ICMP_PAIRS,
        58 => &ICMPV6_PAIRS,
        _ => &[],
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A flow in a reference list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The originator's address.
    pub source: IpAddr,
    /// The responder's address.
    pub destination: IpAddr,
    /// The originator's port or ICMP type; the responder's port, the type of the ICMP reply, or the
    /// ICMP code.
    pub ports: (u16, u16),
    /// The protocol number.
    pub protocol: u8,
    /// Whether Zeek read the ports. The version that made the lists took SCTP ports for 0.
    pub has_ports: bool,
    /// The Community ID: `1:` and base64.
    pub id: String,
}

/// Reads lines such as `[orig_h=10.0.0.1, orig_p=53/udp, resp_h=…, resp_p=…, proto=17, ctx=[]],
/// 1:d/FP5EW3…=`.
///
/// # Errors
/// The file is unreadable, or a line has another form; the message names file and line.
pub fn read_known(path: &Path) -> Result<Vec<Known>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            parse_known(line).ok_or_else(|| {
                format!("{}, line {}: not a flow and its Community ID: {line}", path.display(), number + 1)
            })
        })
        .collect()
}

fn parse_known(line: &str) -> Option<Known> {
    let field = |name: &str| {
        let (_, rest) = line.split_once(&format!("{name}="))?;
        rest.split([',', ']', '/']).next()
    };
    Some(Known {
        source: field("orig_h")?.parse().ok()?,
        destination: field("resp_h")?.parse().ok()?,
        ports: (field("orig_p")?.parse().ok()?, field("resp_p")?.parse().ok()?),
        protocol: field("proto")?.parse().ok()?,
        has_ports: !line.contains("/unknown,"),
        id: line.rsplit_once(", ")?.1.trim().to_string(),
    })
}

/// A reference: a capture and the list of its flows.
#[derive(Clone, Debug)]
pub struct Reference {
    /// The name, such as `icmp6`.
    pub name: String,
    /// The path of the capture.
    pub capture: PathBuf,
    /// The flows in the list.
    pub known: Vec<Known>,
}

/// All references in the folder that [`CAPTURES`] names. If the variable is not set, prints that
/// and returns none.
///
/// # Errors
/// The folder has no references, or one of them is unreadable.
pub fn references() -> Result<Vec<Reference>, String> {
    let Some(folder) = std::env::var_os(CAPTURES).map(PathBuf::from) else {
        eprintln!("no comparison with reference captures: {CAPTURES} names no folder with them");
        return Ok(Vec::new());
    };
    let lists = folder.join("community-id");
    let entries =
        std::fs::read_dir(&lists).map_err(|error| format!("{CAPTURES}: {}: {error}", lists.display()))?;
    let mut references = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|extension| extension == "txt") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let capture = folder.join(format!("zeek__communityid__{name}.pcap"));
            references.push(Reference { name, capture, known: read_known(&path)? });
        }
    }
    references.sort_by(|one, other| one.name.cmp(&other.name));
    if references.is_empty() {
        return Err(format!("{CAPTURES}: {} holds no lists (NAME.txt)", lists.display()));
    }
    Ok(references)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(protocol: u8, source: &str, destination: &str, ports: (u16, u16)) -> String {
        community_id(protocol, source.parse().unwrap(), destination.parse().unwrap(), Some(ports))
    }

    // The values are the specification's own examples.
    #[test]
    fn the_examples_of_the_specification() {
        let udp = "1:d/FP5EW3wiY1vCndhwleRRKHowQ=";
        assert_eq!(id(17, "192.168.1.52", "8.8.8.8", (54585, 53)), udp);
        assert_eq!(id(17, "8.8.8.8", "192.168.1.52", (53, 54585)), udp);
        let echo = "1:X0snYXpgwiv9TZtqg64sgzUn6Dk=";
        assert_eq!(id(1, "192.168.0.89", "192.168.0.1", (8, 0)), echo);
        assert_eq!(id(1, "192.168.0.1", "192.168.0.89", (0, 0)), echo);
        let sctp = "1:jQgCxbku+pNGw8WPbEc/TS/uTpQ=";
        assert_eq!(id(132, "192.168.170.8", "192.168.170.56", (7, 80)), sctp);
        assert_eq!(id(132, "192.168.170.56", "192.168.170.8", (80, 7)), sctp);
    }

    #[test]
    fn ports_of_other_protocols_do_not_count() {
        // The expected value comes from pycommunityid.
        let (one, other) = ("10.1.12.1", "10.1.12.2");
        for (protocol, expected) in
            [(33, "1:tS1VLPVIHyB/EWpKCtBrjkukjYQ="), (136, "1:QVfcEkJLz9ecWKR1tASYJ6wUldA=")]
        {
            for ports in [(0, 0), (5001, 5002), (5002, 5001)] {
                assert_eq!(id(protocol, one, other, ports), expected);
                assert_eq!(id(protocol, other, one, ports), expected);
            }
        }
    }

    #[test]
    fn one_way_icmp_keeps_its_direction() {
        let (one, other) = ("10.0.0.9", "10.0.0.1");
        assert_ne!(id(1, one, other, (3, 1)), id(1, other, one, (3, 1)));
    }

    #[test]
    fn a_line_of_a_list() {
        let line =
            "[orig_h=3ffe::2, orig_p=3/icmp, resp_h=3ffe::1, resp_p=1/icmp, proto=58, ctx=[]], 1:2ObV=";
        let known = parse_known(line).unwrap();
        assert_eq!((known.ports, known.protocol, known.id.as_str()), ((3, 1), 58, "1:2ObV="));
        assert_eq!(known.source, "3ffe::2".parse::<IpAddr>().unwrap());
        assert_eq!(parse_known("nonsense"), None);
    }
}
