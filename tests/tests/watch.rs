//! What changes about the interface while a primary runs is said, followed, and never taken for
//! something else.

use nix::sys::resource::Resource;
use nix::unistd::Pid;
use xfan::control::client::ask;
use xfan::control::journal::Page;
use xfan::report::{Level, Notice, Report};
use xfan_shm::protocol::{Reply, Request};
use xfan_tests::balance::assert_balanced;
use xfan_tests::command;
use xfan_tests::e2e_or_skip;
use xfan_tests::meddle;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::tx::TxSocket;
use xfan_tests::veth::{Veth, VethConfig};

const PACKETS: u64 = 100;

fn replay(namespace: &Netns) {
    let frames = traffic::synthetic(10, 100, 1).frames;
    let replay = Replay { queues: vec![0, 1], ..Replay::onto("tx0") };
    namespace.run(|| replay.run(&frames)).unwrap();
}

/// One worker, on two queues.
fn start(namespace: &Netns) -> Primary {
    Launch::on(namespace).unwrap().worker("xfan-count", "").unwrap().start().unwrap()
}

/// Sets the soft limit of another process's descriptors; returns the one it had.
fn limit_descriptors(pid: Pid, limit: u64) -> u64 {
    let get = |new: *const libc::rlimit| {
        let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: both point to a limit of ours, or are null, which means none.
        let result = unsafe { libc::prlimit(pid.as_raw(), Resource::RLIMIT_NOFILE as _, new, &raw mut old) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        old
    };
    let old = get(std::ptr::null());
    get(&libc::rlimit { rlim_cur: limit, ..old });
    old.rlim_cur
}

fn all_received(report: &Report, packets: u64) -> bool {
    report.totals().0 == packets && report.groups[0].members[0].committed == packets
}

#[test]
fn without_descriptors_left_the_primary_goes_on() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
    let mut primary = start(&namespace);
    let pid = primary.process.pid();
    // Its own 0, 1 and 2 are all there may be: no other can be made, whichever is closed meanwhile.
    let before = limit_descriptors(pid, 3);
    // Through many looks at the interface.
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert!(primary.process.is_running(), "{:#?}", primary.process.stderr());
    replay(&namespace);
    limit_descriptors(pid, before);
    let report = primary.report_when(|report| all_received(report, PACKETS));
    assert_balanced(&report, PACKETS);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn a_renamed_interface_is_followed() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
    let primary = start(&namespace);
    replay(&namespace);
    primary.report_after(PACKETS, true);
    namespace.ip("link set dev rx0 down").unwrap();
    namespace.ip("link set dev rx0 name mirror0").unwrap();
    namespace.ip("link set dev mirror0 up").unwrap();
    let report = primary.report_when(|report| report.ports[0].name == "mirror0");
    assert_balanced(&report, PACKETS);
    // What comes next under the old name is another interface.
    namespace.ip("link add name rx0 type veth peer name other0").unwrap();
    replay(&namespace);
    let report = primary.report_when(|report| all_received(report, 2 * PACKETS));
    assert_balanced(&report, 2 * PACKETS);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    let log = exit.stderr.join("\n");
    assert!(log.contains("rx0 was renamed to mirror0"), "{log}");
}

/// The report, once it says something of this topic; and what it says.
fn told(primary: &Primary, topic: &str) -> Notice {
    let notice = |report: &Report| {
        report.ports[0].notices.iter().find(|notice| notice.topic.starts_with(topic)).cloned()
    };
    notice(&primary.report_when(|report| notice(report).is_some())).unwrap()
}

/// Waits until the report says nothing of this topic.
fn told_no_longer(primary: &Primary, topic: &str) {
    primary
        .report_when(|report| !report.ports[0].notices.iter().any(|notice| notice.topic.starts_with(topic)));
}

/// What its journal says about the interface.
fn journal(primary: &Primary) -> Vec<String> {
    let Ok(Reply::Events(page)) = ask(&primary.socket(), &Request::Events(0)) else { panic!("no journal") };
    let page: Page = serde_json::from_value(page).unwrap();
    let said = page.entries.into_iter().filter(|entry| entry.event == "interface");
    said.map(|entry| entry.detail).collect()
}

#[test]
fn each_change_is_said_in_log_journal_and_report() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(4)).unwrap();
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

    // And it still works.
    replay(&namespace);
    let report = primary.report_when(|report| all_received(report, PACKETS));
    assert_balanced(&report, PACKETS);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn what_is_so_at_the_start_is_said() {
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
    // What is said of the table is for people; a note is not worth a line of it.
    let (exit, _folder) = primary.stop();
    let table = exit.stdout.join("\n");
    assert!(table.contains("warning: rx0 has no carrier: ") && !table.contains("promiscuous"), "{table}");
}

#[test]
fn a_program_that_somebody_else_removes_is_missed() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(1)).unwrap();
    let primary = start(&namespace);
    meddle::detach_program(primary.process.pid());
    let notice = told(&primary, "xdp");
    assert_eq!(notice.level, Level::Error);
    assert!(notice.to_string().contains("all packets go to the kernel"), "{notice}");
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn packets_that_do_not_fit_a_frame_are_counted_and_told() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(1)).unwrap();
    let primary = start(&namespace);
    for end in ["tx0", "rx0"] {
        namespace.ip(&format!("link set dev {end} mtu 3000")).unwrap();
    }
    let notice = told(&primary, "mtu");
    assert!(notice.meaning.contains("`ip link set dev rx0 mtu 1770`"), "{notice}");
    let long = traffic::udp("10.3.0.2:4000".parse().unwrap(), "10.3.0.1:53".parse().unwrap(), &[0; 2900]);
    namespace.run(|| Replay::onto("tx0").run(&vec![long; 100])).unwrap();
    // Counted, and not as lost.
    let report = primary.report_when(|report| report.ports[0].lanes[0].xdp.drop_too_long == 100);
    assert_eq!((report.ports[0].lanes[0].xdp.redirect, report.ports[0].lanes[0].kernel.rx_dropped), (0, 0));
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

/// What its journal says about packets that nobody counts.
fn losses(primary: &Primary) -> Vec<String> {
    let Ok(Reply::Events(page)) = ask(&primary.socket(), &Request::Events(0)) else { panic!("no journal") };
    let page: Page = serde_json::from_value(page).unwrap();
    let said = page.entries.into_iter().filter(|entry| entry.event == "unaccounted");
    said.map(|entry| entry.detail).collect()
}

/// A queue goes deaf: the kernel refuses packets for a socket of another queue, and counts that
/// nowhere but in the driver.
#[test]
fn a_queue_that_goes_deaf_is_told_while_running_and_at_the_end() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
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

    // It hears again: that is told once it has been so for a while.
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
    assert!(table.contains("lost     100 redirected packets that nobody counts"), "{table}");
    assert!(table.contains("driver rx_queue_0_drops 100"), "{table}");
}

/// As it ends, it knows better: nothing is under way any more.
#[test]
fn a_loss_that_only_shows_at_the_end_is_told_then() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
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
