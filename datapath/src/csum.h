/* SPDX-License-Identifier: Apache-2.0 */
/* Internet checksums (RFC 1071), computed while copying. Sums are of 16-bit words in memory order. */
#ifndef XV_CSUM_H
#define XV_CSUM_H

#include "base.h"

static inline uint16_t csum_fold(uint64_t sum)
{
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffffu) + (sum >> 16);
	sum = (sum & 0xffffu) + (sum >> 16);
	return (uint16_t)sum;
}

static inline uint64_t csum_load16(const void *p)
{
	uint16_t word;

	memcpy(&word, p, 2);
	return word;
}

static inline uint64_t csum_load32(const void *p)
{
	uint32_t word;

	memcpy(&word, p, 4);
	return word;
}

/* Sum of len bytes, the last odd byte padded with zero; len at most 64 KiB. */
uint64_t csum_of(const void *data, size_t len);
/* The same, while copying. */
uint64_t csum_copy(void *restrict to, const void *restrict from, size_t len);

/* A checksum over pieces of any length: a piece that starts at an odd offset counts with its bytes swapped. */
struct csum {
	uint64_t sum;
	bool odd;
};

static inline void csum_add(struct csum *c, uint64_t piece, size_t len)
{
	uint16_t folded = csum_fold(piece);

	c->sum += c->odd ? __builtin_bswap16(folded) : folded;
	c->odd ^= len & 1;
}

#endif
