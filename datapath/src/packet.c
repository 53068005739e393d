// SPDX-License-Identifier: Apache-2.0
/*
 * Frames by a packet socket: a NIC's broadcast and multicast, which XDP passes to the kernel, or where there is no XDP
 * program, those for one guest. Control's filter decides which. GSO frames come whole, as the stack at the other end of a
 * veth sent them. PACKET_VNET_HDR tells what lacks its checksum and what stands for many, PACKET_AUXDATA what had
 * its VLAN tag taken out.
 *
 * A frame that stands for many, for a guest that takes such, is only peeked at: what is viewed is a copy of its headers, and
 * placing it receives it into the guest's buffers, which is the only copy. A stream of such frames is told by the last one.
 *
 * Frames that a guest has no buffers for stay in their slots, and nothing more is read until they have gone: what comes
 * meanwhile waits in that socket.
 */
#include <errno.h>
#include <linux/if_packet.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "nethdr.h"
#include "port.h"

#define SLOTS 16u
#define TAG 4u      /* room kept in front for a VLAN tag */
#define SLOT_BYTES ALIGN_UP(TAG + NET_MAX_FRAME, 4096u)
#define BURST_BYTES (128u << 10) /* of large frames no more at once than stays in the cache until it is copied on */
#define GSO_ALL UINT32_MAX
#define MACS 12u    /* what stands before the tag */

struct packet_slot {
	struct msghdr msg;
	struct iovec iov[2];
	struct virtio_net_hdr hdr;
	struct gso_header gso;
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
	} control;
};

static const struct tpacket_auxdata *auxdata(struct msghdr *msg)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c))
		if (c->cmsg_level == SOL_PACKET && c->cmsg_type == PACKET_AUXDATA)
			return (const void *)CMSG_DATA(c);
	return NULL;
}

/* `len`: of header and frame, as received. False: the frame is unusable and counted. */
static bool make_view(struct xv_packet *packet, struct packet_slot *slot, uint8_t *frame, uint32_t len, struct xv_view *view)
{
	const struct tpacket_auxdata *aux = auxdata(&slot->msg);
	uint32_t tag = 0;

	if (len < sizeof(slot->hdr) + ETH_HEADER || slot->msg.msg_flags & MSG_TRUNC) {
		count(packet->counters.dropped, 1);
		return false;
	}
	len -= (uint32_t)sizeof(slot->hdr);
	if (aux && aux->tp_status & TP_STATUS_VLAN_VALID) {
		uint16_t tpid = aux->tp_status & TP_STATUS_VLAN_TPID_VALID ? aux->tp_vlan_tpid : 0x8100;
		uint8_t bytes[TAG] = {(uint8_t)(tpid >> 8), (uint8_t)tpid, (uint8_t)(aux->tp_vlan_tci >> 8),
				      (uint8_t)aux->tp_vlan_tci};

		tag = TAG;
		memmove(frame - TAG, frame, MACS);
		frame -= TAG;
		memcpy(frame + MACS, bytes, TAG);
		len += TAG;
		slot->hdr.csum_start = (uint16_t)(slot->hdr.csum_start + tag);
	}
	*view = (struct xv_view){.first = {frame, len}, .len = len};
	if (!net_header_in(&slot->hdr, true, GSO_ALL, view) || (view->gso_type && !gso_check(view, &slot->gso))) {
		count(packet->counters.dropped, 1);
		return false;
	}
	return true;
}

static void receive(struct xv_packet *packet)
{
	uint32_t bytes = 0;

	/* one call a frame: nearly always there is none, and then one recvmsg() is the cheapest way to find out */
	for (uint32_t i = 0; i < SLOTS && bytes < BURST_BYTES; i++) {
		struct packet_slot *slot = &packet->slots[i];
		struct xv_view *view = &packet->views[packet->nr];
		ssize_t len;

		slot->msg.msg_controllen = sizeof(slot->control);
		len = recvmsg(packet->rx.fd, &slot->msg, MSG_DONTWAIT | MSG_TRUNC);
		if (len < 0 && errno == EINVAL) { /* a kind of GSO frame that has no virtio-net header */
			count(packet->counters.dropped, 1);
			continue;
		}
		if (len < 0)
			break;
		if (!make_view(packet, slot, packet->buffers + (size_t)i * SLOT_BYTES + TAG, (uint32_t)len, view))
			continue;
		count(packet->counters.packets, 1);
		count(packet->counters.bytes, view->len);
		bytes += view->len;
		packet->large = view->gso_type;
		packet->nr++;
	}
}

/* View the next frame where it is. False: there is one, and it is to be received. */
static bool peek(struct xv_packet *packet, uint32_t takes)
{
	struct packet_slot *slot = &packet->slots[0];
	struct iovec iov[2] = {{&slot->hdr, sizeof(slot->hdr)}, {packet->buffers, GSO_HEADER_MAX}};
	struct xv_view *view = &packet->views[0];
	const struct tpacket_auxdata *aux;
	ssize_t len;

	slot->msg.msg_iov = iov;
	slot->msg.msg_controllen = sizeof(slot->control);
	len = recvmsg(packet->rx.fd, &slot->msg, MSG_DONTWAIT | MSG_PEEK | MSG_TRUNC);
	slot->msg.msg_iov = slot->iov;
	if (len < 0)
		return errno == EAGAIN;
	len -= (ssize_t)sizeof(slot->hdr);
	if (len < (ssize_t)GSO_HEADER_MAX || len > (ssize_t)NET_MAX_FRAME)
		return false;
	aux = auxdata(&slot->msg);
	*view = (struct xv_view){.first = {packet->buffers, GSO_HEADER_MAX}, .len = (uint32_t)len, .socket = packet};
	packet->large = net_header_in(&slot->hdr, true, takes, view) && view->gso_type;
	if (!packet->large || (aux && aux->tp_status & TP_STATUS_VLAN_VALID) || !gso_check(view, &slot->gso))
		return false;
	view->gso = NULL; /* it is not to be cut: `takes` has been asked */
	view->flags |= VIEW_SOCKET;
	packet->nr = 1;
	packet->waits = true;
	return true;
}

int64_t packet_fetch(struct xv_packet *packet, struct iovec *iov, uint32_t n)
{
	struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n};

	packet->waits = false;
	return recvmsg(packet->rx.fd, &msg, MSG_DONTWAIT | MSG_TRUNC) - (ssize_t)sizeof(struct virtio_net_hdr);
}

void packet_rx_burst(struct xv_packet *packet, struct xv_burst *burst, uint32_t takes)
{
	if (unlikely(packet->waits)) { /* it had no buffers; meanwhile it may take other frames */
		packet->nr = 0;
		packet->waits = false;
	}
	if (likely(!packet->nr) && !(packet->large && takes && peek(packet, takes)))
		receive(packet);
	burst->nr = packet->nr - packet->done;
	burst->nr_segs = 0;
	memcpy(burst->views, packet->views + packet->done, burst->nr * sizeof(burst->views[0]));
}

void packet_rx_release(struct xv_packet *packet, uint32_t n)
{
	if (n && packet->views[0].flags & VIEW_SOCKET) {
		if (packet->waits) /* dropped */
			packet_fetch(packet, &(struct iovec){&packet->slots[0].hdr, sizeof(packet->slots[0].hdr)}, 1);
		count(packet->counters.packets, 1);
		count(packet->counters.bytes, packet->views[0].len);
	}
	packet->done += n;
	if (packet->done == packet->nr)
		packet->done = packet->nr = 0;
}

int xv_packet_new(int fd, struct xv_packet **out)
{
	struct xv_packet *packet = aligned_alloc(64, ALIGN_UP(sizeof(*packet), 64));

	if (!packet)
		return -ENOMEM;
	memset(packet, 0, sizeof(*packet));
	packet->buffers = malloc((size_t)SLOTS * SLOT_BYTES);
	packet->slots = calloc(SLOTS, sizeof(packet->slots[0]));
	packet->views = calloc(SLOTS, sizeof(packet->views[0]));
	if (!packet->buffers || !packet->slots || !packet->views) {
		xv_packet_free(packet);
		return -ENOMEM;
	}
	packet->rx = (struct source){.fd = fd, .epfd = -1};
	for (uint32_t i = 0; i < SLOTS; i++) {
		struct packet_slot *slot = &packet->slots[i];
		struct msghdr *msg = &slot->msg;

		slot->iov[0] = (struct iovec){&slot->hdr, sizeof(slot->hdr)};
		slot->iov[1] = (struct iovec){packet->buffers + (size_t)i * SLOT_BYTES + TAG, SLOT_BYTES - TAG};
		msg->msg_iov = slot->iov;
		msg->msg_iovlen = 2;
		msg->msg_control = &slot->control;
	}
	*out = packet;
	return 0;
}

void xv_packet_free(struct xv_packet *packet)
{
	if (!packet)
		return;
	free(packet->buffers);
	free(packet->slots);
	free(packet->views);
	free(packet);
}

uint64_t xv_packet_bytes(void)
{
	return sizeof(struct xv_packet) + (uint64_t)SLOTS * (SLOT_BYTES + sizeof(struct packet_slot) + sizeof(struct xv_view));
}

const struct xv_packet_counters *xv_packet_counters(const struct xv_packet *packet)
{
	return &packet->counters;
}
