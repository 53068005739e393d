/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-net headers (virtio 1.2, 5.1.6), and the checksums that frames of local stacks lack. */
#ifndef XV_NETHDR_H
#define XV_NETHDR_H

#include <linux/virtio_net.h>

#include "csum.h"
#include "view.h"

#define ETH_HEADER 14u
#define NET_MAX_FRAME (ETH_HEADER + 2u * 4u + 65535u)

/* Whether the two bytes at an Ethernet type are a VLAN tag's (802.1Q or 802.1ad). */
static inline bool net_is_tag(const uint8_t *type)
{
	return (type[0] == 0x81 && type[1] == 0x00) || (type[0] == 0x88 && type[1] == 0xa8);
}

/*
 * Take the offload facts of a guest's header (a private copy) into the view; `csum`: VIRTIO_NET_F_CSUM was negotiated.
 * False when it asks for what was not negotiated or points outside the frame.
 */
static inline bool net_header_in(const struct virtio_net_hdr *hdr, bool csum, struct xv_view *view)
{
	view->flags = 0;
	if (likely(!((hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) | hdr->gso_type)))
		return true;
	if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE || !csum)
		return false;
	/* all 16-bit, summed as 32-bit: nothing wraps */
	if (hdr->csum_start < ETH_HEADER || (uint32_t)hdr->csum_start + hdr->csum_offset + 2u > view->len)
		return false;
	view->flags = VIEW_NEEDS_CSUM;
	view->csum_start = hdr->csum_start;
	view->csum_offset = hdr->csum_offset;
	return true;
}

/* The header that hands a view to a guest that understands it. */
static inline void net_header_out(struct virtio_net_hdr *hdr, const struct xv_view *view)
{
	if (unlikely(view->flags & VIEW_NEEDS_CSUM)) {
		hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		hdr->csum_start = view->csum_start;
		hdr->csum_offset = view->csum_offset;
	}
}

/* What to write into the checksum field. A sum of 0 is sent as 0xffff, which TCP takes too and UDP needs (RFC 768). */
static inline uint16_t net_csum_finish(uint64_t sum)
{
	uint16_t folded = (uint16_t)~csum_fold(sum);

	return folded ? folded : 0xffff;
}

/*
 * Whether this TCP or UDP frame (one piece, len bytes) carries only its pseudo-header's sum, as a local stack leaves
 * it for the device to finish (CHECKSUM_PARTIAL); if so, sets csum_start, csum_offset and VIEW_NEEDS_CSUM. A finished
 * checksum that happens to look so is marked too: finishing it again gives the same checksum.
 */
void net_find_partial(const uint8_t *frame, uint32_t len, struct xv_view *view);

#endif
