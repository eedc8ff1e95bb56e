//! The report of `xfan stats`: what the primary sends, as JSON, and how it looks to people.

mod notice;
mod table;

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xfan_shm::ids::QueueId;

use crate::text;

pub use notice::{Level, Notice};
pub use table::{render, render_members};

/// The [`version`](Report::version) of reports as described here. Readers ignore fields that they
/// do not know; the number rises when a field is removed or changes its meaning.
pub const VERSION: u32 = 1;

/// Everything about one primary: what `xfan stats --json` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// Process id of the primary.
    pub pid: u32,
    /// Nanoseconds since the primary started.
    pub uptime_ns: u64,
    /// The interfaces that packets come from.
    pub ports: Vec<Port>,
    /// The groups that packets go to. Each gets all packets that the lanes accept.
    pub groups: Vec<Group>,
    /// What came over the control socket.
    pub control: Control,
    /// Lines of the primary's log that were not written.
    #[serde(default)]
    pub log_lines_lost: u64,
}

/// An interface, or the packets in memory of a benchmark.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Interface name.
    pub name: String,
    /// How packets come in: XDP mode and bind mode, such as `native, copy`.
    pub mode: String,
    /// One for each RX queue served.
    pub lanes: Vec<Lane>,
    /// XDP outcomes of queues that have no lane, summed up.
    pub unserved: Xdp,
    /// The kernel's and the driver's counters of dropped packets.
    #[serde(default)]
    pub nic: Nic,
    /// Conditions that affect packets now, most important first.
    #[serde(default)]
    pub notices: Vec<Notice>,
}

/// A lane. For each group, `received - Σ dropped` is what [`GroupLane`] counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lane {
    /// RX queue.
    pub queue: QueueId,
    /// CPU it is pinned on.
    pub core: usize,
    /// Packets taken from the RX ring.
    pub received: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Packets dropped before any group gets them, by cause: `frame_owner`.
    pub dropped: BTreeMap<String, u64>,
    /// Packets without a readable 5-tuple; delivered like all others.
    pub unparsed: u64,
    /// Packets shorter than their IP length; delivered like all others.
    #[serde(default)]
    pub cut: u64,
    /// Batches of packets taken.
    pub batches: u64,
    /// Time spent in turns that found packets, in nanoseconds.
    pub busy_ns: u64,
    /// Times the lane slept.
    pub sleeps: u64,
    /// What the kernel dropped before the lane saw it.
    pub kernel: Kernel,
    /// Packets that were redirected to the socket, did not arrive, and are in none of the kernel's
    /// counters. While packets flow, only those that are certainly lost.
    #[serde(default)]
    pub unaccounted: u64,
    /// What the XDP program did with the queue's packets.
    pub xdp: Xdp,
    /// Who has the lane's frames.
    pub frames: Frames,
}

/// Packets the kernel could not put into the socket: `XDP_STATISTICS` of getsockopt(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// For another reason than a full RX ring, mostly for want of a frame.
    pub rx_dropped: u64,
    /// The RX ring was full.
    pub rx_ring_full: u64,
    /// Times the kernel found the FILL ring empty.
    pub fill_ring_empty: u64,
    /// Descriptors on the FILL ring that the kernel refused.
    pub rx_invalid_descs: u64,
}

/// Outcomes of the XDP program, in packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xdp {
    /// Sent to the socket.
    pub redirect: u64,
    /// Left to the kernel: the sum of the following.
    pub pass: u64,
    /// … not IP: ARP, LLDP, and so on.
    pub pass_non_ip: u64,
    /// … IPv6 neighbour or router discovery.
    pub pass_nd: u64,
    /// … a `pass` rule.
    pub pass_rule: u64,
    /// … the queue has no socket.
    pub pass_no_socket: u64,
    /// Dropped: longer than a frame holds.
    #[serde(default)]
    pub drop_too_long: u64,
}

impl Xdp {
    /// All packets that the program saw.
    pub fn seen(&self) -> u64 {
        self.redirect + self.pass + self.drop_too_long
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: Xdp) {
        self.redirect += other.redirect;
        self.pass += other.pass;
        self.pass_non_ip += other.pass_non_ip;
        self.pass_nd += other.pass_nd;
        self.pass_rule += other.pass_rule;
        self.pass_no_socket += other.pass_no_socket;
        self.drop_too_long += other.drop_too_long;
    }
}

/// The ledger of a lane's frames: `total` is the sum of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frames {
    /// All.
    pub total: u32,
    /// Unused.
    pub free: u32,
    /// The kernel's: on the FILL or RX ring, or in the NIC.
    pub kernel: u32,
    /// Being looked at.
    pub lane: u32,
    /// Workers'.
    pub lent: u32,
    /// Being transmitted.
    pub tx: u32,
}

/// Counters of packets that the interface dropped, as differences since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The kernel's counters, as in `ip -s -s link`; for comparison also `rx_packets`; and
    /// `carrier_lost`, the times the carrier went away.
    pub interface: BTreeMap<String, u64>,
    /// The driver's own drop counters, as in `ethtool -S`: those known for this driver, and others
    /// above 0.
    pub driver: BTreeMap<String, u64>,
    /// The same of each interface below, by name: those that a VLAN, a bond or a bridge receives
    /// its packets through. They also count packets that this interface does not get.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub below: BTreeMap<String, Nic>,
}

/// How the workers that xfan starts are confined, beyond what always holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The folder of their cgroups; none: they have none.
    pub cgroups: Option<String>,
    /// Limits in force.
    pub limits: Vec<String>,
    /// Limits that are set and cannot be enforced here.
    pub not_enforced: Vec<String>,
    /// Whether they run in the sandbox.
    pub sandbox: bool,
}

/// What came over the control socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// Connections, those that were refused included.
    pub connections: u64,
    /// Refused, since the user may not use it.
    pub forbidden: u64,
    /// Refused, since there were too many.
    pub too_many: u64,
    /// Ended, since what came made no sense.
    pub malformed: u64,
    /// Workers that were not admitted.
    pub refused: u64,
}

/// Workers that share one copy of the traffic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Buckets that its members share.
    pub buckets: usize,
    /// One for each lane of each port, in the order of [`Report::ports`].
    pub lanes: Vec<GroupLane>,
    /// Its members.
    pub members: Vec<Member>,
    /// How its workers are confined.
    #[serde(default)]
    pub confinement: Confinement,
}

/// What a lane counts of a group. Packets that the lane accepted are `delivered + Σ dropped`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupLane {
    /// Name of the lane's port.
    pub port: String,
    /// The lane's RX queue.
    pub queue: QueueId,
    /// Packets pushed into workers' rings.
    pub delivered: u64,
    /// Packets dropped, by cause: `ring_full`, `no_worker`.
    pub dropped: BTreeMap<String, u64>,
}

/// A member of a group, with the worker that it has or had. `delivered = committed + backlog +
/// requeued + lost`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Such as `default/0`.
    pub id: String,
    /// Name of the program.
    pub program: String,
    /// Process id; 0: none.
    pub pid: u32,
    /// CPU it is pinned on.
    pub core: Option<usize>,
    /// `vacant`, `starting`, `running`, `unhealthy`, `draining`, `stopped`, `crashed` or `failed`.
    pub state: String,
    /// For how long it has been in it, in nanoseconds.
    pub in_state_ns: u64,
    /// CPU time its process has used, user and system, in nanoseconds; to hundredths of a second.
    pub cpu_ns: u64,
    /// Memory its process has in RAM, in bytes; packet memory counts once it has been touched.
    pub resident_bytes: u64,
    /// Times its process was started again.
    pub restarts: u64,
    /// Times it hung.
    pub hangs: u64,
    /// How its last process ended, such as `exit status: 1`; none: it has not.
    pub last_exit: Option<String>,
    /// Whether its flows and packets are held for its next worker.
    pub held: bool,
    /// Whether xfan starts its process; else it is open to workers that attach by themselves.
    pub supervised: bool,
    /// Buckets that it takes, of those of its group.
    pub buckets: usize,
    /// Packets pushed into its rings.
    pub delivered: u64,
    /// Packets it gave back.
    pub committed: u64,
    /// Packets for it that were dropped because its ring was full.
    pub dropped: u64,
    /// Packets in its rings.
    pub backlog: u64,
    /// Packets that were in its rings when its worker left, and went to other members, which count
    /// them as `delivered`, too.
    pub requeued: u64,
    /// Packets that were in its rings when its worker left, and that no other ring had a free slot
    /// for.
    pub lost: u64,
    /// Times a lane woke it.
    pub wakeups: u64,
    /// Time it spent on packets, in nanoseconds, as it says.
    pub busy_ns: u64,
    /// Lines of its output that were not relayed: too many, too long, or nowhere to write them.
    #[serde(default)]
    pub output_dropped: u64,
    /// What it publishes.
    pub counters: BTreeMap<String, u64>,
}

impl Lane {
    /// Packets that were redirected, but neither received nor counted as dropped. If no packets are
    /// in flight, these are lost.
    pub fn missing(&self) -> u64 {
        self.xdp.redirect.saturating_sub(self.received + self.kernel.rx_dropped + self.kernel.rx_ring_full)
    }
}

/// The same, without control characters in its texts: a report may come from whatever process
/// listens on a socket.
fn printable<T: Serialize + DeserializeOwned + Clone>(original: &T) -> T {
    fn each(value: &mut Value) {
        match value {
            Value::String(text) => *text = text::printable(text),
            Value::Array(items) => items.iter_mut().for_each(each),
            Value::Object(entries) => {
                let old = std::mem::take(entries);
                entries.extend(old.into_iter().map(|(name, mut value)| {
                    each(&mut value);
                    (text::printable(&name), value)
                }));
            }
            _ => {}
        }
    }
    let printable = serde_json::to_value(original).and_then(|mut value| {
        each(&mut value);
        serde_json::from_value(value)
    });
    // Only texts were changed, so it deserializes as before.
    printable.unwrap_or_else(|_| original.clone())
}

impl Report {
    /// The same, fit to be shown.
    fn printable(&self) -> Self {
        printable(self)
    }

    /// The member of this name.
    pub fn member(&self, id: &str) -> Option<&Member> {
        self.members().find(|member| member.id == id)
    }

    /// Packets that a lane dropped, before the groups and in each of them.
    fn dropped_by(&self, port: &Port, lane: &Lane) -> u64 {
        let its = |of_group: &&GroupLane| of_group.port == port.name && of_group.queue == lane.queue;
        let of_groups = self.groups.iter().flat_map(|group| group.lanes.iter().filter(its));
        let dropped = of_groups.flat_map(|lane| lane.dropped.values());
        lane.dropped.values().chain(dropped).sum()
    }

    /// The lanes of all ports.
    pub fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.ports.iter().flat_map(|port| &port.lanes)
    }

    /// The members of all groups.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.groups.iter().flat_map(|group| &group.members)
    }

    /// Packets received by the lanes, and delivered and dropped by them. With several groups a
    /// packet is delivered, or dropped, once for each.
    pub fn totals(&self) -> (u64, u64, u64) {
        let groups = || self.groups.iter().flat_map(|group| &group.lanes);
        let dropped_by_lanes = self.lanes().flat_map(|lane| lane.dropped.values());
        let dropped_by_groups = groups().flat_map(|lane| lane.dropped.values());
        (
            self.lanes().map(|lane| lane.received).sum(),
            groups().map(|lane| lane.delivered).sum(),
            dropped_by_lanes.chain(dropped_by_groups).sum(),
        )
    }

    /// What does not add up, in sentences; nothing at rest. While packets flow, counters are read
    /// one after the other, and may differ by the packets that moved meanwhile.
    pub fn imbalances(&self) -> Vec<String> {
        let mut found = Vec::new();
        for lane in self.lanes() {
            let frames = &lane.frames;
            let owned = frames.free + frames.kernel + frames.lane + frames.lent + frames.tx;
            if frames.total != owned {
                found.push(format!("lane {}: {} frames, but owners have {owned}", lane.queue, frames.total));
            }
        }
        for group in &self.groups {
            self.imbalances_of(group, &mut found);
        }
        // A frame is lent once, to one or several groups.
        let lent: u64 = self.lanes().map(|lane| u64::from(lane.frames.lent)).sum();
        let backlogs =
            || self.groups.iter().map(|group| group.members.iter().map(|member| member.backlog).sum::<u64>());
        let backlog: u64 = backlogs().sum();
        if !(backlogs().max().unwrap_or(0)..=backlog).contains(&lent) {
            found.push(format!("workers have {backlog} packets, but {lent} frames are lent"));
        }
        found
    }

    fn imbalances_of(&self, group: &Group, found: &mut Vec<String>) {
        if group.lanes.len() != self.lanes().count() {
            found.push(format!("group {}: not all lanes are listed", group.name));
        }
        for (lane, of_group) in self.lanes().zip(&group.lanes) {
            let dropped: u64 = lane.dropped.values().chain(of_group.dropped.values()).sum();
            if lane.received != of_group.delivered + dropped {
                found.push(format!(
                    "lane {}, group {}: received {} is not delivered {} + dropped {dropped}",
                    lane.queue, group.name, lane.received, of_group.delivered
                ));
            }
        }
        let delivered: u64 = group.lanes.iter().map(|lane| lane.delivered).sum();
        let members: u64 = group.members.iter().map(|member| member.delivered).sum();
        let requeued: u64 = group.members.iter().map(|member| member.requeued).sum();
        if members != delivered + requeued {
            found.push(format!(
                "group {}: lanes delivered {delivered} and requeued {requeued}, members got {members}",
                group.name
            ));
        }
        for member in &group.members {
            let gone = member.committed + member.requeued + member.lost;
            if member.delivered != gone + member.backlog {
                found.push(format!(
                    "member {}: delivered {} is not committed {} + requeued {} + lost {} + backlog {}",
                    member.id,
                    member.delivered,
                    member.committed,
                    member.requeued,
                    member.lost,
                    member.backlog
                ));
            }
        }
    }
}
