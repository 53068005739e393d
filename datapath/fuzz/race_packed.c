// SPDX-License-Identifier: Apache-2.0
/*
 * The probe for double fetches (race.c) with packed rings: what a descriptor says, the flags and the id of a chain's last
 * one, and indirect tables change while the device reads them. Between turns the driver makes every used slot available
 * again, by the device's own cursor, for what the ring says cannot be trusted here.
 *
 *     race_packed [turns [seed]]
 */
#include "race.h"

static struct vring_packed_desc right[RINGS][NUM]; /* what was made available last; read by both threads */
static struct { /* of the driver in each ring */
	uint32_t slot;
	bool wrap;
} places[RINGS];

/* By the slot: one descriptor, a chain of two, or a table of two. */
static struct vring_packed_desc good_desc(uint32_t ring, uint32_t i)
{
	const uint64_t page = data_at[2].gpa + i * PAGE, buffer = page + ring * 1024;
	const uint16_t way = ring == RX ? VRING_DESC_F_WRITE : 0, last = ring == TX ? 0 : VRING_DESC_F_WRITE;

	switch (i % 4) {
	case 0:
		return (struct vring_packed_desc){buffer, 900, (uint16_t)i, way};
	case 1:
		return (struct vring_packed_desc){buffer, 32, (uint16_t)i, way | VRING_DESC_F_NEXT};
	case 2:
		return (struct vring_packed_desc){buffer + 32, 600, (uint16_t)i, last};
	default:
		return (struct vring_packed_desc){page + TABLES + 64 * ring, 32, (uint16_t)i, VRING_DESC_F_INDIRECT};
	}
}

static struct vring_packed_desc *desc_at(uint32_t ring, uint32_t i)
{
	return (struct vring_packed_desc *)(void *)f.hostile.ring[ring].desc + i;
}

static void lay_out(uint32_t ring)
{
	for (uint32_t i = 0; i < NUM; i++) {
		const uint64_t page = data_at[2].gpa + i * PAGE, buffer = page + ring * 1024;
		const struct vring_packed_desc table[2] = {{buffer, 14, 0, ring == RX ? VRING_DESC_F_WRITE : 0},
							   {buffer + 16, 700, 0, ring == TX ? 0 : VRING_DESC_F_WRITE}};
		uint8_t bytes[HEADER + ETH_HEADER] = {0};

		hostile_write(page + TABLES + 64 * ring, table, sizeof(table));
		make_frame(bytes + HEADER, ETH_HEADER, i % 3 ? f.peer[i % 3 - 1].mac : nobody, hostile_mac, 0);
		hostile_write(buffer, bytes, ring == TX && i % 4 != 3 ? sizeof(bytes) : 0);
	}
}

/* Make available what the device has used: whole chains, each with its first descriptor last. */
static void offer(uint32_t ring)
{
	const cursor next = f.hostile.ring[ring].vr->next;
	const bool behind = places[ring].wrap != !!(next & PACKED_WRAP); /* the device is in the lap before */
	uint32_t room = NUM - (places[ring].slot + (behind ? NUM : 0) - packed_slot(next));

	while (room >= 2) {
		const uint32_t n = places[ring].slot % 4 == 1 ? 2 : 1;
		const uint16_t avail = (uint16_t)(places[ring].wrap ? PACKED_AVAIL : PACKED_USED);

		for (uint32_t i = n; i--;) {
			const uint32_t slot = places[ring].slot + i;
			struct vring_packed_desc desc = good_desc(ring, slot);

			desc.flags |= avail;
			right[ring][slot] = desc;
			*desc_at(ring, slot) = desc;
		}
		room -= n;
		places[ring].slot += n;
		if (places[ring].slot == NUM) {
			places[ring].slot = 0;
			places[ring].wrap = !places[ring].wrap;
		}
	}
}

static void *flipper(void *arg)
{
	uint64_t state = *(uint64_t *)arg, focus = 0;
	uint8_t *data = (uint8_t *)(uintptr_t)f.hostile.regions[RINGS * PARTS + 2].host;

	while (!load_once(&done)) {
		const uint64_t r = next_random(&state);
		struct vring_packed_desc *desc, good;
		uint32_t ring, i;

		if (flips % 256 == 0)
			focus = r;
		ring = focus % RINGS;
		i = (uint32_t)(focus >> 8) % NUM;
		desc = desc_at(ring, i);
		good = right[ring][i];
		if ((focus >> 16) % 4 == 0) { /* an entry of a table */
			i |= 3;
			desc = (struct vring_packed_desc *)(void *)(data + i * PAGE + TABLES + 64 * ring) + (focus >> 12 & 1);
			good = *desc;
			if (good.addr - data_at[2].gpa >= NUM * PAGE || good.len > 1024) /* somebody's flip, or a frame */
				good = (struct vring_packed_desc){data_at[2].gpa + i * PAGE, 100, 0, good.flags & VRING_DESC_F_WRITE};
		}
		switch ((focus >> 20) % 5) {
		case 0:
			FLIP(desc->addr, wrong_addrs[r % ARRAY_SIZE(wrong_addrs)], good.addr);
			break;
		case 1:
			FLIP(desc->len, wrong_lens[r % ARRAY_SIZE(wrong_lens)], good.len);
			break;
		case 2:
			FLIP(desc->id, r, good.id);
			break;
		default:
			FLIP(desc->flags, good.flags ^ (1u + r % 7), good.flags);
		}
		count(flips, 1);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	uint64_t turns = argc > 1 ? strtoull(argv[1], NULL, 0) : 20000, seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 23;
	uint64_t faults[XV_FAULT_MAX] = {0}, state = seed * 2654435761u + 1;
	pthread_t thread;

	fuzz_init();
	hostile_start(FEATURES | BIT(VIRTIO_F_RING_PACKED) | BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_MRG_RXBUF) |
			      BIT(VIRTIO_NET_F_CTRL_RX) | BIT(VIRTIO_NET_F_MQ),
		      NUM, 0, false);
	for (uint32_t ring = 0; ring < RINGS; ring++) {
		places[ring].wrap = true;
		lay_out(ring);
		offer(ring);
	}
	CHECK_EQ(pthread_create(&thread, NULL, flipper, &state), 0);
	for (uint64_t i = 0; i < turns; i++) {
		race_frames(i);
		race_turn(i);
		if (f.hostile.guest->fault.code != XV_FAULT_NONE) {
			faults[f.hostile.guest->fault.code]++;
			for (uint32_t ring = 0; ring < RINGS; ring++) { /* the driver begins anew as well */
				memset(desc_at(ring, 0), 0, NUM * sizeof(struct vring_packed_desc));
				places[ring].slot = 0;
				places[ring].wrap = true;
				xv_guest_reset(f.hostile.guest);
			}
			hostile_disconnect();
			for (uint32_t ring = 0; ring < RINGS; ring++)
				f.hostile.base[ring] = 0x80008000u;
			hostile_rings();
		}
		for (uint32_t ring = 0; ring < RINGS; ring++)
			offer(ring);
		check_umem();
	}
	race_report(turns, faults);
	store_once(&done, true);
	pthread_join(thread, NULL);
	hostile_stop();
	return 0;
}
