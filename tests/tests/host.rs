//! What the host keeps while a dispatcher runs: its own address, ports that rules pass, queues
//! without a lane. Workers get the packets exactly as they were sent.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use xfan::report::{Lane, Report, Xdp};
use xfan_shm::ids::QueueId;
use xfan_tests::command;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::oracle::Flow;
use xfan_tests::primary::{FlowRecord, Launch, Primary, flow_records};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::veth::{Veth, VethConfig, network};
use xfan_worker::{Received, Worker};

/// The address of `tx0`, the guest's end.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The address of `rx0`, whose packets are dispatched.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const CONFIG: &str = "rx_ring = 1024\nring_slots = 1024\n";

/// Two hosts that know each other's addresses: a guest that sends, and a host that runs a
/// dispatcher.
struct Hosts {
    guest: Netns,
    host: Netns,
    pair: Veth,
}

impl Hosts {
    fn new(queues: u32) -> Self {
        let (guest, host) = (Netns::quiet().unwrap(), Netns::quiet().unwrap());
        let pair = Veth::create(&VethConfig::queues(queues), &guest, &host).unwrap();
        guest.ip(&format!("addr add {GUEST}/24 dev tx0")).unwrap();
        host.ip(&format!("addr add {HOST}/24 dev rx0")).unwrap();
        // The guest resolves the host's MAC address by ARP once and never revalidates it, and the
        // host needs no ARP, so that the ARP packets can be counted.
        for (setting, milliseconds) in
            [("retrans_time_ms", 3_600_000), ("base_reachable_time_ms", 86_400_000)]
        {
            let setting = format!("net.ipv4.neigh.tx0.{setting}={milliseconds}");
            command::run(guest.command("sysctl").args(["-qw", &setting])).unwrap();
        }
        let mac = pair.sender.mac.map(|byte| format!("{byte:02x}")).join(":");
        host.ip(&format!("neigh replace {GUEST} lladdr {mac} dev rx0 nud permanent")).unwrap();
        Hosts { guest, host, pair }
    }

    fn launch(&self, arguments: &str) -> Primary {
        let launch = Launch::on(&self.host).unwrap().config(CONFIG).unwrap().with(arguments);
        launch.flow_workers(2).unwrap().start().unwrap()
    }

    /// The number of packets that the guest has sent.
    fn sent(&self) -> u64 {
        let text = self.guest.ip("-json -statistics link show dev tx0").unwrap();
        let links: serde_json::Value = serde_json::from_str(&text).unwrap();
        links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
    }

    /// The report once it has everything that the guest sent after `before` packets, all of it
    /// committed.
    fn settled(&self, primary: &Primary, before: u64) -> Report {
        primary.report_when(|report| {
            let Xdp { redirect, pass, .. } = outcomes(report);
            let backlog: u64 = report.groups[0].members.iter().map(|member| member.backlog).sum();
            redirect + pass == self.sent() - before
                && report.totals().0 == redirect
                && backlog == 0
                && report.imbalances().is_empty()
        })
    }

    /// Runs `ping` until three answers or for `seconds`; returns the requests sent and the answers.
    fn ping(&self, seconds: u32) -> (u64, u64) {
        let mut ping = self.guest.command("ping");
        ping.args(["-n", "-c", "3", "-i", "0.2", "-w", &seconds.to_string(), &HOST.to_string()]);
        let output = ping.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let number_before = |what: &str| {
            let number = text.split(what).next()?.rsplit([' ', '\n']).next()?;
            number.parse().ok()
        };
        let counts = number_before(" packets transmitted").zip(number_before(" received"));
        counts.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// The sum of the outcomes of all queues.
fn outcomes(report: &Report) -> Xdp {
    let mut sum = report.ports[0].unserved;
    report.lanes().for_each(|lane| sum.add(lane.xdp));
    sum
}

/// Stops the primary and returns its workers' flow records.
fn records(primary: Primary) -> Vec<FlowRecord> {
    let (exit, folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    flow_records(&folder)
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

#[test]
fn the_host_answers_pings_that_a_rule_passes() {
    let _watchdog = e2e_or_skip!();
    let hosts = Hosts::new(4);
    let before = hosts.sent();
    let primary = hosts.launch("--pass icmp");
    let (pings, answers) = hosts.ping(60);
    assert_eq!(answers, 3);
    let expected = Xdp { pass: pings + 1, pass_rule: pings, pass_non_ip: 1, ..Xdp::default() };
    assert_eq!(
        outcomes(&hosts.settled(&primary, before)),
        expected,
        "one ARP request, the pings, and nothing else"
    );
    assert_eq!(records(primary), []);
}

#[test]
fn without_a_rule_the_workers_get_pings() {
    let _watchdog = e2e_or_skip!();
    let hosts = Hosts::new(4);
    let before = hosts.sent();
    let primary = hosts.launch("");
    let (pings, answers) = hosts.ping(1);
    assert_eq!(answers, 0);
    assert!(pings >= 1);
    let expected = Xdp { redirect: pings, pass: 1, pass_non_ip: 1, ..Xdp::default() };
    // ARP still passes: without it there would be no pings.
    assert_eq!(outcomes(&hosts.settled(&primary, before)), expected);
    let records = records(primary);
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].flow(), Flow::between(1, (GUEST.into(), 8), (HOST.into(), 0)));
    // By default ping sends 56 bytes of data.
    assert_eq!((records[0].packets, records[0].bytes), (pings, pings * 98));

    // Without a dispatcher the host answers again.
    assert_eq!(hosts.ping(60).1, 3);
}

#[test]
fn ipv6_neighbours_find_each_other() {
    let _watchdog = e2e_or_skip!();
    let (guest, host) = (Netns::quiet().unwrap(), Netns::quiet().unwrap());
    Veth::create(&VethConfig::queues(2), &guest, &host).unwrap();
    for (namespace, interface, address) in [(&guest, "tx0", "2001:db8::2"), (&host, "rx0", "2001:db8::1")] {
        let setting = format!("net.ipv6.conf.{interface}.disable_ipv6=0");
        command::run(namespace.command("sysctl").args(["-qw", &setting])).unwrap();
        namespace.ip(&format!("addr add {address}/64 dev {interface} nodad")).unwrap();
    }
    let launch = Launch::on(&host).unwrap().config(CONFIG).unwrap().with("--pass icmpv6");
    let primary = launch.flow_workers(1).unwrap().start().unwrap();
    let mut ping = guest.command("ping");
    ping.args(["-6", "-n", "-c", "3", "-i", "0.2", "-w", "60", "2001:db8::1"]);
    let output = ping.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(" 3 received"), "{text}");
    let Xdp { redirect, pass_nd, pass_rule, .. } = outcomes(&primary.report());
    // The kernels may exchange other packets, but all of them are ICMPv6.
    assert!(pass_nd >= 1 && pass_rule >= 3, "{pass_nd} {pass_rule}");
    assert_eq!(redirect, 0);
}

#[test]
fn only_the_passed_port_is_left_to_the_host() {
    let _watchdog = e2e_or_skip!();
    const KEPT: u16 = 2222;
    const OTHER: u16 = 2223;
    let hosts = Hosts::new(4);
    let listen = |port| hosts.host.run(|| TcpListener::bind(at(HOST, port))).unwrap();
    let (kept, _other) = (listen(KEPT), listen(OTHER));
    let before = hosts.sent();
    let primary = hosts.launch(&format!("--pass tcp/{KEPT}"));

    // A conversation with the passed port, longer than one segment.
    let question: Vec<u8> = (0..50_000u32).map(|number| number.to_le_bytes()[0]).collect();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut stream, _) = kept.accept().unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(b"got it").unwrap();
            received
        });
        let mut stream = hosts.guest.run(|| TcpStream::connect(at(HOST, KEPT))).unwrap();
        stream.write_all(&question).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "got it");
        assert!(server.join().unwrap() == question);
    });
    let passed = outcomes(&hosts.settled(&primary, before));
    assert_eq!((passed.redirect, passed.pass_non_ip), (0, 1));
    assert_eq!(passed.pass_rule, hosts.sent() - before - 1, "all but the ARP request");

    // The other port gets no answer, although a socket listens.
    let connecting =
        hosts.guest.run(|| TcpStream::connect_timeout(&at(HOST, OTHER), Duration::from_millis(200)));
    assert_eq!(connecting.unwrap_err().kind(), ErrorKind::TimedOut);
    let after = outcomes(&hosts.settled(&primary, before));
    let attempts = after.redirect;
    assert!(attempts >= 1);
    assert_eq!(after, Xdp { redirect: attempts, ..passed });

    // Neither the source port nor the same port of another protocol passes.
    let strangers = [
        traffic::tcp(at(GUEST, KEPT), at(HOST, 80), 0, &[]),
        traffic::udp(at(GUEST, 1000), at(HOST, KEPT), &[0; 10]),
    ];
    hosts.guest.run(|| Replay::onto("tx0").run(&strangers)).unwrap();
    let report = hosts.settled(&primary, before);
    assert_eq!(outcomes(&report), Xdp { redirect: attempts + 2, ..passed });

    let mut seen: Vec<_> = records(primary)
        .iter()
        .map(|record| (record.flow().protocol, record.dport, record.packets))
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, [(6, 80, 1), (6, OTHER, attempts), (17, KEPT, 1)]);
}

#[test]
fn queues_without_a_lane_go_to_the_host() {
    let _watchdog = e2e_or_skip!();
    const DATAGRAMS: u16 = 50;
    let hosts = Hosts::new(4);
    let socket = hosts.host.run(|| UdpSocket::bind(at(HOST, 7000))).unwrap();
    // Some kernels keep each datagram in its own page, and all of them wait until they are read.
    setsockopt(&socket, sockopt::RcvBufForce, &(1 << 22)).unwrap();
    let primary = hosts.launch("--queues 0,1 --pass udp/9");
    // Each queue gets the datagrams, one packet that a rule passes, and one frame that is not IP.
    let to = |datagram: Vec<u8>| traffic::addressed(datagram, hosts.pair.receiver.mac);
    let mut frames: Vec<_> = (0..DATAGRAMS)
        .map(|number| to(traffic::udp(at(GUEST, 6000 + number % 10), at(HOST, 7000), &number.to_be_bytes())))
        .collect();
    frames.push(to(traffic::udp(at(GUEST, 6000), at(HOST, 9), b"discard")));
    frames.push(frames[0].clone());
    frames[usize::from(DATAGRAMS) + 1][12..14].copy_from_slice(&[0x88, 0xcc]);
    let before = hosts.sent();
    for queue in 0..4 {
        let replay = Replay { queues: vec![queue], ..Replay::onto("tx0") };
        hosts.guest.run(|| replay.run(&frames)).unwrap();
    }

    let datagrams = u64::from(DATAGRAMS);
    let report = hosts.settled(&primary, before);
    let lane = |xdp: &Lane| (xdp.queue, xdp.xdp, xdp.received);
    let served = Xdp { redirect: datagrams, pass: 2, pass_non_ip: 1, pass_rule: 1, ..Xdp::default() };
    let lanes: Vec<_> = report.lanes().map(lane).collect();
    assert_eq!(lanes, [(QueueId(0), served, datagrams), (QueueId(1), served, datagrams)]);
    let unserved = Xdp {
        pass: 2 * (datagrams + 2),
        pass_non_ip: 2,
        pass_rule: 2,
        pass_no_socket: 2 * datagrams,
        ..Xdp::default()
    };
    assert_eq!(report.ports[0].unserved, unserved);
    // The host has received what arrived on the other queues …
    let mut buffer = [0; 100];
    for number in (0..DATAGRAMS).chain(0..DATAGRAMS) {
        let (bytes, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..bytes], from), (&number.to_be_bytes()[..], at(GUEST, 6000 + number % 10)));
    }
    socket.set_nonblocking(true).unwrap();
    assert_eq!(socket.recv_from(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
    // … and the workers the rest.
    let records = records(primary);
    assert_eq!(records.len(), 10);
    for record in records {
        assert_eq!((record.dport, record.packets, record.bytes), (7000, datagrams / 5, datagrams / 5 * 44));
    }
}

/// Attaches a worker in this process that keeps all packets until the dispatcher closes.
fn record_all(primary: &Primary) -> std::thread::JoinHandle<Vec<Vec<u8>>> {
    let socket = primary.socket();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let worker = std::thread::spawn(move || {
        let mut worker = Worker::attach_to(socket).unwrap();
        ready.send(()).unwrap();
        let mut frames = Vec::new();
        loop {
            match worker.recv(Duration::from_secs(1)).unwrap() {
                Received::Packets(batch) => {
                    frames.extend(batch.iter().map(|packet| packet.data().to_vec()));
                    batch.commit();
                }
                Received::Idle => {}
                Received::Closed => return frames,
            }
        }
    });
    is_ready.recv().unwrap();
    worker
}

#[test]
fn tagged_frames_reach_workers_byte_for_byte() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let primary = Launch::on(&namespace).unwrap().config(CONFIG).unwrap().start().unwrap();
    let worker = record_all(&primary);

    let udp = |bytes: usize| {
        let payload: Vec<u8> = (0..bytes).map(|number| number.to_le_bytes()[0]).collect();
        traffic::udp("10.3.0.2:4000".parse().unwrap(), "10.3.0.1:53".parse().unwrap(), &payload)
    };
    let tags: [&[(u16, u16)]; 6] = [
        &[],
        &[(0x8100, 7)],
        &[(0x8100, 0xe007)], // priority 7
        &[(0x88a8, 100), (0x8100, 7)],
        &[(0x9100, 100), (0x8100, 7)],
        &[(0x8100, 100), (0x8100, 0xffff)],
    ];
    // Up to the longest frame that the sender takes: MTU 1500, Ethernet header, one tag.
    let longest = |tags: &[_]| 1518 - 42 - 4 * tags.len();
    let frames: Vec<_> = tags
        .iter()
        .flat_map(|tags| [0, 1, 18, 100, 1400, longest(tags)].map(|bytes| traffic::tagged(&udp(bytes), tags)))
        .collect();
    let thrice = traffic::tagged(&udp(100), &[(0x8100, 1), (0x8100, 2), (0x8100, 3)]);
    let all: Vec<_> = frames.iter().chain([&thrice]).collect();
    namespace.run(|| Replay::onto("tx0").run(&all)).unwrap();

    let report = primary.report_after(frames.len() as u64, true);
    assert_eq!(report.ports[0].lanes[0].xdp.pass_non_ip, 1, "a third tag ends parsing");
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert!(worker.join().unwrap() == frames, "the worker got bytes that were not sent");
}
