// SPDX-License-Identifier: Apache-2.0
/*
 * A tap as the way to the network, for which a datagram socket stands: what it gives, what it takes, and what it refuses.
 * A real one is in tests/veth/test_tap_port.py.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "frames.h"

#define BIT(n) (1ull << (n))
#define SENDS_GSO (FEATURES | BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4))
#define TAKES_GSO (FEATURES | BIT(VIRTIO_NET_F_MRG_RXBUF) | BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4))
#define MSS 1400u
#define TX(i) (w.guests[i].guest->queues[0].tx)
#define RX(i) (w.guests[i].guest->queues[0].rx)

static struct world w;
static struct built f;
static struct xv_tapq *tap;
static uint32_t header_len;
static int theirs;
static uint8_t got[70000];
static struct virtio_net_hdr_mrg_rxbuf got_header;

static void begin(uint32_t nr_guests, uint64_t features, uint32_t header, uint32_t gso)
{
	const int size = 4 << 20;
	struct xv_tapq_conf conf = {.header_len = header, .gso = gso, .queue = 3};
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)), 0);
	conf.fd = pair[0];
	theirs = pair[1];
	CHECK_EQ(xv_tapq_new(&conf, &tap), 0);
	header_len = header;
	world_init(&w, nr_guests, features, 64, 0);
	w.tap = tap;
	world_publish(&w);
	build(&f, &(struct spec){4, IPPROTO_TCP, 0, 0, 5000}, w.guests[0].mac, b_mac);
}

static void end(void)
{
	const int fd = tap->rx.fd;

	world_free(&w);
	xv_tapq_free(tap);
	close(fd);
	close(theirs);
}

static struct virtio_net_hdr header_of(uint8_t gso_type)
{
	return (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = gso_type,
				       .gso_size = gso_type ? MSS : 0, .csum_start = (uint16_t)f.transport,
				       .csum_offset = (uint16_t)f.field};
}

/* The tap gives a frame. */
static void arrive(const struct virtio_net_hdr *hdr, const uint8_t *bytes, uint32_t len)
{
	struct virtio_net_hdr_mrg_rxbuf whole = {.hdr = *hdr};
	struct iovec iov[2] = {{&whole, header_len}, {(void *)(uintptr_t)bytes, len}};

	CHECK_EQ(writev(theirs, iov, 2), header_len + len);
}

/* The frame that the tap was given next: its bytes in `got`, their number, 0 when there is none. */
static uint32_t leaves(void)
{
	struct iovec iov[2] = {{&got_header, header_len}, {got, sizeof(got)}};
	ssize_t len;

	memset(&got_header, 0, sizeof(got_header));
	len = readv(theirs, iov, 2);
	if (len < 0)
		return 0;
	CHECK(len > header_len);
	return (uint32_t)(len - header_len);
}

static void post(uint32_t guest, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		ring_buffer(&w.guests[guest], &w.guests[guest].ring[0], 1536, VRING_DESC_F_WRITE);
}

/* The guest's next frame is in `got`, with its header; 0: there is none. */
static uint32_t take(uint32_t guest)
{
	struct driver *d = &w.guests[guest];
	uint32_t len = 0;

	got_header.num_buffers = 1;
	for (uint32_t i = 0; i < got_header.num_buffers; i++) {
		uint32_t bytes, skip = i ? 0 : HEADER;
		int head = ring_reap(&d->ring[0], &bytes);
		const uint8_t *at;

		if (head < 0)
			return 0;
		at = d->memory + (d->ring[0].desc[head].addr - GPA);
		if (!i)
			memcpy(&got_header, at, sizeof(got_header));
		memcpy(got + len, at + skip, bytes - skip);
		len += bytes - skip;
	}
	return len;
}

/* The guest sends, in pieces of `piece` bytes. */
static void send_it(uint32_t guest, const struct virtio_net_hdr *hdr, const uint8_t *bytes, uint32_t len, uint32_t piece)
{
	struct driver *d = &w.guests[guest];
	struct ring *r = &d->ring[1];
	uint64_t at = driver_alloc(d, HEADER + len, 16);
	uint16_t head = (uint16_t)(r->next % r->num);

	memset(d->memory + at, 0, HEADER);
	memcpy(d->memory + at, hdr, sizeof(*hdr));
	memcpy(d->memory + at + HEADER, bytes, len);
	for (uint32_t done = 0; done < HEADER + len; done += piece) {
		uint16_t i = (uint16_t)(r->next++ % r->num);
		uint32_t left = HEADER + len - done;

		ring_desc(r, i, GPA + at + done, MIN(piece, left), 0, left > piece ? (int)((i + 1) % r->num) : -1);
	}
	ring_offer(r, head);
}

/* ---- from the tap ---- */

static void test_to_guests(uint32_t header)
{
	static const uint8_t everybody[6] = {255, 255, 255, 255, 255, 255}, group[6] = {1, 0, 94, 0, 0, 1};
	const struct virtio_net_hdr plain = {0};
	uint8_t frame[60];

	begin(2, FEATURES, header, 0);
	post(0, 40);
	post(1, 40);
	for (int i = 0; i < 23; i++) {
		make_frame(frame, 60, w.guests[i & 1].mac, b_mac, (uint8_t)i);
		arrive(&plain, frame, 60);
	}
	make_frame(frame, 60, everybody, b_mac, 23);
	arrive(&plain, frame, 60);
	make_frame(frame, 60, group, b_mac, 24);
	arrive(&plain, frame, 60);
	make_frame(frame, 60, b_mac, a_mac, 25); /* a bridge floods what it doesn't know */
	arrive(&plain, frame, 60);
	world_run(&w);
	for (int i = 0; i < 25; i++)
		for (uint32_t guest = 0; guest < 2; guest++) {
			const uint8_t *to = i == 24 ? group : i == 23 ? everybody : w.guests[i & 1].mac;

			if (i < 23 && (uint32_t)(i & 1) != guest)
				continue;
			CHECK_EQ(take(guest), 60);
			make_frame(frame, 60, to, b_mac, (uint8_t)i);
			CHECK(!memcmp(got, frame, 60));
			CHECK_EQ(got_header.hdr.flags, 0);
		}
	CHECK_EQ(take(0) + take(1), 0);
	CHECK_EQ(tap->counters.rx_packets, 26);
	CHECK_EQ(tap->counters.rx_bytes, 26 * 60);
	CHECK_EQ(tap->counters.rx_unclaimed, 1);
	CHECK_EQ(tap->counters.rx_dropped, 0);
	CHECK_EQ(RX(0).copied_bytes, RX(0).bytes);
	CHECK_EQ(leaves(), 0); /* nothing goes back where it came from */
	end();
}

static void test_gso_whole_and_cut(void)
{
	struct virtio_net_hdr gso;

	begin(1, TAKES_GSO, 12, 0);
	gso = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	post(0, 8);
	arrive(&gso, f.bytes, f.len);
	world_run(&w);
	CHECK_EQ(take(0), f.len);
	CHECK(!memcmp(got, f.bytes, f.len));
	CHECK_EQ(got_header.num_buffers, 4);
	CHECK_EQ(got_header.hdr.gso_type, VIRTIO_NET_HDR_GSO_TCPV4);
	CHECK_EQ(got_header.hdr.gso_size, MSS);
	CHECK_EQ(got_header.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
	CHECK_EQ(RX(0).copied_bytes, f.len);
	end();

	begin(1, FEATURES, 12, 0);
	gso = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	post(0, 8);
	arrive(&gso, f.bytes, f.len);
	world_run(&w);
	for (uint32_t i = 0, len, payload = 0; i < 4; i++) {
		len = take(0);
		payload += len - f.transport - 20;
		CHECK_EQ(got_header.hdr.flags | got_header.hdr.gso_type, 0); /* the checksum is finished, too */
		CHECK(i < 3 || payload == 5000);
	}
	CHECK_EQ(RX(0).csum_finished, 4);
	end();
}

/* A single guest's frames wait for it; none is lost or overtaken. */
static void test_waits(void)
{
	const struct virtio_net_hdr plain = {0};
	uint32_t next = 0;

	begin(1, FEATURES, 12, 0);
	post(0, 3);
	for (uint8_t i = 0; i < 50; i++) {
		f.bytes[40] = i;
		arrive(&plain, f.bytes, 60);
	}
	while (next < 50) {
		world_run(&w);
		for (uint32_t before = next; take(0); next++)
			CHECK(got[40] == next && next < before + 3);
		post(0, 3);
	}
	CHECK_EQ(RX(0).drops[XV_DROP_NO_BUFFERS], 0);
	end();
}

/* One of two guests has stopped to read: the other one gets its frames, after a bounded wait. */
static void test_stalled_guest_is_bounded(void)
{
	const struct virtio_net_hdr plain = {0};
	uint8_t frame[60];
	uint64_t begun;

	begin(2, FEATURES, 12, 0);
	post(1, 40);
	for (int i = 0; i < 23; i++) {
		make_frame(frame, 60, w.guests[0].mac, b_mac, 0);
		arrive(&plain, frame, 60);
		make_frame(frame, 60, w.guests[1].mac, b_mac, (uint8_t)i);
		arrive(&plain, frame, 60);
	}
	begun = cycles_now();
	while (RX(1).packets < 23) {
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		CHECK(cycles_now() - begun < 5000000 * w.dp->cycles_per_us);
	}
	while (RX(0).drops[XV_DROP_NO_BUFFERS] < 23) {
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
		CHECK(cycles_now() - begun < 5000000 * w.dp->cycles_per_us);
	}
	CHECK_EQ(RX(1).drops[XV_DROP_NO_BUFFERS], 0);
	end();
}

/* A header that is not the frame's own, a runt, an over-long one: each costs only itself. */
static void test_refused(void)
{
	const struct virtio_net_hdr plain = {0};
	struct virtio_net_hdr hdr;
	uint32_t len;

	begin(1, TAKES_GSO, 12, 0);
	post(0, 8);
	for (int i = 0; i < 7; i++) {
		hdr = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
		len = f.len;
		switch (i) {
		case 0: hdr.gso_type = VIRTIO_NET_HDR_GSO_TCPV6; break;
		case 1: hdr.csum_start += 2; break;
		case 2: hdr.gso_size = 8; break;
		case 3: len -= 7; break; /* the IP packet is longer */
		case 4: len = 9; break;
		case 5: hdr.flags = 0; break;
		case 6: hdr.gso_type = VIRTIO_NET_HDR_GSO_NONE; hdr.csum_start = 6000; break;
		}
		arrive(&hdr, f.bytes, len);
	}
	arrive(&plain, f.bytes, sizeof(f.bytes)); /* more than there is room for */
	for (int i = 0; i < 40; i++) /* not even a header; more than a turn looks at */
		CHECK_EQ(write(theirs, &plain, 5), 5);
	arrive(&plain, f.bytes, 60);
	world_run(&w);
	CHECK_EQ(tap->counters.rx_dropped, 48);
	CHECK_EQ(take(0), 60);
	end();
}

/* ---- to the tap ---- */

static void test_from_guest(uint32_t header)
{
	const struct virtio_net_hdr plain = {0};
	uint8_t frame[300];

	begin(2, FEATURES, header, 0);
	for (uint32_t i = 0; i < 23; i++) {
		make_frame(frame, 60 + i, b_mac, w.guests[0].mac, (uint8_t)i);
		send_it(0, &plain, frame, 60 + i, i % 2 ? 4096 : 40);
	}
	make_frame(frame, 60, w.guests[1].mac, w.guests[0].mac, 99); /* not the tap's */
	post(1, 1);
	send_it(0, &plain, frame, 60, 4096);
	world_run(&w);
	for (uint32_t i = 0; i < 23; i++) {
		CHECK_EQ(leaves(), 60 + i);
		make_frame(frame, 60 + i, b_mac, w.guests[0].mac, (uint8_t)i);
		CHECK(!memcmp(got, frame, 60 + i));
		CHECK_EQ(got_header.hdr.flags | got_header.hdr.gso_type | got_header.num_buffers, 0);
	}
	CHECK_EQ(leaves(), 0);
	CHECK_EQ(take(1), 60);
	CHECK_EQ(TX(0).packets, 24);
	CHECK_EQ(tap->counters.tx_packets, 23);
	CHECK_EQ(tap->counters.tx_bytes, 23 * 60 + 22 * 23 / 2);
	end();
}

static void test_offloads_from_guest(void)
{
	struct virtio_net_hdr hdr;
	uint32_t payload = 0;

	begin(1, SENDS_GSO, 12, XV_NICQ_GSO_TCP4);
	memcpy(f.bytes, b_mac, 6);
	hdr = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	hdr.hdr_len = 9; /* what it says there is not believed */
	send_it(0, &hdr, f.bytes, f.len, 500);
	world_run(&w);
	CHECK_EQ(leaves(), f.len);
	CHECK(!memcmp(got + f.transport + 20, f.bytes + f.transport + 20, 5000));
	CHECK_EQ(got_header.hdr.gso_type, VIRTIO_NET_HDR_GSO_TCPV4);
	CHECK_EQ(got_header.hdr.gso_size, MSS);
	CHECK_EQ(got_header.hdr.hdr_len, f.transport + 20);
	CHECK_EQ(got_header.hdr.csum_start, f.transport);
	CHECK_EQ(tap->counters.tx_gso_packets, 1);
	CHECK_EQ(tap->counters.tx_gso_bytes, f.len);
	CHECK_EQ(tap->counters.tx_packets, 0);
	end();

	begin(1, SENDS_GSO, 12, 0); /* a tap that takes none: cut, and checksums left to it */
	memcpy(f.bytes, b_mac, 6);
	hdr = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	send_it(0, &hdr, f.bytes, f.len, 500);
	world_run(&w);
	for (uint32_t i = 0; i < 4; i++) {
		payload += leaves() - f.transport - 20;
		CHECK_EQ(got_header.hdr.gso_type, 0);
		CHECK_EQ(got_header.hdr.flags, VIRTIO_NET_HDR_F_NEEDS_CSUM);
		CHECK_EQ(got_header.hdr.csum_start, f.transport);
	}
	CHECK_EQ(payload, 5000);
	CHECK_EQ(tap->counters.tx_packets, 4);
	CHECK_EQ(tap->counters.tx_csum_partial, 4);
	end();
}

/* What is not one of its own headers' frames never reaches the kernel, and what the kernel refuses is counted. */
static void test_refused_from_guest(void)
{
	const struct virtio_net_hdr plain = {0};
	struct virtio_net_hdr hdr;
	uint8_t frame[2000];

	begin(1, SENDS_GSO, 12, XV_NICQ_GSO_TCP4);
	memcpy(f.bytes, b_mac, 6);
	hdr = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	hdr.csum_start += 2;
	send_it(0, &hdr, f.bytes, f.len, 8000);
	hdr = header_of(VIRTIO_NET_HDR_GSO_TCPV4);
	hdr.gso_size = 1600; /* its segments are too long for the device: cut, they are none the shorter */
	send_it(0, &hdr, f.bytes, f.len, 8000);
	make_frame(frame, sizeof(frame), b_mac, w.guests[0].mac, 1);
	send_it(0, &plain, frame, 1515, 4096);
	memcpy(frame + 12, (uint8_t[]){0x81, 0, 0, 7}, 4);
	send_it(0, &plain, frame, 1518, 4096); /* but a tag has room */
	send_it(0, &plain, frame, 1519, 4096);
	world_run(&w);
	CHECK_EQ(leaves(), 5000 - 3 * 1600 + f.transport + 20); /* the last one fits */
	CHECK_EQ(leaves(), 1518);
	CHECK_EQ(leaves(), 0);
	CHECK_EQ(TX(0).drops[XV_DROP_BAD_HEADER], 1);
	CHECK_EQ(TX(0).drops[XV_DROP_TOO_BIG], 3 + 2);
	end();
}

/* The other end takes no more: the worker goes on, and the guest's frames are dropped. */
static void test_full(void)
{
	const struct virtio_net_hdr plain = {0};
	const int size = 4096;
	uint8_t frame[1000];
	uint32_t sent = 0;

	begin(1, FEATURES, 12, 0);
	CHECK_EQ(setsockopt(tap->rx.fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)), 0);
	make_frame(frame, sizeof(frame), b_mac, w.guests[0].mac, 1);
	for (int i = 0; i < 53; i++)
		send_it(0, &plain, frame, sizeof(frame), 4096);
	world_run(&w);
	while (leaves())
		sent++;
	CHECK(sent && sent < 53);
	CHECK_EQ(tap->counters.tx_packets, sent);
	CHECK_EQ(TX(0).drops[XV_DROP_NO_FRAMES], 53 - sent);
	CHECK_EQ(TX(0).packets, 53);
	end();
}

/* Its memory is gone, which only the kernel noticed: that guest is given up, the other goes on. */
static void test_memory_gone(void)
{
	struct xv_region region;
	struct xv_view view;
	uint64_t drops[XV_DROP_MAX] = {0};
	const struct xv_view *views[1] = {&view};
	struct xv_mem *mem;
	uint8_t *p;
	int fd;

	begin(1, FEATURES, 12, 0);
	fd = memfd_create("guest", MFD_CLOEXEC);
	CHECK(fd >= 0 && !ftruncate(fd, 8192));
	p = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(p != MAP_FAILED);
	region = (struct xv_region){0, 8192, 0, (uint64_t)(uintptr_t)p};
	CHECK_EQ(xv_mem_new(&region, 1, w.guests[0].guest, &mem), 0);
	CHECK_EQ(ftruncate(fd, 4096), 0);
	view = (struct xv_view){.first = {p + 4000, 1000}, .len = 1000};
	CHECK_EQ(tap_tx_burst(tap, views, 1, 1514, drops), 0);
	CHECK_EQ(drops[XV_DROP_BAD_CHAIN], 1);
	CHECK_EQ(xv_guest_fault(w.guests[0].guest)->code, XV_FAULT_MEMORY_GONE);
	xv_mem_free(mem);
	munmap(p, 8192);
	close(fd);
	end();
}

/* A tap that was deleted says so to whoever uses it: it is noted once, and left alone. */
static void test_gone(void)
{
	const struct virtio_net_hdr plain = {0};
	uint8_t frame[60];
	int fd;

	begin(1, FEATURES, 12, 0);
	make_frame(frame, 60, b_mac, w.guests[0].mac, 1);
	fd = open("/dev/full", O_WRONLY | O_NONBLOCK); /* cannot be read */
	CHECK(fd >= 0 && dup2(fd, tap->rx.fd) == tap->rx.fd);
	close(fd);
	send_it(0, &plain, frame, 60, 4096);
	world_run(&w);
	CHECK_EQ(tap->counters.gone, EBADF);
	CHECK_EQ(TX(0).drops[XV_DROP_NO_FRAMES], 1); /* ENOSPC; a tap says EBADFD */
	end();
}

static void test_refused_descriptors(void)
{
	struct xv_tapq_conf conf = {.header_len = 12};
	struct xv_tapq *none = NULL;
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), 0);
	conf.fd = pair[0];
	CHECK_EQ(xv_tapq_new(&conf, &none), -EINVAL); /* it may block */
	CHECK_EQ(fcntl(pair[0], F_SETFL, O_NONBLOCK), 0);
	conf.header_len = 11;
	CHECK_EQ(xv_tapq_new(&conf, &none), -EINVAL);
	conf.fd = -1;
	CHECK_EQ(xv_tapq_new(&conf, &none), -EBADF);
	CHECK(!none);
	close(pair[0]);
	close(pair[1]);
}

int main(void)
{
	test_to_guests(12);
	test_to_guests(10);
	test_gso_whole_and_cut();
	test_waits();
	test_stalled_guest_is_bounded();
	test_refused();
	test_from_guest(12);
	test_from_guest(10);
	test_offloads_from_guest();
	test_refused_from_guest();
	test_full();
	test_memory_gone();
	test_gone();
	test_refused_descriptors();
	puts("ok");
	return 0;
}
