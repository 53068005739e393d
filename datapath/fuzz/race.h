/* SPDX-License-Identifier: Apache-2.0 */
/* What the two race probes share: random numbers, and words that are wrong for a moment. */
#ifndef XV_RACE_H
#define XV_RACE_H

#include <pthread.h>

#include "fuzz.h"

#define NUM 16u
#define PAGE 4096u
#define TABLES 3072u /* in a page: behind the buffers of the three rings */
#define FLIPS 8u /* at least, between two turns */

static bool done;
static uint64_t flips;

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Write what is wrong, and a moment later what is right. `r`: random, its uppermost bits are the moment. */
#define FLIP(word, wrong, right)                                    \
	do {                                                        \
		store_once(&(word), (__typeof__(word))(wrong));     \
		for (uint64_t spin_ = r >> 60; spin_; spin_--)      \
			cpu_relax();                                \
		store_once(&(word), (__typeof__(word))(right));     \
	} while (0)

static const uint64_t wrong_addrs[] = {0,      0ull - 8, 0x102000 + 4099 - 8, 0x200000 + 70003 - 1, RING_GPA + 16 * NUM - 4,
				       RING_GPA, 0x101ff0};
static const uint32_t wrong_lens[] = {0, 1, 12, 16, 26, 48, 256, 40000, 65536, 0x7fffffff, 0xffffffff};

/* A frame for the hostile guest from the NIC and from another guest, in the i-th turn. */
static void race_frames(uint64_t i)
{
	const struct virtio_net_hdr hdr = {.flags = i & 1, .csum_start = 34, .csum_offset = 16}; /* to be finished, or not */
	uint8_t frame[1514];

	make_frame(frame, sizeof(frame), hostile_mac, f.peer[0].mac, (uint8_t)i);
	peer_send(&f.peer[0], &hdr, frame, (uint32_t)(64 + i * 11 % 1400));
	nic_receive(&f.nic, frame, (uint32_t)(64 + i * 7 % 1400));
}

/* Also where both threads share a CPU something has changed since the last turn. */
static void race_turn(uint64_t i)
{
	for (uint64_t before = load_once(&flips); load_once(&flips) - before < FLIPS;)
		sched_yield();
	turn();
	if (i % 16 == 0)
		ping();
}

static void race_report(uint64_t turns, const uint64_t *faults)
{
	printf("%llu turns, %llu flips, %llu bytes from the guest, %llu to it; faults:", (unsigned long long)turns,
	       (unsigned long long)flips, (unsigned long long)f.hostile.guest->queues[0].tx.bytes,
	       (unsigned long long)f.hostile.guest->queues[0].rx.bytes);
	for (uint32_t i = 1; i < XV_FAULT_MAX; i++)
		printf(" %llu", (unsigned long long)faults[i]);
	puts("");
}

#endif
