//! What changes about the interface while a primary runs is said, followed, and never taken for something else.

use nix::sys::resource::Resource;
use nix::unistd::Pid;
use xfan::report::Report;
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::veth::{Veth, VethConfig};

const PACKETS: u64 = 100;

fn replay(namespace: &Netns) {
    let frames = traffic::synthetic(10, 100, 1).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
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
    let report = primary.report_when(|report| report.port == "mirror0");
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
