// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: memory tables.
 *
 * A table of regions from the input, and addresses to translate. xv_mem_new() must accept exactly the tables whose
 * regions are not empty, do not wrap and do not overlap; what a translation answers must be what a search through the
 * list of regions finds, so it is always inside one region. Nothing is ever read at those addresses.
 */
#include "fuzz.h"

#define MANY XV_MAX_REGIONS

static struct xv_region regions[MANY + 1];
static struct xv_guest *guest;

/* Addresses that meet: a few round ones, plus or minus little; or anything. */
static uint64_t in_place(struct input *in)
{
	static const uint64_t round[8] = {0, 0x1000, 0x2000, 0x100000, 1ull << 32, 1ull << 47, 1ull << 63, 0ull - 0x1000};
	uint8_t how = in8(in);

	if (how & 0x80)
		return in64(in);
	return round[how & 7] + (uint64_t)(how >> 3 & 15) * 0x1000 + (uint64_t)(int64_t)(int8_t)in8(in);
}

static bool apart(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
	return b - a >= a_size && a - b >= b_size;
}

static bool acceptable(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		const struct xv_region *r = &regions[i];

		if (!r->size || r->gpa + (r->size - 1) < r->gpa || r->user_addr + (r->size - 1) < r->user_addr)
			return false;
		for (uint32_t j = 0; j < i; j++)
			if (!apart(r->gpa, r->size, regions[j].gpa, regions[j].size) ||
			    !apart(r->user_addr, r->size, regions[j].user_addr, regions[j].size))
				return false;
	}
	return n <= XV_MAX_REGIONS;
}

static void translate(const struct xv_mem *mem, uint32_t n, uint64_t addr, uint32_t len)
{
	uint64_t at = 0, room = 0, user = 0;
	uint32_t got = 12345;
	uint8_t *p;

	for (uint32_t i = 0; i < n; i++) {
		const struct xv_region *r = &regions[i];

		if (addr - r->gpa < r->size) {
			at = r->host + (addr - r->gpa);
			room = r->size - (addr - r->gpa);
		}
		if (addr - r->user_addr < r->size && r->size - (addr - r->user_addr) >= len)
			user = r->host + (addr - r->user_addr);
	}
	p = mem_at(mem, addr, len, &got);
	CHECK_EQ((uintptr_t)p, at);
	CHECK_EQ(got, MIN(room, (uint64_t)len));
	CHECK_EQ((uintptr_t)mem_at_user(mem, addr, len), user);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	uint8_t how = in8(&in);
	uint32_t n = how < 0xf0 ? how % 24u : MANY - 0xfe + how;
	struct xv_mem *mem;
	int result;

	if (!guest)
		CHECK_EQ(xv_guest_new(1, &guest), 0);
	for (uint32_t i = 0; i < n; i++) {
		struct xv_region *r = &regions[i];

		if (how >= 0xf0 && i >= 8) { /* as many as there may be, and one more: from a few */
			*r = regions[i % 8];
			r->gpa += i / 8 * 0x1000ull;
			r->user_addr += i / 8 * 0x2000ull;
			continue;
		}
		r->gpa = in_place(&in);
		r->user_addr = in_place(&in);
		r->size = in8(&in) & 1 ? in_place(&in) : in16(&in);
		/* where control mapped it: a mapping does not wrap */
		r->host = 16 * (i + 1);
		if (r->size > UINT64_MAX / 2)
			r->size = UINT64_MAX / 2 + in8(&in);
	}
	result = xv_mem_new(regions, n, guest, &mem);
	CHECK_EQ(result, acceptable(n) ? 0 : -22);
	if (result)
		return 0;
	while (in.left) {
		uint64_t addr = in_place(&in);
		uint32_t len = in8(&in) & 1 ? in32(&in) : in8(&in) * 64u;

		translate(mem, n, addr, len);
	}
	for (uint32_t i = 0; i < n; i++) { /* the corners of every region */
		translate(mem, n, regions[i].gpa, 1);
		translate(mem, n, regions[i].gpa - 1, 2);
		translate(mem, n, regions[i].gpa + regions[i].size - 1, 4096);
		translate(mem, n, regions[i].gpa + regions[i].size, 1);
		translate(mem, n, regions[i].user_addr + regions[i].size - 1, 1);
		translate(mem, n, regions[i].user_addr + regions[i].size - 1, 2);
	}
	xv_mem_free(mem);
	return 0;
}
