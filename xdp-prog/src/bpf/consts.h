/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Protocol numbers, and the limits of parsing. */
#pragma once

/* Number of VLAN tags to skip: one, or a service tag and a customer tag (QinQ). */
#define MAX_VLAN_TAGS 2
/* The QinQ tag before IEEE 802.1ad. linux/if_ether.h calls it deprecated. */
#define ETHERTYPE_QINQ_OLD 0x9100

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_WORDS_MIN 5 /* header length in words of 4 bytes, without options */

/*
 * Number of IPv6 extension headers to skip in search of the protocol. The verifier requires a
 * bound. By RFC 8200, a packet carries at most six of these headers.
 */
#define MAX_EXTENSION_HEADERS 6
#define IPV6_FRAGMENT_OFFSET 0xfff8
/*
 * Number of hop-by-hop options to read in search of a jumbo payload's length (RFC 2675). It equals
 * MAX_OPTIONS of the parser in user space (packet/src/ip.rs).
 */
#define MAX_OPTIONS 8
#define OPTION_PAD_1 0
#define OPTION_JUMBO_PAYLOAD 0xc2

/* Neighbour discovery: router and neighbour solicitation and advertisement, redirect (RFC 4861). */
#define ND_FIRST 133
#define ND_LAST 137
/* By RFC 4861, receivers drop messages with another hop limit: a router may have forwarded them. */
#define ND_HOP_LIMIT 255

/* Protocols whose rules may name a destination port: TCP, UDP, SCTP. */
#define PORT_PROTOCOLS 3
#define PORT_BITMAP_BYTES 8192
