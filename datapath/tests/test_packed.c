// SPDX-License-Identifier: Apache-2.0
/* Packed virtqueues: every layout, wrapping at every place, event suppression, restart, and drivers that lie. */
#include <errno.h>

#include "packed_driver.h"

static struct pworld w;
static uint8_t frame[65600], got[65600];

static struct part part(struct driver *d, uint32_t len, uint16_t flags)
{
	return (struct part){GPA + driver_alloc(d, len, 1), len, flags};
}

static void post(uint32_t guest, uint32_t len)
{
	const struct part p = part(&w.guest[guest], len, VRING_DESC_F_WRITE);

	pring_add(&w.ring[guest][0], &p, 1);
}

/* From guest 0 to guest 1, header and frame cut into pieces of `step` bytes. */
static void send_cut(const uint8_t *data, uint32_t len, uint32_t step, bool indirect)
{
	struct driver *d = &w.guest[0];
	struct part parts[64];
	uint32_t n = 0, total = HEADER + len;
	uint64_t at = driver_alloc(d, total, 1), table;

	memset(d->memory + at, 0, HEADER);
	memcpy(d->memory + at + HEADER, data, len);
	for (uint32_t done = 0; done < total; done += step)
		parts[n++] = (struct part){GPA + at + done, MIN(step, total - done), 0};
	if (indirect) {
		table = driver_alloc(d, 16ull * n, 16);
		for (uint32_t i = 0; i < n; i++) /* neither id nor any flag but WRITE means anything in a table */
			*(struct vring_packed_desc *)(void *)(d->memory + table + 16ull * i) = (struct vring_packed_desc){
				parts[i].gpa, parts[i].len, 0xbeef, VRING_DESC_F_NEXT};
		parts[0] = (struct part){GPA + table, 16 * n, VRING_DESC_F_INDIRECT};
		n = 1;
	}
	pring_add(&w.ring[0][1], parts, n);
}

static void expect(uint32_t len, uint16_t buffers)
{
	struct pring *r = &w.ring[1][0];
	uint32_t done = 0, written, n = 0;

	for (;; n++) {
		const struct vring_packed_desc *desc = &r->desc[r->seen];
		const uint64_t gpa = desc->addr; /* it stays: the device writes id, length and flags */

		if (pring_reap(r, &written) < 0)
			break;
		memcpy(got + done, w.guest[1].memory + (gpa - GPA), written);
		done += written;
	}
	CHECK_EQ(n, buffers);
	CHECK_EQ(done, HEADER + len);
	CHECK_EQ(got[10] | got[11] << 8, buffers);
	CHECK(!memcmp(got + HEADER, frame, len));
	CHECK(pring_reap(&w.ring[0][1], NULL) >= 0);
}

/* Rings of every size up to nine, sizes that are no power of two among them; chains that wrap at every place. */
static void test_layouts_and_wraps(void)
{
	for (uint32_t num = 1; num <= 9; num++) {
		pworld_init(&w, PACKED, num);
		for (uint32_t i = 0; i < 100; i++) {
			const uint32_t len = 60 + i, pieces = 1 + i % MIN(num, 4u);
			const bool indirect = i % 3 == 2;

			w.guest[0].top = w.guest[1].top = MEMORY / 2;
			make_frame(frame, len, w.guest[1].mac, w.guest[0].mac, (uint8_t)i);
			post(1, 256);
			send_cut(frame, len, (HEADER + len + pieces - 1) / pieces, indirect && num >= pieces);
			pworld_run(&w);
			expect(len, 1);
		}
		CHECK_EQ(xv_guest_rx_counters(w.guest[1].guest, 0)->packets, 100);
		CHECK_EQ(xv_guest_tx_counters(w.guest[0].guest, 0)->drops[XV_DROP_BAD_CHAIN], 0);
		pworld_free(&w);
	}
}

/* A burst longer than a lap leaves what the driver has not given back alone. */
static void test_bursts(void)
{
	pworld_init(&w, PACKED, 37);
	for (uint32_t round = 0, sent = 0; round < 50; round++) {
		const uint32_t n = 1 + round % 37;

		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		for (uint32_t i = 0; i < n; i++) {
			make_frame(frame, 64, w.guest[1].mac, w.guest[0].mac, (uint8_t)(sent + i));
			post(1, 256);
			send_cut(frame, 64, 1000, false);
		}
		pworld_run(&w);
		for (uint32_t i = 0; i < n; i++) {
			struct pring *r = &w.ring[1][0];
			const uint64_t gpa = r->desc[r->seen].addr;
			uint32_t written;

			CHECK(pring_reap(r, &written) >= 0);
			CHECK_EQ(written, HEADER + 64);
			CHECK_EQ(w.guest[1].memory[gpa - GPA + HEADER + 63], (uint8_t)(sent + i + 63 * 7));
			CHECK(pring_reap(&w.ring[0][1], &written) >= 0);
			CHECK_EQ(written, 0);
		}
		CHECK_EQ(pring_reap(&w.ring[1][0], NULL), -1);
		CHECK_EQ(pring_reap(&w.ring[0][1], NULL), -1);
		sent += n;
	}
	pworld_free(&w);
}

/* With VIRTIO_F_IN_ORDER one used descriptor stands for all buffers of a turn, wherever they wrap. */
static void test_batches_in_order(void)
{
	struct pring *r = &w.ring[0][1];

	pworld_init(&w, PACKED | 1ull << VIRTIO_F_IN_ORDER, 11);
	make_frame(frame, 100, w.guest[1].mac, w.guest[0].mac, 1);
	for (uint32_t i = 0; i < 100; i++) {
		const uint32_t first = r->seen, buffers = 1 + i % 3;
		const bool wrap = r->seen_wrap;
		uint16_t last, before[11];
		uint32_t slots = 0;

		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		for (uint32_t b = 0; b < buffers; b++) {
			post(1, 2000);
			send_cut(frame, 100, b ? 112 : 40, false); /* three descriptors, then one for each frame */
		}
		last = (uint16_t)((r->id - 1) % 64);
		for (uint32_t at = 0; at < r->num; at++)
			before[at] = r->desc[at].flags;
		pworld_run(&w);
		for (uint32_t at = 0; at < r->num; at++)
			CHECK(at == first || r->desc[at].flags == before[at]);
		CHECK_EQ(r->desc[first].id, last);
		CHECK_EQ(r->desc[first].flags, wrap ? PACKED_AVAIL | PACKED_USED : 0);
		for (uint16_t b = 0; b < buffers; b++)
			slots += r->slots[(uint16_t)(last - b) % 64];
		CHECK_EQ(slots, buffers + 2);
		r->seen += slots;
		if (r->seen >= r->num) {
			r->seen -= r->num;
			r->seen_wrap = !r->seen_wrap;
		}
		for (uint32_t b = 0; b < buffers; b++) /* the receiver is told of each, for each has a length */
			CHECK(pring_reap(&w.ring[1][0], NULL) >= 0);
	}
	pworld_free(&w);
}

static void test_merged_buffers(void)
{
	pworld_init(&w, PACKED | 1ull << VIRTIO_NET_F_MRG_RXBUF, 16);
	for (uint32_t i = 0; i < 40; i++) {
		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		make_frame(frame, 1000, w.guest[1].mac, w.guest[0].mac, (uint8_t)i);
		for (int b = 0; b < 5; b++) {
			const struct part parts[2] = {part(&w.guest[1], 101, VRING_DESC_F_WRITE),
						      part(&w.guest[1], 102, VRING_DESC_F_WRITE)};

			if (i & 1)
				pring_add(&w.ring[1][0], parts, 2);
			else
				post(1, 203);
		}
		send_cut(frame, 1000, 5000, false);
		pworld_run(&w);
		if (i & 1) { /* the parts of a chain: look at the first only */
			struct pring *r = &w.ring[1][0];
			uint32_t written, total = 0;

			for (int b = 0; b < 5; b++) {
				CHECK(pring_reap(r, &written) >= 0);
				total += written;
			}
			CHECK_EQ(total, HEADER + 1000);
			CHECK(pring_reap(&w.ring[0][1], NULL) >= 0);
		} else {
			expect(1000, 5);
		}
	}
	/* too few: nothing is used, and the frame goes when there are enough */
	w.dp->cycles_per_us = 1ull << 40; /* the sender waits */
	make_frame(frame, 1000, w.guest[1].mac, w.guest[0].mac, 9);
	for (int b = 0; b < 4; b++)
		post(1, 203);
	send_cut(frame, 1000, 5000, false);
	pworld_run(&w);
	CHECK_EQ(pring_reap(&w.ring[1][0], NULL), -1);
	post(1, 203);
	pworld_run(&w);
	expect(1000, 5);
	pworld_free(&w);
}

static void test_event_suppression(void)
{
	struct pring *r;

	pworld_init(&w, PACKED | 1ull << VIRTIO_RING_F_EVENT_IDX, 4);
	r = &w.ring[1][0];
	make_frame(frame, 64, w.guest[1].mac, w.guest[0].mac, 1);
	for (int i = 0; i < 12; i++) {
		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		/* at the slot 2 of the first lap, and of the third; by flags alone in between */
		r->driver->off_wrap = (uint16_t)(2u | 1u << VRING_PACKED_EVENT_F_WRAP_CTR);
		r->driver->flags = i == 5 ? VRING_PACKED_EVENT_FLAG_ENABLE
					  : i == 6 ? VRING_PACKED_EVENT_FLAG_DISABLE : VRING_PACKED_EVENT_FLAG_DESC;
		post(1, 256);
		send_cut(frame, 64, 1000, false);
		pworld_run(&w);
		CHECK(pring_reap(r, NULL) >= 0);
		CHECK(pring_reap(&w.ring[0][1], NULL) >= 0);
		CHECK_EQ(pring_called(r), i == 0 || i == 2 || i == 5 || i == 10); /* the very first: always */
	}
	/* what the device asks of the driver */
	r = &w.ring[0][1];
	CHECK_EQ(r->device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
	vring_arm(r->vr);
	CHECK_EQ(r->device->flags, VRING_PACKED_EVENT_FLAG_DESC);
	CHECK_EQ(r->device->off_wrap, 0u | 0u << 15); /* slot 0 of the fourth lap: 12 = 3 * 4 */
	vring_disarm(r->vr);
	CHECK_EQ(r->device->flags, VRING_PACKED_EVENT_FLAG_DISABLE);
	pworld_free(&w);
}

static void restart(struct driver *d, struct pring *r, uint32_t base, struct xv_mem *region, int result)
{
	struct xv_vring_conf conf = pring_conf(d, r);
	struct xv_vring *old = r->vr;

	conf.base = base;
	conf.inflight = (uintptr_t)region;
	conf.inflight_offset = 64;
	CHECK_EQ(xv_vring_new(d->mem, &conf, &r->vr), result);
	if (result)
		return;
	pworld_publish(&w);
	xv_vring_free(old);
}

/* The base has both places and wrap counters. */
static void test_restart(void)
{
	struct pring *r;

	pworld_init(&w, PACKED, 6);
	r = &w.ring[0][1];
	for (uint32_t i = 0; i < 60; i++) {
		const uint32_t slot = i % 6, wrap = ~(i / 6) & 1u, half = slot | wrap << 15;

		CHECK_EQ(xv_vring_base(r->vr), half | half << 16);
		restart(&w.guest[0], r, half | half << 16, NULL, 0);
		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		make_frame(frame, 64, w.guest[1].mac, w.guest[0].mac, (uint8_t)i);
		post(1, 256);
		send_cut(frame, 64, 1000, false);
		pworld_run(&w);
		expect(64, 1);
	}
	restart(&w.guest[0], r, 6u | 6u << 16, NULL, -EINVAL); /* behind the ring's end */
	pworld_free(&w);
}

/* A backend that is killed: its successor learns from the in-flight region where to go on, whatever the front-end says. */
static void test_inflight(void)
{
	const uint32_t size = 64 + xv_inflight_size(6, 1);
	uint8_t *memory = aligned_alloc(64, ALIGN_UP(size, 64));
	struct inflight_packed *part_of_ring = (void *)(memory + 64);
	const struct xv_region region = {0, size, 0, (uintptr_t)memory};
	struct xv_mem *shared;
	struct pring *r;

	CHECK_EQ(xv_inflight_size(6, 1) % 64, 0);
	CHECK(xv_inflight_size(6, 1) >= sizeof(*part_of_ring) + 6 * 32 && sizeof(*part_of_ring) == 32);
	pworld_init(&w, PACKED, 6);
	r = &w.ring[0][1];
	memset(memory, 0, size);
	CHECK_EQ(xv_mem_new(&region, 1, w.guest[0].guest, &shared), 0);
	restart(&w.guest[0], r, 0x80008000u, shared, 0);
	for (uint32_t i = 0; i < 40; i++) {
		struct inflight_packed before = *part_of_ring;

		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		make_frame(frame, 64, w.guest[1].mac, w.guest[0].mac, (uint8_t)i);
		post(1, 256);
		send_cut(frame, 64, 1000, false);
		if (i % 3 == 1) { /* killed between its first write and the ring's: the buffer is still available */
			part_of_ring->used_idx = (uint16_t)((before.used_idx + 1) % 6);
			part_of_ring->used_wrap_counter ^= part_of_ring->used_idx == 0;
			restart(&w.guest[0], r, 0x80008000u, shared, 0);
		}
		pworld_run(&w);
		if (i % 3 == 2) { /* killed between the ring's write and the last one: the buffer has been used */
			part_of_ring->old_used_idx = before.used_idx;
			part_of_ring->old_used_wrap_counter = before.used_wrap_counter;
		}
		expect(64, 1);
		restart(&w.guest[0], r, 0x80008000u, shared, 0);
		CHECK_EQ(xv_vring_base(r->vr) & 0x7fff, (i + 1) % 6);
	}
	part_of_ring->desc_num = 7;
	restart(&w.guest[0], r, 0x80008000u, shared, -EINVAL);
	part_of_ring->desc_num = 6;
	part_of_ring->version = 2;
	restart(&w.guest[0], r, 0x80008000u, shared, -EINVAL);
	part_of_ring->version = 1;
	part_of_ring->used_idx = part_of_ring->old_used_idx = 0x7fff;
	restart(&w.guest[0], r, 0x80008000u, shared, -EINVAL);
	pworld_free(&w);
	xv_mem_free(shared);
	free(memory);
}

/* Killed after it used a burst and before it published it: the successor goes on at the first that the ring doesn't show. */
static void test_inflight_burst(void)
{
	const uint32_t size = xv_inflight_size(8, 1);
	uint8_t *memory = aligned_alloc(64, size + 64);
	const struct xv_region region = {0, size + 64, 0, (uintptr_t)memory};
	struct vring_desc descs[3];
	struct xv_buf bufs[3];
	struct xv_mem *shared;
	struct pring *r;

	pworld_init(&w, PACKED, 8);
	r = &w.ring[0][1];
	memset(memory, 0, size + 64);
	CHECK_EQ(xv_mem_new(&region, 1, w.guest[0].guest, &shared), 0);
	restart(&w.guest[0], r, 0x80008000u, shared, 0);
	for (uint32_t i = 0; i < 3; i++)
		send_cut(frame, 64, 1000, false);
	CHECK_EQ(vring_peek(r->vr, true, r->vr->next, bufs, descs, 3), 3);
	vring_use(r->vr, true, bufs, NULL, 3);
	restart(&w.guest[0], r, 0x80008000u, shared, 0);
	for (uint32_t i = 0; i < 3; i++)
		CHECK(pring_reap(r, NULL) >= 0);
	for (uint32_t i = 0; i < 40; i++) { /* and for ever */
		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		make_frame(frame, 64, w.guest[1].mac, w.guest[0].mac, (uint8_t)i);
		post(1, 256);
		send_cut(frame, 64, 1000, false);
		pworld_run(&w);
		expect(64, 1);
	}
	pworld_free(&w);
	xv_mem_free(shared);
	free(memory);
}

/* A frame that waits for more buffers than there are: the guest is asked for a kick behind those. */
static void test_armed_behind(void)
{
	struct pring *r;

	pworld_init(&w, PACKED | 1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_NET_F_MRG_RXBUF, 5);
	r = &w.ring[1][0];
	w.dp->cycles_per_us = 1ull << 40; /* the sender waits */
	for (uint32_t i = 0; i < 20; i++) {
		w.guest[0].top = w.guest[1].top = MEMORY / 2;
		make_frame(frame, 500, w.guest[1].mac, w.guest[0].mac, (uint8_t)i);
		post(1, 203);
		post(1, 203);
		send_cut(frame, 500, 1000, false);
		pworld_run(&w);
		CHECK(w.ring[0][1].vr->stalled_on == r->vr);
		vring_arm_behind(r->vr);
		CHECK_EQ(r->device->flags, VRING_PACKED_EVENT_FLAG_DESC);
		CHECK_EQ(r->device->off_wrap, r->next | (uint32_t)r->wrap << 15);
		post(1, 203);
		pworld_run(&w);
		expect(500, 3);
	}
	pworld_free(&w);
}

/* Chains towards a guest are not measured ahead: what a turn looks at grows with its frames, not with their square. */
static void test_chains_are_not_measured_ahead(void)
{
	struct vring_desc descs[4];
	struct xv_buf bufs[4];
	struct part parts[2];

	pworld_init(&w, PACKED, 16);
	post(1, 203);
	parts[0] = part(&w.guest[1], 100, VRING_DESC_F_WRITE);
	parts[1] = part(&w.guest[1], 100, VRING_DESC_F_WRITE);
	pring_add(&w.ring[1][0], parts, 2);
	pring_add(&w.ring[1][0], parts, 2);
	CHECK_EQ(vring_peek_plain(w.ring[1][0].vr, true, w.ring[1][0].vr->next, bufs, descs, 4), 2);
	CHECK_EQ(vring_peek(w.ring[1][0].vr, true, w.ring[1][0].vr->next, bufs, descs, 4), 3);
	pworld_free(&w);
}

/* The guest is given up with this fault; the other one is still served. */
static void expect_fault(enum xv_fault_code code)
{
	struct pring *r = &w.ring[1][1];
	const struct part p = part(&w.guest[1], HEADER + 64, 0);
	const struct part to = part(&w.guest[1], 256, VRING_DESC_F_WRITE);

	pworld_run(&w);
	CHECK_EQ(xv_guest_fault(w.guest[0].guest)->code, code);
	pring_add(&w.ring[1][0], &to, 1);
	memset(w.guest[1].memory + (p.gpa - GPA), 0, HEADER);
	make_frame(w.guest[1].memory + (p.gpa - GPA) + HEADER, 64, w.guest[0].mac, w.guest[1].mac, 1);
	pring_add(r, &p, 1);
	pworld_run(&w);
	CHECK(pring_reap(r, NULL) >= 0);
	CHECK_EQ(xv_guest_fault(w.guest[1].guest)->code, XV_FAULT_NONE);
	pworld_free(&w);
}

static void test_faults(void)
{
	struct driver *d = &w.guest[0];
	struct pring *r = &w.ring[0][1];
	struct part parts[8];
	uint64_t table;

	pworld_init(&w, PACKED, 8); /* a chain that never ends */
	for (uint32_t i = 0; i < 8; i++)
		r->desc[i] = (struct vring_packed_desc){GPA, 8, 1, (uint16_t)(pring_flags(true) | VRING_DESC_F_NEXT)};
	expect_fault(XV_FAULT_CHAIN);

	pworld_init(&w, PACKED, 2048); /* one that takes too long */
	for (uint32_t i = 0; i < 2047; i++)
		r->desc[i] = (struct vring_packed_desc){GPA, 8, 1, (uint16_t)(pring_flags(true) | VRING_DESC_F_NEXT)};
	expect_fault(XV_FAULT_CHAIN);

	pworld_init(&w, PACKED, 8); /* two that overlap after a lap: the second runs over the first */
	for (uint32_t i = 0; i < 8; i++)
		r->desc[i] = (struct vring_packed_desc){GPA, 64, 1, (uint16_t)(pring_flags(true) | (i == 4 ? 0 : VRING_DESC_F_NEXT))};
	expect_fault(XV_FAULT_CHAIN);

	static const uint64_t outside[][2] = {{GPA - 1, 64}, {GPA + MEMORY - 63, 64}, {0, 64}, {UINT64_MAX - 10, 64},
					      {GPA + MEMORY, 64}, {GPA, UINT32_MAX}};
	for (size_t i = 0; i < ARRAY_SIZE(outside); i++) {
		pworld_init(&w, PACKED, 8);
		parts[0] = (struct part){outside[i][0], (uint32_t)outside[i][1], 0};
		pring_add(r, parts, 1);
		expect_fault(XV_FAULT_ADDRESS);
	}

	static const uint32_t bad_lengths[] = {0, 8, 17, 16 * 9, UINT32_MAX, UINT32_MAX - 15};
	for (size_t i = 0; i < ARRAY_SIZE(bad_lengths); i++) {
		pworld_init(&w, PACKED, 8);
		parts[0] = (struct part){GPA, bad_lengths[i], VRING_DESC_F_INDIRECT};
		pring_add(r, parts, 1);
		expect_fault(XV_FAULT_CHAIN);
	}

	pworld_init(&w, PACKED, 8); /* INDIRECT and NEXT */
	parts[0] = (struct part){GPA, 16, VRING_DESC_F_INDIRECT};
	parts[1] = (struct part){GPA, 64, 0};
	pring_add(r, parts, 2);
	expect_fault(XV_FAULT_CHAIN);

	pworld_init(&w, PACKED, 8); /* a table in a table */
	table = driver_alloc(d, 16, 16);
	*(struct vring_packed_desc *)(void *)(d->memory + table) =
		(struct vring_packed_desc){GPA + table, 16, 0, VRING_DESC_F_INDIRECT};
	parts[0] = (struct part){GPA + table, 16, VRING_DESC_F_INDIRECT};
	pring_add(r, parts, 1);
	expect_fault(XV_FAULT_CHAIN);

	pworld_init(&w, PACKED & ~(1ull << VIRTIO_RING_F_INDIRECT_DESC), 8); /* indirect, but not negotiated */
	parts[0] = (struct part){GPA, 16, VRING_DESC_F_INDIRECT};
	pring_add(r, parts, 1);
	expect_fault(XV_FAULT_CHAIN);
}

static void test_ring_checks(void)
{
	struct xv_vring *vr = NULL;
	struct xv_vring_conf good, conf;
	struct driver *d = &w.guest[0];

	pworld_init(&w, PACKED, 8);
	good = pring_conf(d, &w.ring[0][0]);
#define EXPECT(result, ...)                                             \
	do {                                                            \
		conf = good;                                            \
		__VA_ARGS__;                                            \
		CHECK_EQ(xv_vring_new(d->mem, &conf, &vr), result);     \
		if (!(result))                                          \
			xv_vring_free(vr);                              \
	} while (0)
	EXPECT(0, conf.num = 7);
	EXPECT(0, conf.num = 32768, conf.desc = USER);
	EXPECT(-EINVAL, conf.num = 0);
	EXPECT(-EINVAL, conf.num = 32769);
	EXPECT(-EINVAL, conf.num = UINT32_MAX);
	EXPECT(-EINVAL, conf.desc += 8);
	EXPECT(-EINVAL, conf.avail += 2);
	EXPECT(-EINVAL, conf.used += 2);
	EXPECT(-EINVAL, conf.base = 8u << 16);
	EXPECT(-EINVAL, conf.base = 0x7fff7fff);
	EXPECT(-EFAULT, conf.desc = USER + MEMORY - 112);
	EXPECT(0, conf.desc = USER + MEMORY - 128);
	EXPECT(-EFAULT, conf.used = USER + MEMORY);
	EXPECT(0, conf.used = USER + MEMORY - 4);
	EXPECT(-EFAULT, conf.avail = USER - 4);
	pworld_free(&w);
}

int main(void)
{
	test_layouts_and_wraps();
	test_bursts();
	test_batches_in_order();
	test_merged_buffers();
	test_event_suppression();
	test_restart();
	test_inflight();
	test_inflight_burst();
	test_armed_behind();
	test_chains_are_not_measured_ahead();
	test_faults();
	test_ring_checks();
	puts("ok");
	return 0;
}
