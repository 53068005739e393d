// SPDX-License-Identifier: Apache-2.0
/* The dirty log: every page of the guest's that changed is marked, those of the ring when asked for, and no other. */
#include "packed_driver.h"

#define PAGE 4096u
#define PAGES ((GPA + MEMORY) / PAGE)
#define LOG_ALL (1ull << 26)

static struct pworld w;
static uint8_t frame[9000], *before;

struct bitmap {
	uint8_t *bits;
	struct xv_mem *mem;
};

static struct bitmap bitmap_new(uint32_t bytes, struct xv_guest *guest)
{
	struct bitmap b = {calloc(1, bytes), NULL};
	const struct xv_region region = {0, bytes, 0, (uintptr_t)b.bits};

	CHECK_EQ(xv_mem_new(&region, 1, guest, &b.mem), 0);
	return b;
}

static void bitmap_free(struct bitmap *b)
{
	xv_mem_free(b->mem);
	free(b->bits);
}

static void relog(struct driver *d, struct xv_vring_conf conf, struct xv_vring **vr, struct bitmap *b, uint32_t flags)
{
	struct xv_vring *old = *vr;

	conf.features |= LOG_ALL;
	conf.log = (uintptr_t)b->mem;
	conf.flags = flags;
	conf.base = xv_vring_base(old);
	CHECK_EQ(xv_vring_new(d->mem, &conf, vr), 0);
	pworld_publish(&w);
	xv_vring_free(old);
}

/* What has been marked is what changed, `ring` included or not. */
static void expect_marked(const struct driver *d, const struct pring *r, const struct bitmap *b, bool ring_too)
{
	const uint64_t ring = (uint64_t)((uint8_t *)r->desc - d->memory) / PAGE;
	const uint64_t device = (uint64_t)((uint8_t *)r->device - d->memory) / PAGE;

	for (uint64_t page = 0; page < PAGES; page++) {
		const bool marked = b->bits[page / 8] >> page % 8 & 1;
		const uint64_t at = page - GPA / PAGE;
		bool changed = page >= GPA / PAGE && memcmp(d->memory + at * PAGE, before + at * PAGE, PAGE);

		if ((at == ring || at == device) && page >= GPA / PAGE) {
			CHECK(marked == ring_too || !changed);
			continue;
		}
		CHECK_EQ(marked, changed);
	}
}

/* Everything the driver wrote is in `before`; only what the device does shows as a change. */
static void snapshot(const struct driver *d)
{
	memcpy(before, d->memory, MEMORY);
}

static void test_packed(uint64_t features, uint32_t flags)
{
	struct driver *d = &w.guest[1];
	struct bitmap b;

	pworld_init(&w, PACKED | features, 16);
	b = bitmap_new((uint32_t)(PAGES / 8), d->guest);
	d->top = ALIGN_UP(d->top, PAGE); /* the rings have pages of their own */
	relog(d, pring_conf(d, &w.ring[1][0]), &w.ring[1][0].vr, &b, flags);
	for (uint32_t i = 0; i < 20; i++) {
		const uint32_t len = 60 + 97 * i, whole = 3 * PAGE;
		struct part parts[3];
		uint64_t at;

		memset(b.bits, 0, PAGES / 8);
		memset(d->memory + MEMORY / 2, 0xa5, MEMORY / 2); /* no byte is overwritten with the same */
		d->top = MEMORY / 2;
		w.guest[0].top = MEMORY / 2;
		/* each fourth in one piece across a page's end; else header and frame far apart, a part of no bytes between */
		at = driver_alloc(d, whole, PAGE) + PAGE - 100 + i;
		if (i % 4) {
			parts[0] = (struct part){GPA + at + PAGE, 7 + i, VRING_DESC_F_WRITE};
			parts[1] = (struct part){GPA + at, 0, VRING_DESC_F_WRITE};
			parts[2] = (struct part){GPA + driver_alloc(d, 2 * PAGE, PAGE), PAGE, VRING_DESC_F_WRITE};
			pring_add(&w.ring[1][0], parts, 3);
		} else {
			parts[0] = (struct part){GPA + at, 2 * PAGE, VRING_DESC_F_WRITE};
			pring_add(&w.ring[1][0], parts, 1);
		}
		make_frame(frame, len, d->mac, w.guest[0].mac, (uint8_t)(1 + i));
		at = driver_alloc(&w.guest[0], HEADER + len, 1);
		memset(w.guest[0].memory + at, 0, HEADER);
		memcpy(w.guest[0].memory + at + HEADER, frame, len);
		parts[0] = (struct part){GPA + at, HEADER + len, 0};
		pring_add(&w.ring[0][1], parts, 1);
		snapshot(d);
		pworld_run(&w);
		CHECK(pring_reap(&w.ring[1][0], NULL) >= 0);
		CHECK(pring_reap(&w.ring[0][1], NULL) >= 0);
		expect_marked(d, &w.ring[1][0], &b, flags & XV_VRING_LOG_USED);
	}
	pworld_free(&w);
	bitmap_free(&b);
}

static void test_split(uint32_t flags)
{
	struct world s;
	struct driver *d = &s.guests[1];
	struct xv_vring_conf conf;
	struct bitmap b;
	struct xv_vring *old;

	world_init(&s, 2, FEATURES, 16, 0);
	b = bitmap_new((uint32_t)(PAGES / 8), d->guest);
	conf = ring_conf(d, &d->ring[0]);
	conf.features |= LOG_ALL;
	conf.log = (uintptr_t)b.mem;
	conf.flags = flags;
	old = d->ring[0].vr;
	CHECK_EQ(xv_vring_new(d->mem, &conf, &d->ring[0].vr), 0);
	world_publish(&s);
	xv_vring_free(old);
	for (uint32_t i = 0; i < 20; i++) {
		const uint64_t used = (uint64_t)((uint8_t *)d->ring[0].used - d->memory) / PAGE;

		memset(b.bits, 0, PAGES / 8);
		memset(d->memory + MEMORY / 2, 0xa5, MEMORY / 2); /* no byte is overwritten with the same */
		d->top = ALIGN_UP(MEMORY / 2, PAGE) + 61 * i;
		s.guests[0].top = MEMORY / 2;
		ring_buffer(d, &d->ring[0], 2048, VRING_DESC_F_WRITE);
		make_frame(frame, 64 + i, d->mac, s.guests[0].mac, (uint8_t)(1 + i));
		driver_send(&s.guests[0], frame, 64 + i);
		snapshot(d);
		world_run(&s);
		CHECK(ring_reap(&d->ring[0], NULL) >= 0);
		CHECK(ring_reap(&s.guests[0].ring[1], NULL) >= 0);
		for (uint64_t page = 0; page < PAGES; page++) {
			const uint64_t at = page - GPA / PAGE;
			const bool marked = b.bits[page / 8] >> page % 8 & 1;

			if (page < GPA / PAGE)
				CHECK(!marked);
			else if (at == used)
				CHECK_EQ(marked, !!(flags & XV_VRING_LOG_USED));
			else
				CHECK_EQ(marked, !!memcmp(d->memory + at * PAGE, before + at * PAGE, PAGE));
		}
	}
	world_free(&s);
	bitmap_free(&b);
}

/* A bitmap that ends before the guest's memory does: nothing is written behind it (the sanitizer looks). */
static void test_small_bitmap(void)
{
	struct driver *d = &w.guest[1];
	struct part to, from;
	struct bitmap b;

	pworld_init(&w, PACKED, 16);
	b = bitmap_new((uint32_t)(GPA / PAGE / 8) + 1, d->guest);
	relog(d, pring_conf(d, &w.ring[1][0]), &w.ring[1][0].vr, &b, XV_VRING_LOG_USED);
	to = (struct part){GPA + driver_alloc(d, 256, 1), 256, VRING_DESC_F_WRITE};
	pring_add(&w.ring[1][0], &to, 1);
	from = (struct part){GPA + driver_alloc(&w.guest[0], HEADER + 64, 1), HEADER + 64, 0};
	make_frame(w.guest[0].memory + (from.gpa - GPA) + HEADER, 64, d->mac, w.guest[0].mac, 1);
	pring_add(&w.ring[0][1], &from, 1);
	pworld_run(&w);
	CHECK(pring_reap(&w.ring[1][0], NULL) >= 0);
	pworld_free(&w);
	bitmap_free(&b);
}

int main(void)
{
	before = malloc(MEMORY);
	CHECK(before);
	test_packed(0, 0);
	test_packed(0, XV_VRING_LOG_USED);
	test_packed(1ull << VIRTIO_RING_F_EVENT_IDX, XV_VRING_LOG_USED);
	test_split(0);
	test_split(XV_VRING_LOG_USED);
	test_small_bitmap();
	free(before);
	puts("ok");
	return 0;
}
