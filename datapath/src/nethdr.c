// SPDX-License-Identifier: Apache-2.0
#include "nethdr.h"

uint32_t net_tag_bytes(const struct xv_view *view)
{
	uint8_t header[ETH_HEADER + 4] = {0};
	uint32_t tags = 0;

	view_peek(view, header, sizeof(header));
	for (uint32_t at = 12; tags < 2 && net_is_tag(header + at); at += 4)
		tags++;
	return 4 * tags;
}

/* Offset of the transport header behind IPv6 extension headers; 0 when there is none in reach. */
static uint32_t skip_ipv6_extensions(const uint8_t *frame, uint32_t len, uint32_t at, uint8_t *next)
{
	for (int i = 0; i < 8; i++) {
		if (*next != IPPROTO_HOPOPTS && *next != IPPROTO_ROUTING && *next != IPPROTO_DSTOPTS)
			return at;
		if (at + 8 > len)
			return 0;
		*next = frame[at];
		at += 8u + 8u * frame[at + 1];
	}
	return 0;
}

static bool parse_ipv4(const uint8_t *frame, uint32_t len, struct net_headers *h)
{
	const uint8_t *ip = frame + h->ip;
	uint32_t header, total;

	if (h->ip + 20 > len)
		return false;
	header = (ip[0] & 15u) * 4u;
	total = be16(ip + 2);
	/* fragments are finished before they are cut */
	if (ip[0] >> 4 != 4 || header < 20 || total < header || be16(ip + 6) & 0x3fff || h->ip + header > len)
		return false;
	h->ipv6 = false;
	h->protocol = ip[9];
	h->transport = h->ip + header;
	h->end = h->ip + total;
	h->addresses = csum_load32(ip + 12) + csum_load32(ip + 16);
	return true;
}

static bool parse_ipv6(const uint8_t *frame, uint32_t len, struct net_headers *h)
{
	const uint8_t *ip = frame + h->ip;

	if (h->ip + 40 > len || ip[0] >> 4 != 6)
		return false;
	h->ipv6 = true;
	h->protocol = ip[6];
	h->end = h->ip + 40 + be16(ip + 4);
	h->transport = skip_ipv6_extensions(frame, len, h->ip + 40, &h->protocol);
	if (!h->transport || h->transport > h->end)
		return false;
	h->addresses = 0;
	for (uint32_t i = 8; i < 40; i += 4)
		h->addresses += csum_load32(ip + i);
	return true;
}

bool net_parse(const uint8_t *frame, uint32_t len, struct net_headers *h)
{
	uint32_t at = ETH_HEADER;

	if (len < ETH_HEADER + 20)
		return false;
	for (int tags = 0; tags < 2 && net_is_tag(frame + at - 2); tags++)
		at += 4;
	h->ip = at;
	if (at > len)
		return false;
	if (frame[at - 2] == 0x08 && frame[at - 1] == 0x00)
		return parse_ipv4(frame, len, h);
	if (frame[at - 2] == 0x86 && frame[at - 1] == 0xdd)
		return parse_ipv6(frame, len, h);
	return false;
}

void net_find_partial(struct xv_view *view)
{
	const uint8_t *frame = view->first.data;
	struct net_headers h;
	uint32_t field;

	if (!net_parse(frame, view->first.len, &h) || h.end > view->len)
		return;
	field = net_csum_field(h.protocol);
	if (!field || MIN(h.end, view->first.len) < h.transport + field + 2)
		return;
	if (csum_load16(frame + h.transport + field) != net_pseudo_sum(&h, h.end - h.transport))
		return;
	view->flags |= VIEW_NEEDS_CSUM;
	view->csum_start = (uint16_t)h.transport;
	view->csum_offset = (uint16_t)field;
}

uint32_t net_gso_bits(uint64_t features, bool host)
{
	const uint64_t csum = 1ull << (host ? VIRTIO_NET_F_CSUM : VIRTIO_NET_F_GUEST_CSUM);
	const uint64_t tso4 = 1ull << (host ? VIRTIO_NET_F_HOST_TSO4 : VIRTIO_NET_F_GUEST_TSO4);
	const uint64_t tso6 = 1ull << (host ? VIRTIO_NET_F_HOST_TSO6 : VIRTIO_NET_F_GUEST_TSO6);
	const uint64_t ecn = 1ull << (host ? VIRTIO_NET_F_HOST_ECN : VIRTIO_NET_F_GUEST_ECN);
	const uint64_t uso = host ? 1ull << F_HOST_USO : 1ull << F_GUEST_USO4 | 1ull << F_GUEST_USO6;

	if (!(features & csum))
		return 0;
	return (features & tso4 ? GSO_BIT(VIRTIO_NET_HDR_GSO_TCPV4) : 0) |
	       (features & tso6 ? GSO_BIT(VIRTIO_NET_HDR_GSO_TCPV6) : 0) | (features & ecn ? GSO_BIT_ECN : 0) |
	       ((features & uso) == uso ? GSO_BIT(VIRTIO_NET_HDR_GSO_UDP_L4) : 0);
}
