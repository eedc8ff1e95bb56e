/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Numbers of the wire, and the bounds of what the program looks at. */
#pragma once

/* VLAN tags it looks behind: one, or a service tag and a customer tag (QinQ). */
#define MAX_VLAN_TAGS 2
/* The QinQ tag of before IEEE 802.1ad; linux/if_ether.h calls it deprecated. */
#define ETHERTYPE_QINQ_OLD 0x9100

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_WORDS_MIN 5 /* header length in words of 4 bytes, without options */

/* IPv6 extension headers it looks behind in search of the protocol; the verifier wants a bound. */
#define MAX_EXTENSION_HEADERS 6
#define IPV6_FRAGMENT_OFFSET 0xfff8
/*
 * Hop-by-hop options it looks at in search of a jumbo payload's length (RFC 2675); as in the
 * parser of user space.
 */
#define MAX_OPTIONS 8
#define OPTION_PAD_1 0
#define OPTION_JUMBO_PAYLOAD 0xc2

/* Neighbour discovery: router and neighbour solicitation and advertisement, redirect (RFC 4861). */
#define ND_FIRST 133
#define ND_LAST 137
/* RFC 4861 has receivers drop what a router may have forwarded, that is, any other hop limit. */
#define ND_HOP_LIMIT 255

/* Protocols whose rules may name a destination port: TCP, UDP, SCTP. */
#define PORT_PROTOCOLS 3
#define PORT_BITMAP_BYTES 8192
