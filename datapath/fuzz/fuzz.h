/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The world of the ring fuzzers: one hostile guest, two well-behaved ones, a NIC queue whose kernel side is the test.
 *
 * Theory of operation. One worker is driven turn by turn in the fuzzer's own thread. Guest 0 is hostile: whatever lies
 * in its memory comes from the fuzzer's input. Each part of each of its rings, and each piece of its buffers, is a
 * region of its own in a malloc() of exactly its size, so that AddressSanitizer sees every byte read or written beside
 * it. Guests 1 and 2 and the NIC live as long as the process; the hostile guest lives for one input.
 *
 * What is checked after every turn (turn()) and whenever nothing is left to do (settle()):
 *   - frames of the UMEM: each receive frame is in the fill ring or waits in the socket, each transmit frame is free, in
 *     the TX ring or in the completion ring; none is lost, none is there twice;
 *   - hostile rings: buffers are used in the order they were made available, never more than there were, each exactly
 *     once, with a length that the counters agree with;
 *   - guests 1 and 2 are never faulted, nothing is written behind their buffers, and a frame from one to the other
 *     arrives whole (ping()), while the hostile guest is served and after it.
 *
 * The device may be made to write a frame over the hostile guest's own rings. That is no fault of the device, but then
 * the rings say nothing about it. So there are two kinds of input: `isolated` ones have no way to name an address of a
 * ring, and only theirs are read and compared; the others may name any address and write anything anywhere.
 *
 * Time plays no part: cycles_per_us is 0 (nobody has patience) or huge (a sender waits until settle()).
 */
#ifndef XV_FUZZ_H
#define XV_FUZZ_H

#include "../tests/harness.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* ---- the fuzzer's bytes ---- */

struct input {
	const uint8_t *at;
	size_t left;
};

static inline uint8_t in8(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->at++;
}

static inline uint16_t in16(struct input *in)
{
	uint16_t low = in8(in);

	return (uint16_t)(low | in8(in) << 8);
}

static inline uint32_t in32(struct input *in)
{
	uint32_t low = in16(in);

	return low | (uint32_t)in16(in) << 16;
}

static inline uint64_t in64(struct input *in)
{
	uint64_t low = in32(in);

	return low | (uint64_t)in32(in) << 32;
}

/* ---- the hostile guest ---- */

enum { RX, TX, CTRL, RINGS };       /* its rings, by vring index */
enum { DESC, AVAIL, USED, PARTS };  /* of a ring */

#define DATA_REGIONS 4u
#define REGIONS (RINGS * PARTS + DATA_REGIONS)
#define RING_GPA 0x6b5a493800000000ull /* nothing that isolated inputs can spell */
#define HUGE_PATIENCE (1ull << 40)

/* Two that touch, a large one, and one that ends with the address space. */
static const struct {
	uint64_t gpa;
	uint32_t size;
} data_at[DATA_REGIONS] = {{0x100000, 8192}, {0x102000, 4099}, {0x200000, 70003}, {0ull - 4096, 4096}};

static const uint8_t hostile_mac[6] = {0x52, 0x54, 0, 0, 0, 1}, nobody[6] = {0x52, 0x54, 0, 0, 9, 9};

struct hostile {
	struct xv_guest *guest;
	struct xv_mem *mem;
	struct ring ring[RINGS];
	struct xv_region regions[REGIONS];
	uint64_t features;
	struct xv_policy_conf policy; /* flags 0 and so on: none */
	uint32_t base[RINGS]; /* where its rings begin: packed ones */
	bool isolated;
	int call;
	/* as of the last look */
	uint16_t used[RINGS];
	uint64_t tx_packets, tx_bytes, rx_packets, rx_bytes, commands;
};

#define PEER_RX 128u
#define PEER_TX 8u
#define PEER_STRIDE 2048u
#define PEER_MEMORY ((PEER_RX + PEER_TX + 4) * PEER_STRIDE)
#define CANARY 0xa5

static struct {
	struct xv_dp *dp;
	struct nic_side nic;
	struct hostile hostile;
	struct driver peer[2]; /* guests 1 and 2 */
	uint32_t peer_buffer[2];
	uint64_t pings;
	uint8_t ping[60];
	bool ping_seen;
	uint8_t sent[CHUNK]; /* what the NIC sent last */
	uint32_t sent_len, nr_sent;
} f;

#define BIT(n) (1ull << (n))
#define GSO_FEATURES                                                                                     \
	(BIT(VIRTIO_NET_F_HOST_TSO4) | BIT(VIRTIO_NET_F_HOST_TSO6) | BIT(VIRTIO_NET_F_HOST_ECN) | BIT(56))

/* The features that two bytes of input choose. */
static inline uint64_t in_features(struct input *in)
{
	static const uint8_t bits[16] = {
		VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_CSUM,
		VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, 56 /* HOST_USO */,
		VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN,
		VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_MQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_F_VERSION_1};
	uint16_t chosen = in16(in);
	uint64_t features = 0;

	for (uint32_t i = 0; i < 16; i++)
		if (chosen >> i & 1)
			features |= BIT(bits[i]);
	return features;
}

/* What a byte of input makes of the hostile guest's policy: 0 is none. */
static inline struct xv_policy_conf in_policy(uint8_t how)
{
	static const struct xv_ip addresses[2] = {{{10, 0, 0, 2}, 4}, {{0xfd, [15] = 2}, 6}};
	static const uint64_t trunk[64] = {1u << 5 | 1u << 6};
	struct xv_policy_conf policy = {.flags = how & 7, .addresses = (uintptr_t)addresses, .nr_addresses = 2};

	if (how & 8)
		policy.access = 5;
	else if (how & 16)
		policy.trunk = (uintptr_t)trunk;
	if (how & 32)
		policy.learn = 2;
	if (how & 64)
		policy.storm = (struct xv_bucket_conf){1, 3};
	if (how & 128)
		policy.tx = policy.rx = (struct xv_bucket_conf){1, 3000};
	return policy;
}

static inline void publish(bool with_hostile)
{
	struct hostile *h = &f.hostile;
	struct xv_vring *rings[3][RINGS] = {{NULL}};
	struct xv_nicq *queues[1] = {f.nic.nicq};
	struct xv_xsk *xsks[1] = {f.nic.xsk};
	struct xv_guest_conf guests[3];
	struct xv_nic_conf nic = {.queues = (uintptr_t)queues, .nr_queues = 1, .mtu = 1500};
	struct xv_mac_conf macs[6];
	struct xv_snapshot_conf conf = {(uintptr_t)guests, (uintptr_t)&nic, (uintptr_t)macs, 3, 1, 6, 0};

	for (uint32_t g = 0; g < 3; g++) {
		struct xv_guest *guest = g ? f.peer[g - 1].guest : h->guest;

		for (uint32_t r = 0; r < RINGS; r++) {
			if (g && r < 2)
				rings[g][r] = f.peer[g - 1].ring[r].vr;
			else if (!g && with_hostile)
				rings[g][r] = h->ring[r].vr;
		}
		guests[g] = (struct xv_guest_conf){
			.guest = (uintptr_t)guest,
			.rings = (uintptr_t)rings[g],
			.nr_rings = RINGS,
			.xsks = (uintptr_t)xsks,
			.nr_xsks = g == 0, /* the NIC's frames are the hostile guest's */
			.features = g ? f.peer[g - 1].features : h->features,
			.policy = g ? 0 : (uintptr_t)&h->policy,
			.ctrl = g ? XV_NO_RING : CTRL,
			.max_pairs = 2,
		};
		for (uint32_t v = 0; v < 2; v++) {
			struct xv_mac_conf *mac = &macs[2 * g + v];

			memcpy(mac->mac, hostile_mac, 6);
			mac->mac[5] = (uint8_t)(g + 1);
			mac->vlan = v ? XV_VLAN_ANY : 0;
			mac->guest = g;
		}
	}
	CHECK_EQ(xv_publish(f.dp, &conf), 0);
}

/* ---- the other guests ---- */

static inline void peer_offer(struct driver *d, uint32_t i)
{
	ring_desc(&d->ring[RX], (uint16_t)i, GPA + i * PEER_STRIDE, f.peer_buffer[d - f.peer], VRING_DESC_F_WRITE, -1);
	ring_offer(&d->ring[RX], (uint16_t)i);
}

static inline void peer_init(uint32_t index, uint64_t features, uint32_t buffer)
{
	struct xv_region region = {GPA, PEER_MEMORY, USER, 0};
	struct driver *d = &f.peer[index];

	d->memory = aligned_alloc(4096, PEER_MEMORY);
	CHECK(d->memory);
	memset(d->memory, 0, PEER_MEMORY);
	memset(d->memory, CANARY, PEER_RX * PEER_STRIDE);
	region.host = (uintptr_t)d->memory;
	d->features = features;
	d->top = (PEER_RX + PEER_TX) * PEER_STRIDE;
	memcpy(d->mac, hostile_mac, 6);
	d->mac[5] = (uint8_t)(index + 2);
	f.peer_buffer[index] = buffer;
	CHECK_EQ(xv_guest_new(2, &d->guest), 0);
	CHECK_EQ(xv_mem_new(&region, 1, d->guest, &d->mem), 0);
	ring_init(d, &d->ring[RX], PEER_RX);
	ring_init(d, &d->ring[TX], PEER_TX);
	for (uint32_t i = 0; i < PEER_RX; i++)
		peer_offer(d, i);
}

/* Take what has arrived and offer the buffers again. */
static inline void peer_reap(struct driver *d)
{
	const uint32_t buffer = f.peer_buffer[d - f.peer];
	uint32_t len;
	int id;

	CHECK_EQ(d->guest->fault.code, XV_FAULT_NONE);
	while ((id = ring_reap(&d->ring[RX], &len)) >= 0) {
		uint8_t *at = d->memory + (uint32_t)id * PEER_STRIDE;

		CHECK(id < (int)PEER_RX);
		CHECK(len && len <= buffer);
		for (uint32_t i = buffer; i < PEER_STRIDE; i++)
			CHECK_EQ(at[i], CANARY);
		if (len == HEADER + sizeof(f.ping) && !memcmp(at + HEADER, f.ping, sizeof(f.ping)))
			f.ping_seen = true;
		peer_offer(d, (uint32_t)id);
	}
	while (ring_reap(&d->ring[TX], &len) >= 0)
		CHECK_EQ(len, 0);
}

/* Send up to PEER_STRIDE bytes, header included; false when the ring is full. */
static inline bool peer_send(struct driver *d, const struct virtio_net_hdr *hdr, const uint8_t *frame, uint32_t len)
{
	struct ring *r = &d->ring[TX];
	uint16_t i = (uint16_t)(r->avail->idx % PEER_TX);
	uint32_t at = (PEER_RX + i) * PEER_STRIDE;

	CHECK(HEADER + len <= PEER_STRIDE);
	if ((uint16_t)(r->avail->idx - r->used->idx) >= PEER_TX)
		return false;
	memset(d->memory + at, 0, HEADER);
	if (hdr)
		memcpy(d->memory + at, hdr, sizeof(*hdr));
	memcpy(d->memory + at + HEADER, frame, len);
	ring_desc(r, i, GPA + at, HEADER + len, 0, -1);
	ring_offer(r, i);
	return true;
}

/* ---- what must always hold ---- */

static inline void check_umem(void)
{
	const struct xv_nicq *nicq = f.nic.nicq;
	bool seen[2 * FRAMES] = {false};
	uint32_t n = 0;

#define HOLD(address, first)                                            \
	do {                                                            \
		uint64_t frame_ = (address) / CHUNK;                    \
		CHECK(frame_ >= (first) && frame_ < (first) + FRAMES);  \
		CHECK(!seen[frame_]);                                   \
		seen[frame_] = true;                                    \
		n++;                                                    \
	} while (0)
	for (uint32_t i = f.nic.fill_c; i != f.nic.fill_p; i++)
		HOLD(f.nic.fill[i % FRAMES], 0);
	for (uint32_t i = f.nic.rx_c; i != f.nic.rx_p; i++)
		HOLD(f.nic.rx[i % FRAMES].addr, 0);
	CHECK_EQ(n, FRAMES);
	for (uint32_t i = 0; i < nicq->nr_free; i++)
		HOLD(nicq->free[i], FRAMES);
	for (uint32_t i = f.nic.tx_c; i != f.nic.tx_p; i++)
		HOLD(f.nic.tx[i % FRAMES].addr, FRAMES);
	for (uint32_t i = f.nic.comp_c; i != f.nic.comp_p; i++)
		HOLD(f.nic.comp[i % FRAMES], FRAMES);
	CHECK_EQ(n, 2 * FRAMES);
#undef HOLD
}

/* What the NIC was given: whole frames at the start of theirs, no longer than its MTU and two tags allow. */
static inline void drain_nic(void)
{
	while (f.nic.tx_c != f.nic.tx_p) {
		const struct xdp_desc *desc = &f.nic.tx[f.nic.tx_c % FRAMES];

		CHECK_EQ(desc->addr % CHUNK, 0);
		CHECK_EQ(desc->options, 0);
		CHECK(desc->len >= 14 && desc->len <= 1514 + 8);
		f.sent_len = nic_send(&f.nic, f.sent);
		f.nr_sent++;
	}
}

/* Look at a hostile ring after a turn: how many buffers were used, and the sum of their lengths. */
static inline uint16_t check_used(uint32_t index, bool readable, uint64_t *bytes)
{
	struct hostile *h = &f.hostile;
	const struct ring *r = &h->ring[index];
	const struct xv_vring *vr = r->vr;
	uint16_t n = (uint16_t)(vr->next - h->used[index]);

	*bytes = 0;
	if (readable && n) {
		CHECK(n <= r->num);
		CHECK_EQ(r->used->idx, vr->next);
		CHECK((uint16_t)(r->avail->idx - h->used[index]) <= r->num);
		CHECK(n <= (uint16_t)(r->avail->idx - h->used[index]));
		for (uint16_t i = 0; i < n; i++) {
			uint32_t slot = (uint16_t)(h->used[index] + i) & (r->num - 1);

			CHECK_EQ(r->used->ring[slot].id, r->avail->ring[slot]);
			CHECK(r->used->ring[slot].id < r->num);
			*bytes += r->used->ring[slot].len;
		}
	}
	h->used[index] = vr->next;
	return n;
}

static inline void check_hostile(void)
{
	struct hostile *h = &f.hostile;
	const struct xv_rx_counters *rx = &h->guest->queues[0].rx;
	const struct xv_tx_counters *tx = &h->guest->queues[0].tx;
	const struct xv_ctrl_state *ctrl = &h->guest->ctrl;
	const struct filter *filter = &h->guest->rules->filter;
	uint64_t bytes, commands = 0;
	uint16_t n;

	CHECK(h->guest->fault.code < XV_FAULT_MAX);
	if (h->features & BIT(VIRTIO_F_RING_PACKED)) /* its cursors say nothing about buffers: test_packed.c looks at rings */
		return;
	n = check_used(TX, h->isolated, &bytes);
	CHECK_EQ(bytes, 0);
	CHECK_EQ(tx->packets - h->tx_packets, n);
	CHECK(tx->bytes - h->tx_bytes <= (uint64_t)n * (NET_MAX_FRAME + 4)); /* an access port's tag */
	CHECK(xv_guest_learned(h->guest, NULL, 0) <= h->policy.learn);
	n = check_used(CTRL, h->isolated, &bytes);
	CHECK(bytes <= n);
	for (uint32_t i = 0; i < XV_CTRL_CLASSES; i++)
		commands += ctrl->accepted[i] + ctrl->refused[i];
	CHECK_EQ(commands - h->commands, n);
	CHECK(ctrl->pairs >= 1 && ctrl->pairs <= 2);
	CHECK(ctrl->rx_mode < 1u << 6);
	CHECK(filter->nr_unicast <= XV_MAX_MACS && filter->nr_multicast <= FILTER_MULTICAST);
	n = check_used(RX, h->isolated, &bytes);
	CHECK(rx->packets - h->rx_packets <= n);
	if (h->isolated)
		CHECK_EQ(bytes, rx->bytes - h->rx_bytes + (rx->packets - h->rx_packets) * h->ring[RX].vr->header_len);
	h->tx_packets = tx->packets;
	h->tx_bytes = tx->bytes;
	h->rx_packets = rx->packets;
	h->rx_bytes = rx->bytes;
	h->commands = commands;
}

static inline bool turn(void)
{
	bool busy = worker_turn(&f.dp->workers[0], f.dp->snap, false);

	drain_nic();
	if (f.hostile.ring[TX].vr)
		check_hostile();
	check_umem();
	peer_reap(&f.peer[0]);
	peer_reap(&f.peer[1]);
	return busy;
}

/* Whether the hostile guest has sent all that it may; then it may send again. */
static inline bool unpause(void)
{
	struct hostile *h = &f.hostile;

	if (!h->ring[TX].vr || !h->ring[TX].vr->not_before)
		return false;
	h->ring[TX].vr->not_before = 0;
	h->guest->tx.in_force->spent = bucket_earned(h->guest->tx.in_force, cycles_now());
	return true;
}

/* Whoever waits gives up; turns until nothing is left to do. */
static inline void settle(void)
{
	struct hostile *h = &f.hostile;
	uint32_t turns = 0;

	f.dp->cycles_per_us = 0;
	f.peer[0].ring[TX].vr->patience.left = f.peer[1].ring[TX].vr->patience.left = 0;
	if (h->ring[TX].vr)
		h->ring[TX].vr->patience.left = 0;
	if (h->guest)
		h->guest->work.deadline = 0;
	do {
		while (turn())
			CHECK(++turns < 10000);
	} while (unpause());
	for (uint32_t i = 0; i < 2; i++)
		CHECK_EQ(f.peer[i].ring[TX].used->idx, f.peer[i].ring[TX].avail->idx);
	if (h->isolated && h->ring[TX].vr && h->guest->fault.code == XV_FAULT_NONE) {
		CHECK_EQ(h->ring[TX].vr->next, h->ring[TX].avail->idx); /* nothing is left lying */
		CHECK_EQ(h->ring[CTRL].vr->next, h->ring[CTRL].avail->idx);
	}
}

/* A frame from guest 1 to guest 2 arrives, whatever the hostile guest has in its rings; and one more after that. */
static inline void ping(void)
{
	for (uint32_t round = 0; round < 2; round++) {
		make_frame(f.ping, sizeof(f.ping), f.peer[1].mac, f.peer[0].mac, (uint8_t)f.pings);
		memcpy(f.ping + 20, &f.pings, sizeof(f.pings));
		f.pings++;
		f.ping_seen = false;
		if (round)
			settle();
		while (!peer_send(&f.peer[0], NULL, f.ping, sizeof(f.ping)))
			settle();
		settle();
		/* segments of one GSO frame may be more than guest 2 has buffers: that is its sender's fault */
		CHECK(f.ping_seen || (!round && f.hostile.features & GSO_FEATURES));
	}
}

/* ---- life of the hostile guest ---- */

static inline uint8_t *region_add(struct hostile *h, uint32_t i, uint64_t gpa, uint32_t size)
{
	uint8_t *memory = malloc(size);

	CHECK(memory);
	memset(memory, 0, size);
	h->regions[i] = (struct xv_region){gpa, size, USER + 0x1000000ull * i, (uintptr_t)memory};
	return memory;
}

static inline void hostile_rings(void)
{
	struct hostile *h = &f.hostile;

	for (uint32_t i = 0; i < RINGS; i++) {
		struct ring *r = &h->ring[i];
		const struct xv_vring_conf conf = {
			.desc = h->regions[i * PARTS + DESC].user_addr,
			.avail = h->regions[i * PARTS + AVAIL].user_addr,
			.used = h->regions[i * PARTS + USED].user_addr,
			.features = h->features,
			.num = r->num,
			.base = h->features & BIT(VIRTIO_F_RING_PACKED) ? h->base[i] : 0,
			.kick_fd = -1,
			.call_fd = h->call,
			.enabled = 1,
		};

		CHECK_EQ(xv_vring_new(h->mem, &conf, &r->vr), 0);
		h->used[i] = r->vr->next;
	}
	publish(true);
}

static inline void hostile_disconnect(void)
{
	struct hostile *h = &f.hostile;

	publish(false);
	/* as adopt() in worker.c does when it meets a new snapshot: the turns here do not go through it */
	f.nic.xsk->stalled_on = f.peer[0].ring[TX].vr->stalled_on = f.peer[1].ring[TX].vr->stalled_on = NULL;
	for (uint32_t i = 0; i < RINGS; i++) {
		h->base[i] = xv_vring_base(h->ring[i].vr);
		xv_vring_free(h->ring[i].vr);
		h->ring[i].vr = NULL;
	}
}

/* A front-end that goes and comes again, with whatever the guest's memory holds by then. */
static inline void hostile_restart(void)
{
	hostile_disconnect();
	settle();
	xv_guest_reset(f.hostile.guest);
	hostile_rings();
}

/* `base`: where its indices begin. */
static inline void hostile_start(uint64_t features, uint32_t num, uint16_t base, bool isolated)
{
	struct hostile *h = &f.hostile;
	uint64_t reads;

	CHECK_EQ(xv_guest_new(2, &h->guest), 0);
	xv_guest_set_mac(h->guest, hostile_mac);
	h->features = features;
	h->isolated = isolated;
	for (uint32_t i = 0; i < RINGS; i++) {
		struct ring *r = &h->ring[i];
		uint64_t gpa = RING_GPA + 0x1000000ull * i;

		r->num = num;
		r->next = 0;
		r->seen = base;
		r->desc = (void *)region_add(h, i * PARTS + DESC, gpa, 16 * num);
		r->avail = (void *)region_add(h, i * PARTS + AVAIL, gpa + 0x100000, 6 + 2 * num);
		r->used = (void *)region_add(h, i * PARTS + USED, gpa + 0x200000, 6 + 8 * num);
		r->avail->idx = r->used->idx = base;
		h->base[i] = 0x80008000u; /* a packed ring's beginning */
	}
	for (uint32_t i = 0; i < DATA_REGIONS; i++)
		region_add(h, RINGS * PARTS + i, data_at[i].gpa, data_at[i].size);
	CHECK_EQ(xv_mem_new(h->regions, REGIONS, h->guest, &h->mem), 0);
	h->tx_packets = h->tx_bytes = h->rx_packets = h->rx_bytes = h->commands = 0;
	while (read(h->call, &reads, sizeof(reads)) > 0)
		;
	f.nr_sent = 0;
	hostile_rings();
}

/* It goes, and every frame it held comes back. */
static inline void hostile_stop(void)
{
	const struct xv_snapshot_conf nothing = {0};
	struct hostile *h = &f.hostile;

	ping();
	hostile_disconnect();
	ping();
	if (f.nic.rx_c != f.nic.rx_p) { /* a frame that is not all there yet */
		CHECK(nic_receive_piece(&f.nic, f.ping, 1, 0));
		ping();
	}
	CHECK_EQ(f.nic.fill_p - f.nic.fill_c, FRAMES);
	CHECK_EQ(xv_publish(f.dp, &nothing), 0);
	xv_mem_free(h->mem);
	for (uint32_t i = 0; i < REGIONS; i++)
		free((void *)(uintptr_t)h->regions[i].host);
	xv_guest_free(h->guest);
	h->guest = NULL;
}

static inline void fuzz_init(void)
{
	const struct xv_dp_conf conf = {.workers = 1, .poll = XV_POLL_BUSY};

	CHECK_EQ(xv_dp_new(&conf, &f.dp), 0);
	f.dp->cycles_per_us = 0;
	nic_init(&f.nic, XV_NICQ_PARTIAL_CSUM | XV_NICQ_SG);
	f.hostile.call = eventfd(0, EFD_NONBLOCK);
	peer_init(0, FEATURES | BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_GUEST_CSUM), 700);
	peer_init(1, FEATURES, HEADER + 1514);
}

/* ---- what the hostile guest does: shared by its rings ---- */

/* Write to its memory at a guest physical address, as much of it as there is. */
static inline void hostile_write(uint64_t gpa, const void *from, uint32_t len)
{
	const uint8_t *s = from;

	for (uint32_t i = 0; i < len; i++) {
		for (uint32_t r = 0; r < REGIONS; r++) {
			const struct xv_region *region = &f.hostile.regions[r];

			if (gpa + i - region->gpa < region->size) {
				((uint8_t *)(uintptr_t)region->host)[gpa + i - region->gpa] = s[i];
				break;
			}
		}
	}
}

/* An address: in a buffer region, from its beginning or its end; if it may, also in a ring, or anything. */
static inline uint64_t in_address(struct input *in)
{
	uint8_t how = in8(in);
	uint32_t r = how & 3u;
	uint16_t offset = in16(in);

	if (how & 4 && !f.hostile.isolated)
		return how & 8 ? in64(in) : f.hostile.regions[how >> 4 < RINGS * PARTS ? how >> 4 : 0].gpa + offset;
	return how & 8 ? data_at[r].gpa + data_at[r].size - offset % 64u : data_at[r].gpa + offset;
}

static inline uint32_t in_length(struct input *in)
{
	uint8_t how = in8(in);

	switch (how >> 6) {
	case 0:
		return how;
	case 1:
		return 16u * (how & 63u);
	case 2:
		return in16(in);
	default:
		return how & 1 ? in32(in) & 0x7ffffu : UINT32_MAX - in8(in);
	}
}

/* An index into a table of `n`: most often in it, or at its end, or just past it. */
static inline uint16_t in_index(struct input *in, uint32_t n)
{
	uint8_t i = in8(in);

	return (uint16_t)(i < 0xc0 ? i % n : i < 0xf0 ? n - 1 + i % 4u : n + (uint32_t)in8(in) * 257u);
}

/* One descriptor, in the ring's table or in an indirect one at any address. */
static inline void op_desc(struct input *in, struct ring *r)
{
	uint8_t i = in8(in), flags;
	struct vring_desc desc;
	bool own = !(i & 0x80);
	uint64_t table = own ? 0 : in_address(in);

	desc.addr = in_address(in);
	desc.len = in_length(in);
	flags = in8(in);
	desc.flags = flags & 0x80 ? (uint16_t)(flags << 8 | in8(in)) : flags;
	desc.next = own ? in_index(in, r->num) : in8(in);
	if (own)
		r->desc[i % r->num] = desc;
	else
		hostile_write(table + 16 * (i & 15u), &desc, sizeof(desc));
}

static inline void op_offer(struct input *in, struct ring *r)
{
	ring_offer(r, in_index(in, r->num));
}

static inline void op_raw_avail(struct input *in, struct ring *r)
{
	uint8_t what = in8(in);
	uint16_t value = in16(in);

	if (what & 0x80)
		r->avail->idx = value;
	else if (what & 0x40)
		r->avail->flags = value;
	else
		r->avail->ring[what % (r->num + 1)] = value; /* and used_event */
}

/* Anything, anywhere in its memory. */
static inline void op_bytes(struct input *in)
{
	uint8_t where = in8(in), n = in8(in) & 63;
	uint16_t offset = in16(in);
	uint32_t r = f.hostile.isolated ? RINGS * PARTS + where % DATA_REGIONS : where % REGIONS;
	struct xv_region *region = &f.hostile.regions[r];

	/* isolated inputs write no descriptors this way: 0xff makes an address that is in no region */
	for (uint32_t i = 0; i < n; i++)
		((uint8_t *)(uintptr_t)region->host)[(offset + i) % region->size] = in8(in) | (f.hostile.isolated ? 0x80 : 0);
}

/*
 * A well-formed chain over [gpa, gpa + len) in pieces of `step` bytes, from `head` on or in an indirect table, and made
 * available. Well-formed as far as the ring's size allows it.
 */
static inline void offer_chain(struct ring *r, uint64_t gpa, uint32_t len, uint32_t step, uint64_t table, uint16_t flags)
{
	uint32_t n = (len + step - 1) / step;
	uint16_t head = (uint16_t)(r->next % r->num);

	for (uint32_t i = 0; i < n; i++) {
		struct vring_desc desc = {gpa + (uint64_t)i * step, MIN(step, len - i * step), flags, 0};

		if (i + 1 < n) {
			desc.flags |= VRING_DESC_F_NEXT;
			desc.next = (uint16_t)(table ? i + 1 : (head + i + 1) % r->num);
		}
		if (table)
			hostile_write(table + 16ull * i, &desc, sizeof(desc));
		else
			r->desc[(head + i) % r->num] = desc;
	}
	if (table)
		ring_desc(r, head, table, 16 * n, VRING_DESC_F_INDIRECT, -1);
	r->next = (uint16_t)(r->next + (table ? 1 : n));
	ring_offer(r, head);
}

static inline uint32_t in_step(struct input *in, uint32_t len)
{
	uint32_t step = in8(in);

	return MAX(step < 128 ? step : 16 * step, len / 250 + 1);
}

static inline uint64_t in_table(struct input *in)
{
	uint8_t how = in8(in);

	return how & 1 ? data_at[how >> 1 & 3].gpa + (how >> 3) * 16u : 0;
}

/* ---- what every ring fuzzer has ---- */

/* From case 8 of a fuzzer's switch on: turns of the worker, a ping, the ring switched off or on, the guest gone and back. */
static inline void op_common(uint8_t op, const struct ring *r)
{
	switch (op % 12) {
	case 8:
		f.dp->cycles_per_us = op & 0x80 ? HUGE_PATIENCE : 0;
		turn();
		break;
	case 9:
		ping();
		break;
	case 10:
		xv_vring_set_enabled(r->vr, op & 0x80);
		break;
	default:
		if (op & 0x80)
			hostile_restart();
		else
			settle();
	}
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	fuzz_init();
	return 0;
}

#endif
