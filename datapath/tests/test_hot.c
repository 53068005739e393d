// SPDX-License-Identifier: Apache-2.0
/* Hot and cold sources (hot.h): what has nothing is not looked at, and whatever comes is seen. */
#include <pthread.h>
#include <sched.h>

#include "bank.h"

#define LOST_US 5000000ull /* a frame that is not taken for so long is never taken */

static const uint64_t kinds[] = {
	FEATURES,
	FEATURES | 1ull << VIRTIO_RING_F_EVENT_IDX,
	PACKED,
	PACKED | 1ull << VIRTIO_RING_F_EVENT_IDX,
};

static struct bank b;

static bool is_hot(uint32_t i)
{
	return slot_vring(&b.slots[i])->kick.state == SOURCE_HOT;
}

static uint64_t kicks_seen(uint32_t i)
{
	return bank_guest(&b, i)->guest->queues[i % BANK_PAIRS].tx.kicks;
}

/* Of a thousand rings those that are used are looked at, and a cold one's first frame is found by its kick. */
static void test_first_frame(void)
{
	for (uint32_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		struct worker *w;

		bank_init(&b, 1000, kinds[k], XV_POLL_ADAPTIVE, 1);
		w = &b.dp->workers[0];
		for (uint32_t round = 0; round < 3; round++) {
			const uint32_t i = 777 - round;

			bank_cool(&b, 16);
			CHECK(!is_hot(i));
			CHECK(bank_offer(&b, i)); /* the guest is asked for a kick */
			for (int turn = 0; turn < 100; turn++)
				worker_turn(w, b.dp->snap, false);
			CHECK(!bank_reap(&b, i)); /* it is not looked at before */
			bank_kick(&b, i);
			while (!bank_reap(&b, i))
				worker_turn(w, b.dp->snap, false);
			CHECK(is_hot(i));
			CHECK_EQ(kicks_seen(i), 1);
			CHECK(!bank_offer(&b, i)); /* now it is not */
			while (!bank_reap(&b, i))
				worker_turn(w, b.dp->snap, false);
		}
		bank_free(&b);
	}
}

/* As long as they are few, no guest is asked for kicks. */
static void test_few_stay_hot(void)
{
	uint64_t until;

	bank_init(&b, 100, FEATURES, XV_POLL_ADAPTIVE, 1);
	bank_cool(&b, 16);
	until = cycles_now() + 1000 * b.dp->cycles_per_us;
	for (uint32_t i = 0; i < 8; i++) {
		bank_offer(&b, i);
		bank_kick(&b, i);
		while (!bank_reap(&b, i))
			worker_turn(&b.dp->workers[0], b.dp->snap, false);
	}
	while (cycles_now() < until)
		worker_turn(&b.dp->workers[0], b.dp->snap, false);
	for (uint32_t i = 0; i < 8; i++)
		CHECK(is_hot(i));
	bank_free(&b);
}

/* After a publication every ring is looked at: its kick may have come before. */
static void test_published_again(void)
{
	bank_init(&b, 1000, FEATURES, XV_POLL_ADAPTIVE, 1);
	bank_cool(&b, 16);
	CHECK(!is_hot(500));
	bank_offer(&b, 500);
	bank_publish(&b, 0);
	worker_turn(&b.dp->workers[0], b.dp->snap, false);
	CHECK(bank_reap(&b, 500));
	bank_free(&b);
}

/* A ring without a kick descriptor can't tell of its frames. It stays hot. */
static void test_blind(void)
{
	struct xv_vring_conf conf;
	struct xv_vring *old;

	bank_init(&b, 1000, FEATURES, XV_POLL_ADAPTIVE, 1);
	old = b.slots[999].split.vr;
	conf = ring_conf(bank_guest(&b, 999), &b.slots[999].split);
	conf.call_fd = -1;
	CHECK_EQ(xv_vring_new(bank_guest(&b, 999)->mem, &conf, &b.slots[999].split.vr), 0);
	bank_publish(&b, 0);
	xv_vring_free(old);
	bank_cool(&b, 16);
	for (int turn = 0; turn < 1000; turn++) {
		bank_offer(&b, 999);
		worker_turn(&b.dp->workers[0], b.dp->snap, false);
		CHECK(bank_reap(&b, 999));
	}
	bank_free(&b);
}

/* A guest that faulted has nothing to be looked at, whatever is in its rings. */
static void test_faulted(void)
{
	bank_init(&b, 1000, FEATURES, XV_POLL_ADAPTIVE, 1);
	b.slots[300].split.avail->idx = 999;
	bank_offer(&b, 301);
	bank_cool(&b, 16);
	CHECK_EQ(bank_guest(&b, 300)->guest->fault.code, XV_FAULT_AVAIL_INDEX);
	CHECK(!is_hot(300) && !is_hot(301));
	bank_free(&b);
}

/* A guest that kicks without sending keeps its rings hot, and costs the others no turn. */
static void test_kicks_for_nothing(void)
{
	struct worker *w;

	bank_init(&b, 1000, FEATURES, XV_POLL_ADAPTIVE, 1);
	w = &b.dp->workers[0];
	bank_cool(&b, 16);
	for (int turn = 0; turn < 2000; turn++) {
		for (uint32_t i = 0; i < BANK_PAIRS; i++)
			bank_kick(&b, i);
		bank_offer(&b, 500);
		bank_kick(&b, 500);
		worker_turn(w, b.dp->snap, false);
		if (turn % 20 == 19) {
			uint32_t sent = 20, most = 10000;

			for (; sent; sent -= bank_reap(&b, 500)) {
				CHECK(most--);
				worker_turn(w, b.dp->snap, false);
			}
		} else if (turn % 20 >= 6) { /* a ring of eight */
			while (!bank_reap(&b, 500))
				worker_turn(w, b.dp->snap, false);
			bank_offer(&b, 500);
		}
		CHECK(w->hot.nr <= BANK_PAIRS + 17);
	}
	bank_free(&b);
}

/* ---- sockets whose guests have no buffers ---- */

#define READERS 20u

static struct reader { /* a guest with a receive ring, and its socket */
	struct driver d;
	int kick, socket; /* socket: an eventfd in its place */
	uint32_t rx_p, rx_c, flags;
	struct xdp_desc rx[8];
	struct xv_xsk *xsk;
} readers[READERS];

static struct nic_side nic;
static struct xv_dp *dp;

static void readers_publish(void)
{
	struct xv_guest_conf guests[READERS];
	struct xv_nicq *queues[1] = {nic.nicq};
	struct xv_nic_conf conf = {.queues = (uintptr_t)queues, .nr_queues = 1, .mtu = 1500};
	const struct xv_snapshot_conf snapshot = {(uintptr_t)guests, (uintptr_t)&conf, 0, READERS, 1, 0, 0};

	for (uint32_t i = 0; i < READERS; i++)
		guests[i] = (struct xv_guest_conf){
			.guest = (uintptr_t)readers[i].d.guest,
			.rings = (uintptr_t)&readers[i].d.ring[0].vr,
			.nr_rings = 1,
			.xsks = (uintptr_t)&readers[i].xsk,
			.nr_xsks = 1,
			.ctrl = XV_NO_RING,
			.max_pairs = 1,
		};
	CHECK_EQ(xv_publish(dp, &snapshot), 0);
}

static void readers_init(void)
{
	const struct xv_dp_conf conf = {.workers = 1, .poll = XV_POLL_ADAPTIVE};

	memset(readers, 0, sizeof(readers));
	CHECK_EQ(xv_dp_new(&conf, &dp), 0);
	nic_init(&nic, 0);
	for (uint32_t i = 0; i < READERS; i++) {
		struct reader *r = &readers[i];
		struct xv_vring_conf ring;
		struct xv_xsk_conf xsk;

		driver_init(&r->d, (uint8_t)(i + 1), FEATURES | 1ull << VIRTIO_RING_F_EVENT_IDX, 8);
		r->kick = eventfd(0, EFD_NONBLOCK);
		r->socket = eventfd(0, EFD_NONBLOCK);
		ring = ring_conf(&r->d, &r->d.ring[0]);
		ring.kick_fd = r->kick;
		xv_vring_free(r->d.ring[0].vr);
		CHECK_EQ(xv_vring_new(r->d.mem, &ring, &r->d.ring[0].vr), 0);
		xsk = (struct xv_xsk_conf){.rx = {(uintptr_t)&r->rx_p, (uintptr_t)&r->rx_c, (uintptr_t)&r->flags, (uintptr_t)r->rx,
						  7, 8},
					   .fd = r->socket};
		CHECK_EQ(xv_xsk_new(nic.nicq, &xsk, &r->xsk), 0);
	}
	readers_publish();
}

static void readers_free(void)
{
	const struct xv_snapshot_conf nothing = {0};

	CHECK_EQ(xv_publish(dp, &nothing), 0);
	for (uint32_t i = 0; i < READERS; i++) {
		xv_xsk_free(readers[i].xsk);
		driver_free(&readers[i].d);
		close(readers[i].kick);
		close(readers[i].socket);
	}
	nic_free(&nic);
	xv_dp_free(dp);
}

static void arrives(struct reader *r)
{
	const uint64_t addr = nic.fill[nic.fill_c++ % FRAMES] + 256, one = 1;
	static const uint8_t nobody[6] = {2, 0, 0, 0, 0, 9};

	CHECK(nic.fill_c <= nic.fill_p);
	make_frame(nic.umem + addr, 60, r->d.mac, nobody, 1);
	r->rx[r->rx_p % 8] = (struct xdp_desc){addr, 60, 0};
	store_release(&r->rx_p, r->rx_p + 1);
	CHECK_EQ(write(r->socket, &one, sizeof(one)), sizeof(one));
}

/* Turns for `us` microseconds, or until the guest has a frame. */
static bool gets(struct reader *r, uint64_t us)
{
	const uint64_t deadline = cycles_now() + us * dp->cycles_per_us;

	do
		worker_turn(&dp->workers[0], dp->snap, false);
	while (ring_reap(&r->d.ring[0], NULL) < 0 && cycles_now() < deadline);
	return r->d.ring[0].seen;
}

/* Guests that read nothing cost no look a turn, and get their frames when they have buffers again. */
static void test_stalled_sockets_wait(void)
{
	const uint64_t one = 1;
	struct worker *w;

	readers_init();
	w = &dp->workers[0];
	for (uint32_t i = 0; i < READERS; i++)
		arrives(&readers[i]);
	gets(&readers[0], 2000);
	while (w->hot.nr > 16)
		gets(&readers[0], 100);
	CHECK(w->waiting.nr >= READERS - 16);
	for (uint32_t i = 0; i < READERS; i++) {
		struct reader *r = &readers[i];
		const bool waits = r->xsk->rx.state == SOURCE_WAITING, kicks = i & 1;

		w->waiting_due = kicks ? UINT64_MAX : 0; /* one is told by the guest, the next one looks by itself */
		ring_buffer(&r->d, &r->d.ring[0], 1536, VRING_DESC_F_WRITE);
		if (waits)
			CHECK_EQ(*avail_event_of(r->d.ring[0].vr), 0);
		if (kicks)
			CHECK_EQ(write(r->kick, &one, sizeof(one)), sizeof(one));
		CHECK(gets(r, 1000000));
		CHECK(r->xsk->rx.state == SOURCE_HOT);
	}
	CHECK_EQ(w->waiting.nr, 0);
	/* and more frames for one that waits are its event, too: the oldest make room */
	w->waiting_due = UINT64_MAX;
	for (uint32_t i = 0; i < READERS; i++)
		arrives(&readers[i]);
	while (!w->waiting.nr)
		gets(&readers[0], 100);
	for (uint32_t i = 0; i < READERS; i++) {
		struct guest_queue *queue = &readers[i].d.guest->queues[0];

		CHECK_EQ(queue->rx.drops[XV_DROP_NO_BUFFERS], 0);
		arrives(&readers[i]);
		while (!queue->rx.drops[XV_DROP_NO_BUFFERS])
			gets(&readers[0], 10);
	}
	readers_free();
}

/* ---- no wake-up is lost ---- */

static void *run(void *plane)
{
	CHECK_EQ(xv_worker_run(plane, 0), 0);
	return NULL;
}

static uint32_t random_of(uint32_t n)
{
	static uint64_t state = 88172645463325252ull;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 20) % n;
}

static void pause_us(uint32_t us)
{
	const uint64_t until = cycles_now() + us * b.dp->cycles_per_us;

	while (cycles_now() < until)
		if (us > 20)
			sched_yield();
}

/* Take the frames of rings [first, first + n): `owed[i]` each. */
static void collect(uint32_t first, uint32_t n, uint32_t *owed)
{
	const uint64_t deadline = cycles_now() + LOST_US * b.dp->cycles_per_us;

	for (uint32_t i = 0; i < n; i++)
		while (owed[i]) {
			if (bank_reap(&b, (first + i) % b.nr))
				owed[i]--;
			else
				sched_yield();
			CHECK(cycles_now() < deadline);
		}
}

/* A driver that kicks only when it is asked to, at the times at which its rings go cold, and the worker to sleep. */
static void race(uint64_t features, uint32_t poll, uint32_t nr, uint32_t rounds)
{
	pthread_t worker;
	uint64_t kicked = 0;

	bank_init(&b, nr, features, poll, 1);
	CHECK_EQ(pthread_create(&worker, NULL, run, b.dp), 0);
	for (uint32_t round = 0; round < rounds; round++) {
		const uint32_t first = random_of(nr), n = 1 + random_of(80);
		uint32_t owed[80] = {0};

		for (uint32_t f = 0; f < 2 * n; f++) {
			const uint32_t i = random_of(n);

			if (owed[i] == BANK_NUM)
				continue;
			owed[i]++;
			if (bank_offer(&b, (first + i) % nr)) {
				kicked++;
				bank_kick(&b, (first + i) % nr);
			}
			if (!random_of(16))
				pause_us(random_of(12));
		}
		collect(first, n, owed);
		pause_us(random_of(4) ? random_of(20) : random_of(250));
	}
	CHECK(kicked); /* some of them were cold */
	xv_dp_stop(b.dp);
	CHECK_EQ(pthread_join(worker, NULL), 0);
	bank_free(&b);
}

static void test_race(void)
{
	for (uint32_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		race(kinds[k], XV_POLL_ADAPTIVE, 100, 500);
		race(kinds[k], XV_POLL_INTERRUPT, 100, 500);
		race(kinds[k], XV_POLL_BUSY, 200, 500);
	}
}

int main(void)
{
	test_first_frame();
	test_few_stay_hot();
	test_published_again();
	test_blind();
	test_faulted();
	test_kicks_for_nothing();
	test_stalled_sockets_wait();
	test_race();
	puts("ok");
	return 0;
}
