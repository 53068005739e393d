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

/* With VIRTIO_F_IN_ORDER one entry of the used ring stands for all buffers of a turn. */
static void test_batches_in_order(void)
{
	struct vring_used *used;

	world_init(&w, 2, FEATURES | 1ull << VIRTIO_F_IN_ORDER, 16, 0);
	used = w.guests[0].ring[1].used;
	make_frame(frame, 100, w.guests[1].mac, w.guests[0].mac, 1);
	for (uint16_t i = 0; i < 5; i++) {
		driver_send(&w.guests[0], frame, 100);
		ring_buffer(&w.guests[1], &w.guests[1].ring[0], 2048, VRING_DESC_F_WRITE);
		used->ring[i] = (struct vring_used_elem){0xdead, 0xdead};
	}
	world_run(&w);
	CHECK_EQ(used->idx, 5);
	CHECK_EQ(used->ring[0].id, 4);
	CHECK_EQ(used->ring[0].len, 0);
	for (uint32_t i = 1; i < 5; i++)
		CHECK_EQ(used->ring[i].id, 0xdead);
	for (uint32_t i = 0; i < 5; i++) /* the receiver is told of each, for each has a length */
		CHECK_EQ(w.guests[1].ring[0].used->ring[i].len, HEADER + 100);
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

static uint32_t frames_held(void)
{
	return FRAMES - (w.nic.fill_p - w.nic.fill_c);
}

/* Some buffers, but never enough for a frame: `keep` holds all the same. */
static void test_nic_frames_wait_for_too_few_buffers(void)
{
	world_init(&w, 1, FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF, 64, 0);
	ring_buffer(&w.guests[0], &w.guests[0].ring[0], 64, VRING_DESC_F_WRITE);
	make_frame(frame, 1500, w.guests[0].mac, nobody, 1);
	for (uint32_t i = 0; i < FRAMES; i++)
		CHECK(nic_receive(&w.nic, frame, 1500));
	for (int i = 0; i < 10; i++)
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
	CHECK_EQ(frames_held(), w.nic.xsk->keep);
	CHECK_EQ(RX(0).drops[XV_DROP_NO_BUFFERS], FRAMES - w.nic.xsk->keep);
	world_free(&w);
}

/* All that the ring can hold is not enough: the frame never fits, and does not block those behind it. */
static void test_jumbo_for_a_small_ring(void)
{
	uint32_t len;

	world_init(&w, 1, FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF, 8, 0);
	for (int i = 0; i < 8; i++)
		ring_buffer(&w.guests[0], &w.guests[0].ring[0], 64, VRING_DESC_F_WRITE);
	make_frame(frame, 1500, w.guests[0].mac, nobody, 1);
	CHECK(nic_receive(&w.nic, frame, 1500));
	CHECK(nic_receive(&w.nic, frame, 50));
	world_run(&w);
	CHECK_EQ(RX(0).drops[XV_DROP_TOO_BIG], 1);
	CHECK_EQ(ring_reap(&w.guests[0].ring[0], &len), 0);
	CHECK_EQ(len, HEADER + 50);
	CHECK_EQ(frames_held(), 0);
	world_free(&w);
}

/* A guest that is removed gives the frames in its socket back. */
static void test_removed_guest_leaks_no_frames(void)
{
	const struct xv_snapshot_conf nothing = {0};

	world_init(&w, 1, FEATURES, 8, 0);
	make_frame(frame, 64, w.guests[0].mac, nobody, 1);
	for (int i = 0; i < 20; i++)
		CHECK(nic_receive(&w.nic, frame, 64));
	worker_turn(&w.dp->workers[0], w.dp->snap, false);
	CHECK_EQ(frames_held(), 20);
	CHECK_EQ(xv_publish(w.dp, &nothing), 0);
	xv_xsk_free(w.nic.xsk);
	w.nic.xsk = NULL;
	CHECK_EQ(frames_held(), 0);
	world_free(&w);
}

/* Two guests flood a NIC that is slower than either: both get through. */
static void test_senders_take_turns(void)
{
	uint64_t sent[2] = {0, 0};

	world_init(&w, 2, FEATURES, 64, 0);
	for (int turn = 0; turn < 400; turn++) {
		for (int g = 0; g < 2; g++) {
			struct ring *r = &w.guests[g].ring[1];

			while (ring_reap(r, NULL) >= 0)
				;
			while ((uint16_t)(r->avail->idx - r->used->idx) < 32) {
				w.guests[g].top = MEMORY / 2;
				make_frame(frame, 64, nobody, w.guests[g].mac, (uint8_t)turn);
				driver_send(&w.guests[g], frame, 64);
			}
		}
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		for (int i = 0; i < 16; i++)
			if (nic_send(&w.nic, got))
				sent[got[11] - 1]++;
	}
	CHECK(sent[0] > 4 * (sent[0] + sent[1]) / 10 && sent[1] > 4 * (sent[0] + sent[1]) / 10);
	world_free(&w);
}

/* Tables of thousands of empty descriptors: what a burst may cost is bounded, and the guest is told. */
static void test_walks_are_bounded(void)
{
	const uint32_t num = 4096;
	struct vring_desc *table;
	struct ring *r;
	uint64_t at, started;

	world_init(&w, 2, FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF, num, 0);
	r = &w.guests[0].ring[0];
	at = driver_alloc(&w.guests[0], 16ull * num, 16);
	table = (void *)(w.guests[0].memory + at);
	for (uint32_t i = 0; i < num; i++)
		table[i] = (struct vring_desc){GPA, 0, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, (uint16_t)(i + 1)};
	table[num - 1] = (struct vring_desc){GPA, 1, VRING_DESC_F_WRITE, 0};
	for (uint16_t i = 0; i < num; i++) {
		ring_desc(r, i, GPA + at, 16 * num, VRING_DESC_F_INDIRECT, -1);
		ring_offer(r, i);
	}
	make_frame(frame, 1000, w.guests[0].mac, w.guests[1].mac, 1);
	for (int i = 0; i < 32; i++)
		driver_send(&w.guests[1], frame, 1000);
	started = cycles_now();
	world_run(&w);
	CHECK((cycles_now() - started) / w.dp->cycles_per_us < 20000); /* 425 ms before there was a budget */
	CHECK_EQ(xv_guest_fault(w.guests[0].guest)->code, XV_FAULT_CHAIN);
	world_free(&w);

	/* sent: one such chain is one drop, and the next frame goes */
	world_init(&w, 2, FEATURES, num, 0);
	r = &w.guests[0].ring[1];
	at = driver_alloc(&w.guests[0], 16ull * num, 16);
	table = (void *)(w.guests[0].memory + at);
	for (uint32_t i = 0; i < num; i++)
		table[i] = (struct vring_desc){GPA, 0, i + 1 < num ? VRING_DESC_F_NEXT : 0, (uint16_t)(i + 1)};
	ring_desc(r, r->next++, GPA + at, 16 * num, VRING_DESC_F_INDIRECT, -1);
	ring_offer(r, 0);
	make_frame(frame, 64, nobody, w.guests[0].mac, 1);
	driver_send(&w.guests[0], frame, 64);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_CHAIN], 1);
	CHECK_EQ(nic_send(&w.nic, got), 64);
	world_free(&w);
}

/* An indirect table at an odd address, and one that lies in two regions. */
static void test_odd_tables(void)
{
	struct xv_region halves[2] = {{GPA, MEMORY / 2, USER, 0}, {GPA + MEMORY / 2, MEMORY / 2, USER + MEMORY / 2, 0}};
	uint64_t places[2];

	world_init(&w, 2, FEATURES, 8, 0);
	places[0] = driver_alloc(&w.guests[0], 64, 16) + 3;
	places[1] = MEMORY / 2 - 24; /* the second descriptor is cut in two */
	for (int split = 0; split < 2; split++) {
		for (int p = 0; p < 2; p++) {
			struct driver *d = &w.guests[0];
			struct ring *r = &d->ring[1];
			uint64_t data = driver_alloc(d, 200, 16);
			struct vring_desc table[2] = {{GPA + data, HEADER + 30, VRING_DESC_F_NEXT, 1},
						      {GPA + data + HEADER + 30, 70, 0, 0}};
			uint16_t i = r->next++ % r->num;

			make_frame(frame, 100, nobody, d->mac, (uint8_t)(2 * split + p));
			memcpy(d->memory + data + HEADER, frame, 100);
			memcpy(d->memory + places[p], table, sizeof(table));
			ring_desc(r, i, GPA + places[p], sizeof(table),
				  VRING_DESC_F_INDIRECT | (p ? VRING_DESC_F_WRITE : 0), -1); /* WRITE is to be ignored */
			ring_offer(r, i);
			world_run(&w);
			CHECK_EQ(nic_send(&w.nic, got), 100);
			CHECK(!memcmp(got, frame, 100));
		}
		if (!split) { /* the same memory as two regions: everything again */
			struct driver *d = &w.guests[0];
			struct xv_mem *old = d->mem;

			halves[0].host = (uintptr_t)d->memory;
			halves[1].host = (uintptr_t)d->memory + MEMORY / 2;
			CHECK_EQ(xv_mem_new(halves, 2, d->guest, &d->mem), 0);
			for (int i = 0; i < 4; i++) {
				struct xv_vring_conf conf = ring_conf(d, &d->ring[i]);
				struct xv_vring *vr = d->ring[i].vr;

				CHECK_EQ(xv_vring_new(d->mem, &conf, &d->ring[i].vr), 0);
				world_publish(&w);
				xv_vring_free(vr);
			}
			xv_mem_free(old);
		}
	}
	world_free(&w);
}

/* The longest frames of each kind that fit an MTU of 1500, and one byte more. */
static void test_mtu_with_tags(void)
{
	static const struct {
		uint32_t tags, len;
	} fits[] = {{0, 1514}, {1, 1518}, {2, 1522}};

	world_init(&w, 1, FEATURES, 8, 0);
	for (size_t i = 0; i < ARRAY_SIZE(fits); i++) {
		for (uint32_t over = 0; over < 2; over++) {
			make_frame(frame, fits[i].len + over, nobody, w.guests[0].mac, 1);
			for (uint32_t t = 0; t < fits[i].tags; t++)
				memcpy(frame + 12 + 4 * t, (uint8_t[]){t ? 0x81 : 0x88, t ? 0x00 : 0xa8, 0, 5}, 4);
			driver_send(&w.guests[0], frame, fits[i].len + over);
			world_run(&w);
			CHECK_EQ(nic_send(&w.nic, got), over ? 0 : fits[i].len);
		}
		CHECK_EQ(TX(0).drops[XV_DROP_TOO_BIG], i + 1);
	}
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

/* A frame that waits for more buffers than there are: the guest is asked for a kick behind those. */
static void test_armed_behind(void)
{
	struct ring *r;

	world_init(&w, 2, FEATURES | 1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_NET_F_MRG_RXBUF, 8, 0);
	w.dp->cycles_per_us = 1ull << 40; /* the sender waits */
	r = &w.guests[1].ring[0];
	make_frame(frame, 500, w.guests[1].mac, w.guests[0].mac, 1);
	ring_buffer(&w.guests[1], r, 300, VRING_DESC_F_WRITE);
	driver_send(&w.guests[0], frame, 500);
	world_run(&w);
	CHECK(w.guests[0].ring[1].vr->stalled_on == r->vr);
	vring_arm_behind(r->vr);
	CHECK_EQ(*avail_event_of(r->vr), 1);
	ring_buffer(&w.guests[1], r, 300, VRING_DESC_F_WRITE);
	world_run(&w);
	CHECK(ring_reap(r, NULL) >= 0);
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
	test_batches_in_order();
	test_guest_to_nic_and_back();
	test_any_layout_sent();
	test_any_layout_received();
	test_merge_shortage_rolls_back();
	test_stalled_receiver_is_bounded();
	test_nic_frames_wait();
	test_nic_frames_wait_for_too_few_buffers();
	test_jumbo_for_a_small_ring();
	test_removed_guest_leaks_no_frames();
	test_senders_take_turns();
	test_walks_are_bounded();
	test_odd_tables();
	test_mtu_with_tags();
	test_flood();
	test_interleaved();
	test_vlan_lookup();
	test_drops_of_sent_frames();
	test_drops_of_received_frames();
	test_faults();
	test_receive_faults();
	test_event_idx();
	test_armed_behind();
	test_no_interrupt_flag();
	test_wrap_and_restart();
	test_ring_checks();
	test_memory_checks();
	puts("ok");
	return 0;
}
