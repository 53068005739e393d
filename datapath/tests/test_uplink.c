// SPDX-License-Identifier: Apache-2.0
/* Which NIC queue a guest's pairs send on: the same ones, whichever workers they are on. */
#include "harness.h"

static struct world w;
static struct nic_side more[2];

static void publish(uint32_t worker, uint32_t uplink)
{
	struct driver *d = &w.guests[0];
	struct xv_vring *rings[] = {d->ring[0].vr, d->ring[1].vr, d->ring[2].vr, d->ring[3].vr};
	struct xv_nicq *queues[] = {w.nic.nicq, more[0].nicq, more[1].nicq};
	struct xv_nic_conf nic = {.queues = (uintptr_t)queues, .nr_queues = ARRAY_SIZE(queues), .mtu = 1500};
	struct xv_guest_conf guest = {.guest = (uintptr_t)d->guest, .rings = (uintptr_t)rings, .nr_rings = 4,
				      .ctrl = XV_NO_RING, .worker = worker, .uplink = uplink, .max_pairs = 2};
	const struct xv_snapshot_conf conf = {(uintptr_t)&guest, (uintptr_t)&nic, 0, 1, 1, 0, 0};

	CHECK_EQ(xv_publish(w.dp, &conf), 0);
}

static const struct tx_source *pair(uint32_t worker, uint32_t number)
{
	const struct duty *duty = &w.dp->snap->duties[worker];

	for (uint32_t i = 0; i < duty->nr_tx; i++)
		if (duty->tx[i].pair == number)
			return &duty->tx[i];
	return NULL;
}

int main(void)
{
	const uint64_t two_pairs[] = {FEATURES | 1ull << VIRTIO_NET_F_CTRL_VQ};

	world_init_mixed(&w, 1, two_pairs, 64, 0, 2);
	for (uint32_t i = 0; i < ARRAY_SIZE(more); i++)
		nic_init(&more[i], 0);
	for (uint32_t uplink = 0; uplink < 4; uplink++)
		for (uint32_t worker = 0; worker < 2; worker++) {
			struct xv_nicq *queues[] = {w.nic.nicq, more[0].nicq, more[1].nicq};

			publish(worker, uplink);
			for (uint32_t i = 0; i < 2; i++) {
				const struct tx_source *source = pair((worker + i) % 2, i);

				CHECK(source);
				CHECK(source->uplink.nicq == queues[(uplink + i) % 3]);
			}
		}
	world_free(&w);
	for (uint32_t i = 0; i < ARRAY_SIZE(more); i++)
		nic_free(&more[i]);
	puts("ok");
	return 0;
}
