// SPDX-License-Identifier: Apache-2.0
#include "ingress.h"

#include "switch.h"

static const struct policy no_policy; /* says nothing */

/* Of a frame in one piece, nearly always. */
static inline bool is_plain(const struct xv_view *view, uint32_t bytes)
{
	return likely(!view->nr_more && view->first.len > bytes && !view->gso_type);
}

static inline always_inline void give_plain_head(struct xv_view *view, uint8_t *head, const uint32_t bytes,
						 struct ingress_room *room)
{
	struct xv_seg *rest = &room->segs[room->nr_segs++];

	memcpy(head, view->first.data, bytes);
	*rest = (struct xv_seg){view->first.data + bytes, view->first.len - bytes};
	view->first = (struct xv_seg){head, bytes};
	view->more = rest;
	view->nr_more = 1;
}

static void give_any_head(struct xv_view *view, uint8_t *head, uint32_t bytes, struct ingress_room *room)
{
	struct xv_seg *rest = &room->segs[room->nr_segs];
	uint32_t skip, nr = 0;

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

/* Have more of the frame in its long head, up to this many bytes. */
static cold void extend_head(struct xv_view *view, uint32_t bytes)
{
	struct xv_seg *rest = (struct xv_seg *)(uintptr_t)view->more; /* the room's */

	for (; view->nr_more && view->first.len < bytes; view->more = rest) {
		const uint32_t piece = MIN(bytes - view->first.len, rest->len);

		memcpy(view->first.data + view->first.len, rest->data, piece);
		view->first.len += piece;
		*rest = (struct xv_seg){rest->data + piece, rest->len - piece};
		if (!rest->len) {
			rest++;
			view->nr_more--;
		}
	}
}

/* Give the view a head. A long one is enough for IP addresses, nearly always, and has all headers of a GSO frame. */
static inline always_inline void give_head(struct xv_view *view, bool is_long, struct ingress_room *room)
{
	const uint32_t i = room->nr++;

	if (likely(!is_long)) {
		if (is_plain(view, INGRESS_HEAD))
			give_plain_head(view, room->heads[i] + TAG_BYTES, INGRESS_HEAD, room);
		else
			give_any_head(view, room->heads[i] + TAG_BYTES, INGRESS_HEAD, room);
		return;
	}
	if (is_plain(view, IP_GUARD_FEW))
		give_plain_head(view, room->long_heads[i] + TAG_BYTES, IP_GUARD_FEW, room);
	else
		give_any_head(view, room->long_heads[i] + TAG_BYTES, view->gso_type ? view->gso->len : IP_GUARD_FEW, room);
}

/* What it says of its addresses is true. */
static bool is_honest(const struct ip_guard *guard, struct xv_view *view)
{
	enum ip_verdict verdict = ip_guard_judge(guard, view->first.data, view->first.len, view->len);

	if (unlikely(verdict == IP_UNSEEN)) {
		extend_head(view, IP_GUARD_BYTES);
		verdict = ip_guard_judge(guard, view->first.data, view->first.len, view->len);
	}
	return verdict == IP_PASSES;
}

static bool owns_source(const struct snapshot *snap, uint32_t index, const uint8_t *header)
{
	return mac_owner(snap, header + 6, frame_vlan(header)) == index;
}

/* The same, of a guest that learns. What control has given it since then does not age as long as it is used. */
static bool may_use(const struct snapshot *snap, uint32_t index, const uint8_t *header)
{
	const uint64_t mac = filter_word(header + 6);
	const uint32_t owner = mac_owner(snap, header + 6, frame_vlan(header));
	const struct port *port = &snap->ports[index];

	if (owner != index && owner != NO_PORT)
		return false;
	return guest_learns(port->guest, port->learned, mac_key(header + 6, frame_vlan(header)),
			    owner == NO_PORT && mac && !filter_is_group(mac)) ||
	       owner == index;
}

/* More group frames than it may send. */
static bool is_storm(struct bucket *storm, const struct xv_view *view)
{
	const uint32_t frames = view->gso_type ? (view->len - view->gso->len + view->gso_size - 1) / view->gso_size : 1;

	return !bucket_take(storm, cycles_now(), &frames, 1);
}

/* Of any kind that switches go by. */
static inline bool looks_tagged(const uint8_t *type)
{
	return net_is_tag(type) || be16(type) == 0x9100;
}

/* Whether the guest may send a frame tagged like this; an access port's gets its tag. */
static inline always_inline enum xv_drop judge_vlan(const struct policy *policy, struct xv_view *view)
{
	const bool tagged = tag_is_first(view);

	if (policy->is_trunk)
		return tagged && policy_has_vlan(policy, frame_vlan(view->first.data)) ? XV_DROP_MAX : XV_DROP_VLAN;
	if (tagged) {
		const uint16_t tci = be16(view->first.data + 14);

		/* the tag may say a priority and no VLAN, and there may be no other: some switch would take ours off */
		if (tci & VID_MASK || looks_tagged(view->first.data + 16))
			return XV_DROP_VLAN;
		tag_set(view, (uint16_t)(tci | policy->access));
		return XV_DROP_MAX;
	}
	if (looks_tagged(view->first.data + 12))
		return XV_DROP_VLAN;
	return tag_push(view, (uint16_t)policy->access) ? XV_DROP_MAX : XV_DROP_BAD_HEADER;
}

/*
 * Whether the checksum that is to be finished lies behind what is judged: it is written later, and the guest chooses its
 * value by its payload. A GSO frame's has been checked against its headers (gso_check()).
 */
static bool csum_is_behind(const struct policy *policy, const struct xv_view *view)
{
	struct net_headers h;
	uint32_t field;

	if (!policy->guard)
		return view->csum_start >= (tag_is_first(view) ? TAGGED_HEADER : ETH_HEADER);
	/* the guard looks at ports, and at all of neighbour discovery */
	if (!net_parse(view->first.data, view->first.len, &h) || h.protocol == IPPROTO_ICMPV6)
		return false;
	field = net_csum_field(h.protocol);
	if (!field)
		return view->csum_start >= h.transport && !ip_guard_looks_behind(h.protocol);
	return (view->csum_start == h.transport && view->csum_offset == field) || view->csum_start >= h.transport + 8;
}

static inline bool is_own(const struct port *port, const uint8_t *header)
{
	return likely(filter_word(header + 6) == port->mac);
}

/* Why the view is not to go on; XV_DROP_MAX: it is. `more`: the policy has more than VLANs and a fixed set of addresses. */
static inline always_inline enum xv_drop judge(const struct snapshot *snap, const struct origin *from,
					       const struct policy *policy, struct xv_view *view, const bool more)
{
	const bool strict = policy->flags & XV_POLICY_SPOOF_CHECK;
	const struct port *port = &snap->ports[from->port];
	enum xv_drop why;

	if (unlikely(policy->flags & XV_POLICY_LINK_DOWN))
		return XV_DROP_LINK_DOWN;
	if (policy->access | policy->is_trunk) {
		why = judge_vlan(policy, view);
		if (unlikely(why != XV_DROP_MAX))
			return why;
	}
	if (unlikely(view->flags & VIEW_NEEDS_CSUM && !view->gso_type) && !csum_is_behind(policy, view))
		return XV_DROP_BAD_HEADER;
	if (!more) {
		if (strict && !is_own(port, view->first.data) && !owns_source(snap, from->port, view->first.data))
			return XV_DROP_SPOOFED;
		return XV_DROP_MAX;
	}
	if (!is_own(port, view->first.data) && (strict || port->learned) &&
	    !(port->learned ? may_use(snap, from->port, view->first.data) : owns_source(snap, from->port, view->first.data)) &&
	    strict)
		return XV_DROP_SPOOFED;
	if (policy->guard && unlikely(!is_honest(policy->guard, view)))
		return XV_DROP_IP_SPOOFED;
	if (port->storm && view->first.data[0] & 1 && !from->announces && is_storm(port->storm, view))
		return XV_DROP_STORM;
	return XV_DROP_MAX;
}

static inline always_inline uint32_t judge_all(const struct snapshot *snap, const struct origin *from,
					       const struct policy *policy, struct xv_burst *burst, struct ingress_room *room,
					       const bool more)
{
	uint32_t refused = 0;

	room->nr = room->nr_segs = 0;
	for (uint32_t i = 0; i < burst->nr; i++) {
		struct xv_view *view = &burst->views[i];
		enum xv_drop why;

		give_head(view, more && policy->guard, room);
		why = judge(snap, from, policy, view, more);
		if (unlikely(why != XV_DROP_MAX)) {
			view->flags |= VIEW_REFUSED;
			view_tx_dropped(view, why);
			count(from->drops[why], 1);
			refused++;
		}
	}
	return refused;
}

uint32_t ingress_burst(const struct snapshot *snap, const struct origin *from, struct xv_burst *burst,
		       struct ingress_room *room)
{
	const struct port *port = &snap->ports[from->port];
	const struct policy *policy = port->policy ? port->policy : &no_policy;

	if (policy->guard || port->learned || port->storm)
		return judge_all(snap, from, policy, burst, room, true);
	return judge_all(snap, from, policy, burst, room, false);
}
