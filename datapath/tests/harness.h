/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For the C unit tests: checks, a guest driver over plain memory, and a NIC queue whose kernel side is the test.
 *
 * A test drives one worker turn by turn in its own thread (no threads, no waiting), so every outcome is exact.
 */
#ifndef XV_TEST_HARNESS_H
#define XV_TEST_HARNESS_H

#include <linux/virtio_config.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../src/dp.h"
#include "../src/hot.h"
#include "../src/nethdr.h"

#define CHECK(cond)                                                                     \
	do {                                                                            \
		if (!(cond)) {                                                          \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #cond); \
			exit(1);                                                        \
		}                                                                       \
	} while (0)

#define CHECK_EQ(a, b)                                                                             \
	do {                                                                                       \
		unsigned long long a_ = (unsigned long long)(a), b_ = (unsigned long long)(b);    \
		if (a_ != b_) {                                                                    \
			fprintf(stderr, "%s:%d: %s: %s is %llu, not %s = %llu\n", __FILE__, __LINE__, \
				__func__, #a, a_, #b, b_);                                        \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

#define GPA 0x100000ull     /* where the guest's memory begins, in its own view */
#define USER 0x7f0000000000ull /* and in its front-end's */
#define MEMORY (4u << 20)
#define FEATURES (1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC)
#define HEADER 12u

struct ring { /* the driver's side of one virtqueue */
	uint32_t num;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint64_t desc_at; /* offsets in the guest's memory */
	uint16_t next, seen;
	int call;
	struct xv_vring *vr;
};

struct driver {
	uint8_t *memory;
	uint64_t top; /* bytes given out */
	struct xv_guest *guest;
	struct xv_mem *mem;
	struct ring ring[5]; /* RX 0, TX 0, RX 1, TX 1, control */
	uint64_t features;
	uint8_t mac[6];
	struct xv_xsk *xsk;
};

static inline uint64_t driver_alloc(struct driver *d, uint64_t bytes, uint64_t align)
{
	uint64_t at = ALIGN_UP(d->top, align);

	CHECK(at + bytes <= MEMORY);
	d->top = at + bytes;
	return at;
}

static inline struct xv_vring_conf ring_conf(struct driver *d, struct ring *r)
{
	return (struct xv_vring_conf){
		.desc = USER + (uint64_t)((uint8_t *)r->desc - d->memory),
		.avail = USER + (uint64_t)((uint8_t *)r->avail - d->memory),
		.used = USER + (uint64_t)((uint8_t *)r->used - d->memory),
		.features = d->features,
		.num = r->num,
		.kick_fd = -1,
		.call_fd = r->call,
		.enabled = 1,
	};
}

static inline void ring_init(struct driver *d, struct ring *r, uint32_t num)
{
	struct xv_vring_conf conf;

	r->num = num;
	r->desc_at = driver_alloc(d, 16ull * num, 16);
	r->desc = (void *)(d->memory + r->desc_at);
	r->avail = (void *)(d->memory + driver_alloc(d, 6 + 2ull * num, 2));
	r->used = (void *)(d->memory + driver_alloc(d, 6 + 8ull * num, 4));
	r->call = eventfd(0, EFD_NONBLOCK);
	conf = ring_conf(d, r);
	CHECK_EQ(xv_vring_new(d->mem, &conf, &r->vr), 0);
}

static inline void driver_init(struct driver *d, uint8_t last, uint64_t features, uint32_t num)
{
	struct xv_region region = {GPA, MEMORY, USER, 0};

	memset(d, 0, sizeof(*d));
	d->memory = aligned_alloc(4096, MEMORY);
	CHECK(d->memory);
	memset(d->memory, 0, MEMORY);
	region.host = (uint64_t)(uintptr_t)d->memory;
	d->features = features;
	memcpy(d->mac, (uint8_t[]){0x52, 0x54, 0, 0, 0, last}, 6);
	CHECK_EQ(xv_guest_new(2, &d->guest), 0);
	xv_guest_set_mac(d->guest, d->mac);
	CHECK_EQ(xv_mem_new(&region, 1, d->guest, &d->mem), 0);
	for (int i = 0; i < 5; i++)
		ring_init(d, &d->ring[i], num);
}

static inline void driver_free(struct driver *d)
{
	for (int i = 0; i < 5; i++) {
		xv_vring_free(d->ring[i].vr);
		close(d->ring[i].call);
	}
	xv_mem_free(d->mem);
	xv_guest_free(d->guest);
	free(d->memory);
}

/* Make a head available. */
static inline void ring_offer(struct ring *r, uint16_t head)
{
	r->avail->ring[r->avail->idx & (r->num - 1)] = head;
	store_release(&r->avail->idx, (uint16_t)(r->avail->idx + 1));
}

/* Write descriptor `i`; `next` < 0 ends the chain. */
static inline void ring_desc(struct ring *r, uint16_t i, uint64_t gpa, uint32_t len, uint16_t flags, int next)
{
	r->desc[i] = (struct vring_desc){gpa, len, (uint16_t)(flags | (next >= 0 ? VRING_DESC_F_NEXT : 0)),
					 (uint16_t)(next >= 0 ? next : 0)};
}

/* Offer a buffer of `len` bytes in one descriptor; where it lies. */
static inline uint8_t *ring_buffer(struct driver *d, struct ring *r, uint32_t len, uint16_t flags)
{
	uint64_t at = driver_alloc(d, len, 16);
	uint16_t i = r->next++ % r->num;

	ring_desc(r, i, GPA + at, len, flags, -1);
	ring_offer(r, i);
	return d->memory + at;
}

/* The next used element, or -1. */
static inline int ring_reap(struct ring *r, uint32_t *len)
{
	const struct vring_used_elem *elem = &r->used->ring[r->seen & (r->num - 1)];

	if (load_acquire(&r->used->idx) == r->seen)
		return -1;
	r->seen++;
	if (len)
		*len = elem->len;
	return (int)elem->id;
}

static inline bool ring_called(struct ring *r)
{
	uint64_t value;

	return read(r->call, &value, sizeof(value)) == sizeof(value);
}

/* An Ethernet frame with a payload that tells one frame from another. */
static inline void make_frame(uint8_t *frame, uint32_t len, const uint8_t *to, const uint8_t *from, uint8_t seed)
{
	for (uint32_t i = 0; i < len; i++)
		frame[i] = (uint8_t)(seed + i * 7);
	memcpy(frame, to, 6);
	memcpy(frame + 6, from, 6);
	frame[12] = 0x88;
	frame[13] = 0xb5; /* local experimental */
}

/* Send a frame in one descriptor, header zeroed. */
static inline void driver_send(struct driver *d, const uint8_t *frame, uint32_t len)
{
	uint8_t *buffer = ring_buffer(d, &d->ring[1], HEADER + len, 0);

	memset(buffer, 0, HEADER);
	memcpy(buffer + HEADER, frame, len);
}

/* ---- a NIC queue with the kernel played by the test ---- */

#define FRAMES 64u /* a GSO frame of 64 KiB is 47 segments of 1400 bytes */
#define CHUNK 2048u

struct nic_side {
	uint8_t *umem;
	uint32_t fill_p, fill_c, comp_p, comp_c, tx_p, tx_c, rx_p, rx_c, flags;
	uint64_t fill[FRAMES], comp[FRAMES];
	struct xdp_desc tx[FRAMES], rx[FRAMES];
	struct xv_nicq *nicq;
	struct xv_xsk *xsk;
};

#define XV_RING_OF(n, name)                                                                                \
	{(uintptr_t)&(n)->name##_p, (uintptr_t)&(n)->name##_c, (uintptr_t)&(n)->flags, (uintptr_t)(n)->name, \
	 FRAMES - 1, FRAMES}

static inline void nic_init(struct nic_side *n, uint32_t flags)
{
	struct xv_nicq_conf conf;
	struct xv_xsk_conf xsk;

	memset(n, 0, sizeof(*n));
	n->umem = aligned_alloc(4096, 2ull * FRAMES * CHUNK);
	conf = (struct xv_nicq_conf){
		.umem = (uintptr_t)n->umem,
		.umem_size = 2ull * FRAMES * CHUNK,
		.chunk = CHUNK,
		.rx_frames = FRAMES,
		.tx_frames = FRAMES,
		.flags = flags,
		.fill = XV_RING_OF(n, fill),
		.comp = XV_RING_OF(n, comp),
		.tx = XV_RING_OF(n, tx),
		.fd = -1,
	};
	xsk = (struct xv_xsk_conf){.rx = XV_RING_OF(n, rx), .fd = -1};
	CHECK_EQ(xv_nicq_new(&conf, &n->nicq), 0);
	CHECK_EQ(xv_xsk_new(n->nicq, &xsk, &n->xsk), 0);
	CHECK_EQ(n->fill_p - n->fill_c, FRAMES);
}

static inline void nic_free(struct nic_side *n)
{
	xv_xsk_free(n->xsk);
	xv_nicq_free(n->nicq);
	free(n->umem);
}

#define PIECE (CHUNK - 256u) /* what the kernel puts into a chunk */

/* The kernel receives one piece of a frame for the guest: false when a ring has no room. */
static inline bool nic_receive_piece(struct nic_side *n, const uint8_t *piece, uint32_t len, uint32_t options)
{
	uint64_t addr;

	if (n->fill_c == load_acquire(&n->fill_p) || n->rx_p - load_acquire(&n->rx_c) == FRAMES)
		return false;
	addr = n->fill[n->fill_c++ % FRAMES] + 256;
	memcpy(n->umem + addr, piece, len);
	n->rx[n->rx_p % FRAMES] = (struct xdp_desc){addr, len, options};
	store_release(&n->rx_p, n->rx_p + 1);
	return true;
}

/* A whole frame, in as many pieces as it takes: false, and nothing has happened, when there is no room. */
static inline bool nic_receive(struct nic_side *n, const uint8_t *frame, uint32_t len)
{
	uint32_t pieces = (len + PIECE - 1) / PIECE;

	if (load_acquire(&n->fill_p) - n->fill_c < pieces || FRAMES - (n->rx_p - load_acquire(&n->rx_c)) < pieces)
		return false;
	for (; len > PIECE; len -= PIECE, frame += PIECE)
		nic_receive_piece(n, frame, PIECE, XDP_PKT_CONTD);
	return nic_receive_piece(n, frame, len, 0);
}

/* The kernel sends the next frame: its length, 0 when there is none. */
static inline uint32_t nic_send(struct nic_side *n, uint8_t *to)
{
	uint32_t len = 0;
	bool more = n->tx_c != n->tx_p;

	while (more) {
		const struct xdp_desc *desc = &n->tx[n->tx_c % FRAMES];

		CHECK(n->tx_c != n->tx_p); /* all pieces were published together */
		CHECK(desc->len && desc->addr % CHUNK + desc->len <= CHUNK);
		memcpy(to + len, n->umem + desc->addr, desc->len);
		n->comp[n->comp_p++ % FRAMES] = desc->addr;
		n->tx_c++;
		len += desc->len;
		more = desc->options & XDP_PKT_CONTD;
	}
	return len;
}

/* ---- both in one switch ---- */

struct world {
	struct xv_dp *dp;
	struct driver guests[3];
	struct nic_side nic;
	struct xv_packet *packet; /* the first guest's frames come by it, too */
	struct xv_tapq *tap;     /* instead of the NIC queue */
	struct xv_tapq *host;    /* the host's port */
	bool host_gets;          /* the NIC's and the packet socket's frames are the host's, not the first guest's */
	const struct xv_policy_conf *policies[3];
	uint32_t nr_guests, mtu; /* mtu 0: 1500 */
};

static const uint8_t host_mac[6] = {0x52, 0x54, 0, 0, 0xff, 1};

#define HARNESS_VLANS 64

/* The pool of a guest with one address: how many entries. */
static inline uint32_t macs_of(struct xv_mac_conf *macs, const struct xv_policy_conf *policy, const uint8_t *mac, uint32_t guest)
{
	const uint64_t *trunk = policy ? (const uint64_t *)(uintptr_t)policy->trunk : NULL;
	uint16_t vlans[HARNESS_VLANS] = {0, XV_VLAN_ANY};
	uint32_t n = 2;

	if (trunk) {
		n = 0;
		for (uint16_t v = 1; v < 4095; v++)
			if (trunk[v / 64] >> v % 64 & 1 && n < HARNESS_VLANS)
				vlans[n++] = v;
	} else if (policy && policy->access) {
		vlans[0] = (uint16_t)policy->access;
		n = 1;
	}
	for (uint32_t i = 0; i < n; i++) {
		memcpy(macs[i].mac, mac, 6);
		macs[i].vlan = vlans[i];
		macs[i].guest = guest;
	}
	return n;
}

static inline void world_publish(struct world *w)
{
	struct xv_guest_conf guests[3];
	struct xv_mac_conf macs[3 * HARNESS_VLANS + 2];
	uint32_t nr_macs = 0;
	struct xv_vring *rings[3][5];
	struct xv_nicq *queues[1] = {w->nic.nicq};
	struct xv_xsk *xsks[1] = {w->nic.xsk};
	struct xv_nic_conf nic = {.queues = (uintptr_t)queues, .nr_queues = !w->tap, .taps = (uintptr_t)&w->tap,
				  .nr_taps = w->tap != NULL, .host = (uintptr_t)w->host, .mtu = w->mtu ? w->mtu : 1500,
				  .host_xsks = (uintptr_t)xsks, .nr_host_xsks = w->host_gets,
				  .host_packet = w->host_gets ? (uintptr_t)w->packet : 0};
	struct xv_snapshot_conf conf = {(uintptr_t)guests, (uintptr_t)&nic, (uintptr_t)macs, w->nr_guests, 1, 0, 0};

	for (uint32_t i = 0; i < w->nr_guests; i++) {
		struct driver *d = &w->guests[i];
		const bool ctrl = d->features >> VIRTIO_NET_F_CTRL_VQ & 1; /* then there are two pairs, too */

		for (int r = 0; r < 5; r++)
			rings[i][r] = d->ring[r].vr;
		guests[i] = (struct xv_guest_conf){
			.guest = (uintptr_t)d->guest,
			.rings = (uintptr_t)rings[i],
			.nr_rings = ctrl ? 5 : 2,
			.xsks = (uintptr_t)xsks,
			.packet = i == 0 && !w->host_gets ? (uintptr_t)w->packet : 0,
			.nr_xsks = i == 0 && !w->tap && !w->host_gets, /* the NIC's frames are the first guest's */
			.features = d->features,
			.policy = (uintptr_t)w->policies[i],
			.ctrl = ctrl ? 4 : XV_NO_RING,
			.max_pairs = ctrl ? 2 : 1,
		};
		nr_macs += macs_of(&macs[nr_macs], w->policies[i], d->mac, i);
	}
	if (w->host)
		nr_macs += macs_of(&macs[nr_macs], NULL, host_mac, XV_HOST_PORT);
	conf.nr_macs = nr_macs;
	CHECK_EQ(xv_publish(w->dp, &conf), 0);
	/* of what a worker does with a new snapshot only this: the tests say themselves who is interrupted when */
	for (uint32_t i = 0; i < w->dp->conf.workers; i++) {
		w->dp->workers[i].serial = w->dp->snap->serial;
		hot_adopt(&w->dp->workers[i], w->dp->snap);
	}
}

/* Guests of different features; with VIRTIO_NET_F_CTRL_VQ the control virtqueue is the data plane's. */
static inline void world_init_mixed(struct world *w, uint32_t nr_guests, const uint64_t *features, uint32_t num,
				    uint32_t nic_flags, uint32_t workers)
{
	const struct xv_dp_conf conf = {.workers = workers, .poll = XV_POLL_BUSY};

	memset(w, 0, sizeof(*w));
	CHECK_EQ(xv_dp_new(&conf, &w->dp), 0);
	nic_init(&w->nic, nic_flags);
	w->nr_guests = nr_guests;
	for (uint32_t i = 0; i < nr_guests; i++)
		driver_init(&w->guests[i], (uint8_t)(i + 1), features[i], num);
	world_publish(w);
}

static inline void world_init(struct world *w, uint32_t nr_guests, uint64_t features, uint32_t num, uint32_t nic_flags)
{
	world_init_mixed(w, nr_guests, (uint64_t[]){features, features, features}, num, nic_flags, 1);
}

static inline void world_free(struct world *w)
{
	const struct xv_snapshot_conf nothing = {0};

	CHECK_EQ(xv_publish(w->dp, &nothing), 0);
	for (uint32_t i = 0; i < w->nr_guests; i++)
		driver_free(&w->guests[i]);
	nic_free(&w->nic);
	xv_dp_free(w->dp);
}

/* Let the worker run until a turn finds nothing to do. */
static inline void world_run(struct world *w)
{
	int turns = 0;

	while (worker_turn(&w->dp->workers[0], w->dp->snap, false))
		CHECK(++turns < 10000);
}

#endif
