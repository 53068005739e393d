// SPDX-License-Identifier: Apache-2.0
#include "capture.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "capring.h"

#define FRAME_CYCLES 2000u
#define SHARE 8u /* one of so many cycles is for captures */

static const struct xv_view no_frame;

struct xv_capture {
	struct capture_shared *shared;
	uint8_t *ring;
	uint64_t size, key;
	uint32_t snaplen;
	uint64_t head __attribute__((aligned(64))); /* room up to here is taken */
	struct xv_capture_counters counters;
};

/* Now, for a frame: the wall clock, as who reads the file compares it with other files. */
static uint64_t wall_clock(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t); /* no system call */
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct capture_record *record_at(const struct xv_capture *capture, uint64_t position)
{
	return (struct capture_record *)(capture->ring + (position & (capture->size - 1)));
}

static void commit(const struct xv_capture *capture, struct capture_record *record, uint64_t position)
{
	/* release pairs with the reader's acquire in next_record() */
	store_release(&record->commit, position ^ capture->key);
}

/* Take room for a record of `bytes`; NULL: there is none. Sets its position. */
static struct capture_record *take(struct xv_capture *capture, uint64_t bytes, uint64_t *position)
{
	uint64_t head = load_once(&capture->head), filler;
	struct capture_record *record;

	do {
		const uint64_t left = capture->size - (head & (capture->size - 1));

		filler = left < bytes ? left : 0;
		/* acquire pairs with the reader's release of what it has read; a tail from beyond the head counts as full, too */
		if (head + filler + bytes - load_acquire(&capture->shared->tail) > capture->size)
			return NULL;
	} while (!__atomic_compare_exchange_n(&capture->head, &head, head + filler + bytes, true, __ATOMIC_RELAXED,
					      __ATOMIC_RELAXED));
	if (unlikely(filler)) {
		record = record_at(capture, head);
		record->flags = CAPTURE_FILLER;
		record->kept = 0;
		commit(capture, record, head);
	}
	*position = head + filler;
	return record_at(capture, *position);
}

/* Everything but position and commit word comes in `facts`. Answers whether there was room. */
static bool write_record(struct xv_capture *capture, const struct capture_record *facts, const struct xv_view *view)
{
	uint64_t position;
	struct capture_record *record = take(capture, record_bytes(facts->kept), &position);

	if (unlikely(!record))
		return false;
	memcpy(&record->time, &facts->time, sizeof(*facts) - offsetof(struct capture_record, time));
	if (facts->kept)
		view_peek(view, record + 1, facts->kept);
	commit(capture, record, position);
	return true;
}

static void account(struct xv_capture *capture, uint32_t frames, uint64_t bytes, uint32_t lost)
{
	struct xv_capture_counters *counters = &capture->counters;

	__atomic_fetch_add(&counters->frames, frames, __ATOMIC_RELAXED);
	__atomic_fetch_add(&counters->bytes, bytes, __ATOMIC_RELAXED);
	if (unlikely(lost))
		store_once(&capture->shared->lost, __atomic_add_fetch(&counters->lost, lost, __ATOMIC_RELAXED));
}

/* Whether the worker has time for it. */
static bool may_spend(struct capture_share *share, uint64_t now)
{
	share->left = MIN(share->left + (int64_t)((now - share->at) / SHARE), share->most);
	share->at = now;
	return share->left > 0;
}

/* For `frames` and `bytes` of them, which never take more than `most`: if so, the worker was preempted. */
static void spend(struct capture_share *share, uint64_t since, uint32_t frames, uint64_t bytes)
{
	const uint64_t most = (uint64_t)frames * FRAME_CYCLES + bytes;

	share->left = MAX(share->left - (int64_t)MIN(cycles_now() - since, most), -share->most);
}

/* Of views, of a row of them, or of `n` frames that can't be shown. */
static void capture_each(struct xv_capture *capture, struct capture_share *share, const struct xv_view *const *views,
			 const struct xv_view *row, uint32_t n, enum capture_direction direction, uint32_t queue,
			 enum xv_drop why)
{
	struct capture_record facts = {.queue = (uint16_t)queue};
	const uint64_t begin = cycles_now();
	uint32_t frames = 0;
	uint64_t bytes = 0;

	if (!n)
		return;
	if (unlikely(!may_spend(share, begin))) {
		account(capture, 0, 0, n);
		return;
	}
	facts.time = wall_clock();
	for (uint32_t i = 0; i < n; i++) {
		const struct xv_view *view = views ? views[i] : row ? &row[i] : &no_frame;

		facts.len = view->len;
		facts.kept = MIN(view->len, capture->snaplen);
		facts.flags = (uint8_t)((direction == CAPTURE_FROM ? CAPTURE_OUT : 0) |
					(view->flags & VIEW_NEEDS_CSUM ? CAPTURE_NEEDS_CSUM : 0));
		facts.gso_type = view->gso_type;
		if (why != CAPTURE_FATES)
			facts.drop = (uint8_t)(why + 1);
		else
			facts.drop = direction == CAPTURE_FROM ? view->tx_drop : view->rx_drop;
		if (unlikely(!write_record(capture, &facts, view)))
			continue;
		frames++;
		bytes += facts.kept;
	}
	account(capture, frames, bytes, n - frames);
	spend(share, begin, n, bytes);
}

void capture_views(struct xv_capture *capture, struct capture_share *share, const struct xv_view *const *views, uint32_t n,
		   enum capture_direction direction, uint32_t queue, enum xv_drop why)
{
	capture_each(capture, share, views, NULL, n, direction, queue, why);
}

void capture_row(struct xv_capture *capture, struct capture_share *share, const struct xv_view *views, uint32_t n,
		 enum capture_direction direction, uint32_t queue, enum xv_drop why)
{
	capture_each(capture, share, NULL, views, n, direction, queue, why);
}

void capture_unseen(struct xv_capture *capture, struct capture_share *share, uint64_t n, enum capture_direction direction,
		    uint32_t queue, enum xv_drop why)
{
	capture_each(capture, share, NULL, NULL, (uint32_t)n, direction, queue, why);
}

/* ---- life ---- */

int xv_capture_new(void *memory, uint64_t size, uint32_t snaplen, struct xv_capture **out)
{
	const uint64_t ring = size - CAPTURE_PAGE;
	struct capture_shared *shared = memory;
	struct xv_capture *capture;

	if ((uintptr_t)memory % CAPTURE_PAGE || size <= CAPTURE_PAGE || ring & (ring - 1) || ring < XV_CAPTURE_LEAST || !snaplen)
		return -EINVAL;
	capture = aligned_alloc(64, ALIGN_UP(sizeof(*capture), 64));
	if (!capture)
		return -ENOMEM;
	memset(capture, 0, sizeof(*capture));
	if (getrandom(&capture->key, sizeof(capture->key), 0) != sizeof(capture->key)) {
		free(capture);
		return -EIO;
	}
	capture->shared = shared;
	capture->ring = (uint8_t *)memory + CAPTURE_PAGE;
	capture->size = ring;
	capture->snaplen = snaplen;
	*shared = (struct capture_shared){.magic = CAPTURE_MAGIC, .abi = XV_ABI, .size = ring, .key = capture->key,
					  .snaplen = snaplen};
	*out = capture;
	return 0;
}

void xv_capture_end(struct xv_capture *capture)
{
	store_release(&capture->shared->ended, 1u);
}

void xv_capture_free(struct xv_capture *capture)
{
	free(capture);
}

const struct xv_capture_counters *xv_capture_counters(const struct xv_capture *capture)
{
	return &capture->counters;
}
