//! What the dispatcher reads of an interface, and changes, is what `ethtool` shows.

use xfan::exit::Exit;
use xfan::interface::{Interface, Offload};
use xfan_tests::e2e_or_skip;
use xfan_tests::veth::{Veth, VethConfig};

#[test]
fn gro_is_read_and_set_as_ethtool_shows_it() {
    let _watchdog = e2e_or_skip!();
    let (namespace, _pair) = Veth::in_namespace(&VethConfig { gro: true, ..VethConfig::queues(2) }).unwrap();
    let rx0 = namespace.run(|| Interface::find("rx0")).unwrap();
    let shown = || {
        let features = namespace.ethtool("-k rx0").unwrap();
        features.lines().any(|line| line == "generic-receive-offload: on")
    };
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
