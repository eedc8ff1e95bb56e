/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The types that the program shares with the process that loads it. libbpf-cargo generates the Rust
 * types from them.
 */
#pragma once

#include <linux/types.h>

#include "consts.h"

/*
 * Packets of one RX queue on one CPU, by outcome. Each packet adds one to exactly one field.
 * The AF_XDP socket may drop a redirected packet, which its own statistics count.
 */
struct queue_counters {
	__u64 redirect;       /* redirected to the queue's AF_XDP socket */
	__u64 pass_non_ip;    /* passed: neither IPv4 nor IPv6, or cut off within the link header */
	__u64 pass_nd;        /* passed: IPv6 neighbour or router discovery */
	__u64 pass_rule;      /* passed: a rule of the operator */
	__u64 pass_no_socket; /* passed: the queue has no socket */
	__u64 drop_too_long;  /* dropped: longer than a frame of the socket can hold */
};

/* An entry of `pass_rules.protocols`. RULE_PORTS + n means the bitmap `ports[n]`. */
#define RULE_NONE 0
#define RULE_PASS 1
#define RULE_PORTS 2

/*
 * The rules of the operator. All fields are bytes, so the layout does not depend on alignment.
 * Bitmaps are used instead of a hash map: a lookup is one load from an address that the JIT knows.
 */
struct pass_rules {
	__u8 active; /* 0: there are no rules, and the fields below are not read */
	__u8 protocols[256];
	/* Destination ports: bit `port & 7` of byte `port >> 3`. */
	__u8 ports[PORT_PROTOCOLS][PORT_BITMAP_BYTES];
};
