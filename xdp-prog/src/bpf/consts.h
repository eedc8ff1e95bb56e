/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Numbers of the wire. The bounds of what the program looks at are those of the parser in user
 * space (packet/src): build.rs defines MAX_VLAN_TAGS, MAX_EXTENSION_HEADERS and MAX_OPTIONS.
 */
#pragma once

/* The QinQ tag of before IEEE 802.1ad; linux/if_ether.h calls it deprecated. */
#define ETHERTYPE_QINQ_OLD 0x9100

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_WORDS_MIN 5 /* header length in words of 4 bytes, without options */

#define IPV6_FRAGMENT_OFFSET 0xfff8
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
