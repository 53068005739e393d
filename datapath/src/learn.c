// SPDX-License-Identifier: Apache-2.0
#include "learn.h"

#include <stdlib.h>

#define WAYS 8u
#define FREE 0u /* no source address is all zeros */
#define DENIED (1ull << 63) /* in line.used: it is here only so that it is not learned again */
#define COARSE_CYCLES (1u << 20) /* some 400 us: closer together, uses are not noted */

struct line {
	uint64_t key[WAYS];
	uint64_t used[WAYS]; /* when, in cycles; or when it was denied, and DENIED */
} __attribute__((aligned(64)));

struct learned {
	uint32_t most, mask; /* mask + 1 lines */
	uint32_t nr;         /* atomic: workers add, control takes away */
	struct spinlock adding;
	struct line lines[];
};

/* One of the two lines that an address may be in. */
static struct line *line_of(struct learned *table, uint64_t key, uint32_t which)
{
	uint64_t hash = key * 0x9e3779b97f4a7c15ull;

	hash = (hash ^ hash >> 32) * 0x9e3779b97f4a7c15ull; /* every byte of the address counts in both parts */
	return &table->lines[(which ? hash >> 52 : hash >> 40) & table->mask];
}

static uint64_t *find(struct learned *table, uint64_t key, uint64_t **used)
{
	if (unlikely(key == FREE))
		return NULL;
	for (uint32_t which = 0; which < 2; which++) {
		struct line *line = line_of(table, key, which);

		for (uint32_t i = 0; i < WAYS; i++) {
			/* acquire pairs with the release in add(): the time is that key's */
			if (load_acquire(&line->key[i]) == key) {
				*used = &line->used[i];
				return &line->key[i];
			}
		}
	}
	return NULL;
}

static uint32_t taken_in(const struct line *line)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < WAYS; i++)
		n += load_once(&line->key[i]) != FREE;
	return n;
}

/* The lock is held, or the table is nobody else's yet. False: no room in either line. */
static bool add(struct learned *table, uint64_t key, uint64_t now)
{
	struct line *line = line_of(table, key, 0), *other = line_of(table, key, 1);

	if (taken_in(other) < taken_in(line))
		line = other;
	for (uint32_t i = 0; i < WAYS; i++) {
		if (load_once(&line->key[i]) != FREE)
			continue;
		store_once(&line->used[i], now);
		__atomic_fetch_add(&table->nr, 1u, __ATOMIC_RELAXED);
		store_release(&line->key[i], key);
		return true;
	}
	return false;
}

struct learned *learned_new(uint32_t most, const struct learned *old)
{
	struct learned *table;
	uint32_t lines = 1;
	size_t size;

	while (lines * WAYS < 4 * most)
		lines *= 2;
	size = sizeof(*table) + lines * sizeof(table->lines[0]);
	table = aligned_alloc(64, ALIGN_UP(size, 64));
	if (!table)
		return NULL;
	memset(table, 0, size);
	table->most = most;
	table->mask = lines - 1;
	for (uint32_t l = 0; old && l <= old->mask; l++) {
		for (uint32_t i = 0; i < WAYS; i++) {
			const uint64_t key = load_acquire(&old->lines[l].key[i]);

			if (key != FREE && table->nr < most)
				add(table, key, load_once(&old->lines[l].used[i]));
		}
	}
	return table;
}

void learned_free(struct learned *table)
{
	free(table);
}

uint64_t learned_bytes(const struct learned *table)
{
	return sizeof(*table) + ((uint64_t)table->mask + 1) * sizeof(table->lines[0]);
}

uint32_t learned_most(const struct learned *table)
{
	return table->most;
}

static cold enum learning learn(struct learned *table, uint64_t key, uint64_t now)
{
	enum learning result = LEARN_FULL;
	uint64_t *used;

	spin_lock(&table->adding);
	if (find(table, key, &used))
		result = LEARN_KNOWN; /* by another worker, a moment ago */
	else if (load_once(&table->nr) < table->most && add(table, key, now))
		result = LEARN_NEW;
	spin_unlock(&table->adding);
	return result;
}

enum learning learned_use(struct learned *table, uint64_t key, uint64_t now, bool may_add)
{
	uint64_t *used;

	if (likely(find(table, key, &used))) {
		uint64_t was = load_once(used);

		if (unlikely(was & DENIED))
			return LEARN_FULL;
		if (now - was > COARSE_CYCLES) /* not over what control has written meanwhile */
			__atomic_compare_exchange_n(used, &was, now & ~DENIED, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
		return LEARN_KNOWN;
	}
	if (!may_add || key == FREE || load_once(&table->nr) >= table->most)
		return LEARN_FULL;
	return learn(table, key, now);
}

void learned_forget(struct learned *table, uint64_t key)
{
	uint64_t *used, *at = find(table, key, &used);

	if (!at)
		return;
	store_release(at, (uint64_t)FREE); /* nobody else changes a key that is there */
	__atomic_fetch_sub(&table->nr, 1u, __ATOMIC_RELAXED);
}

void learned_deny(struct learned *table, uint64_t key, uint64_t now)
{
	uint64_t *used;

	if (find(table, key, &used))
		__atomic_store_n(used, now | DENIED, __ATOMIC_RELAXED); /* the key stays: only control takes keys away */
}

uint32_t learned_list(const struct learned *table, uint64_t now, uint64_t cycles_per_us, struct xv_learned *out, uint32_t n)
{
	uint32_t nr = 0;

	for (uint32_t l = 0; l <= table->mask; l++) {
		for (uint32_t i = 0; i < WAYS; i++) {
			const uint64_t key = load_acquire(&table->lines[l].key[i]);
			const uint64_t used = load_once(&table->lines[l].used[i]);
			const int64_t idle = (int64_t)(now - (used & ~DENIED));

			if (key == FREE)
				continue;
			if (nr < n) {
				out[nr] = (struct xv_learned){
					.vlan = (uint16_t)(key >> 48),
					.idle_ms = (uint32_t)MIN((uint64_t)MAX(idle, 0) / (1000 * MAX(cycles_per_us, 1u)),
								 (uint64_t)UINT32_MAX),
					.denied = !!(used & DENIED),
				};
				memcpy(out[nr].mac, &key, 6);
			}
			nr++;
		}
	}
	return nr;
}
