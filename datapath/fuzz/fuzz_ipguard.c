// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: what a guest says of its addresses (src/ipguard.c). The input is a frame.
 *
 * It is judged by copies of exactly as many bytes as are given, so that AddressSanitizer sees a look behind them. Fewer bytes
 * may decide nothing, but never otherwise than more of them; and a tag in front changes nothing, as long as no header
 * is pushed out of sight.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../src/ipguard.h"

#define CHECK(cond)                                                                      \
	do {                                                                             \
		if (!(cond)) {                                                           \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);       \
			abort();                                                         \
		}                                                                        \
	} while (0)

#define TAG 4u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct ip_guard *addresses(void)
{
	static const struct xv_ip own[] = {{{10, 0, 0, 2}, 4}, {{10, 0, 0, 9}, 4}, {{0xfd, [15] = 2}, 6}, {{0xfe, 0x80, [15] = 9}, 6}};
	struct ip_guard *guard;

	CHECK(!ip_guard_new(own, ARRAY_SIZE(own), &guard));
	return guard;
}

static enum ip_verdict judge(const struct ip_guard *guard, const uint8_t *frame, uint32_t have, uint32_t len)
{
	uint8_t *copy = malloc(have);
	enum ip_verdict result;

	CHECK(copy);
	memcpy(copy, frame, have);
	result = ip_guard_judge(guard, copy, have, len);
	free(copy);
	CHECK(result == IP_PASSES || result == IP_DROPPED || result == IP_UNSEEN);
	CHECK(result != IP_UNSEEN || have < len);
	return result;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct ip_guard *guard;
	uint8_t tagged[512 + TAG];
	enum ip_verdict whole, behind;
	uint32_t len = (uint32_t)size, most = MIN(len, IP_GUARD_BYTES);

	if (len < 14 || len > 512)
		return 0;
	if (!guard)
		guard = addresses();
	whole = judge(guard, data, most, len);
	for (uint32_t have = 14; have < most; have += have < 100 ? 1 : 7) {
		const enum ip_verdict early = judge(guard, data, have, len), cut = judge(guard, data, have, have);

		CHECK(early == whole || early == IP_UNSEEN);
		CHECK(cut != IP_PASSES || whole == IP_PASSES || whole == IP_UNSEEN);
	}
	memcpy(tagged, data, 12);
	memcpy(tagged + 12, (uint8_t[]){0x81, 0, 0, 5}, TAG);
	memcpy(tagged + 12 + TAG, data + 12, len - 12);
	behind = judge(guard, tagged, MIN(len + TAG, IP_GUARD_BYTES), len + TAG);
	CHECK(behind == whole || (behind == IP_UNSEEN && len + TAG > IP_GUARD_BYTES));
	return 0;
}
