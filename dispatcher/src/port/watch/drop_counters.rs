//! Which of a driver's own counters (`ethtool -S`) count dropped packets.

/// The drop counters of each driver, by name; `*` matches any text. [`may_be_one`] covers other
/// drivers and other names.
const KNOWN: [(&str, &[&str]); 19] = [
    ("bnxt_en", &["rx_discards", "rx_buf_errors", "rx_total_ring_discards", "rx_total_oom_discards"]),
    (
        "ena",
        &[
            "*_empty_rx_ring",
            "*_bad_req_id",
            "*_xdp_drop",
            "pps_allowance_exceeded",
            "bw_in_allowance_exceeded",
        ],
    ),
    (
        "gve",
        &[
            "rx_no_buffers_posted[*]",
            "rx_queue_drop_cnt[*]",
            "rx_drops_packet_over_mru[*]",
            "rx_xdp_redirect_errors[*]",
        ],
    ),
    ("hv_netvsc", &["rx_no_memory", "rx_comp_busy", "rx_queue_*_xdp_drop"]),
    ("i40e", &["port.rx_discards", "port.rx_oversize", "rx_alloc_fail"]),
    ("ice", &["rx_dropped.nic", "rx_dropped", "rx_oversize.nic", "rx_alloc_fail"]),
    ("igb", &["rx_missed_errors", "rx_no_buffer_count", "rx_queue_*_drops", "rx_queue_*_alloc_failed"]),
    ("igc", &["rx_missed_errors", "rx_no_buffer_count", "rx_queue_*_drops", "rx_queue_*_alloc_failed"]),
    ("ixgbe", &["rx_missed_errors", "rx_no_buffer_count", "rx_no_dma_resources", "alloc_rx_buff_failed"]),
    ("ixgbevf", &["alloc_rx_buff_failed"]),
    ("mana", &["hc_rx_discards_no_wqe", "rx_coalesced_err"]),
    (
        "mlx5_core",
        &[
            "rx_out_of_buffer",
            "rx_discards_phy",
            "rx_vport_out_of_buffer",
            "rx_xsk_buff_alloc_err",
            "rx_xsk_oversize_pkts_sw_drop",
            "rx_xsk_wqe_err",
        ],
    ),
    ("nfp", &["dev_rx_discards", "rx_mac_head_drop", "rx_replace_buf_alloc_fail"]),
    ("r8169", &["rx_missed"]),
    ("sfc", &["port_rx_nodesc_drops", "rx_nodesc_trunc", "rx_noskb_drops"]),
    ("st_gmac", &["rx_buf_unav_irq", "rx_overflow_irq", "rx_missed_cntr", "mmc_rx_fifo_overflow"]),
    ("veth", &["rx_queue_*_drops", "rx_queue_*_xdp_drops"]),
    ("virtio_net", &["rx*_drops", "rx*_xdp_drops"]),
    ("vmxnet3", &["*pkts rx OOB*", "*drv dropped rx total*", "*rx buf alloc fail*"]),
];

/// Parts of names that suggest a drop counter, for counters not in [`KNOWN`].
const SUGGESTIVE: [&str; 13] = [
    "drop",
    "miss",
    "no_buf",
    "nobuf",
    "out_of_buf",
    "no_dma",
    "discard",
    "oom",
    "fifo",
    "overrun",
    "err",
    "fail",
    "oversize",
];

/// Whether a counter of a driver is known to count dropped packets. Reports show it even at 0.
pub fn is_one(driver: &str, name: &str) -> bool {
    let of_driver = KNOWN.iter().find(|(known, _)| *known == driver);
    of_driver.is_some_and(|(_, patterns)| patterns.iter().any(|pattern| matches(pattern, name)))
}

/// Whether a counter's name suggests dropped packets. Reports show it once it is above 0.
pub fn may_be_one(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let transmit = name.starts_with("tx") || ["_tx", ".tx", " tx"].iter().any(|part| name.contains(part));
    !transmit && SUGGESTIVE.iter().any(|part| name.contains(part))
}

/// Whether a pattern matches a name.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| matches(after, rest)))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_driver_has_its_own_names() {
        for (driver, name) in [
            ("igb", "rx_queue_12_drops"),
            ("virtio_net", "rx0_drops"),
            ("virtio_net", "rx_queue_0_drops"),
            ("ena", "queue_3_rx_empty_rx_ring"),
            ("gve", "rx_queue_drop_cnt[0]"),
            ("vmxnet3", "  pkts rx OOB"),
            ("mlx5_core", "rx_out_of_buffer"),
        ] {
            assert!(is_one(driver, name), "{driver}: {name}");
        }
        assert!(!is_one("igb", "rx_queue_0_packets") && !is_one("igb", "tx_queue_0_drops"));
        assert!(!is_one("nobody", "rx_missed_errors"));
    }

    #[test]
    fn other_drop_counters_are_guessed_by_name() {
        for name in ["rx_missed_errors", "RxDiscard", "port.rx_nobuf", "rx_fifo_overflow", "rx-3.alloc_err"] {
            assert!(may_be_one(name), "{name}");
        }
        for name in
            ["rx_packets", "tx_dropped", "queue_0_tx_missed", "peer_ifindex", "rx_queue_0_xdp_redirect"]
        {
            assert!(!may_be_one(name), "{name}");
        }
    }

    #[test]
    fn a_star_matches_any_text() {
        for (pattern, name, expected) in [
            ("a*c", "ac", true),
            ("a*c", "abcbc", true),
            ("a*c", "abcb", false),
            ("*", "", true),
            ("*é*", "xéy", true),
            ("a", "ab", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
