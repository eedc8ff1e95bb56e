//! What the dispatcher reads of an interface, and changes, is what `ethtool` shows.

use xfan::exit::Exit;
use xfan::interface::{Interface, Offload};
use xfan_tests::e2e_or_skip;
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
fn generic_mode_gets_packets_as_they_were_sent() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(1) }).unwrap();
    let launch = Launch::on(&namespace).unwrap().config("xdp_mode = 'generic'").unwrap();
    let primary = launch.flow_workers(1).unwrap().start().unwrap();
    assert!(!gro_is_on(&namespace));
    // Segments of one direction, one behind the other: what GRO merges.
    let (from, to) = ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
    let segments: Vec<_> =
        (0..64).map(|number| traffic::tcp(from, to, 1 + number * 1000, &[7; 1000])).collect();
    namespace.run(|| Replay::onto("tx0").run(&segments)).unwrap();
    let report = primary.report_after(64, true);
    assert_eq!((report.lanes[0].bytes, report.lanes[0].xdp.drop_too_long), (64 * 1054, 0));
    // Under whatever name the interface has then.
    namespace.ip("link set dev rx0 down").unwrap();
    namespace.ip("link set dev rx0 name other").unwrap();
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(exit.stderr.iter().any(|line| line.contains("turned_off=[\"gro\"]")), "{exit:#?}");
    namespace.ip("link set dev other name rx0").unwrap();
    assert!(gro_is_on(&namespace));
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
    // A veth has no LRO: there is nothing to turn off.
    assert!(!namespace.run(|| rx0.offload(Offload::Lro)).unwrap());
    namespace.run(|| rx0.set_offload(Offload::Lro, false)).unwrap();
    let error = namespace.run(|| rx0.set_offload(Offload::Lro, true)).unwrap_err();
    assert!(error.to_string().starts_with("cannot turn on lro of `rx0`: "), "{error}");
    assert_eq!(error.exit(), Exit::Interface);
}
