// SPDX-License-Identifier: Apache-2.0
/*
 * What a NIC has for its host port: by an AF_XDP socket, and by a packet socket. Datagram sockets stand for the tap and
 * for the packet socket. What guests have for it, and what it sends, is the switch's (test_switch.c).
 */
#include <errno.h>
#include <sys/socket.h>

#include "frames.h"

#define MSS 1400u
#define COUNT 23u

static struct world w;
static struct built f;
static struct xv_tapq *host;
static struct xv_packet *packet;
static int tap_end, packet_end;
static uint8_t got[70000];
static struct virtio_net_hdr_mrg_rxbuf got_header;

static int pair_of(int size, int *theirs)
{
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)), 0);
	*theirs = pair[1];
	return pair[0];
}

static void publish(uint32_t nic_flags, uint32_t workers, uint32_t mtu)
{
	world_init_mixed(&w, 1, (uint64_t[]){FEATURES}, 64, nic_flags, workers);
	w.host = host;
	w.packet = packet;
	w.host_gets = true;
	w.mtu = mtu;
	world_publish(&w);
}

/* `room`: bytes that the tap takes before it is full. */
static void begin(uint32_t gso, int room, uint32_t workers)
{
	struct xv_tapq_conf conf = {.header_len = sizeof(got_header), .gso = gso};

	conf.fd = pair_of(room, &tap_end);
	CHECK_EQ(xv_tapq_new(&conf, &host), 0);
	CHECK_EQ(xv_packet_new(pair_of(1 << 20, &packet_end), &packet), 0);
	publish(0, workers, 1500);
	build(&f, &(struct spec){4, IPPROTO_TCP, 0, 0, 5000}, host_mac, b_mac);
}

static void end(void)
{
	const int fds[] = {host->rx.fd, packet->rx.fd, tap_end, packet_end};

	world_free(&w);
	xv_tapq_free(host);
	xv_packet_free(packet);
	for (uint32_t i = 0; i < ARRAY_SIZE(fds); i++)
		close(fds[i]);
}

/* The next frame that the tap was given is in `got`: its length, 0 when there is none. */
static uint32_t taken(void)
{
	struct iovec iov[2] = {{&got_header, sizeof(got_header)}, {got, sizeof(got)}};
	ssize_t len = readv(tap_end, iov, 2);

	return len < 0 ? 0 : (uint32_t)len - (uint32_t)sizeof(got_header);
}

static void test_in_order(void)
{
	uint8_t frame[1514];

	begin(0, 1 << 20, 1);
	for (uint32_t i = 0; i < COUNT; i++) {
		make_frame(frame, 60 + i, host_mac, b_mac, (uint8_t)i);
		CHECK(nic_receive(&w.nic, frame, 60 + i));
	}
	world_run(&w);
	for (uint32_t i = 0; i < COUNT; i++) {
		make_frame(frame, 60 + i, host_mac, b_mac, (uint8_t)i);
		CHECK_EQ(taken(), 60 + i);
		CHECK(!memcmp(got, frame, 60 + i));
		CHECK_EQ(got_header.hdr.flags, 0);
	}
	CHECK_EQ(taken(), 0);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES); /* every frame is the kernel's again */
	CHECK_EQ(host->counters.tx_packets, COUNT);
	CHECK_EQ(host->counters.tx_dropped, 0);
	CHECK_EQ(w.nic.xsk->counters.packets, COUNT);
	CHECK_EQ(w.dp->workers[0].counters.packets, COUNT);
	end();
}

/* Several pieces are one frame; a larger one than the device's MTU allows is dropped and counted, the next one comes. */
static void test_large(void)
{
	static uint8_t frame[6000];

	begin(0, 1 << 20, 1);
	world_free(&w);
	publish(XV_NICQ_SG, 1, 5000);
	for (uint32_t len = 5000; len <= 6000; len += 500) {
		make_frame(frame, len, host_mac, b_mac, 1);
		CHECK(nic_receive(&w.nic, frame, len));
	}
	make_frame(frame, 100, host_mac, b_mac, 2);
	CHECK(nic_receive(&w.nic, frame, 100));
	world_run(&w);
	CHECK_EQ(taken(), 5000);
	CHECK_EQ(taken(), 100);
	CHECK(!memcmp(got, frame, 100));
	CHECK_EQ(taken(), 0);
	CHECK_EQ(host->counters.tx_dropped, 2);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	end();
}

/* A host that doesn't read loses its own frames, and nobody waits for it. */
static void test_full(void)
{
	uint8_t frame[1514];
	uint32_t frames = 0;

	begin(0, 1 << 12, 1);
	for (uint32_t i = 0; i < FRAMES; i++) {
		make_frame(frame, sizeof(frame), host_mac, b_mac, (uint8_t)i);
		CHECK(nic_receive(&w.nic, frame, sizeof(frame)));
	}
	world_run(&w);
	while (taken())
		frames++;
	CHECK(frames > 0);
	CHECK_EQ(host->counters.tx_packets, frames);
	CHECK_EQ(host->counters.tx_dropped, FRAMES - frames);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	end();
}

static void arrive(const struct virtio_net_hdr *hdr, uint32_t len)
{
	struct iovec iov[2] = {{(void *)(uintptr_t)hdr, sizeof(*hdr)}, {f.bytes, len}};

	CHECK_EQ(writev(packet_end, iov, 2), sizeof(*hdr) + len);
}

/* Without XDP a local stack's frames stand for many: whole where the tap takes them, else cut. */
static void test_packet_socket(uint32_t gso)
{
	const struct virtio_net_hdr plain = {0};
	struct virtio_net_hdr many;
	uint32_t frames = 0, bytes = 0, len;

	begin(gso, 1 << 20, 1);
	many = (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
				       .gso_size = MSS, .csum_start = (uint16_t)f.transport,
				       .csum_offset = (uint16_t)f.field};
	arrive(&many, f.len);
	arrive(&plain, 60);
	world_run(&w);
	while ((len = taken())) {
		frames++;
		bytes += len;
	}
	CHECK_EQ(frames, gso ? 2 : 5);
	CHECK_EQ(bytes, gso ? f.len + 60 : 5000 + 4 * (f.len - 5000) + 60);
	CHECK_EQ(host->counters.tx_gso_packets, gso ? 1 : 0);
	CHECK_EQ(packet->counters.packets, 2);
	CHECK_EQ(host->counters.tx_dropped, 0);
	end();
}

/* Its socket of queue i is worker (nic + i)'s, as its tap is worker `nic`'s. */
static void test_workers(void)
{
	begin(0, 1 << 20, 2);
	CHECK_EQ(w.dp->snap->duties[0].nr_xsk, 1);
	CHECK_EQ(w.dp->snap->duties[0].nr_tap, 1);
	CHECK_EQ(w.dp->snap->duties[0].nr_packet, 1);
	CHECK_EQ(w.dp->snap->duties[1].nr_xsk + w.dp->snap->duties[1].nr_tap, 0);
	end();
}

static void test_refused(void)
{
	struct xv_nicq *none[1];
	struct xv_xsk *xsks[1];
	struct xv_nic_conf nic = {.queues = (uintptr_t)none, .mtu = 1500, .nr_host_xsks = 1, .host_xsks = (uintptr_t)xsks};
	const struct xv_snapshot_conf conf = {.nics = (uintptr_t)&nic, .nr_nics = 1};

	begin(0, 1 << 20, 1);
	xsks[0] = w.nic.xsk;
	CHECK_EQ(xv_publish(w.dp, &conf), -EINVAL); /* frames for a port that there is not */
	nic.nr_host_xsks = 0;
	nic.host_packet = (uintptr_t)packet;
	CHECK_EQ(xv_publish(w.dp, &conf), -EINVAL);
	end();
}

int main(void)
{
	test_in_order();
	test_large();
	test_full();
	test_packet_socket(0);
	test_packet_socket(XV_NICQ_GSO_TCP4);
	test_workers();
	test_refused();
	puts("ok");
	return 0;
}
