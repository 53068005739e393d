// SPDX-License-Identifier: Apache-2.0
#include "gso.h"

#define TCP_FIN 0x01u
#define TCP_PSH 0x08u
#define TCP_ACK 0x10u
#define TCP_CWR 0x80u

/* The transport header's length; 0 when it cannot be. */
static uint32_t transport_len(const uint8_t *header, uint32_t len, const struct net_headers *h)
{
	uint32_t bytes;

	if (h->protocol == IPPROTO_UDP)
		return h->transport + 8 <= len ? 8 : 0;
	if (h->transport + 20 > len)
		return 0;
	bytes = (header[h->transport + 12] >> 4) * 4u;
	return bytes >= 20 && h->transport + bytes <= len ? bytes : 0;
}

bool gso_check(struct xv_view *view, struct gso_header *header)
{
	const uint8_t type = view->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
	const bool udp = type == VIRTIO_NET_HDR_GSO_UDP_L4;
	struct net_headers *h = &header->h;
	uint32_t len = view_peek(view, header->bytes, sizeof(header->bytes)), bytes;

	if (!net_parse(header->bytes, len, h) || h->transport != view->csum_start ||
	    h->protocol != (udp ? IPPROTO_UDP : IPPROTO_TCP) || view->csum_offset != net_csum_field(h->protocol))
		return false;
	if (!udp && h->ipv6 != (type == VIRTIO_NET_HDR_GSO_TCPV6))
		return false;
	bytes = transport_len(header->bytes, len, h);
	/* nothing behind the IP packet, and at least a byte of payload; all lengths are below 2^17 */
	if (!bytes || h->end != view->len || h->transport + bytes >= view->len)
		return false;
	header->len = h->transport + bytes;
	view->hdr_len = (uint16_t)header->len;
	view->gso = header;
	view->parts = NULL;
	return true;
}

void gso_cut_init(struct gso_cut *cut, const struct xv_view *view)
{
	*cut = (struct gso_cut){.view = view, .payload = view->len - view->gso->len, .offset = view->gso->len};
}

/* A tag was put behind the addresses (4 bytes), or taken out (-4): where everything behind it is now. */
static void shift_headers(struct xv_view *view, struct gso_header *header, int by)
{
	view->hdr_len = (uint16_t)(view->hdr_len + by);
	if (!header)
		return;
	header->len += (uint32_t)by;
	header->h.ip += (uint32_t)by;
	header->h.transport += (uint32_t)by;
	header->h.end += (uint32_t)by;
}

bool gso_push_tag(struct xv_view *view, uint16_t tci)
{
	struct gso_header *header = (struct gso_header *)(uintptr_t)view->gso; /* a worker's own: see view.h */

	if (header) {
		if (header->len + 4 > GSO_HEADER_MAX)
			return false;
		memmove(header->bytes + 16, header->bytes + 12, header->len - 12);
		put_be16(header->bytes + 12, 0x8100);
		put_be16(header->bytes + 14, tci);
	}
	shift_headers(view, header, 4);
	return true;
}

void gso_set_tag(struct xv_view *view, uint16_t tci)
{
	if (view->gso)
		put_be16((uint8_t *)(uintptr_t)view->gso->bytes + 14, tci);
}

void gso_pop_tag(struct xv_view *view)
{
	struct gso_header *header = (struct gso_header *)(uintptr_t)view->gso;

	if (header)
		memmove(header->bytes + 12, header->bytes + 16, header->len - 16);
	shift_headers(view, header, -4);
}

static const struct xv_seg *seg_at(const struct xv_view *view, uint32_t i)
{
	return i ? &view->more[i - 1] : &view->first;
}

/* Set lengths, numbers, flags and the pseudo-header's sum of one segment's headers. */
static void fit_header(uint8_t *header, const struct gso_cut *cut, uint32_t len, bool last)
{
	const struct net_headers *h = &cut->view->gso->h;
	uint8_t *ip = header + h->ip, *transport = header + h->transport;
	uint32_t transport_bytes = cut->view->gso->len - h->transport + len;
	uint16_t sum;

	if (h->ipv6) {
		put_be16(ip + 4, h->transport - h->ip - 40 + transport_bytes);
	} else {
		put_be16(ip + 2, h->transport - h->ip + transport_bytes);
		put_be16(ip + 4, be16(ip + 4) + cut->index);
		put_be16(ip + 10, 0);
		sum = (uint16_t)~csum_fold(csum_of(ip, h->transport - h->ip));
		memcpy(ip + 10, &sum, sizeof(sum));
	}
	if (h->protocol == IPPROTO_UDP) {
		put_be16(transport + 4, transport_bytes);
	} else {
		put_be32(transport + 4, be32(transport + 4) + cut->done);
		if (!last)
			transport[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
		if (cut->index)
			transport[13] &= (uint8_t)~TCP_CWR;
	}
	sum = net_pseudo_sum(h, transport_bytes);
	memcpy(transport + net_csum_field(h->protocol), &sum, sizeof(sum));
}

void gso_whole_header(const struct xv_view *view, uint8_t header[GSO_HEADER_MAX])
{
	struct gso_cut all;

	gso_cut_init(&all, view);
	memcpy(header, view->gso->bytes, view->gso->len);
	fit_header(header, &all, all.payload, true);
}

uint32_t gso_cut_next(struct gso_cut *cut, struct gso_room *room)
{
	const struct xv_view *whole = cut->view;
	const struct gso_header *gso = whole->gso;
	uint32_t n = 0, segs = 0;

	while (n < XV_BURST && cut->done < cut->payload) {
		uint32_t len = MIN((uint32_t)whole->gso_size, cut->payload - cut->done), left = len;
		struct xv_view *view = &room->views[n];

		*view = (struct xv_view){
			.first = {room->headers[n], gso->len},
			.more = &room->segs[segs],
			.len = gso->len + len,
			.csum_start = whole->csum_start,
			.csum_offset = whole->csum_offset,
			.flags = VIEW_NEEDS_CSUM,
			.hash = whole->hash, /* of one flow */
			.hash_report = whole->hash_report,
		};
		memcpy(room->headers[n], gso->bytes, gso->len);
		fit_header(room->headers[n], cut, len, cut->done + len == cut->payload);
		while (left) {
			const struct xv_seg *seg = seg_at(whole, cut->seg);
			uint32_t piece;

			if (cut->offset >= seg->len) { /* also while the headers are being skipped */
				cut->offset -= seg->len;
				cut->seg++;
				continue;
			}
			piece = MIN(left, seg->len - cut->offset);
			room->segs[segs++] = (struct xv_seg){seg->data + cut->offset, piece};
			cut->offset += piece;
			left -= piece;
		}
		view->nr_more = (uint16_t)(&room->segs[segs] - view->more);
		room->list[n++] = view;
		cut->done += len;
		cut->index++;
	}
	return n;
}

/* ---- joining ---- */

#define UDP_MOST 64u /* datagrams in one, as in Linux (UDP_GRO_CNT_MAX) */

struct joined { /* the frame that others are being added to */
	struct net_headers h;
	uint32_t header_len, mss, payload, count;
	bool closed, same_id; /* same_id: the IPv4 identification stands still, as it may with DF (RFC 6864) */
	bool verify;          /* the frames' checksums are finished, and still to be verified */
};

/* As GRO looks at it: a frame with a wrong one is passed on as it is, for whom it concerns to drop. */
static bool ip_header_sum_right(const uint8_t *frame, const struct net_headers *h)
{
	return h->ipv6 || csum_fold(csum_of(frame + h->ip, 20)) == 0xffff;
}

/* Only acknowledgement, push and end: everything else is a segment of its own. */
static bool plain_flags(uint8_t flags)
{
	return flags & TCP_ACK && !(flags & ~(TCP_ACK | TCP_PSH | TCP_FIN));
}

/* Whether a segment, whose checksum is open or finished as j has it, may be joined for what it is itself. */
static bool joinable(const struct xv_view *view, const struct joined *j)
{
	const uint8_t *transport = view->first.data + j->h.transport;

	if (j->verify == !!(view->flags & VIEW_NEEDS_CSUM) || !ip_header_sum_right(view->first.data, &j->h))
		return false;
	if (j->h.protocol == IPPROTO_TCP)
		return plain_flags(transport[13]);
	return be16(transport + 4) + j->h.transport == view->len && (transport[6] || transport[7]);
}

/* Whether nothing may be added behind this segment. */
static bool closes(const struct xv_view *view, const struct joined *j)
{
	if (view->len - j->header_len < j->mss)
		return true;
	return j->h.protocol == IPPROTO_TCP ? view->first.data[j->h.transport + 13] != TCP_ACK : j->count == UDP_MOST;
}

/* Whether a segment may begin a joined frame; fills in `j`. */
static bool may_begin(const struct xv_view *view, uint32_t gso, struct joined *j)
{
	const uint8_t *frame = view->first.data;
	uint32_t bytes;
	uint8_t type;

	if (!net_parse(frame, view->first.len, &j->h) || j->h.end != view->len)
		return false;
	if (j->h.protocol == IPPROTO_TCP)
		type = j->h.ipv6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4;
	else if (j->h.protocol == IPPROTO_UDP)
		type = VIRTIO_NET_HDR_GSO_UDP_L4;
	else
		return false;
	if (!(gso & GSO_BIT(type)) || j->h.transport != j->h.ip + (j->h.ipv6 ? 40u : 20u)) /* no options, no extensions */
		return false;
	bytes = transport_len(frame, view->first.len, &j->h);
	j->header_len = j->h.transport + bytes;
	if (!bytes || j->header_len > GSO_HEADER_MAX || j->header_len + GSO_SIZE_LEAST > view->len)
		return false;
	j->mss = j->payload = view->len - j->header_len;
	j->count = 1;
	j->same_id = false;
	j->verify = !(view->flags & VIEW_NEEDS_CSUM);
	j->closed = closes(view, j);
	return joinable(view, j);
}

/* Whether the IP header is the one to follow those in `j`: the same but for length, identification and checksum. */
static bool ip_continues(struct joined *j, const uint8_t *ip, const uint8_t *head, uint32_t bytes)
{
	uint16_t id = be16(head + 4);

	if (j->h.ipv6)
		return !memcmp(ip, head, 4) && !memcmp(ip + 6, head + 6, 34) && be16(ip + 4) + 40u == bytes;
	/* version, length, TOS; DF; TTL, protocol; addresses */
	if (memcmp(ip, head, 2) || memcmp(ip + 6, head + 6, 4) || memcmp(ip + 12, head + 12, 8) || be16(ip + 2) != bytes)
		return false;
	if (j->count == 1)
		j->same_id = ip[6] & 0x40 && be16(ip + 4) == id;
	return be16(ip + 4) == (uint16_t)(j->same_id ? id : id + j->count);
}

/* Whether `view` is the next segment after those in `j`, whose first is `head`. */
static bool continues(struct joined *j, const uint8_t *head, const struct xv_view *view)
{
	const uint8_t *frame = view->first.data, *transport = frame + j->h.transport, *head_transport = head + j->h.transport;
	uint32_t payload;

	if (view->first.len < j->header_len || view->len <= j->header_len)
		return false;
	payload = view->len - j->header_len;
	if (payload > j->mss || j->header_len + j->payload + payload - j->h.ip > 65535u)
		return false;
	if (memcmp(frame, head, j->h.ip)) /* addresses, tags, type */
		return false;
	if (!ip_continues(j, frame + j->h.ip, head + j->h.ip, view->len - j->h.ip) || !joinable(view, j))
		return false;
	if (memcmp(transport, head_transport, 4)) /* ports */
		return false;
	if (j->h.protocol == IPPROTO_UDP)
		return true;
	/* number; acknowledgement; length, and not the flags; window; urgent pointer and options */
	return be32(transport + 4) == be32(head_transport + 4) + j->payload &&
	       !memcmp(transport + 8, head_transport + 8, 5) && !memcmp(transport + 14, head_transport + 14, 2) &&
	       !memcmp(transport + 18, head_transport + 18, j->header_len - j->h.transport - 18);
}

/* What its pseudo-header and transport header add to the sum of a segment. */
static uint16_t header_sum(const struct joined *j, const struct xv_view *view)
{
	return csum_fold(net_pseudo_sum(&j->h, view->len - j->h.transport) +
			 csum_of(view->first.data + j->h.transport, j->header_len - j->h.transport));
}

/* Turn `count` views, of which the first has j's headers, into one; the segments used. */
static uint32_t finish_join(const struct joined *j, const struct xv_view *views, struct xv_view *out, uint8_t *header,
			    struct xv_seg *segs, struct gso_part *parts)
{
	uint8_t *ip = header + j->h.ip, *transport = header + j->h.transport;
	const uint32_t transport_bytes = j->header_len - j->h.transport + j->payload, field = net_csum_field(j->h.protocol);
	const bool tcp = j->h.protocol == IPPROTO_TCP;
	uint32_t nr = 0;
	uint16_t sum;

	memcpy(header, views[0].first.data, j->header_len);
	for (uint32_t i = 0; i < j->count; i++) {
		const struct xv_seg *seg = &views[i].first;

		if (seg->len > j->header_len)
			segs[nr++] = (struct xv_seg){seg->data + j->header_len, seg->len - j->header_len};
		for (uint32_t m = 0; m < views[i].nr_more; m++)
			segs[nr++] = views[i].more[m];
		parts[i] = (struct gso_part){&views[i], views[i].len - j->header_len, j->verify ? header_sum(j, &views[i]) : 0};
		if (tcp)
			transport[13] |= seg->data[j->h.transport + 13];
	}
	if (j->h.ipv6) {
		put_be16(ip + 4, transport_bytes);
	} else {
		put_be16(ip + 2, 20 + transport_bytes);
		put_be16(ip + 10, 0);
		sum = (uint16_t)~csum_fold(csum_of(ip, 20));
		memcpy(ip + 10, &sum, sizeof(sum));
	}
	if (!tcp)
		put_be16(transport + 4, transport_bytes);
	sum = net_pseudo_sum(&j->h, transport_bytes);
	memcpy(transport + field, &sum, sizeof(sum));
	*out = (struct xv_view){
		.first = {header, j->header_len},
		.more = segs,
		.nr_more = (uint16_t)nr,
		.len = j->header_len + j->payload,
		.csum_start = (uint16_t)j->h.transport,
		.csum_offset = (uint16_t)field,
		.gso_size = (uint16_t)j->mss,
		.hdr_len = (uint16_t)j->header_len,
		.flags = VIEW_NEEDS_CSUM | (j->verify ? VIEW_VERIFY : 0),
		.gso_type = !tcp ? VIRTIO_NET_HDR_GSO_UDP_L4 :
			    j->h.ipv6 ? VIRTIO_NET_HDR_GSO_TCPV6 : VIRTIO_NET_HDR_GSO_TCPV4,
		.parts = parts,
	};
	return nr;
}

uint32_t gso_join(const struct xv_view *views, uint32_t n, uint32_t plain, uint32_t gso, struct gso_room *room,
		  uint32_t *frames)
{
	uint32_t out = 0, i = 0, segs = 0;

	while (i < n) {
		struct joined j;
		const uint32_t begin = i++;

		if (begin >= plain && may_begin(&views[begin], gso, &j)) {
			const uint8_t *head = views[begin].first.data;

			while (!j.closed && i < n && continues(&j, head, &views[i])) {
				j.payload += views[i].len - j.header_len;
				j.count++;
				j.closed = closes(&views[i], &j);
				i++;
			}
		}
		if (i - begin > 1) {
			segs += finish_join(&j, &views[begin], &room->views[out], room->headers[out], &room->segs[segs],
					    &room->parts[begin]);
			room->list[out] = &room->views[out];
		} else {
			room->list[out] = &views[begin];
		}
		frames[out++] = i;
	}
	return out;
}
