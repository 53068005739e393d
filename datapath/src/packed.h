/* SPDX-License-Identifier: Apache-2.0 */
/* What is particular to a packed virtqueue (virtio 1.2, 2.8). Part of vring.h. */
#ifndef XV_PACKED_H
#define XV_PACKED_H

#define PACKED_WRAP 0x8000u
#define PACKED_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define PACKED_USED (1u << VRING_PACKED_DESC_F_USED)
#define PACKED_CHAIN_MAX 1024u /* descriptors of a buffer in the ring: more are made up to keep us busy */

static inline uint32_t packed_slot(cursor at)
{
	return at & (PACKED_WRAP - 1u);
}

static inline cursor packed_advance(const struct xv_vring *vr, cursor at, uint32_t slots)
{
	uint32_t slot = packed_slot(at) + slots, wrap = at & PACKED_WRAP;

	if (slot >= vr->num) {
		slot -= vr->num;
		wrap ^= PACKED_WRAP;
	}
	return (cursor)(slot | wrap);
}

/* Available: the avail bit is as the wrap counter, the used bit is not (2.8.1). */
static inline bool packed_flags_available(uint16_t flags, cursor at)
{
	const uint16_t want = at & PACKED_WRAP ? PACKED_AVAIL : PACKED_USED;

	return (flags & (PACKED_AVAIL | PACKED_USED)) == want;
}

static inline bool packed_is_available(const struct xv_vring *vr, cursor at)
{
	return packed_flags_available(load_acquire(&vr->packed_desc[packed_slot(at)].flags), at);
}

/* How long a chain is and what its buffer is called is decided here, once: the last descriptor has the id (2.8.6). */
cold static bool packed_chain_extent(struct xv_vring *vr, struct xv_buf *buf)
{
	const struct vring_packed_desc *desc;
	uint32_t slot = packed_slot(buf->at), slots = 1;

	do {
		if (slots == MIN(vr->num, PACKED_CHAIN_MAX)) {
			vring_fault(vr, XV_FAULT_CHAIN, slot);
			return false;
		}
		slots++;
		slot = slot + 1 == vr->num ? 0 : slot + 1;
		desc = &vr->packed_desc[slot];
	} while (load_once(&desc->flags) & VRING_DESC_F_NEXT);
	buf->id = load_once(&desc->id);
	buf->slots = (uint16_t)slots;
	return true;
}

static inline uint32_t packed_peek(struct xv_vring *vr, cursor at, struct xv_buf *bufs, struct vring_desc *descs, uint32_t n,
				   const bool chains)
{
	const uint32_t num = vr->num, most = MIN(num, PACKED_CHAIN_MAX);
	uint32_t slot = packed_slot(at), wrap = at & PACKED_WRAP;
	/* those that have been read and not used; after a whole lap the flags would still say "available" */
	uint32_t slots = slot - packed_slot(vr->next) + ((at ^ vr->next) & PACKED_WRAP ? num : 0), i;

	for (i = 0; i < n && slots < most; i++) {
		const struct vring_packed_desc *desc = &vr->packed_desc[slot];
		/* acquire pairs with the driver's write barrier before it writes the flags (2.8.21.1) */
		const uint16_t flags = load_acquire(&desc->flags);

		if (!packed_flags_available(flags, (cursor)wrap))
			break;
		bufs[i] = (struct xv_buf){load_once(&desc->id), 1, (cursor)(slot | wrap), 0};
		descs[i] = (struct vring_desc){
			.addr = load_once(&desc->addr),
			.len = load_once(&desc->len),
			.flags = flags & (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT),
		};
		if (unlikely(flags & VRING_DESC_F_NEXT)) {
			if (!chains) {
				i++;
				break;
			}
			if (!packed_chain_extent(vr, &bufs[i]))
				break;
			if (slots + bufs[i].slots > num) { /* it runs into what has been read before it */
				vring_fault(vr, XV_FAULT_CHAIN, slot);
				break;
			}
		}
		slots += bufs[i].slots;
		slot += bufs[i].slots;
		if (unlikely(slot >= num)) {
			slot -= num;
			wrap ^= PACKED_WRAP;
		}
	}
	return i;
}

/*
 * With VIRTIO_F_IN_ORDER one used descriptor says it of all of a batch: it lies where the first one is, and has the last
 * one's id (2.8.21.2). It has one length too, so this is for buffers into which nothing was written.
 */
static inline void packed_use_batch(struct xv_vring *vr, const struct xv_buf *bufs, uint32_t n)
{
	const uint32_t slot = packed_slot(vr->next);
	const uint16_t flags = vr->next & PACKED_WRAP ? PACKED_AVAIL | PACKED_USED : 0;
	uint32_t slots = 0;

	if (unlikely(!n))
		return;
	for (uint32_t i = 0; i < n; i++)
		slots += bufs[i].slots;
	store_once(&vr->packed_desc[slot].id, bufs[n - 1].id);
	store_once(&vr->packed_desc[slot].len, 0u);
	if (vr->next == vr->published)
		vr->first_flags = flags; /* packed_publish() writes them */
	else
		store_release(&vr->packed_desc[slot].flags, flags);
	vr->next = packed_advance(vr, vr->next, slots);
}

static inline void packed_use(struct xv_vring *vr, const struct xv_buf *bufs, const uint32_t *written, uint32_t n)
{
	const uint32_t num = vr->num;
	uint32_t slot = packed_slot(vr->next), wrap = vr->next & PACKED_WRAP, i = 0;

	if (!written && vr->in_order) {
		packed_use_batch(vr, bufs, n);
		return;
	}
	for (; i < n; i++) {
		struct vring_packed_desc *desc = &vr->packed_desc[slot];
		const uint32_t len = written ? written[i] : 0;
		const uint16_t flags = (uint16_t)((wrap ? PACKED_AVAIL | PACKED_USED : 0) | (len ? VRING_DESC_F_WRITE : 0));

		store_once(&desc->id, bufs[i].id);
		store_once(&desc->len, len);
		if (unlikely((slot | wrap) == vr->published))
			vr->first_flags = flags; /* the driver looks no further than this one before it is written */
		else
			store_once(&desc->flags, flags);
		slot += bufs[i].slots;
		if (unlikely(slot >= num)) {
			slot -= num;
			wrap ^= PACKED_WRAP;
		}
	}
	vr->next = (cursor)(slot | wrap);
}

/*
 * Of one ring in a region of the front-end's that outlives us ("Inflight I/O tracking" of vhost-user: QueueRegionPacked).
 * Buffers are used in order and within a turn, so the cursor says it all, and the list of descriptors stays empty. The
 * new cursor is written before the ring shows it and the old one after: a successor that finds them different looks at
 * the ring.
 */
struct inflight_packed {
	uint64_t features;
	uint16_t version, desc_num, free_head, old_free_head;
	uint16_t used_idx, old_used_idx;
	uint8_t used_wrap_counter, old_used_wrap_counter;
	uint8_t padding[7];
};

/* The descriptors from `published` to `next`: one in each chain was written. */
cold static void packed_log(const struct xv_vring *vr)
{
	uint32_t from = packed_slot(vr->published);
	const uint32_t to = packed_slot(vr->next), size = (uint32_t)sizeof(vr->packed_desc[0]);

	if (from >= to) {
		vring_wrote_ring(vr, &vr->packed_desc[from], (vr->num - from) * size);
		from = 0;
	}
	if (to > from)
		vring_wrote_ring(vr, &vr->packed_desc[from], (to - from) * size);
}

static inline void packed_publish(struct xv_vring *vr)
{
	struct vring_packed_desc *desc = &vr->packed_desc[packed_slot(vr->published)];

	if (unlikely(vr->published == vr->next)) /* one by one: packed_use_inflight() */
		return;
	if (unlikely(vr->inflight)) {
		store_once(&vr->inflight->used_idx, (uint16_t)packed_slot(vr->next));
		store_once(&vr->inflight->used_wrap_counter, (uint8_t)(vr->next / PACKED_WRAP));
	}
	/* release pairs with the driver's read barrier after it read the flags: what was used behind it is there too */
	store_release(&desc->flags, vr->first_flags);
	if (unlikely(vr->log_used))
		packed_log(vr);
	vr->published = vr->next;
	if (unlikely(vr->inflight)) {
		store_release(&vr->inflight->old_used_idx, (uint16_t)packed_slot(vr->next));
		store_once(&vr->inflight->old_used_wrap_counter, (uint8_t)(vr->next / PACKED_WRAP));
	}
}

/*
 * With an in-flight region each buffer is shown by itself: descriptors behind the first one of a batch say "used" before
 * the cursor has moved, and a successor could not tell where the batch was to end.
 */
cold static void packed_use_inflight(struct xv_vring *vr, const struct xv_buf *bufs, const uint32_t *written, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		packed_use(vr, &bufs[i], written ? &written[i] : NULL, 1);
		packed_publish(vr);
	}
}

static inline bool packed_wants_call(const struct xv_vring *vr, cursor old, cursor now, bool first)
{
	const uint16_t flags = load_once(&vr->driver->flags) & 3u;
	uint16_t off_wrap, event, slot = (uint16_t)packed_slot(now), before = (uint16_t)packed_slot(old);

	if (flags != VRING_PACKED_EVENT_FLAG_DESC)
		return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
	if (first || !vr->event_idx)
		return true;
	off_wrap = load_once(&vr->driver->off_wrap);
	event = off_wrap & (PACKED_WRAP - 1u);
	if (slot <= before)
		before = (uint16_t)(before - vr->num);
	if ((off_wrap ^ now) & PACKED_WRAP)
		event = (uint16_t)(event - vr->num);
	return (uint16_t)(slot - event - 1) < (uint16_t)(slot - before);
}

static inline void packed_arm_at(struct xv_vring *vr, cursor at)
{
	if (vr->event_idx) {
		store_once(&vr->device->off_wrap, at);
		store_release(&vr->device->flags, (uint16_t)VRING_PACKED_EVENT_FLAG_DESC);
	} else {
		store_once(&vr->device->flags, (uint16_t)VRING_PACKED_EVENT_FLAG_ENABLE);
	}
	vring_wrote_ring(vr, vr->device, sizeof(*vr->device));
}

/* For a buffer behind those that are there. */
static inline void packed_arm_behind(struct xv_vring *vr)
{
	cursor at = vr->next;

	for (uint32_t i = 0; i < MIN(vr->num, PACKED_CHAIN_MAX) && packed_is_available(vr, at); i++)
		at = packed_advance(vr, at, 1);
	packed_arm_at(vr, at);
}

static inline void packed_disarm(struct xv_vring *vr)
{
	store_once(&vr->device->flags, (uint16_t)VRING_PACKED_EVENT_FLAG_DISABLE);
	vring_wrote_ring(vr, vr->device, sizeof(*vr->device));
}

#endif
