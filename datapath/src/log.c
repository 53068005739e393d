// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#define LOG_PAGE_SHIFT 12

static void mark(const struct xv_mem *log, uint64_t page)
{
	uint32_t got;
	uint8_t *byte = mem_at(log, page / 8, 1, &got);

	/* release: the page's bytes are there before the bit. It is set even if it was: the front-end may be clearing it */
	if (byte)
		__atomic_fetch_or(byte, (uint8_t)(1u << page % 8), __ATOMIC_RELEASE);
}

void log_write(const struct xv_mem *log, const struct xv_mem *mem, const void *at, uint32_t len)
{
	for (uint32_t i = 0; len && i < mem->count; i++) {
		const struct mem_range *range = &mem->by_gpa[i];
		const uint64_t offset = (uint64_t)((const uint8_t *)at - range->host);
		uint64_t page, last;

		if (offset >= range->size)
			continue;
		last = (range->start + offset + len - 1) >> LOG_PAGE_SHIFT;
		for (page = (range->start + offset) >> LOG_PAGE_SHIFT; page <= last; page++)
			mark(log, page);
		return;
	}
}
