// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: headers of frames.
 *
 * The input is a frame, and how it is cut in pieces. Four things are done with it:
 *   - net_find_partial() reads it in a malloc() of exactly its length;
 *   - the NIC receives it for a guest, who must get these bytes: as they are and marked, or with the checksum finished;
 *   - the guest sends it, with a virtio-net header from the input as well, and the same must leave on the NIC;
 *   - a tap gives it with that header, which may make it a GSO frame: what is viewed agrees with its headers, or is dropped.
 * A checksum is compared with that of a plain loop over 16-bit words, so pieces of odd length are tried too.
 */
#include <sys/socket.h>

#include "fuzz.h"

#define DATA (RINGS * PARTS + 2)

/* What a checksum over frame[start, len) must be, by RFC 1071 and in bytes of the network's order. */
static void finish(uint8_t *frame, uint32_t len, uint32_t start, uint32_t offset)
{
	uint32_t sum = 0;

	for (uint32_t i = start; i < len; i++)
		sum += (i - start) & 1 ? frame[i] : (uint32_t)frame[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	sum = ~sum & 0xffff;
	if (!sum)
		sum = 0xffff;
	frame[start + offset] = (uint8_t)(sum >> 8);
	frame[start + offset + 1] = (uint8_t)sum;
}

static void find_partial(const uint8_t *frame, uint32_t len, struct xv_view *view)
{
	uint8_t *exact = malloc(len ? len : 1);

	CHECK(exact);
	memcpy(exact, frame, len);
	*view = (struct xv_view){.first = {len ? exact : exact + 1, len}, .len = len};
	net_find_partial(view);
	free(exact);
	CHECK(!(view->flags & ~VIEW_NEEDS_CSUM));
	if (view->flags) {
		CHECK(view->csum_start >= ETH_HEADER + 20 && view->csum_start + view->csum_offset + 2u <= len);
		CHECK(view->csum_offset == 6 || view->csum_offset == 16);
	}
}

static void receive(const uint8_t *frame, uint32_t len, uint32_t step, const struct xv_view *found)
{
	struct hostile *h = &f.hostile;
	const uint32_t header = h->ring[RX].vr->header_len;
	const bool marked = found->flags && h->features & BIT(VIRTIO_NET_F_GUEST_CSUM);
	const uint8_t *got = (const uint8_t *)(uintptr_t)h->regions[DATA].host + 1;
	struct virtio_net_hdr hdr;
	uint8_t expected[CHUNK];

	offer_chain(&h->ring[RX], data_at[2].gpa + 1, header + len, MAX(step, (header + len) / 250 + 1),
		    data_at[2].gpa + 60000, VRING_DESC_F_WRITE);
	CHECK(nic_receive(&f.nic, frame, len));
	settle();
	CHECK_EQ(h->guest->queues[0].rx.packets, 1);
	memcpy(expected, frame, len);
	if (found->flags && !marked)
		finish(expected, len, found->csum_start, found->csum_offset);
	CHECK(!memcmp(got + header, expected, len));
	memcpy(&hdr, got, sizeof(hdr));
	CHECK_EQ(hdr.flags, marked ? VIRTIO_NET_HDR_F_NEEDS_CSUM : 0);
	CHECK_EQ(hdr.gso_type, VIRTIO_NET_HDR_GSO_NONE);
	CHECK(!marked || (hdr.csum_start == found->csum_start && hdr.csum_offset == found->csum_offset));
	if (header == HEADER)
		CHECK(got[10] == 1 && got[11] == 0);
}

static void send_it(uint8_t *frame, uint32_t len, uint32_t step, const struct virtio_net_hdr *hdr)
{
	struct hostile *h = &f.hostile;
	const uint32_t header = h->ring[TX].vr->header_len;
	uint32_t most = 1514;
	bool fine = true;

	memcpy(frame, nobody, 6);
	hostile_write(data_at[2].gpa + 1, (uint8_t[HEADER]){0}, HEADER);
	hostile_write(data_at[2].gpa + 1, hdr, sizeof(*hdr));
	hostile_write(data_at[2].gpa + 1 + header, frame, len);
	offer_chain(&h->ring[TX], data_at[2].gpa + 1, header + len, MAX(step, (header + len) / 250 + 1),
		    data_at[2].gpa + 60000, 0);
	settle();
	if (hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM || hdr->gso_type) {
		fine = h->features & BIT(VIRTIO_NET_F_CSUM) && !hdr->gso_type && hdr->csum_start >= ETH_HEADER &&
		       (uint32_t)hdr->csum_start + hdr->csum_offset + 2 <= len;
		if (fine)
			finish(frame, len, hdr->csum_start, hdr->csum_offset);
	}
	for (uint32_t at = 12; at <= 16 && at + 2 <= len && net_is_tag(frame + at); at += 4)
		most += 4;
	CHECK_EQ(f.nr_sent, fine && len <= most);
	if (f.nr_sent) {
		CHECK_EQ(f.sent_len, len);
		CHECK(!memcmp(f.sent, frame, len));
	}
}

/* What a tap says of a frame is believed only as far as the frame's own headers agree. */
static void from_tap(const uint8_t *frame, uint32_t len, struct virtio_net_hdr hdr, uint32_t header_len, uint16_t gso_size)
{
	static struct xv_burst burst;
	static struct gso_room room;
	static struct xv_tapq *tap;
	static int theirs;
	struct net_header whole = {.mrg.hdr = hdr};
	const struct iovec iov[2] = {{&whole, header_len}, {(void *)(uintptr_t)frame, len}};
	uint32_t payload = 0, n;
	struct gso_cut cut;

	if (!tap) {
		struct xv_tapq_conf conf = {.header_len = 12};
		int pair[2];

		CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, pair), 0);
		conf.fd = pair[0];
		theirs = pair[1];
		CHECK_EQ(xv_tapq_new(&conf, &tap), 0);
	}
	tap->header_len = header_len;
	whole.mrg.hdr.gso_size = gso_size;
	CHECK_EQ(writev(theirs, iov, 2), header_len + len);
	tap_rx_burst(tap, &burst);
	tap_rx_release(tap, burst.nr);
	if (!burst.nr)
		return;
	CHECK(burst.nr == 1 && len >= ETH_HEADER && burst.views[0].len == len);
	CHECK(!memcmp(burst.views[0].first.data, frame, len));
	if (!burst.views[0].gso_type)
		return;
	CHECK(burst.views[0].gso && burst.views[0].gso->len < len && gso_size >= GSO_SIZE_LEAST);
	gso_cut_init(&cut, &burst.views[0]);
	while ((n = gso_cut_next(&cut, &room)))
		for (uint32_t i = 0; i < n; i++)
			payload += room.list[i]->len - burst.views[0].gso->len;
	CHECK_EQ(payload, len - burst.views[0].gso->len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	uint8_t how = in8(&in), frame[CHUNK];
	uint32_t step = in8(&in) + 1u, len;
	struct virtio_net_hdr hdr = {.flags = in8(&in), .gso_type = how & 16 ? in8(&in) : 0};
	struct xv_view found;

	hdr.csum_start = in16(&in);
	hdr.csum_offset = in8(&in);
	len = (uint32_t)MIN(in.left, (size_t)CHUNK - 256);
	memcpy(frame, in.at, len);
	find_partial(frame, len, &found);
	from_tap(frame, len, hdr, how & 8 ? 12 : 10, (uint16_t)(step * 8));
	if (len < ETH_HEADER)
		return 0; /* the kernel gives nothing shorter, and takes nothing shorter from us */
	hostile_start(BIT(VIRTIO_RING_F_INDIRECT_DESC) | (how & 1 ? BIT(VIRTIO_F_VERSION_1) : 0) |
			      (how & 2 ? BIT(VIRTIO_NET_F_GUEST_CSUM) : 0) | (how & 4 ? BIT(VIRTIO_NET_F_CSUM) : 0) |
			      (how & 8 ? BIT(VIRTIO_NET_F_MRG_RXBUF) : 0),
		      256, 0, true);
	receive(frame, len, step, &found);
	send_it(frame, len, step, &hdr);
	hostile_stop();
	return 0;
}
