// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: a guest's transmit ring.
 *
 * The input is a configuration (features, ring size, where the indices begin) and then a list of actions of the hostile
 * guest: descriptors and indirect tables field by field, avail entries, whole frames laid out well, raw bytes, and turns
 * of the worker in between. Frames go to both other guests, to everyone and to the NIC, if its policy lets them, which is
 * part of the configuration. See fuzz.h for what must hold.
 */
#include "fuzz.h"

/* TCP from 10.0.0.2; a neighbour solicitation from fd00::2, behind options, cut off. */
static const uint8_t ip_headers[2][44] = {
	{8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1, 0xd4, 0x31, 0, 80},
	{0x86, 0xdd, 0x60, 0, 0, 0, 0, 40, 60, 255, 0xfd, [25] = 2, 0xff, 2, [41] = 1, 58, 0},
};

/* A frame with a header, well laid out; the fuzzer chooses where it goes, how long it is and what the header asks for. */
static void op_send(struct input *in)
{
	struct ring *r = &f.hostile.ring[TX];
	uint8_t to = in8(in), what = in8(in), bytes[HEADER + 64] = {0}, mac[6];
	uint64_t gpa = in_address(in), table = in_table(in);
	uint32_t len = in_length(in) % 70000u, step = in_step(in, len), header = r->vr->header_len;
	struct virtio_net_hdr hdr = {0};

	memcpy(mac, hostile_mac, 6);
	mac[5] = to & 7;
	if (to & 8)
		memset(mac, 0xff, 6);
	make_frame(bytes + header, 64, mac, hostile_mac, to);
	if (to & 16)
		memcpy(bytes + header + 12, "\x81\x00\x00\x05\x81\x00\x00\x06\x08\x00", 10);
	if (to & 32)
		bytes[header + 11] = in8(in);
	if (to & 64) /* headers that the guard of IP addresses reads */
		memcpy(bytes + header + (to & 16 ? 16 : 12), ip_headers[to >> 7], sizeof(ip_headers[0]));
	if (what & 16)
		bytes[header + 12 + in8(in) % 52] = in8(in);
	if (what & 1) {
		hdr.flags = (uint8_t)(what >> 1 & 3);
		hdr.csum_start = in16(in);
		hdr.csum_offset = in8(in);
		hdr.gso_type = what & 8 ? in8(in) : 0;
		hdr.gso_size = what & 8 ? in16(in) : 0;
	}
	memcpy(bytes, &hdr, sizeof(hdr));
	hostile_write(gpa, bytes, MIN(header + 64, len));
	offer_chain(r, gpa, len, step, table, what & 0x80 && what & 0x40 ? VRING_DESC_F_WRITE : 0);
}

/* A TCP or UDP frame that asks for segmentation, its headers right but for what the fuzzer changes. */
static void op_gso(struct input *in)
{
	struct ring *r = &f.hostile.ring[TX];
	uint64_t gpa = in_address(in), table = in_table(in);
	uint8_t how = in8(in), wrong = in8(in), bytes[HEADER + 74] = {0}, *ip = bytes + r->vr->header_len + ETH_HEADER;
	const bool ipv6 = how & 0x80, udp = how & 0x40;
	const uint32_t length = in16(in), size = in16(in), ip_header = ipv6 ? 40 : 20;
	const uint32_t total = r->vr->header_len + ETH_HEADER + ip_header + length;
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = how & 7, .gso_size = (uint16_t)size,
				     .csum_start = (uint16_t)(ETH_HEADER + ip_header), .csum_offset = udp ? 6 : 16};

	make_frame(ip - ETH_HEADER, ETH_HEADER, how & 0x20 ? nobody : f.peer[how >> 3 & 1].mac, hostile_mac, 0);
	ip[-2] = ipv6 ? 0x86 : 0x08;
	ip[-1] = ipv6 ? 0xdd : 0x00;
	ip[0] = ipv6 ? 0x60 : 0x45;
	ip[ipv6 ? 4 : 2] = (uint8_t)((length + (ipv6 ? 0 : 20)) >> 8);
	ip[ipv6 ? 5 : 3] = (uint8_t)(length + (ipv6 ? 0 : 20));
	ip[ipv6 ? 6 : 9] = udp ? 17 : 6;
	ip[ip_header + (udp ? 4 : 12)] = udp ? (uint8_t)(length >> 8) : 0x50;
	if (udp)
		ip[ip_header + 5] = (uint8_t)length;
	memcpy(bytes, &hdr, sizeof(hdr));
	if (wrong & 0x80)
		bytes[wrong % sizeof(bytes)] = in8(in);
	hostile_write(gpa, bytes, sizeof(bytes));
	offer_chain(r, gpa, total, in_step(in, total), table, 0);
}

static void act(struct input *in)
{
	struct ring *r = &f.hostile.ring[TX];
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
	case 6:
		op_send(in);
		break;
	case 7:
		op_gso(in);
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

	f.hostile.policy = in_policy(how & 0x40 ? in8(&in) : 0);
	hostile_start(features, 1u << how % 8, in16(&in), how & 0x80);
	while (in.left)
		act(&in);
	hostile_stop();
	return 0;
}
