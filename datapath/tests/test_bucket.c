// SPDX-License-Identifier: Apache-2.0
/* Token buckets: exact at any rate, over any time, and for any number of takers. The clock is the test's. */
#include "harness.h"

#include "../src/bucket.h"

#define US 2100u /* cycles */
#define SECOND (1000000ull * US)

static uint64_t now = 123456789;

static struct bucket make(uint64_t rate, uint64_t burst)
{
	const struct xv_bucket_conf conf = {rate, burst};
	struct bucket b;

	bucket_init(&b, &conf, NULL, US, now);
	return b;
}

/* Units that go in `seconds`, by somebody who wants more all the time and looks every `step` cycles. */
static uint64_t drain(struct bucket *b, uint32_t size, uint64_t seconds, uint64_t step)
{
	const uint64_t end = now + seconds * SECOND;
	uint32_t sizes[XV_BURST], taken;
	uint64_t sum = 0;

	for (uint32_t i = 0; i < XV_BURST; i++)
		sizes[i] = size;
	for (; (int64_t)(end - now) > 0; now += step)
		while ((taken = bucket_take(b, now, sizes, XV_BURST)))
			sum += (uint64_t)taken * size;
	return sum;
}

static void check_near(uint64_t got, uint64_t want, uint64_t slack)
{
	if (got + slack < want || got > want + slack) {
		fprintf(stderr, "%llu units, not %llu +- %llu\n", (unsigned long long)got, (unsigned long long)want,
			(unsigned long long)slack);
		exit(1);
	}
}

static void test_rates(void)
{
	static const struct {
		uint64_t rate, burst;
		uint32_t size;
		uint64_t seconds, step;
	} cases[] = {
		{1, 1, 1, 1000, SECOND / 10},                  /* a frame a second */
		{1, 10, 1, 1000, SECOND / 3},
		{23, 5, 1, 100, SECOND / 1000},
		{125000, 2000, 1514, 100, SECOND / 1000},      /* 1 Mbit/s */
		{125000000, 1000000, 1514, 10, SECOND / 1000}, /* 1 Gbit/s */
		{12500000000, 50000000, 1514, 1, SECOND / 1000}, /* 100 Gbit/s */
		{12500000000, 50000000, 65549, 1, SECOND / 1000},
		{125000000, 9000, 65549, 10, SECOND / 100000}, /* frames larger than the burst */
	};

	for (uint32_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct bucket b = make(cases[i].rate, cases[i].burst);
		const uint64_t got = drain(&b, cases[i].size, cases[i].seconds, cases[i].step);
		const uint64_t want = cases[i].burst + cases[i].rate * cases[i].seconds;

		/* a hundredth, and what one frame is beyond, or one unit that was not whole when time was up */
		check_near(got, want, cases[i].rate * cases[i].seconds / 100 + cases[i].size);
	}
}

/* Two seconds, two hours, two years: full, and not more than that; then the rate as before. */
static void test_idle(void)
{
	static const uint64_t idle[] = {2, 7200, 63072000};

	for (uint32_t i = 0; i < ARRAY_SIZE(idle); i++) {
		struct bucket b = make(12500000000, 1000000);

		drain(&b, 1000, 1, SECOND / 1000);
		now += idle[i] * SECOND;
		check_near(drain(&b, 1000, 1, SECOND / 20000), 1000000 + 12500000000, 12500000000 / 100);
	}
}

/* The words wrap: the clock, and what was earned. */
static void test_wrap(void)
{
	struct bucket b;

	now = UINT64_MAX - SECOND / 2;
	b = make(1000, 100);
	check_near(drain(&b, 1, 1, SECOND / 100), 1100, 12);
	CHECK(now < SECOND);

	/* as if it had earned nearly all that the word holds, in 47 years */
	b = make(12500000000, 1000000);
	b.epoch -= (uint64_t)(((unsigned __int128)(UINT64_MAX - 20000000000) << BUCKET_SHIFT) / b.mult);
	b.spent = bucket_earned(&b, now);
	CHECK(b.spent > UINT64_MAX - 10000000000);
	check_near(drain(&b, 1000, 1, SECOND / 20000), 12501000000, 125000000);
	CHECK(b.spent < 10000000000);
}

/* The settings go up to what the words hold, and mean no limit then. */
static void test_extremes(void)
{
	const uint32_t size = 65549;
	struct bucket b = make(UINT64_MAX, UINT64_MAX);

	for (int i = 0; i < 1000; i++)
		CHECK_EQ(bucket_take(&b, now, &size, 1), 1);
	b = make(1, 0); /* holds one unit all the same */
	CHECK_EQ(bucket_take(&b, now, &size, 1), 1);
	CHECK_EQ(bucket_take(&b, now + 65000 * SECOND, &size, 1), 0); /* and the rest of the frame is owed */
	CHECK_EQ(bucket_take(&b, now + 65560 * SECOND, &size, 1), 1);
}

static void test_order_and_debt(void)
{
	const uint32_t sizes[5] = {400, 400, 400, 400, 400};
	struct bucket b = make(1000, 1000);

	CHECK_EQ(bucket_take(&b, now, sizes, 5), 3); /* the third takes 200 more than there is */
	CHECK_EQ(bucket_take(&b, now, sizes, 1), 0);
	CHECK_EQ(bucket_take(&b, now + SECOND * 199 / 1000, sizes, 1), 0);
	CHECK_EQ(bucket_take(&b, now + SECOND * 202 / 1000, sizes, 2), 1);
	bucket_give(&b, 400);
	CHECK_EQ(bucket_take(&b, now + SECOND * 202 / 1000, sizes, 2), 1);
	CHECK_EQ(bucket_take(&b, now + SECOND * 202 / 1000, sizes, 2), 0);
	/* given back to a bucket that is full: nothing is won */
	b = make(1000, 1000);
	bucket_give(&b, 5000);
	CHECK_EQ(bucket_take(&b, now, sizes, 5), 3);
}

/* When to come again: not before, and not much later. */
static void test_wait(void)
{
	const uint32_t size = 1500;
	struct bucket b = make(125000, 3000);

	CHECK_EQ(bucket_wait(&b, now, 1), 0);
	CHECK_EQ(bucket_wait(&b, now, 3000), 0);
	CHECK_EQ(bucket_take(&b, now, &size, 1), 1);
	CHECK_EQ(bucket_take(&b, now, &size, 1), 1);
	for (uint64_t level = 1; level <= 3000; level += 1499) {
		const uint64_t wait = bucket_wait(&b, now, level);

		check_near(wait, SECOND / 125000 * level, SECOND / 125000);
		CHECK_EQ(bucket_wait(&b, now + wait, level), 0);
		CHECK(bucket_wait(&b, now + wait - SECOND / 125000 - 1, level) > 0);
	}
	CHECK_EQ(bucket_take(&b, now + bucket_wait(&b, now, 1), &size, 1), 1);
}

/* A limit that changes: nothing is won by it, a debt is forgiven, and the old bucket stays as long as it is in force. */
static void test_changes(void)
{
	const struct xv_bucket_conf slow = {100, 1000}, fast = {1000000, 500}, none = {0, 1000};
	struct limit limit = {.in_force = NULL};
	const uint32_t sizes[4] = {300, 300, 300, 5000};
	struct bucket *b = limit_set(&limit, &slow, US, now), *other;

	CHECK_EQ(bucket_take(b, now, sizes, 2), 2);
	CHECK(limit_set(&limit, &slow, US, now) == b); /* published again: what was spent is spent */
	CHECK_EQ(b->burst - bucket_missing(b->spent, bucket_earned(b, now)), 400);
	other = limit_set(&limit, &fast, US, now);
	CHECK(other != b);
	CHECK_EQ(other->burst - bucket_missing(other->spent, bucket_earned(other, now)), 400);
	CHECK_EQ(bucket_take(b, now, sizes, 1), 1); /* by a worker that has not seen the new one */
	CHECK_EQ(bucket_take(other, now, sizes + 3, 1), 1);
	CHECK_EQ(bucket_take(other, now, sizes, 1), 0); /* owes 4600 */
	b = limit_set(&limit, &slow, US, now);
	CHECK_EQ(bucket_missing(b->spent, bucket_earned(b, now)), b->burst);
	CHECK(!limit_set(&limit, &none, US, now));
	CHECK(limit_set(&limit, &slow, US, now) == b);
}

/* ---- several takers at once ---- */

#define TAKERS 4
#define LOOKS 200000u

static struct bucket shared;

static void *taker(void *arg)
{
	const uint32_t sizes[3] = {64, 1514, 700};
	uint64_t *sum = arg;

	for (uint32_t i = 0; i < LOOKS; i++) {
		const uint32_t n = bucket_take(&shared, now + i, sizes, 3);

		*sum += n == 3 ? 2278 : n == 2 ? 1578 : n == 1 ? 64 : 0;
		if (n == 3 && i % 2) {
			bucket_give(&shared, 700);
			*sum -= 700;
		}
	}
	return NULL;
}

/* What they took together is what is missing: not a unit more or less. */
static void test_contention(void)
{
	pthread_t threads[TAKERS];
	uint64_t sums[TAKERS] = {0}, sum = 0;

	shared = make(1, BUCKET_MOST); /* 200,000 cycles earn nothing */
	for (int i = 0; i < TAKERS; i++)
		CHECK(!pthread_create(&threads[i], NULL, taker, &sums[i]));
	for (int i = 0; i < TAKERS; i++) {
		CHECK(!pthread_join(threads[i], NULL));
		sum += sums[i];
	}
	CHECK_EQ(bucket_missing(shared.spent, bucket_earned(&shared, now)), sum);

	shared = make(1, 1000000);
	memset(sums, 0, sizeof(sums));
	sum = 0;
	for (int i = 0; i < TAKERS; i++)
		CHECK(!pthread_create(&threads[i], NULL, taker, &sums[i]));
	for (int i = 0; i < TAKERS; i++) {
		CHECK(!pthread_join(threads[i], NULL));
		sum += sums[i];
	}
	CHECK(sum >= 1000000 && sum < 1000000 + 1514); /* the burst, and what the last frame was beyond */
}

int main(void)
{
	test_rates();
	test_idle();
	test_wrap();
	test_extremes();
	test_order_and_debt();
	test_wait();
	test_changes();
	test_contention();
	puts("ok");
	return 0;
}
