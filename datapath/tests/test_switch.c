// SPDX-License-Identifier: Apache-2.0
/* Who reaches whom: VLANs, tags put in and taken out, own addresses only, isolation, a link that is off, the host port. */
#include <errno.h>
#include <sys/socket.h>

#include "../src/ingress.h"
#include "frames.h"

#define GSO_FEATURES \
	(FEATURES | 1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_TSO6 | 1ull << F_HOST_USO)
#define JOIN_FEATURES                                                                                                      \
	(FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_GUEST_TSO4 | \
	 1ull << VIRTIO_NET_F_GUEST_TSO6)
#define RX(i) (w.guests[i].guest->queues[0].rx)
#define TX(i) (w.guests[i].guest->queues[0].tx)

static const uint8_t nobody[6] = {0x52, 0x54, 0, 0, 9, 9}, everyone[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
static const struct xv_policy_conf in_10 = {.access = 10, .flags = XV_POLICY_SPOOF_CHECK},
				   in_20 = {.access = 20, .flags = XV_POLICY_SPOOF_CHECK},
				   strict = {.flags = XV_POLICY_SPOOF_CHECK}, alone = {.flags = XV_POLICY_ISOLATED},
				   off = {.flags = XV_POLICY_LINK_DOWN};
static uint64_t vlans_10_30[64] = {1ull << 10 | 1ull << 30};

static struct world w;
static struct built f;
static uint8_t frame[4096], got[70000];

static struct xv_policy_conf trunk(void)
{
	return (struct xv_policy_conf){.trunk = (uintptr_t)vlans_10_30, .flags = XV_POLICY_SPOOF_CHECK};
}

static void begin(const struct xv_policy_conf *a, const struct xv_policy_conf *b, const struct xv_policy_conf *c,
		  uint64_t features)
{
	world_init(&w, 3, features, 128, 0);
	w.policies[0] = a;
	w.policies[1] = b;
	w.policies[2] = c;
	world_publish(&w);
}

static void end(void)
{
	w.nr_guests = 3;
	world_free(&w);
}

static void post(uint32_t guest, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		ring_buffer(&w.guests[guest], &w.guests[guest].ring[0], 2048, VRING_DESC_F_WRITE);
}

/* The guest's next frame is in `got`; its length, 0: there is none. */
static uint32_t take(uint32_t guest, struct virtio_net_hdr_mrg_rxbuf *hdr)
{
	struct driver *d = &w.guests[guest];
	struct virtio_net_hdr_mrg_rxbuf first = {.num_buffers = 1};
	uint32_t len = 0;

	for (uint32_t i = 0; i < first.num_buffers; i++) {
		uint32_t bytes, skip = i ? 0 : HEADER;
		int head = ring_reap(&d->ring[0], &bytes);
		const uint8_t *at;

		if (head < 0)
			return 0;
		at = d->memory + (d->ring[0].desc[head].addr - GPA);
		if (!i)
			memcpy(&first, at, sizeof(first));
		memcpy(got + len, at + skip, bytes - skip);
		len += bytes - skip;
	}
	if (hdr)
		*hdr = first;
	return len;
}

/* Put a tag into `bytes`; the new length. */
static uint32_t tagged(uint8_t *bytes, uint32_t len, uint16_t tci)
{
	memmove(bytes + 16, bytes + 12, len - 12);
	memcpy(bytes + 12, (uint8_t[]){0x81, 0, (uint8_t)(tci >> 8), (uint8_t)tci}, 4);
	return len + 4;
}

/* `got` is the frame, with this tag, 0: without one. */
static void check_is(uint32_t len, const uint8_t *wanted, uint32_t wanted_len, uint16_t tci)
{
	uint8_t copy[4096];

	memcpy(copy, wanted, wanted_len);
	if (tci)
		wanted_len = tagged(copy, wanted_len, tci);
	CHECK_EQ(len, wanted_len);
	CHECK(!memcmp(got, copy, len));
}

static void send_from(uint32_t guest, const uint8_t *to, uint32_t len, uint16_t tci)
{
	make_frame(frame, len, to, w.guests[guest].mac, (uint8_t)len);
	memcpy(got, frame, len);
	driver_send(&w.guests[guest], got, tci ? tagged(got, len, tci) : len);
	world_run(&w);
}

static void test_access(void)
{
	for (uint32_t len = 14; len < 1515; len += len < 30 ? 1 : 211) {
		begin(&in_10, &in_10, &in_20, FEATURES);
		for (uint32_t i = 0; i < 3; i++)
			post(i, 4);
		send_from(0, w.guests[1].mac, len, 0); /* its own VLAN's */
		check_is(take(1, NULL), frame, len, 0);
		CHECK_EQ(RX(1).copied_bytes, len);
		CHECK_EQ(TX(0).bytes, len);
		send_from(0, w.guests[2].mac, len, 0); /* another VLAN's: nobody here in VLAN 10 */
		CHECK_EQ(take(2, NULL), 0);
		check_is(nic_send(&w.nic, got), frame, len, 10);
		CHECK_EQ(w.nic.nicq->counters.copied_bytes, len + 4);
		send_from(0, nobody, len, 5 << 13); /* a priority, and no VLAN: the one becomes the other's */
		if (len >= 18)
			check_is(nic_send(&w.nic, got), frame, len, 5 << 13 | 10);
		end();
	}
}

static void test_an_access_port_sends_no_tag(void)
{
	static const uint16_t tags[] = {10, 20, 4095, 7 << 13 | 1};

	begin(&in_10, &in_10, &in_20, FEATURES);
	post(1, 4);
	for (size_t i = 0; i < ARRAY_SIZE(tags); i++)
		send_from(0, i & 1 ? w.guests[1].mac : nobody, 100, tags[i]);
	make_frame(frame, 100, w.guests[1].mac, w.guests[0].mac, 1);
	memcpy(frame + 12, (uint8_t[]){0x88, 0xa8, 0, 10}, 4);
	driver_send(&w.guests[0], frame, 100);
	make_frame(frame, 14, w.guests[1].mac, w.guests[0].mac, 1);
	memcpy(frame + 12, (uint8_t[]){0x81, 0}, 2); /* a tag that is cut off */
	driver_send(&w.guests[0], frame, 14);
	for (uint32_t outer = 0; outer < 3; outer++) { /* behind a priority, of three kinds */
		make_frame(frame, 100, w.guests[1].mac, w.guests[0].mac, 1);
		memcpy(frame + 12, (uint8_t[]){0x81, 0, 0, 0, "\x81\x88\x91"[outer], "\x00\xa8\x00"[outer], 0, 20}, 8);
		driver_send(&w.guests[0], frame, 100);
	}
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_VLAN], ARRAY_SIZE(tags) + 5);
	CHECK_EQ(take(1, NULL) + nic_send(&w.nic, got), 0);
	end();
}

static void test_trunk(void)
{
	const struct xv_policy_conf both = trunk();

	begin(&both, &in_10, NULL, FEATURES);
	for (uint32_t i = 0; i < 3; i++)
		post(i, 8);
	send_from(0, w.guests[1].mac, 60, 10);
	check_is(take(1, NULL), frame, 60, 0);
	send_from(1, w.guests[0].mac, 60, 0);
	check_is(take(0, NULL), frame, 60, 10);
	send_from(0, w.guests[1].mac, 60, 30); /* not there in VLAN 30 */
	check_is(nic_send(&w.nic, got), frame, 60, 30);
	send_from(0, w.guests[2].mac, 60, 30); /* who is in every VLAN */
	check_is(take(2, NULL), frame, 60, 30);
	send_from(2, w.guests[0].mac, 60, 30);
	check_is(take(0, NULL), frame, 60, 30);
	send_from(2, w.guests[0].mac, 60, 0); /* a trunk has no frames without a tag */
	check_is(nic_send(&w.nic, got), frame, 60, 0);
	send_from(2, w.guests[0].mac, 60, 11);
	check_is(nic_send(&w.nic, got), frame, 60, 11);
	CHECK_EQ(TX(0).drops[XV_DROP_VLAN], 0);
	send_from(0, nobody, 60, 0);
	send_from(0, nobody, 60, 11);
	send_from(0, nobody, 60, 3 << 13);
	CHECK_EQ(TX(0).drops[XV_DROP_VLAN], 3);
	CHECK_EQ(nic_send(&w.nic, got), 0);
	end();
}

/* Everybody in the VLAN gets a broadcast, each as it is to have it, whatever the one before was given. */
static void test_flood(void)
{
	const struct xv_policy_conf both = trunk();

	for (uint32_t from = 0; from < 3; from++) {
		begin(&in_10, &both, NULL, FEATURES);
		for (uint32_t i = 0; i < 3; i++)
			post(i, 8);
		send_from(from, everyone, 100, from ? 10 : 0);
		for (uint32_t i = 0; i < 3; i++)
			if (i != from)
				check_is(take(i, NULL), frame, 100, i ? 10 : 0);
		check_is(nic_send(&w.nic, got), frame, 100, 10);
		send_from(2, everyone, 100, 20); /* only the NIC's */
		CHECK_EQ(take(0, NULL) + take(1, NULL), 0);
		check_is(nic_send(&w.nic, got), frame, 100, 20);
		send_from(2, everyone, 100, 0);
		CHECK_EQ(take(0, NULL) + take(1, NULL), 0);
		check_is(nic_send(&w.nic, got), frame, 100, 0);
		end();
	}
}

static void test_from_the_nic(void)
{
	begin(&in_10, NULL, NULL, FEATURES);
	w.nr_guests = 1;
	world_publish(&w);
	/* without buffers they wait where they are, and come out right later */
	for (uint8_t i = 0; i < 20; i++) {
		make_frame(frame, 60u + i, w.guests[0].mac, nobody, i);
		memcpy(got, frame, sizeof(frame));
		CHECK(nic_receive(&w.nic, got, tagged(got, 60u + i, i & 1 ? 10 : 6 << 13 | 10)));
	}
	for (uint8_t i = 0; i < 20; i++) {
		if (i % 7 == 0) {
			worker_turn(&w.dp->workers[0], w.dp->snap, false);
			worker_turn(&w.dp->workers[0], w.dp->snap, false);
		}
		post(0, 1);
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		make_frame(frame, 60u + i, w.guests[0].mac, nobody, i);
		check_is(take(0, NULL), frame, 60u + i, 0);
	}
	/* what has no tag, or another's, should not be here */
	post(0, 4);
	CHECK(nic_receive(&w.nic, frame, 60));
	memcpy(got, frame, 60);
	CHECK(nic_receive(&w.nic, got, tagged(got, 60, 11)));
	world_run(&w);
	CHECK_EQ(take(0, NULL), 0);
	CHECK_EQ(RX(0).drops[XV_DROP_VLAN], 2);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	end();
}

/* Of a flood that a guest has no buffers for, only its VLAN's frames are its loss. */
static void test_flood_without_buffers(void)
{
	begin(&in_10, NULL, NULL, FEATURES);
	for (uint16_t i = 0; i < 11; i++) {
		make_frame(frame, 60, everyone, w.guests[1].mac, 1);
		memcpy(got, frame, 60);
		driver_send(&w.guests[1], got, tagged(got, 60, i ? 20 : 10));
	}
	world_run(&w);
	CHECK_EQ(RX(0).drops[XV_DROP_NO_BUFFERS], 1);
	end();
}

/* An open checksum is where it was, as seen from the frame's new beginning. */
static void test_checksums(void)
{
	static const struct spec specs[] = {{4, IPPROTO_TCP, 0, 0, 301}, {6, IPPROTO_UDP, 0, 0, 300}};

	for (size_t i = 0; i < ARRAY_SIZE(specs); i++) {
		struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM};
		struct virtio_net_hdr_mrg_rxbuf seen;
		uint8_t *buffer;
		uint32_t len;

		begin(&in_10, &in_10, NULL, GSO_FEATURES | JOIN_FEATURES);
		for (int way = 0; way < 3; way++) { /* to a guest in the VLAN, to one that sees the tag, to the NIC */
			const uint8_t *to = way < 2 ? w.guests[way + 1].mac : nobody;

			w.policies[1] = way == 1 ? NULL : &in_10;
			build(&f, &specs[i], to, w.guests[0].mac);
			hdr.csum_start = (uint16_t)f.transport;
			hdr.csum_offset = (uint16_t)f.field;
			buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + f.len, 0);
			memset(buffer, 0, HEADER);
			memcpy(buffer, &hdr, sizeof(hdr));
			memcpy(buffer + HEADER, f.bytes, f.len);
			post(1, 1);
			post(2, 1);
			world_run(&w);
			len = way < 2 ? take((uint32_t)way + 1, &seen) : nic_send(&w.nic, got);
			CHECK_EQ(len, f.len + (way ? 4u : 0u));
			if (way < 2) {
				CHECK_EQ(seen.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
				CHECK_EQ(seen.hdr.csum_start, f.transport + (way ? 4u : 0u));
				check_is(len, f.bytes, f.len, way ? 10 : 0);
			} else {
				memmove(got + 12, got + 16, len - 16);
				CHECK(verifies(&f, got));
			}
		}
		end();
	}
}

/* The checksum is written after the frame was judged, and its value is the guest's: never over what was judged. */
static void test_checksum_over_the_header(void)
{
	const struct xv_policy_conf both = trunk(), *const policies[] = {&in_10, &both, &strict};

	for (size_t p = 0; p < ARRAY_SIZE(policies); p++) {
		uint32_t sent = 0;

		begin(policies[p], &in_10, NULL, GSO_FEATURES);
		for (uint16_t at = 14; at < 60; at++) {
			const struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = at};
			uint32_t head = 14, len = 100;
			uint8_t *buffer;

			make_frame(frame, len, nobody, w.guests[0].mac, (uint8_t)at);
			if (p == 1 || at & 1)
				len = tagged(frame, len, p == 1 ? 10 : 0), head = 18;
			buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + len, 0);
			memset(buffer, 0, HEADER);
			memcpy(buffer, &hdr, sizeof(hdr));
			memcpy(buffer + HEADER, frame, len);
			world_run(&w);
			len = nic_send(&w.nic, got);
			if (!len)
				continue;
			sent++;
			if (p == 0 && !(at & 1))
				memmove(got + 12, got + 16, len - 16);
			else if (p == 0)
				put_be16(frame + 14, 10);
			CHECK(!memcmp(got, frame, head));
		}
		CHECK(sent > 30);
		CHECK_EQ(TX(0).drops[XV_DROP_BAD_HEADER], 46 - sent);
		end();
	}
}

/* The same with the guard of its IP addresses, which looks further; ordinary frames pass. */
static void test_checksum_over_addresses(void)
{
	static const uint8_t arp[] = {0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2, 0x52, 0x54, 0, 0, 0, 1, 10, 1, 2, 3};
	const struct xv_ip own = {{10, 1, 2, 3}, 4};
	const struct xv_policy_conf guarded = {.flags = XV_POLICY_SPOOF_CHECK | XV_POLICY_IP_CHECK, .nr_addresses = 1,
					       .addresses = (uintptr_t)&own};
	uint8_t *buffer;

	begin(&guarded, NULL, NULL, GSO_FEATURES);
	for (uint16_t at = 14; at < 58; at++) {
		const struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = at};

		make_frame(frame, 60, nobody, w.guests[0].mac, 1);
		memcpy(frame + 12, arp, sizeof(arp));
		buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + 60, 0);
		memset(buffer, 0, HEADER);
		memcpy(buffer, &hdr, sizeof(hdr));
		memcpy(buffer + HEADER, frame, 60);
		world_run(&w);
		CHECK_EQ(nic_send(&w.nic, got), 0);
	}
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_HEADER], 58 - 14);
	for (uint32_t at = 14; at < 60; at++) {
		struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = (uint16_t)at};
		bool sent;

		build(&f, &(struct spec){4, IPPROTO_UDP, 0, 0, 300}, nobody, w.guests[0].mac);
		hdr.csum_offset = at == f.transport ? (uint16_t)f.field : 0;
		buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + f.len, 0);
		memset(buffer, 0, HEADER);
		memcpy(buffer, &hdr, sizeof(hdr));
		memcpy(buffer + HEADER, f.bytes, f.len);
		world_run(&w);
		sent = nic_send(&w.nic, got);
		CHECK_EQ(sent, at == f.transport || at >= f.transport + 8);
		CHECK(!sent || !memcmp(got, f.bytes, f.transport + 4));
	}
	/* behind an authentication header the guard goes on, and net_parse() doesn't: nothing may be written there */
	for (uint32_t at = 54; at < 100; at++) {
		const struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = (uint16_t)at};

		build(&f, &(struct spec){6, IPPROTO_UDP, 0, 0, 300}, nobody, w.guests[0].mac);
		f.bytes[14 + 6] = IPPROTO_AH;
		memcpy(f.bytes + 14 + 8, (uint8_t[]){0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x50, 0x54, 0, 0xff, 0xfe, 0, 0, 1}, 16);
		memcpy(f.bytes + 54, (uint8_t[]){IPPROTO_UDP, 4}, 2);
		memcpy(f.bytes + 78, (uint8_t[]){0x30, 0x39, 0x30, 0x39}, 4);
		buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + f.len, 0);
		memset(buffer, 0, HEADER);
		memcpy(buffer + HEADER, f.bytes, f.len);
		world_run(&w);
		CHECK(nic_send(&w.nic, got)); /* it is fit to be sent without an open checksum */
		buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + f.len, 0);
		memset(buffer, 0, HEADER);
		memcpy(buffer, &hdr, sizeof(hdr));
		memcpy(buffer + HEADER, f.bytes, f.len);
		world_run(&w);
		CHECK_EQ(nic_send(&w.nic, got), 0);
	}
	end();
}

/* One that a tag would push out of what 16 bits can say. */
static void test_a_checksum_too_far(void)
{
	const struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 65533, .csum_offset = 13};
	static uint8_t large[66000];
	uint8_t *buffer;

	begin(&in_10, &in_10, NULL, GSO_FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF);
	post(1, 64);
	make_frame(large, 65557, w.guests[1].mac, w.guests[0].mac, 1);
	buffer = ring_buffer(&w.guests[0], &w.guests[0].ring[1], HEADER + 65557, 0);
	memset(buffer, 0, HEADER);
	memcpy(buffer, &hdr, sizeof(hdr));
	memcpy(buffer + HEADER, large, 65557);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_HEADER], 1);
	CHECK_EQ(take(1, NULL), 0);
	end();
}

/* Offer `f` as a GSO frame in one descriptor. */
static void send_gso(struct driver *d, uint8_t type)
{
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = type, .gso_size = 1400,
				     .csum_start = (uint16_t)f.transport, .csum_offset = (uint16_t)f.field};
	uint8_t *buffer = ring_buffer(d, &d->ring[1], HEADER + f.len, 0);

	memset(buffer, 0, HEADER);
	memcpy(buffer, &hdr, sizeof(hdr));
	memcpy(buffer + HEADER, f.bytes, f.len);
	world_run(&w);
}

static void test_gso(void)
{
	static const struct spec s = {4, IPPROTO_TCP, 0, 0, 5000};
	struct virtio_net_hdr_mrg_rxbuf hdr;
	uint32_t len, segments = 0, payload = 0;

	/* whole to a guest of the VLAN and to one that sees the tag */
	begin(&in_10, &in_10, NULL, GSO_FEATURES | JOIN_FEATURES);
	for (uint32_t to = 1; to < 3; to++) {
		build(&f, &s, w.guests[to].mac, w.guests[0].mac);
		post(to, 8);
		send_gso(&w.guests[0], VIRTIO_NET_HDR_GSO_TCPV4);
		len = take(to, &hdr);
		CHECK_EQ(len, f.len + (to == 2 ? 4 : 0));
		CHECK_EQ(hdr.hdr.gso_type, VIRTIO_NET_HDR_GSO_TCPV4);
		CHECK_EQ(hdr.hdr.hdr_len, f.transport + 20 + (to == 2 ? 4 : 0));
		CHECK_EQ(hdr.hdr.csum_start, f.transport + (to == 2 ? 4 : 0));
		if (to == 2) {
			CHECK_EQ(frame_vlan(got), 10);
			memmove(got + 12, got + 16, len - 16);
		}
		CHECK(!memcmp(got, f.bytes, f.len));
	}
	/* in segments to the NIC, each with the tag */
	build(&f, &s, nobody, w.guests[0].mac);
	send_gso(&w.guests[0], VIRTIO_NET_HDR_GSO_TCPV4);
	for (; (len = nic_send(&w.nic, got)); segments++) {
		struct net_headers h;

		CHECK_EQ(frame_vlan(got), 10);
		CHECK(net_parse(got, len, &h));
		CHECK_EQ(h.end, len);
		CHECK_EQ(csum_fold(net_pseudo_sum(&h, len - h.transport) + plain_sum(got + h.transport, len - h.transport)), 0xffff);
		CHECK(!memcmp(got + h.transport + 20, f.bytes + f.transport + 20 + payload, len - h.transport - 20));
		payload += len - h.transport - 20;
	}
	CHECK_EQ(segments, 4);
	CHECK_EQ(payload, 5000);
	end();
	/* with a priority: it keeps that, and gets the VLAN, in every segment */
	begin(&in_10, NULL, NULL, GSO_FEATURES);
	build(&f, &(struct spec){4, IPPROTO_TCP, 1, 0, 5000}, nobody, w.guests[0].mac);
	put_be16(f.bytes + 14, 5 << 13);
	send_gso(&w.guests[0], VIRTIO_NET_HDR_GSO_TCPV4);
	for (segments = 0; (len = nic_send(&w.nic, got)); segments++)
		CHECK_EQ(be16(got + 14), 5 << 13 | 10);
	CHECK_EQ(segments, 4);
	end();
	/* in segments to a guest that takes none */
	begin(&in_10, &in_10, NULL, GSO_FEATURES);
	build(&f, &s, w.guests[1].mac, w.guests[0].mac);
	post(1, 8);
	send_gso(&w.guests[0], VIRTIO_NET_HDR_GSO_TCPV4);
	for (payload = 0; (len = take(1, NULL)); payload += len - f.transport - 20) {
		CHECK_EQ(frame_vlan(got), 0);
		CHECK(!memcmp(got + f.transport + 20, f.bytes + f.transport + 20 + payload, len - f.transport - 20));
	}
	CHECK_EQ(payload, 5000);
	end();
}

/* Segments from the wire, tagged: joined without their tags, and with too few buffers one by one. */
static void test_joined(void)
{
	for (uint32_t buffers = 1; buffers < 6; buffers++) {
		struct virtio_net_hdr_mrg_rxbuf hdr;
		uint32_t len, payload = 0, rounds = 0;

		begin(&in_10, NULL, NULL, JOIN_FEATURES);
		w.nr_guests = 1;
		world_publish(&w);
		for (uint32_t i = 0; i < 4; i++) {
			uint32_t sum;

			build(&f, &(struct spec){4, IPPROTO_TCP, 0, 0, 1400}, w.guests[0].mac, b_mac);
			put_be32(f.bytes + f.transport + 4, i * 1400);
			put_be32(f.bytes + f.transport + 8, 0);
			put_be16(f.bytes + f.transport + 14, 1000);
			memset(f.bytes + f.transport + 18, 0, 2);
			memset(f.bytes + 14 + 4, 0, 2);
			f.bytes[14 + 6] = 0x40;
			memset(f.bytes + 14 + 10, 0, 2);
			sum = (uint16_t)~plain_sum(f.bytes + 14, 20);
			memcpy(f.bytes + 14 + 10, &sum, 2);
			memcpy(f.bytes + f.transport + 16, &f.pseudo, 2);
			sum = (uint16_t)~plain_sum(f.bytes + f.transport, f.len - f.transport);
			memcpy(f.bytes + f.transport + 16, &sum, 2);
			memcpy(got, f.bytes, f.len);
			CHECK(nic_receive(&w.nic, got, tagged(got, f.len, 10)));
		}
		while (payload < 4 * 1400 && rounds++ < 100) {
			post(0, buffers);
			for (uint64_t until = cycles_now() + 3000 * w.dp->cycles_per_us; cycles_now() < until;)
				worker_turn(&w.dp->workers[0], w.dp->snap, false);
			while ((len = take(0, &hdr))) {
				CHECK_EQ(frame_vlan(got), 0);
				CHECK(!memcmp(got, f.bytes, 12));
				CHECK_EQ(be32(got + f.transport + 4), payload);
				payload += len - f.transport - 20;
			}
		}
		CHECK_EQ(payload, 4 * 1400);
		end();
	}
}

static void test_own_addresses_only(void)
{
	static const uint8_t sources[][6] = {{0x52, 0x54, 0, 0, 0, 2}, {0x52, 0x54, 0, 0, 9, 9}, {0}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
					     {0x53, 0x54, 0, 0, 0, 1}};

	begin(&strict, &strict, NULL, FEATURES);
	post(1, 8);
	for (size_t i = 0; i < ARRAY_SIZE(sources); i++) {
		make_frame(frame, 60, i & 1 ? w.guests[1].mac : nobody, sources[i], 1);
		driver_send(&w.guests[0], frame, 60);
		make_frame(frame, 60, everyone, sources[i], 1);
		driver_send(&w.guests[0], frame, 60);
	}
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_SPOOFED], 2 * ARRAY_SIZE(sources));
	CHECK_EQ(take(1, NULL) + nic_send(&w.nic, got), 0);
	/* good ones among them get through, in order, and every buffer comes back */
	for (uint32_t i = 0; i < 8; i++) {
		make_frame(frame, 60 + i, w.guests[1].mac, i % 3 ? w.guests[0].mac : nobody, 1);
		driver_send(&w.guests[0], frame, 60 + i);
	}
	world_run(&w);
	CHECK_EQ(take(1, NULL), 61);
	CHECK_EQ(take(1, NULL), 62);
	CHECK_EQ(take(1, NULL), 64);
	CHECK_EQ(w.guests[0].ring[1].used->idx, w.guests[0].ring[1].avail->idx);
	end();
}

/* Where anybody is in some VLANs only, everybody's frames get a head: also those of a guest that may do anything. */
static void test_everybody_is_judged(void)
{
	const struct xv_policy_conf both = trunk();

	begin(&both, NULL, NULL, FEATURES);
	CHECK(w.dp->snap->ports[1].judged);
	w.policies[0] = &strict;
	world_publish(&w);
	CHECK(w.dp->snap->ports[0].judged && !w.dp->snap->ports[1].judged);
	end();
}

/* The guest changes its frame after it was judged: what goes on is what was judged. */
static void test_changed_meanwhile(void)
{
	static const uint32_t steps[] = {5000, 7, 18, 26, 12 + 18};

	for (size_t i = 0; i < ARRAY_SIZE(steps); i++) {
		static struct burst_chains chains;
		static struct xv_burst burst;
		const struct xv_view *views[1] = {&burst.views[0]};
		const uint32_t total = HEADER + 100, n = (total + steps[i] - 1) / steps[i];
		struct origin from = {.port = 0, .judged = true};
		struct ring *r;
		uint64_t at;

		begin(i & 1 ? &in_10 : &strict, NULL, NULL, FEATURES);
		from.drops = TX(0).drops;
		r = &w.guests[0].ring[1];
		make_frame(frame, 100, nobody, w.guests[0].mac, 1);
		at = driver_alloc(&w.guests[0], total, 16);
		memset(w.guests[0].memory + at, 0, HEADER);
		memcpy(w.guests[0].memory + at + HEADER, frame, 100);
		for (uint32_t d = 0; d < n; d++)
			ring_desc(r, (uint16_t)d, GPA + at + d * steps[i], MIN(steps[i], total - d * steps[i]), 0,
				  d + 1 < n ? (int)d + 1 : -1);
		ring_offer(r, 0);
		guest_rx_burst(r->vr, &burst, &chains);
		CHECK_EQ(burst.nr, 1);
		CHECK_EQ(ingress_burst(w.dp->snap, &from, &burst, &w.dp->workers[0].calls.ingress), 0);
		memset(w.guests[0].memory + at + HEADER, 0x55, 14);
		nicq_tx_burst(w.nic.nicq, views, 1, 1514, TX(0).drops);
		check_is(nic_send(&w.nic, got), frame, 100, i & 1 ? 10 : 0);
		end();
	}
}

static void test_isolated(void)
{
	begin(&alone, NULL, NULL, FEATURES);
	for (uint32_t i = 0; i < 3; i++)
		post(i, 4);
	send_from(0, w.guests[1].mac, 60, 0);
	send_from(1, w.guests[0].mac, 60, 0);
	CHECK_EQ(TX(0).drops[XV_DROP_ISOLATED], 1);
	CHECK_EQ(TX(1).drops[XV_DROP_ISOLATED], 1);
	CHECK_EQ(take(0, NULL) + take(1, NULL), 0);
	send_from(0, everyone, 60, 0);
	CHECK_EQ(nic_send(&w.nic, got), 60);
	send_from(1, everyone, 60, 0);
	CHECK_EQ(nic_send(&w.nic, got), 60);
	CHECK_EQ(take(2, NULL), 60);
	CHECK_EQ(take(2, NULL), 0);
	send_from(0, nobody, 60, 0);
	CHECK_EQ(nic_send(&w.nic, got), 60);
	make_frame(frame, 60, w.guests[0].mac, nobody, 1);
	CHECK(nic_receive(&w.nic, frame, 60));
	world_run(&w);
	CHECK_EQ(take(0, NULL), 60);
	end();
}

static void test_link_off(void)
{
	begin(&off, NULL, NULL, FEATURES);
	post(0, 4);
	send_from(0, nobody, 60, 0);
	CHECK_EQ(TX(0).drops[XV_DROP_LINK_DOWN], 1);
	send_from(1, w.guests[0].mac, 60, 0);
	CHECK_EQ(RX(0).drops[XV_DROP_LINK_DOWN], 1);
	CHECK(nic_receive(&w.nic, frame, 60));
	world_run(&w);
	CHECK_EQ(RX(0).drops[XV_DROP_LINK_DOWN], 2);
	CHECK_EQ(take(0, NULL) + nic_send(&w.nic, got), 0);
	w.policies[0] = NULL;
	world_publish(&w);
	send_from(1, w.guests[0].mac, 60, 0);
	CHECK_EQ(take(0, NULL), 60);
	end();
}

/* A datagram socket stands for the host's tap. */
static void test_host_port(void)
{
	struct xv_tapq_conf conf = {.header_len = 12};
	struct virtio_net_hdr_mrg_rxbuf hdr = {0};
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
	conf.fd = pair[0];
	begin(&in_10, NULL, &alone, FEATURES);
	CHECK_EQ(xv_tapq_new(&conf, &w.host), 0);
	world_publish(&w);
	for (uint32_t i = 0; i < 3; i++)
		post(i, 8);
	/* to the host: from a guest with a tag of its VLAN, from one as it is, never from an isolated one */
	send_from(0, host_mac, 60, 0);
	CHECK_EQ(read(pair[1], got, sizeof(got)), HEADER + 64);
	CHECK_EQ(frame_vlan(got + HEADER), 10);
	send_from(1, host_mac, 60, 0);
	CHECK_EQ(read(pair[1], got, sizeof(got)), HEADER + 60);
	CHECK(!memcmp(got + HEADER, frame, 60));
	send_from(2, host_mac, 60, 0);
	CHECK_EQ(TX(2).drops[XV_DROP_ISOLATED], 1);
	send_from(1, everyone, 60, 0);
	CHECK_EQ(read(pair[1], got, sizeof(got)), HEADER + 60);
	CHECK_EQ(nic_send(&w.nic, got), 60);
	send_from(2, everyone, 60, 0);
	CHECK(read(pair[1], got, sizeof(got)) < 0);
	CHECK_EQ(nic_send(&w.nic, got), 60);
	CHECK_EQ(w.host->counters.tx_packets, 3);
	/* from the host: to a guest, to the NIC, to all, and not back to itself */
	for (int way = 0; way < 3; way++) {
		uint8_t bytes[HEADER + 60];

		memcpy(bytes, &hdr, HEADER);
		make_frame(bytes + HEADER, 60, way == 0 ? w.guests[1].mac : way == 1 ? nobody : everyone, host_mac, 1);
		CHECK_EQ(write(pair[1], bytes, sizeof(bytes)), sizeof(bytes));
		world_run(&w);
		CHECK_EQ(take(1, NULL), way == 1 ? 0 : 60);
		CHECK_EQ(nic_send(&w.nic, got), way == 0 ? 0 : 60);
		CHECK_EQ(take(0, NULL) + take(2, NULL), 0); /* another VLAN; isolated */
		CHECK(read(pair[1], got, sizeof(got)) < 0);
	}
	CHECK_EQ(w.host->counters.rx_packets, 3);
	CHECK_EQ(w.host->counters.rx_unclaimed, 0);
	end();
	xv_tapq_free(w.host);
	close(pair[0]);
	close(pair[1]);
}

/* In each VLAN that the guest is in. */
static void test_announcement(void)
{
	const struct xv_policy_conf both = trunk(), *const policies[] = {&both, &in_10, NULL};
	static const uint16_t first[] = {10, 10, 0};

	for (size_t i = 0; i < ARRAY_SIZE(policies); i++) {
		begin(policies[i], NULL, NULL, FEATURES);
		xv_guest_announce(w.guests[0].guest, w.guests[0].mac);
		world_run(&w);
		for (uint16_t n = 0; n < (i ? 1 : 2); n++) {
			CHECK_EQ(nic_send(&w.nic, got), first[i] ? 64 : 60);
			CHECK_EQ(frame_vlan(got), n ? 30 : first[i]);
			CHECK_EQ(be16(got + (first[i] ? 16 : 12)), 0x8035);
		}
		CHECK_EQ(nic_send(&w.nic, got), 0);
		end();
	}
}

static void test_contradictions(void)
{
	const struct xv_ip neither = {.version = 5};
	uint64_t zero[64] = {1}, last[64] = {[63] = 1ull << 63};
	const struct xv_policy_conf bad[] = {
		{.access = 4095},
		{.access = 10, .trunk = (uintptr_t)vlans_10_30},
		{.trunk = (uintptr_t)zero},
		{.trunk = (uintptr_t)last},
		{.flags = 1u << 31},
		{.learn = XV_MAX_LEARNED + 1},
		{.nr_addresses = 1, .addresses = (uintptr_t)&neither},
		{.nr_addresses = XV_MAX_ADDRESSES + 1, .addresses = (uintptr_t)&neither},
	};
	struct policy *policy;

	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		CHECK_EQ(policy_new(&bad[i], &policy), -EINVAL);
}

int main(void)
{
	test_access();
	test_an_access_port_sends_no_tag();
	test_trunk();
	test_flood();
	test_from_the_nic();
	test_flood_without_buffers();
	test_checksums();
	test_checksum_over_the_header();
	test_checksum_over_addresses();
	test_a_checksum_too_far();
	test_gso();
	test_joined();
	test_own_addresses_only();
	test_everybody_is_judged();
	test_changed_meanwhile();
	test_isolated();
	test_link_off();
	test_host_port();
	test_announcement();
	test_contradictions();
	puts("ok");
	return 0;
}
