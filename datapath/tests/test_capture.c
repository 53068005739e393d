// SPDX-License-Identifier: Apache-2.0
/* The ring that a capture's writers and its reader share: whole, wrapped, full, several writers, and a reader that lies. */
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#include "../src/capring.h"
#include "../src/capture.h"
#include "harness.h"

#define RING XV_CAPTURE_LEAST
#define SIZE (CAPTURE_PAGE + RING)
#define ROOM (1u << 20)

static uint8_t *memory, *guarded;
static struct xv_capture *capture;
static struct xv_capread *reader;
static struct capture_share plenty = {.most = INT64_MAX / 4, .left = INT64_MAX / 4};
static uint8_t out[ROOM], frame[70000];

static struct capture_shared *shared(void)
{
	return (struct capture_shared *)memory;
}

static struct xv_capread_conf both(void)
{
	return (struct xv_capread_conf){.memory = (uintptr_t)memory, .size = SIZE, .directions = XV_CAPTURE_IN | XV_CAPTURE_OUT};
}

/* Pages that may not be touched on either side: a write outside the memory ends the test. */
static void start(uint32_t snaplen)
{
	struct xv_capread_conf conf;

	guarded = mmap(NULL, SIZE + 2 * CAPTURE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(guarded != MAP_FAILED);
	memory = guarded + CAPTURE_PAGE;
	CHECK_EQ(mprotect(memory, SIZE, PROT_READ | PROT_WRITE), 0);
	CHECK_EQ(xv_capture_new(memory, SIZE, snaplen, &capture), 0);
	conf = both();
	CHECK_EQ(xv_capread_new(&conf, &reader), 0);
	for (uint32_t i = 0; i < sizeof(frame); i++)
		frame[i] = (uint8_t)(i * 7);
}

static void end(void)
{
	xv_capread_free(reader);
	xv_capture_free(capture);
	CHECK_EQ(munmap(guarded, SIZE + 2 * CAPTURE_PAGE), 0);
}

static void put(uint32_t len, enum capture_direction direction, enum xv_drop why)
{
	const struct xv_view view = {.first = {frame, len}, .len = len}, *views = &view;

	capture_views(capture, &plenty, &views, 1, direction, 3, why);
}

static uint32_t word(const uint8_t *p)
{
	uint32_t value;

	memcpy(&value, p, sizeof(value));
	return value;
}

/* Walk through the blocks in out[0..bytes): each whole, its length on both ends; how many. */
static uint32_t blocks(int64_t bytes)
{
	uint32_t n = 0;

	CHECK(bytes >= 0);
	for (int64_t at = 0; at < bytes; n++) {
		const uint32_t len = word(out + at + 4);

		CHECK_EQ(word(out + at), 6);
		CHECK(len % 4 == 0 && at + len <= bytes);
		CHECK_EQ(word(out + at + len - 4), len);
		CHECK_EQ(memcmp(out + at + 28, frame, word(out + at + 20)), 0);
		at += len;
	}
	return n;
}

static int64_t take_all(void)
{
	const struct xv_capread_counters *counters = xv_capread_counters(reader);
	int64_t bytes = 0, more;
	uint64_t seen;

	do {
		seen = counters->seen;
		more = xv_capread_blocks(reader, out + bytes, ROOM - (uint64_t)bytes, UINT64_MAX);
		if (more < 0)
			return more;
		bytes += more;
	} while (counters->seen != seen);
	return bytes;
}

/* The value of an option of the first block, or NULL. */
static const uint8_t *option(uint16_t code, uint32_t *len)
{
	const uint8_t *p = out + 28 + ALIGN_UP(word(out + 20), 4);

	for (; (word(p) & 0xffff) != code; p += 4 + ALIGN_UP(*len, 4)) {
		*len = word(p) >> 16;
		if (!word(p))
			return NULL;
	}
	*len = word(p) >> 16;
	return p + 4;
}

static void test_what_goes_in_comes_out(void)
{
	struct timespec t;
	uint64_t stamp;
	uint32_t len;

	start(UINT32_MAX);
	CHECK_EQ(take_all(), 0);
	frame[0] = 0x52;
	put(60, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(blocks(take_all()), 1);
	CHECK_EQ(word(out + 20), 60);
	CHECK_EQ(word(out + 24), 60);
	clock_gettime(CLOCK_REALTIME, &t);
	stamp = (uint64_t)word(out + 12) << 32 | word(out + 16);
	CHECK((uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec - stamp < 1000000000u);
	CHECK_EQ(word(option(2, &len)), 1 | 1 << 2); /* inbound, unicast */
	CHECK_EQ(word(option(6, &len)), 3);
	CHECK(!option(1, &len));
	CHECK_EQ(take_all(), 0);

	memset(frame, 0xff, 6);
	put(61, CAPTURE_FROM, XV_DROP_NO_UPLINK);
	CHECK_EQ(blocks(take_all()), 1);
	CHECK_EQ(word(out + 24), 61);
	CHECK_EQ(word(option(2, &len)), 2 | 3 << 2); /* outbound, broadcast */
	CHECK_EQ(memcmp(option(1, &len), "dropped: no_uplink", 18), 0);
	CHECK_EQ(len, 18);

	capture_unseen(capture, &plenty, 2, CAPTURE_FROM, 0, XV_DROP_BAD_CHAIN);
	CHECK_EQ(blocks(take_all()), 2);
	CHECK_EQ(word(out + 20), 0);
	CHECK_EQ(memcmp(option(1, &len), "dropped: bad_chain", 18), 0);
	CHECK_EQ(xv_capture_counters(capture)->frames, 4);
	CHECK_EQ(xv_capture_counters(capture)->bytes, 121);
	CHECK_EQ(xv_capread_counters(reader)->taken, 4);
	CHECK(!xv_capread_ended(reader));
	xv_capture_end(capture);
	CHECK(xv_capread_ended(reader));
	end();
}

static void test_each_view_tells_its_own_fate(void)
{
	struct xv_seg more[2] = {{frame + 20, 30}, {frame + 50, 14}};
	struct xv_view a = {.first = {frame, 20}, .more = more, .nr_more = 2, .len = 64, .flags = VIEW_NEEDS_CSUM};
	struct xv_view b = {.first = {frame, 64}, .len = 64, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN};
	const struct xv_view *views[2] = {&a, &b};
	uint32_t len;

	start(UINT32_MAX);
	view_tx_dropped(&a, XV_DROP_TOO_BIG);
	view_rx_dropped(&b, XV_DROP_FILTERED);
	capture_views(capture, &plenty, views, 2, CAPTURE_FROM, 0, CAPTURE_FATES);
	CHECK_EQ(blocks(take_all()), 2); /* the first one's segments are in one */
	CHECK_EQ(memcmp(option(1, &len), "dropped: too_big", 16), 0);
	CHECK(word(option(2, &len)) & 1 << 9); /* checksum not ready */
	CHECK(!(word(option(2, &len)) & 1 << 11));
	capture_views(capture, &plenty, views + 1, 1, CAPTURE_FROM, 0, CAPTURE_FATES);
	take_all();
	CHECK(!option(1, &len));
	CHECK(word(option(2, &len)) & 1 << 11); /* segmentation offloaded */
	capture_views(capture, &plenty, views + 1, 1, CAPTURE_TO, 0, CAPTURE_FATES);
	take_all();
	CHECK_EQ(memcmp(option(1, &len), "dropped: filtered", 17), 0);
	capture_begin(views, 2, CAPTURE_FROM);
	CHECK(!a.tx_drop && b.rx_drop);
	capture_begin(views, 2, CAPTURE_TO);
	CHECK(!b.rx_drop);
	end();
}

static void test_snaplen(void)
{
	start(96);
	put(1500, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(blocks(take_all()), 1);
	CHECK_EQ(word(out + 20), 96);
	CHECK_EQ(word(out + 24), 1500);
	end();
}

/* Every length at every place: through the end of the ring many times, nothing lost, in order. */
static void test_round_and_round(void)
{
	uint32_t sent = 0;

	start(UINT32_MAX);
	for (uint32_t len = 14; len < 66000; len += 1 + len / 40) {
		put(len, CAPTURE_TO, CAPTURE_FATES);
		sent++;
		CHECK_EQ(blocks(take_all()), 1);
		CHECK_EQ(word(out + 24), len);
	}
	for (uint32_t i = 0; i < 20000; i++) {
		put(14 + i % 1487, CAPTURE_TO, CAPTURE_FATES);
		sent++;
		if (i % 50 == 49)
			CHECK_EQ(blocks(take_all()), 50);
	}
	CHECK_EQ(xv_capture_counters(capture)->frames, sent);
	CHECK_EQ(xv_capread_counters(reader)->taken, sent);
	CHECK_EQ(xv_capture_counters(capture)->lost, 0);
	end();
}

static void test_full_is_lost_and_counted(void)
{
	const uint32_t fit = RING / (uint32_t)record_bytes(1000);

	start(UINT32_MAX);
	for (uint32_t i = 0; i < fit + 23; i++)
		put(1000, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(xv_capture_counters(capture)->frames, fit);
	CHECK_EQ(xv_capture_counters(capture)->lost, 23);
	CHECK_EQ(blocks(take_all()), fit);
	CHECK_EQ(xv_capread_counters(reader)->lost, 23);
	put(1000, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(blocks(take_all()), 1);
	end();
}

/* A worker that has spent its share copies nothing more, until time has passed. */
static void test_a_share_of_the_time(void)
{
	const struct xv_view view = {.first = {frame, 60}, .len = 60}, *views = &view;
	struct capture_share share = {.most = 1000, .left = 1, .at = cycles_now()};
	uint64_t begin;

	start(UINT32_MAX);
	for (int i = 0; i < 10 && !xv_capture_counters(capture)->lost; i++)
		capture_views(capture, &share, &views, 1, CAPTURE_TO, 0, CAPTURE_FATES);
	CHECK_EQ(xv_capture_counters(capture)->lost, 1);
	CHECK(share.left >= -share.most && share.left <= 0);
	begin = cycles_now();
	while (cycles_now() - begin < 16000)
		cpu_relax();
	capture_views(capture, &share, &views, 1, CAPTURE_TO, 0, CAPTURE_FATES);
	CHECK_EQ(xv_capture_counters(capture)->lost, 1);
	CHECK_EQ(blocks(take_all()), xv_capture_counters(capture)->frames);
	end();
}

#define WHOLE (4096u - (uint32_t)sizeof(struct capture_record)) /* so many that records fill the ring without a filler */

static uint64_t capture_for(struct capture_share *share, uint64_t duration)
{
	const struct xv_view view = {.first = {frame, WHOLE}, .len = WHOLE};
	const struct xv_view *views[XV_BURST];
	const uint64_t begin = cycles_now();
	uint64_t passed;

	for (uint32_t i = 0; i < XV_BURST; i++)
		views[i] = &view;
	while ((passed = cycles_now() - begin) < duration) {
		capture_views(capture, share, views, XV_BURST, CAPTURE_TO, 0, CAPTURE_FATES);
		store_release(&shared()->tail, xv_capture_counters(capture)->frames * record_bytes(WHOLE)); /* there is room */
	}
	return passed;
}

/*
 * However fast frames come, no more are copied than an eighth of the time is enough for. Whatever disturbs this makes it fewer:
 * it is compared with what a frame costs at the least.
 */
static void test_no_more_than_its_share(void)
{
	const uint64_t most = 1000000, duration = 100000000;
	struct capture_share share = {.most = (int64_t)most, .left = (int64_t)most};
	uint64_t least = UINT64_MAX, passed, frames;

	start(UINT32_MAX);
	share.at = cycles_now();
	for (int i = 0; i < 200; i++) {
		struct capture_share mine = plenty;

		frames = xv_capture_counters(capture)->frames;
		passed = capture_for(&mine, 50000);
		frames = xv_capture_counters(capture)->frames - frames;
		if (frames)
			least = MIN(least, passed / frames);
	}
	frames = xv_capture_counters(capture)->frames;
	share.at = cycles_now();
	share.left = 0;
	passed = capture_for(&share, duration);
	frames = xv_capture_counters(capture)->frames - frames;
	CHECK(frames > 1000);
	CHECK(frames * least < (passed / 8 + most) * 3 / 2);
	end();
}

/* What the reader has no room for stays, whole. */
static void test_little_room(void)
{
	start(UINT32_MAX);
	for (int i = 0; i < 10; i++)
		put(1000, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(xv_capread_blocks(reader, out, 1000, 10), 0);
	CHECK_EQ(blocks(xv_capread_blocks(reader, out, 3500, 10)), 3);
	CHECK_EQ(blocks(xv_capread_blocks(reader, out, ROOM, 2)), 2);
	CHECK_EQ(blocks(take_all()), 5);
	end();
}

static uint32_t only_odd(const void *program, const uint8_t *bytes, uint32_t len, uint32_t kept)
{
	CHECK_EQ((uintptr_t)program, 77);
	CHECK_EQ(bytes[1], frame[1]);
	CHECK_EQ(len, kept);
	return len & 1;
}

static uint32_t nothing(const void *program, const uint8_t *bytes, uint32_t len, uint32_t kept)
{
	(void)program, (void)bytes, (void)len, (void)kept;
	return 0;
}

static void test_what_is_not_wanted(void)
{
	struct xv_capread_conf conf;
	struct xv_capread *other;

	start(UINT32_MAX);
	conf = both();
	conf.filter = (uintptr_t)only_odd;
	conf.program = 77;
	CHECK_EQ(xv_capread_new(&conf, &other), 0);
	for (uint32_t i = 0; i < 10; i++)
		put(60 + i, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(blocks(xv_capread_blocks(other, out, ROOM, UINT64_MAX)), 5);
	CHECK_EQ(xv_capread_counters(other)->seen, 10);
	CHECK_EQ(xv_capread_counters(other)->taken, 5);
	xv_capread_free(other);

	conf = both();
	conf.directions = XV_CAPTURE_OUT;
	CHECK_EQ(xv_capread_new(&conf, &other), 0);
	put(60, CAPTURE_FROM, CAPTURE_FATES);
	CHECK_EQ(blocks(xv_capread_blocks(other, out, ROOM, UINT64_MAX)), 1);
	xv_capread_free(other);

	conf = both();
	conf.drops_only = 1;
	CHECK_EQ(xv_capread_new(&conf, &other), 0);
	put(60, CAPTURE_TO, XV_DROP_FILTERED);
	CHECK_EQ(blocks(xv_capread_blocks(other, out, ROOM, UINT64_MAX)), 1);
	xv_capread_free(other);

	/* however much there is, some of it is looked at in one call, and the rest in others */
	conf = both();
	conf.filter = (uintptr_t)nothing;
	CHECK_EQ(xv_capread_new(&conf, &other), 0);
	for (uint32_t i = 0; i < 200; i++)
		put(1000, CAPTURE_TO, CAPTURE_FATES);
	CHECK_EQ(xv_capread_blocks(other, out, ROOM, UINT64_MAX), 0);
	CHECK(xv_capread_counters(other)->seen > 50 && xv_capread_counters(other)->seen < 150);
	CHECK_EQ(xv_capread_blocks(other, out, ROOM, UINT64_MAX), 0);
	CHECK_EQ(xv_capread_counters(other)->seen, 212);
	xv_capread_free(other);
	end();
}

/* ---- several writers ---- */

#define WRITERS 4
#define EACH 20000u

static void *writer(void *argument)
{
	const uint32_t queue = (uint32_t)(uintptr_t)argument;

	for (uint32_t i = 0; i < EACH; i++) {
		uint8_t bytes[200];
		const uint32_t len = 8 + i % 190;
		struct xv_view view = {.first = {bytes, len}, .len = len};
		const struct xv_view *views = &view;
		struct capture_share mine = plenty;

		memset(bytes, (int)(queue * 50 + i % 50), len);
		memcpy(bytes, &i, sizeof(i));
		capture_views(capture, &mine, &views, 1, CAPTURE_TO, queue, CAPTURE_FATES);
	}
	return NULL;
}

/* Each writer's frames come in its order, whole; what is missing was counted. */
static void test_several_writers(void)
{
	uint32_t last[WRITERS] = {0}, got = 0, running = WRITERS;
	pthread_t threads[WRITERS];
	bool first[WRITERS] = {false};

	start(UINT32_MAX);
	for (uintptr_t i = 0; i < WRITERS; i++)
		CHECK_EQ(pthread_create(&threads[i], NULL, writer, (void *)i), 0);
	for (;;) {
		const int64_t bytes = take_all();

		CHECK(bytes >= 0);
		for (int64_t at = 0; at < bytes; at += word(out + at + 4), got++) {
			const uint32_t len = word(out + at + 24), i = word(out + at + 28);
			const uint8_t *data = out + at + 28;
			const uint32_t queue = word(data + ALIGN_UP(len, 4) + 12);

			CHECK(queue < WRITERS && i < EACH && len == 8 + i % 190);
			CHECK(!first[queue] || i > last[queue]);
			first[queue] = true;
			last[queue] = i;
			for (uint32_t b = 4; b < len; b++)
				CHECK_EQ(data[b], (uint8_t)(queue * 50 + i % 50));
		}
		if (!bytes && !running)
			break;
		if (!bytes) {
			for (uint32_t i = 0; i < WRITERS; i++)
				if (threads[i] && !pthread_tryjoin_np(threads[i], NULL)) {
					threads[i] = 0;
					running--;
				}
		}
	}
	CHECK_EQ(xv_capture_counters(capture)->frames, got);
	CHECK_EQ(got + xv_capture_counters(capture)->lost, WRITERS * EACH);
	end();
}

/* ---- who shares the memory and lies ---- */

/* Whatever the reader writes, no worker writes outside the ring (guard pages), waits, or counts wrong. */
static void test_hostile_reader(void)
{
	uint64_t head = 0;

	start(UINT32_MAX);
	srand(23);
	for (uint32_t i = 0; i < 20000; i++) {
		const uint64_t tails[] = {head, head - (uint64_t)rand() % RING, head + 1 + (uint64_t)rand() % RING, head - RING - 1,
					  (uint64_t)rand() << 33 ^ (uint64_t)rand() << 11, UINT64_MAX, 0};
		const uint32_t len = 14 + (uint32_t)rand() % (i % 3 ? 2000 : 65000);
		const uint64_t before = xv_capture_counters(capture)->frames, lost = xv_capture_counters(capture)->lost;
		const uint64_t left = RING - head % RING, bytes = record_bytes(len);

		store_release(&shared()->tail, tails[i % ARRAY_SIZE(tails)]);
		if (i % 100 == 0) /* and everything else that it may write to */
			memset(memory + 64 * (i % 200 == 0), rand(), SIZE - 64);
		put(len, CAPTURE_TO, CAPTURE_FATES);
		if (xv_capture_counters(capture)->frames != before)
			head += bytes + (left < bytes ? left : 0);
		else
			CHECK_EQ(xv_capture_counters(capture)->lost, lost + 1);
	}
	CHECK(xv_capture_counters(capture)->frames > 5000);
	end();
}

/* The reader takes nothing for a record that is none, and follows no length out of the ring. */
static void test_damaged_ring(void)
{
	struct capture_record *record;

	start(UINT32_MAX);
	put(60, CAPTURE_TO, CAPTURE_FATES);
	record = (struct capture_record *)(memory + CAPTURE_PAGE);
	record->kept = RING;
	CHECK_EQ(take_all(), -EBADMSG);
	record->kept = 60;
	record->drop = 255;
	CHECK_EQ(blocks(take_all()), 1);
	/* a frame whose bytes look like a record of this place, but for the key */
	for (uint32_t i = 0; i < RING / 8; i++)
		((uint64_t *)(memory + CAPTURE_PAGE))[i] = i % 4 ? 0 : i * 8;
	CHECK_EQ(take_all(), 0);
	end();
}

static void test_wrong_memory(void)
{
	struct xv_capread_conf conf;
	struct xv_capread *other;
	struct xv_capture *wrong;

	start(UINT32_MAX);
	CHECK_EQ(xv_capture_new(memory, SIZE - 1, 96, &wrong), -EINVAL);
	CHECK_EQ(xv_capture_new(memory, 0, 96, &wrong), -EINVAL);
	CHECK_EQ(xv_capture_new(memory, CAPTURE_PAGE, 96, &wrong), -EINVAL);
	CHECK_EQ(xv_capture_new(memory, CAPTURE_PAGE + RING / 2, 96, &wrong), -EINVAL);
	CHECK_EQ(xv_capture_new(memory + 64, SIZE, 96, &wrong), -EINVAL);
	CHECK_EQ(xv_capture_new(memory, SIZE, 0, &wrong), -EINVAL);
	conf = both();
	conf.size--;
	CHECK_EQ(xv_capread_new(&conf, &other), -EINVAL);
	conf = both();
	shared()->abi++;
	CHECK_EQ(xv_capread_new(&conf, &other), -EPROTO);
	shared()->abi--;
	shared()->size *= 2;
	CHECK_EQ(xv_capread_new(&conf, &other), -EPROTO);
	memset(memory, 0, CAPTURE_PAGE);
	CHECK_EQ(xv_capread_new(&conf, &other), -EPROTO);
	end();
}

int main(void)
{
	test_what_goes_in_comes_out();
	test_each_view_tells_its_own_fate();
	test_snaplen();
	test_round_and_round();
	test_full_is_lost_and_counted();
	test_a_share_of_the_time();
	test_no_more_than_its_share();
	test_little_room();
	test_what_is_not_wanted();
	test_several_writers();
	test_hostile_reader();
	test_damaged_ring();
	test_wrong_memory();
	return 0;
}
