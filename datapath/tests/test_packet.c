// SPDX-License-Identifier: Apache-2.0
/* Frames for one guest by a packet socket, for which a datagram socket stands: whole, cut, waiting, and refused. */
#include <sys/socket.h>
#include <unistd.h>

#include "frames.h"

#define TAKES_GSO                                                                                 \
	(FEATURES | 1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_NET_F_GUEST_CSUM |           \
	 1ull << VIRTIO_NET_F_GUEST_TSO4)
#define MSS 1400u

static struct world w;
static struct built f;
static struct xv_packet *packet;
static int theirs;
static uint8_t got[70000];

static void begin(uint64_t features, uint32_t num)
{
	const int size = 1 << 20;
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
	CHECK_EQ(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)), 0);
	CHECK_EQ(xv_packet_new(pair[0], &packet), 0);
	theirs = pair[1];
	world_init(&w, 1, features, num, 0);
	w.packet = packet;
	world_publish(&w);
	build(&f, &(struct spec){4, IPPROTO_TCP, 0, 0, 5000}, w.guests[0].mac, b_mac);
}

static void end(void)
{
	world_free(&w);
	close(packet->rx.fd);
	close(theirs);
	xv_packet_free(packet);
}

static struct virtio_net_hdr header_of(uint8_t gso_type)
{
	return (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = gso_type,
				       .gso_size = gso_type ? MSS : 0, .csum_start = (uint16_t)f.transport,
				       .csum_offset = (uint16_t)f.field};
}

static void arrive(const struct virtio_net_hdr *hdr, uint32_t len)
{
	struct iovec iov[2] = {{(void *)(uintptr_t)hdr, sizeof(*hdr)}, {f.bytes, len}};
	const struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};

	CHECK_EQ(sendmsg(theirs, &msg, 0), sizeof(*hdr) + len);
}

static void post(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		ring_buffer(&w.guests[0], &w.guests[0].ring[0], 1536, VRING_DESC_F_WRITE);
}

/* The next frame's bytes are in `got`; its header, or num_buffers 0 when there is none. */
static struct virtio_net_hdr_mrg_rxbuf take(uint32_t *len)
{
	struct virtio_net_hdr_mrg_rxbuf hdr = {.num_buffers = 1};
	struct driver *d = &w.guests[0];

	*len = 0;
	for (uint32_t i = 0; i < hdr.num_buffers; i++) {
		uint32_t bytes, skip = i ? 0 : HEADER;
		int head = ring_reap(&d->ring[0], &bytes);
		const uint8_t *at;

		if (head < 0)
			return (struct virtio_net_hdr_mrg_rxbuf){0};
		at = d->memory + (d->ring[0].desc[head].addr - GPA);
		if (!i)
			memcpy(&hdr, at, sizeof(hdr));
		memcpy(got + *len, at + skip, bytes - skip);
		*len += bytes - skip;
	}
	return hdr;
}

static void test_whole(void)
{
	const struct virtio_net_hdr hdr = {0};
	struct virtio_net_hdr_mrg_rxbuf out;
	struct virtio_net_hdr gso;
	uint32_t len;

	begin(TAKES_GSO, 64);
	gso = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	post(32);
	arrive(&gso, f.len);
	arrive(&hdr, 60);
	world_run(&w);
	out = take(&len);
	CHECK_EQ(len, f.len);
	CHECK(!memcmp(got, f.bytes, len));
	CHECK_EQ(out.num_buffers, 4);
	CHECK_EQ(out.hdr.gso_type, VIRTIO_NET_HDR_GSO_TCPV4);
	CHECK_EQ(out.hdr.gso_size, MSS);
	CHECK_EQ(out.hdr.hdr_len, f.len - 5000);
	CHECK_EQ(out.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
	CHECK_EQ(take(&len).num_buffers, 1);
	CHECK_EQ(len, 60);
	CHECK_EQ(packet->counters.packets, 2);
	CHECK_EQ(packet->counters.bytes, f.len + 60);
	CHECK_EQ(w.guests[0].guest->queues[0].rx.copied_bytes, f.len + 60);
	end();
}

/* After one large frame the next are received straight into the guest's buffers; small ones and bad ones are not. */
static void test_straight(void)
{
	const struct virtio_net_hdr plain = {0};
	struct virtio_net_hdr gso, bad;
	uint32_t len, seen = 0;

	begin(TAKES_GSO, 64);
	gso = bad = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	bad.csum_start += 2;
	post(3); /* too few for a frame: it waits */
	for (uint8_t i = 0; i < 10; i++) {
		f.bytes[f.transport + 4] = i; /* in the sequence number */
		arrive(&gso, f.len);
		arrive(i % 3 ? &plain : &bad, i % 3 ? 60 : f.len);
	}
	for (uint32_t turns = 0; seen < 10; turns++) {
		struct virtio_net_hdr_mrg_rxbuf out;

		CHECK(turns < 100);
		world_run(&w);
		while ((out = take(&len)).num_buffers) {
			if (len == 60)
				continue;
			CHECK_EQ(len, f.len);
			CHECK_EQ(out.hdr.gso_size, MSS);
			CHECK_EQ(got[f.transport + 4], seen++);
			CHECK(!memcmp(got + f.transport + 8, f.bytes + f.transport + 8, f.len - f.transport - 8));
		}
		post(2);
	}
	world_run(&w);
	CHECK_EQ(packet->counters.packets, 16);
	CHECK_EQ(packet->counters.dropped, 4);
	CHECK_EQ(w.guests[0].guest->queues[0].rx.drops[XV_DROP_NO_BUFFERS], 0);
	CHECK_EQ(w.guests[0].guest->queues[0].rx.copied_bytes, w.guests[0].guest->queues[0].rx.bytes);
	end();
}

static void test_cut(void)
{
	struct virtio_net_hdr gso;
	uint32_t len, payload = 0;

	begin(FEATURES, 64);
	gso = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	post(32);
	arrive(&gso, f.len);
	world_run(&w);
	for (int i = 0; i < 4; i++) {
		CHECK_EQ(take(&len).hdr.gso_type, 0);
		CHECK_EQ(csum_fold(plain_sum(got + f.transport, len - f.transport) +
				   net_pseudo_sum(&(struct net_headers){.protocol = IPPROTO_TCP,
									.addresses = csum_load32(got + 26) + csum_load32(got + 30)},
						  len - f.transport)), 0xffff);
		payload += len - f.transport - 20;
	}
	CHECK_EQ(payload, 5000);
	end();
}

/* Without buffers frames wait, and none is lost or overtaken. */
static void test_waits(void)
{
	const struct virtio_net_hdr hdr = {0};
	uint32_t len, next = 0;

	begin(FEATURES, 64);
	post(3);
	for (uint8_t i = 0; i < 50; i++) {
		f.bytes[40] = i;
		arrive(&hdr, 60);
	}
	while (next < 50) {
		world_run(&w);
		for (uint32_t before = next; take(&len).num_buffers; next++)
			CHECK(got[40] == next && next < before + 3);
		post(3);
	}
	CHECK_EQ(w.guests[0].guest->queues[0].rx.drops[XV_DROP_NO_BUFFERS], 0);
	end();
}

/* A header that is not the frame's own, a runt, an over-long one: each costs only itself. */
static void test_refused(void)
{
	const struct virtio_net_hdr plain = {0};
	struct virtio_net_hdr hdr;
	uint32_t len;

	begin(TAKES_GSO, 64);
	post(32);
	for (int i = 0; i < 6; i++) {
		hdr = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
		len = f.len;
		switch (i) {
		case 0: hdr.gso_type = VIRTIO_NET_HDR_GSO_TCPV6; break;
		case 1: hdr.csum_start += 2; break;
		case 2: hdr.gso_size = 8; break;
		case 3: len -= 7; break; /* the IP packet is longer */
		case 4: len = 9; break;
		case 5: hdr.flags = 0; break;
		}
		arrive(&hdr, len);
	}
	arrive(&plain, sizeof(f.bytes));
	arrive(&plain, 60);
	world_run(&w);
	CHECK_EQ(packet->counters.dropped, 7);
	CHECK_EQ(take(&len).num_buffers, 1);
	CHECK_EQ(len, 60);
	end();
}

int main(void)
{
	test_whole();
	test_straight();
	test_cut();
	test_waits();
	test_refused();
	puts("ok");
	return 0;
}
