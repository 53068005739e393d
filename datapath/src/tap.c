// SPDX-License-Identifier: Apache-2.0
/*
 * One queue of a tap, as the way to the network behind it.
 *
 * Theory of operation. The descriptor is one of /dev/net/tun's, with a virtio-net header before each frame
 * (IFF_VNET_HDR), and it never blocks. Control makes it, and owns it.
 *
 * From the tap: read() takes a whole frame or loses the rest of it, and cannot look first. So a frame's destination is
 * not known before it has been read, and it can't be read into a guest's memory: the next one may be another guest's. Frames
 * are read one behind another into memory of ours (the kernel's copy), and viewed there; placing them is the data
 * plane's one copy, which the receiving guest's counters have. GSO frames come whole; who does not take such gets them
 * cut (switch.c). What a guest has no buffers for stays there, and nothing more is read until it has gone: then
 * frames wait in the tap's own queue, and the kernel drops what that does not hold (the tap's tx_dropped).
 *
 * To the tap: writev() straight from the sending guest's buffers. The kernel's copy is the only one, and we copy
 * nothing. It believes the virtio-net header and the headers of a GSO frame, so it gets only ours: made from the
 * checked view, and from the private copy of the frame's headers. A guest can change payload meanwhile, no more. The
 * kernel takes the frame through its bridge, or wherever it goes, within the call.
 *
 * A tap that is down says EIO to whoever writes, and is silent to whoever reads. One that was deleted says EBADFD and
 * more; it is noted (`gone`) for control to tell, not read any more, and what guests send there is dropped (link_down).
 *
 * Several workers may write to one queue: nothing here is shared but counters, which are added to atomically. It is
 * read by one worker.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "nethdr.h"
#include "port.h"

#define PIECES 1024u /* UIO_MAXIOV: what writev() takes */
#define BURST_BYTES (128u << 10) /* of large frames no more at once than stays in the cache until it is copied on */
#define ROOM ALIGN_UP(NET_MAX_FRAME + 1, 64u) /* for a frame; one that fills it was cut off */
#define GSO_ALL UINT32_MAX

/* ---- from the tap ---- */

static bool make_view(struct xv_tapq *tap, const struct net_header *hdr, uint8_t *frame, uint32_t len)
{
	struct xv_view *view = &tap->views[tap->nr];

	*view = (struct xv_view){.first = {frame, len}, .len = len};
	return len >= ETH_HEADER && len <= NET_MAX_FRAME && net_header_in(&hdr->mrg.hdr, true, GSO_ALL, view) &&
	       (!view->gso_type || gso_check(view, &tap->gso_headers[tap->nr]));
}

static void receive(struct xv_tapq *tap)
{
	uint32_t used = 0;

	for (uint32_t calls = 0; calls < XV_BURST && used < BURST_BYTES; calls++) {
		struct net_header hdr = {0};
		uint8_t *frame = tap->buffer + used;
		const struct iovec iov[2] = {{&hdr, tap->header_len}, {frame, ROOM}};
		ssize_t len = readv(tap->rx.fd, iov, 2);

		if (len < 0) {
			if (errno == EAGAIN || errno == EINTR)
				return;
			if (errno == EINVAL || errno == ENOMEM) { /* of a kind that has no virtio-net header */
				count(tap->counters.rx_dropped, 1);
				continue;
			}
			store_once(&tap->counters.gone, (uint64_t)errno);
			return;
		}
		if (len < tap->header_len || !make_view(tap, &hdr, frame, (uint32_t)len - tap->header_len)) {
			count(tap->counters.rx_dropped, 1);
			continue;
		}
		count(tap->counters.rx_packets, 1);
		count(tap->counters.rx_bytes, tap->views[tap->nr].len);
		used += ALIGN_UP(tap->views[tap->nr].len, 64u);
		tap->nr++;
	}
}

void tap_rx_burst(struct xv_tapq *tap, struct xv_burst *burst)
{
	if (!tap->nr && likely(!tap->counters.gone))
		receive(tap);
	burst->nr = tap->nr - tap->done;
	burst->nr_segs = 0;
	memcpy(burst->views, tap->views + tap->done, burst->nr * sizeof(burst->views[0]));
}

void tap_rx_release(struct xv_tapq *tap, uint32_t n)
{
	tap->done += n;
	if (tap->done == tap->nr)
		tap->done = tap->nr = 0;
}

/* ---- to the tap ---- */

/* The kernel could not read a guest's buffers. If their memory is gone, reading it ourselves gives the guest up. */
cold static void touch(const struct xv_view *view)
{
	for (uint32_t i = 0; i <= view->nr_more; i++) {
		const struct xv_seg *seg = i ? &view->more[i - 1] : &view->first;

		for (uint32_t at = 0; at < seg->len; at += MIN(4096u, seg->len - at))
			(void)*(volatile const uint8_t *)(seg->data + at);
		if (seg->len)
			(void)*(volatile const uint8_t *)(seg->data + seg->len - 1);
	}
}

/* Why a frame was not taken. */
cold static enum xv_drop refusal(struct xv_tapq *tap, const struct xv_view *view)
{
	switch (errno) {
	case EIO: /* it is down */
		return XV_DROP_LINK_DOWN;
	case EBADFD: /* it was deleted */
	case ENODEV:
		store_once(&tap->counters.gone, (uint64_t)errno);
		return XV_DROP_LINK_DOWN;
	case EFAULT:
		touch(view);
		return XV_DROP_BAD_CHAIN;
	case EINVAL: /* a header that the kernel finds fault with */
		return XV_DROP_BAD_HEADER;
	default: /* ENOMEM, ENOBUFS, EAGAIN */
		return XV_DROP_NO_FRAMES;
	}
}

/* 1: sent; 0: dropped and counted; -1: a GSO frame of a kind that this kernel does not take, to be cut. */
static int send_frame(struct xv_tapq *tap, const struct xv_view *view, uint64_t *drops)
{
	struct net_header hdr = {0};
	uint8_t header[GSO_HEADER_MAX];
	struct iovec iov[PIECES];
	uint32_t n = 1, pieces;
	enum xv_drop why;

	net_header_out(&hdr.mrg.hdr, view);
	iov[0] = (struct iovec){&hdr, tap->header_len};
	if (view->gso_type) {
		gso_whole_header(view, header);
		iov[n++] = (struct iovec){header, view->gso->len};
	}
	pieces = view_gather(view, view->gso_type ? view->gso->len : 0, iov + n, PIECES - n);
	if (unlikely(!pieces)) {
		count(drops[XV_DROP_BAD_CHAIN], 1);
		view_tx_dropped(view, XV_DROP_BAD_CHAIN);
		return 0;
	}
	if (likely(writev(tap->rx.fd, iov, (int)(n + pieces)) >= 0))
		return 1;
	if (errno == EINVAL && view->gso_type)
		return -1;
	why = refusal(tap, view);
	count(drops[why], 1);
	view_tx_dropped(view, why);
	return 0;
}

uint32_t tap_tx_burst(struct xv_tapq *tap, const struct xv_view *const *views, uint32_t n, uint32_t max_len,
		      uint64_t *drops)
{
	uint64_t packets = 0, bytes = 0, partial = 0;

	for (uint32_t i = 0; i < n; i++) {
		const struct xv_view *view = views[i];

		if (unlikely(view->len > max_len) && view->len > max_len + net_tag_bytes(view)) {
			count(drops[XV_DROP_TOO_BIG], 1);
			view_tx_dropped(view, XV_DROP_TOO_BIG);
			continue;
		}
		if (unlikely(send_frame(tap, view, drops) <= 0))
			continue;
		packets++;
		bytes += view->len;
		partial += view->flags & VIEW_NEEDS_CSUM;
	}
	__atomic_fetch_add(&tap->counters.tx_packets, packets, __ATOMIC_RELAXED);
	__atomic_fetch_add(&tap->counters.tx_bytes, bytes, __ATOMIC_RELAXED);
	if (partial)
		__atomic_fetch_add(&tap->counters.tx_csum_partial, partial, __ATOMIC_RELAXED);
	return (uint32_t)packets;
}

bool tap_tx_gso(struct xv_tapq *tap, const struct xv_view *view, uint32_t max_len, uint64_t *drops)
{
	int sent;

	/* the tags of a frame are on top of what the device's MTU allows, as in tap_tx_burst() */
	if (!net_gso_allowed(view->gso_type, tap->gso) ||
	    view->gso->len + view->gso_size > max_len + view->gso->h.ip - ETH_HEADER)
		return false;
	sent = send_frame(tap, view, drops);
	if (sent > 0) {
		__atomic_fetch_add(&tap->counters.tx_gso_packets, 1u, __ATOMIC_RELAXED);
		__atomic_fetch_add(&tap->counters.tx_gso_bytes, view->len, __ATOMIC_RELAXED);
	}
	return sent >= 0;
}

/* ---- life ---- */

int xv_tapq_new(const struct xv_tapq_conf *conf, struct xv_tapq **out)
{
	const int flags = fcntl(conf->fd, F_GETFL);
	struct xv_tapq *tap;

	if (flags < 0)
		return -errno;
	/* a worker must never block in it */
	if (!(flags & O_NONBLOCK) || (conf->header_len != sizeof(struct virtio_net_hdr) &&
				      conf->header_len != sizeof(struct virtio_net_hdr_mrg_rxbuf)))
		return -EINVAL;
	tap = aligned_alloc(64, ALIGN_UP(sizeof(*tap), 64));
	if (!tap)
		return -ENOMEM;
	memset(tap, 0, sizeof(*tap));
	tap->buffer = aligned_alloc(64, BURST_BYTES + ROOM);
	tap->gso_headers = calloc(XV_BURST, sizeof(tap->gso_headers[0]));
	if (!tap->buffer || !tap->gso_headers) {
		xv_tapq_free(tap);
		return -ENOMEM;
	}
	tap->header_len = conf->header_len;
	tap->queue = conf->queue;
	tap->gso = nicq_gso_bits(conf->gso);
	tap->rx = (struct source){.fd = conf->fd, .epfd = -1};
	*out = tap;
	return 0;
}

void xv_tapq_free(struct xv_tapq *tap)
{
	if (!tap)
		return;
	free(tap->buffer);
	free(tap->gso_headers);
	free(tap);
}

const struct xv_tapq_counters *xv_tapq_counters(const struct xv_tapq *tap)
{
	return &tap->counters;
}
