//! What the dispatcher reads and changes of an interface matches what `ethtool` shows.

use xfan::exit::Exit;
use xfan::host::interface::{Interface, Offload};
use xfan_tests::command;
use xfan_tests::e2e_or_skip;
use xfan_tests::link::Link;
use xfan_tests::netns::Netns;
use xfan_tests::primary::Launch;
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::veth::{Veth, VethConfig};

fn gro_is_on(namespace: &Netns) -> bool {
    let features = namespace.ethtool("-k rx0").unwrap();
    features.lines().any(|line| line == "generic-receive-offload: on")
}

#[test]
fn generic_mode_receives_packets_as_sent() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(1) }).unwrap();
    let launch = Launch::on(&namespace).unwrap().config("xdp_mode = 'generic'").unwrap();
    let primary = launch.flow_workers(1).unwrap().start().unwrap();
    assert!(!gro_is_on(&namespace));
    // Consecutive segments of one direction, which GRO merges.
    let (from, to) = ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
    let segments: Vec<_> =
        (0..64).map(|number| traffic::tcp(from, to, 1 + number * 1000, &[7; 1000])).collect();
    namespace.run(|| Replay::onto("tx0").run(&segments)).unwrap();
    let report = primary.report_after(64, true);
    assert_eq!((report.ports[0].lanes[0].bytes, report.ports[0].lanes[0].xdp.drop_too_long), (64 * 1054, 0));
    // GRO is restored even if the interface has another name by then.
    namespace.ip("link set dev rx0 down").unwrap();
    namespace.ip("link set dev rx0 name other").unwrap();
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(exit.stderr.iter().any(|line| line.contains("turned_off=[\"gro\"]")), "{exit:#?}");
    namespace.ip("link set dev other name rx0").unwrap();
    assert!(gro_is_on(&namespace));
}

/// The kernel merges packets of a lower interface, for example a bond's port, before the upper
/// interface gets them. A program in generic mode on the upper one then sees merged packets.
#[test]
fn lower_interfaces_do_not_merge_packets() {
    let _watchdog = e2e_or_skip!();
    let merges = |namespace: &Netns| {
        let features = namespace.ethtool("-k low0").unwrap();
        features.lines().any(|line| line == "generic-receive-offload: on")
    };
    for (above, on_top) in
        [("bridge", false), ("bond mode active-backup", false), ("macvlan mode passthru", true)]
    {
        let (namespace, _pair) =
            Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(1) }).unwrap();
        // The sender does the segmentation; otherwise veth skips GRO.
        namespace.ethtool("-K tx0 tso off gso off").unwrap();
        namespace.ip("link set dev rx0 down").unwrap();
        namespace.ip("link set dev rx0 name low0").unwrap();
        // Packets that arrive within a poll or two are merged, however busy this machine is.
        let waits = "echo 50000000 > /sys/class/net/low0/gro_flush_timeout; \
                     echo 100 > /sys/class/net/low0/napi_defer_hard_irqs";
        command::run(namespace.command("sh").args(["-c", waits])).unwrap();
        let link = if on_top { "link low0 " } else { "" };
        if !made(&namespace, &format!("link add {link}name rx0 type {above}")) {
            continue;
        }
        if !on_top {
            namespace.ip("link set dev low0 master rx0").unwrap();
        }
        namespace.ip("link set dev low0 up").unwrap();
        namespace.ip("link set dev rx0 up").unwrap();
        let address = namespace.run(|| Link::named("rx0")).unwrap().mac;
        let launch = Launch::on(&namespace).unwrap().config("xdp_mode = 'generic'").unwrap();
        let primary = launch.flow_workers(1).unwrap().start().unwrap();
        assert!(!merges(&namespace), "{above}");
        let (from, to) = ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let segment =
            |number: u32| traffic::addressed(traffic::tcp(from, to, 1 + number * 1000, &[7; 1000]), address);
        let segments: Vec<_> = (0..64).map(segment).collect();
        namespace.run(|| Replay::onto("tx0").run(&segments)).unwrap();
        let report = primary.report_after(64, true);
        assert_eq!(
            (report.ports[0].lanes[0].bytes, report.ports[0].lanes[0].xdp.drop_too_long),
            (64 * 1054, 0),
            "{above}"
        );
        let (exit, _folder) = primary.stop();
        assert_eq!(exit.code, Some(0), "{exit:#?}");
        assert!(exit.stderr.iter().any(|line| line.contains("\"gro of low0\"")), "{exit:#?}");
        assert!(merges(&namespace), "{above}");
    }
}

/// Makes a device. If this kernel lacks the type, prints that and returns false.
fn made(namespace: &Netns, command: &str) -> bool {
    match namespace.ip(command) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

#[test]
fn layer_3_devices_are_refused_by_type() {
    let _watchdog = e2e_or_skip!();
    let namespace = Netns::quiet().unwrap();
    let devices = [
        ("tuntap add dev l3 mode tun", "a layer-3 device, such as tun or WireGuard"),
        ("link add l3 type wireguard", "a layer-3 device, such as tun or WireGuard"),
        ("link add l3 type ipip local 127.0.0.1 remote 127.0.0.2", "an IPIP tunnel"),
        ("link add l3 type sit local 127.0.0.1 remote 127.0.0.2", "a SIT tunnel (IPv6 in IPv4)"),
        ("link add l3 type gre local 127.0.0.1 remote 127.0.0.2", "a GRE tunnel of IP packets"),
        ("link add l3 type ip6tnl local ::1 remote ::2", "an IPv6 tunnel"),
        ("link add l3 type vcan", "a CAN bus"),
        ("link add l3 type nlmon", "a monitor of netlink messages"),
    ];
    let mut refused = 0;
    for (command, kind) in devices {
        if made(&namespace, command) {
            let error = namespace.run(|| Interface::find("l3")).unwrap_err();
            let begin = format!("`l3` is {kind}: its packets have no Ethernet header; ");
            assert!(error.to_string().starts_with(&begin), "{command}: {error}");
            assert_eq!(Exit::from(&error), Exit::Interface);
            namespace.ip("link del l3").unwrap();
            refused += 1;
        }
    }
    assert!(refused > 0, "every kernel has tun");
    for command in [
        "tuntap add dev l2 mode tap",
        "link add l2 type dummy",
        "link add l2 type bridge",
        "link add l2 type gretap local 127.0.0.1 remote 127.0.0.2",
        "link add l2 type vxlan id 7 dstport 4789 dev lo",
        "link add l2 type bond",
    ] {
        if made(&namespace, command) {
            let found = namespace.run(|| Interface::find("l2"));
            assert!(found.is_ok(), "{command}: {found:?}");
            namespace.ip("link del l2").unwrap();
        }
    }
}

#[test]
fn gro_is_read_and_set_as_ethtool_shows_it() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(2) }).unwrap();
    let rx0 = namespace.run(|| Interface::find("rx0")).unwrap();
    let shown = || gro_is_on(&namespace);
    assert!(shown() && namespace.run(|| rx0.offload(Offload::Gro)).unwrap());
    for on in [false, false, true] {
        namespace.run(|| rx0.set_offload(Offload::Gro, on)).unwrap();
        assert_eq!((shown(), namespace.run(|| rx0.offload(Offload::Gro)).unwrap()), (on, on));
    }
    // A veth has no LRO to turn off.
    assert!(!namespace.run(|| rx0.offload(Offload::Lro)).unwrap());
    namespace.run(|| rx0.set_offload(Offload::Lro, false)).unwrap();
    let error = namespace.run(|| rx0.set_offload(Offload::Lro, true)).unwrap_err();
    assert!(error.to_string().starts_with("cannot turn on lro of `rx0`: "), "{error}");
    assert_eq!(Exit::from(&error), Exit::Interface);
}
