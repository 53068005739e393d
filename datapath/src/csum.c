// SPDX-License-Identifier: Apache-2.0
#include "csum.h"

/* One loop for both uses: 32-bit words into 64-bit lanes, which the compiler turns into vector adds. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR_CLONES __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#define VECTOR_CLONES
#endif

VECTOR_CLONES
uint64_t csum_of(const void *data, size_t len)
{
	const uint8_t *s = data;
	uint64_t sum = 0;
	size_t words = len / 4;

	for (size_t i = 0; i < words; i++)
		sum += csum_load32(s + 4 * i);
	s += 4 * words;
	if (len & 2) {
		sum += csum_load16(s);
		s += 2;
	}
	if (len & 1) {
		uint8_t last[2] = {*s, 0};

		sum += csum_load16(last);
	}
	return sum;
}

VECTOR_CLONES
uint64_t csum_copy(void *restrict to, const void *restrict from, size_t len)
{
	const uint8_t *s = from;
	uint8_t *d = to;
	uint64_t sum = 0;
	size_t words = len / 4;

	for (size_t i = 0; i < words; i++) {
		uint32_t word;

		memcpy(&word, s + 4 * i, 4);
		memcpy(d + 4 * i, &word, 4);
		sum += word;
	}
	s += 4 * words;
	d += 4 * words;
	if (len & 2) {
		uint16_t word;

		memcpy(&word, s, 2);
		memcpy(d, &word, 2);
		sum += word;
		s += 2;
		d += 2;
	}
	if (len & 1) {
		uint8_t last[2] = {*s, 0};

		*d = last[0];
		sum += csum_load16(last);
	}
	return sum;
}
