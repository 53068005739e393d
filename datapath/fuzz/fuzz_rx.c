// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: a guest's receive ring, with and without mergeable buffers.
 *
 * The hostile guest lays out receive buffers; the NIC and both other guests send it frames of any length they may have,
 * some of which need their checksum finished, and the NIC's may come in pieces, whole or not. Senders wait for its buffers (with patience) or do not. Turns in between.
 * In isolated inputs the used lengths must add up to what the counters say was delivered; see fuzz.h for the rest.
 */
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

static void op_frame(struct input *in)
{
	uint8_t frame[PEER_STRIDE], how = in8(in), n = in8(in) % 40;
	uint32_t len = 14 + in16(in) % (PEER_STRIDE - HEADER - 14 + 1);
	struct virtio_net_hdr hdr = {0};

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
