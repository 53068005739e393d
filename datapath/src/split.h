/* SPDX-License-Identifier: Apache-2.0 */
/* What is particular to a split virtqueue (virtio 1.2, 2.7). Part of vring.h. */
#ifndef XV_SPLIT_H
#define XV_SPLIT_H

/* Index (avail ring, used ring) that a hostile guest may not trick us past. */
static inline uint16_t ring_slot(const struct xv_vring *vr, uint16_t idx)
{
	return idx & vr->mask;
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

static inline uint32_t split_peek(struct xv_vring *vr, cursor at, struct xv_buf *bufs, struct vring_desc *descs, uint32_t n)
{
	/* acquire pairs with the driver's write barrier before it moves avail.idx (2.7.13.3) */
	const uint16_t offered = (uint16_t)(load_acquire(&vr->avail->idx) - vr->next), read = (uint16_t)(at - vr->next);

	if (unlikely(offered > vr->num)) {
		vring_fault(vr, XV_FAULT_AVAIL_INDEX, offered);
		return 0;
	}
	if (offered <= read)
		return 0;
	n = MIN(n, (uint32_t)(offered - read));
	for (uint32_t i = 0; i < n; i++) {
		const uint16_t head = load_once(&vr->avail->ring[ring_slot(vr, (uint16_t)(at + i))]);

		if (unlikely(head >= vr->num)) {
			vring_fault(vr, XV_FAULT_HEAD, head);
			n = i;
			break;
		}
		bufs[i].id = head;
		prefetch(&vr->desc[head]);
	}
	for (uint32_t i = 0; i < n; i++)
		descs[i] = desc_read(&vr->desc[bufs[i].id]);
	return n;
}

static inline void split_use(struct xv_vring *vr, const struct xv_buf *bufs, const uint32_t *written, uint32_t n)
{
	struct vring_used_elem *ring = vr->used->ring;
	const uint16_t mask = vr->mask;
	uint16_t next = vr->next;

	/*
	 * With VIRTIO_F_IN_ORDER one entry says it of all of a batch: it lies where the first one's would, and has the last
	 * one's id (2.7.13). It has one length too, so this is for buffers into which nothing was written.
	 */
	if (!written && vr->in_order && n) {
		ring[next & mask].id = bufs[n - 1].id;
		ring[next & mask].len = 0;
		vr->next = (uint16_t)(next + n);
		return;
	}
	for (uint32_t i = 0; i < n; i++, next++) {
		struct vring_used_elem *elem = &ring[next & mask];

		elem->id = bufs[i].id;
		elem->len = written ? written[i] : 0;
	}
	vr->next = next;
}

static inline void split_publish(struct xv_vring *vr)
{
	/* release pairs with the driver's read barrier after it read used.idx */
	store_release(&vr->used->idx, vr->next);
	if (unlikely(vr->log_used)) {
		for (uint16_t i = vr->published; i != vr->next; i++)
			vring_wrote_ring(vr, &vr->used->ring[ring_slot(vr, i)], sizeof(vr->used->ring[0]));
		vring_wrote_ring(vr, vr->used, 4);
	}
	vr->published = vr->next;
}

static inline bool split_wants_call(const struct xv_vring *vr, cursor old, cursor now, bool first)
{
	if (vr->event_idx) {
		uint16_t event = load_once(&vr->avail->ring[vr->num]);

		return first || (uint16_t)(now - event - 1) < (uint16_t)(now - old);
	}
	return !(load_once(&vr->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
}

static inline uint16_t *avail_event_of(const struct xv_vring *vr)
{
	return (uint16_t *)(void *)&vr->used->ring[vr->num];
}

static inline void split_arm_at(struct xv_vring *vr, cursor at)
{
	if (vr->event_idx) {
		store_once(avail_event_of(vr), at);
		vring_wrote_ring(vr, avail_event_of(vr), 2);
	} else {
		store_once(&vr->used->flags, (uint16_t)0);
		vring_wrote_ring(vr, vr->used, 2);
	}
}

/* With event_idx a stale avail_event says by itself that kicks are not needed. */
static inline void split_disarm(struct xv_vring *vr)
{
	if (!vr->event_idx) {
		store_once(&vr->used->flags, (uint16_t)VRING_USED_F_NO_NOTIFY);
		vring_wrote_ring(vr, vr->used, 2);
	}
}

#endif
