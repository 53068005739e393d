// SPDX-License-Identifier: Apache-2.0
#include "nethdr.h"

#include <netinet/in.h>

#define ETHERTYPE(hi, lo) ((uint16_t)((hi) << 8 | (lo)))

static inline uint16_t be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

/* Byte offset of the checksum in the transport header, 0 if the protocol has none that we finish. */
static inline uint32_t csum_field(uint8_t protocol)
{
	return protocol == IPPROTO_TCP ? 16 : protocol == IPPROTO_UDP ? 6 : 0;
}

/* Offset of the transport header behind IPv6 extension headers; 0 when there is none in reach. */
static uint32_t skip_ipv6_extensions(const uint8_t *frame, uint32_t len, uint32_t at, uint8_t *next)
{
	for (int i = 0; i < 8; i++) {
		if (*next != IPPROTO_HOPOPTS && *next != IPPROTO_ROUTING && *next != IPPROTO_DSTOPTS)
			return at;
		if (at + 8 > len)
			return 0;
		*next = frame[at];
		at += 8u + 8u * frame[at + 1];
	}
	return 0;
}

void net_find_partial(const uint8_t *frame, uint32_t len, struct xv_view *view)
{
	uint32_t at = ETH_HEADER, transport, payload, field;
	uint16_t type;
	uint64_t sum;
	uint8_t protocol;

	if (len < ETH_HEADER + 20)
		return;
	type = be16(frame + 12);
	for (int tags = 0; tags < 2 && (type == ETHERTYPE(0x81, 0x00) || type == ETHERTYPE(0x88, 0xa8)); tags++) {
		type = be16(frame + at + 2);
		at += 4;
	}
	if (type == ETHERTYPE(0x08, 0x00)) {
		const uint8_t *ip = frame + at;
		uint32_t header, total;

		if (at + 20 > len)
			return;
		header = (ip[0] & 15u) * 4u;
		total = be16(ip + 2);
		/* fragments are finished before they are cut */
		if (ip[0] >> 4 != 4 || header < 20 || total < header || at + total > len || be16(ip + 6) & 0x3fff)
			return;
		protocol = ip[9];
		transport = at + header;
		payload = total - header;
		sum = csum_load32(ip + 12) + csum_load32(ip + 16);
	} else if (type == ETHERTYPE(0x86, 0xdd)) {
		const uint8_t *ip = frame + at;

		if (at + 40 > len || at + 40 + be16(ip + 4) > len)
			return;
		protocol = ip[6];
		transport = skip_ipv6_extensions(frame, len, at + 40, &protocol);
		if (!transport || transport > at + 40 + be16(ip + 4))
			return;
		payload = at + 40 + be16(ip + 4) - transport;
		sum = 0;
		for (uint32_t i = 8; i < 40; i += 4)
			sum += csum_load32(ip + i);
	} else {
		return;
	}
	field = csum_field(protocol);
	if (!field || payload < field + 2)
		return;
	sum += htons((uint16_t)payload) + htons(protocol);
	if (csum_load16(frame + transport + field) != csum_fold(sum))
		return;
	view->flags |= VIEW_NEEDS_CSUM;
	view->csum_start = (uint16_t)transport;
	view->csum_offset = (uint16_t)field;
}
