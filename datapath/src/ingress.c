// SPDX-License-Identifier: Apache-2.0
#include "ingress.h"

#include "switch.h"

static void give_head(struct xv_view *view, struct ingress_room *room)
{
	uint8_t *head = room->heads[room->nr++] + TAG_BYTES;
	struct xv_seg *rest = &room->segs[room->nr_segs];
	uint32_t bytes = INGRESS_HEAD, skip, nr = 0;

	if (likely(!view->nr_more && view->first.len > INGRESS_HEAD && !view->gso_type)) {
		memcpy(head, view->first.data, INGRESS_HEAD);
		rest[nr++] = (struct xv_seg){view->first.data + INGRESS_HEAD, view->first.len - INGRESS_HEAD};
	} else {
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
	if (!policy->access)
		return XV_DROP_MAX;
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

static bool owns_source(const struct snapshot *snap, uint32_t index, const uint8_t *header)
{
	return likely(filter_word(header + 6) == snap->ports[index].mac) ||
	       mac_owner(snap, header + 6, frame_vlan(header)) == index;
}

bool ingress_admits(const struct snapshot *snap, const struct origin *from, struct xv_view *view, struct ingress_room *room)
{
	const struct policy *policy = snap->ports[from->port].policy;
	enum xv_drop why;

	give_head(view, room);
	why = policy->flags & XV_POLICY_LINK_DOWN ? XV_DROP_LINK_DOWN : judge_vlan(policy, view);
	if (likely(why == XV_DROP_MAX) && policy->flags & XV_POLICY_SPOOF_CHECK &&
	    unlikely(!owns_source(snap, from->port, view->first.data)))
		why = XV_DROP_SPOOFED;
	if (likely(why == XV_DROP_MAX))
		return true;
	count(from->drops[why], 1);
	return false;
}
