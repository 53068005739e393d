/* SPDX-License-Identifier: Apache-2.0 */
/* TCP and UDP frames as a local stack leaves them: only the pseudo-header's sum in the checksum field. */
#ifndef XV_TEST_FRAMES_H
#define XV_TEST_FRAMES_H

#include <netinet/in.h>

#include "harness.h"

static const uint8_t a_mac[6] = {0x52, 0x54, 0, 0, 0, 1}, b_mac[6] = {2, 2, 2, 2, 2, 2};

/* The checksum byte by byte, to compare with. */
static inline uint16_t plain_sum(const uint8_t *data, size_t len)
{
	uint32_t sum = 0;

	for (size_t i = 0; i < len; i++)
		sum += i & 1 ? (uint32_t)data[i] << 8 : data[i]; /* little-endian words in memory order */
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

struct spec {
	int family; /* 4 or 6 */
	uint8_t protocol;
	uint32_t tags, options, payload; /* VLAN tags; bytes of IPv4 options or IPv6 extension headers; bytes of data */
};

struct built {
	uint8_t bytes[70000];
	uint32_t len, transport, field;
	uint16_t pseudo; /* folded, as the kernel leaves it in the frame */
};

static inline void build(struct built *f, const struct spec *s, const uint8_t *to, const uint8_t *from)
{
	uint32_t at = 12, l4 = (s->protocol == IPPROTO_TCP ? 20 : 8) + s->payload;
	uint8_t pseudo[40] = {0};
	uint16_t ip_sum;
	uint8_t *ip;

	memset(f, 0, sizeof(*f));
	memcpy(f->bytes, to, 6);
	memcpy(f->bytes + 6, from, 6);
	for (uint32_t i = 0; i < s->tags; i++, at += 4)
		memcpy(f->bytes + at, (uint8_t[]){0x81, 0, 0, (uint8_t)(10 + i)}, 4);
	ip = f->bytes + at + 2;
	if (s->family == 4) {
		uint32_t total = 20 + s->options + l4;

		memcpy(f->bytes + at, (uint8_t[]){8, 0}, 2);
		ip[0] = (uint8_t)(0x40 | (5 + s->options / 4));
		ip[2] = (uint8_t)(total >> 8);
		ip[3] = (uint8_t)total;
		ip[8] = 64;
		ip[9] = s->protocol;
		memcpy(ip + 12, (uint8_t[]){10, 1, 2, 3, 192, 168, 200, 7}, 8);
		memset(ip + 20, 1, s->options);
		ip_sum = (uint16_t)~plain_sum(ip, 20 + s->options);
		memcpy(ip + 10, &ip_sum, 2);
		memcpy(pseudo, ip + 12, 8);
		memcpy(pseudo + 8, (uint8_t[]){0, s->protocol, (uint8_t)(l4 >> 8), (uint8_t)l4}, 4);
		f->transport = (uint32_t)(ip - f->bytes) + 20 + s->options;
	} else {
		uint32_t total = s->options + l4;

		memcpy(f->bytes + at, (uint8_t[]){0x86, 0xdd}, 2);
		ip[0] = 0x60;
		ip[4] = (uint8_t)(total >> 8);
		ip[5] = (uint8_t)total;
		ip[6] = s->options ? IPPROTO_DSTOPTS : s->protocol;
		for (int i = 8; i < 40; i++)
			ip[i] = (uint8_t)(i * 13);
		if (s->options) {
			ip[40] = s->protocol;
			ip[41] = (uint8_t)(s->options / 8 - 1);
		}
		memcpy(pseudo, ip + 8, 32);
		memcpy(pseudo + 32, (uint8_t[]){(uint8_t)(l4 >> 8), (uint8_t)l4, 0, s->protocol}, 4);
		f->transport = (uint32_t)(ip - f->bytes) + 40 + s->options;
	}
	f->len = f->transport + l4;
	f->field = s->protocol == IPPROTO_TCP ? 16 : 6;
	for (uint32_t i = f->transport; i < f->len; i++)
		f->bytes[i] = (uint8_t)(i * 17 + s->payload);
	f->pseudo = plain_sum(pseudo, sizeof(pseudo));
	if (s->protocol == IPPROTO_TCP) {
		f->bytes[f->transport + 12] = 0x50; /* no options */
		f->bytes[f->transport + 13] = 0x10; /* ACK */
	} else {
		put_be16(f->bytes + f->transport + 4, l4);
	}
	memcpy(f->bytes + f->transport + f->field, &f->pseudo, 2);
}

/* A receiver's check: the sum over pseudo-header and segment is all ones. */
static inline bool verifies(const struct built *f, const uint8_t *frame)
{
	uint32_t sum = f->pseudo + (uint32_t)plain_sum(frame + f->transport, f->len - f->transport);

	return ((sum & 0xffff) + (sum >> 16)) == 0xffff;
}

#endif
