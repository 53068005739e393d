// SPDX-License-Identifier: Apache-2.0
/* Cutting and joining: every segment's headers and bytes, what passes whole, and what is never joined. */
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frames.h"

#define GSO_FEATURES                                                                                              \
	(FEATURES | 1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_TSO6 | \
	 1ull << VIRTIO_NET_F_HOST_ECN | 1ull << F_HOST_USO)
#define JOIN_FEATURES                                                                                           \
	(FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_NET_F_GUEST_CSUM |                          \
	 1ull << VIRTIO_NET_F_GUEST_TSO4 | 1ull << VIRTIO_NET_F_GUEST_TSO6 | 1ull << VIRTIO_NET_F_GUEST_ECN |   \
	 1ull << F_GUEST_USO4 | 1ull << F_GUEST_USO6)

static struct world w;
static struct built f;
static uint8_t got[70000], all[70000];

static uint8_t gso_type(const struct spec *s)
{
	if (s->protocol == IPPROTO_UDP)
		return VIRTIO_NET_HDR_GSO_UDP_L4;
	return s->family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
}

/* Offer frame `f` as a GSO frame, in pieces of `step` bytes. */
static void send_gso(struct driver *d, uint8_t type, uint16_t size, uint32_t step)
{
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = type, .gso_size = size,
				     .csum_start = (uint16_t)f.transport, .csum_offset = (uint16_t)f.field};
	struct ring *r = &d->ring[1];
	uint32_t total = HEADER + f.len, n = (total + step - 1) / step;
	uint64_t at;

	d->top = ALIGN_UP(MEMORY / 2, 4096);
	at = driver_alloc(d, total, 64);
	memset(d->memory + at, 0, HEADER);
	memcpy(d->memory + at, &hdr, sizeof(hdr));
	memcpy(d->memory + at + HEADER, f.bytes, f.len);
	CHECK(n <= r->num);
	for (uint32_t i = 0; i < n; i++)
		ring_desc(r, (uint16_t)i, GPA + at + (uint64_t)i * step, MIN(step, total - i * step), 0,
			  i + 1 < n ? (int)i + 1 : -1);
	ring_offer(r, 0);
}

static uint32_t header_bytes(const struct spec *s)
{
	return f.transport + (s->protocol == IPPROTO_TCP ? 20 : 8);
}

/* Segment number `i` of frame `f`, `len` bytes in `got`: right in every field. */
static void check_segment(const struct spec *s, uint32_t i, uint32_t len, uint16_t size, bool last, bool finished)
{
	uint32_t header = header_bytes(s), payload = len - header, transport_bytes = len - f.transport;
	const uint8_t *transport = got + f.transport, *ip;
	struct net_headers h;
	uint32_t sum;

	CHECK(net_parse(got, len, &h));
	CHECK_EQ(h.transport, f.transport);
	CHECK_EQ(h.end, len);
	CHECK(last ? payload <= size : payload == size);
	ip = got + h.ip;
	if (s->family == 4) {
		CHECK_EQ(plain_sum(ip, h.transport - h.ip), 0xffff);
		CHECK_EQ(be16(ip + 4), (be16(f.bytes + h.ip + 4) + i) & 0xffff);
	}
	if (s->protocol == IPPROTO_TCP) {
		CHECK_EQ(be32(transport + 4), be32(f.bytes + f.transport + 4) + i * size);
		CHECK_EQ(transport[13] & 0x09, last ? 0x09 : 0); /* FIN, PSH */
		CHECK_EQ(transport[13] & 0x80, i ? 0 : 0x80);   /* CWR */
	} else {
		CHECK_EQ(be16(transport + 4), transport_bytes);
	}
	CHECK(!memcmp(got + header, f.bytes + header + i * size, payload));
	sum = net_pseudo_sum(&h, transport_bytes);
	if (finished)
		CHECK_EQ(csum_fold(sum + plain_sum(transport, transport_bytes)), 0xffff);
	else
		CHECK_EQ(csum_load16(transport + f.field), sum);
}

static const struct spec specs[] = {
	{4, IPPROTO_TCP, 0, 0, 5000}, {4, IPPROTO_TCP, 2, 8, 4321}, {6, IPPROTO_TCP, 0, 0, 5000}, {6, IPPROTO_TCP, 1, 16, 3999},
	{4, IPPROTO_UDP, 0, 0, 5000}, {6, IPPROTO_UDP, 1, 8, 4001}, {4, IPPROTO_TCP, 0, 0, 65000}, {6, IPPROTO_UDP, 0, 0, 65000},
	{4, IPPROTO_TCP, 0, 0, 1000},
};

static void build_gso(const struct spec *s)
{
	build(&f, s, b_mac, a_mac);
	if (s->protocol == IPPROTO_TCP)
		f.bytes[f.transport + 13] = 0x99; /* CWR, ACK, PSH, FIN */
}

static void test_cut_to_nic(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(specs); i++) {
		for (uint32_t step = 41; step < 70000; step = step * 7 + 1) {
			const struct spec *s = &specs[i];
			const uint16_t size = 1400;
			uint32_t segments = (s->payload + size - 1) / size, n = 0, len;

			if (s->payload / step > 900)
				continue; /* more descriptors than a frame may have */
			world_init(&w, 1, GSO_FEATURES, 2048, 0);
			build_gso(s);
			send_gso(&w.guests[0], gso_type(s), size, step);
			world_run(&w);
			CHECK_EQ(ring_reap(&w.guests[0].ring[1], NULL), 0);
			for (; (len = nic_send(&w.nic, got)); n++)
				check_segment(s, n, len, size, n + 1 == segments, true);
			CHECK_EQ(n, segments);
			CHECK_EQ(w.nic.nicq->counters.tx_packets, segments);
			CHECK_EQ(w.nic.nicq->counters.copied_bytes, w.nic.nicq->counters.tx_bytes);
			world_free(&w);
		}
	}
}

/* A datagram socket stands for the packet socket. It is full after some frames, which the NIC's being slow looks like. */
static void test_whole_to_nic(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(specs); i++) {
		for (uint32_t step = 41; step < 70000; step = step * 7 + 1) {
			const struct spec *s = &specs[i];
			struct virtio_net_hdr hdr;
			uint32_t ip_sum = 0, taken = 1;
			struct net_headers h;
			ssize_t len;
			int pair[2];

			if (s->payload / step > 900)
				continue;
			CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
			world_init(&w, 1, GSO_FEATURES, 2048, 0);
			w.nic.nicq->gso = nicq_gso_bits(XV_NICQ_GSO_TCP4 | XV_NICQ_GSO_TCP6 | XV_NICQ_GSO_ECN | XV_NICQ_GSO_UDP);
			w.nic.nicq->gso_fd = pair[0];
			build_gso(s);
			if (s->protocol == IPPROTO_TCP && s->family == 4)
				memset(f.bytes + f.transport - 10, 0, 2); /* the guest's IPv4 checksum: ours counts */
			send_gso(&w.guests[0], gso_type(s), 1400, step);
			world_run(&w);
			CHECK_EQ(ring_reap(&w.guests[0].ring[1], NULL), 0);
			CHECK_EQ(nic_send(&w.nic, got), 0);
			len = recv(pair[1], all, sizeof(all), 0);
			CHECK_EQ(len, sizeof(hdr) + f.len);
			memcpy(&hdr, all, sizeof(hdr));
			memcpy(got, all + sizeof(hdr), f.len);
			CHECK_EQ(hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
			CHECK_EQ(hdr.gso_type, gso_type(s));
			CHECK_EQ(hdr.gso_size, 1400);
			CHECK_EQ(hdr.hdr_len, header_bytes(s));
			CHECK_EQ(hdr.csum_start, f.transport);
			CHECK_EQ(hdr.csum_offset, f.field);
			CHECK(!memcmp(got + header_bytes(s), f.bytes + header_bytes(s), f.len - header_bytes(s)));
			CHECK(net_parse(got, f.len, &h));
			if (s->family == 4)
				ip_sum = plain_sum(got + h.ip, h.transport - h.ip);
			CHECK_EQ(ip_sum, s->family == 4 ? 0xffff : 0);
			CHECK_EQ(csum_load16(got + f.transport + f.field), net_pseudo_sum(&h, f.len - f.transport));
			CHECK_EQ(w.nic.nicq->counters.gso_packets, 1);
			CHECK_EQ(w.nic.nicq->counters.gso_bytes, f.len);
			CHECK_EQ(w.nic.nicq->counters.copied_bytes, 0);
			while (!w.guests[0].guest->queues[0].tx.drops[XV_DROP_NO_FRAMES]) {
				send_gso(&w.guests[0], gso_type(s), 1400, step);
				world_run(&w);
				CHECK(++taken < 1000);
			}
			CHECK_EQ(w.nic.nicq->counters.gso_packets, taken - 1);
			world_free(&w);
			close(pair[0]);
			close(pair[1]);
		}
	}
}

/* What the device does not take is cut: another type, segments above its MTU, a call that the kernel refuses. */
static void test_not_whole_to_nic(void)
{
	const struct spec *s = &specs[0];

	for (int why = 0; why < 3; why++) {
		int pair[2], dead = open("/dev/null", O_RDONLY | O_CLOEXEC);

		CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
		world_init(&w, 1, GSO_FEATURES, 256, 0);
		w.nic.nicq->gso = nicq_gso_bits(why == 0 ? XV_NICQ_GSO_TCP6 | XV_NICQ_GSO_UDP : XV_NICQ_GSO_TCP4);
		w.nic.nicq->gso_fd = why == 2 ? dead : pair[0];
		build_gso(s);
		f.bytes[f.transport + 13] &= 0x7f;
		send_gso(&w.guests[0], gso_type(s), why == 1 ? 1480 : 1400, 4096);
		world_run(&w);
		CHECK_EQ(recv(pair[1], all, sizeof(all), 0), -1);
		CHECK_EQ(w.nic.nicq->counters.gso_packets, 0);
		if (why == 1) /* but for the last, they are too long when cut, too */
			CHECK_EQ(w.guests[0].guest->queues[0].tx.drops[XV_DROP_TOO_BIG], 3);
		else
			CHECK_EQ(w.nic.nicq->counters.tx_packets, 4);
		world_free(&w);
		close(pair[0]);
		close(pair[1]);
		close(dead);
	}
}

static void post(struct driver *d, uint32_t n, uint32_t size)
{
	for (uint32_t i = 0; i < n; i++)
		ring_buffer(d, &d->ring[0], size, VRING_DESC_F_WRITE);
}

/* The next frame of a receive ring, merged buffers put together; its header. */
static struct virtio_net_hdr_mrg_rxbuf take(struct driver *d, uint32_t *len)
{
	struct virtio_net_hdr_mrg_rxbuf hdr = {.num_buffers = 1};
	struct ring *r = &d->ring[0];

	*len = 0;
	for (uint32_t i = 0; i < hdr.num_buffers; i++) {
		uint32_t bytes;
		int head = ring_reap(r, &bytes);

		CHECK(head >= 0);
		memcpy(all + *len, d->memory + (r->desc[head].addr - GPA), bytes);
		*len += bytes;
		if (!i)
			memcpy(&hdr, all, sizeof(hdr));
	}
	*len -= HEADER;
	memcpy(got, all + HEADER, *len);
	return hdr;
}

/* The second guest's driver has other features than the first's. */
static void other_features(struct driver *d, uint64_t features)
{
	d->features = features;
	for (int i = 0; i < 4; i++) {
		struct xv_vring_conf conf = ring_conf(d, &d->ring[i]);
		struct xv_vring *old = d->ring[i].vr;

		CHECK_EQ(xv_vring_new(d->mem, &conf, &d->ring[i].vr), 0);
		world_publish(&w);
		xv_vring_free(old);
	}
}

static void test_whole_to_guest(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(specs); i++) {
		struct virtio_net_hdr_mrg_rxbuf hdr;
		uint32_t len;

		world_init(&w, 2, GSO_FEATURES, 128, 0);
		other_features(&w.guests[1], JOIN_FEATURES);
		build_gso(&specs[i]);
		memcpy(f.bytes, w.guests[1].mac, 6);
		post(&w.guests[1], 64, 1536);
		send_gso(&w.guests[0], gso_type(&specs[i]) | (specs[i].protocol == IPPROTO_TCP ? VIRTIO_NET_HDR_GSO_ECN : 0),
			 1400, 4096);
		world_run(&w);
		hdr = take(&w.guests[1], &len);
		CHECK_EQ(len, f.len);
		CHECK(!memcmp(got, f.bytes, len));
		CHECK_EQ(hdr.hdr.gso_type & 7, gso_type(&specs[i]));
		CHECK_EQ(hdr.hdr.gso_size, 1400);
		CHECK_EQ(hdr.hdr.hdr_len, header_bytes(&specs[i]));
		CHECK_EQ(hdr.hdr.csum_start, f.transport);
		CHECK_EQ(hdr.hdr.csum_offset, f.field);
		CHECK_EQ(hdr.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
		CHECK_EQ(w.guests[1].guest->queues[0].rx.copied_bytes, f.len);
		world_free(&w);
	}
}

/* To a guest without GSO: segments, finished or with the rest left to it. */
static void test_cut_to_guest(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(specs); i++) {
		for (int guest_csum = 0; guest_csum < 2; guest_csum++) {
			uint32_t segments = (specs[i].payload + 1399) / 1400, len;

			world_init(&w, 2, GSO_FEATURES, 128, 0);
			other_features(&w.guests[1], FEATURES | (uint64_t)guest_csum << VIRTIO_NET_F_GUEST_CSUM);
			build_gso(&specs[i]);
			memcpy(f.bytes, w.guests[1].mac, 6);
			post(&w.guests[1], 64, 1536);
			send_gso(&w.guests[0], gso_type(&specs[i]), 1400, 4096);
			world_run(&w);
			for (uint32_t n = 0; n < segments; n++) {
				struct virtio_net_hdr_mrg_rxbuf hdr = take(&w.guests[1], &len);

				CHECK_EQ(hdr.hdr.gso_type, 0);
				CHECK_EQ(hdr.hdr.flags, guest_csum ? VIRTIO_NET_HDR_F_NEEDS_CSUM : 0);
				check_segment(&specs[i], n, len, 1400, n + 1 == segments, !guest_csum);
			}
			CHECK_EQ(ring_reap(&w.guests[1].ring[0], NULL), -1);
			world_free(&w);
		}
	}
}

/* G5, CVE-2026-100236: headers that are not what the virtio-net header says. None gets out, none harms. */
static void test_refused(void)
{
	static const struct {
		uint8_t type;
		uint16_t size;
		int at; /* byte of the frame to change, -1 none */
		uint8_t value;
	} cases[] = {
		{VIRTIO_NET_HDR_GSO_TCPV6, 1400, -1, 0},  {VIRTIO_NET_HDR_GSO_UDP_L4, 1400, -1, 0},
		{VIRTIO_NET_HDR_GSO_TCPV4, 0, -1, 0},     {VIRTIO_NET_HDR_GSO_TCPV4, 47, -1, 0},
		{VIRTIO_NET_HDR_GSO_UDP, 1400, -1, 0},    {0x7f, 1400, -1, 0},
		{0x40 | VIRTIO_NET_HDR_GSO_TCPV4, 1400, -1, 0},
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 12, 0x86}, /* not IP */
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 14, 0x4f}, /* IP options over TCP */
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 14, 0x44}, /* an IP header of 16 bytes */
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 16, 0xff}, /* longer than the frame */
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 16, 0x01}, /* shorter */
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 20, 0x20}, /* a fragment */
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 23, IPPROTO_UDP},
		{VIRTIO_NET_HDR_GSO_TCPV4, 1400, 34 + 12, 0x40}, /* a TCP header of 16 bytes */
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		world_init(&w, 1, GSO_FEATURES, 8, 0);
		build(&f, &specs[0], b_mac, a_mac);
		if (cases[i].at >= 0)
			f.bytes[cases[i].at] = cases[i].value;
		send_gso(&w.guests[0], cases[i].type, cases[i].size, 4096);
		world_run(&w);
		CHECK_EQ(w.guests[0].guest->queues[0].tx.drops[XV_DROP_BAD_HEADER], 1);
		CHECK_EQ(nic_send(&w.nic, got), 0);
		CHECK_EQ(ring_reap(&w.guests[0].ring[1], NULL), 0);
		world_free(&w);
	}
}

/* ---- joining ---- */

static uint8_t segments[40][2048];
static uint32_t lens[40], nr;

/* Cut frame `f` with the code that has been tested above: finished segments, as from a wire. */
static void cut_finished(const struct spec *s, uint16_t size)
{
	world_init(&w, 1, GSO_FEATURES, 2048, 0);
	send_gso(&w.guests[0], gso_type(s), size, 4096);
	world_run(&w);
	for (nr = 0; (lens[nr] = nic_send(&w.nic, segments[nr])); nr++)
		memcpy(segments[nr], a_mac, 6);
	world_free(&w);
}

/* As a local stack leaves it. */
static void open_checksum(uint8_t *segment, uint32_t len)
{
	struct net_headers h;
	uint16_t sum;

	CHECK(net_parse(segment, len, &h));
	sum = net_pseudo_sum(&h, len - h.transport);
	memcpy(segment + h.transport + net_csum_field(h.protocol), &sum, 2);
}

static void cut(const struct spec *s, uint16_t size)
{
	cut_finished(s, size);
	for (uint32_t i = 0; i < nr; i++)
		open_checksum(segments[i], lens[i]);
}

static void receive_segments(uint32_t begin, uint32_t end)
{
	world_init(&w, 1, JOIN_FEATURES, 128, XV_NICQ_PARTIAL_CSUM);
	post(&w.guests[0], 64, 1536);
	for (uint32_t i = begin; i < end; i++)
		CHECK(nic_receive(&w.nic, segments[i], lens[i]));
	world_run(&w);
}

static const struct spec joinable[] = {
	{4, IPPROTO_TCP, 0, 0, 14000}, {6, IPPROTO_TCP, 0, 0, 14001}, {4, IPPROTO_TCP, 1, 0, 27777},
	{4, IPPROTO_UDP, 0, 0, 14000}, {6, IPPROTO_UDP, 1, 0, 13999},
};

static void check_joined(const struct spec *s)
{
	struct virtio_net_hdr_mrg_rxbuf hdr;
	uint32_t len;

	hdr = take(&w.guests[0], &len);
	CHECK_EQ(hdr.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
	CHECK_EQ(hdr.hdr.gso_type, gso_type(s));
	CHECK_EQ(hdr.hdr.gso_size, 1400);
	CHECK_EQ(hdr.hdr.hdr_len, header_bytes(s));
	CHECK_EQ(hdr.hdr.csum_start, f.transport);
	CHECK_EQ(hdr.hdr.csum_offset, f.field);
	CHECK_EQ(len, f.len);
	CHECK(!memcmp(got, f.bytes, len)); /* what was cut is whole again, bit for bit */
	CHECK_EQ(ring_reap(&w.guests[0].ring[0], NULL), -1);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	CHECK_EQ(w.guests[0].guest->queues[0].rx.copied_bytes, len);
}

static void test_join(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(joinable); i++)
		for (int finished = 0; finished < 2; finished++) {
			const struct spec *s = &joinable[i];

			build(&f, s, b_mac, a_mac);
			if (s->protocol == IPPROTO_TCP)
				f.bytes[f.transport + 13] = 0x18; /* ACK, PSH */
			(finished ? cut_finished : cut)(s, 1400);
			memcpy(f.bytes, a_mac, 6);
			receive_segments(0, nr);
			check_joined(s);
			world_free(&w);
		}
}

/* Jumbo segments, each of several pieces, from a wire. */
static void test_join_pieces(void)
{
	const struct spec s = {4, IPPROTO_TCP, 0, 0, 36001};
	uint8_t frame[10000];
	uint32_t len;

	build(&f, &s, a_mac, b_mac);
	world_init(&w, 1, JOIN_FEATURES, 128, XV_NICQ_SG);
	post(&w.guests[0], 64, 1536);
	for (uint32_t at = 0; at < s.payload; at += 8947) {
		uint32_t bytes = MIN(8947u, s.payload - at), sum;
		struct net_headers h;

		memcpy(frame, f.bytes, f.transport + 20);
		memcpy(frame + f.transport + 20, f.bytes + f.transport + 20 + at, bytes);
		put_be16(frame + 16, 40 + bytes);
		put_be16(frame + 18, at / 8947);
		put_be16(frame + 24, 0);
		sum = (uint16_t)~plain_sum(frame + 14, 20);
		memcpy(frame + 24, &sum, 2);
		put_be32(frame + f.transport + 4, be32(f.bytes + f.transport + 4) + at);
		CHECK(net_parse(frame, f.transport + 20, &h));
		put_be16(frame + f.transport + 16, 0);
		sum = net_csum_finish(net_pseudo_sum(&h, 20 + bytes) + (uint64_t)plain_sum(frame + f.transport, 20 + bytes));
		memcpy(frame + f.transport + 16, &sum, 2);
		CHECK(nic_receive(&w.nic, frame, f.transport + 20 + bytes));
	}
	world_run(&w);
	CHECK_EQ(take(&w.guests[0], &len).hdr.gso_size, 8947);
	CHECK_EQ(len, f.len);
	CHECK(!memcmp(got, f.bytes, len));
	CHECK_EQ(w.guests[0].guest->queues[0].rx.copied_bytes, len);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	world_free(&w);
}

/* One of the joined ones has been damaged: every frame arrives as it came, by itself, the damaged one too. */
static void test_a_wrong_checksum(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(joinable); i++)
		for (uint32_t bad = 0; bad < 10; bad += 3)
			for (uint32_t byte = 0; byte < 4; byte++) {
				const struct spec *s = &joinable[i];
				struct virtio_net_hdr_mrg_rxbuf hdr;
				uint32_t at, len;

				build(&f, s, b_mac, a_mac);
				cut_finished(s, 1400);
				at = (uint32_t[]){f.transport + f.field, header_bytes(s), lens[bad] - 1, lens[bad] / 2}[byte];
				segments[bad][at] ^= 0x10;
				receive_segments(0, nr);
				for (uint32_t n = 0; n < nr; n++) {
					hdr = take(&w.guests[0], &len);
					CHECK_EQ(hdr.hdr.flags, 0);
					CHECK_EQ(hdr.hdr.gso_type, 0);
					CHECK_EQ(hdr.num_buffers, 1);
					CHECK_EQ(len, lens[n]);
					CHECK(!memcmp(got, segments[n], len));
				}
				CHECK_EQ(ring_reap(&w.guests[0].ring[0], NULL), -1);
				CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
				CHECK_EQ(w.nic.xsk->plain, 0);
				world_free(&w);
			}
}

/* A wrong sum in the IP header is not repaired by joining. */
static void test_a_wrong_ip_checksum(void)
{
	const struct spec s = {4, IPPROTO_TCP, 0, 0, 4200};
	uint32_t len;

	for (int finished = 0; finished < 2; finished++) {
		build(&f, &s, b_mac, a_mac);
		(finished ? cut_finished : cut)(&s, 1400);
		segments[1][14 + 10] ^= 1;
		receive_segments(0, nr);
		for (uint32_t n = 0; n < nr; n++) {
			CHECK_EQ(take(&w.guests[0], &len).hdr.gso_type, 0);
			CHECK_EQ(len, lens[n]);
			CHECK(!memcmp(got, segments[n], len));
		}
		world_free(&w);
	}
}

/* Joined it can never fit, or not now and perhaps never: the frames come one by one. */
static void test_unjoined_for_buffers(void)
{
	const struct spec s = {4, IPPROTO_TCP, 0, 0, 14000};
	uint32_t len;

	build(&f, &s, b_mac, a_mac);
	cut_finished(&s, 1400);
	world_init(&w, 1, JOIN_FEATURES, 4, 0);
	post(&w.guests[0], 4, 1536);
	for (uint32_t i = 0; i < 8; i++)
		CHECK(nic_receive(&w.nic, segments[i], lens[i]));
	world_run(&w);
	for (uint32_t i = 0; i < 8; i++) {
		CHECK_EQ(take(&w.guests[0], &len).hdr.gso_type, 0);
		CHECK(!memcmp(got, segments[i], lens[i]));
		ring_offer(&w.guests[0].ring[0], (uint16_t)(i % 4));
		world_run(&w);
	}
	CHECK_EQ(w.guests[0].guest->queues[0].rx.drops[XV_DROP_TOO_BIG], 0);
	world_free(&w);

	world_init(&w, 1, JOIN_FEATURES, 64, 0);
	post(&w.guests[0], 4, 1536);
	for (uint32_t i = 0; i < 8; i++)
		CHECK(nic_receive(&w.nic, segments[i], lens[i]));
	w.dp->cycles_per_us = 1ull << 40;
	world_run(&w);
	CHECK_EQ(ring_reap(&w.guests[0].ring[0], NULL), -1); /* it waits for more of them */
	w.dp->cycles_per_us = 0;
	world_run(&w);
	for (uint32_t i = 0; i < 4; i++) {
		CHECK_EQ(take(&w.guests[0], &len).hdr.gso_type, 0);
		CHECK(!memcmp(got, segments[i], lens[i]));
	}
	CHECK_EQ(ring_reap(&w.guests[0].ring[0], NULL), -1);
	world_free(&w);
}

/* Datagrams: never without a checksum, of unequal sizes, over the most that Linux takes, or to a guest without USO. */
static void test_udp_never_joined(void)
{
	const struct spec s = {4, IPPROTO_UDP, 0, 0, 4200};
	uint32_t len, frames = 0;

	for (int what = 0; what < 4; what++) {
		build(&f, &s, b_mac, a_mac);
		cut_finished(&s, 1400);
		CHECK_EQ(nr, 3);
		for (uint32_t i = 0; i < nr; i++) {
			uint8_t *udp = segments[i] + 34;

			if (what == 0)
				put_be16(udp + 6, 0);
			else if (what == 1)
				put_be16(udp, 1000 + i); /* another port */
			else if (what == 2)
				put_be16(udp + 4, be16(udp + 4) - 1); /* padding behind the datagram */
		}
		if (what < 3) {
			receive_segments(0, nr);
		} else {
			world_init(&w, 1, JOIN_FEATURES & ~(1ull << F_GUEST_USO6), 128, 0);
			post(&w.guests[0], 64, 1536);
			for (uint32_t i = 0; i < nr; i++)
				CHECK(nic_receive(&w.nic, segments[i], lens[i]));
			world_run(&w);
		}
		for (uint32_t i = 0; i < nr; i++) {
			CHECK_EQ(take(&w.guests[0], &len).hdr.gso_type, 0);
			CHECK_EQ(len, lens[i]);
			CHECK(!memcmp(got, segments[i], len));
		}
		world_free(&w);
	}
	/* a longer one after a shorter one begins anew; the shorter one has ended what it was added to */
	build(&f, &(struct spec){4, IPPROTO_UDP, 0, 0, 3400}, b_mac, a_mac);
	cut_finished(&s, 1400);
	CHECK_EQ(nr, 3);
	world_init(&w, 1, JOIN_FEATURES, 128, 0);
	post(&w.guests[0], 64, 1536);
	CHECK(nic_receive(&w.nic, segments[2], lens[2]));
	CHECK(nic_receive(&w.nic, segments[0], lens[0]));
	CHECK(nic_receive(&w.nic, segments[1], lens[1]));
	CHECK(nic_receive(&w.nic, segments[2], lens[2]));
	world_run(&w);
	while (w.guests[0].ring[0].used->idx != w.guests[0].ring[0].seen) {
		struct virtio_net_hdr_mrg_rxbuf hdr = take(&w.guests[0], &len);

		memcpy(f.bytes, a_mac, 6);
		CHECK_EQ(hdr.hdr.gso_type, frames ? VIRTIO_NET_HDR_GSO_UDP_L4 : 0);
		CHECK_EQ(len, frames ? f.len : lens[2]);
		CHECK(!memcmp(got, frames ? f.bytes : segments[2], len));
		frames++;
	}
	CHECK_EQ(frames, 2);
	world_free(&w);
}

/* Change one thing about the second of three segments: it is not joined with the first. Frames that arrive, counted. */
static uint32_t frames_after(int at, uint8_t flip)
{
	struct net_headers h;
	uint32_t frames = 0, len, bytes = 0;
	uint16_t sum;

	segments[1][at] ^= flip;
	if (net_parse(segments[1], lens[1], &h)) {
		open_checksum(segments[1], lens[1]);
		if (!h.ipv6) {
			memset(segments[1] + h.ip + 10, 0, 2);
			sum = (uint16_t)~plain_sum(segments[1] + h.ip, 20);
			memcpy(segments[1] + h.ip + 10, &sum, 2);
		}
	}
	receive_segments(0, 3);
	while (w.guests[0].ring[0].used->idx != w.guests[0].ring[0].seen) {
		take(&w.guests[0], &len);
		bytes += len;
		frames++;
	}
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	CHECK(bytes <= lens[0] + lens[1] + lens[2]);
	world_free(&w);
	segments[1][at] ^= flip;
	return frames;
}

static void receive_two(uint32_t first, uint32_t second)
{
	uint32_t len;

	world_init(&w, 1, JOIN_FEATURES, 128, XV_NICQ_PARTIAL_CSUM);
	post(&w.guests[0], 64, 1536);
	CHECK(nic_receive(&w.nic, segments[first], lens[first]));
	CHECK(nic_receive(&w.nic, segments[second], lens[second]));
	world_run(&w);
	CHECK_EQ(take(&w.guests[0], &len).hdr.gso_type, 0);
	CHECK_EQ(len, lens[first]);
	CHECK_EQ(take(&w.guests[0], &len).hdr.gso_type, 0);
	CHECK_EQ(len, lens[second]);
	world_free(&w);
}

static void test_never_joined(void)
{
	for (int family = 4; family <= 6; family += 2) {
		const struct spec s = {family, IPPROTO_TCP, 0, 0, 4200};
		uint32_t ip = 14, tcp = family == 4 ? 34 : 54;

		build(&f, &s, b_mac, a_mac);
		cut(&s, 1400);
		CHECK_EQ(nr, 3);
		CHECK_EQ(frames_after(0, 0), 1);
		CHECK(frames_after(6, 1) > 1);              /* another sender's address */
		CHECK(frames_after((int)ip + 1, 4) > 1);    /* class of service */
		if (family == 4) {
			CHECK(frames_after((int)ip + 4, 1) > 1);  /* identification */
			CHECK(frames_after((int)ip + 6, 0x40) > 1); /* DF */
			CHECK(frames_after((int)ip + 8, 1) > 1);  /* TTL */
			CHECK(frames_after((int)ip + 15, 1) > 1); /* source */
			CHECK(frames_after((int)ip + 19, 1) > 1); /* destination */
		} else {
			CHECK(frames_after((int)ip + 3, 1) > 1); /* flow label */
			CHECK(frames_after((int)ip + 7, 1) > 1); /* hop limit */
			CHECK(frames_after((int)ip + 20, 1) > 1);
			CHECK(frames_after((int)ip + 39, 1) > 1);
		}
		for (int i = 0; i < 12; i++) /* ports, sequence number, acknowledgement */
			CHECK(frames_after((int)tcp + i, 1) > 1);
		for (int bit = 0; bit < 8; bit++) /* any flag; PSH and FIN end what they are joined to */
			CHECK(frames_after((int)tcp + 13, (uint8_t)(1 << bit)) > 1);
		CHECK(frames_after((int)tcp + 15, 1) > 1); /* window */
		CHECK(frames_after((int)tcp + 19, 1) > 1); /* urgent pointer */

		receive_two(0, 2); /* one is missing */
		receive_two(1, 0); /* swapped */
	}
}

int main(void)
{
	test_cut_to_nic();
	test_whole_to_nic();
	test_not_whole_to_nic();
	test_whole_to_guest();
	test_cut_to_guest();
	test_refused();
	test_join();
	test_never_joined();
	test_join_pieces();
	test_a_wrong_checksum();
	test_a_wrong_ip_checksum();
	test_unjoined_for_buffers();
	test_udp_never_joined();
	puts("ok");
	return 0;
}
