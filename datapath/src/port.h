/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kinds of port and their operations. Each kind offers what it has of
 *
 *     rx_burst    up to XV_BURST views of frames, each where it lies
 *     tx_burst    place views at the destination: the only copy a frame gets; answers how many were taken
 *     rx_release  give the frames just viewed back to where they came from
 */
#ifndef XV_PORT_H
#define XV_PORT_H

#include <linux/if_xdp.h>

#include "capture.h"
#include "gso.h"
#include "ipguard.h"
#include "vring.h"

/* ---- guest (vhost.c) ---- */

#define INGRESS_HEAD 18u /* Ethernet header and a tag */

/* For what is judged of a guest's frames (ingress.c); a tag is put before the head. */
struct ingress_room {
	uint8_t heads[XV_BURST][24];
	uint8_t long_heads[XV_BURST][8 + IP_GUARD_BYTES];
	struct xv_seg segs[XV_BURST_SEGS + XV_BURST];
	uint32_t nr, nr_segs;
};

struct call_ctx { /* what a worker lends to whoever delivers to guests */
	const struct xv_vring *calling; /* being written to right now; the watchdog looks at it */
	struct capture_share capture;   /* of its time, for captures */
	struct gso_room room;           /* for frames cut on the way, or joined before it */
	struct ingress_room ingress;
	bool unjoin; /* the first view not taken is a joined one, and is to come again as the frames it is made of */
};

/* The chains of a burst: first `skipped` ones whose frames were dropped, then one for each view. */
struct burst_chains {
	struct xv_buf buf[XV_BURST];
	struct gso_header gso[XV_BURST]; /* of the views that have a gso_type */
	uint32_t len[XV_BURST];          /* of each frame as the guest sent it: a tag may be put in on the way */
	uint32_t skipped;
};

/*
 * View the frames that the guest sent. Frames that cannot be forwarded are counted and skipped, and only before the
 * first good one: the next burst meets those that stand behind. Nothing is given back before guest_rx_release().
 */
void guest_rx_burst(struct xv_vring *vr, struct xv_burst *burst, struct burst_chains *chains);
/* Give back the skipped chains and those of the first n views, and count the views as sent by the guest. */
void guest_rx_release(struct xv_vring *vr, const struct burst_chains *chains, uint32_t n, struct call_ctx *ctx);
/*
 * Copy frames into the guest's receive buffers, in order, until its buffers run out; answers how many views are done
 * with (delivered, or dropped because the guest can never take them). Sets ctx->unjoin where it stops for that.
 */
uint32_t guest_tx_burst(struct xv_vring *vr, const struct xv_view *const *views, uint32_t n, struct call_ctx *ctx);

/* ---- NIC queue (xsk.c) ---- */

/* What the headers of Debian 12 do not have yet (linux/if_xdp.h) */
#ifndef XDP_PKT_CONTD
#define XDP_PKT_CONTD (1 << 0)   /* in desc.options: the frame goes on in the next descriptor */
#endif
#ifndef XDP_TX_METADATA
#define XDP_TX_METADATA (1 << 1) /* in desc.options: struct tx_metadata stands before the frame */
#define XDP_TXMD_FLAGS_CHECKSUM (1 << 1)
#endif

struct tx_metadata { /* struct xsk_tx_metadata, as a request; 16 bytes of it are older than launch_time */
	uint64_t flags;
	uint16_t csum_start, csum_offset; /* from the Ethernet header */
	uint64_t launch_time;
};

struct xv_nicq {
	uint8_t *umem;
	uint64_t umem_size;
	uint32_t chunk, flags, queue;
	int fd, gso_fd;
	uint32_t gso; /* GSO_BITs of frames for gso_fd */
	uint32_t head;  /* bytes at the beginning of a chunk that is sent, for struct tx_metadata */
	uint32_t most;  /* bytes of the longest frame that can be sent */
	struct {
		uint32_t *producer, *consumer, *flags;
		uint64_t *ring;
		uint32_t mask, size;
	} fill, comp;
	struct {
		uint32_t *producer, *consumer, *flags;
		struct xdp_desc *ring;
		uint32_t mask, size;
	} tx;
	struct spinlock fill_lock __attribute__((aligned(64)));
	uint32_t fill_prod;
	struct spinlock tx_lock __attribute__((aligned(64)));
	uint32_t tx_prod, comp_cons, nr_free;
	uint64_t *free; /* addresses of frames free for sending */
	bool flushing;  /* a worker is telling the kernel */
	uint32_t stuck; /* flushes in a row that the kernel took nothing of; the flushing worker's */
	struct xv_nicq_counters counters;
};

struct xv_xsk {
	struct xv_nicq *nicq;
	uint32_t *producer, *consumer;
	struct xdp_desc *ring;
	uint32_t mask, size;
	uint32_t cons;  /* first entry not yet released */
	uint32_t keep;  /* pieces it may hold back while its guest has no buffers; set by xv_publish() */
	uint32_t plain; /* frames at the cursor that must not be joined */
	struct xv_vring *stalled_on;
	uint64_t stalled_at;
	struct source rx;
	struct xv_xsk_counters counters;
};

/*
 * View received frames, without consuming them. A frame of several pieces is one view, never a part of it. Answers how
 * many frames were thrown away instead, because no guest takes one so long.
 */
uint32_t xsk_rx_burst(struct xv_xsk *xsk, struct xv_burst *burst);
/* Consume the first n frames and give their pieces to the fill ring. */
void xsk_rx_release(struct xv_xsk *xsk, uint32_t n);
/* Throw the oldest frames away until at most `keep` pieces wait; answers how many frames. */
uint32_t xsk_rx_trim(struct xv_xsk *xsk);
/* How many frames xsk_rx_trim() would throw away. */
uint32_t xsk_rx_excess(const struct xv_xsk *xsk);
/* Pieces that wait in the ring: as many frames, where a frame has but one. */
uint32_t xsk_backlog(const struct xv_xsk *xsk);
/* Copy frames into UMEM and queue them; how many. Those that cannot be sent are counted in `drops` of their sender. */
uint32_t nicq_tx_burst(struct xv_nicq *nicq, const struct xv_view *const *views, uint32_t n, uint32_t max_len,
		       uint64_t *drops);
/* Tell the kernel to send what is queued. False when some of it must wait, or another worker is at it. */
bool nicq_tx_flush(struct xv_nicq *nicq);

/* ---- GSO frames to a NIC (gsosock.c) ---- */

/* GSO_BITs of XV_NICQ_GSO_*. */
uint32_t nicq_gso_bits(uint32_t conf);
/* Send a guest's GSO frame whole, or drop and count it. False: neither, it is to be cut. */
bool nicq_tx_gso(struct xv_nicq *nicq, const struct xv_view *view, uint32_t max_len, uint64_t *drops);

/* ---- tap (tap.c) ---- */

struct xv_tapq {
	struct source rx;
	uint8_t *buffer;  /* what was read, one frame behind another */
	struct gso_header *gso_headers; /* of the views that have a gso_type */
	struct xv_view views[XV_BURST]; /* of what is in the buffer, from `done` to `nr` */
	uint32_t nr, done;
	uint32_t header_len, queue;
	uint32_t gso;     /* GSO_BITs of frames that are written whole */
	struct xv_vring *stalled_on; /* the receive ring whose buffers ran out, or NULL */
	struct patience patience;
	struct xv_tapq_counters counters;
};

/* View the frames that were not released, or if there are none, new ones. */
void tap_rx_burst(struct xv_tapq *tap, struct xv_burst *burst);
/* Done with the first n of those. */
void tap_rx_release(struct xv_tapq *tap, uint32_t n);
/* Write frames; how many. Those that cannot be written are counted in `drops` of their sender. */
uint32_t tap_tx_burst(struct xv_tapq *tap, const struct xv_view *const *views, uint32_t n, uint32_t max_len,
		      uint64_t *drops);
/* Write a guest's GSO frame whole, or drop and count it. False: neither, it is to be cut. */
bool tap_tx_gso(struct xv_tapq *tap, const struct xv_view *view, uint32_t max_len, uint64_t *drops);

/* ---- packet socket: broadcast and multicast of a NIC, or frames for one guest (packet.c) ---- */

struct packet_slot;

struct xv_packet {
	struct source rx;
	uint8_t *buffers;
	struct packet_slot *slots;
	struct xv_view *views;      /* of the frames in the slots, from `done` to `nr` */
	uint32_t nr, done;
	bool large;  /* the last frame stood for many, and so will the next */
	bool waits;  /* the only view is VIEW_SOCKET, and its frame has not been fetched */
	struct xv_vring *stalled_on; /* the receive ring whose buffers ran out, or NULL */
	struct xv_packet_counters counters;
};

/*
 * View the frames that were not released, or if there are none, new ones. `takes`: GSO_BITs of frames that may be viewed
 * where they are, in the socket (VIEW_SOCKET), as whoever gets them takes them whole.
 */
void packet_rx_burst(struct xv_packet *packet, struct xv_burst *burst, uint32_t takes);
/* Receive the frame of a VIEW_SOCKET; iov[0] is for its virtio-net header. Bytes of the frame, or less than 0. */
int64_t packet_fetch(struct xv_packet *packet, struct iovec *iov, uint32_t n);
/* Done with the first n of those. */
void packet_rx_release(struct xv_packet *packet, uint32_t n);

#endif
