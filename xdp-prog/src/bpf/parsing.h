/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Parsing: bounded walks over the headers of a frame. Nothing here uses maps or verdicts. */
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

/*
 * The position of a walk. Behind an IP header, the packet ends where that header says, or with its
 * frame if that ends first. The bytes after it are padding or a link-layer trailer.
 */
struct cursor {
	void *at;
	void *end;  /* end of the frame */
	__u32 left; /* bytes of the packet from `at` on */
};

#define LEFT_UNKNOWN (~0U)

struct vlan_tag {
	__be16 tci;
	__be16 inner_type;
};

/* The first bytes of the extension headers that RFC 8200 and RFC 4302 define. */
struct extension {
	__u8 next;
	__u8 length; /* its unit and what it counts depend on the header */
};

/* The first bytes of a hop-by-hop option. OPTION_PAD_1 has no length. */
struct option {
	__u8 type;
	__u8 length; /* bytes that follow */
};

struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

/* The first bytes of a TCP, UDP or SCTP header. */
struct ports {
	__be16 source;
	__be16 destination;
};

/*
 * Steps over `size` bytes. Returns false if the packet or the frame ends before that. No function
 * in this file returns a pointer that may be NULL: clang would compare packet pointers with NULL,
 * which costs an instruction and confuses the verifier.
 */
static __always_inline bool step_over(struct cursor *c, __u32 size)
{
	void *behind = c->at + size;

	if (size > c->left || behind > c->end)
		return false;
	c->at = behind;
	c->left -= size;
	return true;
}

static __always_inline bool is_vlan(__be16 ethertype)
{
	return ethertype == bpf_htons(ETH_P_8021Q) || ethertype == bpf_htons(ETH_P_8021AD) ||
	       ethertype == bpf_htons(ETHERTYPE_QINQ_OLD);
}

/*
 * Steps over the Ethernet header and at most MAX_VLAN_TAGS tags. Returns the ethertype, or 0, which
 * is not an ethertype, if the frame ends before it.
 */
static __always_inline __be16 parse_link(struct cursor *c)
{
	struct ethhdr *eth = c->at;
	__be16 ethertype;

	if (!step_over(c, sizeof(*eth)))
		return 0;
	ethertype = eth->h_proto;
#pragma unroll
	for (int i = 0; i < MAX_VLAN_TAGS; i++) {
		struct vlan_tag *tag = c->at;

		if (!is_vlan(ethertype))
			break;
		if (!step_over(c, sizeof(*tag)))
			return 0;
		ethertype = tag->inner_type;
	}
	return ethertype;
}

struct ipv4 {
	__u8 protocol;
	bool later_fragment; /* not the first fragment: no transport header follows */
};

/* Steps over the IPv4 header and its options. Returns false if it is cut short or invalid. */
static __always_inline bool parse_ipv4(struct cursor *c, struct ipv4 *parsed)
{
	struct cursor behind = *c;
	struct iphdr *ip = c->at;
	__u32 total, size;

	if (!step_over(&behind, sizeof(*ip)) || ip->version != 4 || ip->ihl < IPV4_WORDS_MIN)
		return false;
	parsed->protocol = ip->protocol;
	parsed->later_fragment = ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET);
	total = bpf_ntohs(ip->tot_len);
	size = ip->ihl * 4;
	if (!step_over(c, size))
		return false;
	/* Segmentation offload leaves a total length of 0: the packet ends with its frame. */
	if (total)
		c->left = total > size ? total - size : 0;
	return true;
}

struct ipv6 {
	__u8 next; /* type of the header that follows */
	__u8 hop_limit;
};

/*
 * The payload length in the jumbo payload option of the hop-by-hop header at the cursor, or 0
 * without that option. `c` is a copy, so the caller's cursor does not move.
 */
static __always_inline __u32 jumbo_length(struct cursor c)
{
	struct extension *ext = c.at;

	if (!step_over(&c, sizeof(*ext)))
		return 0;
	c.left = (ext->length + 1) * 8 - sizeof(*ext);
	for (int i = 0; i < MAX_OPTIONS; i++) {
		struct option *option = c.at;
		__u8 *length;

		if (!step_over(&c, sizeof(option->type)))
			return 0;
		if (option->type == OPTION_PAD_1)
			continue;
		if (!step_over(&c, sizeof(option->length)))
			return 0;
		length = c.at;
		if (option->type == OPTION_JUMBO_PAYLOAD && option->length == 4)
			return step_over(&c, 4) ?
				(__u32)length[0] << 24 | length[1] << 16 | length[2] << 8 | length[3] : 0;
		if (!step_over(&c, option->length))
			return 0;
	}
	return 0;
}

/* Steps over the fixed IPv6 header. Returns false if it is cut short or invalid. */
static __always_inline bool parse_ipv6(struct cursor *c, struct ipv6 *parsed)
{
	struct ipv6hdr *ip = c->at;

	if (!step_over(c, sizeof(*ip)) || ip->version != 6)
		return false;
	parsed->next = ip->nexthdr;
	parsed->hop_limit = ip->hop_limit;
	if (ip->payload_len)
		c->left = bpf_ntohs(ip->payload_len);
	else
		c->left = ip->nexthdr == IPPROTO_HOPOPTS ? jumbo_length(*c) : 0;
	return true;
}

/*
 * Whether the fixed IPv6 header is followed by neighbour or router discovery. `c` is a copy, so the
 * caller's cursor does not move.
 */
static __always_inline bool is_neighbour_discovery(struct ipv6 ip, struct cursor c)
{
	__u8 *type = c.at;

	return ip.next == IPPROTO_ICMPV6 && ip.hop_limit == ND_HOP_LIMIT && step_over(&c, sizeof(*type)) &&
	       *type >= ND_FIRST && *type <= ND_LAST;
}

enum step {
	STEP_END,      /* the cursor is not at an extension header, or the frame ends within it */
	STEP_HEADER,   /* `protocol` is the type of the header at the cursor */
	STEP_FRAGMENT, /* as STEP_HEADER, but a later fragment: no header is at the cursor */
};

/* Steps over the IPv6 extension header at the cursor, if `protocol` is the type of one. */
static __always_inline enum step parse_extension(struct cursor *c, __u8 *protocol)
{
	struct cursor behind = *c;
	struct extension *ext = c->at;
	__u32 size;

	if (*protocol == IPPROTO_FRAGMENT) {
		struct fragment_header *fragment = c->at;

		if (!step_over(c, sizeof(*fragment)))
			return STEP_END;
		*protocol = fragment->next;
		return fragment->offset & bpf_htons(IPV6_FRAGMENT_OFFSET) ? STEP_FRAGMENT : STEP_HEADER;
	}
	if (*protocol != IPPROTO_HOPOPTS && *protocol != IPPROTO_ROUTING && *protocol != IPPROTO_DSTOPTS &&
	    *protocol != IPPROTO_AH)
		return STEP_END;
	if (!step_over(&behind, sizeof(*ext)))
		return STEP_END;
	/* AH counts words of 4 bytes, minus 2; the others count words of 8 bytes, minus 1. */
	size = *protocol == IPPROTO_AH ? (ext->length + 2) * 4 : (ext->length + 1) * 8;
	*protocol = ext->next;
	return step_over(c, size) ? STEP_HEADER : STEP_END;
}
