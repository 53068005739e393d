// SPDX-License-Identifier: Apache-2.0
/*
 * A guest's GSO frame to the NIC in one piece.
 *
 * AF_XDP knows no segmentation offload, so by it a frame of 64 KiB costs 45 frames of UMEM, descriptors and skbs. A
 * packet socket with PACKET_VNET_HDR hands the frame to the device as it is: the kernel gathers it straight from the
 * guest's buffers, which is its only copy, and the device's hardware cuts it, or nobody does, where a stack of this
 * machine is at the other end of a veth. PACKET_QDISC_BYPASS takes it to the device the same way as AF_XDP's frames.
 *
 * The kernel believes the virtio-net header and the frame's headers, so it gets only ours: made from the checked view,
 * and the private copy of the frame's headers. What the guest can still change meanwhile is payload.
 *
 * Order: whatever this worker queued for the NIC before is sent first. When it cannot be, the frame is cut and queued
 * behind. Control gives no socket to a NIC where AF_XDP's frames and the socket's may overtake each other.
 */
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "nethdr.h"
#include "port.h"

#define PIECES 1024u /* UIO_MAXIOV: what sendmsg() takes */

uint32_t nicq_gso_bits(uint32_t conf)
{
	return (conf & XV_NICQ_GSO_TCP4 ? GSO_BIT(VIRTIO_NET_HDR_GSO_TCPV4) : 0) |
	       (conf & XV_NICQ_GSO_TCP6 ? GSO_BIT(VIRTIO_NET_HDR_GSO_TCPV6) : 0) |
	       (conf & XV_NICQ_GSO_ECN ? GSO_BIT_ECN : 0) |
	       (conf & XV_NICQ_GSO_UDP ? GSO_BIT(VIRTIO_NET_HDR_GSO_UDP_L4) : 0);
}

bool nicq_tx_gso(struct xv_nicq *nicq, const struct xv_view *view, uint32_t max_len, uint64_t *drops)
{
	struct xv_nicq_counters *counters = &nicq->counters;
	const struct gso_header *gso = view->gso;
	uint8_t header[GSO_HEADER_MAX];
	struct virtio_net_hdr vnet = {0};
	struct iovec iov[PIECES];
	struct msghdr msg = {.msg_iov = iov};
	uint32_t payload;

	/* the tags of a frame are on top of what the device's MTU allows, as in nicq_tx_burst() */
	if (!net_gso_allowed(view->gso_type, nicq->gso) || gso->len + view->gso_size > max_len + gso->h.ip - ETH_HEADER)
		return false;
	payload = view_gather(view, gso->len, iov + 2, PIECES - 2);
	if (!payload || !nicq_tx_flush(nicq))
		return false;
	gso_whole_header(view, header);
	net_header_out(&vnet, view);
	iov[0] = (struct iovec){&vnet, sizeof(vnet)};
	iov[1] = (struct iovec){header, gso->len};
	msg.msg_iovlen = payload + 2;
	if (sendmsg(nicq->gso_fd, &msg, MSG_DONTWAIT) >= 0) {
		__atomic_fetch_add(&counters->gso_packets, 1u, __ATOMIC_RELAXED);
		__atomic_fetch_add(&counters->gso_bytes, view->len, __ATOMIC_RELAXED);
		return true;
	}
	switch (errno) {
	case ENOBUFS: /* the device took it and dropped it */
		__atomic_fetch_add(&counters->sendto_busy, 1u, __ATOMIC_RELAXED);
		return true;
	case EAGAIN: /* as much as the socket may have waits in the device */
	case ENETDOWN:
	case ENXIO:
	case ENOMEM:
		count(drops[XV_DROP_NO_FRAMES], 1);
		view_tx_dropped(view, XV_DROP_NO_FRAMES);
		return true;
	default: /* EINVAL, a type that this kernel does not know; EFAULT, memory that is gone: cutting will find out */
		return false;
	}
}
