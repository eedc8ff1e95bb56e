/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The maps. The loader sets the number of entries to the interface's number of RX queues. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "structs.h"

/* RX queue -> its AF_XDP socket. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

/* RX queue + 1 -> its packets. Entry 0 counts queues that came into being after the program was loaded. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct queue_counters);
} counters SEC(".maps");

/* The longest packet, in bytes, that a frame of the sockets holds. Set by the loader before it loads. */
const volatile __u32 max_length = 0xffffffff;

/* The whole of .bss, so that the loader replaces the rules by writing one map entry. */
struct pass_rules rules;
