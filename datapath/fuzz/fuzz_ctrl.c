// SPDX-License-Identifier: Apache-2.0
/*
 * Fuzzer: the control virtqueue.
 *
 * Chains of any make, and well laid out commands of any class, command and data. Every chain that does not fault the
 * guest is answered, a command's answer is one byte at the beginning of its writable part, it is what a model of the
 * virtio specification says, and the state that control reads stays within its bounds (check_hostile() in fuzz.h).
 */
#include "fuzz.h"

static uint32_t le32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

#define CTRL_FEATURES                                                                                            \
	(BIT(VIRTIO_NET_F_CTRL_RX_EXTRA) | BIT(VIRTIO_NET_F_CTRL_VLAN) | BIT(VIRTIO_NET_F_CTRL_MAC_ADDR) |         \
	 BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) | BIT(VIRTIO_NET_F_RSS) | BIT(VIRTIO_NET_F_HASH_REPORT))

static uint32_t le16(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

/* Both tables are whole, and there is no other unicast address than its own in them: nobody here would grant that. */
static bool model_tables(const uint8_t *data, uint32_t len)
{
	for (int table = 0; table < 2; table++) {
		uint64_t end;

		if (len < 4)
			return false;
		end = 4 + 6ull * le32(data);
		if (end > len)
			return false;
		for (uint64_t at = 4; at < end; at += 6)
			if (!(data[at] & 1) && memcmp(data + at, hostile_mac, 6))
				return false;
		data += end;
		len -= (uint32_t)end;
	}
	return !len;
}

static bool model_rss(const uint8_t *data, uint32_t len, bool table)
{
	uint32_t entries = 1, at = 12;

	if (len < 13)
		return false;
	if (table) {
		entries = 1 + le16(data + 4);
		at = 8 + 2 * entries + 2;
		if (le16(data + 6) >= 2 || len < at + 1 || (entries & (entries - 1)) || entries > 128)
			return false;
		for (uint32_t i = 0; i < entries; i++)
			if (le16(data + 8 + 2 * i) >= 2)
				return false;
		if (le16(data + at - 2) < 1 || le16(data + at - 2) > 2)
			return false;
	}
	return le32(data) < 512 && data[at] <= 40 && len == at + 1 + data[at];
}

/* Whether a command is to be accepted (virtio 1.2, 5.1.6.5), two queue pairs being allowed. */
static bool model(const uint8_t *cmd, uint32_t len, uint64_t features)
{
	const uint64_t offloads = BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4) |
				  BIT(VIRTIO_NET_F_GUEST_TSO6) | BIT(VIRTIO_NET_F_GUEST_ECN) | BIT(54) | BIT(55);
	uint64_t wanted;

	if (len < 2)
		return false;
	switch (cmd[0]) {
	case VIRTIO_NET_CTRL_RX:
		return features & BIT(VIRTIO_NET_F_CTRL_RX) && len == 3 &&
		       cmd[1] <= (features & BIT(VIRTIO_NET_F_CTRL_RX_EXTRA) ? VIRTIO_NET_CTRL_RX_NOBCAST
									       : VIRTIO_NET_CTRL_RX_ALLMULTI);
	case VIRTIO_NET_CTRL_MAC:
		if (cmd[1] == VIRTIO_NET_CTRL_MAC_ADDR_SET)
			return features & BIT(VIRTIO_NET_F_CTRL_MAC_ADDR) && len == 8 && !memcmp(cmd + 2, hostile_mac, 6);
		return features & BIT(VIRTIO_NET_F_CTRL_RX) && cmd[1] == VIRTIO_NET_CTRL_MAC_TABLE_SET &&
		       model_tables(cmd + 2, len - 2);
	case VIRTIO_NET_CTRL_VLAN:
		return features & BIT(VIRTIO_NET_F_CTRL_VLAN) && cmd[1] <= VIRTIO_NET_CTRL_VLAN_DEL && len == 4 && cmd[3] < 16;
	case VIRTIO_NET_CTRL_MQ:
		if (cmd[1] == VIRTIO_NET_CTRL_MQ_RSS_CONFIG)
			return features & BIT(VIRTIO_NET_F_RSS) && model_rss(cmd + 2, len - 2, true);
		if (cmd[1] == VIRTIO_NET_CTRL_MQ_HASH_CONFIG)
			return features & BIT(VIRTIO_NET_F_HASH_REPORT) && model_rss(cmd + 2, len - 2, false);
		return features & BIT(VIRTIO_NET_F_MQ) && cmd[1] == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET && len == 4 && !cmd[3] &&
		       cmd[2] >= 1 && cmd[2] <= 2;
	case VIRTIO_NET_CTRL_ANNOUNCE:
		return features & BIT(VIRTIO_NET_F_GUEST_ANNOUNCE) && cmd[1] == VIRTIO_NET_CTRL_ANNOUNCE_ACK;
	case VIRTIO_NET_CTRL_GUEST_OFFLOADS:
		if (!(features & BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)) || cmd[1] != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET ||
		    len != 10)
			return false;
		wanted = le32(cmd + 2) | (uint64_t)le32(cmd + 6) << 32;
		return !(wanted & ~(features & offloads));
	default:
		return false;
	}
}

/* A command in pieces, a chain of at most 40 descriptors in a table of its own; its answer is looked at at once. */
static void op_command(struct input *in)
{
	struct ring *r = &f.hostile.ring[CTRL];
	const uint64_t at = data_at[2].gpa, table = at + 60000, answer = at + 50000;
	uint8_t cmd[96], n = in8(in) % sizeof(cmd), how = in8(in), fill = 0xee;
	uint8_t *memory = (uint8_t *)(uintptr_t)f.hostile.regions[RINGS * PARTS + 2].host;
	uint32_t step = MAX(how & 15u, n / 30u + 1), pieces = 0;
	uint16_t used;

	settle();
	if (f.hostile.guest->fault.code != XV_FAULT_NONE || !(f.hostile.features & BIT(VIRTIO_RING_F_INDIRECT_DESC)))
		return;
	for (uint32_t i = 0; i < n; i++)
		cmd[i] = in8(in);
	hostile_write(at, cmd, n);
	hostile_write(answer, &fill, 1);
	for (uint32_t done = 0; done < n; done += step, pieces++) {
		struct vring_desc desc = {at + done, MIN(step, n - done), VRING_DESC_F_NEXT, (uint16_t)(pieces + 1)};

		hostile_write(table + 16 * pieces, &desc, sizeof(desc));
	}
	hostile_write(table + 16 * pieces, &(struct vring_desc){answer, 1, VRING_DESC_F_WRITE, 0}, 16);
	if (pieces + 1 > r->num)
		return; /* a table larger than the ring: a fault */
	ring_desc(r, 0, table, 16 * (pieces + 1), VRING_DESC_F_INDIRECT, -1);
	used = r->vr->next;
	ring_offer(r, 0);
	settle();
	if (!f.hostile.isolated)
		return;
	CHECK_EQ((uint16_t)(r->vr->next - used), 1);
	CHECK_EQ(r->used->ring[used & (r->num - 1)].len, 1);
	CHECK_EQ(memory[50000], model(cmd, n, f.hostile.features) ? VIRTIO_NET_OK : VIRTIO_NET_ERR);
}

static void act(struct input *in)
{
	struct ring *r = &f.hostile.ring[CTRL];
	uint8_t op = in8(in);

	switch (op % 11) {
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
	case 7:
		op_command(in);
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

	if (features & BIT(VIRTIO_NET_F_CTRL_RX))
		features |= CTRL_FEATURES;
	hostile_start(features, 1u << how % 8, in16(&in), how & 0x80);
	while (in.left)
		act(&in);
	hostile_stop();
	return 0;
}
