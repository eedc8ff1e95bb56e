//! Makes captures, and checks that their packets were received or counted as lost. For tests that
//! are shell scripts, such as those in a virtual machine.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xfan::report::{Port, Report};
use xfan_tests::capture::Capture;
use xfan_tests::oracle::{Expectation, Flow};
use xfan_tests::primary::FlowRecord;
use xfan_tests::traffic;

/// The shortest frame that a NIC sends, in bytes without FCS: it pads shorter frames.
const SHORTEST_FRAME: usize = 60;
/// Frame sizes near those of receive buffers, for an MTU of 1500.
const SIZES: [usize; 17] =
    [60, 64, 128, 256, 512, 1000, 1020, 1023, 1024, 1025, 1028, 1100, 1280, 1400, 1500, 1513, 1514];
/// Frame sizes that need an MTU of up to 3000.
const JUMBO_SIZES: [usize; 8] = [1700, 1784, 1800, 2000, 2040, 2400, 2900, 3000];
/// The most differences to print; the rest are only counted.
const MOST_DIFFERENCES: usize = 12;

/// Makes captures, and checks that their packets were received or counted as lost
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write captures to a folder: mixed traffic, and UDP frames of many sizes in both directions
    ///
    /// Frames shorter than 60 bytes are padded, as NICs do, so that lengths can be compared on any
    /// NIC.
    Captures {
        /// Existing folder for mixed.pcap, sizes.pcap and jumbo.pcap
        folder: PathBuf,

        /// Also write a padded copy of this capture, under its own name
        #[arg(long, value_name = "CAPTURE")]
        pad: Vec<PathBuf>,
    },
    /// Compare flow records and the ledger with the captures that were sent
    ///
    /// Prints one line if everything agrees; otherwise ends with 1 and prints what differs.
    Check {
        /// Output of `xfan stats --json`, taken after the last packet
        #[arg(long, value_name = "FILE")]
        report: PathBuf,

        /// Folder of the files that xfan-flow wrote
        #[arg(long, value_name = "FOLDER")]
        records: PathBuf,

        /// The kernel removes the outer VLAN tag before packets reach the XDP program, as on a bond
        #[arg(long)]
        untagged: bool,

        /// Allow lost packets, if each is counted
        #[arg(long)]
        losses: bool,

        /// Captures that were sent, and how many times each
        #[arg(required = true, value_name = "CAPTURE[xN]", value_parser = sent)]
        sent: Vec<Sent>,
    },
}

#[derive(Clone, Debug, PartialEq)]
struct Sent {
    capture: PathBuf,
    times: usize,
}

fn sent(text: &str) -> Result<Sent, String> {
    let (capture, times) = match text.rsplit_once(".pcapx") {
        Some((name, times)) => (format!("{name}.pcap"), times),
        None => (text.to_owned(), "1"),
    };
    let times = times.parse().map_err(|_| format!("{times} is not a number"))?;
    Ok(Sent { capture: capture.into(), times })
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Captures { folder, pad } => write_captures(&folder, &pad).map(|()| true),
        Command::Check { report, records, untagged, losses, sent } => {
            check_files(&report, &records, untagged, losses, &sent).map(|(text, agrees)| {
                println!("{text}");
                agrees
            })
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xfan-verify: {error}");
            ExitCode::from(2)
        }
    }
}

fn write_captures(folder: &Path, pad: &[PathBuf]) -> Result<(), Box<dyn Error>> {
    padded(traffic::synthetic(120, 1500, 1)).write(folder.join("mixed.pcap"))?;
    padded(udp_frames(&SIZES)).write(folder.join("sizes.pcap"))?;
    padded(udp_frames(&JUMBO_SIZES)).write(folder.join("jumbo.pcap"))?;
    for capture in pad {
        let name = capture.file_name().ok_or_else(|| format!("{} is not a file", capture.display()))?;
        padded(Capture::read(capture)?).write(folder.join(name))?;
    }
    Ok(())
}

fn padded(mut capture: Capture) -> Capture {
    for frame in &mut capture.frames {
        frame.resize(frame.len().max(SHORTEST_FRAME), 0);
    }
    capture
}

/// One flow for each size, three frames in each direction.
fn udp_frames(sizes: &[usize]) -> Capture {
    const HEADERS: usize = 14 + 20 + 8;
    let mut frames = Vec::new();
    for (index, size) in (0u8..).zip(sizes) {
        let client = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, index)), 10_000 + u16::from(index));
        let server = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, index)), 53);
        for (from, to) in [(client, server), (server, client)] {
            for number in 0..3u8 {
                let payload: Vec<u8> = (number..=u8::MAX).cycle().take(size - HEADERS).collect();
                frames.push(traffic::udp(from, to, &payload));
            }
        }
    }
    Capture { frames }
}

fn check_files(
    report: &Path,
    records: &Path,
    untagged: bool,
    losses: bool,
    sent: &[Sent],
) -> Result<(String, bool), Box<dyn Error>> {
    let text = read(report)?;
    let report = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", report.display()))?;
    let mut frames = Vec::new();
    for Sent { capture, times } in sent {
        let capture = Capture::read(capture)?;
        for _ in 0..*times {
            frames.extend_from_slice(&capture.frames);
        }
    }
    if untagged {
        frames.iter_mut().for_each(remove_tag);
    }
    let expected = Expectation::of(frames.iter().map(Vec::as_slice), &[]);
    let recorded = Recorded::of(&read_records(records)?);
    let mut differences = ledger(&report, frames.len() as u64, &expected, &recorded, losses);
    differences.extend(flows(&expected, &recorded, losses));
    Ok(summary(&report, frames.len(), &recorded, &differences))
}

/// Removes the outer VLAN tag, if there is one.
fn remove_tag(frame: &mut Vec<u8>) {
    if matches!(frame.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8])) {
        frame.drain(12..16);
    }
}

fn summary(report: &Report, sent: usize, recorded: &Recorded, differences: &[String]) -> (String, bool) {
    let modes: Vec<_> = report.ports.iter().map(|port| port.mode.as_str()).collect();
    let mut text = format!(
        "{}: sent {sent}, received {}, counted lost {}; {} flows, {} packets, {} bytes",
        modes.join("; "),
        report.totals().0,
        losses(report),
        recorded.flows.len(),
        recorded.packets(),
        recorded.flows.values().map(|flow| flow.bytes).sum::<u64>(),
    );
    for difference in differences.iter().take(MOST_DIFFERENCES) {
        let _ = write!(text, "\n  - {difference}"); // to a String: cannot fail
    }
    if let Some(more) = differences.len().checked_sub(MOST_DIFFERENCES).filter(|more| *more > 0) {
        let _ = write!(text, "\n  - … and {more} more");
    }
    (text, differences.is_empty())
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn read_records(folder: &Path) -> Result<Vec<FlowRecord>, Box<dyn Error>> {
    let mut records = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        for line in read(&path)?.lines() {
            let record = serde_json::from_str(line);
            records.push(record.map_err(|error| format!("{}: {error}: {line}", path.display()))?);
        }
    }
    Ok(records)
}

/// The flow records of all workers together.
struct Recorded {
    flows: BTreeMap<Flow, FlowTotals>,
}

#[derive(Default)]
struct FlowTotals {
    packets: u64,
    bytes: u64,
    community_ids: BTreeSet<String>,
    members: BTreeSet<String>,
}

impl Recorded {
    fn of(records: &[FlowRecord]) -> Self {
        let mut flows: BTreeMap<Flow, FlowTotals> = BTreeMap::new();
        for record in records {
            let flow = flows.entry(record.flow()).or_default();
            flow.packets += record.packets;
            flow.bytes += record.bytes;
            flow.community_ids.insert(record.community_id.clone());
            flow.members.insert(record.member.clone());
        }
        Recorded { flows }
    }

    fn packets(&self) -> u64 {
        self.flows.values().map(|flow| flow.packets).sum()
    }
}

/// The packets that some counter has as lost.
fn losses(report: &Report) -> u64 {
    let lanes =
        report.lanes().map(|lane| lane.xdp.drop_too_long + lane.kernel.rx_dropped + lane.kernel.rx_ring_full);
    let (_, _, dropped) = report.totals();
    let ports = report.ports.iter().map(|port| port.unserved.drop_too_long + losses_of_nic(port));
    let members = report.members().map(|member| member.lost);
    dropped + lanes.chain(ports).chain(members).sum::<u64>()
}

/// The packets that a zero-copy driver dropped before the XDP program saw them, by its counters of
/// each queue. In copy mode these repeat the counters of the sockets. The interface's `rx_dropped`
/// also has the packets that the XDP program passed and no protocol of the kernel wanted.
fn losses_of_nic(port: &Port) -> u64 {
    if !port.mode.ends_with("zero-copy") {
        return 0;
    }
    let of_queue = |name: &str| name.ends_with("_drops") && name.contains(|c: char| c.is_ascii_digit());
    let queues = port.nic.driver.iter().filter(|(name, _)| of_queue(name)).map(|(_, drops)| drops);
    queues.sum::<u64>() + port.nic.interface.get("rx_missed_errors").copied().unwrap_or(0)
}

/// The packets that interfaces below a VLAN, a bond or a bridge dropped. They may also be packets
/// that were not for it.
fn losses_below(report: &Report) -> u64 {
    let below = report.ports.iter().flat_map(|port| port.nic.below.values());
    let of = |nic: &xfan::report::Nic| {
        let counter = |name| nic.interface.get(name).copied().unwrap_or(0);
        counter("rx_dropped") + counter("rx_missed_errors")
    };
    below.map(of).sum()
}

/// The counters and sums that differ from what was sent.
fn ledger(
    report: &Report,
    sent: u64,
    expected: &Expectation,
    recorded: &Recorded,
    may_lose: bool,
) -> Vec<String> {
    let mut differences = report.imbalances();
    let mut same = |what: &str, want: u64, have: u64| {
        if want != have {
            differences.push(format!("{what}: should be {want}, is {have}"));
        }
    };
    let sum = |count: fn(&xfan::report::Lane) -> u64| report.lanes().map(count).sum::<u64>();
    let unserved: u64 = report.ports.iter().map(|port| port.unserved.pass).sum();
    let passed = unserved + sum(|lane| lane.xdp.pass);
    let arrived = passed + recorded.packets() + sum(|lane| lane.unparsed);
    let missing = sent.saturating_sub(arrived + losses(report));
    let lost = losses(report) + missing.min(losses_below(report));
    same(
        "packets received and dropped by the kernel, of those redirected",
        sum(|lane| lane.xdp.redirect),
        sum(|lane| lane.received + lane.kernel.rx_dropped + lane.kernel.rx_ring_full),
    );
    same("packets passed, in flows, of no flow, and counted as lost, of those sent", sent, arrived + lost);
    same("packets cut by the driver", 0, sum(|lane| lane.cut));
    if !may_lose {
        same("packets redirected", expected.redirected, sum(|lane| lane.xdp.redirect));
        same("bytes received", expected.redirected_bytes, sum(|lane| lane.bytes));
        same("packets passed", expected.non_ip + expected.neighbour_discovery, passed);
        same("packets of no flow", expected.unreadable, sum(|lane| lane.unparsed));
        same("packets counted as lost", 0, lost);
    }
    differences
}

/// The flow records that differ from what was sent.
fn flows(expected: &Expectation, recorded: &Recorded, may_lose: bool) -> Vec<String> {
    let mut differences = Vec::new();
    for (flow, want) in &expected.flows {
        let nothing = FlowTotals::default();
        let have = recorded.flows.get(flow).unwrap_or(&nothing);
        let agrees = if may_lose {
            have.packets <= want.packets && have.bytes <= want.bytes
        } else {
            (have.packets, have.bytes) == (want.packets, want.bytes)
        };
        if !agrees {
            let (packets, bytes) = (want.packets, want.bytes);
            differences.push(format!(
                "{flow}: should be {packets} packets, {bytes} bytes; is {} packets, {} bytes",
                have.packets,
                have.bytes,
                flow = name(flow)
            ));
        }
        if !have.community_ids.is_subset(&want.community_ids) {
            let (want, have) = (&want.community_ids, &have.community_ids);
            differences.push(format!("{}: should have the Community ID {want:?}, has {have:?}", name(flow)));
        }
        if have.members.len() > 1 {
            differences.push(format!("{}: went to several workers: {:?}", name(flow), have.members));
        }
    }
    for (flow, have) in &recorded.flows {
        if !expected.flows.contains_key(flow) {
            let packets = have.packets;
            differences.push(format!("{}: was never sent, is {packets} packets", name(flow)));
        }
    }
    differences
}

fn name(flow: &Flow) -> String {
    let [low, high] = [flow.low, flow.high].map(|(address, port)| SocketAddr::new(address, port));
    format!("protocol {}, {low} - {high}", flow.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xfan::report::Lane;

    fn sizes() -> Expectation {
        Expectation::of(udp_frames(&SIZES).frames.iter().map(Vec::as_slice), &[])
    }

    /// Flow records that agree with what was sent.
    fn recorded(expected: &Expectation) -> Recorded {
        let flows = expected.flows.iter().map(|(flow, totals)| {
            let (packets, bytes) = (totals.packets, totals.bytes);
            let community_ids = totals.community_ids.clone();
            let members = ["default/0".to_owned()].into();
            (*flow, FlowTotals { packets, bytes, community_ids, members })
        });
        Recorded { flows: flows.collect() }
    }

    fn report(expected: &Expectation) -> Report {
        let mut lane = Lane { received: 102, bytes: expected.redirected_bytes, ..Lane::default() };
        lane.xdp.redirect = 102;
        let port = Port { lanes: vec![lane], ..Port::default() };
        Report { ports: vec![port], ..Report::default() }
    }

    #[test]
    fn every_size_is_made_in_both_directions() {
        let frames = udp_frames(&SIZES).frames;
        let lengths: Vec<usize> = frames.iter().map(Vec::len).collect();
        assert_eq!(lengths, SIZES.iter().flat_map(|size| [*size; 6]).collect::<Vec<_>>());
        let expected = sizes();
        assert_eq!(expected.flows.len(), SIZES.len());
        assert!(expected.flows.values().all(|totals| totals.packets == 6));
    }

    #[test]
    fn captures_are_padded_to_the_shortest_frame() {
        let capture = padded(Capture { frames: vec![vec![1; 42], vec![2; 61]] });
        assert_eq!(capture.frames[0].len(), 60);
        assert_eq!(capture.frames[1].len(), 61);
    }

    #[test]
    fn one_tag_is_removed() {
        let frame = traffic::udp("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap(), &[7; 18]);
        let [mut none, mut one, mut two] = [vec![], vec![(0x8100, 7)], vec![(0x88a8, 1), (0x8100, 7)]]
            .map(|tags| traffic::tagged(&frame, &tags));
        [&mut none, &mut one, &mut two].into_iter().for_each(remove_tag);
        assert_eq!(none, frame);
        assert_eq!(one, frame);
        assert_eq!(two, traffic::tagged(&frame, &[(0x8100, 7)]));
    }

    #[test]
    fn names_of_captures_may_have_a_count() {
        let capture = PathBuf::from("/x/mixed.pcap");
        assert_eq!(sent("/x/mixed.pcap"), Ok(Sent { capture: capture.clone(), times: 1 }));
        assert_eq!(sent("/x/mixed.pcapx3"), Ok(Sent { capture, times: 3 }));
        assert!(sent("/x/mixed.pcapxy").is_err());
    }

    #[test]
    fn what_agrees_has_no_differences() {
        let expected = sizes();
        let recorded = recorded(&expected);
        assert_eq!(ledger(&report(&expected), 102, &expected, &recorded, false), [""; 0]);
        assert_eq!(flows(&expected, &recorded, false), [""; 0]);
    }

    #[test]
    fn a_cut_packet_is_a_difference() {
        let expected = sizes();
        let mut recorded = recorded(&expected);
        recorded.flows.values_mut().next_back().unwrap().bytes -= 490;
        let found = flows(&expected, &recorded, false);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("should be 6 packets, 9084 bytes; is 6 packets, 8594 bytes"), "{found:?}");
    }

    #[test]
    fn an_uncounted_loss_is_always_a_difference() {
        let expected = sizes();
        let mut recorded = recorded(&expected);
        recorded.flows.values_mut().next().unwrap().packets -= 1;
        let mut report = report(&expected);
        report.ports[0].lanes[0].received -= 1;
        for may_lose in [false, true] {
            let found = ledger(&report, 102, &expected, &recorded, may_lose);
            assert!(found.iter().any(|text| text.contains("should be 102, is 101")), "{found:?}");
        }
        // Only in zero-copy mode do the NIC's counters report it.
        report.ports[0].nic.interface.insert("rx_dropped".into(), 1);
        report.ports[0].nic.driver.insert("rx_drops".into(), 1);
        report.ports[0].nic.driver.insert("rx2_drops".into(), 1);
        report.ports[0].mode = "native, copy".into();
        assert!(!ledger(&report, 102, &expected, &recorded, true).is_empty());
        report.ports[0].mode = "native, zero-copy".into();
        report.ports[0].lanes[0].xdp.redirect -= 1;
        assert_eq!(ledger(&report, 102, &expected, &recorded, true), [""; 0]);
        report.ports[0].lanes[0].xdp.redirect += 1;
        // A packet that was passed, and that no protocol of the kernel wanted, is not lost.
        report.ports[0].nic.driver.clear();
        report.ports[0].lanes[0].kernel.rx_ring_full = 1;
        assert_eq!(ledger(&report, 102, &expected, &recorded, true), [""; 0]);
        assert_eq!(flows(&expected, &recorded, true), [""; 0]);
        let found = ledger(&report, 102, &expected, &recorded, false);
        assert_eq!(found, ["packets counted as lost: should be 0, is 1"]);
    }
}
