// SPDX-License-Identifier: Apache-2.0
/* Frames of several pieces (XDP_USE_SG): whole in both directions, checksums over all pieces, nothing lost or stuck. */
#include "frames.h"

#define MRG (1ull << VIRTIO_NET_F_MRG_RXBUF)
#define CSUM (1ull << VIRTIO_NET_F_CSUM)
#define MTU 9000u
#define MOST (MTU + 14u)

static const uint8_t outside[6] = {2, 2, 2, 2, 2, 2};
/* Around what one, two and three pieces hold, both ways, and the largest. */
static const uint32_t lengths[] = {60,	 PIECE - 1, PIECE, PIECE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * PIECE - 1, 2 * PIECE,
				   2 * PIECE + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * PIECE, 3 * CHUNK + 1, MOST - 1, MOST};

static struct world w;
static struct built f;
static uint8_t frame[70000], got[70000];

#define RX(i) (w.guests[i].guest->queues[0].rx)
#define TX(i) (w.guests[i].guest->queues[0].tx)

static void start(uint64_t features, uint32_t nic_flags)
{
	memset(&w, 0, sizeof(w));
	world_init(&w, 2, features, 64, nic_flags);
	w.mtu = MTU;
	world_publish(&w);
}

static void end(void)
{
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES); /* every chunk has come back */
	CHECK_EQ(w.nic.nicq->nr_free + w.nic.comp_p - w.nic.comp_c, FRAMES);
	world_free(&w);
}

/* Buffers of `size` bytes for the guest, in chains of `parts` descriptors; collects what was written to them. */
static uint32_t offer_at, offer_size, offer_parts;

static void offer(uint32_t n, uint32_t size, uint32_t parts)
{
	struct driver *d = &w.guests[0];
	struct ring *r = &d->ring[0];

	d->top = offer_at = MEMORY / 2;
	offer_size = ALIGN_UP(size, 64);
	offer_parts = parts;
	for (uint32_t i = 0; i < n; i++) {
		uint32_t head = (i * parts) % r->num;

		for (uint32_t p = 0; p < parts; p++)
			ring_desc(r, (uint16_t)(head + p), GPA + offer_at + i * offer_size + p * (size / parts), size / parts,
				  VRING_DESC_F_WRITE, p + 1 < parts ? (int)(head + p) + 1 : -1);
		ring_offer(r, (uint16_t)head);
	}
}

/* The next frame that the guest got: its length, 0 for none. */
static uint32_t take(struct virtio_net_hdr_mrg_rxbuf *hdr)
{
	struct driver *d = &w.guests[0];
	uint32_t len, total = 0;
	int head = ring_reap(&d->ring[0], &len);

	if (head < 0)
		return 0;
	memcpy(hdr, d->memory + offer_at + (uint32_t)head / offer_parts * offer_size, sizeof(*hdr));
	for (uint32_t i = 0; i < hdr->num_buffers; i++) {
		const uint8_t *from = d->memory + offer_at + (uint32_t)head / offer_parts * offer_size;

		memcpy(got + total, from + (i ? 0 : HEADER), len - (i ? 0 : HEADER));
		total += len - (i ? 0 : HEADER);
		if (i + 1 < hdr->num_buffers)
			CHECK((head = ring_reap(&d->ring[0], &len)) >= 0);
	}
	return total;
}

static void test_to_guest(void)
{
	static const struct {
		uint64_t features;
		uint32_t buffers, size, parts;
	} shapes[] = {{MRG, 20, 1536, 1}, {MRG, 2, 9216, 3}, {0, 1, 9216, 1}, {0, 1, 12288, 4}};

	for (uint32_t s = 0; s < ARRAY_SIZE(shapes); s++)
		for (uint32_t l = 0; l < ARRAY_SIZE(lengths); l++) {
			struct virtio_net_hdr_mrg_rxbuf hdr;

			start(FEATURES | shapes[s].features, XV_NICQ_SG);
			offer(shapes[s].buffers, shapes[s].size, shapes[s].parts);
			make_frame(frame, lengths[l], w.guests[0].mac, outside, (uint8_t)l);
			CHECK(nic_receive(&w.nic, frame, lengths[l]));
			world_run(&w);
			CHECK_EQ(take(&hdr), lengths[l]);
			CHECK(!memcmp(got, frame, lengths[l]));
			CHECK_EQ(RX(0).copied_bytes, lengths[l]);
			end();
		}
}

/* A local stack's large segment, for a guest that wants checksums finished: over all pieces, field and sums. */
static void test_checksum_to_guest(void)
{
	for (uint32_t payload = 1500; payload < 8800; payload += 241)
		for (int family = 4; family <= 6; family += 2) {
			struct virtio_net_hdr_mrg_rxbuf hdr;

			start(FEATURES | MRG, XV_NICQ_SG | XV_NICQ_PARTIAL_CSUM);
			offer(10, 1526, 1);
			build(&f, &(struct spec){family, payload & 1 ? IPPROTO_TCP : IPPROTO_UDP, payload & 1, 0, payload}, a_mac, b_mac);
			CHECK(nic_receive(&w.nic, f.bytes, f.len));
			world_run(&w);
			CHECK_EQ(take(&hdr), f.len);
			CHECK_EQ(hdr.hdr.flags, 0);
			CHECK(verifies(&f, got));
			CHECK_EQ(RX(0).csum_finished, 1);
			end();
		}
}

static void test_order_in_a_burst(void)
{
	static const uint32_t mix[] = {60, 9000, 61, 5000, 4000, 62, 1793, 63};
	struct virtio_net_hdr_mrg_rxbuf hdr;

	start(FEATURES | MRG, XV_NICQ_SG);
	offer(40, 1536, 1);
	for (uint32_t i = 0; i < ARRAY_SIZE(mix); i++) {
		make_frame(frame, mix[i], w.guests[0].mac, outside, (uint8_t)i);
		CHECK(nic_receive(&w.nic, frame, mix[i]));
	}
	CHECK(worker_turn(&w.dp->workers[0], w.dp->snap, false));
	for (uint32_t i = 0; i < ARRAY_SIZE(mix); i++) {
		make_frame(frame, mix[i], w.guests[0].mac, outside, (uint8_t)i);
		CHECK_EQ(take(&hdr), mix[i]);
		CHECK(!memcmp(got, frame, mix[i]));
	}
	end();
}

/* The rest of a frame is still to come: it waits, and what stands before it does not. */
static void test_incomplete(void)
{
	const struct xv_snapshot_conf nothing = {0};
	struct virtio_net_hdr_mrg_rxbuf hdr;

	start(FEATURES | MRG, XV_NICQ_SG);
	offer(20, 1536, 1);
	make_frame(frame, 60, w.guests[0].mac, outside, 1);
	CHECK(nic_receive(&w.nic, frame, 60));
	make_frame(frame, 4000, w.guests[0].mac, outside, 2);
	CHECK(nic_receive_piece(&w.nic, frame, PIECE, XDP_PKT_CONTD));
	CHECK(nic_receive_piece(&w.nic, frame + PIECE, PIECE, XDP_PKT_CONTD));
	world_run(&w);
	CHECK_EQ(take(&hdr), 60);
	CHECK_EQ(take(&hdr), 0);
	CHECK(nic_receive_piece(&w.nic, frame + 2 * PIECE, 4000 - 2 * PIECE, 0));
	world_run(&w);
	CHECK_EQ(take(&hdr), 4000);
	CHECK(!memcmp(got, frame, 4000));
	/* one that is never completed goes back with the socket */
	CHECK(nic_receive_piece(&w.nic, frame, PIECE, XDP_PKT_CONTD));
	world_run(&w);
	CHECK_EQ(take(&hdr), 0);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES - 1);
	CHECK_EQ(xv_publish(w.dp, &nothing), 0);
	xv_xsk_free(w.nic.xsk);
	w.nic.xsk = NULL;
	end();
}

/* Longer than any frame may be, or without an end in a full ring: dropped, counted, and the next ones arrive. */
static void test_endless(void)
{
	struct virtio_net_hdr_mrg_rxbuf hdr;

	for (uint32_t last = 0; last < 2; last++) {
		start(FEATURES | MRG, XV_NICQ_SG);
		offer(20, 1536, 1);
		make_frame(frame, 60, w.guests[0].mac, outside, 1);
		CHECK(nic_receive(&w.nic, frame, 60));
		for (uint32_t i = 0; i < FRAMES - 1; i++)
			CHECK(nic_receive_piece(&w.nic, frame, PIECE, i < FRAMES - 2 || !last ? XDP_PKT_CONTD : 0));
		world_run(&w);
		if (!last) { /* after the first frame there is room for more of it */
			CHECK_EQ(w.nic.fill_p - w.nic.fill_c, 1);
			CHECK(nic_receive_piece(&w.nic, frame, PIECE, XDP_PKT_CONTD));
			world_run(&w);
		}
		CHECK_EQ(RX(0).drops[XV_DROP_TOO_BIG], 1);
		CHECK(nic_receive(&w.nic, frame, 60));
		world_run(&w);
		CHECK_EQ(take(&hdr), 60);
		CHECK_EQ(take(&hdr), 60);
		CHECK_EQ(take(&hdr), 0);
		end();
	}
}

/* Without buffers, whole frames wait in the socket, no more pieces than `keep`; the newest ones, in order. */
static void test_stalled(void)
{
	struct virtio_net_hdr_mrg_rxbuf hdr;
	uint32_t sent = 0, keep, waiting, first;

	start(FEATURES | MRG, XV_NICQ_SG);
	keep = w.nic.xsk->keep;
	for (;; sent++) {
		make_frame(frame, 5000, w.guests[0].mac, outside, (uint8_t)sent);
		if (!nic_receive(&w.nic, frame, 5000))
			break;
	}
	world_run(&w);
	waiting = keep / 3;
	CHECK_EQ(w.nic.rx_p - w.nic.rx_c, 3 * waiting);
	CHECK_EQ(RX(0).drops[XV_DROP_NO_BUFFERS], sent - waiting);
	first = sent - waiting;
	offer(4 * waiting, 1536, 1);
	world_run(&w);
	for (uint32_t i = first; i < sent; i++) {
		make_frame(frame, 5000, w.guests[0].mac, outside, (uint8_t)i);
		CHECK_EQ(take(&hdr), 5000);
		CHECK(!memcmp(got, frame, 5000));
	}
	end();
}

static void post(struct driver *d, const struct virtio_net_hdr *hdr, const uint8_t *bytes, uint32_t len, uint32_t step)
{
	struct ring *r = &d->ring[1];
	uint32_t total = HEADER + len, n = (total + step - 1) / step;
	uint64_t at;

	if (d->top < MEMORY / 4)
		d->top = MEMORY / 4;
	at = driver_alloc(d, total, 64);
	memset(d->memory + at, 0, HEADER);
	if (hdr)
		memcpy(d->memory + at, hdr, sizeof(*hdr));
	memcpy(d->memory + at + HEADER, bytes, len);
	for (uint32_t i = 0; i < n; i++)
		ring_desc(r, (uint16_t)((r->next + i) % r->num), GPA + at + (uint64_t)i * step, MIN(step, total - i * step), 0,
			  i + 1 < n ? (int)((r->next + i + 1) % r->num) : -1);
	ring_offer(r, (uint16_t)(r->next % r->num));
	r->next = (uint16_t)(r->next + n);
}

static void test_to_nic(void)
{
	for (uint32_t step = 700; step < 20000; step *= 5)
		for (uint32_t l = 0; l < ARRAY_SIZE(lengths); l++) {
			start(FEATURES, XV_NICQ_SG);
			make_frame(frame, lengths[l], outside, w.guests[0].mac, (uint8_t)l);
			post(&w.guests[0], NULL, frame, lengths[l], step);
			world_run(&w);
			CHECK_EQ(w.nic.tx_p - w.nic.tx_c, (lengths[l] + CHUNK - 1) / CHUNK);
			CHECK_EQ(nic_send(&w.nic, got), lengths[l]);
			CHECK(!memcmp(got, frame, lengths[l]));
			CHECK_EQ(w.nic.nicq->counters.tx_packets, 1);
			CHECK_EQ(w.nic.nicq->counters.copied_bytes, lengths[l]);
			end();
		}
}

/* The sum runs over all chunks; the field may lie on the border of two, an odd way into the frame. */
static void test_checksum_to_nic(void)
{
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM};

	for (uint32_t field = CHUNK - 2; field <= CHUNK + 1; field++)
		for (uint32_t len = CHUNK + 3; len < MOST; len += 1021) {
			uint32_t begin = field - 901;
			uint16_t sum;

			start(FEATURES | CSUM, XV_NICQ_SG);
			make_frame(frame, len, outside, w.guests[0].mac, 3);
			memset(frame + field, 0, 2);
			hdr.csum_start = (uint16_t)begin;
			hdr.csum_offset = 901;
			post(&w.guests[0], &hdr, frame, len, 1111);
			world_run(&w);
			CHECK_EQ(nic_send(&w.nic, got), len);
			sum = (uint16_t)~plain_sum(frame + begin, len - begin);
			memcpy(frame + field, &sum, 2);
			CHECK(!memcmp(got, frame, len));
			end();
		}
}

/* A frame gets all its chunks or none; a smaller one that still fits is sent. */
static void test_all_or_nothing(void)
{
	start(FEATURES, XV_NICQ_SG);
	for (uint32_t i = 0; i < 13; i++) { /* of five chunks each, and there are 64 */
		make_frame(frame, MOST, outside, w.guests[0].mac, (uint8_t)i);
		post(&w.guests[0], NULL, frame, MOST, 20000);
	}
	make_frame(frame, CHUNK + 1, outside, w.guests[0].mac, 99);
	post(&w.guests[0], NULL, frame, CHUNK + 1, 20000);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_NO_FRAMES], 1);
	CHECK_EQ(w.nic.nicq->nr_free, 2);
	for (uint32_t i = 0; i < 12; i++) {
		make_frame(frame, MOST, outside, w.guests[0].mac, (uint8_t)i);
		CHECK_EQ(nic_send(&w.nic, got), MOST);
		CHECK(!memcmp(got, frame, MOST));
	}
	make_frame(frame, CHUNK + 1, outside, w.guests[0].mac, 99);
	CHECK_EQ(nic_send(&w.nic, got), CHUNK + 1);
	CHECK(!memcmp(got, frame, CHUNK + 1));
	CHECK_EQ(nic_send(&w.nic, got), 0);
	end();
}

static void test_without_it(void)
{
	start(FEATURES, 0);
	make_frame(frame, CHUNK + 1, outside, w.guests[0].mac, 1);
	post(&w.guests[0], NULL, frame, CHUNK + 1, 20000);
	post(&w.guests[0], NULL, frame, CHUNK, 20000);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_TOO_BIG], 1);
	CHECK_EQ(nic_send(&w.nic, got), CHUNK);
	CHECK_EQ(nic_send(&w.nic, got), 0);
	end();
}

/* The device finishes checksums: the request stands before the first piece, and the frame is as the guest sent it. */
static void test_device_checksum(void)
{
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM};
	const uint32_t room = CHUNK - XV_TX_METADATA;

	for (uint32_t payload = 1; payload < 8900; payload += 373) {
		struct tx_metadata request;
		const struct xdp_desc *desc;

		start(FEATURES | CSUM, XV_NICQ_SG | XV_NICQ_TX_CSUM);
		build(&f, &(struct spec){4, IPPROTO_TCP, 0, 0, payload}, outside, w.guests[0].mac);
		hdr.csum_start = (uint16_t)f.transport;
		hdr.csum_offset = (uint16_t)f.field;
		post(&w.guests[0], &hdr, f.bytes, f.len, 20000);
		make_frame(frame, 60, outside, w.guests[0].mac, 1);
		post(&w.guests[0], NULL, frame, 60, 20000);
		world_run(&w);
		CHECK_EQ(w.nic.tx_p - w.nic.tx_c, (f.len + room - 1) / room + 1);
		desc = &w.nic.tx[w.nic.tx_c % FRAMES];
		CHECK_EQ(desc->addr % CHUNK, XV_TX_METADATA);
		CHECK_EQ(desc->options, XDP_TX_METADATA | (f.len > room ? XDP_PKT_CONTD : 0));
		memcpy(&request, w.nic.umem + desc->addr - XV_TX_METADATA, sizeof(request));
		CHECK_EQ(request.flags, XDP_TXMD_FLAGS_CHECKSUM);
		CHECK_EQ(request.csum_start, f.transport);
		CHECK_EQ(request.csum_offset, 16);
		CHECK_EQ(request.launch_time, 0);
		for (uint32_t i = 1; i < w.nic.tx_p - w.nic.tx_c; i++)
			CHECK_EQ(w.nic.tx[(w.nic.tx_c + i) % FRAMES].options & XDP_TX_METADATA, 0);
		CHECK_EQ(nic_send(&w.nic, got), f.len);
		CHECK(!memcmp(got, f.bytes, f.len));
		CHECK_EQ(nic_send(&w.nic, got), 60);
		CHECK(!memcmp(got, frame, 60));
		CHECK_EQ(w.nic.nicq->counters.csum_finished, 0);
		end();
	}
	/* a field behind the first chunk is more than the kernel looks for: finished here */
	start(FEATURES | CSUM, XV_NICQ_SG | XV_NICQ_TX_CSUM);
	make_frame(frame, 4000, outside, w.guests[0].mac, 3);
	memset(frame + room - 1, 0, 2);
	hdr.csum_start = (uint16_t)(room - 101);
	hdr.csum_offset = 100;
	post(&w.guests[0], &hdr, frame, 4000, 20000);
	world_run(&w);
	CHECK_EQ(w.nic.tx[w.nic.tx_c % FRAMES].options, XDP_PKT_CONTD);
	CHECK_EQ(nic_send(&w.nic, got), 4000);
	CHECK_EQ(plain_sum(got + room - 101, 4000 - (room - 101)), 0xffff);
	CHECK_EQ(w.nic.nicq->counters.csum_finished, 1);
	end();
}

int main(void)
{
	test_to_guest();
	test_checksum_to_guest();
	test_order_in_a_burst();
	test_incomplete();
	test_endless();
	test_stalled();
	test_to_nic();
	test_checksum_to_nic();
	test_all_or_nothing();
	test_without_it();
	test_device_checksum();
	puts("ok");
	return 0;
}
