// SPDX-License-Identifier: Apache-2.0
/* Checksums: against a plain byte-by-byte sum, over every split, and end to end for frames of local stacks. */
#include "frames.h"

static void test_sums(void)
{
	uint8_t data[4096 + 8], copy[4096 + 8];

	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 31 + i / 256);
	for (size_t at = 0; at < 5; at++) {
		for (size_t len = 0; len < 4096; len += len < 70 ? 1 : 97) {
			CHECK_EQ(csum_fold(csum_of(data + at, len)), plain_sum(data + at, len));
			memset(copy, 0xee, sizeof(copy));
			CHECK_EQ(csum_fold(csum_copy(copy + 1, data + at, len)), plain_sum(data + at, len));
			CHECK(!memcmp(copy + 1, data + at, len));
			CHECK_EQ(copy[0], 0xee);
			CHECK_EQ(copy[1 + len], 0xee);
		}
	}
	memset(data, 0xff, sizeof(data)); /* the largest sums */
	CHECK_EQ(csum_fold(csum_of(data, 4096)), plain_sum(data, 4096));
	for (size_t a = 0; a < 40; a++) {
		for (size_t b = a; b < 40; b++) { /* three pieces */
			struct csum c = {0, false};

			for (size_t i = 0; i < 40; i++)
				data[i] = (uint8_t)(i * 53 + a);
			csum_add(&c, csum_of(data, a), a);
			csum_add(&c, csum_of(data + a, b - a), b - a);
			csum_add(&c, csum_of(data + b, 40 - b), 40 - b);
			CHECK_EQ(csum_fold(c.sum), plain_sum(data, 40));
		}
	}
}

static void each_spec(void (*visit)(const struct spec *))
{
	static const uint8_t protocols[] = {IPPROTO_TCP, IPPROTO_UDP};

	for (int family = 4; family <= 6; family += 2)
		for (size_t p = 0; p < 2; p++)
			for (uint32_t tags = 0; tags <= 2; tags++)
				for (uint32_t options = 0; options <= 16; options += 8)
					for (uint32_t payload = 0; payload < 1200; payload += payload < 5 ? 1 : 199)
						visit(&(struct spec){family, protocols[p], tags, options, payload});
}

static void find_partial(uint8_t *frame, uint32_t len, struct xv_view *view)
{
	*view = (struct xv_view){.first = {frame, len}, .len = len};
	net_find_partial(view);
}

static void find_visit(const struct spec *s)
{
	static struct built f;
	struct xv_view view;

	build(&f, s, a_mac, b_mac);
	find_partial(f.bytes, f.len, &view);
	CHECK_EQ(view.flags, VIEW_NEEDS_CSUM);
	CHECK_EQ(view.csum_start, f.transport);
	CHECK_EQ(view.csum_offset, f.field);
	for (uint32_t len = 0; len < f.len; len++) { /* truncated: never read past the end (ASan), never marked */
		uint8_t *cut = malloc(len ? len : 1);

		memcpy(cut, f.bytes, len);
		find_partial(cut, len, &view);
		CHECK_EQ(view.flags, 0);
		free(cut);
	}
	f.bytes[f.transport + f.field] ^= 0x55; /* a finished checksum */
	find_partial(f.bytes, f.len, &view);
	CHECK_EQ(view.flags, 0);
}

static void test_fragments_are_left_alone(void)
{
	static struct built f;
	struct xv_view view;

	build(&f, &(struct spec){4, IPPROTO_UDP, 0, 0, 100}, a_mac, b_mac);
	f.bytes[14 + 6] = 0x20; /* more fragments */
	find_partial(f.bytes, f.len, &view);
	CHECK_EQ(view.flags, 0);
}

/* From the NIC to a guest that did not negotiate GUEST_CSUM: finished, in one buffer and over many. */
static struct world w;

static void finish_visit(const struct spec *s)
{
	static struct built f;
	uint8_t *buffer;
	uint32_t len;

	if (s->payload % 2 == 0 && s->payload > 5)
		return; /* odd ones are the hard ones */
	build(&f, s, a_mac, b_mac);
	w.guests[0].top = MEMORY / 2;
	buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[0], 2048, VRING_DESC_F_WRITE);
	CHECK(nic_receive(&w.nic, f.bytes, f.len));
	world_run(&w);
	CHECK(ring_reap(&w.guests[0].ring[0], &len) >= 0);
	CHECK_EQ(len, HEADER + f.len);
	CHECK_EQ(buffer[0], 0);
	CHECK(verifies(&f, buffer + HEADER));
	CHECK(!memcmp(buffer + HEADER, f.bytes, f.transport + f.field));
	CHECK(!memcmp(buffer + HEADER + f.transport + f.field + 2, f.bytes + f.transport + f.field + 2,
		      f.len - f.transport - f.field - 2));
}

static void test_finish_over_pieces(void)
{
	static struct built f;

	for (uint32_t step = 13; step < 80; step++) {
		struct ring *r;
		uint64_t at;
		uint32_t len, n;

		build(&f, &(struct spec){4, IPPROTO_UDP, 0, 0, 101}, a_mac, b_mac);
		world_init(&w, 1, FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF, 64, XV_NICQ_PARTIAL_CSUM);
		r = &w.guests[0].ring[0];
		n = (HEADER + f.len + step - 1) / step;
		at = driver_alloc(&w.guests[0], (uint64_t)n * step, 1);
		for (uint32_t i = 0; i < n; i++) {
			ring_desc(r, (uint16_t)i, GPA + at + (uint64_t)i * step, step, VRING_DESC_F_WRITE, -1);
			ring_offer(r, (uint16_t)i);
		}
		CHECK(nic_receive(&w.nic, f.bytes, f.len));
		world_run(&w);
		CHECK_EQ(ring_reap(r, &len), 0);
		CHECK(verifies(&f, w.guests[0].memory + at + HEADER));
		world_free(&w);
	}
}

/* To a guest that did: handed over as it is, with the header saying so. */
static void test_partial_passes(void)
{
	static struct built f;
	struct virtio_net_hdr hdr;
	uint8_t *buffer;
	uint32_t len;

	world_init(&w, 1, FEATURES | 1ull << VIRTIO_NET_F_GUEST_CSUM, 8, XV_NICQ_PARTIAL_CSUM);
	build(&f, &(struct spec){6, IPPROTO_TCP, 1, 8, 77}, a_mac, b_mac);
	buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[0], 2048, VRING_DESC_F_WRITE);
	CHECK(nic_receive(&w.nic, f.bytes, f.len));
	world_run(&w);
	CHECK(ring_reap(&w.guests[0].ring[0], &len) >= 0);
	memcpy(&hdr, buffer, sizeof(hdr));
	CHECK_EQ(hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
	CHECK_EQ(hdr.csum_start, f.transport);
	CHECK_EQ(hdr.csum_offset, f.field);
	CHECK(!memcmp(buffer + HEADER, f.bytes, f.len));
	CHECK_EQ(w.guests[0].guest->queues[0].rx.csum_partial, 1);
	CHECK_EQ(w.guests[0].guest->queues[0].rx.csum_finished, 0);
	world_free(&w);
}

/* A guest's partial checksum is finished on the way to the NIC. */
static void test_sent_partial(void)
{
	static struct built f;
	static uint8_t got[4096];
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM};
	uint8_t *buffer;

	world_init(&w, 1, FEATURES | 1ull << VIRTIO_NET_F_CSUM, 8, 0);
	build(&f, &(struct spec){4, IPPROTO_UDP, 0, 8, 333}, b_mac, a_mac);
	hdr.csum_start = (uint16_t)f.transport;
	hdr.csum_offset = (uint16_t)f.field;
	buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + f.len, 0);
	memset(buffer, 0, HEADER);
	memcpy(buffer, &hdr, sizeof(hdr));
	memcpy(buffer + HEADER, f.bytes, f.len);
	world_run(&w);
	CHECK_EQ(nic_send(&w.nic, got), f.len);
	CHECK(verifies(&f, got));
	/* CVE-2024-11614: offsets outside the frame */
	static const uint16_t bad[][2] = {{0xffff, 0xffff}, {0xffff, 1}, {34, 0xffff}, {375, 10}, {13, 2}, {0, 16}};
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		hdr.csum_start = bad[i][0];
		hdr.csum_offset = bad[i][1];
		buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + f.len, 0);
		memset(buffer, 0, HEADER);
		memcpy(buffer, &hdr, sizeof(hdr));
		world_run(&w);
		CHECK_EQ(nic_send(&w.nic, got), 0);
		CHECK_EQ(w.guests[0].guest->queues[0].tx.drops[XV_DROP_BAD_HEADER], i + 1);
	}
	world_free(&w);
}

int main(void)
{
	test_sums();
	each_spec(find_visit);
	test_fragments_are_left_alone();
	world_init(&w, 1, FEATURES, 8, XV_NICQ_PARTIAL_CSUM);
	each_spec(finish_visit);
	world_free(&w);
	test_finish_over_pieces();
	test_partial_passes();
	test_sent_partial();
	puts("ok");
	return 0;
}
