// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: a guest's receive ring, with and without mergeable buffers.
 *
 * The hostile guest lays out receive buffers; the NIC and both other guests send it frames of any length they may have,
 * some of which need their checksum finished, and the NIC's may come in pieces, whole or not. Senders wait for its buffers (with patience) or do not. Turns in between.
 * Segments of a flow are joined; what was joined, cut again, must be what it was joined from.
 * In isolated inputs the used lengths must add up to what the counters say was delivered; see fuzz.h for the rest.
 */
#include "../tests/frames.h"
#include "fuzz.h"

static void op_buffer(struct input *in)
{
	struct ring *r = &f.hostile.ring[RX];
	uint64_t gpa = in_address(in), table = in_table(in);
	uint32_t len = in_length(in) % 70000u;
	uint8_t n = in8(in) % 8;

	for (uint32_t i = 0, step = in_step(in, len); i <= n; i++)
		offer_chain(r, gpa + (uint64_t)i * len, len, step, table, VRING_DESC_F_WRITE);
}

/* In pieces of `step` bytes; the last one may say that there is more to come. */
static void receive_pieces(const uint8_t *frame, uint32_t len, uint32_t step, bool whole)
{
	for (uint32_t at = 0; at < len; at += step)
		if (!nic_receive_piece(&f.nic, frame + at, MIN(step, len - at),
				       whole && at + step >= len ? 0 : XDP_PKT_CONTD))
			break;
}

/* ---- segments of a flow, for gso_join() ---- */

#define SEGMENTS 12u

struct segment {
	uint8_t *bytes; /* of exactly its length */
	uint32_t len;
	struct xv_seg rest;
};

/* Compare what was joined, cut again, with what it was joined from: all but checksums, and what joining may change. */
static void check_cut_again(const struct xv_view *joined, const struct segment *segments, uint32_t n)
{
	static struct gso_room room;
	static struct gso_header header;
	struct xv_view view = *joined;
	struct gso_cut cut;
	uint32_t i = 0, nr;

	CHECK(gso_check(&view, &header));
	gso_cut_init(&cut, &view);
	while ((nr = gso_cut_next(&cut, &room))) {
		for (uint32_t k = 0; k < nr; k++, i++) {
			const struct net_headers *h = &header.h;
			uint8_t got[PEER_STRIDE], want[PEER_STRIDE];

			CHECK(i < n);
			CHECK_EQ(room.list[k]->len, segments[i].len);
			view_peek(room.list[k], got, sizeof(got));
			memcpy(want, segments[i].bytes, segments[i].len);
			for (uint8_t *p = got;; p = want) {
				if (!h->ipv6) {
					memset(p + h->ip + 4, 0, 2);
					memset(p + h->ip + 10, 0, 2);
				}
				memset(p + h->transport + net_csum_field(h->protocol), 0, 2);
				if (h->protocol == IPPROTO_TCP)
					p[h->transport + 13] = 0;
				if (p == want)
					break;
			}
			CHECK(!memcmp(got, want, segments[i].len));
		}
	}
	CHECK_EQ(i, n);
}

/* Whether a receiver would take the segment's checksum. */
static bool sum_right(const struct segment *s)
{
	struct net_headers h;

	return net_parse(s->bytes, s->len, &h) && h.end == s->len &&
	       csum_fold(net_pseudo_sum(&h, s->len - h.transport) +
			 (uint64_t)plain_sum(s->bytes + h.transport, s->len - h.transport)) == 0xffff;
}

static void join(struct segment *segments, uint32_t n, uint32_t gso, bool partial)
{
	static struct gso_room room;
	struct xv_view views[SEGMENTS];
	uint32_t frames[SEGMENTS], out;

	for (uint32_t i = 0; i < n; i++) {
		views[i] = (struct xv_view){.first = {segments[i].bytes, segments[i].len - segments[i].rest.len},
					    .more = &segments[i].rest,
					    .nr_more = !!segments[i].rest.len,
					    .len = segments[i].len};
		if (partial)
			net_find_partial(&views[i]);
	}
	out = gso_join(views, n, 0, gso, &room, frames);
	for (uint32_t i = 0; i < out; i++) {
		const uint32_t begin = i ? frames[i - 1] : 0, count = frames[i] - begin;
		const struct xv_view *view = room.list[i];

		CHECK(count);
		if (count == 1) {
			CHECK(view == &views[begin]);
			continue;
		}
		CHECK(gso & GSO_BIT(view->gso_type));
		check_cut_again(view, &segments[begin], count);
		for (uint32_t k = 0, at = 0; k < count; k++) { /* each part's sum says what a receiver would */
			uint64_t sum = view->parts[k].sum;
			uint32_t left = view->parts[k].len;
			struct csum csum = {sum, false};

			for (; left; left -= view->more[at++].len)
				csum_add(&csum, csum_of(view->more[at].data, view->more[at].len), view->more[at].len);
			if (view->flags & VIEW_VERIFY)
				CHECK_EQ(csum_fold(csum.sum) == 0xffff, sum_right(&segments[begin + k]));
		}
	}
	CHECK(n == 0 || frames[out - 1] == n);
}

/* A few segments of one flow, right at first, then changed here and there; joined here, and received from the NIC. */
static void op_segments(struct input *in)
{
	static struct built built;
	struct segment segments[SEGMENTS];
	uint8_t kind = in8(in), changes = in8(in) % 4;
	uint32_t n = 1 + in8(in) % SEGMENTS, mss = 1 + in16(in) % 1500, last = in16(in), cut = in16(in), done = 0;

	for (uint32_t i = 0; i < n; i++) {
		const struct spec s = {kind & 1 ? 6 : 4, kind & 2 ? IPPROTO_UDP : IPPROTO_TCP, kind >> 2 & 1, 0,
				       i + 1 < n ? mss : 1 + last % mss};
		struct segment *seg = &segments[i];
		uint8_t *ip, *transport;
		uint16_t sum;

		build(&built, &s, hostile_mac, f.peer[0].mac);
		ip = built.bytes + 14 + 4 * s.tags;
		transport = built.bytes + built.transport;
		if (s.protocol == IPPROTO_TCP)
			put_be32(transport + 4, 0xfffffc00u + done);
		if (s.family == 4) {
			put_be16(ip + 4, kind & 8 ? 7 : 0xfffe + i);
			ip[6] = kind & 16 ? 0x40 : 0;
			put_be16(ip + 10, 0);
			sum = (uint16_t)~plain_sum(ip, 20);
			memcpy(ip + 10, &sum, 2);
		}
		if (kind & 32) {
			sum = net_csum_finish(plain_sum(transport, built.len - built.transport));
			memcpy(transport + built.field, &sum, 2);
		}
		done += s.payload;
		seg->len = built.len;
		seg->bytes = malloc(seg->len);
		CHECK(seg->bytes);
		memcpy(seg->bytes, built.bytes, seg->len);
	}
	for (; changes; changes--) {
		struct segment *seg = &segments[in8(in) % n];
		uint32_t at = in16(in);

		seg->bytes[(at & 0x8000 ? at : at % 80) % seg->len] ^= in8(in);
	}
	for (uint32_t i = 0; i < n; i++) {
		uint32_t rest = kind & 64 ? cut % segments[i].len : 0;

		segments[i].rest = (struct xv_seg){segments[i].bytes + segments[i].len - rest, rest};
	}
	join(segments, n, kind & 128 ? ~0u : GSO_BIT(VIRTIO_NET_HDR_GSO_TCPV4), !(kind & 32));
	for (uint32_t i = 0; i < n; i++) {
		receive_pieces(segments[i].bytes, segments[i].len, kind & 64 ? 1 + cut % PIECE : PIECE, true);
		free(segments[i].bytes);
	}
}

static void op_frame(struct input *in)
{
	uint8_t frame[PEER_STRIDE], how = in8(in), n = in8(in) % 40;
	uint32_t len = 14 + in16(in) % (PEER_STRIDE - HEADER - 14 + 1);
	struct virtio_net_hdr hdr = {0};

	if (how & 0x80) {
		op_segments(in);
		return;
	}
	if (how & 4 && len > 60) {
		hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		hdr.csum_start = 14 + in8(in) % 40u;
		hdr.csum_offset = in8(in) % 4u;
	}
	for (uint32_t i = 0; i <= n; i++) {
		make_frame(frame, len, hostile_mac, f.peer[0].mac, (uint8_t)(how + i));
		if (how & 8)
			memset(frame, 0xff, 6);
		if (how & 1 && how & 16)
			receive_pieces(frame, len, 1u + 7u * (how >> 6 & 1 ? n : len / 8) % PIECE, !(how & 32));
		else if (how & 1)
			nic_receive(&f.nic, frame, len);
		else if (!peer_send(&f.peer[how >> 1 & 1 && !(how & 4)], &hdr, frame, len))
			break;
	}
}

static void act(struct input *in)
{
	struct ring *r = &f.hostile.ring[RX];
	uint8_t op = in8(in);

	switch (op % 12) {
	case 0:
	case 1:
		op_desc(in, r);
		break;
	case 2:
		op_offer(in, r);
		break;
	case 3:
		op_raw_avail(in, r);
		break;
	case 4:
		op_bytes(in);
		break;
	case 5:
		op_buffer(in);
		break;
	case 6:
	case 7:
		op_frame(in);
		break;
	default:
		op_common(op, r);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	uint64_t features = in_features(&in);
	uint8_t how = in8(&in);

	hostile_start(features, 1u << how % 10, in16(&in), how & 0x80);
	while (in.left)
		act(&in);
	hostile_stop();
	return 0;
}
