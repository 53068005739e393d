/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A token bucket: so many units a second on average, so many at once.
 *
 * What has come in since the beginning is a function of time alone (bucket_earned()), and what has gone out is one word,
 * moved by compare-and-exchange. So any number of workers may take from one bucket without a lock, and none of them takes
 * what another has taken. A bucket that is full earns nothing: `spent` then lags behind, and is brought up when it is next
 * looked at.
 *
 * Whoever finds anything in the bucket may go, and what does not fit is owed: a frame larger than the burst gets through,
 * a large one is not starved by small ones of another ring, and the average holds all the same.
 *
 * Both words may wrap. They are never further apart than 2 * BUCKET_MOST, unless the bucket has been full for long; after
 * half a year at the highest rate, or centuries at a usual one, that could look like a debt, of a few seconds at most.
 */
#ifndef XV_BUCKET_H
#define XV_BUCKET_H

#include "base.h"

#define BUCKET_SHIFT 48u
#define BUCKET_MOST (1ull << 40) /* units a second, and units at once: a million million is no limit to anybody */

struct bucket {
	uint64_t spent;        /* the only word that changes */
	uint64_t mult;         /* units a cycle, in 2^-BUCKET_SHIFT */
	uint64_t burst, epoch; /* epoch: in cycles, when nothing had been earned */
	struct xv_bucket_conf conf;
} __attribute__((aligned(64)));

/* Units that have come in until now. */
static inline uint64_t bucket_earned(const struct bucket *b, uint64_t now)
{
	return (uint64_t)((unsigned __int128)(now - b->epoch) * b->mult >> BUCKET_SHIFT);
}

/* Units that are missing until it is full; more than `burst`: it owes. */
static inline uint64_t bucket_missing(uint64_t spent, uint64_t earned)
{
	const uint64_t ahead = spent - earned;

	return ahead <= 2 * BUCKET_MOST ? ahead : 0;
}

/*
 * Take for items of these sizes, in order, until the bucket is empty: how many of them may go. The last one may take more
 * than there is.
 */
static inline uint32_t bucket_take(struct bucket *b, uint64_t now, const uint32_t *sizes, uint32_t n)
{
	const uint64_t earned = bucket_earned(b, now);
	uint64_t spent = load_once(&b->spent), missing;
	uint32_t taken;

	do {
		missing = bucket_missing(spent, earned);
		for (taken = 0; taken < n && missing < b->burst; taken++)
			missing += sizes[taken];
		if (!taken)
			return 0;
	} while (!__atomic_compare_exchange_n(&b->spent, &spent, earned + missing, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
	return taken;
}

/* Give back what was taken for something that did not go. */
static inline void bucket_give(struct bucket *b, uint64_t units)
{
	__atomic_fetch_sub(&b->spent, units, __ATOMIC_RELAXED);
}

/* Cycles until it holds this many units, which are no more than its burst; 0: it does. */
static inline uint64_t bucket_wait(const struct bucket *b, uint64_t now, uint64_t units)
{
	const uint64_t missing = bucket_missing(load_once(&b->spent), bucket_earned(b, now)) + units;

	if (missing <= b->burst)
		return 0;
	return (uint64_t)(((unsigned __int128)(missing - b->burst) << BUCKET_SHIFT) / b->mult) + 1;
}

/* Make one: full, or in the place of `old`, with what that one holds, but owing nothing. conf->rate is not 0. */
static inline void bucket_init(struct bucket *b, const struct xv_bucket_conf *conf, const struct bucket *old,
			       uint64_t cycles_per_us, uint64_t now)
{
	const uint64_t second = MAX(cycles_per_us, 1u) * 1000000u;
	uint64_t missing = 0;

	b->conf = *conf;
	b->burst = MIN(MAX(conf->burst, 1u), BUCKET_MOST);
	b->mult = MAX((uint64_t)(((unsigned __int128)MIN(conf->rate, BUCKET_MOST) << BUCKET_SHIFT) / second), 1u);
	b->epoch = now - second; /* a worker's clock may be a little behind */
	if (old) {
		const uint64_t was = bucket_missing(load_once(&old->spent), bucket_earned(old, now));
		const uint64_t left = old->burst - MIN(was, old->burst);

		missing = b->burst - MIN(left, b->burst);
	}
	b->spent = bucket_earned(b, now) + missing;
}

/*
 * One of a guest's limits. It outlives snapshots: a bucket whose settings change is made anew in the other place, while
 * workers still take from the one that is in force.
 */
struct limit {
	struct bucket room[2];
	struct bucket *in_force; /* one of them, or NULL: there has been no limit yet */
};

/* Control's, while it publishes: the bucket for these settings, NULL if they are no limit. */
static inline struct bucket *limit_set(struct limit *limit, const struct xv_bucket_conf *conf, uint64_t cycles_per_us,
				       uint64_t now)
{
	struct bucket *old = limit->in_force, *b;

	if (!conf->rate)
		return NULL;
	if (old && old->conf.rate == conf->rate && old->conf.burst == conf->burst)
		return old;
	b = old == &limit->room[0] ? &limit->room[1] : &limit->room[0];
	bucket_init(b, conf, old, cycles_per_us, now);
	limit->in_force = b;
	return b;
}

#endif
