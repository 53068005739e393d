// SPDX-License-Identifier: Apache-2.0
#include "switch.h"

#include "ingress.h"

#define TO_FLOOD (UINT32_MAX - 1)
#define TO_NOBODY (UINT32_MAX - 2) /* it may not be sent, and has been counted */

static void mark_dirty(struct dirty *dirty, struct xv_nicq *nicq)
{
	for (uint32_t i = 0; i < dirty->nr; i++)
		if (dirty->queues[i] == nicq)
			return;
	if (dirty->nr == DIRTY_MAX) {
		nicq_tx_flush(nicq);
		return;
	}
	dirty->queues[dirty->nr++] = nicq;
}

/* The last address that was looked up: the frames of a burst mostly go to the same. */
struct lookup {
	uint64_t key;
	uint32_t port;
};

static inline always_inline uint32_t find_destination(const struct snapshot *snap, const struct xv_view *view,
						      struct lookup *last)
{
	uint8_t copy[TAGGED_HEADER];
	const uint8_t *header = view->first.data;
	uint16_t vlan;
	uint64_t key;

	if (unlikely(view->first.len < sizeof(copy))) {
		memset(copy, 0, sizeof(copy));
		view_peek(view, copy, sizeof(copy));
		header = copy;
	}
	vlan = frame_vlan(header);
	key = mac_key(header, vlan);
	if (key != last->key)
		*last = (struct lookup){key, header[0] & 1 ? TO_FLOOD : mac_owner(snap, header, vlan)};
	return last->port;
}

/* The receive ring of pair `hint`, of those below `n`, or the next one that is switched on. NULL: none is. */
static struct xv_vring *usable_ring(const struct port *port, uint32_t hint, uint32_t n)
{
	for (uint32_t i = 0, at = n > 1 ? hint % n : 0; i < n; i++, at = at + 1 == n ? 0 : at + 1)
		if (port->rx[at] && vring_usable(port->rx[at]))
			return port->rx[at];
	return NULL;
}

static struct xv_vring *rx_ring(const struct port *port, uint32_t hint)
{
	return usable_ring(port, hint, port->own_ctrl ? MIN(port->nr_rx, load_once(&port->guest->ctrl.pairs)) : port->nr_rx);
}

static void drop_rx(struct guest_queue *queue, enum xv_drop why, uint32_t n)
{
	spin_lock(&queue->rx_lock);
	count(queue->rx.drops[why], n);
	spin_unlock(&queue->rx_lock);
}

static void drop_to_pair(const struct port *port, uint32_t pair, enum xv_drop why, uint32_t n)
{
	drop_rx(&port->guest->queues[pair % port->guest->max_pairs], why, n);
}

/* How many frames these views stand for. */
static uint32_t frames_of(const struct xv_view *const *views, uint32_t n)
{
	uint32_t frames = 0;

	for (uint32_t i = 0; i < n; i++)
		frames += gso_frames(views[i]);
	return frames;
}

void switch_drop_stalled(struct xv_vring *stalled, uint32_t n)
{
	if (n)
		drop_rx(stalled->queue, XV_DROP_NO_BUFFERS, n);
}

void switch_give_up(const struct snapshot *snap, struct xv_vring *stalled, const struct xv_burst *burst, uint32_t done,
		    struct call_ctx *ctx)
{
	const struct xv_view *rest = burst->views + done;

	if (done == burst->nr)
		return;
	drop_rx(stalled->queue, XV_DROP_NO_BUFFERS, burst->nr - done);
	if (unlikely(snap->ports[rest->to].capture))
		capture_row(snap->ports[rest->to].capture, &ctx->capture, rest, burst->nr - done, CAPTURE_TO,
			    stalled->index / 2, XV_DROP_NO_BUFFERS);
}

/* The same of views for one port that can't wait; of a flood, those of its VLANs. */
static void give_up(const struct port *port, struct xv_vring *stalled, const struct xv_view *const *views, uint32_t n,
		    struct call_ctx *ctx)
{
	const struct xv_view *mine[XV_BURST];
	uint32_t nr = 0;

	for (uint32_t i = 0; port->gated && i < n; i++)
		if (policy_has_vlan(port->policy, view_vlan(views[i])))
			mine[nr++] = views[i];
	if (port->gated) {
		views = mine;
		n = nr;
	}
	switch_drop_stalled(stalled, frames_of(views, n));
	if (unlikely(port->capture))
		capture_views(port->capture, &ctx->capture, views, n, CAPTURE_TO, stalled->index / 2, XV_DROP_NO_BUFFERS);
}

uint32_t switch_joins(const struct port *port)
{
	return port->join & load_once(&port->guest->offloads);
}

/*
 * Whether a ring takes a frame in one piece. One that was joined for this guest (it has no gso) was found fit for that in
 * this very turn; if the guest has switched it off meanwhile, it is not told so before the turn ends.
 */
static inline bool takes(const struct xv_vring *vr, const struct xv_view *view)
{
	return likely(!view->gso_type) || !view->gso ||
	       net_gso_allowed(view->gso_type, vr->guest_gso & load_once(&vr->guest->offloads));
}

/* A GSO frame for a guest that does not take such: in segments. Those that find no buffer are dropped. */
static void cut_to_guest(struct xv_vring *vr, const struct xv_view *view, struct call_ctx *ctx)
{
	struct gso_cut cut;
	uint32_t n, done;

	gso_cut_init(&cut, view);
	while ((n = gso_cut_next(&cut, &ctx->room))) {
		done = guest_tx_burst(vr, ctx->room.list, n, ctx);
		if (done < n) {
			switch_drop_stalled(vr, n - done + gso_cut_left(&cut));
			view_rx_dropped(view, XV_DROP_NO_BUFFERS);
			return;
		}
	}
}

void switch_drop(const struct snapshot *snap, uint32_t index, uint32_t hint, enum xv_drop why, uint32_t n)
{
	drop_to_pair(&snap->ports[index], hint, why, n);
}

/*
 * All of it into one ring; answers how many views are done with, fewer than n when its buffers ran out, or a joined frame
 * must come again as what it is made of (ctx->unjoin).
 */
static uint32_t to_ring(struct xv_vring *vr, const struct xv_view *const *views, uint32_t n, struct call_ctx *ctx)
{
	uint32_t done = 0;

	while (done < n) {
		uint32_t whole = 0, taken;

		while (done + whole < n && takes(vr, views[done + whole]))
			whole++;
		if (unlikely(!whole)) {
			cut_to_guest(vr, views[done++], ctx);
			continue;
		}
		taken = guest_tx_burst(vr, views + done, whole, ctx);
		done += taken;
		if (taken < whole)
			break;
	}
	return done;
}

static uint32_t to_pair(const struct port *port, uint32_t hint, const struct xv_view *const *views, uint32_t n,
			struct call_ctx *ctx, struct xv_vring **stalled)
{
	struct xv_vring *vr = rx_ring(port, hint);
	uint32_t done;

	if (unlikely(!vr)) {
		drop_to_pair(port, hint, XV_DROP_NOT_CONNECTED, frames_of(views, n));
		views_rx_dropped(views, n, XV_DROP_NOT_CONNECTED);
		return n;
	}
	done = to_ring(vr, views, n, ctx);
	if (done < n && !ctx->unjoin)
		*stalled = vr;
	return done;
}

static bool is_access(const struct port *port)
{
	return port->policy && port->policy->access;
}

/* ---- guests that asked for more than all their frames in one queue ---- */

static void hash_views(const struct rss *rss, const struct xv_view *const *views, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		struct xv_view *view = (struct xv_view *)(uintptr_t)views[i]; /* see view.h */

		view->hash = rss_hash(rss, view, &view->hash_report);
	}
}

/* The frames that a joined one is made of. Those that find no buffer are dropped. */
static void one_by_one(const struct port *port, struct xv_vring *vr, const struct rss *rss, const struct xv_view *joined,
		       struct call_ctx *ctx)
{
	const struct xv_view *views[XV_BURST];
	uint32_t n = 0, taken;

	for (uint32_t bytes = joined->hdr_len; bytes < joined->len; bytes += joined->parts[n++].len)
		views[n] = joined->parts[n].view;
	if (is_access(port)) /* the joined one has lost its tag, and these have not */
		for (uint32_t i = 0; i < n; i++)
			tag_pop((struct xv_view *)(uintptr_t)views[i]);
	hash_views(rss, views, n);
	ctx->unjoin = false;
	taken = to_ring(vr, views, n, ctx);
	switch_drop_stalled(vr, n - taken);
	if (taken < n)
		view_rx_dropped(joined, XV_DROP_NO_BUFFERS);
}

/* Each frame into the queue that the guest's table names. Where that is several, what one can't take now is dropped. */
static uint32_t by_table(const struct port *port, const struct rss *rss, const struct xv_view *const *all, uint32_t n,
			 struct call_ctx *ctx, struct xv_vring **stalled)
{
	const struct xv_view *left[XV_BURST], *mine[XV_BURST];
	uint32_t nr_left = n;

	memcpy(left, all, n * sizeof(left[0]));
	while (nr_left) {
		const uint32_t pair = rss_pair(rss, left[0]->hash, left[0]->hash_report);
		struct xv_vring *vr = usable_ring(port, pair, port->nr_rx);
		uint32_t nr = 0, others = 0, taken;

		for (uint32_t i = 0; i < nr_left; i++) {
			if (rss_pair(rss, left[i]->hash, left[i]->hash_report) == pair)
				mine[nr++] = left[i];
			else
				left[others++] = left[i];
		}
		nr_left = others;
		if (unlikely(!vr)) {
			drop_to_pair(port, pair, XV_DROP_NOT_CONNECTED, frames_of(mine, nr));
			views_rx_dropped(mine, nr, XV_DROP_NOT_CONNECTED);
			continue;
		}
		taken = to_ring(vr, mine, nr, ctx);
		if (nr == n) {
			if (taken < nr && !ctx->unjoin)
				*stalled = vr;
			return taken;
		}
		while (unlikely(taken < nr && ctx->unjoin)) {
			one_by_one(port, vr, rss, mine[taken++], ctx);
			taken += to_ring(vr, mine + taken, nr - taken, ctx);
		}
		switch_drop_stalled(vr, frames_of(mine + taken, nr - taken));
		views_rx_dropped(mine + taken, nr - taken, XV_DROP_NO_BUFFERS);
	}
	return n;
}

static bool wants(const struct filter *filter, const struct xv_view *view, uint32_t parts)
{
	uint8_t copy[FILTER_PEEK] = {0};

	if (likely(view->first.len >= sizeof(copy)))
		return filter_passes(filter, view->first.data, parts);
	view_peek(view, copy, sizeof(copy));
	return filter_passes(filter, copy, parts);
}

/* How many of these the guest's rate lets through to it. */
static uint32_t take_rx(struct bucket *rate, const struct xv_view *const *views, uint32_t n)
{
	uint32_t sizes[XV_BURST];

	for (uint32_t i = 0; i < n; i++)
		sizes[i] = views[i]->len;
	return n ? bucket_take(rate, cycles_now(), sizes, n) : 0;
}

static void give_rx(struct bucket *rate, const struct xv_view *const *views, uint32_t n)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < n; i++)
		bytes += views[i]->len;
	bucket_give(rate, bytes);
}

static uint32_t by_rules(const struct port *port, uint32_t hint, const struct xv_view *const *views, uint32_t n,
			 struct call_ctx *ctx, struct xv_vring **stalled)
{
	/* acquire pairs with the release in put_rules_in_force() */
	const struct rx_rules *rules = load_acquire(&port->guest->rules);
	const uint32_t parts = port->rules & (FILTER_BY_ADDRESS | FILTER_BY_VLAN);
	const struct xv_view *wanted[XV_BURST];
	uint32_t at[XV_BURST + 1], nr = 0, may = 0, done = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (parts && !wants(&rules->filter, views[i], parts)) {
			view_rx_dropped(views[i], XV_DROP_FILTERED);
			continue;
		}
		at[nr] = i;
		wanted[nr++] = views[i];
	}
	at[nr] = n;
	may = port->rx_rate ? take_rx(port->rx_rate, wanted, nr) : nr;
	if (port->rules & PORT_HASHES)
		hash_views(&rules->rss, wanted, may);
	if (rules->rss.steer)
		done = by_table(port, &rules->rss, wanted, may, ctx, stalled);
	else if (may)
		done = to_pair(port, hint, wanted, may, ctx, stalled);
	if (unlikely(done < may && port->rx_rate)) /* they come again, and so do those behind them */
		give_rx(port->rx_rate, wanted + done, may - done);
	if (unlikely(done == may && may < nr)) {
		drop_to_pair(port, hint, XV_DROP_RATE, frames_of(wanted + may, nr - may));
		views_rx_dropped(wanted + may, nr - may, XV_DROP_RATE);
		done = nr;
	}
	if (at[done] > done)
		drop_to_pair(port, hint, XV_DROP_FILTERED, at[done] - done);
	return at[done];
}

static uint32_t to_port(const struct port *port, uint32_t hint, const struct xv_view *const *views, uint32_t n,
			struct call_ctx *ctx, struct xv_vring **stalled)
{
	uint32_t done;

	if (likely(!port->rules && !port->capture))
		return to_pair(port, hint, views, n, ctx, stalled);
	if (likely(!port->capture))
		return by_rules(port, hint, views, n, ctx, stalled);
	capture_begin(views, n, CAPTURE_TO);
	done = port->rules ? by_rules(port, hint, views, n, ctx, stalled) : to_pair(port, hint, views, n, ctx, stalled);
	capture_views(port->capture, &ctx->capture, views, done, CAPTURE_TO, hint, CAPTURE_FATES);
	return done;
}

static bool is_group(const struct xv_view *view)
{
	return view->first.len && view->first.data[0] & 1;
}

/*
 * A guest that is in some VLANs only: those frames, and where it is an access port, without their tags. Afterwards they
 * have them again: others may be given the same views, and those not done with are to be found as they were.
 */
static uint32_t to_gated(const struct port *port, uint32_t hint, const struct xv_view *const *views, uint32_t n,
			 struct call_ctx *ctx, struct xv_vring **stalled)
{
	const bool access = is_access(port);
	const struct xv_view *mine[XV_BURST];
	uint32_t at[XV_BURST + 1], nr = 0, done = 0, strays = 0;

	if (port->policy->flags & XV_POLICY_LINK_DOWN) {
		drop_to_pair(port, hint, XV_DROP_LINK_DOWN, frames_of(views, n));
		if (unlikely(port->capture))
			capture_views(port->capture, &ctx->capture, views, n, CAPTURE_TO, hint, XV_DROP_LINK_DOWN);
		return n;
	}
	for (uint32_t i = 0; i < n; i++) {
		struct xv_view *view = (struct xv_view *)(uintptr_t)views[i]; /* see view.h */

		if (!policy_has_vlan(port->policy, view_vlan(view)) || (access && !tag_is_first(view))) {
			strays += !is_group(view);
			continue;
		}
		if (access)
			view->tci = tag_pop(view);
		at[nr] = i;
		mine[nr++] = view;
	}
	at[nr] = n;
	if (nr)
		done = to_port(port, hint, mine, nr, ctx, stalled);
	for (uint32_t i = 0; access && i < nr; i++)
		tag_push((struct xv_view *)(uintptr_t)mine[i], mine[i]->tci);
	/* of a flood they are others'; else they came while its VLANs were changed. If there is a rest, they come again */
	if (unlikely(strays && done == nr))
		drop_to_pair(port, hint, XV_DROP_VLAN, strays);
	return at[done];
}

uint32_t switch_to_guest(const struct snapshot *snap, uint32_t index, uint32_t hint, const struct xv_view *const *views,
			 uint32_t n, struct call_ctx *ctx, struct xv_vring **stalled)
{
	const struct port *port = &snap->ports[index];

	ctx->unjoin = false;
	if (likely(!port->gated))
		return to_port(port, hint, views, n, ctx, stalled);
	return to_gated(port, hint, views, n, ctx, stalled);
}

static bool leads_nowhere(const struct uplink *uplink)
{
	return !uplink->nicq && !uplink->tap;
}

static inline uint32_t send_burst(const struct uplink *uplink, const struct xv_view *const *views, uint32_t n,
				  uint32_t max_len, uint64_t *drops)
{
	return likely(uplink->nicq) ? nicq_tx_burst(uplink->nicq, views, n, max_len, drops) :
				      tap_tx_burst(uplink->tap, views, n, max_len, drops);
}

/* A guest's GSO frame whole. False: it is to be cut. */
static bool send_whole(const struct uplink *uplink, const struct xv_view *view, uint32_t max_len, uint64_t *drops)
{
	return uplink->nicq ? nicq_tx_gso(uplink->nicq, view, max_len, drops) :
			      tap_tx_gso(uplink->tap, view, max_len, drops);
}

/* Frames out of the switch, GSO frames whole where that is possible. */
static void send_out(const struct uplink *to, const struct xv_view *const *views, uint32_t n, uint32_t max_len,
		     uint64_t *drops, struct call_ctx *ctx)
{
	for (uint32_t i = 0, run; i < n; i += run) {
		struct gso_cut cut;
		uint32_t segments;

		for (run = 0; i + run < n && !views[i + run]->gso_type; run++)
			;
		if (likely(run)) {
			send_burst(to, views + i, run, max_len, drops);
			continue;
		}
		run = 1;
		if (send_whole(to, views[i], max_len, drops))
			continue;
		gso_cut_init(&cut, views[i]);
		while ((segments = gso_cut_next(&cut, &ctx->room))) {
			const uint64_t too_big = drops[XV_DROP_TOO_BIG];
			const uint32_t sent = send_burst(to, ctx->room.list, segments, max_len, drops);

			if (unlikely(sent < segments))
				view_tx_dropped(views[i], drops[XV_DROP_TOO_BIG] != too_big ? XV_DROP_TOO_BIG : XV_DROP_NO_FRAMES);
			if (sent || !to->nicq || load_once(&to->nicq->nr_free))
				continue;
			/* no frame was free for any of them, nor is one for the rest */
			count(drops[XV_DROP_NO_FRAMES], gso_cut_left(&cut));
			break;
		}
	}
}

static uint32_t queue_of(const struct uplink *uplink)
{
	return uplink->nicq ? uplink->nicq->queue : uplink->tap->queue;
}

static void to_uplink(const struct snapshot *snap, const struct origin *from, const struct xv_view *const *views, uint32_t n,
		      struct call_ctx *ctx, struct dirty *dirty)
{
	const struct nic *nic = &snap->nics[from->nic];

	if (!from->drops)
		return; /* came from the NIC: it has been on that wire */
	if (unlikely(leads_nowhere(&from->uplink))) {
		count(from->drops[XV_DROP_NO_UPLINK], n);
		views_tx_dropped(views, n, XV_DROP_NO_UPLINK);
		return;
	}
	if (unlikely(nic->capture))
		capture_begin(views, n, CAPTURE_FROM);
	send_out(&from->uplink, views, n, nic->max_len, from->drops, ctx);
	if (unlikely(nic->capture))
		capture_views(nic->capture, &ctx->capture, views, n, CAPTURE_FROM, queue_of(&from->uplink), CAPTURE_FATES);
	if (likely(from->uplink.nicq))
		mark_dirty(dirty, from->uplink.nicq);
}

void switch_drop_to_host(const struct snapshot *snap, uint32_t nic, uint64_t n)
{
	__atomic_fetch_add(&snap->nics[nic].host->counters.tx_dropped, n, __ATOMIC_RELAXED);
}

void switch_to_host(const struct snapshot *snap, uint32_t nic, const struct xv_view *const *views, uint32_t n,
		    uint64_t *drops, struct call_ctx *ctx)
{
	const struct uplink host = {.tap = snap->nics[nic].host};
	uint64_t lost[XV_DROP_MAX] = {0}, sum = 0;

	send_out(&host, views, n, snap->nics[nic].max_len, drops ? drops : lost, ctx);
	for (uint32_t i = 0; i < XV_DROP_MAX; i++)
		sum += lost[i];
	if (sum)
		switch_drop_to_host(snap, nic, sum);
}

static uint32_t nic_of(const struct snapshot *snap, uint32_t port)
{
	return port < snap->nr_ports ? snap->ports[port].nic : port - XV_HOST_PORT;
}

/* A guest that only talks to the NIC. */
static bool is_isolated(const struct snapshot *snap, uint32_t port)
{
	return port < snap->nr_ports && snap->ports[port].policy && snap->ports[port].policy->flags & XV_POLICY_ISOLATED;
}

static void flood(const struct snapshot *snap, const struct origin *from, const struct xv_view *const *views, uint32_t n,
		  struct call_ctx *ctx, struct dirty *dirty)
{
	const bool alone = is_isolated(snap, from->port), from_nic = from->port == NO_PORT;

	for (uint32_t i = 0; i < snap->nr_ports && !alone; i++) {
		struct xv_vring *stalled = NULL;
		uint32_t done;

		if (i == from->port || snap->ports[i].nic != from->nic || (!from_nic && is_isolated(snap, i)))
			continue;
		done = switch_to_guest(snap, i, from->hint, views, n, ctx, &stalled);
		if (stalled)
			give_up(&snap->ports[i], stalled, views + done, n - done, ctx);
	}
	if (snap->nics[from->nic].host && from->port != host_port(from->nic) && !alone)
		switch_to_host(snap, from->nic, views, n, from->drops, ctx);
	if (!leads_nowhere(&from->uplink))
		to_uplink(snap, from, views, n, ctx, dirty);
}

/* Views [0, n) all go to the same place; answers how many are done with. */
static uint32_t forward(const struct snapshot *snap, const struct origin *from, uint32_t to, const struct xv_view *const *views,
			uint32_t n, struct call_ctx *ctx, struct dirty *dirty, struct xv_vring **stalled)
{
	if (to == TO_FLOOD) {
		flood(snap, from, views, n, ctx, dirty);
	} else if (unlikely(to == TO_NOBODY)) {
		return n;
	} else if (to == NO_PORT || nic_of(snap, to) != from->nic || to == from->port) {
		to_uplink(snap, from, views, n, ctx, dirty);
	} else if (unlikely(from->port != NO_PORT && (is_isolated(snap, from->port) || is_isolated(snap, to)))) {
		count(from->drops[XV_DROP_ISOLATED], n);
		views_tx_dropped(views, n, XV_DROP_ISOLATED);
	} else if (unlikely(to == host_port(from->nic))) {
		switch_to_host(snap, from->nic, views, n, from->drops, ctx);
	} else {
		return switch_to_guest(snap, to, from->hint, views, n, ctx, stalled);
	}
	return n;
}

/* Where each frame goes; whether it is the same place for all. */
static inline always_inline bool find_all(const struct snapshot *snap, struct xv_burst *burst, const struct xv_view **views,
					  const bool some_refused)
{
	struct lookup last = {MAC_EMPTY, TO_FLOOD}; /* a group, if it were one */
	bool same = true;

	for (uint32_t i = 0; i < burst->nr; i++) {
		struct xv_view *view = &burst->views[i];

		view->to = some_refused && view->flags & VIEW_REFUSED ? TO_NOBODY : find_destination(snap, view, &last);
		same &= view->to == burst->views[0].to;
		views[i] = view;
	}
	return same;
}

uint32_t switch_burst(const struct snapshot *snap, const struct origin *from, struct xv_burst *burst, struct call_ctx *ctx,
		      struct dirty *dirty, struct xv_vring **stalled)
{
	const struct xv_view *views[XV_BURST];
	uint32_t left;
	bool same;

	*stalled = NULL;
	if (from->judged && unlikely(ingress_burst(snap, from, burst, &ctx->ingress)))
		same = find_all(snap, burst, views, true);
	else
		same = find_all(snap, burst, views, false);
	if (likely(same && burst->nr))
		return forward(snap, from, burst->views[0].to, views, burst->nr, ctx, dirty, stalled);

	/* several destinations: each gets its views in their order; what one cannot take now is dropped */
	for (left = burst->nr; left;) {
		const uint32_t to = views[0]->to;
		const struct xv_view *mine[XV_BURST];
		struct xv_vring *short_of = NULL;
		uint32_t n = 0, others = 0, done;

		for (uint32_t i = 0; i < left; i++) {
			if (views[i]->to == to)
				mine[n++] = views[i];
			else
				views[others++] = views[i];
		}
		left = others;
		done = forward(snap, from, to, mine, n, ctx, dirty, &short_of);
		if (short_of)
			give_up(&snap->ports[to], short_of, mine + done, n - done, ctx);
	}
	return burst->nr;
}
