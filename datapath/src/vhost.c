// SPDX-License-Identifier: Apache-2.0
/*
 * A guest's queue pair as a port. Split and packed rings go through the same functions, made twice: `packed` is a
 * constant in each.
 *
 * From the guest: descriptors of a burst are prefetched, read once, translated, and each frame becomes a view of the
 * guest's own buffers, with its virtio-net header read once into the view. Chains are given back (used) in order once
 * the burst has been forwarded.
 *
 * Towards the guest: nearly every buffer is one writable descriptor with room for header and frame. Runs of those go
 * through three short loops (translate and prefetch, copy, record); anything else goes one frame at a time through
 * deliver_slow(), which spreads header and frame over any layout, merges buffers, and finishes a checksum on the way.
 */
#include "copy.h"
#include "csum.h"
#include "nethdr.h"
#include "port.h"

/* ---- from the guest ---- */

/*
 * A chain of several descriptors, an indirect one, or a faulty one: the walk decides, from what the table says now.
 * False: there is no view of it. It is counted as dropped only if it is the burst's first, for only then it is skipped.
 */
static bool view_walk(struct xv_vring *vr, const struct xv_buf *buf, struct xv_burst *burst, struct gso_header *gso,
		      uint32_t *budget)
{
	struct xv_view *view = &burst->views[burst->nr];
	struct xv_seg *segs = &burst->segs[burst->nr_segs];
	struct net_header hdr;
	uint32_t skip = vr->header_len, at = 0, nr;
	enum xv_drop why;
	uint64_t bytes;
	enum chain_result result =
		vring_chain(vr, buf, CHAIN_READ, segs, XV_BURST_SEGS - burst->nr_segs, &nr, &bytes, NULL, budget);

	if (unlikely(result == CHAIN_FAULT))
		return false;
	why = XV_DROP_BAD_CHAIN;
	if (unlikely(result != CHAIN_OK))
		goto drop;
	why = XV_DROP_BAD_HEADER;
	if (unlikely(bytes < skip))
		goto drop;
	why = XV_DROP_RUNT;
	if (unlikely(bytes - skip < ETH_HEADER))
		goto drop;
	why = XV_DROP_TOO_BIG;
	if (unlikely(bytes - skip > NET_MAX_FRAME))
		goto drop;
	/* the header may be spread over any number of descriptors (virtio 1.2, 5.1.6, VIRTIO_F_ANY_LAYOUT) */
	for (uint32_t done = 0; done < skip;) {
		uint32_t piece = MIN(skip - done, segs[at].len);

		memcpy((uint8_t *)&hdr + done, segs[at].data, piece);
		done += piece;
		segs[at].data += piece;
		segs[at].len -= piece;
		if (!segs[at].len)
			at++;
	}
	view->first = segs[at];
	view->more = &segs[at + 1];
	view->nr_more = (uint16_t)(nr - at - 1);
	view->len = (uint32_t)(bytes - skip);
	why = XV_DROP_BAD_HEADER;
	if (unlikely(!net_header_in(&hdr.mrg.hdr, vr->csum, vr->host_gso, view)))
		goto drop;
	if (view->gso_type && !gso_check(view, gso))
		goto drop;
	burst->nr_segs += nr;
	return true;
drop:
	if (!burst->nr)
		count(vr->queue->tx.drops[why], 1);
	return false;
}

/* The common shape: one readable descriptor, header and frame together in one region. */
static inline bool view_single(struct xv_vring *vr, const struct vring_desc *desc, struct xv_view *view,
			       struct gso_header *gso)
{
	const uint32_t skip = vr->header_len;
	struct virtio_net_hdr hdr;
	uint32_t got;
	uint8_t *p;

	if (unlikely(desc->flags & (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT)))
		return false;
	if (unlikely(desc->len < skip + ETH_HEADER || desc->len > skip + NET_MAX_FRAME))
		return false;
	p = mem_at(vr->mem, desc->addr, desc->len, &got);
	if (unlikely(got < desc->len))
		return false;
	memcpy(&hdr, p, sizeof(hdr));
	view->first = (struct xv_seg){p + skip, desc->len - skip};
	view->nr_more = 0;
	view->len = desc->len - skip;
	if (unlikely(!net_header_in(&hdr, vr->csum, vr->host_gso, view)))
		return false;
	return likely(!view->gso_type) || gso_check(view, gso);
}

static inline always_inline void rx_burst(struct xv_vring *vr, struct xv_burst *burst, struct burst_chains *chains,
					  const bool packed)
{
	uint32_t budget = XV_BURST_SEGS, segments = 0, n;
	struct vring_desc descs[XV_BURST];

	burst->nr = burst->nr_segs = 0;
	chains->skipped = 0;
	n = vring_peek(vr, packed, vr->next, chains->buf, descs, XV_BURST);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t got;

		prefetch(mem_at(vr->mem, descs[i].addr, 1, &got));
	}
	for (uint32_t i = 0; i < n; i++) {
		struct gso_header *gso = &chains->gso[burst->nr];

		if (unlikely(!view_single(vr, &descs[i], &burst->views[burst->nr], gso)) &&
		    !view_walk(vr, &chains->buf[i], burst, gso, &budget)) {
			/* dropped, faulted, or no room for its segments: a later burst's business, unless this one is empty */
			if (burst->nr || guest_faulted(vr->guest))
				break;
			chains->skipped++;
			if (!budget)
				break;
			continue;
		}
		if (unlikely(burst->views[burst->nr].gso_type)) { /* so many frames to be made of it, at worst */
			segments += burst->views[burst->nr].len / burst->views[burst->nr].gso_size;
			if (segments > XV_BURST_SEGS && burst->nr)
				break;
		}
		chains->len[burst->nr] = burst->views[burst->nr].len;
		burst->nr++;
	}
}

void guest_rx_burst(struct xv_vring *vr, struct xv_burst *burst, struct burst_chains *chains)
{
	if (vr->packed)
		rx_burst(vr, burst, chains, true);
	else
		rx_burst(vr, burst, chains, false);
}

static inline always_inline bool rx_release(struct xv_vring *vr, const struct xv_buf *bufs, uint32_t n, const bool packed)
{
	vring_use(vr, packed, bufs, NULL, n);
	return vring_publish(vr, packed);
}

void guest_rx_release(struct xv_vring *vr, const struct burst_chains *chains, uint32_t n, struct call_ctx *ctx)
{
	struct xv_tx_counters *counters = &vr->queue->tx;
	const uint32_t used = chains->skipped + n;
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < n; i++)
		bytes += chains->len[i];
	count(counters->packets, used);
	count(counters->bytes, bytes);
	if (vr->packed ? rx_release(vr, chains->buf, used, true) : rx_release(vr, chains->buf, used, false))
		vring_call(vr, &counters->calls, &counters->calls_failed, &ctx->calling);
}

/* ---- towards the guest ---- */

static inline void write_plain_header(uint8_t *to, uint32_t header_len, const struct xv_view *view)
{
	struct net_header hdr = {.mrg.num_buffers = 1};

	net_whole_header_out(&hdr, header_len, view);
	/* each length a constant */
	if (likely(header_len == sizeof(hdr.mrg)))
		memcpy(to, &hdr, sizeof(hdr.mrg));
	else if (header_len == sizeof(hdr.mrg.hdr))
		memcpy(to, &hdr, sizeof(hdr.mrg.hdr));
	else
		memcpy(to, &hdr, sizeof(hdr));
}

/* Writes a stream of bytes over the guest's segments. */
struct writer {
	const struct xv_seg *segs;
	uint32_t at, offset;
};

static uint32_t put(struct writer *w, const uint8_t *from, uint32_t len, struct csum *csum)
{
	uint32_t copied = 0;

	while (len) {
		uint32_t piece = MIN(len, w->segs[w->at].len - w->offset);
		uint8_t *to = w->segs[w->at].data + w->offset;

		if (csum)
			csum_add(csum, csum_copy(to, from, piece), piece);
		else
			memcpy(to, from, piece);
		from += piece;
		len -= piece;
		copied += piece;
		w->offset += piece;
		if (w->offset == w->segs[w->at].len) {
			w->at++;
			w->offset = 0;
		}
	}
	return copied;
}

/* What the writer has written, for the dirty log. */
static void wrote(const struct xv_vring *vr, const struct writer *w)
{
	for (uint32_t i = 0; vr->log && i < w->at; i++)
		vring_wrote(vr, w->segs[i].data, w->segs[i].len);
	if (w->offset)
		vring_wrote(vr, w->segs[w->at].data, w->offset);
}

/* Copy the frame; with `finish`, sum it from csum_start on and put the checksum where it belongs. Bytes copied. */
static uint32_t put_frame(struct writer *w, const struct xv_view *view, bool finish)
{
	struct writer frame = *w;
	struct csum csum = {0, false};
	uint32_t done = 0, start = finish ? view->csum_start : view->len, copied = 0;

	for (uint32_t i = 0; i <= view->nr_more; i++) {
		const struct xv_seg *seg = i ? &view->more[i - 1] : &view->first;
		uint32_t plain = start > done ? MIN(start - done, seg->len) : 0;

		copied += put(w, seg->data, plain, NULL);
		copied += put(w, seg->data + plain, seg->len - plain, &csum);
		done += seg->len;
	}
	if (finish) {
		uint16_t sum = net_csum_finish(csum.sum);
		uint32_t skip = view->csum_start + view->csum_offset;

		while (skip >= frame.segs[frame.at].len - frame.offset) {
			skip -= frame.segs[frame.at].len - frame.offset;
			frame.at++;
			frame.offset = 0;
		}
		frame.offset += skip;
		put(&frame, (const uint8_t *)&sum, sizeof(sum), NULL);
	}
	return copied;
}

/* Copy a joined frame, and sum the payload of each frame in it on the way: false when one is not what its sum says. */
static bool put_joined(struct writer *w, const struct xv_view *view, uint64_t *copied)
{
	const struct gso_part *part = view->parts;
	uint32_t left = part->len;
	struct csum csum = {part->sum, false};

	*copied += put(w, view->first.data, view->first.len, NULL);
	for (uint32_t i = 0; i < view->nr_more; i++) {
		const struct xv_seg *seg = &view->more[i];

		*copied += put(w, seg->data, seg->len, &csum);
		left -= seg->len;
		if (left)
			continue;
		if (csum_fold(csum.sum) != 0xffff)
			return false;
		if (i + 1 < view->nr_more) {
			part++;
			left = part->len;
			csum = (struct csum){part->sum, false};
		}
	}
	return true;
}

#define MERGE_MAX 256u  /* buffers and segments for one frame towards a guest */
#define BUDGET_MAX 512u /* descriptors looked at for it; a guest that makes us look at more is faulted */

enum delivery { DELIVERED, DROPPED, NO_BUFFERS, UNJOIN };

/*
 * Whether the copy has to finish the checksum. A frame that stands for many is here only if the guest takes such, or has
 * switched that off in this turn (switch.c).
 */
static inline bool must_finish(const struct xv_vring *vr, const struct xv_view *view)
{
	return view->flags & VIEW_NEEDS_CSUM && !view->gso_type && !vring_takes_csum(vr);
}

/* Receive the frame of a VIEW_SOCKET. False: these buffers' memory is gone, and so is the frame. */
static bool fetch_frame(struct writer *w, const struct xv_view *view)
{
	struct virtio_net_hdr known; /* by the view */
	struct iovec iov[MERGE_MAX + 1] = {{&known, sizeof(known)}};
	uint32_t n = 1;

	for (uint32_t left = view->len, piece; left; left -= piece) {
		piece = MIN(left, w->segs[w->at].len - w->offset);
		iov[n++] = (struct iovec){w->segs[w->at].data + w->offset, piece};
		w->offset += piece;
		if (w->offset == w->segs[w->at].len) {
			w->at++;
			w->offset = 0;
		}
	}
	return packet_fetch(view->socket, iov, n) == view->len;
}

/* One frame into any layout of buffers. Nothing is consumed unless it is delivered. */
static enum delivery deliver_slow(struct xv_vring *vr, const struct xv_view *view, uint64_t *copied)
{
	const uint64_t need = (uint64_t)vr->header_len + view->len;
	const bool finish = must_finish(vr, view);
	struct net_header hdr = {0};
	struct xv_seg segs[MERGE_MAX];
	struct xv_buf bufs[MERGE_MAX];
	uint32_t room[MERGE_MAX], nr_segs = 0, buffers = 0, budget = BUDGET_MAX;
	cursor at = vr->next;
	uint64_t have = 0;

	do {
		struct xv_buf *buf = &bufs[buffers];
		struct vring_desc desc;
		uint32_t nr;
		uint64_t bytes;
		enum chain_result result;

		if (buffers == MERGE_MAX || buffers == vr->num)
			goto too_big; /* it will never fit */
		if (!vring_peek(vr, vr->packed, at, buf, &desc, 1))
			return NO_BUFFERS;
		result = vring_chain(vr, buf, CHAIN_WRITE, segs + nr_segs, MERGE_MAX - nr_segs, &nr, &bytes, NULL, &budget);
		if (result == CHAIN_TOO_LONG && budget && have + bytes < need)
			goto too_big;
		if (!budget || result == CHAIN_WRONG_WAY || (result == CHAIN_OK && !bytes))
			vring_fault(vr, XV_FAULT_CHAIN, buf->id);
		if (guest_faulted(vr->guest))
			return NO_BUFFERS;
		nr_segs += nr;
		room[buffers] = (uint32_t)MIN(bytes, need - have);
		have += room[buffers];
		at = vring_after(vr, vr->packed, at, buf);
		buffers++;
	} while (have < need && vr->mergeable);
	if (have < need)
		goto too_big;

	struct writer w = {segs, 0, 0};

	net_whole_header_out(&hdr, vr->header_len, view);
	if (finish)
		memset(&hdr.mrg.hdr, 0, sizeof(hdr.mrg.hdr));
	hdr.mrg.num_buffers = (uint16_t)buffers;
	put(&w, (const uint8_t *)&hdr, vr->header_len, NULL);
	if (view->flags & VIEW_VERIFY) {
		/* what has been written lies in buffers that stay the device's */
		if (!put_joined(&w, view, copied)) {
			wrote(vr, &w);
			return UNJOIN;
		}
	} else if (view->flags & VIEW_SOCKET) {
		if (!fetch_frame(&w, view)) {
			wrote(vr, &w);
			count(vr->queue->rx.drops[XV_DROP_NO_BUFFERS], 1);
			view_rx_dropped(view, XV_DROP_NO_BUFFERS);
			return DROPPED;
		}
		*copied += view->len;
	} else {
		*copied += put_frame(&w, view, finish);
	}
	wrote(vr, &w);
	vring_use(vr, vr->packed, bufs, room, buffers);
	if (finish)
		count(vr->queue->rx.csum_finished, 1);
	return DELIVERED;

too_big:
	if (view->gso_type && view->parts) /* each of its frames may fit */
		return UNJOIN;
	count(vr->queue->rx.drops[XV_DROP_TOO_BIG], 1);
	view_rx_dropped(view, XV_DROP_TOO_BIG);
	return DROPPED;
}

/*
 * How many of the next buffers are plain enough for views[0..n): one writable descriptor that holds header and frame.
 * Sets bufs[], to[] and room[] (bytes of both) for those; `*there` is how many were looked at.
 */
static inline always_inline uint32_t find_places(struct xv_vring *vr, const struct xv_view *const *views, uint32_t n,
						 struct xv_buf *bufs, uint8_t **to, uint32_t *room, uint32_t *there,
						 const bool packed)
{
	struct vring_desc descs[XV_BURST];

	*there = vring_peek_plain(vr, packed, vr->next, bufs, descs, n);
	for (uint32_t i = 0; i < *there; i++) {
		const uint32_t need = vr->header_len + views[i]->len;
		uint32_t got;

		if (unlikely(descs[i].flags != VRING_DESC_F_WRITE || descs[i].len < need))
			return i;
		if (unlikely(views[i]->flags & (VIEW_VERIFY | VIEW_SOCKET) || must_finish(vr, views[i])))
			return i;
		to[i] = mem_at(vr->mem, descs[i].addr, need, &got);
		if (unlikely(got < need))
			return i;
		room[i] = need;
		prefetch_write(to[i]);
		prefetch_write(to[i] + 64);
	}
	return *there;
}

static inline always_inline uint32_t tx_burst(struct xv_vring *vr, const struct xv_view *const *views, uint32_t n,
					      struct call_ctx *ctx, const bool packed)
{
	struct xv_rx_counters *counters = &vr->queue->rx;
	const uint32_t header_len = vr->header_len;
	uint64_t packets = 0, bytes = 0, copied = 0, partial = 0;
	cursor before;
	uint32_t done = 0;
	bool call = false;

	spin_lock(&vr->queue->rx_lock);
	before = vr->next;
	while (done < n) {
		struct xv_buf bufs[XV_BURST];
		uint8_t *places[XV_BURST];
		uint32_t room[XV_BURST], there, plain;

		plain = find_places(vr, views + done, MIN(n - done, XV_BURST), bufs, places, room, &there, packed);
		for (uint32_t i = 0; i < plain; i++) {
			const struct xv_view *view = views[done + i];
			uint8_t *to = places[i] + header_len;

			write_plain_header(places[i], header_len, view);
			xv_copy(to, view->first.data, view->first.len);
			to += view->first.len;
			copied += view->first.len;
			for (uint32_t j = 0; unlikely(j < view->nr_more); j++) {
				xv_copy(to, view->more[j].data, view->more[j].len);
				to += view->more[j].len;
				copied += view->more[j].len;
			}
			packets++;
			bytes += view->len;
			partial += view->flags & VIEW_NEEDS_CSUM;
		}
		for (uint32_t i = 0; unlikely(vr->log) && i < plain; i++)
			vring_wrote(vr, places[i], room[i]);
		vring_use(vr, packed, bufs, room, plain);
		done += plain;
		if (!there)
			break;
		if (plain < there) {
			enum delivery result = deliver_slow(vr, views[done], &copied);

			ctx->unjoin = result == UNJOIN;
			if (result == NO_BUFFERS || result == UNJOIN)
				break;
			if (result == DELIVERED) {
				packets++;
				bytes += views[done]->len;
				partial += views[done]->flags & VIEW_NEEDS_CSUM && !must_finish(vr, views[done]);
			}
			done++;
		}
	}
	if (vr->next != before) {
		count(counters->packets, packets);
		count(counters->bytes, bytes);
		count(counters->copied_bytes, copied);
		count(counters->csum_partial, partial);
		call = vring_publish(vr, packed);
		/* who waits for a kick of this ring has mostly had it; else it looks again by itself before long */
		if (unlikely(load_once(&vr->armed)))
			vring_disarm(vr);
	}
	spin_unlock(&vr->queue->rx_lock);
	if (call)
		vring_call(vr, &counters->calls, &counters->calls_failed, &ctx->calling);
	return done;
}

uint32_t guest_tx_burst(struct xv_vring *vr, const struct xv_view *const *views, uint32_t n, struct call_ctx *ctx)
{
	return vr->packed ? tx_burst(vr, views, n, ctx, true) : tx_burst(vr, views, n, ctx, false);
}
