// SPDX-License-Identifier: Apache-2.0
/*
 * Probe for double fetches: a guest that changes its rings while the device reads them.
 *
 * One thread runs turns of the worker, with frames in all directions. Another flips, as fast as it can, words of the
 * hostile guest's descriptors, indirect tables, available rings and frames to a value that must be refused and back to
 * one that is fine, so that a word read twice may have been checked as one and be used as the other. Regions are of
 * exactly their size (fuzz.h), so AddressSanitizer stops the program where that happens. A guest that was caught is
 * connected again.
 *
 *     race [turns [seed]]
 */
#include "race.h"

/*
 * What lies in slot i when nobody has just flipped it: one descriptor, a chain of two, or a table of two. Buffers and
 * tables of each slot have a page of their own.
 */
static struct vring_desc good_desc(uint32_t ring, uint32_t i)
{
	const uint64_t page = data_at[2].gpa + i * PAGE, buffer = page + ring * 1024;
	const uint16_t way = ring == RX ? VRING_DESC_F_WRITE : 0, last = ring == TX ? 0 : VRING_DESC_F_WRITE;

	switch (i % 4) {
	case 0:
		return (struct vring_desc){buffer, 900, way, 0};
	case 1:
		return (struct vring_desc){buffer, 32, way | VRING_DESC_F_NEXT, (uint16_t)(i + 1)};
	case 2:
		return (struct vring_desc){buffer + 32, 600, last, 0};
	default:
		return (struct vring_desc){page + TABLES + 64 * ring, 32, VRING_DESC_F_INDIRECT, 0};
	}
}

static struct vring_desc good_entry(uint32_t ring, uint32_t i, uint32_t entry)
{
	const uint64_t buffer = data_at[2].gpa + i * PAGE + ring * 1024;

	if (entry)
		return (struct vring_desc){buffer + 16, 700, ring == TX ? 0 : VRING_DESC_F_WRITE, 0};
	return (struct vring_desc){buffer, 14, VRING_DESC_F_NEXT | (ring == RX ? VRING_DESC_F_WRITE : 0), 1};
}

static uint16_t good_head(uint64_t r)
{
	static const uint8_t heads[] = {0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15};

	return heads[r % ARRAY_SIZE(heads)];
}

static void lay_out(void)
{
	struct hostile *h = &f.hostile;

	for (uint32_t ring = 0; ring < RINGS; ring++) {
		for (uint32_t i = 0; i < NUM; i++) {
			uint8_t bytes[HEADER + ETH_HEADER] = {0};

			h->ring[ring].desc[i] = good_desc(ring, i);
			h->ring[ring].avail->ring[i] = good_head(i);
			for (uint32_t e = 0; e < 2; e++) {
				struct vring_desc entry = good_entry(ring, i, e);

				hostile_write(data_at[2].gpa + i * PAGE + TABLES + 64 * ring + 16 * e, &entry, sizeof(entry));
			}
			make_frame(bytes + HEADER, ETH_HEADER, i % 3 ? f.peer[i % 3 - 1].mac : nobody, hostile_mac, 0);
			hostile_write(good_desc(ring, i).addr, bytes, ring == TX && i % 4 != 3 ? sizeof(bytes) : 0);
		}
	}
}

static void flip_desc(struct vring_desc *desc, struct vring_desc right, uint32_t field, uint64_t r)
{
	switch (field % 4) {
	case 0:
		FLIP(desc->addr, wrong_addrs[r % ARRAY_SIZE(wrong_addrs)], right.addr);
		break;
	case 1:
		FLIP(desc->len, wrong_lens[r % ARRAY_SIZE(wrong_lens)], right.len);
		break;
	case 2:
		FLIP(desc->flags, right.flags ^ (1u + r % 7), right.flags);
		break;
	default:
		FLIP(desc->next, r % 2 ? r / 2 % NUM : r / 2, right.next);
	}
}

/* Make more buffers available; now and then with an index that lies. */
static void move_on(struct ring *ring, uint64_t r)
{
	if ((uint16_t)(ring->avail->idx - load_once(&ring->used->idx)) < NUM)
		store_once(&ring->avail->idx, (uint16_t)(ring->avail->idx + 1));
	else if (!(r & 0xffff))
		FLIP(ring->avail->idx, r >> 16, ring->avail->idx);
}

static void *flipper(void *arg)
{
	uint64_t state = *(uint64_t *)arg, focus = 0;
	struct hostile *h = &f.hostile;
	uint8_t *data = (uint8_t *)(uintptr_t)h->regions[RINGS * PARTS + 2].host;

	while (!load_once(&done)) {
		uint64_t r = next_random(&state);
		uint32_t index, i, e, field;
		struct ring *ring;
		uint8_t *byte;

		/* one word for a while: the time between two reads of it is a few nanoseconds */
		if (flips % 256 == 0)
			focus = r;
		index = focus % RINGS;
		i = (uint32_t)(focus >> 8) % NUM;
		e = focus >> 12 & 1;
		field = (uint32_t)(focus >> 20);
		ring = &h->ring[index];
		byte = data + i * PAGE + field % (HEADER + 18);
		switch ((focus >> 16) % 8) {
		case 0:
			FLIP(ring->avail->ring[i], r & 1 ? r >> 33 : 2, good_head(r >> 20));
			break;
		case 1: /* what a frame and its header say */
			FLIP(*byte, r >> 32, load_once(byte));
			break;
		case 2:
		case 3:
			i |= 3;
			flip_desc((struct vring_desc *)(void *)(data + i * PAGE + TABLES + 64 * index + 16 * e),
				  good_entry(index, i, e), field, r);
			break;
		default:
			flip_desc(&ring->desc[i], good_desc(index, i), field, r);
		}
		if (r >> 8 & 1)
			move_on(&h->ring[r % RINGS], r >> 9);
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
	hostile_start(FEATURES | BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_NET_F_CTRL_RX) |
			      BIT(VIRTIO_NET_F_MQ),
		      NUM, 0, false);
	lay_out();
	CHECK_EQ(pthread_create(&thread, NULL, flipper, &state), 0);
	for (uint64_t i = 0; i < turns; i++) {
		race_frames(i);
		race_turn(i);
		if (f.hostile.guest->fault.code != XV_FAULT_NONE) {
			struct hostile *h = &f.hostile;

			faults[h->guest->fault.code]++;
			/* the flipper reads only memory and `num`, never the vrings */
			for (uint32_t r = 0; r < RINGS; r++)
				store_once(&h->ring[r].avail->idx, load_once(&h->ring[r].used->idx));
			hostile_restart();
		}
		check_umem();
	}
	race_report(turns, faults);
	store_once(&done, true);
	pthread_join(thread, NULL);
	hostile_stop();
	return 0;
}
