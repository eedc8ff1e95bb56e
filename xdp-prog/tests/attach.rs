//! The program on an interface: modes, other programs on the same interface, and detaching.

mod common;

use std::env;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::frame::{ETHERTYPE_IPV6, ICMP, ICMPV6, TCP, ethernet, icmp, ipv6, padded, ports, v4};
use common::{FrameSender, NIC, PEER, in_own_namespace, index_of, make_veth, run, xdp_socket};
use libbpf_rs::{Link, Object, ObjectBuilder};
use xfan_xdp::{AttachError, LoadError, MapError, OBJECT, PassRule, QueueCounters, SteerProgram, XdpMode};

/// How long to wait for what the kernel does asynchronously.
const PATIENCE: Duration = Duration::from_secs(20);

/// Longest packet that a frame of 2,048 bytes can hold.
const MAX_LENGTH: u32 = 1792;

fn load(rules: &[&str]) -> SteerProgram {
    let rules: Vec<PassRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    SteerProgram::load(1, &rules, MAX_LENGTH).unwrap()
}

/// What `ip link` shows about the XDP program on an interface: "xdp", "xdpgeneric", or nothing.
fn shown_by_ip(interface: &str) -> Option<String> {
    let output = Command::new("ip").args(["-o", "link", "show", "dev", interface]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().find(|word| ["xdp", "xdpgeneric"].contains(word)).map(String::from)
}

/// Waits until `condition` holds.
fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        sleep(Duration::from_millis(5));
    }
}

/// Attaches the program of another tool to an interface, in native mode: the same object under
/// another name of the same length.
fn attach_foreign(ifindex: u32) -> (Object, Link) {
    let mut object = OBJECT.to_vec();
    for at in 0..object.len() {
        if object[at..].starts_with(b"xfan_steer") {
            object[at..at + 10].copy_from_slice(b"other_tool");
        }
    }
    let mut open = ObjectBuilder::default().open_memory(&object).unwrap();
    for mut map in open.maps_mut() {
        // The names of maps that hold global variables contain that of the object.
        if map.name() == "xsks" {
            map.set_max_entries(4).unwrap();
        }
    }
    let object = open.load().unwrap();
    let link = object.progs_mut().next().unwrap().attach_xdp(i32::try_from(ifindex).unwrap()).unwrap();
    (object, link)
}

#[test]
fn attaches_natively_and_detaches() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        let mut program = load(&[]);
        assert_eq!((program.mode(), shown_by_ip(NIC)), (None, None));
        program.attach(nic, NIC, XdpMode::Native).unwrap();
        assert_eq!((program.mode(), shown_by_ip(NIC).as_deref()), (Some(XdpMode::Native), Some("xdp")));

        let twice = program.attach(nic, NIC, XdpMode::Native).unwrap_err();
        assert!(matches!(twice, AttachError::Twice { .. }), "{twice}");

        program.detach();
        assert_eq!((program.mode(), shown_by_ip(NIC)), (None, None));
        program.counters().unwrap();
        program.detach();

        program.attach(nic, NIC, XdpMode::Generic).unwrap();
        assert_eq!(shown_by_ip(NIC).as_deref(), Some("xdpgeneric"));
        drop(program);
        assert_eq!(shown_by_ip(NIC), None);
    });
}

#[test]
fn generic_mode_works_where_the_driver_has_no_xdp() {
    in_own_namespace(|| {
        // The loopback driver has no XDP.
        let loopback = index_of("lo");
        let mut program = load(&[]);
        let refused = program.attach(loopback, "lo", XdpMode::Native).unwrap_err();
        assert!(matches!(refused, AttachError::NoNativeMode { .. }), "{refused}");
        let said = refused.to_string();
        assert!(said.starts_with("the driver of lo refuses native XDP"), "{said}");
        assert!(said.contains("it has no XDP") && !said.contains("MTU"), "{said}");
        program.attach(loopback, "lo", XdpMode::Generic).unwrap();
        assert_eq!(shown_by_ip("lo").as_deref(), Some("xdpgeneric"));
    });
}

#[test]
fn a_driver_that_refuses_the_mtu_is_quoted() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        for end in [NIC, PEER] {
            run("ip", &["link", "set", end, "mtu", "9000"]);
        }
        let mut program = load(&[]);
        let refused = program.attach(nic, NIC, XdpMode::Native).unwrap_err();
        let AttachError::NoNativeMode { reason, .. } = &refused else { panic!("{refused}") };
        assert!(reason.as_ref().is_some_and(|reason| reason.contains("MTU")), "{reason:?}");
        let said = refused.to_string();
        assert!(said.contains("lower the MTU") && !said.contains("no XDP"), "{said}");
        // Asking for the reason leaves no program attached.
        assert_eq!(shown_by_ip(NIC), None);
        program.attach(nic, NIC, XdpMode::Generic).unwrap();
    });
}

#[test]
fn an_interface_of_another_primary_is_refused() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        for (first_choice, second_choice) in [
            (XdpMode::Native, XdpMode::Native),
            (XdpMode::Native, XdpMode::Generic),
            (XdpMode::Generic, XdpMode::Native),
            (XdpMode::Generic, XdpMode::Generic),
        ] {
            let mut first = load(&[]);
            first.attach(nic, NIC, first_choice).unwrap();
            let error = load(&[]).attach(nic, NIC, second_choice).unwrap_err();
            let AttachError::AnotherPrimary { interface, id } = &error else { panic!("{error}") };
            assert_eq!((interface.as_str(), *id != 0), (NIC, true));
            assert!(error.to_string().starts_with("another xfan primary owns nic "), "{error}");
            let asked = load(&[]).check_unoccupied(nic, NIC).unwrap_err();
            assert_eq!(asked.to_string(), error.to_string());
            assert!(shown_by_ip(NIC).is_some(), "the first program is still attached");
        }
    });
}

#[test]
fn an_interface_with_another_program_is_refused() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        let foreign = attach_foreign(nic);
        for choice in [XdpMode::Native, XdpMode::Generic] {
            let error = load(&[]).attach(nic, NIC, choice).unwrap_err();
            let AttachError::AnotherProgram { name, id, .. } = &error else { panic!("{error}") };
            assert_eq!((name.as_deref(), *id != 0), (Some("other_tool"), true));
            let said = error.to_string();
            assert!(said.starts_with("nic already runs another XDP program, \"other_tool\" (id "), "{said}");
        }
        drop(foreign);
        load(&[]).attach(nic, NIC, XdpMode::Native).unwrap();
    });
}

#[test]
fn an_interface_that_does_not_exist_is_refused() {
    in_own_namespace(|| {
        for (ifindex, choice) in [
            (9999, XdpMode::Generic),
            (9999, XdpMode::Native),
            (0, XdpMode::Native),
            (u32::MAX, XdpMode::Native),
        ] {
            let error = load(&[]).attach(ifindex, "eth9", choice).unwrap_err();
            assert!(matches!(error, AttachError::NoSuchInterface { .. }), "{ifindex}: {error}");
        }
    });
}

#[test]
fn traffic_is_counted_and_passed_to_the_kernel() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        let neighbour = ethernet(&[], ETHERTYPE_IPV6, &ipv6(ICMPV6, 255, &icmp(135)));
        for choice in [XdpMode::Native, XdpMode::Generic] {
            let mut program = load(&["icmp"]);
            program.attach(nic, NIC, choice).unwrap();
            let sender = FrameSender::new(PEER);
            for _ in 0..10 {
                sender.send(&padded(0x0806));
                (0..2).for_each(|_| sender.send(&neighbour));
                (0..3).for_each(|_| sender.send(&v4(ICMP, &icmp(8))));
                (0..4).for_each(|_| sender.send(&v4(TCP, &ports(1, 22))));
            }
            let expected = QueueCounters {
                redirect: 0,
                pass_non_ip: 10,
                pass_nd: 20,
                pass_rule: 30,
                pass_no_socket: 40,
                drop_too_long: 0,
            };
            wait_for("100 packets", || program.counters().unwrap()[0].passed() >= 100);
            assert_eq!(program.counters().unwrap(), [expected], "{choice:?}");

            program.set_rules(&["tcp/22".parse().unwrap()]).unwrap();
            sender.send(&v4(TCP, &ports(1, 22)));
            wait_for("another packet", || program.counters().unwrap()[0].passed() >= 101);
            program.detach();
            assert_eq!(
                program.counters().unwrap(),
                [QueueCounters { pass_rule: 31, ..expected }],
                "{choice:?}"
            );
            assert_eq!(program.counters_of_new_queues().unwrap(), QueueCounters::default());
        }
    });
}

#[test]
fn a_queue_with_a_socket_is_redirected() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        let mut program = load(&[]);
        let socket = xdp_socket().unwrap();
        program.attach(nic, NIC, XdpMode::Native).unwrap();
        let sender = FrameSender::new(PEER);
        let send = |n| {
            sender.send(&v4(TCP, &ports(1, 22)));
            wait_for("a packet", || {
                let counters = program.counters().unwrap()[0];
                counters.redirect + counters.passed() == n
            });
        };
        send(1);
        program.insert_socket(0, &socket).unwrap();
        send(2);
        program.remove_socket(0).unwrap();
        send(3);
        program.remove_socket(0).unwrap();
        let expected = QueueCounters { redirect: 1, pass_no_socket: 2, ..QueueCounters::default() };
        assert_eq!(program.counters().unwrap(), [expected]);
    });
}

#[test]
fn wrong_queues_and_sockets_are_refused() {
    in_own_namespace(|| {
        let program = load(&[]);
        let error = program.insert_socket(1, &xdp_socket().unwrap()).unwrap_err();
        assert!(matches!(error, MapError::NoSuchQueue { queue: 1, queues: 1 }), "{error}");
        assert_eq!(error.to_string(), "there is no RX queue 1: the XDP program was loaded for queues 0 to 0");
        let error = program.insert_socket(0, &File::open("/dev/null").unwrap()).unwrap_err();
        assert!(matches!(error, MapError::Socket { queue: 0, .. }), "{error}");
    });
}

/// Environment variable of the process that the test below starts: the index of the interface to
/// attach to.
const HOLDER: &str = "XFAN_TEST_HOLD_IFINDEX";

#[test]
fn killing_the_process_detaches_the_program() {
    if let Ok(ifindex) = env::var(HOLDER) {
        let mut program = load(&[]);
        program.attach(ifindex.parse().unwrap(), NIC, XdpMode::Native).unwrap();
        println!("attached");
        sleep(PATIENCE);
        return;
    }
    in_own_namespace(|| {
        let nic = make_veth(1);
        let mut holder = Command::new(env::current_exe().unwrap())
            .args(["--exact", "killing_the_process_detaches_the_program", "--nocapture"])
            .env(HOLDER, nic.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().contains("attached")),
            "the other process has attached its program"
        );
        assert_eq!(shown_by_ip(NIC).as_deref(), Some("xdp"));
        let busy = load(&[]).attach(nic, NIC, XdpMode::Native).unwrap_err();
        assert!(matches!(busy, AttachError::AnotherPrimary { .. }), "{busy}");

        holder.kill().unwrap();
        holder.wait().unwrap();
        wait_for("the kernel to detach the program", || shown_by_ip(NIC).is_none());
        load(&[]).attach(nic, NIC, XdpMode::Native).unwrap();
    });
}

/// Drops all effective capabilities but `kept`, for the calling thread only. The C library has no
/// wrapper for capset(2), so this calls it directly.
fn keep_capabilities(kept: u64) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let words = [kept & 0xffff_ffff, kept >> 32].map(|word| u32::try_from(word).unwrap());
    let sets = words.map(|word| Sets { effective: word, permitted: word, inheritable: 0 });
    // SAFETY: capset(2) requires a header, and for version 3 an array of two sets: both pointers
    // are to such structures, which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_PERFMON: u64 = 1 << 38;
const CAP_BPF: u64 = 1 << 39;

#[test]
fn three_capabilities_suffice_to_load_and_attach() {
    in_own_namespace(|| {
        let nic = make_veth(1);
        let foreign = attach_foreign(nic);
        keep_capabilities(CAP_NET_ADMIN | CAP_PERFMON | CAP_BPF);
        let mut program = load(&["tcp/22", "icmpv6"]);
        let error = program.attach(nic, NIC, XdpMode::Native).unwrap_err();
        assert!(matches!(error, AttachError::AnotherProgram { name: None, .. }), "{error}");
        drop(foreign);
        program.attach(nic, NIC, XdpMode::Native).unwrap();
        program.counters().unwrap();
    });
}

#[test]
fn the_error_names_missing_capabilities() {
    for (kept, lacking) in [
        (0, "lacks CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN:"),
        (CAP_NET_ADMIN, "lacks CAP_BPF and CAP_PERFMON:"),
        (CAP_NET_ADMIN | CAP_BPF, "lacks CAP_PERFMON:"),
        (CAP_BPF | CAP_PERFMON, "lacks CAP_NET_ADMIN:"),
    ] {
        in_own_namespace(move || {
            keep_capabilities(kept);
            let error = SteerProgram::load(1, &[], MAX_LENGTH).unwrap_err();
            assert!(matches!(error, LoadError::Privilege { .. }), "{error}");
            assert!(error.to_string().contains(lacking), "{error}");
        });
    }
}
