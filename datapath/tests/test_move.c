// SPDX-License-Identifier: Apache-2.0
/*
 * Sources that change their worker while frames flow. Two workers in threads of their own, guests and NIC in a third, and the
 * main thread publishes: every frame arrives, once, in its stream's order. `make tsan` looks for data races in it.
 */
#include <pthread.h>
#include <sched.h>

#include "bank.h"

#define MOVES 1000u
#define WINDOW 24u       /* frames of a stream on their way: never more of both than the receiver has buffers */
#define LOST_US 10000000ull
#define LENGTH 100u

static struct world w;
static struct bank b;
static int kicks[3], socket_fd; /* of the sender's transmit rings and the receiver's ring; in place of a socket */
static bool over;

static void *run(void *worker)
{
	struct worker *self = worker;

	CHECK_EQ(xv_worker_run(self->dp, self->index), 0);
	return NULL;
}

static void start_workers(struct xv_dp *dp, pthread_t *threads)
{
	for (uint32_t i = 0; i < 2; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, run, &dp->workers[i]), 0);
}

static void stop_workers(struct xv_dp *dp, pthread_t *threads)
{
	xv_dp_stop(dp);
	for (uint32_t i = 0; i < 2; i++)
		CHECK_EQ(pthread_join(threads[i], NULL), 0);
	/* both had the sources for a part of the time */
	CHECK(dp->workers[0].counters.packets && dp->workers[1].counters.packets);
}

/* ---- streams ---- */

/* Guest 0's two transmit rings and NIC queue 0 send to guest 1's ring 0. `base`: guest 0's worker, and that of guest 1 is the other. */
static void publish(uint32_t base)
{
	struct xv_vring *sender[] = {NULL, w.guests[0].ring[1].vr, NULL, w.guests[0].ring[3].vr};
	struct xv_vring *receiver[] = {w.guests[1].ring[0].vr};
	struct xv_nicq *queues[1] = {w.nic.nicq};
	struct xv_nic_conf nic = {.queues = (uintptr_t)queues, .nr_queues = 1, .mtu = 1500};
	struct xv_guest_conf guests[2] = {
		{.guest = (uintptr_t)w.guests[0].guest, .rings = (uintptr_t)sender, .nr_rings = 4, .ctrl = XV_NO_RING,
		 .worker = base, .max_pairs = 2},
		{.guest = (uintptr_t)w.guests[1].guest, .rings = (uintptr_t)receiver, .nr_rings = 1, .ctrl = XV_NO_RING,
		 .xsks = (uintptr_t)&w.nic.xsk, .nr_xsks = 1, .worker = 1 - base, .max_pairs = 1},
	};
	struct xv_mac_conf mac = {.guest = 1};
	const struct xv_snapshot_conf conf = {(uintptr_t)guests, (uintptr_t)&nic, (uintptr_t)&mac, 2, 1, 1, 0};

	memcpy(mac.mac, w.guests[1].mac, 6);
	CHECK_EQ(xv_publish(w.dp, &conf), 0);
}

static void replace_ring(struct driver *d, struct ring *r, int kick)
{
	struct xv_vring_conf conf = ring_conf(d, r);

	xv_vring_free(r->vr);
	conf.kick_fd = kick;
	close(r->call);
	conf.call_fd = r->call = -1;
	CHECK_EQ(xv_vring_new(d->mem, &conf, &r->vr), 0);
}

static void replace_socket(void)
{
	const struct xv_xsk_conf conf = {.rx = XV_RING_OF(&w.nic, rx), .fd = socket_fd};

	xv_xsk_free(w.nic.xsk);
	CHECK_EQ(xv_xsk_new(w.nic.nicq, &conf, &w.nic.xsk), 0);
}

static void notify(int fd)
{
	const uint64_t one = 1;

	CHECK_EQ(write(fd, &one, sizeof(one)), sizeof(one));
}

static void offer(struct ring *r, int kick, uint16_t head)
{
	ring_offer(r, head);
	full_barrier();
	if (!(load_once(&r->used->flags) & VRING_USED_F_NO_NOTIFY))
		notify(kick);
}

static struct stream { /* 0, 1: the sender's rings; 2: the NIC */
	uint32_t sent, got;
} streams[3];

static void fill(uint8_t *frame, uint32_t stream)
{
	make_frame(frame, LENGTH, w.guests[1].mac, w.guests[0].mac, 0);
	memcpy(frame + 20, &stream, sizeof(stream));
	memcpy(frame + 24, &streams[stream].sent, sizeof(uint32_t));
	streams[stream].sent++;
}

static void send_from_guest(uint32_t stream, uint64_t buffers)
{
	struct driver *d = &w.guests[0];
	struct ring *r = &d->ring[2 * stream + 1];
	const uint16_t slot = (uint16_t)(r->next++ % r->num);
	const uint64_t at = buffers + slot * 256u;

	memset(d->memory + at, 0, HEADER);
	fill(d->memory + at + HEADER, stream);
	ring_desc(r, slot, GPA + at, HEADER + LENGTH, 0, -1);
	offer(r, kicks[stream], slot);
}

static void send_from_nic(void)
{
	uint8_t frame[LENGTH];

	fill(frame, 2);
	CHECK(nic_receive(&w.nic, frame, LENGTH));
	notify(socket_fd);
}

static bool receive(uint64_t buffers)
{
	struct ring *r = &w.guests[1].ring[0];
	const int head = ring_reap(r, NULL);
	uint32_t stream, number;
	const uint8_t *frame;

	if (head < 0)
		return false;
	frame = w.guests[1].memory + buffers + (uint32_t)head * 256u + HEADER;
	memcpy(&stream, frame + 20, sizeof(stream));
	memcpy(&number, frame + 24, sizeof(number));
	CHECK(stream < 3);
	CHECK_EQ(number, streams[stream].got);
	streams[stream].got++;
	offer(r, kicks[2], (uint16_t)head);
	return true;
}

/* The guests and the NIC, until the main thread has moved them often enough. */
static void *traffic(void *unused)
{
	const uint64_t from[2] = {driver_alloc(&w.guests[0], 128 * 256, 64), driver_alloc(&w.guests[0], 128 * 256, 64)};
	const uint64_t to = driver_alloc(&w.guests[1], 128 * 256, 64);
	uint64_t deadline = 0;
	bool waits;

	for (uint16_t i = 0; i < 128; i++) {
		ring_desc(&w.guests[1].ring[0], i, GPA + to + i * 256u, 256, VRING_DESC_F_WRITE, -1);
		offer(&w.guests[1].ring[0], kicks[2], i);
	}
	do {
		waits = false;
		for (uint32_t s = 0; s < 3; s++) {
			if (!load_acquire(&over) && streams[s].sent - streams[s].got < WINDOW)
				s == 2 ? send_from_nic() : send_from_guest(s, from[s]);
			waits |= streams[s].sent != streams[s].got;
		}
		while (ring_reap(&w.guests[0].ring[1], NULL) >= 0 || ring_reap(&w.guests[0].ring[3], NULL) >= 0)
			;
		if (receive(to) || !deadline)
			deadline = cycles_now() + LOST_US * w.dp->cycles_per_us;
		else
			sched_yield();
		CHECK(cycles_now() < deadline);
	} while (waits || !load_acquire(&over));
	return unused;
}

static void test_streams(void)
{
	const struct xv_dp_conf conf = {.workers = 2, .poll = XV_POLL_ADAPTIVE, .spin_us = 50};
	const uint64_t features[] = {FEATURES, FEATURES};
	struct guest_queue *queue;
	pthread_t threads[2], guests;
	uint64_t total = 0;

	memset(streams, 0, sizeof(streams));
	store_release(&over, false);
	world_init_mixed(&w, 2, features, 128, 0, 1);
	CHECK_EQ(xv_publish(w.dp, &(struct xv_snapshot_conf){0}), 0);
	xv_dp_free(w.dp);
	CHECK_EQ(xv_dp_new(&conf, &w.dp), 0);
	for (int i = 0; i < 3; i++)
		kicks[i] = eventfd(0, EFD_NONBLOCK);
	socket_fd = eventfd(0, EFD_NONBLOCK);
	replace_ring(&w.guests[0], &w.guests[0].ring[1], kicks[0]);
	replace_ring(&w.guests[0], &w.guests[0].ring[3], kicks[1]);
	replace_ring(&w.guests[1], &w.guests[1].ring[0], kicks[2]);
	replace_socket();
	publish(0);
	start_workers(w.dp, threads);
	CHECK_EQ(pthread_create(&guests, NULL, traffic, NULL), 0);
	for (uint32_t move = 1; move <= MOVES; move++) {
		publish(move & 1);
		sched_yield();
	}
	store_release(&over, true);
	CHECK_EQ(pthread_join(guests, NULL), 0);
	stop_workers(w.dp, threads);
	queue = &w.guests[1].guest->queues[0];
	for (int s = 0; s < 3; s++)
		total += streams[s].sent;
	CHECK(streams[0].got > MOVES / 10 && streams[1].got > MOVES / 10 && streams[2].got > MOVES / 10);
	CHECK_EQ(queue->rx.packets, total);
	for (uint32_t why = 0; why < XV_DROP_MAX; why++)
		CHECK_EQ(queue->rx.drops[why], 0);
	world_free(&w);
	for (int i = 0; i < 3; i++)
		close(kicks[i]);
	close(socket_fd);
}

/* ---- cold rings ---- */

/* Frames in any of many rings, which go cold with one worker and have their kick with the other. */
static void *cold_traffic(void *unused)
{
	for (uint32_t round = 0; !load_acquire(&over); round++) {
		const uint32_t i = round * 7 % b.nr;
		const uint64_t deadline = cycles_now() + LOST_US * b.dp->cycles_per_us;

		if (bank_offer(&b, i))
			bank_kick(&b, i);
		while (!bank_reap(&b, i)) {
			sched_yield();
			CHECK(cycles_now() < deadline);
		}
	}
	return unused;
}

static void test_cold_rings(void)
{
	pthread_t threads[2], guests;

	store_release(&over, false);
	bank_init(&b, 200, PACKED | 1ull << VIRTIO_RING_F_EVENT_IDX, XV_POLL_ADAPTIVE, 2);
	start_workers(b.dp, threads);
	CHECK_EQ(pthread_create(&guests, NULL, cold_traffic, NULL), 0);
	for (uint32_t move = 1; move <= MOVES; move++) {
		const uint64_t until = cycles_now() + move % 400 * b.dp->cycles_per_us;

		bank_publish(&b, move & 1);
		while (cycles_now() < until)
			sched_yield();
	}
	store_release(&over, true);
	CHECK_EQ(pthread_join(guests, NULL), 0);
	stop_workers(b.dp, threads);
	bank_free(&b);
}

int main(void)
{
	test_streams();
	test_cold_rings();
	puts("ok");
	return 0;
}
