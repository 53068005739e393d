// SPDX-License-Identifier: Apache-2.0
/* Frames through the switch: every way, every layout of buffers, and what becomes of those that cannot go. */
#include "harness.h"

static struct world w;
static uint8_t frame[4096], got[4096];

static const uint8_t nobody[6] = {0x52, 0x54, 0, 0, 9, 9}, everyone[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

#define RX(g) (w.guests[g].guest->queues[0].rx)
#define TX(g) (w.guests[g].guest->queues[0].tx)

static void test_guest_to_guest(void)
{
	uint8_t *buffer;
	uint32_t len;

	world_init(&w, 2, FEATURES, 8, 0);
	for (uint32_t size = 14; size <= 1514; size += 50) {
		buffer = ring_buffer(&w.guests[1], &w.guests[1].ring[0], 2048, VRING_DESC_F_WRITE);
		make_frame(frame, size, w.guests[1].mac, w.guests[0].mac, (uint8_t)size);
		driver_send(&w.guests[0], frame, size);
		world_run(&w);
		CHECK(ring_reap(&w.guests[1].ring[0], &len) >= 0);
		CHECK_EQ(len, HEADER + size);
		CHECK(!memcmp(buffer + HEADER, frame, size));
		CHECK_EQ(buffer[10], 1); /* num_buffers */
		CHECK(ring_reap(&w.guests[0].ring[1], &len) >= 0);
		CHECK_EQ(len, 0);
		CHECK(ring_called(&w.guests[1].ring[0]));
	}
	CHECK_EQ(RX(1).packets, TX(0).packets);
	CHECK_EQ(RX(1).bytes, TX(0).bytes);
	CHECK_EQ(RX(1).copied_bytes, RX(1).bytes);
	world_free(&w);
}

static void test_guest_to_nic_and_back(void)
{
	uint8_t *buffer;
	uint32_t len;

	world_init(&w, 1, FEATURES, 8, 0);
	/* three times round every frame of the UMEM */
	for (uint32_t i = 0; i < 3 * FRAMES; i++) {
		make_frame(frame, 60 + i, nobody, w.guests[0].mac, (uint8_t)i);
		driver_send(&w.guests[0], frame, 60 + i);
		world_run(&w);
		CHECK_EQ(nic_send(&w.nic, got), 60 + i);
		CHECK(!memcmp(got, frame, 60 + i));

		buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[0], 1600, VRING_DESC_F_WRITE);
		make_frame(frame, 60 + i, w.guests[0].mac, nobody, (uint8_t)~i);
		CHECK(nic_receive(&w.nic, frame, 60 + i));
		world_run(&w);
		CHECK(ring_reap(&w.guests[0].ring[0], &len) >= 0);
		CHECK_EQ(len, HEADER + 60 + i);
		CHECK(!memcmp(buffer + HEADER, frame, 60 + i));
	}
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES); /* every receive frame is back */
	CHECK_EQ(w.nic.nicq->counters.copied_bytes, w.nic.nicq->counters.tx_bytes);
	CHECK_EQ(w.nic.xsk->counters.packets, 3 * FRAMES);
	CHECK_EQ(RX(0).copied_bytes, RX(0).bytes);
	world_free(&w);
}

/* Header and frame over any layout, sent: pieces of `step` bytes, direct or by an indirect table. */
static void send_in_pieces(struct driver *d, const uint8_t *data, uint32_t len, uint32_t step, bool indirect)
{
	struct ring *r = &d->ring[1];
	uint32_t total = HEADER + len, n = (total + step - 1) / step;
	uint64_t at = driver_alloc(d, total, 1), table = driver_alloc(d, 16ull * n, 16);
	struct vring_desc *descs = indirect ? (void *)(d->memory + table) : r->desc;

	memset(d->memory + at, 0, HEADER);
	memcpy(d->memory + at + HEADER, data, len);
	for (uint32_t i = 0; i < n; i++)
		descs[i] = (struct vring_desc){GPA + at + (uint64_t)i * step, MIN(step, total - i * step),
					       i + 1 < n ? VRING_DESC_F_NEXT : 0, (uint16_t)(i + 1)};
	if (indirect)
		ring_desc(r, 0, GPA + table, 16 * n, VRING_DESC_F_INDIRECT, -1);
	ring_offer(r, 0);
}

static void test_any_layout_sent(void)
{
	for (uint32_t step = 1; step < 100; step += step < 14 ? 1 : 17) {
		for (int indirect = 0; indirect < 2; indirect++) {
			uint8_t *buffer;
			uint32_t len;

			world_init(&w, 2, FEATURES, 128, 0);
			buffer = ring_buffer(&w.guests[1], &w.guests[1].ring[0], 2048, VRING_DESC_F_WRITE);
			make_frame(frame, 100, w.guests[1].mac, w.guests[0].mac, (uint8_t)step);
			send_in_pieces(&w.guests[0], frame, 100, step, indirect);
			world_run(&w);
			CHECK(ring_reap(&w.guests[1].ring[0], &len) >= 0);
			CHECK_EQ(len, HEADER + 100);
			CHECK(!memcmp(buffer + HEADER, frame, 100));
			CHECK_EQ(RX(1).copied_bytes, 100);
			world_free(&w);
		}
	}
}

/* Received in chains of `step`-byte descriptors: one chain that is large enough, or merged buffers of one each. */
static void test_any_layout_received(void)
{
	for (uint32_t step = 1; step < 100; step += step < 14 ? 1 : 17) {
		for (int merge = 0; merge < 2; merge++) {
			uint32_t total = HEADER + 100, n = (total + step - 1) / step, len, seen = 0;
			struct ring *r;
			uint64_t at;

			world_init(&w, 2, FEATURES | (merge ? 1ull << VIRTIO_NET_F_MRG_RXBUF : 0), 128, 0);
			r = &w.guests[1].ring[0];
			at = driver_alloc(&w.guests[1], (uint64_t)n * step, 1);
			for (uint32_t i = 0; i < n; i++) {
				ring_desc(r, (uint16_t)i, GPA + at + (uint64_t)i * step, step, VRING_DESC_F_WRITE,
					  !merge && i + 1 < n ? (int)i + 1 : -1);
				if (merge || !i)
					ring_offer(r, (uint16_t)i);
			}
			make_frame(frame, 100, w.guests[1].mac, w.guests[0].mac, (uint8_t)step);
			driver_send(&w.guests[0], frame, 100);
			world_run(&w);
			for (uint32_t i = 0; i < (merge ? n : 1); i++) {
				CHECK_EQ(ring_reap(r, &len), i);
				seen += len;
			}
			CHECK_EQ(ring_reap(r, &len), -1);
			CHECK_EQ(seen, total);
			CHECK(!memcmp(w.guests[1].memory + at + HEADER, frame, 100));
			CHECK_EQ(w.guests[1].memory[at + 10], merge ? n : 1);
			world_free(&w);
		}
	}
}

/* Too few merged buffers: nothing is consumed, and the frame waits in the sender's ring until its patience ends. */
static void test_merge_shortage_rolls_back(void)
{
	uint32_t len;

	world_init(&w, 2, FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF, 8, 0);
	ring_buffer(&w.guests[1], &w.guests[1].ring[0], 64, VRING_DESC_F_WRITE);
	make_frame(frame, 1000, w.guests[1].mac, w.guests[0].mac, 1);
	driver_send(&w.guests[0], frame, 1000);
	while (!RX(1).drops[XV_DROP_NO_BUFFERS])
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
	CHECK_EQ(ring_reap(&w.guests[1].ring[0], &len), -1);
	CHECK_EQ(RX(1).drops[XV_DROP_NO_BUFFERS], 1);
	CHECK_EQ(xv_vring_base(w.guests[1].ring[0].vr), 0);
	CHECK_EQ(ring_reap(&w.guests[0].ring[1], &len), 0);
	/* the buffer is still good for a small frame */
	make_frame(frame, 40, w.guests[1].mac, w.guests[0].mac, 2);
	driver_send(&w.guests[0], frame, 40);
	world_run(&w);
	CHECK_EQ(ring_reap(&w.guests[1].ring[0], &len), 0);
	CHECK_EQ(len, HEADER + 40);
	world_free(&w);
}

/* A guest without buffers costs its sender a bounded wait, and a third guest nothing. */
static void test_stalled_receiver_is_bounded(void)
{
	uint64_t before;
	uint32_t len;

	world_init(&w, 3, FEATURES, 64, 0);
	make_frame(frame, 64, w.guests[1].mac, w.guests[0].mac, 1);
	driver_send(&w.guests[0], frame, 64);
	before = cycles_now();
	while (ring_reap(&w.guests[0].ring[1], &len) < 0) {
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		ring_buffer(&w.guests[2], &w.guests[2].ring[0], 128, VRING_DESC_F_WRITE);
		make_frame(got, 64, w.guests[2].mac, w.guests[1].mac, 2);
		driver_send(&w.guests[1], got, 64);
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		CHECK(ring_reap(&w.guests[2].ring[0], &len) >= 0);
		w.guests[1].top = w.guests[2].top = MEMORY / 2;
	}
	CHECK((cycles_now() - before) / w.dp->cycles_per_us < 1000 * 100);
	CHECK_EQ(RX(1).drops[XV_DROP_NO_BUFFERS], 1);
	/* and when it reads again, frames flow again */
	ring_buffer(&w.guests[1], &w.guests[1].ring[0], 128, VRING_DESC_F_WRITE);
	driver_send(&w.guests[0], frame, 64);
	world_run(&w);
	CHECK_EQ(ring_reap(&w.guests[1].ring[0], &len), 0);
	world_free(&w);
}

/* Frames from the NIC wait in the guest's own socket, at most `keep` of them. */
static void test_nic_frames_wait(void)
{
	uint32_t len, keep, arrived = 0;

	world_init(&w, 1, FEATURES, 64, 0);
	keep = w.nic.xsk->keep;
	CHECK(keep >= XV_BURST && keep < FRAMES);
	make_frame(frame, 64, w.guests[0].mac, nobody, 1);
	for (uint32_t i = 0; i < FRAMES; i++)
		CHECK(nic_receive(&w.nic, frame, 64));
	for (int i = 0; i < 10; i++)
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
	CHECK_EQ(RX(0).drops[XV_DROP_NO_BUFFERS], FRAMES - keep);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES - keep);
	for (uint32_t i = 0; i < 64; i++)
		ring_buffer(&w.guests[0], &w.guests[0].ring[0], 128, VRING_DESC_F_WRITE);
	world_run(&w);
	while (ring_reap(&w.guests[0].ring[0], &len) >= 0)
		arrived++;
	CHECK_EQ(arrived, keep);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	world_free(&w);
}

static void test_flood(void)
{
	uint8_t *buffers[3];
	uint32_t len;

	world_init(&w, 3, FEATURES, 8, 0);
	for (int i = 0; i < 3; i++)
		buffers[i] = ring_buffer(&w.guests[i], &w.guests[i].ring[0], 256, VRING_DESC_F_WRITE);
	make_frame(frame, 100, everyone, w.guests[0].mac, 3);
	driver_send(&w.guests[0], frame, 100);
	world_run(&w);
	CHECK_EQ(ring_reap(&w.guests[0].ring[0], &len), -1); /* not back to the sender */
	for (int i = 1; i < 3; i++) {
		CHECK_EQ(ring_reap(&w.guests[i].ring[0], &len), 0);
		CHECK(!memcmp(buffers[i] + HEADER, frame, 100));
	}
	CHECK_EQ(nic_send(&w.nic, got), 100);
	CHECK(!memcmp(got, frame, 100));
	world_free(&w);
}

/* A burst to several guests and the NIC, interleaved: each gets its own, in order. */
static void test_interleaved(void)
{
	uint8_t *buffers[3][8];
	uint32_t len;

	world_init(&w, 3, FEATURES, 32, 0);
	for (int g = 1; g < 3; g++)
		for (int i = 0; i < 8; i++)
			buffers[g][i] = ring_buffer(&w.guests[g], &w.guests[g].ring[0], 256, VRING_DESC_F_WRITE);
	for (int i = 0; i < 24; i++) {
		make_frame(frame, 64, i % 3 ? w.guests[i % 3].mac : nobody, w.guests[0].mac, (uint8_t)i);
		driver_send(&w.guests[0], frame, 64);
	}
	world_run(&w);
	for (int i = 0; i < 24; i++) {
		make_frame(frame, 64, i % 3 ? w.guests[i % 3].mac : nobody, w.guests[0].mac, (uint8_t)i);
		if (i % 3) {
			CHECK(ring_reap(&w.guests[i % 3].ring[0], &len) >= 0);
			CHECK(!memcmp(buffers[i % 3][i / 3] + HEADER, frame, 64));
		} else {
			CHECK_EQ(nic_send(&w.nic, got), 64);
			CHECK(!memcmp(got, frame, 64));
		}
	}
	world_free(&w);
}

static void test_vlan_lookup(void)
{
	uint32_t len;

	world_init(&w, 2, FEATURES, 8, 0);
	ring_buffer(&w.guests[1], &w.guests[1].ring[0], 256, VRING_DESC_F_WRITE);
	make_frame(frame, 64, w.guests[1].mac, w.guests[0].mac, 1);
	memcpy(frame + 12, (uint8_t[]){0x81, 0x00, 0x20, 0x64}, 4); /* priority 1, VLAN 100 */
	driver_send(&w.guests[0], frame, 64);
	world_run(&w);
	CHECK_EQ(ring_reap(&w.guests[1].ring[0], &len), 0);
	world_free(&w);
}

static void expect_sent_drop(enum xv_drop why, uint32_t len)
{
	uint32_t used;

	driver_send(&w.guests[0], frame, len);
	world_run(&w);
	CHECK_EQ(TX(0).drops[why], 1);
	CHECK(ring_reap(&w.guests[0].ring[1], &used) >= 0); /* the chain is given back all the same */
	TX(0).drops[why] = 0;
}

static void test_drops_of_sent_frames(void)
{
	struct ring *r;
	uint8_t *buffer;
	uint32_t len;

	world_init(&w, 2, FEATURES, 16, 0);
	make_frame(frame, sizeof(frame), nobody, w.guests[0].mac, 1);
	expect_sent_drop(XV_DROP_RUNT, 0);
	expect_sent_drop(XV_DROP_RUNT, 1);
	expect_sent_drop(XV_DROP_RUNT, 13);
	expect_sent_drop(XV_DROP_TOO_BIG, 1500 + 14 + 8 + 1);
	CHECK_EQ(nic_send(&w.nic, got), 0);

	r = &w.guests[0].ring[1];
	for (uint32_t size = 1; size < HEADER; size++) { /* not even a header */
		ring_buffer(&w.guests[0], r, size, 0);
		world_run(&w);
		CHECK(ring_reap(r, &len) >= 0);
	}
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_HEADER], HEADER - 1);

	buffer = ring_buffer(&w.guests[0], r, HEADER + 64, 0);
	memset(buffer, 0, HEADER);
	buffer[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM; /* not negotiated */
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_HEADER], HEADER);
	CHECK(ring_reap(r, &len) >= 0);

	ring_buffer(&w.guests[0], r, 100, VRING_DESC_F_WRITE);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_CHAIN], 1);
	CHECK(ring_reap(r, &len) >= 0);

	xv_vring_set_enabled(r->vr, 0);
	driver_send(&w.guests[0], frame, 64);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_DISABLED], 1);
	CHECK(ring_reap(r, &len) >= 0);
	CHECK_EQ(nic_send(&w.nic, got), 0);
	CHECK(!guest_faulted(w.guests[0].guest));
	world_free(&w);
}

static void test_drops_of_received_frames(void)
{
	world_init(&w, 2, FEATURES, 16, 0);
	ring_buffer(&w.guests[1], &w.guests[1].ring[0], HEADER + 60, VRING_DESC_F_WRITE);
	make_frame(frame, 61, w.guests[1].mac, w.guests[0].mac, 1);
	driver_send(&w.guests[0], frame, 61);
	world_run(&w);
	CHECK_EQ(RX(1).drops[XV_DROP_TOO_BIG], 1);
	CHECK_EQ(RX(1).packets, 0);
	xv_vring_set_enabled(w.guests[1].ring[0].vr, 0);
	driver_send(&w.guests[0], frame, 60);
	world_run(&w);
	CHECK_EQ(RX(1).drops[XV_DROP_NOT_CONNECTED], 1);
	world_free(&w);
}

/* ---- hostile rings: each faults its guest, and the other guest's traffic goes on ---- */

static struct ring *hostile(void)
{
	world_init(&w, 2, FEATURES, 8, 0);
	return &w.guests[0].ring[1];
}

static void expect_fault(enum xv_fault_code code)
{
	uint32_t len;
	uint64_t events;

	world_run(&w);
	CHECK_EQ(xv_guest_fault(w.guests[0].guest)->code, code);
	CHECK_EQ(read(w.dp->event_fd, &events, sizeof(events)), sizeof(events));
	make_frame(frame, 64, nobody, w.guests[1].mac, 1);
	driver_send(&w.guests[1], frame, 64);
	world_run(&w);
	CHECK_EQ(nic_send(&w.nic, got), 64);
	CHECK(ring_reap(&w.guests[1].ring[1], &len) >= 0);
	world_free(&w);
}

static void test_faults(void)
{
	struct ring *r;
	struct vring_desc *table;
	uint64_t at;

	r = hostile();
	r->avail->idx = 9; /* more than the ring holds */
	expect_fault(XV_FAULT_AVAIL_INDEX);
	r = hostile();
	r->avail->idx = (uint16_t)-1;
	expect_fault(XV_FAULT_AVAIL_INDEX);

	r = hostile();
	ring_offer(r, 8);
	expect_fault(XV_FAULT_HEAD);
	r = hostile();
	ring_offer(r, 65535);
	expect_fault(XV_FAULT_HEAD);

	r = hostile(); /* a loop of one */
	ring_desc(r, 0, GPA, 64, 0, 0);
	ring_offer(r, 0);
	expect_fault(XV_FAULT_CHAIN);
	r = hostile(); /* a loop of eight */
	for (uint16_t i = 0; i < 8; i++)
		ring_desc(r, i, GPA, 64, 0, (i + 1) % 8);
	ring_offer(r, 3);
	expect_fault(XV_FAULT_CHAIN);
	r = hostile(); /* out of the table */
	ring_desc(r, 0, GPA, 64, 0, 8);
	ring_offer(r, 0);
	expect_fault(XV_FAULT_CHAIN);

	static const uint64_t outside[][2] = {{GPA - 1, 64}, {GPA + MEMORY - 63, 64}, {0, 64}, {UINT64_MAX - 10, 64},
					      {GPA + MEMORY, 64}, {GPA, UINT32_MAX}};
	for (size_t i = 0; i < ARRAY_SIZE(outside); i++) {
		r = hostile();
		ring_desc(r, 0, outside[i][0], (uint32_t)outside[i][1], 0, -1);
		ring_offer(r, 0);
		expect_fault(XV_FAULT_ADDRESS);
	}

	static const uint32_t bad_lengths[] = {0, 8, 17, 16 * 9, UINT32_MAX, UINT32_MAX - 15};
	for (size_t i = 0; i < ARRAY_SIZE(bad_lengths); i++) {
		r = hostile();
		ring_desc(r, 0, GPA, bad_lengths[i], VRING_DESC_F_INDIRECT, -1);
		ring_offer(r, 0);
		expect_fault(XV_FAULT_CHAIN);
	}
	r = hostile(); /* indirect and next */
	ring_desc(r, 0, GPA, 32, VRING_DESC_F_INDIRECT, 1);
	ring_offer(r, 0);
	expect_fault(XV_FAULT_CHAIN);
	r = hostile(); /* nested */
	at = driver_alloc(&w.guests[0], 64, 16);
	table = (void *)(w.guests[0].memory + at);
	table[0] = (struct vring_desc){GPA + at, 32, VRING_DESC_F_INDIRECT, 0};
	ring_desc(r, 0, GPA + at, 32, VRING_DESC_F_INDIRECT, -1);
	ring_offer(r, 0);
	expect_fault(XV_FAULT_CHAIN);
	r = hostile(); /* a loop inside, and a next outside */
	for (uint16_t next = 0; next < 4; next++) {
		if (next)
			r = hostile();
		at = driver_alloc(&w.guests[0], 64, 16);
		table = (void *)(w.guests[0].memory + at);
		table[0] = (struct vring_desc){GPA, 16, VRING_DESC_F_NEXT, (uint16_t)(next ? next + 1 : 0)};
		table[1] = (struct vring_desc){GPA, 16, 0, 0};
		ring_desc(r, 0, GPA + at, 32, VRING_DESC_F_INDIRECT, -1);
		ring_offer(r, 0);
		expect_fault(XV_FAULT_CHAIN);
	}
	r = hostile(); /* the table outside memory */
	ring_desc(r, 0, GPA + MEMORY - 16, 32, VRING_DESC_F_INDIRECT, -1);
	table = (void *)(w.guests[0].memory + MEMORY - 16);
	*table = (struct vring_desc){GPA, 16, VRING_DESC_F_NEXT, 1};
	ring_offer(r, 0);
	expect_fault(XV_FAULT_ADDRESS);
}

static void expect_receive_fault(enum xv_fault_code code)
{
	make_frame(frame, 64, w.guests[0].mac, w.guests[1].mac, 1);
	driver_send(&w.guests[1], frame, 64);
	world_run(&w);
	CHECK_EQ(xv_guest_fault(w.guests[0].guest)->code, code);
	world_free(&w);
}

static void test_receive_faults(void)
{
	struct ring *r;

	hostile();
	r = &w.guests[0].ring[0];
	ring_desc(r, 0, GPA, 2048, 0, -1); /* not writable */
	ring_offer(r, 0);
	expect_receive_fault(XV_FAULT_CHAIN);
	hostile();
	r = &w.guests[0].ring[0];
	ring_desc(r, 0, GPA, 0, VRING_DESC_F_WRITE, -1); /* no room at all */
	ring_offer(r, 0);
	expect_receive_fault(XV_FAULT_CHAIN);
	hostile();
	r = &w.guests[0].ring[0];
	ring_desc(r, 0, GPA + MEMORY - 10, 2048, VRING_DESC_F_WRITE, -1);
	ring_offer(r, 0);
	expect_receive_fault(XV_FAULT_ADDRESS);
	hostile();
	ring_offer(&w.guests[0].ring[0], 99);
	expect_receive_fault(XV_FAULT_HEAD);
	hostile();
	w.guests[0].ring[0].avail->idx = 1000;
	expect_receive_fault(XV_FAULT_AVAIL_INDEX);
}

static void test_event_idx(void)
{
	struct ring *r;
	uint32_t len;

	world_init(&w, 2, FEATURES | 1ull << VIRTIO_RING_F_EVENT_IDX, 8, 0);
	r = &w.guests[1].ring[0];
	make_frame(frame, 64, w.guests[1].mac, w.guests[0].mac, 1);
	r->avail->ring[r->num] = 2; /* used_event: interrupt at the third */
	for (int i = 0; i < 5; i++) {
		ring_buffer(&w.guests[1], r, 256, VRING_DESC_F_WRITE);
		driver_send(&w.guests[0], frame, 64);
		world_run(&w);
		CHECK(ring_reap(r, &len) >= 0);
		CHECK_EQ(ring_called(r), i == 0 || i == 2); /* the very first: nobody knows what was signalled before */
	}
	world_free(&w);
}

static void test_no_interrupt_flag(void)
{
	struct ring *r;
	uint32_t len;

	world_init(&w, 2, FEATURES, 8, 0);
	r = &w.guests[1].ring[0];
	r->avail->flags = VRING_AVAIL_F_NO_INTERRUPT;
	ring_buffer(&w.guests[1], r, 256, VRING_DESC_F_WRITE);
	make_frame(frame, 64, w.guests[1].mac, w.guests[0].mac, 1);
	driver_send(&w.guests[0], frame, 64);
	world_run(&w);
	CHECK(ring_reap(r, &len) >= 0);
	CHECK(!ring_called(r));
	world_free(&w);
}

/* The ring's cursors wrap at 65536, and the ring goes on where the used index says after it is made anew. */
static void test_wrap_and_restart(void)
{
	struct ring *r;
	uint32_t len;

	world_init(&w, 1, FEATURES, 8, 0);
	r = &w.guests[0].ring[1];
	for (uint32_t i = 0; i < 70000; i++) {
		w.guests[0].top = MEMORY / 2;
		make_frame(frame, 64, nobody, w.guests[0].mac, (uint8_t)i);
		driver_send(&w.guests[0], frame, 64);
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		CHECK_EQ(nic_send(&w.nic, got), 64);
		CHECK(!memcmp(got, frame, 64));
		CHECK(ring_reap(r, &len) >= 0);
		if (i % 10007 == 0) {
			struct xv_vring_conf conf = ring_conf(&w.guests[0], r);
			struct xv_vring *old = r->vr;

			CHECK_EQ(xv_vring_base(old), (uint16_t)(i + 1));
			conf.base = xv_vring_base(old);
			CHECK_EQ(xv_vring_new(w.guests[0].mem, &conf, &r->vr), 0);
			world_publish(&w);
			xv_vring_free(old);
		}
	}
	world_free(&w);
}

static void test_ring_checks(void)
{
	struct xv_vring_conf good, bad;
	struct xv_vring *vr;

	world_init(&w, 1, FEATURES, 8, 0);
	good = ring_conf(&w.guests[0], &w.guests[0].ring[0]);
#define REFUSED(field, value, error)                                                  \
	do {                                                                          \
		bad = good;                                                           \
		bad.field = (value);                                                  \
		CHECK_EQ(-xv_vring_new(w.guests[0].mem, &bad, &vr), error);           \
	} while (0)
	REFUSED(num, 0, 22);
	REFUSED(num, 3, 22);
	REFUSED(num, 65536, 22);
	REFUSED(num, 0x80000000u, 22);
	REFUSED(desc, good.desc + 8, 22);
	REFUSED(avail, good.avail + 1, 22);
	REFUSED(used, good.used + 2, 22);
	REFUSED(desc, USER - 16, 14);
	REFUSED(desc, USER + MEMORY - 8 * 16 + 16, 14);
	REFUSED(avail, USER + MEMORY - 20, 14);
	REFUSED(used, USER + MEMORY - 8 * 8, 14);
	REFUSED(desc, ~0xfull, 14);
	REFUSED(kick_fd, 9999, 9);
	bad = good;
	bad.desc = USER + MEMORY - 8 * 16;
	CHECK_EQ(xv_vring_new(w.guests[0].mem, &bad, &vr), 0); /* to the last byte */
	xv_vring_free(vr);
	world_free(&w);
}

static void test_memory_checks(void)
{
	struct xv_guest *guest;
	struct xv_mem *mem;
	struct xv_region r[2] = {{0, 4096, 0x10000, 0x10000}, {4096, 4096, 0x20000, 0x20000}};

	CHECK_EQ(xv_guest_new(1, &guest), 0);
	CHECK_EQ(xv_mem_new(r, 2, guest, &mem), 0);
	xv_mem_free(mem);
	r[1].gpa = 4095;
	CHECK_EQ(-xv_mem_new(r, 2, guest, &mem), 22);
	r[1].gpa = UINT64_MAX - 4095;
	CHECK_EQ(xv_mem_new(r, 2, guest, &mem), 0); /* ends exactly at the top */
	xv_mem_free(mem);
	r[1].gpa = UINT64_MAX - 4094;
	CHECK_EQ(-xv_mem_new(r, 2, guest, &mem), 22);
	r[1] = (struct xv_region){8192, 0, 0x20000, 0x20000};
	CHECK_EQ(-xv_mem_new(r, 2, guest, &mem), 22);
	CHECK_EQ(-xv_mem_new(r, XV_MAX_REGIONS + 1, guest, &mem), 22);
	xv_guest_free(guest);
}

int main(void)
{
	test_guest_to_guest();
	test_guest_to_nic_and_back();
	test_any_layout_sent();
	test_any_layout_received();
	test_merge_shortage_rolls_back();
	test_stalled_receiver_is_bounded();
	test_nic_frames_wait();
	test_flood();
	test_interleaved();
	test_vlan_lookup();
	test_drops_of_sent_frames();
	test_drops_of_received_frames();
	test_faults();
	test_receive_faults();
	test_event_idx();
	test_no_interrupt_flag();
	test_wrap_and_restart();
	test_ring_checks();
	test_memory_checks();
	puts("ok");
	return 0;
}
