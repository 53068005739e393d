/* SPDX-License-Identifier: Apache-2.0 */
/* A guest's memory: address translation, and what happens when it is taken away under us. */
#ifndef XV_MEM_H
#define XV_MEM_H

#include "base.h"

struct mem_range {
	uint64_t start, size;
	uint8_t *host;
};

struct xv_mem {
	struct xv_guest *guest;
	struct xv_mem *next; /* in the SIGBUS handler's list */
	uint32_t count;
	struct mem_range *by_user; /* count entries, by the front-end's addresses */
	struct mem_range by_gpa[]; /* count entries, sorted by guest physical address */
};

/*
 * The one accessor: where [addr, addr + len) of the guest's physical memory lies here, or NULL if not all of it is in
 * one region. `*got` is how much of it is contiguous from addr on, 0 if addr itself is outside.
 */
static inline uint8_t *mem_at(const struct xv_mem *mem, uint64_t addr, uint32_t len, uint32_t *got)
{
	const struct mem_range *range = mem->by_gpa;
	uint32_t n = mem->count;
	uint64_t offset, room;

	/* the last region that does not begin behind addr: most guests have two, a hostile one may have hundreds */
	while (n > 1) {
		uint32_t half = n / 2;

		if (range[half].start <= addr) {
			range += half;
			n -= half;
		} else {
			n = half;
		}
	}
	offset = n ? addr - range->start : 0;
	if (unlikely(!n || offset >= range->size)) {
		*got = 0;
		return NULL;
	}
	room = range->size - offset;
	*got = (uint32_t)MIN(room, (uint64_t)len);
	return range->host + offset;
}

/* [addr, addr + len) in the front-end's addresses, all in one region, or NULL. */
void *mem_at_user(const struct xv_mem *mem, uint64_t addr, uint64_t len);

/* Install the SIGBUS handler, once per process; 0 or -errno. */
int mem_guard_install(void);

#endif
