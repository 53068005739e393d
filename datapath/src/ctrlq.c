// SPDX-License-Identifier: Apache-2.0
/*
 * A command is one chain: class, command and data readable, one writable byte for the answer. The readable part is
 * copied once and then judged, so the guest cannot change it in between. Every chain is answered, whatever it holds:
 * Linux spins on the answer.
 */
#include "ctrlq.h"

#include <unistd.h>

#define COMMAND_MAX 4096u /* class, command, and two MAC tables of several hundred entries */
#define SEGS_MAX 64u

static uint16_t le16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static bool rx_mode(struct xv_guest *guest, uint8_t command, const uint8_t *data, uint32_t len)
{
	if (command > VIRTIO_NET_CTRL_RX_ALLMULTI || len != 1) /* the others need VIRTIO_NET_F_CTRL_RX_EXTRA */
		return false;
	store_once(&guest->ctrl.rx_mode, (guest->ctrl.rx_mode & ~(1u << command)) | (uint32_t)!!data[0] << command);
	return true;
}

/*
 * Unicast and multicast tables: a count and that many addresses each. The guest gets what it asks for and more, which
 * the specification allows (virtio 1.2, 5.1.6.5.2): its own unicast address and all multicast.
 */
static bool mac_tables(const uint8_t *data, uint32_t len)
{
	for (int table = 0; table < 2; table++) {
		uint32_t entries;

		if (len < sizeof(entries))
			return false;
		entries = (uint32_t)le16(data) | (uint32_t)le16(data + 2) << 16;
		data += sizeof(entries);
		len -= (uint32_t)sizeof(entries);
		if (entries > len / 6)
			return false;
		data += 6 * entries;
		len -= 6 * entries;
	}
	return !len;
}

static bool queue_pairs(struct xv_guest *guest, uint8_t command, const uint8_t *data, uint32_t len, uint32_t max_pairs)
{
	uint16_t pairs;

	if (command != VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET || len != 2)
		return false;
	pairs = le16(data);
	if (pairs < VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN || pairs > max_pairs)
		return false;
	store_once(&guest->ctrl.pairs, (uint32_t)pairs);
	return true;
}

static bool execute(struct xv_vring *vr, uint64_t features, uint32_t max_pairs, const uint8_t *cmd, uint32_t len)
{
	if (len < 2)
		return false;
	switch (cmd[0]) {
	case VIRTIO_NET_CTRL_RX:
		return features & 1ull << VIRTIO_NET_F_CTRL_RX && rx_mode(vr->guest, cmd[1], cmd + 2, len - 2);
	case VIRTIO_NET_CTRL_MAC:
		return features & 1ull << VIRTIO_NET_F_CTRL_RX && cmd[1] == VIRTIO_NET_CTRL_MAC_TABLE_SET &&
		       mac_tables(cmd + 2, len - 2);
	case VIRTIO_NET_CTRL_MQ:
		return features & 1ull << VIRTIO_NET_F_MQ && queue_pairs(vr->guest, cmd[1], cmd + 2, len - 2, max_pairs);
	case VIRTIO_NET_CTRL_ANNOUNCE:
		return features & 1ull << VIRTIO_NET_F_GUEST_ANNOUNCE && cmd[1] == VIRTIO_NET_CTRL_ANNOUNCE_ACK;
	default:
		return false;
	}
}

uint32_t ctrlq_poll(struct xv_vring *vr, uint64_t features, uint32_t max_pairs, struct call_ctx *ctx)
{
	struct xv_ctrl_state *state = &vr->guest->ctrl;
	struct xv_seg segs[SEGS_MAX];
	uint8_t command[COMMAND_MAX];
	struct vring_desc desc;
	struct xv_buf buf;
	uint64_t one = 1;
	uint32_t done;

	for (done = 0; done < XV_BURST && vring_peek(vr, vr->packed, vr->next, &buf, &desc, 1); done++) {
		uint32_t nr, writable, len = 0, written = 0;
		uint64_t bytes;
		uint32_t budget = SEGS_MAX;
		enum chain_result result =
			vring_chain(vr, &buf, CHAIN_READ, segs, SEGS_MAX, &nr, &bytes, &writable, &budget);
		bool ok = result == CHAIN_OK;

		if (result == CHAIN_FAULT)
			break;
		if (!ok)
			nr = writable = 0;
		for (uint32_t i = 0; i < nr - writable; i++) {
			if (segs[i].len > COMMAND_MAX - len) {
				ok = false;
				break;
			}
			memcpy(command + len, segs[i].data, segs[i].len);
			len += segs[i].len;
		}
		ok = ok && execute(vr, features, max_pairs, command, len);
		if (writable) {
			*segs[nr - writable].data = ok ? VIRTIO_NET_OK : VIRTIO_NET_ERR; /* the first writable byte */
			vring_wrote(vr, segs[nr - writable].data, 1);
			written = 1;
		}
		count(state->commands, 1);
		if (!ok)
			count(state->refused, 1);
		vring_use(vr, vr->packed, &buf, &written, 1);
	}
	if (done) {
		if (vring_publish(vr, vr->packed))
			vring_call(vr, &vr->queue->tx.calls, &vr->queue->tx.calls_failed, &ctx->calling);
		if (vr->guest->event_fd >= 0 && write(vr->guest->event_fd, &one, sizeof(one)) < 0)
			return done; /* saturated: control has an event to read anyway */
	}
	return done;
}
