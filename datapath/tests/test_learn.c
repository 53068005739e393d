// SPDX-License-Identifier: Apache-2.0
/* The table of learned addresses: bounded in what it holds and in what a look costs, whoever looks, adds and forgets. */
#include "harness.h"

#include "../src/learn.h"

#define MS (1000ull * 2100) /* cycles, at 2100 a microsecond */

static uint64_t key_of(uint32_t number, uint16_t vlan)
{
	const uint8_t mac[6] = {2, 0, (uint8_t)(number >> 24), (uint8_t)(number >> 16), (uint8_t)(number >> 8), (uint8_t)number};

	return mac_key(mac, vlan);
}

static uint32_t listed(const struct learned *table, uint64_t now, struct xv_learned *out)
{
	return learned_list(table, now, 2100, out, XV_MAX_LEARNED);
}

/* As many as it may, and not one more; whatever size, and addresses that come in a row or at random. */
static void test_bound(void)
{
	static const uint32_t sizes[] = {1, 2, 3, 7, 8, 9, 16, 17, 100, 1000, XV_MAX_LEARNED};

	for (uint32_t s = 0; s < ARRAY_SIZE(sizes); s++) {
		for (uint32_t step = 1; step; step = step == 1 ? 256 : step == 256 ? 0x9e3779b1u : 0) {
			struct learned *table = learned_new(sizes[s], NULL);
			struct xv_learned out[XV_MAX_LEARNED];

			CHECK(table);
			for (uint32_t i = 0; i < sizes[s]; i++)
				CHECK_EQ(learned_use(table, key_of(i * step, 0), 1, true), LEARN_NEW);
			for (uint32_t i = 0; i < 3 * sizes[s]; i++)
				CHECK_EQ(learned_use(table, key_of(i * step, 0), 1, true), i < sizes[s] ? LEARN_KNOWN : LEARN_FULL);
			CHECK_EQ(listed(table, 1, out), sizes[s]);
			CHECK_EQ(learned_list(table, 1, 2100, NULL, 0), sizes[s]);
			learned_free(table);
		}
	}
}

/* The same address in two VLANs is two; and the time since it was used is told. */
static void test_list(void)
{
	struct learned *table = learned_new(8, NULL);
	struct xv_learned out[XV_MAX_LEARNED];
	uint32_t seen = 0;

	CHECK_EQ(learned_use(table, key_of(0x01020304, 0), 1000 * MS, true), LEARN_NEW);
	CHECK_EQ(learned_use(table, key_of(0x01020304, 23), 2000 * MS, true), LEARN_NEW);
	CHECK_EQ(learned_use(table, key_of(5, XV_VLAN_ANY), 2500 * MS, false), LEARN_FULL);
	CHECK_EQ(learned_use(table, key_of(0x01020304, 23), 2500 * MS, false), LEARN_KNOWN);
	CHECK_EQ(listed(table, 5000 * MS, out), 2);
	for (int i = 0; i < 2; i++) {
		CHECK(!memcmp(out[i].mac, (uint8_t[]){2, 0, 1, 2, 3, 4}, 6));
		CHECK_EQ(out[i].idle_ms, out[i].vlan ? 2500 : 4000);
		seen |= 1u << out[i].vlan;
	}
	CHECK_EQ(seen, 1u | 1u << 23);
	listed(table, 1000 * MS, out); /* a clock that is behind */
	CHECK_EQ(out[0].vlan ? out[0].idle_ms : out[1].idle_ms, 0);
	learned_free(table);
}

static void test_forget(void)
{
	struct learned *table = learned_new(64, NULL);

	for (uint32_t i = 0; i < 64; i++)
		learned_use(table, key_of(i, 1), 1, true);
	learned_forget(table, key_of(100, 1)); /* is not there */
	learned_forget(table, key_of(3, 2));
	learned_forget(table, 0);
	CHECK_EQ(learned_use(table, 0, 1, true), LEARN_FULL); /* no address */
	for (uint32_t i = 0; i < 64; i += 2) {
		learned_forget(table, key_of(i, 1));
		learned_forget(table, key_of(i, 1));
	}
	for (uint32_t i = 0; i < 64; i++)
		CHECK_EQ(learned_use(table, key_of(i, 1), 1, false), i % 2 ? LEARN_KNOWN : LEARN_FULL);
	for (uint32_t i = 1000; i < 1032; i++) /* their places are free again */
		CHECK_EQ(learned_use(table, key_of(i, 1), 1, true), LEARN_NEW);
	CHECK_EQ(learned_use(table, key_of(2000, 1), 1, true), LEARN_FULL);
	learned_forget(table, key_of(1000, 1));
	CHECK_EQ(learned_use(table, 0, 1, true), LEARN_FULL);
	learned_free(table);
}

/* A denied address keeps its place, is not used whoever sends from it, and is learned anew only after it is forgotten. */
static void test_deny(void)
{
	struct learned *table = learned_new(2, NULL), *larger;
	struct xv_learned out[XV_MAX_LEARNED];

	learned_use(table, key_of(1, 0), MS, true);
	learned_use(table, key_of(2, 0), MS, true);
	learned_deny(table, key_of(1, 0), 1000 * MS);
	learned_deny(table, key_of(3, 0), 1000 * MS); /* is not there */
	CHECK_EQ(learned_use(table, key_of(1, 0), 4000 * MS, true), LEARN_FULL);
	CHECK_EQ(learned_use(table, key_of(2, 0), 4000 * MS, true), LEARN_KNOWN);
	CHECK_EQ(learned_use(table, key_of(3, 0), 4000 * MS, true), LEARN_FULL); /* two places, and both are taken */
	larger = learned_new(20, table);
	CHECK_EQ(learned_use(larger, key_of(1, 0), 4000 * MS, true), LEARN_FULL); /* another size changes nothing */
	CHECK_EQ(listed(larger, 5000 * MS, out), 2);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(out[i].denied, out[i].mac[5] == 1);
		CHECK_EQ(out[i].idle_ms, out[i].denied ? 4000 : 1000); /* a denied one isn't used: it grows old */
	}
	learned_forget(larger, key_of(1, 0));
	CHECK_EQ(learned_use(larger, key_of(1, 0), 5000 * MS, true), LEARN_NEW);
	CHECK_EQ(learned_use(larger, key_of(1, 0), 6000 * MS, true), LEARN_KNOWN);
	learned_free(table);
	learned_free(larger);
}

/* Another size: what it holds goes with it, as much as fits. */
static void test_resize(void)
{
	struct learned *table = learned_new(16, NULL), *larger, *smaller;
	struct xv_learned out[XV_MAX_LEARNED];

	for (uint32_t i = 0; i < 16; i++)
		learned_use(table, key_of(i, 0), MS, true);
	larger = learned_new(500, table);
	smaller = learned_new(5, table);
	CHECK_EQ(learned_most(larger), 500);
	CHECK_EQ(listed(larger, 3 * MS, out), 16);
	CHECK_EQ(out[7].idle_ms, 2);
	for (uint32_t i = 0; i < 16; i++)
		CHECK_EQ(learned_use(larger, key_of(i, 0), MS, false), LEARN_KNOWN);
	CHECK_EQ(listed(smaller, 3 * MS, out), 5);
	CHECK_EQ(learned_use(smaller, key_of(77, 0), MS, true), LEARN_FULL);
	learned_free(table);
	learned_free(larger);
	learned_free(smaller);
}

/* ---- several workers of one guest, and control ---- */

#define WORKERS 3
#define ROUNDS 200000u
#define RACE_MOST 32u

static struct learned *shared;
static bool over;

static void *worker_thread(void *arg)
{
	uint64_t *added = arg;

	for (uint32_t i = 0; i < ROUNDS; i++)
		*added += learned_use(shared, key_of(i * 7 % 48, 0), i, true) == LEARN_NEW;
	return NULL;
}

static void *control_thread(void *arg)
{
	struct xv_learned out[XV_MAX_LEARNED];
	uint64_t *forgotten = arg;

	while (!load_acquire(&over)) {
		const uint32_t n = listed(shared, ROUNDS, out);

		CHECK(n <= RACE_MOST);
		for (uint32_t i = 0; i < n; i += 3) {
			CHECK(out[i].mac[0] == 2 && out[i].mac[5] < 48 && !out[i].vlan);
			learned_forget(shared, mac_key(out[i].mac, 0));
			++*forgotten;
		}
	}
	return NULL;
}

/* Never more than it may have, none of them twice, and what was added is there or was forgotten. */
static void test_race(void)
{
	pthread_t workers[WORKERS], control;
	uint64_t added[WORKERS] = {0}, forgotten = 0, sum = 0;
	struct xv_learned out[XV_MAX_LEARNED];
	bool seen[48] = {false};
	uint32_t n;

	shared = learned_new(RACE_MOST, NULL);
	CHECK(!pthread_create(&control, NULL, control_thread, &forgotten));
	for (int i = 0; i < WORKERS; i++)
		CHECK(!pthread_create(&workers[i], NULL, worker_thread, &added[i]));
	for (int i = 0; i < WORKERS; i++) {
		CHECK(!pthread_join(workers[i], NULL));
		sum += added[i];
	}
	store_release(&over, true);
	CHECK(!pthread_join(control, NULL));
	n = listed(shared, ROUNDS, out);
	CHECK(n <= RACE_MOST);
	CHECK_EQ(sum - forgotten, n);
	for (uint32_t i = 0; i < n; i++) {
		CHECK(!seen[out[i].mac[5]]);
		seen[out[i].mac[5]] = true;
	}
	learned_free(shared);
}

int main(void)
{
	test_bound();
	test_list();
	test_forget();
	test_deny();
	test_resize();
	test_race();
	puts("ok");
	return 0;
}
