/* SPDX-License-Identifier: Apache-2.0 */
/* The only copy a frame gets. Small frames inline, because a call costs as much as they do; large ones by memcpy. */
#ifndef XV_COPY_H
#define XV_COPY_H

#include "base.h"

typedef struct {
	uint64_t w[2];
} __attribute__((may_alias, packed)) xv_u128;

/* Source and destination never overlap. Reads and writes exactly [0, len). */
static inline void xv_copy(void *restrict to, const void *restrict from, size_t len)
{
	uint8_t *d = to;
	const uint8_t *s = from;

	if (unlikely(len < 16 || len > 256)) {
		memcpy(d, s, len);
		return;
	}
	for (size_t at = 0; at + 16 <= len; at += 16)
		*(xv_u128 *)(d + at) = *(const xv_u128 *)(s + at);
	*(xv_u128 *)(d + len - 16) = *(const xv_u128 *)(s + len - 16);
}

#endif
