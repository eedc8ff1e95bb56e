// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Redirects the IP packets of each RX queue to the AF_XDP socket of that queue, and passes to the
 * kernel what the host needs:
 *
 *   frame ── Ethernet, up to 2 VLAN tags
 *     ├─ not IP ────────────────────────────────► kernel   pass_non_ip
 *     ├─ IPv6 neighbour or router discovery ────► kernel   pass_nd
 *     ├─ a rule of the operator ────────────────► kernel   pass_rule
 *     └─ other IPv4 or IPv6
 *          ├─ the queue has no socket ──────────► kernel   pass_no_socket
 *          ├─ longer than a frame of the socket ► dropped  drop_too_long
 *          └─ else ─────────────────────────────► socket   redirect
 *
 * A packet with a truncated or invalid IP header is redirected, because a sensor should see it. The
 * kernel would also drop a packet that is longer than a frame, but it would count the packet as if
 * the FILL ring had been empty.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "parsing.h"
#include "rules.h"

enum class {
	CLASS_NON_IP,
	CLASS_ND,
	CLASS_RULE,
	CLASS_STEER,
};

static __always_inline enum class classify(struct cursor c)
{
	struct ipv6 ip6;

	switch (parse_link(&c)) {
	case bpf_htons(ETH_P_IP):
		return rules.active && ipv4_passes(&c) ? CLASS_RULE : CLASS_STEER;
	case bpf_htons(ETH_P_IPV6):
		if (!parse_ipv6(&c, &ip6))
			return CLASS_STEER;
		if (is_neighbour_discovery(ip6, c))
			return CLASS_ND;
		return rules.active && ipv6_passes(&c, ip6.next) ? CLASS_RULE : CLASS_STEER;
	default:
		return CLASS_NON_IP;
	}
}

/* The counters of `queue`, or entry 0 if the program was loaded for fewer queues. */
static __always_inline struct queue_counters *counters_of(__u32 queue)
{
	__u32 key = queue + 1, beyond = 0;
	struct queue_counters *counts = bpf_map_lookup_elem(&counters, &key);

	return counts ? counts : bpf_map_lookup_elem(&counters, &beyond);
}

SEC("xdp")
int xfan_steer(struct xdp_md *ctx)
{
	struct cursor c = {
		.at = (void *)(long)ctx->data,
		.end = (void *)(long)ctx->data_end,
		.left = LEFT_UNKNOWN,
	};
	__u32 queue = ctx->rx_queue_index;
	struct queue_counters *counts = counters_of(queue);
	int verdict;

	if (!counts) /* cannot happen, since entry 0 exists, but the verifier requires the check */
		return XDP_PASS;

	switch (classify(c)) {
	case CLASS_NON_IP:
		counts->pass_non_ip++;
		return XDP_PASS;
	case CLASS_ND:
		counts->pass_nd++;
		return XDP_PASS;
	case CLASS_RULE:
		counts->pass_rule++;
		return XDP_PASS;
	case CLASS_STEER:
		break;
	}
	verdict = bpf_redirect_map(&xsks, queue, XDP_PASS);
	if (verdict != XDP_REDIRECT) {
		counts->pass_no_socket++;
		return verdict;
	}
	if (c.end - c.at > max_length) {
		counts->drop_too_long++;
		return XDP_DROP;
	}
	counts->redirect++;
	return XDP_REDIRECT;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
