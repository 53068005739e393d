/* SPDX-License-Identifier: Apache-2.0 */
/*
 * VLAN tags (IEEE 802.1Q). Inside the switch every frame carries its VLAN in its own tag. An access port's frames get it
 * where they come in, and lose it where they go out: by moving the two addresses in front of it, 12 bytes, never the rest
 * of the frame, so that the one copy is made of what is to be there.
 */
#ifndef XV_TAG_H
#define XV_TAG_H

#include "gso.h"

#define TAG_BYTES 4u
#define TAGGED_HEADER (ETH_HEADER + TAG_BYTES)
#define VID_MASK 0x0fffu

/*
 * The VLAN of the frame with this header (TAGGED_HEADER bytes): 0 without a tag and with VLAN 0, which is a priority
 * only. A service tag (802.1ad) is no VLAN of ours, but it is a tag: XV_VLAN_ANY, as bpf/steer.bpf.c has it.
 */
static inline uint16_t frame_vlan(const uint8_t *header)
{
	if (unlikely(header[12] == 0x81 && header[13] == 0x00))
		return (uint16_t)(be16(header + 14) & VID_MASK);
	return unlikely(header[12] == 0x88 && header[13] == 0xa8) ? XV_VLAN_ANY : 0;
}

/* Whether the frame begins with a whole customer tag, in its first piece. */
static inline bool tag_is_first(const struct xv_view *view)
{
	return view->first.len >= TAGGED_HEADER && view->first.data[12] == 0x81 && view->first.data[13] == 0x00;
}

/* The same for a frame of any layout. */
static inline uint16_t view_vlan(const struct xv_view *view)
{
	uint8_t copy[TAGGED_HEADER] = {0};

	if (likely(view->first.len >= TAGGED_HEADER))
		return frame_vlan(view->first.data);
	view_peek(view, copy, sizeof(copy));
	return frame_vlan(copy);
}

/* Move the two addresses by TAG_BYTES, forward or back. */
static inline void tag_move_addresses(uint8_t *to, const uint8_t *from)
{
	uint64_t first;
	uint32_t last;

	memcpy(&first, from, sizeof(first));
	memcpy(&last, from + 8, sizeof(last));
	memcpy(to, &first, sizeof(first));
	memcpy(to + 8, &last, sizeof(last));
}

/* Give the tag that a frame has, in a first piece of ours, another value. */
static inline void tag_set(struct xv_view *view, uint16_t tci)
{
	put_be16(view->first.data + 14, tci);
	if (unlikely(view->gso_type))
		gso_set_tag(view, tci);
}

/*
 * Put a tag into a frame whose first piece is ours and has TAG_BYTES to spare in front. False: its headers have no room for
 * it (GSO), or it would push the checksum out of what 16 bits can say.
 */
static inline bool tag_push(struct xv_view *view, uint16_t tci)
{
	uint8_t *old = view->first.data;

	if (unlikely(view->csum_start > UINT16_MAX - TAG_BYTES && view->flags & VIEW_NEEDS_CSUM))
		return false;
	if (unlikely(view->gso_type) && !gso_push_tag(view, tci))
		return false;
	view->first.data = old - TAG_BYTES;
	view->first.len += TAG_BYTES;
	view->len += TAG_BYTES;
	view->csum_start = (uint16_t)(view->csum_start + TAG_BYTES);
	tag_move_addresses(view->first.data, old);
	put_be16(old + 8, 0x8100);
	put_be16(old + 10, tci);
	return true;
}

/* Take the tag out (tag_is_first() says that there is one); what it was. */
static inline uint16_t tag_pop(struct xv_view *view)
{
	const uint16_t tci = be16(view->first.data + 14);

	if (unlikely(view->gso_type))
		gso_pop_tag(view);
	view->first.data += TAG_BYTES;
	view->first.len -= TAG_BYTES;
	view->len -= TAG_BYTES;
	view->csum_start = (uint16_t)(view->csum_start - TAG_BYTES);
	tag_move_addresses(view->first.data, view->first.data - TAG_BYTES);
	return tci;
}

#endif
