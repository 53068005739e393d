/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A view: a frame where it lies, in UMEM or in the sending guest's memory, with the offload facts of its header.
 *
 * Views live for one turn of a worker. Whoever made a burst of them (an AF_XDP queue, a guest's transmit ring, the
 * packet socket) gives the frames back when the burst has been forwarded; until then the bytes stay where they are.
 * A view of guest memory may change under us at any moment: lengths and pointers are ours and checked, bytes are not.
 */
#ifndef XV_VIEW_H
#define XV_VIEW_H

#include <sys/uio.h>

#include "base.h"

#define XV_BURST_SEGS 1024u /* segments beyond the first, for all frames of a burst */

struct xv_seg {
	uint8_t *data;
	uint32_t len;
};

struct gso_header; /* gso.h */
struct gso_part;
struct xv_packet; /* port.h */

#define VIEW_NEEDS_CSUM 1u /* the checksum at csum_start + csum_offset holds only the pseudo-header's sum */
#define VIEW_SOCKET 4u     /* all of the frame still waits in `socket`, and `first` is a copy of its leading bytes */
#define VIEW_REFUSED 8u    /* not to be forwarded, and counted as dropped */
#define VIEW_VERIFY 2u     /* joined from frames whose checksums are to be verified while they are copied */

struct xv_view {
	struct xv_seg first;
	const struct xv_seg *more; /* nr_more segments that follow */
	uint32_t len;              /* of the whole frame, from the Ethernet header on */
	uint16_t nr_more;
	uint16_t csum_start, csum_offset; /* from the Ethernet header; only with VIEW_NEEDS_CSUM */
	uint16_t gso_size, hdr_len;       /* payload of a segment, and bytes of headers: only with a gso_type */
	uint8_t flags, gso_type;          /* gso_type: VIRTIO_NET_HDR_GSO_*, never without VIEW_NEEDS_CSUM */
	uint32_t to; /* destination, by the switch */
	uint16_t tci; /* of the tag that was taken out for the guest that it is just being delivered to */
	/*
	 * For the guest that the frame is just being delivered to, if it negotiated VIRTIO_NET_F_HASH_REPORT: set again for
	 * each one, by the switch, whoever else may only look.
	 */
	uint32_t hash;
	uint16_t hash_report; /* VIRTIO_NET_HASH_REPORT_* */
	/*
	 * For a capture of the port that sends it, or of the one that it is just being delivered to: 1 + enum xv_drop, why it was
	 * dropped. Noted always, by whoever drops it, and forgotten only for a port that is captured (capture_begin()).
	 */
	uint8_t tx_drop, rx_drop;
	const struct gso_header *gso; /* with a gso_type, of a guest's frame: its headers, checked */
	struct xv_packet *socket;      /* with VIEW_SOCKET */
	const struct gso_part *parts; /* with a gso_type, of what it was joined; NULL for a guest's frame */
};

struct xv_burst {
	struct xv_view views[XV_BURST];
	struct xv_seg segs[XV_BURST_SEGS];
	uint32_t nr, nr_segs;
};

/* Note why it is dropped: on its way from the sender, or to the receiver of this moment. See above for why it may be const. */
static inline void view_tx_dropped(const struct xv_view *view, enum xv_drop why)
{
	((struct xv_view *)(uintptr_t)view)->tx_drop = (uint8_t)(why + 1);
}

static inline void view_rx_dropped(const struct xv_view *view, enum xv_drop why)
{
	((struct xv_view *)(uintptr_t)view)->rx_drop = (uint8_t)(why + 1);
}

static inline void views_tx_dropped(const struct xv_view *const *views, uint32_t n, enum xv_drop why)
{
	for (uint32_t i = 0; i < n; i++)
		view_tx_dropped(views[i], why);
}

static inline void views_rx_dropped(const struct xv_view *const *views, uint32_t n, enum xv_drop why)
{
	for (uint32_t i = 0; i < n; i++)
		view_rx_dropped(views[i], why);
}

/* Copy up to `len` of the frame's leading bytes to `to`; returns how many there were. */
static inline uint32_t view_peek(const struct xv_view *view, void *to, uint32_t len)
{
	uint8_t *d = to;
	uint32_t done = MIN(len, view->first.len);

	memcpy(d, view->first.data, done);
	for (uint32_t i = 0; unlikely(done < len) && i < view->nr_more; i++) {
		uint32_t piece = MIN(len - done, view->more[i].len);

		memcpy(d + done, view->more[i].data, piece);
		done += piece;
	}
	return done;
}

/* The pieces of the frame behind its first `skip` bytes, as many as there are: 0 when that is more than `max`, or none. */
static inline uint32_t view_gather(const struct xv_view *view, uint32_t skip, struct iovec *iov, uint32_t max)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i <= view->nr_more; i++) {
		const struct xv_seg *seg = i ? &view->more[i - 1] : &view->first;

		if (seg->len <= skip) {
			skip -= seg->len;
			continue;
		}
		if (n == max)
			return 0;
		iov[n++] = (struct iovec){seg->data + skip, seg->len - skip};
		skip = 0;
	}
	return n;
}

#endif
