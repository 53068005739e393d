// SPDX-License-Identifier: Apache-2.0
/*
 * A NIC queue and its AF_XDP sockets as ports.
 *
 * Frames of the UMEM are in two herds that never mix. Receive frames circulate: fill ring -> kernel -> a guest's RX
 * ring -> (copied to the guest) -> fill ring; the fill ring is as large as the herd, so giving back never fails.
 * Transmit frames circulate: free stack -> (copied from the guest) -> TX ring -> kernel -> completion ring -> free stack;
 * TX and completion ring are as large as that herd. Each ring's cursor that we own is kept here and written to the
 * shared ring once a burst.
 *
 * With XDP_USE_SG a frame may have several pieces, in consecutive entries of the RX or TX ring, each a chunk of UMEM of
 * its own; all but the last say XDP_PKT_CONTD. A received one becomes one view of several segments, once all of it is
 * there; one that is sent gets all its chunks at once, or is dropped. What counts chunks (`keep`, rings) counts pieces.
 *
 * Where the device finishes checksums, each chunk that is sent begins with room for struct tx_metadata (`head`).
 *
 * In copy mode the kernel sends only inside sendto(), 32 frames a call; EBUSY means that it took one frame and dropped
 * it. Zero-copy drivers ask for a call with XDP_RING_NEED_WAKEUP.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "copy.h"
#include "csum.h"
#include "nethdr.h"
#include "port.h"

#define FLUSH_CALLS 64u /* sendto() calls in one flush: the whole TX ring, and no more than that */
#define TX_PIECES 17u   /* of one frame: what xsk_build_skb() takes with the least MAX_SKB_FRAGS there is */

uint32_t xsk_backlog(const struct xv_xsk *xsk)
{
	/* acquire pairs with the kernel's smp_store_release() in __xskq_prod_submit() */
	return load_acquire(xsk->producer) - xsk->cons;
}

/* Pieces of the frame that begins `at` entries behind the cursor; 0: its end is not among the `ready` ones. */
static uint32_t frame_pieces(const struct xv_xsk *xsk, uint32_t at, uint32_t ready)
{
	for (uint32_t n = 1; at + n <= ready; n++)
		if (!(xsk->ring[(xsk->cons + at + n - 1) & xsk->mask].options & XDP_PKT_CONTD))
			return n;
	return 0;
}

/* Consume entries and give their chunks to the fill ring; they were `frames` frames that somebody wanted. */
static void give_back(struct xv_xsk *xsk, uint32_t pieces, uint32_t frames)
{
	struct xv_nicq *nicq = xsk->nicq;
	uint64_t bytes = 0;
	bool wake;

	if (!pieces)
		return;
	spin_lock(&nicq->fill_lock);
	for (uint32_t i = 0; i < pieces; i++) {
		const struct xdp_desc *desc = &xsk->ring[(xsk->cons + i) & xsk->mask];

		nicq->fill.ring[nicq->fill_prod++ & nicq->fill.mask] = ALIGN_DOWN(desc->addr, nicq->chunk);
		bytes += desc->len;
	}
	/* release pairs with the kernel's acquire of the producer in xskq_cons_peek */
	store_release(nicq->fill.producer, nicq->fill_prod);
	wake = load_once(nicq->fill.flags) & XDP_RING_NEED_WAKEUP;
	spin_unlock(&nicq->fill_lock);
	xsk->cons += pieces;
	store_release(xsk->consumer, xsk->cons);
	xsk->plain -= MIN(xsk->plain, frames);
	count(xsk->counters.packets, frames);
	count(xsk->counters.bytes, bytes);
	if (unlikely(wake)) /* only zero-copy drivers ask; the socket must be one that receives */
		recvfrom(xsk->rx.fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

/* Add the pieces behind the first to a view; false when they are too many or too long. */
static bool view_pieces(const struct xv_xsk *xsk, uint32_t at, uint32_t pieces, struct xv_view *view, struct xv_burst *burst)
{
	if (pieces - 1 > XV_BURST_SEGS - burst->nr_segs)
		return false;
	view->more = &burst->segs[burst->nr_segs];
	for (uint32_t i = 1; i < pieces; i++) {
		const struct xdp_desc *desc = &xsk->ring[(xsk->cons + at + i) & xsk->mask];

		burst->segs[burst->nr_segs++] = (struct xv_seg){xsk->nicq->umem + desc->addr, desc->len};
		view->len += desc->len;
	}
	view->nr_more = (uint16_t)(pieces - 1);
	return view->len <= NET_MAX_FRAME;
}

/* xsk_rx_burst(); `contd` is XDP_PKT_CONTD, or a constant 0 where frames have but one piece. */
static inline always_inline uint32_t view_burst(struct xv_xsk *xsk, struct xv_burst *burst, uint32_t contd)
{
	const struct xv_nicq *nicq = xsk->nicq;
	const bool partial = nicq->flags & XV_NICQ_PARTIAL_CSUM;
	uint32_t ready = xsk_backlog(xsk), at = 0, nr = 0;

	burst->nr = 0;
	burst->nr_segs = 0;
	for (uint32_t i = 0; i < MIN(ready, XV_BURST); i++)
		prefetch(nicq->umem + xsk->ring[(xsk->cons + i) & xsk->mask].addr);
	for (; nr < XV_BURST && at < ready; nr++) {
		const struct xdp_desc *desc = &xsk->ring[(xsk->cons + at) & xsk->mask];
		struct xv_view *view = &burst->views[nr];
		uint32_t pieces = 1;

		view->first = (struct xv_seg){nicq->umem + desc->addr, desc->len};
		view->len = desc->len;
		view->nr_more = 0;
		view->flags = 0;
		view->gso_type = 0;
		if (desc->options & contd) {
			pieces = frame_pieces(xsk, at, ready);
			if (!pieces && ready <= xsk->mask)
				break; /* the rest is still to come */
			if (!pieces || !view_pieces(xsk, at, pieces, view, burst)) {
				if (at)
					break; /* for the next burst, which has room, or finds it first */
				give_back(xsk, pieces ? pieces : ready, 1);
				return 1;
			}
		}
		if (partial)
			net_find_partial(view);
		at += pieces;
	}
	burst->nr = nr;
	return 0;
}

uint32_t xsk_rx_burst(struct xv_xsk *xsk, struct xv_burst *burst)
{
	return xsk->nicq->flags & XV_NICQ_SG ? view_burst(xsk, burst, XDP_PKT_CONTD) : view_burst(xsk, burst, 0);
}

void xsk_rx_release(struct xv_xsk *xsk, uint32_t n)
{
	uint32_t pieces = n;

	if (unlikely(xsk->nicq->flags & XV_NICQ_SG)) {
		pieces = 0;
		for (uint32_t i = 0; i < n; i++)
			pieces += frame_pieces(xsk, pieces, UINT32_MAX); /* they were viewed: their ends are there */
	}
	give_back(xsk, pieces, n);
}

/* The oldest frames without which at most `keep` pieces wait; sets how many pieces they are. */
static uint32_t too_many(const struct xv_xsk *xsk, uint32_t *at)
{
	const uint32_t keep = load_once(&xsk->keep);
	uint32_t ready = xsk_backlog(xsk), frames = 0, pieces;

	*at = 0;
	while (ready - *at > keep && (pieces = frame_pieces(xsk, *at, ready))) {
		*at += pieces;
		frames++;
	}
	return frames;
}

uint32_t xsk_rx_excess(const struct xv_xsk *xsk)
{
	uint32_t pieces;

	return too_many(xsk, &pieces);
}

uint32_t xsk_rx_trim(struct xv_xsk *xsk)
{
	uint32_t pieces, frames = too_many(xsk, &pieces);

	give_back(xsk, pieces, frames);
	return frames;
}

/* Take sent frames back. Called with tx_lock. */
static void reap(struct xv_nicq *nicq)
{
	uint32_t n = load_acquire(nicq->comp.producer) - nicq->comp_cons;

	for (uint32_t i = 0; i < n; i++)
		nicq->free[nicq->nr_free++] = ALIGN_DOWN(nicq->comp.ring[(nicq->comp_cons + i) & nicq->comp.mask], nicq->chunk);
	nicq->comp_cons += n;
	if (n)
		store_release(nicq->comp.consumer, nicq->comp_cons);
}

/* Where the bytes of a frame go: from chunk to chunk. */
struct place {
	const struct xv_nicq *nicq;
	const uint64_t *chunk; /* the current one; the next is below it in the free stack */
	uint8_t *to;
	uint32_t left;         /* of the current chunk */
};

static struct place place_at(const struct xv_nicq *nicq, const uint64_t *first, uint32_t offset)
{
	const uint32_t room = nicq->chunk - nicq->head;

	first -= offset / room;
	offset %= room;
	return (struct place){nicq, first, nicq->umem + *first + nicq->head + offset, room - offset};
}

/* Copy, or copy and sum, a piece of the frame. */
static void place_bytes(struct place *place, const uint8_t *from, uint32_t len, struct csum *csum)
{
	while (len) {
		uint32_t piece;

		if (unlikely(!place->left))
			*place = place_at(place->nicq, place->chunk - 1, 0);
		piece = MIN(len, place->left);
		if (csum)
			csum_add(csum, csum_copy(place->to, from, piece), piece);
		else
			xv_copy(place->to, from, piece);
		from += piece;
		len -= piece;
		place->to += piece;
		place->left -= piece;
	}
}

/* A frame of several pieces, or for several chunks, or with a checksum to be finished (`finish`); bytes copied. */
static uint32_t place_frame(const struct xv_nicq *nicq, const uint64_t *first, const struct xv_view *view, bool finish)
{
	uint32_t start = finish ? view->csum_start : view->len, done = 0;
	struct place place = place_at(nicq, first, 0);
	struct csum csum = {0, false};

	for (uint32_t i = 0; i <= view->nr_more; i++) {
		const struct xv_seg *seg = i ? &view->more[i - 1] : &view->first;
		uint32_t plain = start > done ? MIN(start - done, seg->len) : 0;

		place_bytes(&place, seg->data, plain, NULL);
		place_bytes(&place, seg->data + plain, seg->len - plain, &csum);
		done += seg->len;
	}
	if (finish) {
		uint16_t sum = net_csum_finish(csum.sum);

		place = place_at(nicq, first, view->csum_start + view->csum_offset);
		place_bytes(&place, (const uint8_t *)&sum, sizeof(sum), NULL);
	}
	return done;
}

/* Ask the device to finish the checksum. False when it would have to look behind the first chunk for the field. */
static bool ask_csum(const struct xv_nicq *nicq, uint64_t chunk, const struct xv_view *view)
{
	const struct tx_metadata request = {XDP_TXMD_FLAGS_CHECKSUM, view->csum_start, view->csum_offset, 0};

	if (view->csum_start + view->csum_offset + 2u > nicq->chunk - nicq->head)
		return false;
	memcpy(nicq->umem + chunk, &request, sizeof(request));
	return true;
}

/* Queue a piece of a frame, and take its chunk off the free stack. */
static inline void queue_piece(struct xv_nicq *nicq, uint32_t len, uint32_t options)
{
	struct xdp_desc *desc = &nicq->tx.ring[nicq->tx_prod++ & nicq->tx.mask];

	desc->addr = nicq->free[--nicq->nr_free] + nicq->head;
	desc->len = len;
	desc->options = options;
}

/*
 * Place and queue what is not simply one piece for one chunk; bytes copied, 0 when there are not enough chunks. Sets
 * `finished` when the checksum was finished here.
 */
static uint32_t queue_slow(struct xv_nicq *nicq, const struct xv_view *view, bool *finished)
{
	const uint32_t room = nicq->chunk - nicq->head, chunks = (view->len + room - 1) / room;
	const uint64_t *first = &nicq->free[nicq->nr_free - 1];
	uint32_t options = 0, copied, left = view->len;

	if (nicq->nr_free < chunks)
		return 0;
	*finished = view->flags & VIEW_NEEDS_CSUM;
	if (*finished && nicq->head && ask_csum(nicq, *first, view)) {
		options = XDP_TX_METADATA;
		*finished = false;
	}
	copied = place_frame(nicq, first, view, *finished);
	for (; left > room; left -= room, options = 0) /* metadata belong to the first piece */
		queue_piece(nicq, room, options | XDP_PKT_CONTD);
	queue_piece(nicq, left, options);
	return copied;
}

/* A frame longer than an untagged one may be: whether its VLAN tags, two at most, account for it. */
static bool tagged_fits(const struct xv_nicq *nicq, const struct xv_view *view, uint32_t max_len)
{
	return view->len <= MIN(max_len + net_tag_bytes(view), nicq->most);
}

uint32_t nicq_tx_burst(struct xv_nicq *nicq, const struct xv_view *const *views, uint32_t n, uint32_t max_len,
		       uint64_t *drops)
{
	const uint32_t room = nicq->chunk - nicq->head;
	struct xv_nicq_counters *counters = &nicq->counters;
	uint64_t packets = 0, bytes = 0, copied = 0, finished = 0;

	if (unlikely(load_once(&nicq->nr_free) < n)) /* asked without the lock: at worst one flush too many or too few */
		nicq_tx_flush(nicq);
	max_len = MIN(max_len, nicq->most);
	spin_lock(&nicq->tx_lock);
	reap(nicq); /* at once, not when frames run out: those sent last are still in the cache */
	for (uint32_t i = 0; i < n; i++) {
		const struct xv_view *view = views[i];

		if (unlikely(view->len > max_len) && !tagged_fits(nicq, view, max_len)) {
			count(drops[XV_DROP_TOO_BIG], 1);
			view_tx_dropped(view, XV_DROP_TOO_BIG);
			continue;
		}
		if (unlikely(!nicq->nr_free)) {
			count(drops[XV_DROP_NO_FRAMES], 1);
			view_tx_dropped(view, XV_DROP_NO_FRAMES);
			continue;
		}
		if (view->nr_more <= 1 && likely(!view->flags && view->len <= room)) {
			uint8_t *to = nicq->umem + nicq->free[nicq->nr_free - 1] + nicq->head;

			xv_copy(to, view->first.data, view->first.len);
			if (view->nr_more) /* behind a head of ours: ingress.c */
				xv_copy(to + view->first.len, view->more[0].data, view->more[0].len);
			queue_piece(nicq, view->len, 0);
			copied += view->len;
		} else {
			bool csum;
			uint32_t placed = queue_slow(nicq, view, &csum);

			if (unlikely(!placed)) {
				count(drops[XV_DROP_NO_FRAMES], 1);
				view_tx_dropped(view, XV_DROP_NO_FRAMES);
				continue;
			}
			copied += placed;
			finished += csum;
		}
		packets++;
		bytes += view->len;
	}
	store_release(nicq->tx.producer, nicq->tx_prod);
	count(counters->tx_packets, packets);
	count(counters->tx_bytes, bytes);
	count(counters->copied_bytes, copied);
	count(counters->csum_finished, finished);
	spin_unlock(&nicq->tx_lock);
	return (uint32_t)packets;
}

bool nicq_tx_flush(struct xv_nicq *nicq)
{
	struct xv_nicq_counters *counters = &nicq->counters;
	uint32_t sent = load_acquire(nicq->tx.consumer), before = sent;
	bool done;

	/* no lock over system calls: whoever sends meanwhile only queues, and flushes itself in its next turn */
	if (__atomic_exchange_n(&nicq->flushing, true, __ATOMIC_ACQUIRE))
		return false;
	for (uint32_t calls = 0; sent != load_acquire(nicq->tx.producer) && calls < FLUSH_CALLS; calls++) {
		if (!(load_once(nicq->tx.flags) & XDP_RING_NEED_WAKEUP))
			break; /* a zero-copy driver is at it */
		count(counters->sendto_calls, 1);
		if (sendto(nicq->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0) {
			if (errno == EBUSY)
				__atomic_fetch_add(&counters->sendto_busy, 1u, __ATOMIC_RELAXED);
			else if (load_acquire(nicq->tx.consumer) == sent)
				break; /* EAGAIN without progress, ENETDOWN, ENOBUFS: later */
		}
		sent = load_acquire(nicq->tx.consumer);
	}
	done = sent == load_acquire(nicq->tx.producer) || !(load_once(nicq->tx.flags) & XDP_RING_NEED_WAKEUP);
	nicq->stuck = done || sent != before ? 0 : nicq->stuck + 1;
	store_release(&nicq->flushing, false);
	return done;
}

/* Every ring is there, a power of two, and at least as large as it must be. */
static bool ring_fits(const struct xv_ring *ring, uint32_t entries)
{
	return ring->producer && ring->consumer && ring->flags && ring->ring && ring->size &&
	       !(ring->size & (ring->size - 1)) && ring->mask == ring->size - 1 && ring->size >= entries;
}

#define RING_INIT(to, from)                                           \
	do {                                                          \
		(to).producer = (void *)(uintptr_t)(from).producer;   \
		(to).consumer = (void *)(uintptr_t)(from).consumer;   \
		(to).ring = (void *)(uintptr_t)(from).ring;           \
		(to).mask = (from).mask;                              \
		(to).size = (from).size;                              \
	} while (0)

int xv_nicq_new(const struct xv_nicq_conf *conf, struct xv_nicq **out)
{
	struct xv_nicq *nicq;
	uint64_t frames = (uint64_t)conf->rx_frames + conf->tx_frames;

	if (!conf->umem || !conf->chunk || conf->chunk & (conf->chunk - 1) || frames * conf->chunk > conf->umem_size ||
	    !ring_fits(&conf->fill, conf->rx_frames) || !ring_fits(&conf->comp, conf->tx_frames) ||
	    !ring_fits(&conf->tx, conf->tx_frames) || conf->chunk <= XV_TX_METADATA)
		return -EINVAL;
	nicq = aligned_alloc(64, ALIGN_UP(sizeof(*nicq), 64));
	if (!nicq)
		return -ENOMEM;
	memset(nicq, 0, sizeof(*nicq));
	nicq->free = calloc(conf->tx_frames ? conf->tx_frames : 1, sizeof(nicq->free[0]));
	if (!nicq->free) {
		free(nicq);
		return -ENOMEM;
	}
	nicq->umem = (uint8_t *)(uintptr_t)conf->umem;
	nicq->umem_size = conf->umem_size;
	nicq->chunk = conf->chunk;
	nicq->flags = conf->flags;
	nicq->head = conf->flags & XV_NICQ_TX_CSUM ? XV_TX_METADATA : 0;
	nicq->most = (nicq->chunk - nicq->head) * (conf->flags & XV_NICQ_SG ? TX_PIECES : 1);
	nicq->queue = conf->queue;
	nicq->fd = conf->fd;
	nicq->gso_fd = conf->gso_fd;
	nicq->gso = nicq_gso_bits(conf->gso);
	RING_INIT(nicq->fill, conf->fill);
	RING_INIT(nicq->comp, conf->comp);
	RING_INIT(nicq->tx, conf->tx);
	nicq->fill.flags = (void *)(uintptr_t)conf->fill.flags;
	nicq->tx.flags = (void *)(uintptr_t)conf->tx.flags;
	nicq->fill_prod = *nicq->fill.producer;
	nicq->tx_prod = *nicq->tx.producer;
	nicq->comp_cons = *nicq->comp.consumer;
	for (uint32_t i = 0; i < conf->rx_frames; i++)
		nicq->fill.ring[nicq->fill_prod++ & nicq->fill.mask] = (uint64_t)i * conf->chunk;
	store_release(nicq->fill.producer, nicq->fill_prod);
	for (uint32_t i = 0; i < conf->tx_frames; i++)
		nicq->free[nicq->nr_free++] = ((uint64_t)conf->rx_frames + i) * conf->chunk;
	*out = nicq;
	return 0;
}

void xv_nicq_free(struct xv_nicq *nicq)
{
	if (!nicq)
		return;
	free(nicq->free);
	free(nicq);
}

const struct xv_nicq_counters *xv_nicq_counters(const struct xv_nicq *nicq)
{
	return &nicq->counters;
}

int xv_xsk_new(struct xv_nicq *nicq, const struct xv_xsk_conf *conf, struct xv_xsk **out)
{
	struct xv_xsk *xsk;

	if (!ring_fits(&conf->rx, 1))
		return -EINVAL;
	xsk = aligned_alloc(64, ALIGN_UP(sizeof(*xsk), 64));
	if (!xsk)
		return -ENOMEM;
	memset(xsk, 0, sizeof(*xsk));
	xsk->nicq = nicq;
	RING_INIT(*xsk, conf->rx);
	xsk->cons = *xsk->consumer;
	xsk->keep = conf->rx.size / 2;
	xsk->rx = (struct source){.fd = conf->fd, .epfd = -1};
	*out = xsk;
	return 0;
}

void xv_xsk_free(struct xv_xsk *xsk)
{
	uint32_t backlog;

	if (!xsk)
		return;
	while ((backlog = xsk_backlog(xsk))) /* no worker sees it any more */
		give_back(xsk, backlog, 0);
	free(xsk);
}

uint64_t xv_xsk_bytes(void)
{
	return sizeof(struct xv_xsk);
}

const struct xv_xsk_counters *xv_xsk_counters(const struct xv_xsk *xsk)
{
	return &xsk->counters;
}
