// SPDX-License-Identifier: Apache-2.0
/*
 * What a frame costs the worker: `make cost` counts instructions (callgrind), which say the same on every run, and the
 * program alone prints cycles. Kernel and guest are played here and not counted: only worker_turn() is.
 *
 *     build/cost WAY BYTES ROUNDS [POLICY]    WAY: in (NIC to guest) or out (guest to NIC)
 *                                             POLICY: checked (source addresses), access (that and a VLAN), learns
 *                                             (that and a learned address), guarded (that and IP), limited (bytes)
 *     build/cost beside RINGS ROUNDS    frames in one of so many rings (tests/bank.h), the others have been quiet for a while
 */
#include "bank.h"

#define RING 256u

/* The guest takes what came, and offers the same buffers again. */
static void recycle(struct ring *r)
{
	int head;

	while ((head = ring_reap(r, NULL)) >= 0)
		ring_offer(r, (uint16_t)head);
}

/* What is counted. */
static __attribute__((noinline)) void measured_turn(struct world *w)
{
	worker_turn(&w->dp->workers[0], w->dp->snap, false);
}

static int beside(uint32_t nr, uint32_t rounds)
{
	struct world w;
	struct bank b;

	bank_init(&b, nr, FEATURES, XV_POLL_ADAPTIVE, 1);
	bank_cool(&b, 16);
	w.dp = b.dp;
	bank_offer(&b, 0);
	bank_kick(&b, 0);
	do
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
	while (!bank_reap(&b, 0));
	for (uint32_t round = 0; round < rounds; round++) {
		bank_offer(&b, 0);
		measured_turn(&w);
		CHECK(bank_reap(&b, 0));
	}
	bank_free(&b);
	return 0;
}

static const uint8_t learned[6] = {2, 0, 0, 0, 0, 7};
static const struct xv_ip address = {{10, 0, 0, 2}, 4};
/* from that address */
static const uint8_t tcp[] = {8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1};

static const struct xv_policy_conf *policy_of(const char *name)
{
	static struct xv_policy_conf policy;

	policy.flags = strcmp(name, "limited") ? XV_POLICY_SPOOF_CHECK : 0;
	policy.access = !strcmp(name, "access") ? 10 : 0;
	policy.learn = !strcmp(name, "learns") ? 8 : 0;
	if (!strcmp(name, "limited"))
		policy.tx = policy.rx = (struct xv_bucket_conf){1ull << 36, 1ull << 36}; /* which is never reached */
	if (!strcmp(name, "guarded")) {
		policy.flags |= XV_POLICY_IP_CHECK;
		policy.addresses = (uintptr_t)&address;
		policy.nr_addresses = 1;
	}
	return &policy;
}

int main(int argc, char **argv)
{
	const bool in = argc > 1 && !strcmp(argv[1], "in");
	const uint32_t len = argc > 2 ? (uint32_t)atoi(argv[2]) : 64, rounds = argc > 3 ? (uint32_t)atoi(argv[3]) : 1000;
	uint8_t frame[CHUNK], sent[CHUNK];
	uint64_t cycles = 0, frames;
	struct driver *d;
	struct ring *r;
	const char *policy = argc > 4 ? argv[4] : "";
	struct world w;

	if (argc > 3 && !strcmp(argv[1], "beside"))
		return beside(len, rounds);
	CHECK(len >= 14 && len <= CHUNK - 256);
	world_init(&w, 1, FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF, RING, 0);
	if (*policy) {
		w.policies[0] = policy_of(policy);
		world_publish(&w);
	}
	d = &w.guests[0];
	r = &d->ring[in ? 0 : 1];
	if (in) {
		for (uint32_t i = 0; i < RING; i++)
			ring_buffer(d, r, 1526, VRING_DESC_F_WRITE);
		make_frame(frame, len, d->mac, (uint8_t[]){2, 0, 0, 0, 0, 9}, 1);
		if (w.policies[0] && w.policies[0]->access)
			memcpy(frame + 12, (uint8_t[]){0x81, 0, 0, 10}, 4);
	} else {
		make_frame(frame, len, (uint8_t[]){2, 0, 0, 0, 0, 9}, strcmp(policy, "learns") ? d->mac : learned, 1);
		if (!strcmp(policy, "guarded"))
			memcpy(frame + 12, tcp, sizeof(tcp));
		for (uint32_t i = 0; i < XV_BURST; i++)
			driver_send(d, frame, len);
	}
	for (uint32_t round = 0; round < rounds; round++) {
		uint64_t start;

		for (uint32_t i = 0; in && i < XV_BURST; i++)
			CHECK(nic_receive(&w.nic, frame, len));
		start = cycles_now();
		measured_turn(&w);
		cycles += cycles_now() - start;
		while (!in && nic_send(&w.nic, sent))
			;
		recycle(r);
	}
	frames = in ? w.guests[0].guest->queues[0].rx.packets : w.nic.nicq->counters.tx_packets;
	CHECK_EQ(frames, (uint64_t)rounds * XV_BURST);
	printf("%s %u bytes%s%s: %llu cycles a frame\n", in ? "in" : "out", len, *policy ? " " : "", policy, (unsigned long long)(cycles / frames));
	world_free(&w);
	return 0;
}
