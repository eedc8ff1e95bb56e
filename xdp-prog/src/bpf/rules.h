/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Rules: whether a rule of the operator passes a packet to the kernel. Rules match the protocol and
 * the destination port only. They ignore source ports, because a sender could choose its source
 * port to bypass the sensor.
 */
#pragma once

#include "maps.h"
#include "parsing.h"

/* Whether `rule`, an entry of rules.protocols, passes the destination port of the header at `c`. */
static __always_inline bool port_passes(struct cursor *c, __u8 rule)
{
	__u32 table = rule - RULE_PORTS;
	struct ports *ports = c->at;
	__u16 port;

	if (!step_over(c, sizeof(*ports)) || table >= PORT_PROTOCOLS)
		return false;
	port = bpf_ntohs(ports->destination);
	return rules.ports[table][port >> 3] & (1 << (port & 7));
}

/* Whether a rule passes the IPv4 packet at `c`. */
static __always_inline bool ipv4_passes(struct cursor *c)
{
	struct ipv4 ip;
	__u8 rule;

	if (!parse_ipv4(c, &ip))
		return false;
	rule = rules.protocols[ip.protocol];
	if (rule < RULE_PORTS)
		return rule == RULE_PASS;
	return !ip.later_fragment && port_passes(c, rule);
}

/*
 * Whether a rule passes an IPv6 packet. `c` is behind its fixed header. A rule for a protocol
 * matches a header of that type anywhere in the chain.
 */
static __always_inline bool ipv6_passes(struct cursor *c, __u8 protocol)
{
	enum step step = STEP_HEADER;

	for (int i = 0; i <= MAX_EXTENSION_HEADERS; i++) {
		__u8 rule = rules.protocols[protocol];

		if (rule == RULE_PASS)
			return true;
		if (step == STEP_FRAGMENT)
			return false;
		if (rule >= RULE_PORTS)
			return port_passes(c, rule);
		step = parse_extension(c, &protocol);
		if (step == STEP_END)
			return false;
	}
	return false;
}
