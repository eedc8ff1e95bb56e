/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Does a rule of the operator let this packet pass? Only what the packet's receiver decides counts, its
 * protocol and its destination port: a sender cannot hide from the sensor by the source port it chooses.
 */
#pragma once

#include "maps.h"
#include "parsing.h"

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

/* `c` stands behind the link headers. */
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

/* `c` stands behind the fixed IPv6 header. A protocol's rule meets it anywhere in the chain of headers. */
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
