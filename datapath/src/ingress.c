// SPDX-License-Identifier: Apache-2.0
#include "ingress.h"

#include "switch.h"

/* Of a frame in one piece, nearly always. */
static inline bool is_plain(const struct xv_view *view)
{
	return likely(!view->nr_more && view->first.len > INGRESS_HEAD && !view->gso_type);
}

static inline always_inline void give_plain_head(struct xv_view *view, struct ingress_room *room)
{
	uint8_t *head = room->heads[room->nr++] + TAG_BYTES;
	struct xv_seg *rest = &room->segs[room->nr_segs++];

	memcpy(head, view->first.data, INGRESS_HEAD);
	*rest = (struct xv_seg){view->first.data + INGRESS_HEAD, view->first.len - INGRESS_HEAD};
	view->first = (struct xv_seg){head, INGRESS_HEAD};
	view->more = rest;
	view->nr_more = 1;
}

static void give_head(struct xv_view *view, struct ingress_room *room)
{
	uint8_t *head = room->heads[room->nr++] + TAG_BYTES;
	struct xv_seg *rest = &room->segs[room->nr_segs];
	uint32_t bytes = INGRESS_HEAD, skip, nr = 0;

	/* the headers of a GSO frame have been copied and checked: those go on */
	if (view->gso_type)
		memcpy(head, view->gso->bytes, bytes);
	else
		bytes = view_peek(view, head, bytes);
	skip = bytes;
	for (uint32_t i = 0; i <= view->nr_more; i++) {
		const struct xv_seg *seg = i ? &view->more[i - 1] : &view->first;

		if (seg->len <= skip) {
			skip -= seg->len;
			continue;
		}
		rest[nr++] = (struct xv_seg){seg->data + skip, seg->len - skip};
		skip = 0;
	}
	view->first = (struct xv_seg){head, bytes};
	view->more = rest;
	view->nr_more = (uint16_t)nr;
	room->nr_segs += nr;
}

/* Whether the guest may send a frame tagged like this; an access port's gets its tag. */
static enum xv_drop judge_vlan(const struct policy *policy, struct xv_view *view)
{
	const bool tagged = tag_is_first(view);

	if (policy->is_trunk)
		return tagged && policy_has_vlan(policy, frame_vlan(view->first.data)) ? XV_DROP_MAX : XV_DROP_VLAN;
	if (tagged) {
		uint8_t *tci = view->first.data + 14;

		if (be16(tci) & VID_MASK)
			return XV_DROP_VLAN;
		put_be16(tci, be16(tci) | policy->access); /* a priority keeps it */
		return XV_DROP_MAX;
	}
	if (net_is_tag(view->first.data + 12))
		return XV_DROP_VLAN;
	return tag_push(view, (uint16_t)policy->access) ? XV_DROP_MAX : XV_DROP_BAD_HEADER;
}

/* Why the view is not to go on; XV_DROP_MAX: it is. */
static inline always_inline enum xv_drop judge(const struct snapshot *snap, uint32_t index, const struct policy *policy,
					       struct xv_view *view)
{
	const struct port *port = &snap->ports[index];
	enum xv_drop why;

	if (unlikely(policy->flags & XV_POLICY_LINK_DOWN))
		return XV_DROP_LINK_DOWN;
	if (policy->access | policy->is_trunk) {
		why = judge_vlan(policy, view);
		if (unlikely(why != XV_DROP_MAX))
			return why;
	}
	if (policy->flags & XV_POLICY_SPOOF_CHECK && unlikely(filter_word(view->first.data + 6) != port->mac) &&
	    mac_owner(snap, view->first.data + 6, frame_vlan(view->first.data)) != index)
		return XV_DROP_SPOOFED;
	return XV_DROP_MAX;
}

uint32_t ingress_burst(const struct snapshot *snap, const struct origin *from, struct xv_burst *burst,
		       struct ingress_room *room)
{
	const struct policy *policy = snap->ports[from->port].policy;
	uint32_t refused = 0;

	room->nr = room->nr_segs = 0;
	for (uint32_t i = 0; i < burst->nr; i++) {
		struct xv_view *view = &burst->views[i];
		enum xv_drop why;

		if (is_plain(view))
			give_plain_head(view, room);
		else
			give_head(view, room);
		why = judge(snap, from->port, policy, view);
		if (unlikely(why != XV_DROP_MAX)) {
			view->flags |= VIEW_REFUSED;
			count(from->drops[why], 1);
			refused++;
		}
	}
	return refused;
}
