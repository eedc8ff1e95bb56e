/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Bounded walks over a frame's headers. Nothing here knows of maps or verdicts. */
#pragma once

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "consts.h"

/* Where in the frame the walk stands. */
struct cursor {
	void *at;
	void *end;
};

struct vlan_tag {
	__be16 tci;
	__be16 inner_type;
};

/* What the extension headers that RFC 8200 and RFC 4302 define begin with. */
struct extension {
	__u8 next;
	__u8 length; /* unit and offset depend on the header */
};

struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

/* What TCP, UDP and SCTP begin with. */
struct ports {
	__be16 source;
	__be16 destination;
};

/* Steps over `size` bytes and returns where they begin; NULL when the frame ends before they do. */
static __always_inline void *take(struct cursor *c, __u32 size)
{
	void *begin = c->at;

	if (begin + size > c->end)
		return NULL;
	c->at = begin + size;
	return begin;
}

static __always_inline bool is_vlan(__be16 ethertype)
{
	return ethertype == bpf_htons(ETH_P_8021Q) || ethertype == bpf_htons(ETH_P_8021AD) ||
	       ethertype == bpf_htons(ETHERTYPE_QINQ_OLD);
}

/* The ethertype behind at most MAX_VLAN_TAGS tags; 0, which is none, when the frame ends before it. */
static __always_inline __be16 take_link_headers(struct cursor *c)
{
	struct ethhdr *eth = take(c, sizeof(*eth));
	__be16 ethertype;

	if (!eth)
		return 0;
	ethertype = eth->h_proto;
#pragma unroll
	for (int i = 0; i < MAX_VLAN_TAGS; i++) {
		struct vlan_tag *tag;

		if (!is_vlan(ethertype))
			break;
		tag = take(c, sizeof(*tag));
		if (!tag)
			return 0;
		ethertype = tag->inner_type;
	}
	return ethertype;
}

/* The IPv4 header with its options; NULL when it is cut short or makes no sense. */
static __always_inline struct iphdr *take_ipv4(struct cursor *c)
{
	struct iphdr *ip = take(c, sizeof(*ip));

	if (!ip || ip->version != 4 || ip->ihl < IPV4_WORDS_MIN)
		return NULL;
	if (!take(c, (ip->ihl - IPV4_WORDS_MIN) * 4))
		return NULL;
	return ip;
}

/* The fixed IPv6 header; NULL when it is cut short or makes no sense. */
static __always_inline struct ipv6hdr *take_ipv6(struct cursor *c)
{
	struct ipv6hdr *ip = take(c, sizeof(*ip));

	return ip && ip->version == 6 ? ip : NULL;
}

/* Whether what follows the fixed IPv6 header is neighbour or router discovery. `c` is a copy: nothing is taken. */
static __always_inline bool is_neighbour_discovery(const struct ipv6hdr *ip, struct cursor c)
{
	__u8 *type;

	if (ip->nexthdr != IPPROTO_ICMPV6 || ip->hop_limit != ND_HOP_LIMIT)
		return false;
	type = take(&c, sizeof(*type));
	return type && *type >= ND_FIRST && *type <= ND_LAST;
}

enum step {
	STEP_END,      /* no extension header, or the frame ends in it */
	STEP_HEADER,   /* `protocol` names the header at the cursor */
	STEP_FRAGMENT, /* likewise, but this fragment is not the first: what is at the cursor is no header */
};

/* Steps over the IPv6 extension header at the cursor if `protocol` says it is one. */
static __always_inline enum step take_extension(struct cursor *c, __u8 *protocol)
{
	struct extension *ext;
	__u32 rest;

	if (*protocol == IPPROTO_FRAGMENT) {
		struct fragment_header *fragment = take(c, sizeof(*fragment));

		if (!fragment)
			return STEP_END;
		*protocol = fragment->next;
		return fragment->offset & bpf_htons(IPV6_FRAGMENT_OFFSET) ? STEP_FRAGMENT : STEP_HEADER;
	}
	if (*protocol != IPPROTO_HOPOPTS && *protocol != IPPROTO_ROUTING && *protocol != IPPROTO_DSTOPTS &&
	    *protocol != IPPROTO_AH)
		return STEP_END;
	ext = take(c, sizeof(*ext));
	if (!ext)
		return STEP_END;
	/* AH counts words of 4 bytes less 2, the others words of 8 bytes less 1. */
	rest = (*protocol == IPPROTO_AH ? (ext->length + 2) * 4 : (ext->length + 1) * 8) - sizeof(*ext);
	*protocol = ext->next;
	return take(c, rest) ? STEP_HEADER : STEP_END;
}
