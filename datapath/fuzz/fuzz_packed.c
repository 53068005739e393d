// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: packed rings of a guest: receive, transmit and control.
 *
 * The input is a configuration (features, ring size, which need not be a power of two) and then a list of actions:
 * chains laid out well at the place where the driver is, single descriptors with any flags anywhere, raw bytes in every
 * part of the rings and of the memory, frames from the NIC and from the other guests, and turns of the worker in between.
 * See fuzz.h for what must hold.
 */
#include "fuzz.h"

static struct place { /* of the driver in each ring */
	uint32_t slot;
	bool wrap;
} places[RINGS];

static uint16_t avail_flags(bool wrap)
{
	return (uint16_t)(wrap ? BIT(VRING_PACKED_DESC_F_AVAIL) : BIT(VRING_PACKED_DESC_F_USED));
}

static struct vring_packed_desc *desc_of(const struct ring *r, uint32_t slot)
{
	return (struct vring_packed_desc *)(void *)r->desc + slot % r->num;
}

static struct vring_packed_desc *step(const struct ring *r, struct place *at, uint16_t *flags)
{
	struct vring_packed_desc *desc = desc_of(r, at->slot);

	*flags = avail_flags(at->wrap);
	if (++at->slot >= r->num) {
		at->slot = 0;
		at->wrap = !at->wrap;
	}
	return desc;
}

/* [gpa, gpa + len) in pieces, in the ring or in an indirect table; the first descriptor's flags come last. */
static void offer(uint32_t index, uint64_t gpa, uint32_t len, uint32_t piece, uint64_t table, uint16_t direction, uint16_t id)
{
	const struct ring *r = &f.hostile.ring[index];
	const uint32_t n = (len + piece - 1) / piece;
	struct vring_packed_desc *first = NULL;
	uint16_t first_flags = 0, flags;

	for (uint32_t i = 0; i < n; i++) {
		const struct vring_packed_desc entry = {gpa + (uint64_t)i * piece, MIN(piece, len - i * piece), id, direction};
		struct vring_packed_desc *desc;

		if (table) {
			hostile_write(table + 16ull * i, &entry, sizeof(entry));
			continue;
		}
		desc = step(r, &places[index], &flags);
		flags |= (uint16_t)(direction | (i + 1 < n ? VRING_DESC_F_NEXT : 0));
		*desc = entry;
		desc->flags = flags;
		if (!first) {
			first = desc;
			first_flags = flags;
		}
	}
	if (table) {
		first = step(r, &places[index], &flags);
		*first = (struct vring_packed_desc){table, 16 * n, id, flags};
		first_flags = flags | VRING_DESC_F_INDIRECT;
	}
	if (first)
		first->flags = first_flags;
}

static void op_frame_from_it(struct input *in)
{
	const uint32_t header = f.hostile.ring[TX].vr->header_len, len = in_length(in) % 70000u;
	uint64_t gpa = in_address(in), table = in_table(in);
	uint8_t to = in8(in), what = in8(in), bytes[HEADER + 64] = {0}, mac[6];
	struct virtio_net_hdr hdr = {0};

	memcpy(mac, hostile_mac, 6);
	mac[5] = to & 7;
	if (to & 8)
		memset(mac, 0xff, 6);
	make_frame(bytes + header, 64, mac, hostile_mac, to);
	if (what & 1) {
		hdr.flags = (uint8_t)(what >> 1 & 3);
		hdr.csum_start = in16(in);
		hdr.csum_offset = in8(in);
		hdr.gso_type = what & 8 ? in8(in) : 0;
		hdr.gso_size = what & 8 ? in16(in) : 0;
	}
	memcpy(bytes, &hdr, sizeof(hdr));
	hostile_write(gpa, bytes, MIN(header + 64, len));
	offer(TX, gpa, len, in_step(in, len), table, what & 0x80 && what & 0x40 ? VRING_DESC_F_WRITE : 0, in16(in));
}

static void op_buffers(struct input *in)
{
	const uint64_t gpa = in_address(in), table = in_table(in);
	const uint32_t len = in_length(in) % 70000u;
	const uint8_t n = in8(in) % 8;

	for (uint32_t i = 0, piece = in_step(in, len); i <= n; i++)
		offer(RX, gpa + (uint64_t)i * len, len, piece, table, VRING_DESC_F_WRITE, (uint16_t)i);
}

static void op_command(struct input *in)
{
	uint8_t bytes[32];
	uint64_t gpa = in_address(in);
	uint32_t n = in8(in) % sizeof(bytes);

	for (uint32_t i = 0; i < n; i++)
		bytes[i] = in8(in);
	hostile_write(gpa, bytes, n);
	offer(CTRL, gpa, n, 16, in_table(in), in8(in) & 1 ? VRING_DESC_F_WRITE : 0, 7);
}

static void op_frame_to_it(struct input *in)
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
		if (how & 1)
			nic_receive(&f.nic, frame, MIN(len, CHUNK - 256));
		else if (!peer_send(&f.peer[how >> 1 & 1 && !(how & 4)], &hdr, frame, len))
			break;
	}
}

/* A descriptor with any flags, at the driver's place or at another. */
static void op_one(struct input *in, uint32_t index)
{
	const struct ring *r = &f.hostile.ring[index];
	const uint8_t where = in8(in);
	struct vring_packed_desc *desc;
	uint16_t flags = 0;

	desc = where & 1 ? step(r, &places[index], &flags) : desc_of(r, where >> 1);
	desc->addr = in_address(in);
	desc->len = in_length(in);
	desc->id = in16(in);
	desc->flags = (uint16_t)(flags ^ in8(in) ^ in8(in) << 8);
}

static void act(struct input *in)
{
	uint8_t op = in8(in);

	switch (op % 12) {
	case 0:
	case 1:
		op_one(in, op / 12 % RINGS);
		break;
	case 2:
		op_bytes(in);
		break;
	case 3: /* event suppression, and whatever lies behind it */
		*(uint16_t *)(void *)((uint8_t *)f.hostile.ring[op / 12 % RINGS].avail + (in8(in) & 2)) = in16(in);
		break;
	case 4:
		op_frame_from_it(in);
		break;
	case 5:
		op_buffers(in);
		break;
	case 6:
		op_frame_to_it(in);
		break;
	case 7:
		op_command(in);
		break;
	default:
		op_common(op, &f.hostile.ring[TX]);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	const uint64_t features = in_features(&in) | BIT(VIRTIO_F_RING_PACKED);
	const uint8_t how = in8(&in);

	for (uint32_t i = 0; i < RINGS; i++)
		places[i] = (struct place){0, true};
	hostile_start(features, 1 + how % 70, 0, false); /* it may name any address: what is written is not compared */
	while (in.left)
		act(&in);
	hostile_stop();
	return 0;
}
