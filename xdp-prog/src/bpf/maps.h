/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The maps. The loader sets their numbers of entries according to the interface's RX queues. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "structs.h"

/* RX queue -> the queue's AF_XDP socket. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

/*
 * RX queue + 1 -> the queue's counters. Entry 0 counts packets of queues that did not exist when
 * the program was loaded.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct queue_counters);
} counters SEC(".maps");

/* Longest packet in bytes that a frame of the sockets can hold. The loader sets it. */
const volatile __u32 max_length = 0xffffffff;

/* The only variable in .bss, so the loader replaces all rules by writing one map entry. */
struct pass_rules rules;
