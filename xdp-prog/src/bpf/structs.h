/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What the program shares with the process that loads it. The skeleton turns these types into Rust. */
#pragma once

#include <linux/types.h>

#include "consts.h"

/* Packets of one RX queue on one CPU, by outcome: every packet adds one to exactly one field. */
struct queue_counters {
	__u64 redirect;       /* handed to the queue's AF_XDP socket, which may still drop it: see its statistics */
	__u64 pass_non_ip;    /* to the kernel: neither IPv4 nor IPv6, or shorter than its link header */
	__u64 pass_nd;        /* to the kernel: IPv6 neighbour or router discovery */
	__u64 pass_rule;      /* to the kernel: a rule of the operator */
	__u64 pass_no_socket; /* to the kernel: its queue has no socket */
	__u64 drop_too_long;  /* dropped: longer than a frame of the socket holds */
};

/* An entry of `pass_rules.protocols`. From RULE_PORTS on it is RULE_PORTS + index into `ports`. */
#define RULE_NONE 0
#define RULE_PASS 1
#define RULE_PORTS 2

/*
 * What the operator lets pass. All bytes, so that it is the same on both sides whatever the alignment.
 * Bitmaps and not a hash: a lookup is one load, from an address that the JIT knows.
 */
struct pass_rules {
	__u8 active; /* 0: there are no rules, nothing below is looked at */
	__u8 protocols[256];
	__u8 ports[PORT_PROTOCOLS][PORT_BITMAP_BYTES]; /* bit `port & 7` of byte `port >> 3`: destination port */
};
