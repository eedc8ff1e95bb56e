//! Changes of the interface while a primary runs are reported, followed, and not mistaken for
//! something else.

use xfan::report::{Level, Notice, Report};
use xfan_tests::balance::assert_balanced;
use xfan_tests::command;
use xfan_tests::e2e_or_skip;
use xfan_tests::meddle;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::limit_descriptors;
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::tx::TxSocket;
use xfan_tests::veth::{Veth, VethConfig, network};

const PACKETS: u64 = 100;

fn replay(namespace: &Netns) {
    let frames = traffic::synthetic(10, 100, 1).frames;
    let replay = Replay { queues: vec![0, 1], ..Replay::onto("tx0") };
    namespace.run(|| replay.run(&frames)).unwrap();
}

/// Starts one worker on two queues.
fn start(namespace: &Netns) -> Primary {
    Launch::on(namespace).unwrap().worker("xfan-count", "").unwrap().start().unwrap()
}

fn all_received(report: &Report, packets: u64) -> bool {
    report.totals().0 == packets && report.groups[0].members[0].committed == packets
}

#[test]
fn a_primary_without_descriptors_left_continues() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let mut primary = start(&namespace);
    let pid = primary.process.pid();
    // The limit allows only descriptors 0, 1 and 2: no new one can be made, even if others close.
    let before = limit_descriptors(pid, 3);
    // Meanwhile the primary checks the interface several times.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert!(primary.process.is_running(), "{:#?}", primary.process.stderr());
    replay(&namespace);
    limit_descriptors(pid, before);
    let report = primary.balanced_report_when(|report| all_received(report, PACKETS));
    assert_balanced(&report, PACKETS);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn a_renamed_interface_is_followed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = start(&namespace);
    replay(&namespace);
    primary.report_after(PACKETS, true);
    namespace.ip("link set dev rx0 down").unwrap();
    namespace.ip("link set dev rx0 name mirror0").unwrap();
    namespace.ip("link set dev mirror0 up").unwrap();
    let report = primary.balanced_report_when(|report| report.ports[0].name == "mirror0");
    assert_balanced(&report, PACKETS);
    // An interface that takes the old name is another one.
    namespace.ip("link add name rx0 type veth peer name other0").unwrap();
    replay(&namespace);
    let report = primary.balanced_report_when(|report| all_received(report, 2 * PACKETS));
    assert_balanced(&report, 2 * PACKETS);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let log = exit.stderr.join("\n");
    assert!(log.contains("rx0 was renamed to mirror0"), "{log}");
}

/// Waits until the report has a notice of this topic, and returns the notice.
fn told(primary: &Primary, topic: &str) -> Notice {
    let notice = |report: &Report| {
        report.ports[0].notices.iter().find(|notice| notice.topic.starts_with(topic)).cloned()
    };
    notice(&primary.report_when(|report| notice(report).is_some())).unwrap()
}

/// Waits until the report has no notice of this topic.
fn told_no_longer(primary: &Primary, topic: &str) {
    primary
        .report_when(|report| !report.ports[0].notices.iter().any(|notice| notice.topic.starts_with(topic)));
}

/// The details of an event in the journal.
fn details(primary: &Primary, event: &str) -> Vec<String> {
    let entries = primary.history().entries.into_iter();
    entries.filter(|entry| entry.event == event).map(|entry| entry.detail).collect()
}

/// The journal's entries about the interface.
fn journal(primary: &Primary) -> Vec<String> {
    details(primary, "interface")
}

#[test]
fn each_change_is_in_log_journal_and_report() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(4);
    for end in ["tx0", "rx0"] {
        namespace.ethtool(&format!("-L {end} rx 2 tx 2")).unwrap();
    }
    namespace.ip("link set dev rx0 promisc on").unwrap();
    let primary = start(&namespace);
    assert_eq!(primary.report().ports[0].lanes.len(), 2);
    let serious = |report: &Report| report.ports[0].notices.iter().any(|notice| notice.level > Level::Info);
    assert!(!serious(&primary.report()), "{:#?}", primary.report());

    let changes: [(&str, &str, &str, &str); 5] = [
        (
            "queues",
            "ethtool -L rx0 rx 4",
            "ethtool -L rx0 rx 2",
            "RX queues 2, 3 of rx0 have no lane: their packets go to the kernel",
        ),
        (
            "mtu",
            "ip link set dev rx0 mtu 3000",
            "ip link set dev rx0 mtu 1500",
            "the MTU of rx0 is 3000 bytes, and a frame holds packets of 1770: longer packets are dropped and counted",
        ),
        (
            "carrier",
            "ip link set dev tx0 down",
            "ip link set dev tx0 up",
            "rx0 has no carrier: it receives no packets",
        ),
        ("link", "ip link set dev rx0 down", "ip link set dev rx0 up", "rx0 is down: it receives no packets"),
        (
            "promiscuous",
            "ip link set dev rx0 promisc off",
            "ip link set dev rx0 promisc on",
            "rx0 is not in promiscuous mode: it receives only frames for this host",
        ),
    ];
    let run = |command: &str| {
        let mut words = command.split(' ');
        command::run(namespace.command(words.next().unwrap()).args(words)).unwrap();
    };
    for (topic, make, unmake, text) in changes {
        run(make);
        let notice = told(&primary, topic);
        assert!(notice.to_string().starts_with(text), "{notice}");
        run(unmake);
        told_no_longer(&primary, topic);
        let journal = journal(&primary);
        assert!(journal.iter().any(|line| line.starts_with(text)), "{journal:#?}");
        assert_eq!(journal.last().unwrap(), &format!("over: {}", notice.what));
        primary.process.wait_for_line(&format!(" WARN {text}")).unwrap();
        primary.process.wait_for_line(&format!("over: {}", notice.what)).unwrap();
    }

    // Packets still arrive.
    replay(&namespace);
    let report = primary.balanced_report_when(|report| all_received(report, PACKETS));
    assert_balanced(&report, PACKETS);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn conditions_at_the_start_are_reported() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(2) }).unwrap();
    namespace.ip("link set dev tx0 down").unwrap();
    let launch = Launch::on(&namespace).unwrap().with("--queues 0").config("xdp_mode = 'generic'").unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    // The kernel merges no packets of an interface whose program runs in generic mode.
    namespace.ethtool("-K rx0 gro on").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(2500));
    let expected = [
        ("WARN", "rx0 has no carrier: "),
        ("WARN", "RX queue 1 of rx0 has no lane: "),
        ("INFO", "rx0 is not in promiscuous mode: "),
        ("INFO", "rx0 may strip VLAN tags (rxvlan): "),
    ];
    let log = primary.process.stderr();
    for (level, text) in expected {
        let said = |line: &String| line.contains(&format!(" {level} ")) && line.contains(text);
        assert_eq!(log.iter().filter(|line| said(line)).count(), 1, "{text}: {log:#?}");
    }
    assert_eq!(journal(&primary).len(), 2);
    assert_eq!(primary.report().ports[0].notices.len(), expected.len());
    // The table shows warnings to people; it leaves out mere information.
    let (exit, _folder) = primary.stop();
    let table = exit.stdout.join("\n");
    assert!(table.contains("warning: rx0 has no carrier: ") && !table.contains("promiscuous"), "{table}");
}

#[test]
fn removal_of_the_xdp_program_is_reported() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let primary = start(&namespace);
    meddle::detach_program(primary.process.pid());
    let notice = told(&primary, "xdp");
    assert_eq!(notice.level, Level::Error);
    assert!(notice.to_string().contains("all packets go to the kernel"), "{notice}");
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn packets_that_do_not_fit_a_frame_are_reported() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let primary = start(&namespace);
    for end in ["tx0", "rx0"] {
        namespace.ip(&format!("link set dev {end} mtu 3000")).unwrap();
    }
    let notice = told(&primary, "mtu");
    assert!(notice.meaning.contains("`ip link set dev rx0 mtu 1770`"), "{notice}");
    let long = traffic::udp("10.3.0.2:4000".parse().unwrap(), "10.3.0.1:53".parse().unwrap(), &[0; 2900]);
    namespace.run(|| Replay::onto("tx0").run(&vec![long; 100])).unwrap();
    // The packets are counted, and not as lost.
    let report = primary.report_when(|report| report.ports[0].lanes[0].xdp.drop_too_long == 100);
    assert_eq!((report.ports[0].lanes[0].xdp.redirect, report.ports[0].lanes[0].kernel.rx_dropped), (0, 0));
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

/// The journal's entries about packets in no counter.
fn losses(primary: &Primary) -> Vec<String> {
    details(primary, "unaccounted")
}

/// A queue goes deaf: the kernel refuses its packets, since the socket belongs to another queue,
/// and only the driver counts that.
#[test]
fn a_deaf_queue_is_reported_at_once_and_at_the_end() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("--queues 0").worker("xfan-count", "").unwrap();
    let primary = launch.start().unwrap();
    let pid = primary.process.pid();
    let frames = traffic::synthetic(10, 100, 1).frames;
    let to_queue_0 = Replay { queues: vec![0], ..Replay::onto("tx0") };
    let send = || namespace.run(|| to_queue_0.run(&frames)).unwrap();
    send();
    let report = primary.report_after(PACKETS, true);
    assert_eq!(report.ports[0].lanes[0].unaccounted, 0);

    let of_queue_1 = namespace.run(|| TxSocket::open("rx0", 1)).unwrap();
    let right = meddle::sockets(pid);
    meddle::redirect_to(pid, 0, &of_queue_1);
    send();
    let notice = told(&primary, "unaccounted");
    let text = "packets of queue 0 that were redirected to its socket and did not arrive: 100: ";
    assert!(notice.level == Level::Error && notice.to_string().starts_with(text), "{notice}");
    let report = primary.report();
    assert_eq!(
        (report.ports[0].lanes[0].xdp.redirect, report.ports[0].lanes[0].received),
        (2 * PACKETS, PACKETS)
    );
    assert_eq!(report.ports[0].lanes[0].unaccounted, PACKETS);
    assert!(losses(&primary)[0].starts_with(text), "{:#?}", losses(&primary));
    primary.process.wait_for_line(&format!(" ERROR {text}")).unwrap();
    // The driver has counted them.
    let report = primary.report_when(|report| report.ports[0].nic.driver["rx_queue_0_drops"] > 0);
    assert_eq!(
        (report.ports[0].nic.driver["rx_queue_0_drops"], report.ports[0].nic.interface["rx_dropped"]),
        (PACKETS, PACKETS)
    );

    // The queue receives again, which is reported after a while.
    meddle::redirect_to(pid, 0, &right[0]);
    primary.report_when(|report| {
        send();
        !report.ports[0].notices.iter().any(|notice| notice.topic == "unaccounted")
    });
    assert!(losses(&primary)[1].starts_with("packets of queue 0 arrive again; 100 were lost"));

    drop((right, of_queue_1));
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(1), "{exit:#?}");
    let last = exit.stderr.last().unwrap();
    assert!(
        last.starts_with("xfan: packets were lost that are in no counter: packets of queue 0 "),
        "{last}"
    );
    let table = exit.stdout.join("\n");
    assert!(table.contains("lost     100 redirected packets that no counter has"), "{table}");
    assert!(table.contains("driver rx_queue_0_drops 100"), "{table}");
}

/// At its end nothing is in flight any more, so even one missing packet is reported.
#[test]
fn a_loss_that_shows_only_at_the_end_is_reported() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("--queues 0").worker("xfan-count", "").unwrap();
    let primary = launch.start().unwrap();
    let of_queue_1 = namespace.run(|| TxSocket::open("rx0", 1)).unwrap();
    meddle::redirect_to(primary.process.pid(), 0, &of_queue_1);
    let frame = traffic::udp("10.3.0.2:4000".parse().unwrap(), "10.3.0.1:53".parse().unwrap(), &[0; 100]);
    let to_queue_0 = Replay { queues: vec![0], ..Replay::onto("tx0") };
    namespace.run(|| to_queue_0.run(&[frame])).unwrap();
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(1), "{exit:#?}");
    assert!(exit.stderr.last().unwrap().contains("and did not arrive: 1: "), "{exit:#?}");
}
