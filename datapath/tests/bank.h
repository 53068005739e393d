/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many transmit rings, for the C tests: guests with 100 pairs each, a few descriptors a ring, each with a kick eventfd. Frames
 * are for nobody, and there is no uplink: a ring has been polled when its frame has been used.
 */
#ifndef XV_TEST_BANK_H
#define XV_TEST_BANK_H

#include <sys/resource.h>

#include "packed_driver.h"

#define BANK_PAIRS 100u
#define BANK_NUM 8u
#define BANK_FRAME 60u

struct slot { /* one ring */
	bool packed, event_idx;
	struct ring split;
	struct pring pring;
	int kick;
	uint64_t buffer; /* in the guest's memory */
};

struct bank {
	struct xv_dp *dp;
	struct driver *guests;
	struct slot *slots;
	uint32_t nr; /* slots, of nr / BANK_PAIRS guests */
};

static inline void slot_init(struct driver *d, struct slot *s)
{
	struct xv_vring_conf conf;

	s->packed = d->features >> VIRTIO_F_RING_PACKED & 1;
	s->event_idx = d->features >> VIRTIO_RING_F_EVENT_IDX & 1;
	s->kick = eventfd(0, EFD_NONBLOCK);
	CHECK(s->kick >= 0);
	if (s->packed) {
		pring_init(d, &s->pring, BANK_NUM);
		conf = pring_conf(d, &s->pring);
		xv_vring_free(s->pring.vr);
	} else {
		ring_init(d, &s->split, BANK_NUM);
		conf = ring_conf(d, &s->split);
		xv_vring_free(s->split.vr);
	}
	conf.kick_fd = s->kick;
	close(conf.call_fd);
	conf.call_fd = -1;
	CHECK_EQ(xv_vring_new(d->mem, &conf, s->packed ? &s->pring.vr : &s->split.vr), 0);
	s->buffer = driver_alloc(d, HEADER + BANK_FRAME, 16);
	memset(d->memory + s->buffer, 0, HEADER);
	make_frame(d->memory + s->buffer + HEADER, BANK_FRAME, (uint8_t[]){2, 0, 0, 0, 0, 9}, d->mac, 1);
}

static inline struct xv_vring *slot_vring(const struct slot *s)
{
	return s->packed ? s->pring.vr : s->split.vr;
}

static inline void bank_publish(struct bank *b, uint32_t base)
{
	const uint32_t nr_guests = b->nr / BANK_PAIRS;
	struct xv_nic_conf nic = {.queues = (uintptr_t)&nic, .mtu = 1500}; /* none of them */
	struct xv_guest_conf *guests = calloc(nr_guests, sizeof(guests[0]));
	struct xv_vring **rings = calloc(2 * (size_t)b->nr, sizeof(rings[0]));
	struct xv_snapshot_conf conf = {(uintptr_t)guests, (uintptr_t)&nic, 0, nr_guests, 1, 0, 0};

	for (uint32_t i = 0; i < b->nr; i++)
		rings[2 * i + 1] = slot_vring(&b->slots[i]);
	for (uint32_t g = 0; g < nr_guests; g++)
		guests[g] = (struct xv_guest_conf){
			.guest = (uintptr_t)b->guests[g].guest,
			.rings = (uintptr_t)(rings + 2 * (size_t)g * BANK_PAIRS),
			.nr_rings = 2 * BANK_PAIRS,
			.ctrl = XV_NO_RING,
			.max_pairs = BANK_PAIRS,
			.worker = base,
		};
	CHECK_EQ(xv_publish(b->dp, &conf), 0);
	free(rings);
	free(guests);
}

static inline void bank_init(struct bank *b, uint32_t nr, uint64_t features, uint32_t poll, uint32_t workers)
{
	const struct xv_dp_conf conf = {.workers = workers, .poll = poll, .spin_us = 50};
	struct rlimit files;

	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
	files.rlim_cur = files.rlim_max;
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &files), 0);
	memset(b, 0, sizeof(*b));
	b->nr = nr;
	b->guests = calloc(nr / BANK_PAIRS, sizeof(b->guests[0]));
	b->slots = calloc(nr, sizeof(b->slots[0]));
	CHECK_EQ(xv_dp_new(&conf, &b->dp), 0);
	for (uint32_t g = 0; g < nr / BANK_PAIRS; g++) {
		struct driver *d = &b->guests[g];
		struct xv_region region = {GPA, MEMORY, USER, 0};

		d->memory = aligned_alloc(4096, MEMORY);
		CHECK(d->memory);
		memset(d->memory, 0, MEMORY);
		region.host = (uint64_t)(uintptr_t)d->memory;
		d->features = features;
		memcpy(d->mac, (uint8_t[]){0x52, 0x54, 0, 0, 1, (uint8_t)g}, 6);
		CHECK_EQ(xv_guest_new(BANK_PAIRS, &d->guest), 0);
		CHECK_EQ(xv_mem_new(&region, 1, d->guest, &d->mem), 0);
		for (uint32_t i = 0; i < BANK_PAIRS; i++)
			slot_init(d, &b->slots[g * BANK_PAIRS + i]);
	}
	bank_publish(b, 0);
}

static inline void bank_free(struct bank *b)
{
	const struct xv_snapshot_conf nothing = {0};

	CHECK_EQ(xv_publish(b->dp, &nothing), 0);
	for (uint32_t i = 0; i < b->nr; i++) {
		xv_vring_free(slot_vring(&b->slots[i]));
		close(b->slots[i].kick);
	}
	for (uint32_t g = 0; g < b->nr / BANK_PAIRS; g++) {
		xv_mem_free(b->guests[g].mem);
		xv_guest_free(b->guests[g].guest);
		free(b->guests[g].memory);
	}
	xv_dp_free(b->dp);
	free(b->guests);
	free(b->slots);
}

static inline struct driver *bank_guest(const struct bank *b, uint32_t i)
{
	return &b->guests[i / BANK_PAIRS];
}

/* Make a frame available in ring i; whether the device asks to be kicked for it, as Linux' driver decides it. */
static inline bool bank_offer(struct bank *b, uint32_t i)
{
	struct slot *s = &b->slots[i];
	const uint64_t gpa = GPA + s->buffer;

	if (!s->packed) {
		struct ring *r = &s->split;
		const uint16_t old = r->avail->idx;

		ring_desc(r, (uint16_t)(r->next % r->num), gpa, HEADER + BANK_FRAME, 0, -1);
		ring_offer(r, (uint16_t)(r->next++ % r->num));
		full_barrier(); /* pairs with the one after vring_arm() */
		if (!s->event_idx)
			return !(load_once(&r->used->flags) & VRING_USED_F_NO_NOTIFY);
		return vring_need_event(load_once(avail_event_of(r->vr)), (uint16_t)(old + 1), old);
	} else {
		struct pring *r = &s->pring;
		const struct part part = {gpa, HEADER + BANK_FRAME, 0};
		const uint16_t old = (uint16_t)r->next;
		uint16_t flags, off_wrap, event;
		bool wrap;

		pring_add(r, &part, 1);
		full_barrier();
		wrap = r->wrap;
		flags = load_once(&r->device->flags) & 3u;
		off_wrap = load_once(&r->device->off_wrap);
		if (flags != VRING_PACKED_EVENT_FLAG_DESC)
			return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
		event = off_wrap & (PACKED_WRAP - 1);
		if (!!(off_wrap & PACKED_WRAP) != wrap)
			event = (uint16_t)(event - r->num);
		return vring_need_event(event, (uint16_t)r->next, (uint16_t)(r->next > old ? old : old - r->num));
	}
}

static inline void bank_kick(struct bank *b, uint32_t i)
{
	const uint64_t one = 1;

	CHECK_EQ(write(b->slots[i].kick, &one, sizeof(one)), sizeof(one));
}

/* Whether a frame of ring i has been used, and takes it. */
static inline bool bank_reap(struct bank *b, uint32_t i)
{
	struct slot *s = &b->slots[i];

	return (s->packed ? pring_reap(&s->pring, NULL) : ring_reap(&s->split, NULL)) >= 0;
}

/* Turn until no more than `hot` sources are. */
static inline void bank_cool(struct bank *b, uint32_t hot)
{
	const uint64_t deadline = cycles_now() + 10000000ull * b->dp->cycles_per_us;
	struct worker *w = &b->dp->workers[0];

	do {
		worker_turn(w, b->dp->snap, false);
		CHECK(cycles_now() < deadline);
	} while (w->hot.nr > hot);
}

#endif
