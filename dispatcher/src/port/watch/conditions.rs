//! The conditions of an interface that affect packets, and the sentences that report them. No I/O.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use xfan_shm::ids::QueueId;

use super::driver::Offloads;
use super::link::Link;
use crate::report::{Level, Notice};

/// The state of an interface at the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Flags and MTU.
    pub link: Link,
    /// The number of RX queues in use; `None` if the driver does not report it.
    pub rx_queues: Option<u32>,
    /// Offloads that change packets before xfan sees them.
    pub offloads: Offloads,
}

/// What the primary expects of the interface, fixed at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Queues that have a lane.
    pub queues: Vec<QueueId>,
    /// The largest MTU whose packets fit a frame.
    pub max_mtu: u32,
}

/// All current conditions of an interface. `unseen`: the interface receives packets, but the XDP
/// program sees none.
pub fn conditions(seen: &Seen, expected: &Expected, unseen: bool) -> Vec<Notice> {
    let Seen { name, link, rx_queues, offloads } = seen;
    let mut all = Vec::new();
    let mut say = |topic, level, what: String, meaning: String| {
        all.push(Notice::new(topic, level, what, meaning));
    };
    if !link.up {
        say(
            "link",
            Level::Warn,
            format!("{name} is down"),
            format!("it receives no packets; run `ip link set dev {name} up`"),
        );
    } else if !link.carrier {
        say(
            "carrier",
            Level::Warn,
            format!("{name} has no carrier"),
            "it receives no packets until the other end of the link is up".into(),
        );
    }
    if let Some(count) = *rx_queues {
        let without: Vec<QueueId> =
            (0..count).map(QueueId).filter(|queue| !expected.queues.contains(queue)).collect();
        if !without.is_empty() {
            say(
                "queues",
                Level::Warn,
                format!("RX {} of {name} {} no lane", queues(&without), has(&without)),
                format!(
                    "their packets go to the kernel; restart xfan to give them lanes, or lower the \
                     number of queues (`ethtool -L {name}`)"
                ),
            );
        }
        let gone: Vec<QueueId> = expected.queues.iter().copied().filter(|queue| queue.0 >= count).collect();
        if !gone.is_empty() {
            say(
                "queues_gone",
                Level::Warn,
                format!("{name} has only {count} RX queues now; {} had a lane", queues(&gone)),
                format!(
                    "these lanes receive nothing, and other lanes get their packets; restart xfan, or \
                     raise the number again (`ethtool -L {name}`)"
                ),
            );
        }
    }
    if link.mtu > expected.max_mtu {
        say(
            "mtu",
            Level::Warn,
            format!(
                "the MTU of {name} is {} bytes, and a frame holds packets of {}",
                link.mtu, expected.max_mtu
            ),
            format!(
                "longer packets are dropped and counted (`drop_too_long`); run `ip link set dev {name} \
                 mtu {}`, or restart xfan, which then uses larger frames or reports why it cannot",
                expected.max_mtu
            ),
        );
    }
    if !link.xdp {
        say(
            "xdp",
            Level::Error,
            format!("the XDP program is no longer attached to {name}: another program has detached it"),
            "all packets go to the kernel, and none to workers; restart xfan".into(),
        );
    }
    if unseen && link.xdp {
        say(
            "unseen",
            Level::Error,
            format!("{name} receives packets, but the XDP program sees none"),
            "the driver drops them, or does not run the program for them (see the counters of the \
             NIC); restart xfan"
                .into(),
        );
    }
    if !link.promiscuous {
        say(
            "promiscuous",
            Level::Info,
            format!("{name} is not in promiscuous mode"),
            format!(
                "it receives only frames for this host; on a mirror port, run `ip link set dev {name} \
                 promisc on`"
            ),
        );
    }
    if offloads.lro {
        say(
            "lro",
            Level::Warn,
            format!("{name} merges packets (LRO or hardware GRO)"),
            format!(
                "workers see merged packets, and those that do not fit into a frame are dropped; run \
                 `ethtool -K {name} lro off rx-gro-hw off`"
            ),
        );
    }
    if offloads.rxvlan {
        say(
            "rxvlan",
            Level::Info,
            format!("{name} may strip VLAN tags (rxvlan)"),
            format!(
                "workers see packets without these tags; to keep the tags, run `ethtool -K {name} \
                 rxvlan off`"
            ),
        );
    }
    all
}

/// The condition that packets redirected to a socket did not arrive, and are in no counter.
pub fn unaccounted(queue: QueueId, lost: u64) -> Notice {
    Notice::new(
        "unaccounted",
        Level::Error,
        format!("packets of queue {queue} that were redirected to its socket and did not arrive: {lost}"),
        "no counter of the kernel or of xfan contains them; the counters of the NIC may tell more. \
         Restart xfan; if it happens again, set xdp_mode = \"generic\", or, on a bond, run xfan on \
         its ports",
    )
}

fn queues(numbers: &[QueueId]) -> String {
    let list: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    format!("queue{} {}", if numbers.len() == 1 { "" } else { "s" }, list.join(", "))
}

fn has(numbers: &[QueueId]) -> &'static str {
    if numbers.len() == 1 { "has" } else { "have" }
}

/// A change to report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The condition has begun, or its text has changed.
    Begins(Notice),
    /// The condition has ended.
    Ends(Notice),
}

/// The most reports of a topic in a burst: three times that a condition begins and ends.
const BURST: u32 = 6;
/// The time after which one more report of a topic is allowed.
const REFILL: Duration = Duration::from_secs(10);

/// The conditions already reported. Limits the rate, so that a flapping link does not fill the log
/// and the event history.
#[derive(Debug, Default)]
pub struct Reported {
    topics: BTreeMap<String, Topic>,
}

#[derive(Debug)]
struct Topic {
    /// The condition as last reported; `None`: none, or its end was reported.
    notice: Option<Notice>,
    /// The reports that count against [`BURST`].
    reports: u32,
    /// When `reports` was last lowered.
    refilled: Instant,
}

impl Reported {
    /// The changes to report, given all current conditions.
    pub fn changes(&mut self, conditions: &[Notice], now: Instant) -> Vec<Change> {
        for notice in conditions {
            self.topics.entry(notice.topic.clone()).or_insert(Topic {
                notice: None,
                reports: 0,
                refilled: now,
            });
        }
        let mut changes = Vec::new();
        for (name, topic) in &mut self.topics {
            while topic.reports > 0 && now.saturating_duration_since(topic.refilled) >= REFILL {
                topic.reports -= 1;
                topic.refilled += REFILL;
            }
            let notice = conditions.iter().find(|notice| notice.topic == *name);
            if notice == topic.notice.as_ref() || topic.reports == BURST {
                continue;
            }
            if topic.reports == 0 {
                topic.refilled = now;
            }
            topic.reports += 1;
            match (notice, std::mem::replace(&mut topic.notice, notice.cloned())) {
                (Some(notice), _) => changes.push(Change::Begins(notice.clone())),
                (None, Some(before)) => changes.push(Change::Ends(before)),
                (None, None) => {}
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An interface without conditions.
    fn well() -> (Seen, Expected) {
        let link = Link {
            mtu: 1500,
            up: true,
            carrier: true,
            promiscuous: true,
            xdp: true,
            counters: BTreeMap::new(),
        };
        let seen = Seen { name: "eth1".into(), link, rx_queues: Some(4), offloads: Offloads::default() };
        (seen, Expected { queues: [0, 1, 2, 3].map(QueueId).into(), max_mtu: 1770 })
    }

    fn said(change: impl FnOnce(&mut Seen, &mut Expected)) -> Vec<(String, String)> {
        let (mut seen, mut expected) = well();
        change(&mut seen, &mut expected);
        conditions(&seen, &expected, false)
            .into_iter()
            .map(|notice| (notice.topic.clone(), notice.to_string()))
            .collect()
    }

    #[test]
    fn a_healthy_interface_has_no_conditions() {
        assert_eq!(said(|_, _| {}), []);
        assert_eq!(said(|seen, _| seen.link.mtu = 1770), []);
        assert_eq!(said(|seen, _| seen.rx_queues = None), []);
    }

    #[test]
    fn each_condition_has_its_sentence() {
        type Case = (fn(&mut Seen, &mut Expected), &'static str, &'static str);
        let cases: [Case; 10] = [
            (
                |seen, _| (seen.link.up, seen.link.carrier) = (false, false),
                "link",
                "eth1 is down: it receives no packets",
            ),
            (|seen, _| seen.link.carrier = false, "carrier", "eth1 has no carrier: it receives no packets"),
            (
                |seen, _| seen.rx_queues = Some(6),
                "queues",
                "RX queues 4, 5 of eth1 have no lane: their packets go to",
            ),
            (
                |_, expected| expected.queues = [0, 1, 3].map(QueueId).into(),
                "queues",
                "RX queue 2 of eth1 has no lane",
            ),
            (
                |seen, _| seen.rx_queues = Some(2),
                "queues_gone",
                "eth1 has only 2 RX queues now; queues 2, 3 had a lane: ",
            ),
            (
                |seen, _| seen.link.mtu = 1771,
                "mtu",
                "is 1771 bytes, and a frame holds packets of 1770: longer packets",
            ),
            (|seen, _| seen.link.promiscuous = false, "promiscuous", "`ip link set dev eth1 promisc on`"),
            (|seen, _| seen.link.xdp = false, "xdp", "no longer attached to eth1"),
            (|seen, _| seen.offloads.lro = true, "lro", "`ethtool -K eth1 lro off"),
            (|seen, _| seen.offloads.rxvlan = true, "rxvlan", "`ethtool -K eth1 rxvlan off`"),
        ];
        for (change, topic, text) in cases {
            let said = said(change);
            assert_eq!(said.len(), 1, "{topic}: {said:?}");
            assert!(said[0].0 == topic && said[0].1.contains(text), "{said:?}");
        }
    }

    #[test]
    fn a_detached_program_is_not_also_unseen() {
        let (mut seen, expected) = well();
        let topics = |seen: &Seen| {
            conditions(seen, &expected, true).into_iter().map(|notice| notice.topic).collect::<Vec<_>>()
        };
        assert_eq!(topics(&seen), ["unseen"]);
        seen.link.xdp = false;
        assert_eq!(topics(&seen), ["xdp"]);
    }

    #[test]
    fn a_change_and_its_end_are_reported_once() {
        let (mut seen, expected) = well();
        let (mut reported, now) = (Reported::default(), Instant::now());
        assert_eq!(reported.changes(&conditions(&seen, &expected, false), now), []);
        seen.rx_queues = Some(5);
        let one = conditions(&seen, &expected, false);
        assert_eq!(reported.changes(&one, now), [Change::Begins(one[0].clone())]);
        assert_eq!(reported.changes(&one, now), []);
        seen.rx_queues = Some(6);
        let two = conditions(&seen, &expected, false);
        assert_eq!(reported.changes(&two, now), [Change::Begins(two[0].clone())]);
        assert_eq!(reported.changes(&[], now), [Change::Ends(two[0].clone())]);
        assert_eq!(reported.changes(&[], now), []);
    }

    #[test]
    fn reports_of_a_flapping_link_are_rate_limited() {
        let (mut seen, expected) = well();
        seen.link.carrier = false;
        let down = conditions(&seen, &expected, false);
        let (mut reported, start) = (Reported::default(), Instant::now());
        let mut number = 0;
        let mut last = None;
        for second in 0..1000u32 {
            let conditions = if second % 2 == 0 { &down[..] } else { &[] };
            let changes = reported.changes(conditions, start + Duration::from_secs(second.into()));
            number += changes.len();
            last = changes.into_iter().next_back().or(last);
        }
        assert!((100..=106).contains(&number), "{number}");
        // The link stays up: the last report says so.
        let changes: Vec<_> = (1000..1020)
            .flat_map(|second| reported.changes(&[], start + Duration::from_secs(second)))
            .collect();
        let last = changes.into_iter().next_back().or(last);
        assert_eq!(last, Some(Change::Ends(down[0].clone())));
    }
}
