/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A virtqueue, device side: split or packed (virtio 1.2, 2.7 and 2.8).
 *
 * Every buffer is used in the order it was made available and before the turn ends. So one cursor is enough: `next` is
 * the first buffer that has not been used yet, and what has been read but not used lies between it and a cursor in a
 * local variable. vring_peek() reads buffers from a cursor on, vring_use() uses the one at `next`, and vring_publish()
 * shows the guest all that were used since the last time.
 *
 * split.h and packed.h have what differs. Whoever is on the frame path calls the functions here with a constant
 * `packed`, so that each burst function exists twice and decides once.
 *
 * The guest's memory is read once into a local, checked, and the local used. A chain that loops, leaves the table or
 * leaves the guest's memory faults the guest: nothing more is read from its rings.
 */
#ifndef XV_VRING_H
#define XV_VRING_H

#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>

#include "guest.h"
#include "log.h"
#include "mem.h"
#include "view.h"

/* Of the sources that a worker polls; see hot.h. */
enum source_kind { SOURCE_TX, SOURCE_XSK, SOURCE_CTRL, SOURCE_PACKET, SOURCE_TAP };
enum source_state {
	SOURCE_UNLISTED, /* receive rings, multicast, and what no worker has adopted yet */
	SOURCE_HOT,      /* looked at in every turn */
	SOURCE_COLD,     /* nothing there; an event makes it hot */
	SOURCE_WAITING,  /* cold with frames for a guest that has no buffers */
};

/* What an epoll event points to. */
struct source {
	int fd;             /* -1: nothing to wait for */
	int epfd;           /* where it is registered, -1 if it is not */
	uint32_t generation; /* of the snapshot that last named it, and */
	uint32_t worker;     /* whose it is in that */
	uint64_t *events;   /* counter of its notifications, or NULL */
	/* its worker's, since it adopted the snapshot */
	const void *work;   /* struct tx_source, or what the kind has */
	uint32_t place;     /* in the list of its state */
	uint8_t kind, state;
	bool active;        /* there was something since the last sweep */
	bool armed;         /* events have been asked for since then, and all looks found nothing */
};

/* A place in a ring. Split: the free-running index. Packed: the slot, and in bit 15 the wrap counter (2.8.1). */
typedef uint16_t cursor;

/* How long whoever has frames may wait for a receiver without buffers; see may_wait() in worker.c. */
struct patience {
	uint64_t left, at; /* cycles, and as of when */
};

struct xv_vring {
	/* fixed */
	union {
		struct vring_desc *desc;
		struct vring_packed_desc *packed_desc;
	};
	union {
		struct vring_avail *avail;
		struct vring_packed_desc_event *driver; /* driver event suppression (2.8.10) */
	};
	union {
		struct vring_used *used;
		struct vring_packed_desc_event *device; /* device event suppression */
	};
	const struct xv_mem *mem;
	const struct xv_mem *log; /* NULL: nobody asks which pages we write */
	struct inflight_packed *inflight; /* packed rings: where a successor finds the cursor, or NULL */
	struct xv_guest *guest;
	struct guest_queue *queue; /* counters and lock; bound by xv_publish() */
	uint32_t num, index;       /* index: of the vring in its device; bound by xv_publish() */
	uint16_t mask;             /* split */
	uint8_t header_len;        /* of the virtio-net header: 10, 12 or 20 bytes */
	bool packed, in_order, event_idx, indirect, mergeable, csum, guest_csum, call_is_socket, log_used;
	uint32_t host_gso, guest_gso; /* GSO_BITs: what the guest may send, and what it takes */
	/* set by control while it runs */
	int call_fd;
	bool armed; /* a worker waits for a kick */
	bool enabled, call_asked; /* call_asked: interrupt the guest once, whatever the ring holds */
	/* the worker's; receive rings: whoever holds the queue's lock */
	cursor next, published, signalled;
	uint16_t first_flags; /* packed: of the descriptor at `published`, written last of all that were used */
	bool signalled_valid;
	bool begun; /* it has been published */
	struct xv_vring *stalled_on; /* transmit rings: the receive ring whose buffers ran out, or NULL */
	struct patience patience;      /* transmit rings: for such a ring */
	uint64_t not_before;           /* transmit rings: the guest has sent all that it may until then, in cycles; or 0 */
	const struct xv_vring *follows; /* until published: the one whose place it takes, or NULL */
	struct source kick;
};

/* A buffer that the guest made available. */
struct xv_buf {
	uint16_t id; /* split: the chain's first descriptor; packed: as the guest numbers its buffers */
	/* packed only: descriptors that it takes up in the ring, and where */
	uint16_t slots;
	cursor at;
	uint16_t padding;
};

/* Whether the guest takes frames with an open checksum: negotiated, and not switched off by a control command. */
static inline bool vring_takes_csum(const struct xv_vring *vr)
{
	return vr->guest_csum && load_once(&vr->guest->offloads) & OFFLOAD_CSUM;
}

static inline bool vring_usable(const struct xv_vring *vr)
{
	return load_once(&vr->enabled) && !guest_faulted(vr->guest);
}

cold static void vring_fault(struct xv_vring *vr, enum xv_fault_code code, uint64_t detail)
{
	guest_fault(vr->guest, code, vr->index, detail);
}

/* Bytes of guest memory were written: for whoever migrates the guest. After the bytes, before they are published. */
static inline void vring_wrote(const struct xv_vring *vr, const void *at, uint32_t len)
{
	if (unlikely(vr->log))
		log_write(vr->log, vr->mem, at, len);
}

/* The same, of the ring's own parts, which the front-end may not ask for (VHOST_VRING_F_LOG). */
static inline void vring_wrote_ring(const struct xv_vring *vr, const void *at, uint32_t len)
{
	if (unlikely(vr->log_used))
		log_write(vr->log, vr->mem, at, len);
}

#include "packed.h"
#include "split.h"

/* Where the buffer after this one, which is at `at`, begins. */
static inline cursor vring_after(const struct xv_vring *vr, bool packed, cursor at, const struct xv_buf *buf)
{
	return packed ? packed_advance(vr, at, buf->slots) : (cursor)(at + 1);
}

/*
 * Up to n buffers from `at` on, and private copies of their first descriptors (flags: NEXT, WRITE and INDIRECT only).
 * Fewer when the guest has made fewer available, or when it lies: then it is faulted.
 */
static inline uint32_t vring_peek(struct xv_vring *vr, bool packed, cursor at, struct xv_buf *bufs, struct vring_desc *descs,
				  uint32_t n)
{
	return packed ? packed_peek(vr, at, bufs, descs, n, true) : split_peek(vr, at, bufs, descs, n);
}

/*
 * The same for whoever takes only buffers of one descriptor: of a chain in a packed ring only the first descriptor is
 * looked at, and it is the last of what is answered.
 */
static inline uint32_t vring_peek_plain(struct xv_vring *vr, bool packed, cursor at, struct xv_buf *bufs,
					struct vring_desc *descs, uint32_t n)
{
	return packed ? packed_peek(vr, at, bufs, descs, n, false) : split_peek(vr, at, bufs, descs, n);
}

/* Whether there are buffers, asked by a worker that does not hold the queue's lock. */
static inline bool vring_has_buffers(const struct xv_vring *vr)
{
	const cursor at = load_once(&vr->next);

	return vr->packed ? packed_is_available(vr, at) : load_acquire(&vr->avail->idx) != at;
}

/*
 * Use the n buffers from `next` on, into which so many bytes were written; NULL: none. Seen by the guest at the next
 * vring_publish().
 */
static inline void vring_use(struct xv_vring *vr, bool packed, const struct xv_buf *bufs, const uint32_t *written, uint32_t n)
{
	if (packed && unlikely(vr->inflight))
		packed_use_inflight(vr, bufs, written, n);
	else if (packed)
		packed_use(vr, bufs, written, n);
	else
		split_use(vr, bufs, written, n);
}

/* Make all used buffers visible, one at least; returns whether the guest wants to be interrupted for them. */
static inline bool vring_publish(struct xv_vring *vr, bool packed)
{
	const cursor old = vr->signalled, now = vr->next;
	const bool first = !vr->signalled_valid;

	if (packed)
		packed_publish(vr);
	else
		split_publish(vr);
	/* pairs with the driver's barrier between enabling interrupts and looking for used buffers (2.7.7.2, 2.8.21.3) */
	full_barrier();
	vr->signalled = now;
	vr->signalled_valid = true;
	return packed ? packed_wants_call(vr, old, now, first) : split_wants_call(vr, old, now, first);
}

/* Ask for a kick when the guest makes another buffer available. Then look at vring_has_buffers() once more. */
static inline void vring_arm(struct xv_vring *vr)
{
	const cursor at = load_once(&vr->next);

	store_once(&vr->armed, true);
	if (vr->packed)
		packed_arm_at(vr, at);
	else
		split_arm_at(vr, at);
}

/* Ask for a kick when there are more than the buffers there are, which are too few. Then try once more. */
static inline void vring_arm_behind(struct xv_vring *vr)
{
	store_once(&vr->armed, true);
	if (vr->packed)
		packed_arm_behind(vr);
	else
		split_arm_at(vr, load_acquire(&vr->avail->idx));
}

/* Kicks are not needed. */
static inline void vring_disarm(struct xv_vring *vr)
{
	store_once(&vr->armed, false);
	if (vr->packed)
		packed_disarm(vr);
	else
		split_disarm(vr);
}

/* One direction of a chain's descriptors. */
enum chain_direction { CHAIN_READ, CHAIN_WRITE };

enum chain_result {
	CHAIN_OK,
	CHAIN_TOO_LONG, /* more segments than there is room for, or more descriptors than the budget */
	CHAIN_WRONG_WAY, /* a descriptor of the other direction */
	CHAIN_FAULT,    /* the guest has been faulted */
};

/*
 * Walk a buffer's chain of descriptors, into at most `max` segments. Descriptors of the other direction end the walk:
 * CHAIN_WRONG_WAY, except that with `rest` set the walk may go on from readable to writable ones, which are counted in
 * `*rest` (the control virtqueue's shape). Zero-length descriptors are skipped. Every descriptor looked at, of whatever
 * kind, is paid for from `*budget`, so that no ring can keep a worker for longer than its owner allows: CHAIN_TOO_LONG.
 * How long a packed ring's chain is, vring_peek() has found out before: that took at most PACKED_CHAIN_MAX looks.
 */
enum chain_result vring_chain(struct xv_vring *vr, const struct xv_buf *buf, enum chain_direction direction,
			      struct xv_seg *segs, uint32_t max, uint32_t *nr, uint64_t *bytes, uint32_t *rest,
			      uint32_t *budget);

/*
 * A snapshot with this ring is about to be published, and no worker holds the ring, nor the one whose place it takes. Only
 * now, when nothing can fail any more, is the guest told that kicks are not needed: the old one may have been armed.
 */
static inline void vring_begin(struct xv_vring *vr)
{
	const struct xv_vring *old = vr->follows;

	if (vr->begun)
		return;
	vr->begun = true;
	if (old) {
		vr->next = vr->published = old->next; /* between turns nothing is used and not published */
		vr->signalled = old->signalled;
		vr->signalled_valid = old->signalled_valid && vr->event_idx == old->event_idx;
		vr->patience = old->patience;
		vr->follows = NULL;
	} else if (vr->event_idx && !vr->packed) {
		split_arm_at(vr, (cursor)(vr->next - 1)); /* as far from being passed as it can be */
	}
	vring_disarm(vr);
}

/* Interrupt the guest. `worker_calling` is where the watchdog looks for a guest whose descriptor blocks. */
void vring_call(struct xv_vring *vr, uint64_t *calls, uint64_t *failed, const struct xv_vring **worker_calling);

#endif
