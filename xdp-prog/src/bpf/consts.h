/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Protocol numbers. The limits of parsing are those of the parser in user space (packet/src):
 * build.rs defines MAX_VLAN_TAGS, MAX_EXTENSION_HEADERS and MAX_OPTIONS.
 */
#pragma once

/* The QinQ tag before IEEE 802.1ad. linux/if_ether.h calls it deprecated. */
#define ETHERTYPE_QINQ_OLD 0x9100

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_WORDS_MIN 5 /* header length in words of 4 bytes, without options */

#define IPV6_FRAGMENT_OFFSET 0xfff8
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
