/* SPDX-License-Identifier: Apache-2.0 */
/* The driver's side of a packed virtqueue (virtio 1.2, 2.8), for the C unit tests. */
#ifndef XV_TEST_PACKED_H
#define XV_TEST_PACKED_H

#include "harness.h"

#define PACKED (FEATURES | 1ull << VIRTIO_F_RING_PACKED)

struct pring {
	uint32_t num;
	struct vring_packed_desc *desc;
	struct vring_packed_desc_event *driver, *device;
	uint32_t next, seen; /* slots: of the next available descriptor, and of the next used one */
	bool wrap, seen_wrap;
	uint16_t slots[64];  /* by buffer id: how many descriptors it has */
	uint16_t id;
	int call;
	struct xv_vring *vr;
};

struct part { /* of a buffer */
	uint64_t gpa;
	uint32_t len;
	uint16_t flags;
};

static inline struct xv_vring_conf pring_conf(struct driver *d, struct pring *r)
{
	return (struct xv_vring_conf){
		.desc = USER + (uint64_t)((uint8_t *)r->desc - d->memory),
		.avail = USER + (uint64_t)((uint8_t *)r->driver - d->memory),
		.used = USER + (uint64_t)((uint8_t *)r->device - d->memory),
		.features = d->features,
		.num = r->num,
		.base = 0x80008000u,
		.kick_fd = -1,
		.call_fd = r->call,
		.enabled = 1,
	};
}

static inline void pring_init(struct driver *d, struct pring *r, uint32_t num)
{
	struct xv_vring_conf conf;

	memset(r, 0, sizeof(*r));
	r->num = num;
	r->wrap = r->seen_wrap = true;
	r->desc = (void *)(d->memory + driver_alloc(d, 16ull * num, 16));
	r->driver = (void *)(d->memory + driver_alloc(d, 4, 4));
	r->device = (void *)(d->memory + driver_alloc(d, 4, 4));
	r->call = eventfd(0, EFD_NONBLOCK);
	conf = pring_conf(d, r);
	CHECK_EQ(xv_vring_new(d->mem, &conf, &r->vr), 0);
}

static inline uint16_t pring_flags(bool wrap)
{
	return (uint16_t)(wrap ? 1u << VRING_PACKED_DESC_F_AVAIL : 1u << VRING_PACKED_DESC_F_USED);
}

/* Make a buffer of n parts available; the first descriptor's flags come last. Its id. */
static inline uint16_t pring_add(struct pring *r, const struct part *parts, uint32_t n)
{
	const uint32_t head = r->next;
	const uint16_t id = r->id++ % 64;
	uint16_t head_flags = 0;

	for (uint32_t i = 0; i < n; i++) {
		struct vring_packed_desc *desc = &r->desc[r->next];
		const uint16_t flags =
			(uint16_t)(parts[i].flags | pring_flags(r->wrap) | (i + 1 < n ? VRING_DESC_F_NEXT : 0));

		desc->addr = parts[i].gpa;
		desc->len = parts[i].len;
		desc->id = i + 1 == n ? id : (uint16_t)(0xdea0 + i); /* only the last one's counts */
		if (i)
			desc->flags = flags;
		else
			head_flags = flags;
		if (++r->next == r->num) {
			r->next = 0;
			r->wrap = !r->wrap;
		}
	}
	r->slots[id] = (uint16_t)n;
	store_release(&r->desc[head].flags, head_flags);
	return id;
}

/* The next used buffer's id, or -1. */
static inline int pring_reap(struct pring *r, uint32_t *len)
{
	const struct vring_packed_desc *desc = &r->desc[r->seen];
	const uint16_t flags = load_acquire(&desc->flags);
	const bool avail = flags & 1u << VRING_PACKED_DESC_F_AVAIL, used = flags & 1u << VRING_PACKED_DESC_F_USED;
	int id;

	if (avail != used || used != r->seen_wrap)
		return -1;
	id = desc->id;
	if (len)
		*len = flags & VRING_DESC_F_WRITE ? desc->len : 0;
	r->seen += r->slots[id % 64];
	if (r->seen >= r->num) {
		r->seen -= r->num;
		r->seen_wrap = !r->seen_wrap;
	}
	return id;
}

static inline bool pring_called(struct pring *r)
{
	uint64_t value;

	return read(r->call, &value, sizeof(value)) == sizeof(value);
}

static inline void pring_free(struct pring *r)
{
	xv_vring_free(r->vr);
	close(r->call);
}

/* ---- a switch with two guests, each with one pair of packed rings ---- */

struct pworld {
	struct xv_dp *dp;
	struct driver guest[2];
	struct pring ring[2][2]; /* by guest: RX, TX */
};

static inline void pworld_publish(struct pworld *w)
{
	struct xv_vring *rings[2][2];
	struct xv_guest_conf guests[2];
	struct xv_mac_conf macs[2];
	struct xv_nicq *none[1];
	struct xv_nic_conf nic = {.queues = (uintptr_t)none, .mtu = 1500};
	struct xv_snapshot_conf conf = {(uintptr_t)guests, (uintptr_t)&nic, (uintptr_t)macs, 2, 1, 2, 0};

	for (uint32_t i = 0; i < 2; i++) {
		rings[i][0] = w->ring[i][0].vr;
		rings[i][1] = w->ring[i][1].vr;
		guests[i] = (struct xv_guest_conf){
			.guest = (uintptr_t)w->guest[i].guest,
			.rings = (uintptr_t)rings[i],
			.features = w->guest[i].features,
			.nr_rings = 2,
			.ctrl = XV_NO_RING,
			.max_pairs = 1,
		};
		memcpy(macs[i].mac, w->guest[i].mac, 6);
		macs[i].vlan = 0;
		macs[i].guest = i;
	}
	CHECK_EQ(xv_publish(w->dp, &conf), 0);
}

static inline void pworld_init(struct pworld *w, uint64_t features, uint32_t num)
{
	const struct xv_dp_conf conf = {.workers = 1, .poll = XV_POLL_BUSY};

	memset(w, 0, sizeof(*w));
	CHECK_EQ(xv_dp_new(&conf, &w->dp), 0);
	for (uint32_t i = 0; i < 2; i++) {
		driver_init(&w->guest[i], (uint8_t)(i + 1), FEATURES, 2); /* its own split rings are not published */
		w->guest[i].features = features;
		for (uint32_t r = 0; r < 2; r++)
			pring_init(&w->guest[i], &w->ring[i][r], num);
	}
	pworld_publish(w);
}

static inline void pworld_free(struct pworld *w)
{
	const struct xv_snapshot_conf nothing = {0};

	CHECK_EQ(xv_publish(w->dp, &nothing), 0);
	for (uint32_t i = 0; i < 2; i++) {
		pring_free(&w->ring[i][0]);
		pring_free(&w->ring[i][1]);
		driver_free(&w->guest[i]);
	}
	xv_dp_free(w->dp);
}

static inline void pworld_run(struct pworld *w)
{
	int turns = 0;

	while (worker_turn(&w->dp->workers[0], w->dp->snap, false))
		CHECK(++turns < 10000);
}

#endif
