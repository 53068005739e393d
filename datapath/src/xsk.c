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

uint32_t xsk_backlog(const struct xv_xsk *xsk)
{
	/* acquire pairs with the kernel's smp_store_release() in __xskq_prod_submit() */
	return load_acquire(xsk->producer) - xsk->cons;
}

void xsk_rx_burst(struct xv_xsk *xsk, struct xv_burst *burst)
{
	const struct xv_nicq *nicq = xsk->nicq;
	const bool partial = nicq->flags & XV_NICQ_PARTIAL_CSUM;
	uint32_t n = MIN(xsk_backlog(xsk), XV_BURST);

	burst->nr = n;
	burst->nr_segs = 0;
	for (uint32_t i = 0; i < n; i++)
		prefetch(nicq->umem + xsk->ring[(xsk->cons + i) & xsk->mask].addr);
	for (uint32_t i = 0; i < n; i++) {
		const struct xdp_desc *desc = &xsk->ring[(xsk->cons + i) & xsk->mask];
		struct xv_view *view = &burst->views[i];

		view->first = (struct xv_seg){nicq->umem + desc->addr, desc->len};
		view->len = desc->len;
		view->nr_more = 0;
		view->flags = 0;
		view->gso_type = 0;
		if (partial)
			net_find_partial(view->first.data, view->len, view);
	}
}

void xsk_rx_release(struct xv_xsk *xsk, uint32_t n)
{
	struct xv_nicq *nicq = xsk->nicq;
	uint64_t bytes = 0;
	bool wake;

	if (!n)
		return;
	spin_lock(&nicq->fill_lock);
	for (uint32_t i = 0; i < n; i++) {
		const struct xdp_desc *desc = &xsk->ring[(xsk->cons + i) & xsk->mask];

		nicq->fill.ring[nicq->fill_prod++ & nicq->fill.mask] = ALIGN_DOWN(desc->addr, nicq->chunk);
		bytes += desc->len;
	}
	/* release pairs with the kernel's acquire of the producer in xskq_cons_peek */
	store_release(nicq->fill.producer, nicq->fill_prod);
	wake = load_once(nicq->fill.flags) & XDP_RING_NEED_WAKEUP;
	spin_unlock(&nicq->fill_lock);
	xsk->cons += n;
	store_release(xsk->consumer, xsk->cons);
	count(xsk->counters.packets, n);
	count(xsk->counters.bytes, bytes);
	if (unlikely(wake)) /* only zero-copy drivers ask; the socket must be one that receives */
		recvfrom(xsk->rx.fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

/* Take sent frames back. Called with tx_lock. */
static void reap(struct xv_nicq *nicq)
{
	uint32_t n = load_acquire(nicq->comp.producer) - nicq->comp_cons;

	for (uint32_t i = 0; i < n; i++)
		nicq->free[nicq->nr_free++] = nicq->comp.ring[(nicq->comp_cons + i) & nicq->comp.mask];
	nicq->comp_cons += n;
	if (n)
		store_release(nicq->comp.consumer, nicq->comp_cons);
}

/* The frame in one piece at `to`, its checksum finished; bytes copied. */
static uint32_t linearize(uint8_t *to, const struct xv_view *view)
{
	const bool finish = view->flags & VIEW_NEEDS_CSUM;
	uint32_t start = finish ? view->csum_start : view->len, done = 0;
	struct csum csum = {0, false};

	for (uint32_t i = 0; i <= view->nr_more; i++) {
		const struct xv_seg *seg = i ? &view->more[i - 1] : &view->first;
		uint32_t plain = start > done ? MIN(start - done, seg->len) : 0;

		if (plain)
			xv_copy(to + done, seg->data, plain);
		if (plain < seg->len)
			csum_add(&csum, csum_copy(to + done + plain, seg->data + plain, seg->len - plain), seg->len - plain);
		done += seg->len;
	}
	if (finish) {
		uint16_t sum = net_csum_finish(csum.sum);

		memcpy(to + view->csum_start + view->csum_offset, &sum, sizeof(sum));
	}
	return done;
}

/* A frame longer than an untagged one may be: whether its VLAN tags, two at most, account for it. */
static bool tagged_fits(const struct xv_nicq *nicq, const struct xv_view *view, uint32_t max_len)
{
	uint8_t header[ETH_HEADER + 4] = {0};
	uint32_t tags = 0;

	view_peek(view, header, sizeof(header));
	for (uint32_t at = 12; tags < 2 && net_is_tag(header + at); at += 4)
		tags++;
	return view->len <= MIN(max_len + 4 * tags, nicq->chunk);
}

void nicq_tx_burst(struct xv_nicq *nicq, const struct xv_view *const *views, uint32_t n, uint32_t max_len, uint64_t *drops)
{
	struct xv_nicq_counters *counters = &nicq->counters;
	uint64_t packets = 0, bytes = 0, copied = 0, finished = 0;

	if (unlikely(load_once(&nicq->nr_free) < n)) /* asked without the lock: at worst one flush too many or too few */
		nicq_tx_flush(nicq);
	spin_lock(&nicq->tx_lock);
	reap(nicq); /* at once, not when frames run out: those sent last are still in the cache */
	for (uint32_t i = 0; i < n; i++) {
		const struct xv_view *view = views[i];
		struct xdp_desc *desc;
		uint64_t addr;

		if (unlikely(view->len > max_len) && !tagged_fits(nicq, view, max_len)) {
			count(drops[XV_DROP_TOO_BIG], 1);
			continue;
		}
		if (unlikely(!nicq->nr_free)) {
			count(drops[XV_DROP_NO_FRAMES], 1);
			continue;
		}
		addr = nicq->free[--nicq->nr_free];
		if (likely(!view->nr_more && !view->flags)) {
			xv_copy(nicq->umem + addr, view->first.data, view->first.len);
			copied += view->first.len;
		} else {
			copied += linearize(nicq->umem + addr, view);
		}
		desc = &nicq->tx.ring[nicq->tx_prod++ & nicq->tx.mask];
		desc->addr = addr;
		desc->len = view->len;
		desc->options = 0;
		packets++;
		bytes += view->len;
		finished += view->flags & VIEW_NEEDS_CSUM;
	}
	store_release(nicq->tx.producer, nicq->tx_prod);
	count(counters->tx_packets, packets);
	count(counters->tx_bytes, bytes);
	count(counters->copied_bytes, copied);
	count(counters->csum_finished, finished);
	spin_unlock(&nicq->tx_lock);
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
	    !ring_fits(&conf->tx, conf->tx_frames))
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
		xsk_rx_release(xsk, backlog);
	free(xsk);
}

const struct xv_xsk_counters *xv_xsk_counters(const struct xv_xsk *xsk)
{
	return &xsk->counters;
}
