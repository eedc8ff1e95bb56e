//! Nothing that a worker does through its connections and its segment costs others a packet.

use std::collections::BTreeMap;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::control::history::Entry;
use xfan::report::{Member, Report};
use xfan_shm::layout::{Up, VERSION};
use xfan_shm::protocol::{self, Attach, ENV_SOCKET, MAX_REPLY, ProtocolError, Reply, Request};
use xfan_shm::segment;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::process::{Exit, Process, run_as, write_script};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

const PACKETS: u64 = 600;
/// The id of the user `daemon`, which every Debian has.
const DAEMON: u32 = 1;

/// Starts a primary with a hostile and an honest worker, on two queues.
fn hostile(namespace: &Netns, config: &str, way: &str) -> Primary {
    let config = format!("max_workers = 3\nstop_timeout = '200ms'\n{config}");
    let launch = Launch::on(namespace).unwrap().config(&config).unwrap().with("-n 2");
    launch.hostile_worker(way).unwrap().start().unwrap()
}

/// Runs a primary whose only worker is hostile and keeps it from starting.
fn refused(namespace: &Netns, config: &str, way: &str) -> (Option<i32>, String) {
    let launch = Launch::on(namespace).unwrap().config(config).unwrap().with("-n 1");
    let Exit { code, stderr, .. } = launch.hostile_worker(way).unwrap().run().unwrap();
    (code, stderr.join("\n"))
}

fn members(report: &Report) -> &[Member] {
    &report.groups[0].members
}

fn pid(member: &Member) -> Pid {
    Pid::from_raw(i32::try_from(member.pid).unwrap())
}

fn journal(primary: &Primary) -> Vec<Entry> {
    let page = primary.history();
    assert_eq!(page.missed, 0);
    page.entries
}

/// Runs a program from the primary's folder as the user `daemon`.
fn as_daemon(primary: &Primary, program: &str, arguments: &str) -> Process {
    let mut command = Command::new(primary.folder().join(program));
    command.args(arguments.split_whitespace()).env(ENV_SOCKET, primary.socket());
    run_as(&mut command, DAEMON, DAEMON, &[]);
    Process::spawn(command).unwrap()
}

/// The minor page faults of each lane's thread so far.
fn faults_of_lanes(primary: &Primary) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", primary.process.pid())).unwrap();
    let stats = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    let lanes = stats.filter_map(|stat| {
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let faults = rest.split_whitespace().nth(7)?.parse().ok()?;
        name.starts_with("lane-").then(|| (name.to_owned(), faults))
    });
    lanes.collect()
}

/// The kernel's description (smaps) of the primary's mappings of its workers' segments.
fn segments_of(primary: &Primary) -> Vec<String> {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", primary.process.pid())).unwrap();
    let mut mappings: Vec<String> = Vec::new();
    for line in smaps.lines() {
        // A line with an address range begins a mapping.
        if line.split_whitespace().next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
            mappings.push(String::new());
        }
        if let Some(mapping) = mappings.last_mut() {
            mapping.push_str(line);
            mapping.push('\n');
        }
    }
    mappings.retain(|mapping| mapping.contains("memfd:xfan-up") || mapping.contains("memfd:xfan-down"));
    mappings
}

#[test]
fn a_worker_cannot_remove_pages_from_its_segment() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = hostile(&namespace, "", "pages");
    // From now on the hostile worker has packets, and the lanes poll its commits.
    send_synthetic(&namespace, 8);
    let held = |report: &Report| report.totals().0 == PACKETS && members(report)[1].backlog == 0;
    primary.report_when(held);
    let before = faults_of_lanes(&primary);
    assert_eq!(before.len(), 2);
    primary.unleash();
    let line = primary.process.wait_for_line("pages {").unwrap();
    primary.process.wait_for_line("a thousand rounds").unwrap();
    assert_eq!(faults_of_lanes(&primary), before);
    let outcomes: BTreeMap<String, String> =
        serde_json::from_str(line.split_once("pages ").unwrap().1).unwrap();
    for way in ["punch", "remove"] {
        assert_eq!(outcomes[way], "EPERM", "{outcomes:?}");
    }
    send_synthetic(&namespace, 8);
    let report = primary
        .balanced_report_when(|report| report.totals().0 == 2 * PACKETS && members(report)[1].backlog == 0);
    assert_balanced(&report, 2 * PACKETS);
    assert_eq!(members(&report)[1].dropped, 0);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn pages_removed_before_attaching_are_restored() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = hostile(&namespace, "", "early");
    send_synthetic(&namespace, 8);
    let held = |report: &Report| report.totals().0 == PACKETS && members(report)[1].backlog == 0;
    let report = primary.report_when(held);
    assert!(members(&report)[0].delivered > 0 && members(&report)[0].state == "running");
    // Both segments of both workers are resident and locked.
    let segments = segments_of(&primary);
    assert_eq!(segments.len(), 4);
    for segment in segments {
        let field = |name: &str| segment.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        assert_eq!(field("Rss:"), field("Size:"), "{segment}");
        assert!(field("VmFlags:").split_whitespace().any(|flag| flag == "lo"), "{segment}");
    }
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_worker_with_an_unsealed_segment_is_refused() {
    let _watchdog = e2e_or_skip!();
    let (code, stderr) = refused(&network(2), "", "seal");
    assert_eq!(code, Some(6), "{stderr}");
    assert!(stderr.contains("refused: the worker has not sealed its own segment"), "{stderr}");
}

#[test]
fn a_worker_that_is_never_ready_gets_no_packets() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let (code, stderr) = refused(&namespace, "start_timeout = '300ms'", "silent");
    assert_eq!(code, Some(6), "{stderr}");
    assert!(stderr.contains("has not attached within 300ms"), "{stderr}");

    // The primary closes the connection of a guest.
    let config = "max_workers = 2\nstart_timeout = '2s'";
    let launch = Launch::on(&namespace).unwrap().config(config).unwrap().with("-n 1");
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let guest = primary.dial();
    let attach = Attach { version: VERSION, group: None, member: None, token: None, program: "guest".into() };
    let (reply, fds) = protocol::ask(&guest, &Request::Attach(attach.clone())).unwrap();
    assert!(matches!(reply, Reply::Attached(_)), "{reply:?}");
    assert_eq!(fds.len(), protocol::ATTACHED_FDS);
    send_synthetic(&namespace, 8);
    let report = primary.report_after(PACKETS, true);
    assert_eq!((report.totals(), members(&report)[0].committed), ((PACKETS, PACKETS, 0), PACKETS));
    let (reply, _) = protocol::ask(primary.dial(), &Request::Attach(attach.clone())).unwrap();
    assert!(
        matches!(&reply, Reply::Refused(refusal) if refusal.message.contains("all 2 members have a worker"))
    );
    assert!(matches!(protocol::receive::<Reply>(&guest, MAX_REPLY), Err(ProtocolError::Closed)));
    primary
        .process
        .wait_for_line("was not ready within 2s (start_timeout): its connection is closed")
        .unwrap();
    // The member is vacant again.
    let next = primary.dial();
    let (reply, fds) = protocol::ask(&next, &Request::Attach(attach)).unwrap();
    let (Reply::Attached(attached), [_, _, up, _]) = (reply, &fds[..]) else {
        panic!("the guest was not attached")
    };
    let _mapped = Up::open(up, attached.geometry).unwrap();
    segment::seal_against_further_writers(up).unwrap();
    assert!(matches!(protocol::ask(&next, &Request::Ready).unwrap().0, Reply::Joined));
    assert_eq!(members(&primary.report())[1].buckets, 2048);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_worker_that_is_ready_twice_is_evicted() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = hostile(&namespace, "restart = 'no'", "ready-twice");
    primary.unleash();
    primary.process.wait_for_line("second: the worker of this connection has been ready before").unwrap();
    let report = primary.balanced_report_when(|report| members(report)[0].state == "crashed");
    assert_eq!(members(&report)[1].buckets, 4096);
    send_synthetic(&namespace, 8);
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);
    assert_eq!(members(&report)[1].committed, PACKETS);
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn shells_pass_the_connection_on() {
    let _watchdog = e2e_or_skip!();
    for script in ["exec COUNT", "COUNT; exit $?", "COUNT & wait $!"] {
        let namespace = network(2);
        let launch = Launch::on(&namespace).unwrap().with("-n 2");
        let count = launch.within_reach("xfan-count").unwrap();
        let wrapper = launch.folder().join("wrapper");
        let script = script.replace("COUNT", &count.display().to_string());
        write_script(&wrapper, &script);
        let primary = launch.worker(wrapper.to_str().unwrap(), "").unwrap().start().unwrap();
        send_synthetic(&namespace, 8);
        let report = primary.report_after(PACKETS, true);
        assert_eq!(report.totals(), (PACKETS, PACKETS, 0), "{script}");
        // No worker connected to the socket; all connections to it asked for reports.
        assert!(journal(&primary).iter().all(|entry| entry.event != "refused"), "{script}");
        let exit = primary.stop().0;
        assert_eq!(exit.code, Some(0), "{script} {exit:#?}");
    }
}

/// Other processes may keep the inherited descriptor open indefinitely.
#[test]
fn a_death_is_seen_while_a_shell_holds_the_connection() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2");
    let launch = launch.config("hang_timeout = '0s'\nstop_timeout = '600s'").unwrap();
    let count = launch.within_reach("xfan-count").unwrap();
    let wrapper = launch.folder().join("wrapper");
    // The shell starts the next worker as the same member, with the same connection.
    let script = format!("trap 'kill $!; exit 0' TERM\nwhile :; do {} & wait $!; done", count.display());
    write_script(&wrapper, &script);
    let primary = launch.worker(wrapper.to_str().unwrap(), "").unwrap().start().unwrap();
    let shell = members(&primary.report())[0].pid;
    let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
    let worker = children.split_whitespace().last().unwrap().parse().unwrap();
    kill(Pid::from_raw(worker), Signal::SIGKILL).unwrap();
    let report = primary.report_when(|report| members(report)[0].restarts == 1);
    assert_eq!(members(&report)[0].pid, shell);
    primary.report_when(|report| members(report)[0].state == "running");
    let journal = journal(&primary);
    let its = journal.iter().filter(|entry| entry.member.as_deref() == Some("default/0"));
    let its: Vec<_> = its.map(|entry| entry.event.as_str()).collect();
    assert_eq!(its, ["started", "attached", "died", "attached"]);
    send_synthetic(&namespace, 8);
    let report = primary.report_after(PACKETS, true);
    assert_eq!(report.totals(), (PACKETS, PACKETS, 0));
    primary.end(Signal::SIGTERM);
}

#[test]
fn a_descriptor_that_is_no_connection_is_named() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    for (number, reason) in
        [("0", "it is not a socket"), ("999", "it is not open"), ("three", "that is not a descriptor number")]
    {
        let (code, stderr) = refused(&namespace, "", &format!("robbed {number}"));
        assert_eq!(code, Some(6), "{stderr}");
        let expected = format!(
            "XFAN_CONTROL_FD names descriptor {number} as the connection to the dispatcher, but {reason}"
        );
        assert!(stderr.contains(&expected), "{stderr}");
    }
}

#[test]
fn a_worker_cannot_use_up_its_users_connections() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "restart_delay = '1ms'\n[control]\nallow_users = ['daemon']";
    let primary = hostile(&namespace, config, "hold 900");
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", primary.process.pid())).unwrap().count();
    primary.process.wait_for_line("holds ").unwrap();
    let report = primary.report_when(|report| report.control.connections >= 900);
    assert!(report.control.too_many >= 900 - 16, "{:?}", report.control);
    // 16 connections of its user, 4 of its own, and one inherited connection of each worker.
    assert!(descriptors() < 100, "{}", descriptors());
    // The other worker of the same user is restarted and attaches.
    kill(pid(&members(&report)[1]), Signal::SIGKILL).unwrap();
    primary.report_when(|report| members(report)[1].restarts == 1 && members(report)[1].state == "running");
    // A worker of another user attaches as well.
    let guest = as_daemon(&primary, "xfan-count", &format!("--attach {}", primary.socket().display()));
    primary.report_when(|report| report.member("default/2").is_some_and(|guest| guest.state == "running"));
    send_synthetic(&namespace, 8);
    let report = primary.balanced_report_when(|report| {
        report.totals().0 == PACKETS && members(report)[1..].iter().all(|member| member.backlog == 0)
    });
    assert_balanced(&report, PACKETS);
    assert_eq!(guest.end(Signal::SIGTERM).code, Some(0));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_flood_of_requests_does_not_hide_a_death() {
    let _watchdog = e2e_or_skip!(300);
    let namespace = network(2);
    let primary = hostile(&namespace, "restart_delay = '1ms'\nstart_limit_burst = 50", "flood 20");
    primary.unleash();
    let line = primary.process.wait_for_line("floods on ").unwrap();
    assert!(line.contains("floods on 19 connections"), "{line}");
    for round in 1..=10 {
        send_synthetic(&namespace, 8);
        let report = primary.report_when(|report| report.totals().0 == round * PACKETS);
        kill(pid(&members(&report)[1]), Signal::SIGKILL).unwrap();
        primary.report_when(|report| {
            members(report)[1].restarts == round && members(report)[1].state == "running"
        });
    }
    let report = primary.balanced_report_when(|report| members(report)[1].backlog == 0);
    assert_balanced(&report, 10 * PACKETS);
    // One report answers many requests.
    let line = primary.printed("answers ");
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [answers, reports] = numbers[..] else { panic!("{line}") };
    assert!(answers == 51 * 19 && reports * 4 < answers, "{line}");
    assert_eq!(primary.stop().0.code, Some(0));
}

/// How many of the refused requests the journal has as single entries, and how many in totals.
fn told(journal: &[Entry]) -> (usize, u64) {
    let refused: Vec<_> = journal.iter().filter(|entry| entry.event == "refused").collect();
    let more = |entry: &&Entry| {
        let (before, _) = entry.detail.split_once(" more requests of ")?;
        before.rsplit(|character: char| !character.is_ascii_digit()).next()?.parse::<u64>().ok()
    };
    let alone = refused.iter().filter(|entry| !entry.detail.contains(" more requests of user id")).count();
    let sums: u64 = refused.iter().filter_map(more).sum();
    (refused.len(), alone as u64 + sums)
}

#[test]
fn forbidden_orders_are_logged_as_totals() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "[control]\nallow_users = ['daemon']";
    let launch = Launch::on(&namespace).unwrap().config(config).unwrap().with("-n 1");
    launch.within_reach("xfan-hostile").unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let mut hostile = as_daemon(&primary, "xfan-hostile", "order 300");
    while hostile.is_running() {
        std::thread::yield_now();
    }
    let (lines, requests) = loop {
        let (lines, requests) = told(&journal(&primary));
        if requests == 300 {
            break (lines, requests);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert!(requests == 300 && lines < 150, "{lines} lines");
    let stderr = primary.stop().0.stderr;
    assert!(stderr.iter().filter(|line| line.contains("refused: ")).count() == lines, "{stderr:#?}");
}

#[test]
fn a_guest_that_keeps_reattaching_is_refused() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "max_workers = 3\nstart_limit_burst = 4\nstart_limit_interval = '600s'\n[control]\nallow_users = ['daemon']";
    let launch = Launch::on(&namespace).unwrap().config(config).unwrap().with("-n 1");
    launch.within_reach("xfan-hostile").unwrap();
    let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
    let mut hostile = as_daemon(&primary, "xfan-hostile", "again");
    primary.report_when(|report| report.member("default/1").is_some_and(|guest| guest.state == "running"));
    hostile.signal(Signal::SIGUSR1);
    primary.report_when(|report| report.control.refused > 200);
    // The guest keeps trying.
    send_synthetic(&namespace, 8);
    hostile.kill();
    let report = primary.balanced_report_when(|report| {
        report.totals().0 == PACKETS
            && members(report).iter().all(|member| member.backlog == 0)
            && members(report)[1..].iter().all(|member| member.state == "crashed")
    });
    assert_balanced(&report, PACKETS);
    let journal = journal(&primary);
    let attached = journal
        .iter()
        .filter(|entry| entry.event == "attached" && entry.member.as_deref() != Some("default/0"));
    assert_eq!(attached.count(), 12);
    let refused = journal.iter().find(|entry| entry.event == "refused").unwrap();
    assert!(
        refused
            .detail
            .contains("workers of user id 1 have attached 12 times within 600s, which is the limit"),
        "{refused:?}"
    );
    assert_eq!(primary.stop().0.code, Some(0));
}

/// Each message to it makes the kernel look at many epoll entries.
#[test]
fn a_slow_connection_is_served_rarely() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = hostile(&namespace, "restart = 'no'", "slow");
    primary.unleash();
    let said = primary.printed("third report after");
    let ms: u64 = said.split(' ').rev().nth(1).unwrap().parse().unwrap();
    assert!(ms >= 1000, "{said}");
    assert_eq!(primary.stop().0.code, Some(0));
}
