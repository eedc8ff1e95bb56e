//! The report as a table of at most 80 columns.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Group, Lane, Level, Member, Nic, Port, Report, Xdp};

/// Renders a report. Rates and utilisation are of the time since `earlier`, a report of the same
/// primary; without one, of the time since its start.
pub fn render(report: &Report, earlier: Option<&Report>) -> String {
    let report = &report.printable();
    let earlier = earlier.filter(|earlier| earlier.pid == report.pid);
    let elapsed = report.uptime_ns - earlier.map_or(0, |earlier| earlier.uptime_ns.min(report.uptime_ns));
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_all(&mut out, report, earlier, elapsed.max(1));
    out
}

/// The state to show. That packets are held matters more than what the worker is doing.
fn state(member: &Member) -> &str {
    if member.held { "held" } else { &member.state }
}

/// Renders the members of all groups, each with its history.
pub fn render_members(report: &Report) -> String {
    let report = report.printable();
    let members =
        report.groups.iter().flat_map(|group| group.members.iter().map(|member| (member, group.buckets)));
    let mut out = format!(
        "{:<12} {:>7} {:>4} {:<9} {:>6} {:>5} {:>7} {:>8} {:>6} {:>6}\n",
        "member", "pid", "core", "state", "for", "flows", "backlog", "restarts", "cpu s", "MiB"
    );
    for (member, buckets) in members {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<12} {:>7} {:>4} {:<9} {:>6} {:>5} {:>7} {:>8} {:>6} {:>6}",
            member.id,
            member.pid,
            member.core.map_or_else(|| "-".into(), |core| core.to_string()),
            state(member),
            age(member.in_state_ns / 1_000_000_000),
            percent(member.buckets as u64, buckets as u64),
            short(member.backlog),
            short(member.restarts),
            short(member.cpu_ns / 1_000_000_000),
            short(member.resident_bytes >> 20),
        );
        let mut more = vec![format!("{:.22}", member.program.rsplit('/').next().unwrap_or_default())];
        more.extend(member.last_exit.iter().map(|exit| format!("last process: {exit:.24}")));
        more.extend((member.hangs > 0).then(|| format!("hung {}", member.hangs)));
        let _ = writeln!(out, "  {}", more.join("; "));
        if member.output_dropped > 0 {
            let _ = writeln!(out, "  lines of its output dropped {}", member.output_dropped);
        }
    }
    out
}

/// A time in at most 5 characters: 59s, 59m, 23h, 9999d.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

fn write_all(out: &mut String, report: &Report, earlier: Option<&Report>, elapsed: u64) -> std::fmt::Result {
    for (number, port) in report.ports.iter().enumerate() {
        let before = earlier.and_then(|earlier| earlier.ports.get(number));
        write_port(out, report, port, before, elapsed)?;
    }
    for group in &report.groups {
        writeln!(
            out,
            "\n{:<12} {:>7} {:>4} {:<9} {:>12} {:>7} {:>7} {:>6} {:>5}",
            "member", "pid", "core", "state", "delivered", "dropped", "backlog", "lost", "busy"
        )?;
        for member in &group.members {
            let before = earlier.and_then(|earlier| earlier.member(&member.id));
            let busy = member.busy_ns.saturating_sub(before.map_or(0, |member| member.busy_ns));
            writeln!(
                out,
                "{:<12} {:>7} {:>4} {:<9} {:>12} {:>7} {:>7} {:>6} {:>5}",
                member.id,
                member.pid,
                member.core.map_or_else(|| "-".into(), |core| core.to_string()),
                state(member),
                member.delivered,
                short(member.dropped),
                short(member.backlog),
                short(member.lost),
                percent(busy, elapsed)
            )?;
            if member.output_dropped > 0 {
                writeln!(out, "  lines of its output dropped {}", member.output_dropped)?;
            }
            for (name, value) in &member.counters {
                writeln!(out, "  {name:<24} {value}")?;
            }
        }
    }
    write_ledger(out, report)
}

fn write_port(
    out: &mut String,
    report: &Report,
    port: &Port,
    earlier: Option<&Port>,
    elapsed: u64,
) -> std::fmt::Result {
    writeln!(
        out,
        "{}: {}, primary {}, up {}.{} s",
        port.name,
        port.mode,
        report.pid,
        report.uptime_ns / 1_000_000_000,
        report.uptime_ns / 100_000_000 % 10
    )?;
    for notice in port.notices.iter().filter(|notice| notice.level > Level::Info) {
        wrapped(out, &format!("{} {notice}", notice.level.mark()))?;
    }
    writeln!(
        out,
        "\n{:>5} {:>4} {:>12} {:>8} {:>10} {:>10} {:>9} {:>5}",
        "queue", "core", "received", "pps", "dropped", "kernel", "passed", "busy"
    )?;
    for lane in &port.lanes {
        let same = |before: &&Lane| before.queue == lane.queue;
        let before = earlier.and_then(|earlier| earlier.lanes.iter().find(same));
        let received = lane.received.saturating_sub(before.map_or(0, |lane| lane.received));
        let busy = lane.busy_ns.saturating_sub(before.map_or(0, |lane| lane.busy_ns));
        writeln!(
            out,
            "{:>5} {:>4} {:>12} {:>8} {:>10} {:>10} {:>9} {:>5}",
            lane.queue,
            lane.core,
            lane.received,
            short(rate(received, elapsed)),
            short(report.dropped_by(port, lane)),
            short(lane.kernel.rx_dropped + lane.kernel.rx_ring_full),
            short(lane.xdp.pass),
            percent(busy, elapsed)
        )?;
    }
    Ok(())
}

/// Writes a sentence in lines of at most 80 columns.
fn wrapped(out: &mut String, sentence: &str) -> std::fmt::Result {
    let mut column = 0;
    for word in sentence.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > 80 {
            write!(out, "\n  {word}")?;
            column = 2 + length;
        } else if column > 0 {
            write!(out, " {word}")?;
            column += 1 + length;
        } else {
            write!(out, "{word}")?;
            column = length;
        }
    }
    writeln!(out)
}

/// Where every packet and every frame is.
fn write_ledger(out: &mut String, report: &Report) -> std::fmt::Result {
    let mut xdp = Xdp::default();
    report.ports.iter().for_each(|port| xdp.add(port.unserved));
    report.lanes().for_each(|lane| xdp.add(lane.xdp));
    let Xdp { redirect, pass, pass_non_ip, pass_nd, pass_rule, pass_no_socket, drop_too_long } = xdp;
    write!(out, "\nxdp      redirected {redirect}, passed {pass}")?;
    if drop_too_long > 0 {
        write!(out, ", dropped for being longer than a frame {drop_too_long}")?;
    }
    writeln!(out)?;
    if pass > 0 {
        writeln!(
            out,
            "         (not IP {pass_non_ip}, discovery {pass_nd}, rules {pass_rule}, no socket {pass_no_socket})"
        )?;
    }
    let kernel =
        |field: fn(&super::Kernel) -> u64| report.lanes().map(|lane| field(&lane.kernel)).sum::<u64>();
    writeln!(
        out,
        "kernel   dropped {}, RX ring full {}, FILL ring empty {}",
        kernel(|kernel| kernel.rx_dropped),
        kernel(|kernel| kernel.rx_ring_full),
        kernel(|kernel| kernel.fill_ring_empty)
    )?;
    let unaccounted: u64 = report.lanes().map(|lane| lane.unaccounted).sum();
    if unaccounted > 0 {
        writeln!(out, "lost     {unaccounted} redirected packets that no counter has")?;
    }
    write_nic(out, report)?;
    if report.log_lines_lost > 0 {
        writeln!(out, "log      {} lines lost", report.log_lines_lost)?;
    }
    for group in &report.groups {
        write_packets(out, report, group)?;
    }
    let cut: u64 = report.lanes().map(|lane| lane.cut).sum();
    if cut > 0 {
        writeln!(out, "cut      {cut} packets: their frames hold less than their IP length")?;
    }
    let frames = |field: fn(&super::Frames) -> u32| {
        report.lanes().map(|lane| u64::from(field(&lane.frames))).sum::<u64>()
    };
    writeln!(
        out,
        "frames   total {} = free {} + kernel {} + lane {} + lent {} + tx {}",
        frames(|frames| frames.total),
        frames(|frames| frames.free),
        frames(|frames| frames.kernel),
        frames(|frames| frames.lane),
        frames(|frames| frames.lent),
        frames(|frames| frames.tx)
    )
}

/// What became of the packets in a group, which gets all that the lanes accept.
fn write_packets(out: &mut String, report: &Report, group: &Group) -> std::fmt::Result {
    let received: u64 = report.lanes().map(|lane| lane.received).sum();
    let delivered: u64 = group.lanes.iter().map(|lane| lane.delivered).sum();
    let before = report.lanes().flat_map(|lane| &lane.dropped);
    let mut causes = BTreeMap::<&str, u64>::new();
    for (cause, count) in before.chain(group.lanes.iter().flat_map(|lane| &lane.dropped)) {
        *causes.entry(cause).or_default() += count;
    }
    let dropped: u64 = causes.values().sum();
    write!(out, "packets  received {received} = delivered {delivered} + dropped {dropped}")?;
    if report.groups.len() > 1 {
        write!(out, " in group {:.24}", group.name)?;
    }
    writeln!(out)?;
    causes.retain(|_, count| *count > 0);
    if !causes.is_empty() {
        let causes: Vec<_> = causes.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
        writeln!(out, "         ({})", causes.join(", "))?;
    }
    Ok(())
}

/// Counters of the NIC, and of interfaces below, that have counted something.
fn write_nic(out: &mut String, report: &Report) -> std::fmt::Result {
    let counters = |nic: &Nic, width: usize| -> Vec<String> {
        let counted =
            |(name, since): (&String, &u64)| (*since > 0).then(|| format!("{name:.width$} {since}"));
        let interface = nic.interface.iter().filter(|(name, _)| *name != "rx_packets").filter_map(counted);
        let driver = nic.driver.iter().filter_map(counted).map(|counter| format!("driver {counter}"));
        interface.chain(driver).collect()
    };
    let nics = || report.ports.iter().map(|port| &port.nic);
    for (number, counter) in nics().flat_map(|nic| counters(nic, 40)).enumerate() {
        writeln!(out, "{:<8} {counter}", if number == 0 { "nic" } else { "" })?;
    }
    for (name, nic) in nics().flat_map(|nic| &nic.below) {
        for (number, counter) in counters(nic, 20).into_iter().enumerate() {
            let (label, name) = if number == 0 { ("below", name.as_str()) } else { ("", "") };
            writeln!(out, "{label:<8} {name:<15.15} {counter}")?;
        }
    }
    Ok(())
}

/// Packets per second.
fn rate(count: u64, elapsed_ns: u64) -> u64 {
    u64::try_from(u128::from(count) * 1_000_000_000 / u128::from(elapsed_ns.max(1))).unwrap_or(u64::MAX)
}

fn percent(part: u64, whole: u64) -> String {
    format!("{}%", u128::from(part) * 100 / u128::from(whole.max(1)))
}

/// At most 6 characters: 999999, 1000k … 9999k, 10.0M.
fn short(number: u64) -> String {
    match number {
        0..1_000_000 => number.to_string(),
        1_000_000..10_000_000 => format!("{}k", number / 1000),
        10_000_000..10_000_000_000 => format!("{}M", number / 1_000_000),
        _ => format!("{}G", number / 1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{GroupLane, Nic, Notice};
    use xfan_shm::ids::QueueId;

    #[test]
    fn fits_80_columns_whatever_the_numbers() {
        let lane = Lane {
            queue: QueueId(127),
            core: 1023,
            received: 999_999_999_999,
            busy_ns: u64::MAX / 2,
            cut: 999_999_999_999,
            ..Lane::default()
        };
        let member = Member {
            id: "default/63".into(),
            pid: 4_194_304,
            core: Some(1023),
            delivered: 999_999_999_999,
            dropped: 999_999_999_999,
            backlog: 1_048_576,
            requeued: 999_999,
            lost: 999_999,
            busy_ns: 1,
            state: "unhealthy".into(),
            restarts: 999_999,
            hangs: 999_999,
            cpu_ns: u64::MAX,
            in_state_ns: u64::MAX / 100,
            resident_bytes: 1 << 40,
            program: "/usr/local/bin/".to_owned() + &"w".repeat(100),
            last_exit: Some("signal: 11 (SIGSEGV) (core dumped)".into()),
            ..Member::default()
        };
        let below = Nic {
            interface: [("rx_missed_errors".into(), 7)].into(),
            driver: [("d".repeat(60), u64::MAX)].into(),
            ..Nic::default()
        };
        let report = Report {
            pid: 4_194_304,
            uptime_ns: u64::MAX / 2,
            ports: vec![Port {
                name: "enp129s0f1np1".into(),
                mode: "native, zero-copy".into(),
                lanes: vec![lane],
                nic: Nic {
                    interface: [
                        ("rx_dropped".into(), u64::MAX),
                        ("rx_errors".into(), 0),
                        ("rx_packets".into(), 1),
                    ]
                    .into(),
                    driver: [("d".repeat(60), u64::MAX)].into(),
                    below: [("i".repeat(15), below)].into(),
                },
                notices: vec![Notice {
                    topic: "link".into(),
                    level: Level::Error,
                    what: "enp129s0f1np1 is down".into(),
                    meaning: "no packet comes in until `ip link set dev enp129s0f1np1 up` ".repeat(3),
                }],
                ..Port::default()
            }],
            groups: vec![Group {
                name: "default".into(),
                buckets: 4096,
                members: vec![member],
                ..Group::default()
            }],
            ..Report::default()
        };
        let text = render(&report, None);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        assert!(text.contains("default/63"));
        assert!(text.contains("\nerror: enp129s0f1np1 is down: no packet comes in until"), "{text}");
        assert!(text.contains("\nnic      rx_dropped 18446744073709551615\n"), "{text}");
        assert!(text.contains("\nbelow    iiiiiiiiiiiiiii rx_missed_errors 7\n"), "{text}");
        assert!(!text.contains("rx_errors") && !text.contains("rx_packets"), "{text}");
        let text = render_members(&report);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    }

    #[test]
    fn cut_packets_are_shown_if_there_are_any() {
        let port = Port { lanes: vec![Lane::default(); 2], ..Port::default() };
        let mut report = Report { ports: vec![port], ..Report::default() };
        assert!(!render(&report, None).contains("cut"));
        report.ports[0].lanes[1].cut = 7;
        let text = render(&report, None);
        assert!(text.contains("\ncut      7 packets: their frames hold less"), "{text}");
    }

    #[test]
    fn ports_and_groups_are_shown_one_after_the_other() {
        let port = |name: &str, frame_owner| Port {
            name: name.into(),
            lanes: vec![Lane {
                received: 10,
                dropped: [("frame_owner".to_owned(), frame_owner)].into(),
                ..Lane::default()
            }],
            ..Port::default()
        };
        let lane = |port: &str, ring_full| GroupLane {
            port: port.into(),
            delivered: 9 - ring_full,
            dropped: [("ring_full".to_owned(), ring_full)].into(),
            ..GroupLane::default()
        };
        let group = |name: &str, ring_full| Group {
            name: name.into(),
            lanes: vec![lane("east", 0), lane("west", ring_full)],
            ..Group::default()
        };
        let report = Report {
            ports: vec![port("east", 1), port("west", 1)],
            groups: vec![group("ids", 0), group("flows", 4)],
            ..Report::default()
        };
        let text = render(&report, None);
        assert!(text.contains("east: ") && text.contains("\nwest: "), "{text}");
        let lanes = text.lines().filter(|line| line.starts_with("    0 "));
        let dropped: Vec<_> = lanes.filter_map(|line| line.split_whitespace().nth(4)).collect();
        assert_eq!(dropped, ["1", "5"], "{text}");
        let ids = "packets  received 20 = delivered 18 + dropped 2 in group ids\n         (frame_owner 2)\n";
        let flows = "packets  received 20 = delivered 14 + dropped 6 in group flows\n         \
                     (frame_owner 2, ring_full 4)\n";
        assert!(text.contains(ids) && text.contains(flows), "{text}");
    }

    #[test]
    fn a_member_whose_packets_are_held_is_shown_as_held() {
        let member = Member { state: "starting".into(), held: true, ..Member::default() };
        let group = Group { members: vec![member], ..Group::default() };
        let text = render_members(&Report { groups: vec![group], ..Report::default() });
        assert!(text.contains(" held ") && !text.contains("starting"), "{text}");
    }
}
