/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Split virtqueue, device side (virtio 1.2, 2.7).
 *
 * Two cursors and a mask: last_avail is the next avail entry to read, used_idx the next used entry to write. Both are
 * ours; the guest's copies are read once into a local, checked, and the local used. A chain that loops, leaves the
 * table or leaves the guest's memory faults the guest: nothing more is read from its rings.
 */
#ifndef XV_VRING_H
#define XV_VRING_H

#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>

#include "guest.h"
#include "mem.h"
#include "view.h"

/* What an epoll event points to. */
struct source {
	int fd;             /* -1: nothing to wait for */
	int epfd;           /* where it is registered, -1 if it is not */
	uint32_t generation; /* of the snapshot that last named it */
	uint64_t *events;   /* counter of its notifications, or NULL */
};

struct xv_vring {
	/* fixed */
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	const struct xv_mem *mem;
	struct xv_guest *guest;
	struct guest_queue *queue; /* counters and lock; bound by xv_publish() */
	uint32_t num, index;       /* index: of the vring in its device; bound by xv_publish() */
	uint16_t mask;
	uint8_t header_len;        /* of the virtio-net header: 10 or 12 bytes */
	bool event_idx, indirect, mergeable, csum, guest_csum, call_is_socket;
	uint32_t host_gso, guest_gso; /* GSO_BITs: what the guest may send, and what it takes */
	/* set by control while it runs */
	int call_fd;
	bool armed; /* a worker waits for a kick */
	bool enabled, call_asked; /* call_asked: interrupt the guest once, whatever the ring holds */
	/* the worker's; receive rings: whoever holds the queue's lock */
	uint16_t last_avail, used_idx, signalled;
	bool signalled_valid;
	struct xv_vring *stalled_on; /* transmit rings: the receive ring whose buffers ran out, or NULL */
	uint64_t patience, patience_at; /* transmit rings: cycles it may still wait for such a ring, and as of when */
	struct source kick;
};

/* Index (avail ring, descriptor table) that a hostile guest may not trick us past. */
static inline uint16_t ring_slot(const struct xv_vring *vr, uint16_t idx)
{
	return idx & vr->mask;
}

static inline bool vring_usable(const struct xv_vring *vr)
{
	return load_once(&vr->enabled) && !guest_faulted(vr->guest);
}

cold static void vring_fault(struct xv_vring *vr, enum xv_fault_code code, uint64_t detail)
{
	guest_fault(vr->guest, code, vr->index, detail);
}

/* Buffers the guest has made available and we have not read. 0 when it lies (and then it is faulted). */
static inline uint32_t vring_avail(struct xv_vring *vr)
{
	/* acquire pairs with the driver's write barrier before it moves avail.idx (virtio 1.2, 2.7.13.3) */
	uint16_t ready = (uint16_t)(load_acquire(&vr->avail->idx) - vr->last_avail);

	if (unlikely(ready > vr->num)) {
		vring_fault(vr, XV_FAULT_AVAIL_INDEX, ready);
		return 0;
	}
	return ready;
}

/* Whether there are buffers, asked by a worker that does not hold the queue's lock. */
static inline bool vring_has_buffers(const struct xv_vring *vr)
{
	return load_acquire(&vr->avail->idx) != load_once(&vr->last_avail);
}

static inline uint16_t vring_head(const struct xv_vring *vr, uint16_t avail_idx)
{
	return load_once(&vr->avail->ring[ring_slot(vr, avail_idx)]);
}

/* A private copy. Indirect tables may lie at any address. */
static inline struct vring_desc desc_read(const void *at)
{
	typedef uint64_t __attribute__((aligned(1), may_alias)) word;
	const volatile word *words = at;
	const uint64_t w[2] = {words[0], words[1]};
	struct vring_desc desc;

	memcpy(&desc, w, sizeof(desc));
	return desc;
}

/* Record a used element. Seen by the guest at the next vring_publish(). */
static inline void vring_use(struct xv_vring *vr, uint16_t head, uint32_t written)
{
	struct vring_used_elem *elem = &vr->used->ring[ring_slot(vr, vr->used_idx)];

	elem->id = head;
	elem->len = written;
	vr->used_idx++;
}

/* Make all used elements visible; returns whether the guest wants to be interrupted for them. */
static inline bool vring_publish(struct xv_vring *vr)
{
	uint16_t old = vr->signalled, now = vr->used_idx;
	bool first = !vr->signalled_valid;

	/* release pairs with the driver's read barrier after it read used.idx */
	store_release(&vr->used->idx, now);
	/* pairs with the driver's barrier between enabling interrupts and re-reading used.idx (virtio 1.2, 2.7.7.2) */
	full_barrier();
	if (vr->event_idx) {
		uint16_t event = load_once(&vr->avail->ring[vr->num]);

		vr->signalled = now;
		vr->signalled_valid = true;
		return first || (uint16_t)(now - event - 1) < (uint16_t)(now - old);
	}
	return !(load_once(&vr->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

static inline uint16_t *avail_event_of(const struct xv_vring *vr)
{
	return (uint16_t *)(void *)&vr->used->ring[vr->num];
}

/* Ask for a kick when the guest makes another buffer available. Then look at vring_avail() once more. */
static inline void vring_arm(struct xv_vring *vr)
{
	store_once(&vr->armed, true);
	if (vr->event_idx)
		store_once(avail_event_of(vr), vr->last_avail);
	else
		store_once(&vr->used->flags, (uint16_t)0);
}

/* Kicks are not needed. With event_idx a stale avail_event says so by itself. */
static inline void vring_disarm(struct xv_vring *vr)
{
	store_once(&vr->armed, false);
	if (!vr->event_idx)
		store_once(&vr->used->flags, (uint16_t)VRING_USED_F_NO_NOTIFY);
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
 * Walk the chain that starts at `head`, into at most `max` segments. Descriptors of the other direction end the walk:
 * CHAIN_WRONG_WAY, except that with `rest` set the walk may go on from readable to writable ones, which are counted in
 * `*rest` (the control virtqueue's shape). Zero-length descriptors are skipped. Every descriptor looked at, of whatever
 * kind, is paid for from `*budget`, so that no ring can keep a worker for longer than its owner allows: CHAIN_TOO_LONG.
 */
enum chain_result vring_chain(struct xv_vring *vr, uint16_t head, enum chain_direction direction, struct xv_seg *segs,
			      uint32_t max, uint32_t *nr, uint64_t *bytes, uint32_t *rest, uint32_t *budget);

/* Interrupt the guest. `worker_calling` is where the watchdog looks for a guest whose descriptor blocks. */
void vring_call(struct xv_vring *vr, uint64_t *calls, uint64_t *failed, const struct xv_vring **worker_calling);

#endif
