//! The sums that hold for every dispatcher at rest, whatever happened before.

use xfan::report::Report;

/// Checks every sum of a report: each of the `sent` packets is accounted for by cause.
///
/// # Panics
/// A sum does not hold.
pub fn assert_balanced(report: &Report, sent: u64) {
    let redirected: u64 = report.lanes().map(|lane| lane.xdp.redirect).sum();
    assert_eq!(redirected, sent, "redirected = sent\n{report:#?}");
    for lane in report.lanes() {
        let kernel = lane.kernel.rx_dropped + lane.kernel.rx_ring_full;
        assert_eq!(
            lane.xdp.redirect,
            lane.received + kernel,
            "redirected = received + kernel drops\n{lane:#?}"
        );
        assert_eq!(lane.kernel.rx_invalid_descs, 0, "{lane:#?}");
        assert_eq!(lane.dropped["frame_owner"], 0, "{lane:#?}");
    }
    // received = delivered + Σ dropped; Σ frames by owner = frames; lent = backlog;
    // for each member, delivered = committed + backlog + requeued + lost.
    assert_eq!(report.imbalances(), Vec::<String>::new(), "{report:#?}");
    let lanes = report.groups.iter().flat_map(|group| &group.lanes);
    let ring_full: u64 = lanes.map(|lane| lane.dropped["ring_full"]).sum();
    assert_eq!(
        ring_full,
        report.members().map(|member| member.dropped).sum::<u64>(),
        "ring_full = Σ members' drops"
    );
}
