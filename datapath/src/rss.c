// SPDX-License-Identifier: Apache-2.0
#include "rss.h"

#include <linux/virtio_net.h>
#include <netinet/in.h>

#include "nethdr.h"

#define PEEK 192u /* bytes of a frame: Ethernet, two tags, IPv6 with some extension headers, ports */
#define EXTENSIONS_MAX 8

/* What the guest's hash types decide about: a frame's addresses and ports, as far as it has them. */
struct flow {
	const uint8_t *source, *dest;           /* addresses */
	const uint8_t *home, *final;            /* IPv6: what extension headers have instead, or the same */
	const uint8_t *ports;                   /* NULL: none, or it is a fragment */
	uint8_t protocol;
	bool ipv6, extensions;
};

void rss_reset(struct rss *rss)
{
	memset(rss, 0, sizeof(*rss));
}

static void set_key(struct rss *rss, const uint8_t key[RSS_KEY_MAX])
{
	for (uint32_t bit = 0; bit < 8 * RSS_INPUT_MAX; bit++) {
		const uint8_t *at = key + bit / 8;
		const uint64_t bytes = (uint64_t)be32(at) << 8 | at[4];
		const uint32_t window = (uint32_t)(bytes >> (8 - bit % 8)), weight = 8u >> bit % 4;

		/* halves of a byte are numbered from its upper one on, as bits are from the most significant one */
		for (uint32_t half = 0; half < 16; half++) {
			uint32_t *word = &rss->words[bit / 4][half];

			*word = (bit % 4 ? *word : 0) ^ (half & weight ? window : 0);
		}
	}
}

static uint16_t le16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

bool rss_set(struct rss *rss, const uint8_t *data, uint32_t len, bool steer, uint32_t max_pairs, uint16_t *tx_pairs)
{
	uint8_t key[RSS_KEY_MAX] = {0};
	uint32_t entries = 1;

	/* hash types, mask, unclassified queue; or hash types and the first two of four reserved words */
	if (len < 8)
		return false;
	rss->types = (uint32_t)le16(data) | (uint32_t)le16(data + 2) << 16;
	rss->steer = steer;
	rss->mask = steer ? le16(data + 4) : 0;
	rss->unclassified = steer ? le16(data + 6) : 0;
	entries += rss->mask;
	if (rss->types & ~RSS_TYPES || entries > RSS_TABLE_MAX || entries & (entries - 1) || rss->unclassified >= max_pairs)
		return false;
	data += 8;
	len -= 8;
	if (len < 2 * entries + 3)
		return false;
	for (uint32_t i = 0; i < entries; i++) {
		rss->table[i] = steer ? le16(data + 2 * i) : 0;
		if (rss->table[i] >= max_pairs)
			return false;
	}
	data += 2 * entries;
	len -= 2 * entries;
	*tx_pairs = le16(data);
	if (data[2] > RSS_KEY_MAX || data[2] != len - 3)
		return false;
	memcpy(key, data + 3, data[2]);
	set_key(rss, key);
	return true;
}

/* ---- a frame's flow ---- */

/* Look into a destination options header for a home address (RFC 6275, 6.3). */
static const uint8_t *home_address(const uint8_t *header, uint32_t len)
{
	for (uint32_t at = 2; at + 1 < len; at += header[at] ? 2u + header[at + 1] : 1u)
		if (header[at] == 0xc9 && header[at + 1] == 16 && at + 18 <= len)
			return header + at + 2;
	return NULL;
}

static bool find_ipv6(const uint8_t *frame, uint32_t len, uint32_t at, struct flow *flow)
{
	uint8_t next;

	if (at + 40 > len || frame[at] >> 4 != 6)
		return false;
	next = frame[at + 6];
	flow->ipv6 = true;
	flow->source = flow->home = frame + at + 8;
	flow->dest = flow->final = frame + at + 24;
	at += 40;
	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		const uint8_t *header = frame + at;
		uint32_t size;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS && next != IPPROTO_FRAGMENT)
			break;
		flow->extensions = true;
		if (at + 8 > len)
			return true;
		size = next == IPPROTO_FRAGMENT ? 8 : 8u + 8u * header[1];
		if (next == IPPROTO_FRAGMENT && be16(header + 2) & 0xfff9)
			return true; /* the ports are in the first fragment only */
		if (at + size > len)
			return true;
		if (next == IPPROTO_ROUTING && header[2] == 2 && size == 24)
			flow->final = header + 8;
		if (next == IPPROTO_DSTOPTS) {
			const uint8_t *home = home_address(header, size);

			flow->home = home ? home : flow->home;
		}
		next = header[0];
		at += size;
	}
	flow->protocol = next;
	flow->ports = at + 4 <= len ? frame + at : NULL;
	return true;
}

static bool find_ipv4(const uint8_t *frame, uint32_t len, uint32_t at, struct flow *flow)
{
	const uint8_t *ip = frame + at;

	if (at + 20 > len || ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
		return false;
	flow->source = ip + 12;
	flow->dest = ip + 16;
	flow->protocol = ip[9];
	at += (ip[0] & 15u) * 4;
	flow->ports = at + 4 <= len && !(be16(ip + 6) & 0x3fff) ? frame + at : NULL;
	return true;
}

static bool find_flow(const uint8_t *frame, uint32_t len, struct flow *flow)
{
	uint32_t at = ETH_HEADER;
	bool found;

	if (len < ETH_HEADER)
		return false;
	for (int tags = 0; tags < 2 && net_is_tag(frame + at - 2); tags++) {
		at += 4;
		if (at > len)
			return false;
	}
	memset(flow, 0, sizeof(*flow));
	if (frame[at - 2] == 0x08 && frame[at - 1] == 0x00)
		found = find_ipv4(frame, len, at, flow);
	else
		found = frame[at - 2] == 0x86 && frame[at - 1] == 0xdd && find_ipv6(frame, len, at, flow);
	if (flow->protocol != IPPROTO_TCP && flow->protocol != IPPROTO_UDP)
		flow->ports = NULL;
	return found;
}

/* ---- the hash ---- */

/* What is to be hashed of a flow; `*ports`: with its ports. NONE: nothing. */
static uint16_t choose(const struct flow *flow, uint32_t types, bool *ports)
{
	static const struct {
		uint32_t with_tcp, with_udp, without;
		uint16_t tcp, udp, plain;
	} kinds[3] = {
		{VIRTIO_NET_RSS_HASH_TYPE_TCPv4, VIRTIO_NET_RSS_HASH_TYPE_UDPv4, VIRTIO_NET_RSS_HASH_TYPE_IPv4,
		 VIRTIO_NET_HASH_REPORT_TCPv4, VIRTIO_NET_HASH_REPORT_UDPv4, VIRTIO_NET_HASH_REPORT_IPv4},
		{VIRTIO_NET_RSS_HASH_TYPE_TCPv6, VIRTIO_NET_RSS_HASH_TYPE_UDPv6, VIRTIO_NET_RSS_HASH_TYPE_IPv6,
		 VIRTIO_NET_HASH_REPORT_TCPv6, VIRTIO_NET_HASH_REPORT_UDPv6, VIRTIO_NET_HASH_REPORT_IPv6},
		{VIRTIO_NET_RSS_HASH_TYPE_TCP_EX, VIRTIO_NET_RSS_HASH_TYPE_UDP_EX, VIRTIO_NET_RSS_HASH_TYPE_IP_EX,
		 VIRTIO_NET_HASH_REPORT_TCPv6_EX, VIRTIO_NET_HASH_REPORT_UDPv6_EX, VIRTIO_NET_HASH_REPORT_IPv6_EX},
	};
	const bool tcp = flow->ports && flow->protocol == IPPROTO_TCP, udp = flow->ports && !tcp;

	/* a packet with extension headers is hashed as one without, if none of the _EX types is for it */
	for (int kind = flow->extensions ? 2 : flow->ipv6; kind >= (int)flow->ipv6; kind--) {
		*ports = (tcp && types & kinds[kind].with_tcp) || (udp && types & kinds[kind].with_udp);
		if (*ports)
			return tcp ? kinds[kind].tcp : kinds[kind].udp;
		if (types & kinds[kind].without)
			return kinds[kind].plain;
	}
	return VIRTIO_NET_HASH_REPORT_NONE;
}

static uint32_t toeplitz(const struct rss *rss, const uint8_t *input, uint32_t len)
{
	uint32_t hash = 0;

	for (uint32_t i = 0; i < len; i++)
		hash ^= rss->words[2 * i][input[i] >> 4] ^ rss->words[2 * i + 1][input[i] & 15];
	return hash;
}

uint32_t rss_hash(const struct rss *rss, const struct xv_view *view, uint16_t *report)
{
	const uint8_t *frame = view->first.data;
	uint8_t copy[PEEK], input[RSS_INPUT_MAX];
	uint32_t len = view->first.len, size;
	struct flow flow;
	bool ports, ex;

	*report = VIRTIO_NET_HASH_REPORT_NONE;
	if (!rss->types)
		return 0;
	if (unlikely(view->nr_more && len < PEEK)) {
		len = view_peek(view, copy, sizeof(copy));
		frame = copy;
	}
	if (!find_flow(frame, len, &flow))
		return 0;
	*report = choose(&flow, rss->types, &ports);
	if (*report == VIRTIO_NET_HASH_REPORT_NONE)
		return 0;
	ex = *report >= VIRTIO_NET_HASH_REPORT_IPv6_EX;
	size = flow.ipv6 ? 16 : 4;
	memcpy(input, ex ? flow.home : flow.source, size);
	memcpy(input + size, ex ? flow.final : flow.dest, size);
	size *= 2;
	if (ports) {
		memcpy(input + size, flow.ports, 4);
		size += 4;
	}
	return toeplitz(rss, input, size);
}
