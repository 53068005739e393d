/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-net headers (virtio 1.2, 5.1.6), the headers of frames, and the checksums that frames of local stacks lack. */
#ifndef XV_NETHDR_H
#define XV_NETHDR_H

#include <linux/virtio_net.h>
#include <netinet/in.h>

#include "csum.h"
#include "view.h"

#define ETH_HEADER 14u
#define NET_MAX_FRAME (ETH_HEADER + 2u * 4u + 65535u)

/* Whether the two bytes at an Ethernet type are a VLAN tag's (802.1Q or 802.1ad). */
static inline bool net_is_tag(const uint8_t *type)
{
	return (type[0] == 0x81 && type[1] == 0x00) || (type[0] == 0x88 && type[1] == 0xa8);
}

static inline uint16_t be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t be32(const uint8_t *p)
{
	return (uint32_t)be16(p) << 16 | be16(p + 2);
}

static inline void put_be16(uint8_t *p, uint32_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static inline void put_be32(uint8_t *p, uint32_t value)
{
	put_be16(p, value >> 16);
	put_be16(p + 2, value);
}

/* Where the headers of an unfragmented IP packet are, by offset from the Ethernet header. */
struct net_headers {
	uint32_t ip, transport, end; /* end: as the IP header has it; it may lie behind the frame's */
	uint64_t addresses;          /* sum of the IP addresses */
	uint8_t protocol;
	bool ipv6;
};

/* Up to two VLAN tags, IPv4 options, IPv6 extension headers. False for anything else, and for fragments. */
bool net_parse(const uint8_t *frame, uint32_t len, struct net_headers *headers);

/* Byte offset of the checksum in the transport header, 0 if the protocol has none that we finish. */
static inline uint32_t net_csum_field(uint8_t protocol)
{
	return protocol == IPPROTO_TCP ? 16 : protocol == IPPROTO_UDP ? 6 : 0;
}

/* Folded sum of the pseudo-header for `len` bytes of transport header and payload. */
static inline uint16_t net_pseudo_sum(const struct net_headers *h, uint32_t len)
{
	return csum_fold(h->addresses + htons((uint16_t)len) + htons(h->protocol));
}

/* What the headers of Debian 12 do not have yet (virtio 1.2, 5.1.3 and 5.1.6) */
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif
#define F_GUEST_USO4 54
#define F_GUEST_USO6 55
#define F_HOST_USO 56

#define GSO_BIT(type) (1u << ((type) & 7)) /* VIRTIO_NET_HDR_GSO_TCPV4 1, TCPV6 4, UDP_L4 5; ECN is bit 7 of the type */
#define GSO_BIT_ECN (1u << 8)
#define GSO_SIZE_LEAST 48u /* what Linux takes for the least segment of TCP: less is made up to keep us busy */

/* GSO_BITs that these negotiated features let the guest send (`host`), or be given. */
uint32_t net_gso_bits(uint64_t features, bool host);

/* The longest header there is: struct virtio_net_hdr_v1_hash. The shorter ones are what it begins with. */
struct net_header {
	struct virtio_net_hdr_mrg_rxbuf mrg;
	uint32_t hash;
	uint16_t hash_report, padding;
};

_Static_assert(sizeof(struct net_header) == 20 && offsetof(struct net_header, hash) == 12, "virtio 1.2, 5.1.6");

/* The GSO types that a frame of this header may have, all in `allowed`. */
static inline bool net_gso_allowed(uint8_t gso_type, uint32_t allowed)
{
	uint32_t need = GSO_BIT(gso_type) | (gso_type & VIRTIO_NET_HDR_GSO_ECN ? GSO_BIT_ECN : 0);

	return !(gso_type & ~(VIRTIO_NET_HDR_GSO_ECN | 7u)) && (need & ~allowed) == 0;
}

/*
 * Take the offload facts of a guest's header (a private copy) into the view; `csum`: VIRTIO_NET_F_CSUM was negotiated,
 * `gso`: the GSO_BITs that were. False when it asks for what was not negotiated or points outside the frame.
 */
static inline bool net_header_in(const struct virtio_net_hdr *hdr, bool csum, uint32_t gso, struct xv_view *view)
{
	view->flags = 0;
	view->gso_type = VIRTIO_NET_HDR_GSO_NONE;
	if (likely(!((hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) | hdr->gso_type)))
		return true;
	if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || !csum)
		return false;
	/* all 16-bit, summed as 32-bit: nothing wraps */
	if (hdr->csum_start < ETH_HEADER || (uint32_t)hdr->csum_start + hdr->csum_offset + 2u > view->len)
		return false;
	view->flags = VIEW_NEEDS_CSUM;
	view->csum_start = hdr->csum_start;
	view->csum_offset = hdr->csum_offset;
	if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
		if (!net_gso_allowed(hdr->gso_type, gso) || hdr->gso_size < GSO_SIZE_LEAST)
			return false;
		view->gso_type = hdr->gso_type;
		view->gso_size = hdr->gso_size;
	}
	return true;
}

/* The header that hands a view to a guest that understands it. */
static inline void net_header_out(struct virtio_net_hdr *hdr, const struct xv_view *view)
{
	if (unlikely(view->flags & VIEW_NEEDS_CSUM)) {
		hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		hdr->csum_start = view->csum_start;
		hdr->csum_offset = view->csum_offset;
		hdr->gso_type = view->gso_type;
		hdr->gso_size = view->gso_type ? view->gso_size : 0;
		hdr->hdr_len = view->gso_type ? view->hdr_len : 0;
	}
}

/* All of a header of `len` bytes; `to` has room for any. */
static inline void net_whole_header_out(struct net_header *to, uint32_t len, const struct xv_view *view)
{
	net_header_out(&to->mrg.hdr, view);
	if (unlikely(len == sizeof(*to))) {
		to->hash = view->hash;
		to->hash_report = view->hash_report;
	}
}

/* What to write into the checksum field. A sum of 0 is sent as 0xffff, which TCP takes too and UDP needs (RFC 768). */
static inline uint16_t net_csum_finish(uint64_t sum)
{
	uint16_t folded = (uint16_t)~csum_fold(sum);

	return folded ? folded : 0xffff;
}

/* Bytes of the VLAN tags that a frame has, two at most. */
uint32_t net_tag_bytes(const struct xv_view *view);

/*
 * Whether this TCP or UDP frame (its headers in the first piece) carries only its pseudo-header's sum, as a local stack
 * leaves it for the device to finish (CHECKSUM_PARTIAL); if so, sets csum_start, csum_offset and VIEW_NEEDS_CSUM. A
 * finished checksum that happens to look so is marked too: finishing it again gives the same checksum.
 */
void net_find_partial(struct xv_view *view);

#endif
