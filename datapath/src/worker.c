// SPDX-License-Identifier: Apache-2.0
/*
 * A worker: poll what the snapshot gives it to do, forward, and sleep when there is nothing.
 *
 * A turn visits every hot source once (hot.h says which those are), a burst each, so that no port waits for more than a
 * burst of every other. Frames for a NIC are handed to the kernel at the end of the turn.
 *
 * Going to sleep: drop events that are already stale, ask every hot ring for notifications (arm), look at every one once
 * more, then block in epoll_wait. A frame that comes after the look raises an event; one that came before is seen. Cold
 * ones are armed already.
 *
 * Under load, a turn that found only a few frames is followed by a pause of a microsecond: gather().
 *
 * Waiting for buffers: frames from a NIC may wait in the guest's own socket (`keep`, then the oldest are dropped); the
 * guest's kick ends the wait, or 20 ms: another worker may get that kick, or take the buffers and disarm the ring.
 * Frames from another guest may wait in the sender's ring, but only for as long as the sender has patience: an eighth
 * of the time, a millisecond at once. So a guest that stops reading costs those who send to it next to nothing. A tap
 * that has several guests waits in the same way; one with a single guest may wait for as long as that takes.
 */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#include "ctrlq.h"
#include "dp.h"
#include "hot.h"
#include "tag.h"

#define MCAST_EVERY_US 100u
#define PATIENCE_US 1000u
#define PATIENCE_SHARE 8u
#define PAUSE_US 100u
#define NS_LONGEST 1000000000ull
#define GATHER_NS 1000u
#define CONTENTION_EVERY_US 100u
#define CONTENTION_US 10000u
#define RARP_BYTES 60u
#define ANNOUNCED_AT_ONCE 8u /* VLANs */

/* ---- one source, one burst; true when there was work ---- */

/*
 * How long a joined frame waits for as many buffers as it needs. A guest that is short of memory may never have them, and
 * the frames it is made of fit one by one.
 */
#define JOINED_WAIT_US 1000u

/* Deliver a burst from the NIC, joined where the guest takes that; answers how many frames are done with. */
static uint32_t deliver_joined(struct worker *w, const struct snapshot *snap, const struct xsk_source *source, uint32_t join,
			       struct xv_vring **stalled, uint32_t *unjoin)
{
	struct xv_xsk *xsk = source->xsk;
	uint32_t frames[XV_BURST], n, taken, done;

	n = gso_join(w->burst.views, w->burst.nr, xsk->plain, join, &w->calls.room, frames);
	taken = switch_to_guest(snap, source->port, source->hint, w->calls.room.list, n, &w->calls, stalled);
	done = taken ? frames[taken - 1] : 0;
	if (unlikely(*stalled)) {
		if (done || !xsk->stalled_on)
			xsk->stalled_at = cycles_now();
		else if (cycles_now() - xsk->stalled_at > JOINED_WAIT_US * w->dp->cycles_per_us)
			w->calls.unjoin = true;
	}
	if (unlikely(w->calls.unjoin && taken < n && frames[taken] - done > 1))
		*unjoin = frames[taken] - done;
	return done;
}

/* What came from the network: what became of it is the business of the guest that it was for. */
static void capture_as_is(struct worker *w, struct xv_capture *capture, uint32_t n, uint32_t queue)
{
	for (uint32_t i = 0; i < n; i++)
		w->burst.views[i].rx_drop = 0;
	capture_row(capture, &w->calls.capture, w->burst.views, n, CAPTURE_TO, queue, CAPTURE_FATES);
}

/* Who looks at what comes from a NIC for a guest. */
static inline struct xv_capture *looks_at(const struct snapshot *snap, uint32_t port)
{
	return snap->nics[snap->ports[port].nic].capture;
}

static void burst_to_host(struct worker *w, const struct snapshot *snap, uint32_t port, uint32_t queue)
{
	struct xv_capture *at_nic = snap->nics[port - XV_HOST_PORT].capture;
	const struct xv_view *views[XV_BURST];

	if (unlikely(at_nic))
		capture_as_is(w, at_nic, w->burst.nr, queue);
	for (uint32_t i = 0; i < w->burst.nr; i++)
		views[i] = &w->burst.views[i];
	switch_to_host(snap, port - XV_HOST_PORT, views, w->burst.nr, NULL, &w->calls);
	count(w->counters.packets, w->burst.nr);
}

/* Frames from a NIC for its host port. A tap takes them at once, or loses them: they never wait. */
static bool poll_xsk_of_host(struct worker *w, const struct snapshot *snap, const struct xsk_source *source)
{
	uint32_t dropped = xsk_rx_burst(source->xsk, &w->burst);

	if (unlikely(dropped))
		switch_drop_to_host(snap, source->port - XV_HOST_PORT, dropped);
	burst_to_host(w, snap, source->port, source->hint);
	xsk_rx_release(source->xsk, w->burst.nr);
	return w->burst.nr + dropped;
}

/* What waits for a guest's buffers is too much: the oldest frames go. Answers how many. */
static uint32_t drop_oldest(struct worker *w, const struct snapshot *snap, const struct xsk_source *source)
{
	struct xv_capture *at_nic = looks_at(snap, source->port), *at_guest = snap->ports[source->port].capture;
	uint32_t dropped = 0, n;

	if (likely(!at_nic && !at_guest))
		return xsk_rx_trim(source->xsk);
	while ((n = xsk_rx_excess(source->xsk))) {
		if (xsk_rx_burst(source->xsk, &w->burst)) { /* one that can't be viewed */
			dropped++;
			continue;
		}
		n = MIN(n, w->burst.nr);
		if (at_nic)
			capture_as_is(w, at_nic, n, source->hint);
		if (at_guest)
			capture_row(at_guest, &w->calls.capture, w->burst.views, n, CAPTURE_TO, source->hint, XV_DROP_NO_BUFFERS);
		xsk_rx_release(source->xsk, n);
		dropped += n;
	}
	return dropped;
}

static bool poll_xsk(struct worker *w, const struct snapshot *snap, const struct xsk_source *source)
{
	struct xv_xsk *xsk = source->xsk;
	const struct xv_view *views[XV_BURST];
	struct xv_vring *stalled = NULL;
	uint32_t done, dropped = 0, unjoin = 0;

	if (!xsk_backlog(xsk))
		return false;
	if (unlikely(source->port >= XV_HOST_PORT))
		return poll_xsk_of_host(w, snap, source);
	if (unlikely(xsk->stalled_on && vring_usable(xsk->stalled_on) && !vring_has_buffers(xsk->stalled_on))) {
		stalled = xsk->stalled_on;
		xsk->stalled_at = cycles_now(); /* a joined frame waits for enough buffers, not for the first */
		done = 0;
	} else {
		uint32_t join = switch_joins(&snap->ports[source->port]);

		dropped = xsk_rx_burst(xsk, &w->burst);
		if (unlikely(dropped)) {
			switch_drop(snap, source->port, source->hint, XV_DROP_TOO_BIG, dropped);
			if (snap->ports[source->port].capture)
				capture_unseen(snap->ports[source->port].capture, &w->calls.capture, dropped, CAPTURE_TO,
					       source->hint, XV_DROP_TOO_BIG);
		}
		if (join) {
			done = deliver_joined(w, snap, source, join, &stalled, &unjoin);
		} else {
			for (uint32_t i = 0; i < w->burst.nr; i++)
				views[i] = &w->burst.views[i];
			done = switch_to_guest(snap, source->port, source->hint, views, w->burst.nr, &w->calls, &stalled);
		}
		if (unlikely(looks_at(snap, source->port)))
			capture_as_is(w, looks_at(snap, source->port), done, source->hint);
		count(w->counters.packets, done);
	}
	xsk_rx_release(xsk, done);
	xsk->plain = MAX(xsk->plain, unjoin);
	if (unlikely(stalled != xsk->stalled_on))
		xsk->rx.active = true; /* it has not been armed for this ring's kicks */
	xsk->stalled_on = stalled;
	if (unlikely(stalled)) {
		uint32_t oldest = drop_oldest(w, snap, source); /* they make room */

		w->rx_stalls = true;
		switch_drop_stalled(stalled, oldest);
		dropped += oldest;
	}
	return done + dropped + unjoin;
}

/* Cycles that a sender may still wait for a receiver; `waiting`: it has waited since the last call. */
static uint64_t may_wait(const struct worker *w, struct patience *patience, bool waiting)
{
	uint64_t now = cycles_now(), passed = now - patience->at, most = PATIENCE_US * w->dp->cycles_per_us;

	patience->at = now;
	if (waiting) {
		patience->left -= MIN(patience->left, passed);
	} else {
		passed = MIN(passed / PATIENCE_SHARE, most);
		patience->left = MIN(patience->left + passed, most);
	}
	return patience->left;
}

/*
 * How long a guest waits that has sent all it may: until it may send for PAUSE_US, or a quarter of its burst, so that the next
 * burst is one. Its frames stay in its ring, and it costs nothing meanwhile.
 */
static void pause_tx(struct worker *w, struct xv_vring *vr, const struct bucket *rate, uint64_t now)
{
	const uint64_t least = bucket_wait(rate, now, 1), more = bucket_wait(rate, now, MAX(rate->burst / 4, 1u));

	vr->not_before = now + MAX(MAX(least, MIN(more, PAUSE_US * w->dp->cycles_per_us)), 1u);
	w->due = MIN(w->due, vr->not_before);
}

static bool is_paused(struct worker *w, struct xv_vring *vr)
{
	if ((int64_t)(vr->not_before - cycles_now()) > 0) {
		w->due = MIN(w->due, vr->not_before);
		return true;
	}
	vr->not_before = 0;
	w->due = 0; /* it was not armed: so do not sleep before it is */
	return false;
}

/* Forward as much of the burst as the guest's rate allows; the rest waits in its ring. Answers as switch_burst() does. */
static uint32_t send_limited(struct worker *w, const struct snapshot *snap, const struct origin *from, struct bucket *rate,
			     struct xv_vring *vr, struct xv_vring **stalled)
{
	const uint64_t now = cycles_now();
	const uint32_t n = w->burst.nr;

	w->burst.nr = bucket_take(rate, now, w->chains.len, n);
	if (w->burst.nr < n)
		pause_tx(w, vr, rate, now);
	return w->burst.nr ? switch_burst(snap, from, &w->burst, &w->calls, &w->dirty, stalled) : 0;
}

/* Frames from `done` on wait for a receiver, and come again: what was taken for them is given back. */
static void take_back(struct worker *w, struct bucket *rate, struct xv_vring *vr, uint32_t done)
{
	uint64_t left = 0;

	for (uint32_t i = done; i < w->burst.nr; i++)
		left += w->chains.len[i];
	bucket_give(rate, left);
	vr->not_before = 0; /* it is not the rate that they wait for */
}

/* The chains that guest_rx_burst() found to be no frames, by what it has counted since `before`. */
static void capture_no_frames(struct worker *w, struct xv_capture *capture, const struct tx_source *source, const uint64_t *before)
{
	static const enum xv_drop reasons[] = {XV_DROP_BAD_CHAIN, XV_DROP_BAD_HEADER, XV_DROP_RUNT, XV_DROP_TOO_BIG};
	const uint64_t *now = source->vring->queue->tx.drops;

	for (uint32_t i = 0; i < ARRAY_SIZE(reasons); i++)
		if (now[reasons[i]] != before[reasons[i]])
			capture_unseen(capture, &w->calls.capture, now[reasons[i]] - before[reasons[i]], CAPTURE_FROM, source->pair,
				       reasons[i]);
}

/* Keep a captured guest's burst as it sent it: on its way frames get tags. */
static void keep_sent(struct worker *w)
{
	memcpy(w->sent, w->burst.views, w->burst.nr * sizeof(w->sent[0]));
	for (uint32_t i = 0; i < w->burst.nr; i++)
		w->burst.views[i].tx_drop = 0;
}

static void capture_sent(struct worker *w, struct xv_capture *capture, uint32_t n, uint32_t pair, enum xv_drop why)
{
	for (uint32_t i = 0; i < n; i++)
		w->sent[i].tx_drop = w->burst.views[i].tx_drop;
	capture_row(capture, &w->calls.capture, w->sent, n, CAPTURE_FROM, pair, why);
}

static bool poll_tx(struct worker *w, const struct snapshot *snap, const struct tx_source *source)
{
	struct xv_vring *vr = source->vring, *stalled = NULL, *was = vr->stalled_on;
	const struct port *port = &snap->ports[source->port];
	uint64_t drops[XV_DROP_MAX];
	bool disabled = false;
	uint32_t done;

	if (guest_faulted(vr->guest))
		return false;
	if (unlikely(vr->not_before) && is_paused(w, vr))
		return false;
	if (unlikely(was && vring_usable(was) && !vring_has_buffers(was)) && may_wait(w, &vr->patience, true)) {
		w->tx_stalls = true;
		return false;
	}
	if (unlikely(port->capture))
		memcpy(drops, vr->queue->tx.drops, sizeof(drops));
	guest_rx_burst(vr, &w->burst, &w->chains);
	if (!(w->burst.nr + w->chains.skipped))
		return false;
	if (unlikely(port->capture)) {
		capture_no_frames(w, port->capture, source, drops);
		keep_sent(w);
	}
	done = w->burst.nr;
	if (unlikely(!load_once(&vr->enabled))) {
		/* disabled transmit rings are emptied, not stopped (vhost-user, "Ring states") */
		count(vr->queue->tx.drops[XV_DROP_DISABLED], done);
		disabled = true;
	} else {
		const struct origin from = {.port = source->port,
					    .nic = port->nic,
					    .hint = source->pair,
					    .uplink = source->uplink,
					    .drops = vr->queue->tx.drops,
					    .judged = port->judged};

		if (unlikely(port->tx_rate))
			done = send_limited(w, snap, &from, port->tx_rate, vr, &stalled);
		else
			done = switch_burst(snap, &from, &w->burst, &w->calls, &w->dirty, &stalled);
	}
	if (unlikely(stalled && !may_wait(w, &vr->patience, was != NULL))) {
		switch_give_up(snap, stalled, &w->burst, done, &w->calls);
		done = w->burst.nr;
		stalled = NULL;
	}
	vr->stalled_on = stalled;
	w->tx_stalls |= !!stalled;
	if (unlikely(port->tx_rate && stalled))
		take_back(w, port->tx_rate, vr, done);
	if (!(done + w->chains.skipped))
		return false;
	if (unlikely(port->capture))
		capture_sent(w, port->capture, done, source->pair, disabled ? XV_DROP_DISABLED : CAPTURE_FATES);
	guest_rx_release(vr, &w->chains, done, &w->calls);
	count(w->counters.packets, done);
	return true;
}

static bool poll_ctrl(struct worker *w, const struct ctrl_source *source)
{
	return !guest_faulted(source->vring->guest) && ctrlq_poll(w, source);
}

/*
 * What a guest may be given straight out of the socket: nothing whose tag is to be taken out on the way, or that somebody
 * looks at.
 */
static uint32_t peeks(const struct snapshot *snap, uint32_t index)
{
	const struct port *port = &snap->ports[index];

	return port->gated || port->capture || looks_at(snap, index) ? 0 : switch_joins(port);
}

static bool poll_packet_of_host(struct worker *w, const struct snapshot *snap, const struct packet_source *source)
{
	const uint64_t dropped = source->socket->counters.dropped;

	packet_rx_burst(source->socket, &w->burst, 0);
	burst_to_host(w, snap, source->port, 0);
	packet_rx_release(source->socket, w->burst.nr);
	return w->burst.nr || source->socket->counters.dropped != dropped;
}

/* Frames for one guest by a packet socket. Those that it has no buffers for wait, in the slots and in the socket. */
static bool poll_packet(struct worker *w, const struct snapshot *snap, const struct packet_source *source)
{
	struct xv_packet *socket = source->socket;
	struct xv_vring *stalled = socket->stalled_on;
	const struct xv_view *views[XV_BURST];
	const uint64_t dropped = socket->counters.dropped;
	uint32_t done = 0;

	if (unlikely(source->port >= XV_HOST_PORT))
		return poll_packet_of_host(w, snap, source);
	if (likely(!stalled || !vring_usable(stalled) || vring_has_buffers(stalled))) {
		stalled = NULL;
		packet_rx_burst(socket, &w->burst, peeks(snap, source->port));
		for (uint32_t i = 0; i < w->burst.nr; i++)
			views[i] = &w->burst.views[i];
		if (w->burst.nr)
			done = switch_to_guest(snap, source->port, 0, views, w->burst.nr, &w->calls, &stalled);
		if (unlikely(looks_at(snap, source->port)))
			capture_as_is(w, looks_at(snap, source->port), done, 0);
		packet_rx_release(socket, done);
		count(w->counters.packets, done);
	}
	if (unlikely(stalled != socket->stalled_on))
		socket->rx.active = true; /* as in poll_xsk() */
	socket->stalled_on = stalled;
	if (unlikely(stalled))
		w->rx_stalls = true;
	return done || socket->counters.dropped != dropped; /* then there may be more, for which no event will come */
}

/*
 * Frames from a tap, for any guest. Those that one has no buffers for wait, and the others' with them: so not for long,
 * unless there are no others.
 */
static bool poll_tap(struct worker *w, const struct snapshot *snap, const struct tap_source *source)
{
	struct xv_tapq *tap = source->tap;
	const struct origin from = {
		.port = source->is_host ? host_port(source->nic) : NO_PORT,
		.nic = source->nic,
		.hint = tap->queue,
		.uplink = source->uplink,
		.drops = source->is_host ? tap->counters.drops : NULL,
	};
	struct xv_vring *stalled = NULL, *was = tap->stalled_on;
	uint32_t done, unclaimed = 0;
	uint64_t dropped;

	if (unlikely(was && vring_usable(was) && !vring_has_buffers(was)) &&
	    (source->alone || may_wait(w, &tap->patience, true))) {
		*(source->alone ? &w->rx_stalls : &w->tx_stalls) = true;
		return false;
	}
	dropped = tap->counters.rx_dropped;
	tap_rx_burst(tap, &w->burst);
	if (!w->burst.nr)
		return tap->counters.rx_dropped != dropped; /* then there may be more, for which no event will come */
	done = switch_burst(snap, &from, &w->burst, &w->calls, &w->dirty, &stalled);
	if (unlikely(stalled && !source->alone && !may_wait(w, &tap->patience, was != NULL))) {
		switch_give_up(snap, stalled, &w->burst, done, &w->calls);
		done = w->burst.nr;
		stalled = NULL;
	}
	if (unlikely(snap->nics[source->nic].capture && !source->is_host))
		capture_as_is(w, snap->nics[source->nic].capture, done, tap->queue);
	for (uint32_t i = 0; !source->is_host && i < done; i++)
		unclaimed += w->burst.views[i].to == NO_PORT;
	if (unclaimed)
		count(tap->counters.rx_unclaimed, unclaimed);
	tap->stalled_on = stalled;
	*(source->alone ? &w->rx_stalls : &w->tx_stalls) |= !!stalled;
	tap_rx_release(tap, done);
	count(w->counters.packets, done);
	return done;
}

static bool poll_mcast(struct worker *w, const struct snapshot *snap, const struct mcast_source *source)
{
	const struct origin from = {.port = NO_PORT, .nic = source->nic};
	struct xv_vring *stalled;
	uint32_t done;

	packet_rx_burst(source->mcast, &w->burst, 0);
	if (!w->burst.nr)
		return false;
	done = switch_burst(snap, &from, &w->burst, &w->calls, &w->dirty, &stalled);
	if (stalled)
		switch_give_up(snap, stalled, &w->burst, done, &w->calls);
	if (unlikely(snap->nics[source->nic].capture))
		capture_as_is(w, snap->nics[source->nic].capture, w->burst.nr, 0);
	packet_rx_release(source->mcast, w->burst.nr);
	count(w->counters.packets, w->burst.nr);
	return true;
}

/* ---- announcements ---- */

/* A RARP "request reverse" from and for `mac` (RFC 903), as a guest sends it after migration; tagged, if in a VLAN. */
static uint32_t make_rarp(uint8_t frame[RARP_BYTES + TAG_BYTES], const uint8_t *mac, uint32_t vlan)
{
	static const uint8_t fixed[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3};
	uint8_t *behind = frame + (vlan ? TAG_BYTES : 0);

	memset(frame, 0, RARP_BYTES + TAG_BYTES);
	memset(frame, 0xff, 6);
	memcpy(frame + 6, mac, 6);
	put_be16(frame + 12, 0x8100);
	put_be16(frame + 14, vlan);
	memcpy(behind + 12, fixed, sizeof(fixed));
	memcpy(behind + 22, mac, 6);
	memcpy(behind + 32, mac, 6);
	return (uint32_t)(behind - frame) + RARP_BYTES;
}

static void announce_in(struct worker *w, const struct snapshot *snap, const struct tx_source *source, const uint8_t *mac,
			uint32_t vlan)
{
	const struct port *port = &snap->ports[source->port];
	const struct origin from = {.port = source->port,
				    .nic = port->nic,
				    .uplink = source->uplink,
				    .drops = source->vring->queue->tx.drops,
				    .judged = port->judged,
				    .announces = true};
	uint8_t frame[RARP_BYTES + TAG_BYTES];
	const uint32_t len = make_rarp(frame, mac, vlan);
	struct xv_vring *stalled;

	w->burst.views[0] = (struct xv_view){.first = {frame, len}, .len = len};
	w->burst.nr = 1;
	switch_burst(snap, &from, &w->burst, &w->calls, &w->dirty, &stalled);
}

static void announce(struct worker *w, const struct snapshot *snap, const struct tx_source *source)
{
	const struct policy *policy = snap->ports[source->port].policy;
	struct xv_guest *guest = snap->ports[source->port].guest;
	uint64_t asked = __atomic_exchange_n(&guest->announce, 0, __ATOMIC_ACQ_REL);

	if (!asked)
		return;
	if (!policy || !policy->is_trunk) {
		announce_in(w, snap, source, (const uint8_t *)&asked, 0);
		return;
	}
	/* in each of its VLANs, a few a turn; where to go on is said in the bits between the MAC and the highest */
	for (uint32_t vlan = (uint32_t)(asked >> 48 & VID_MASK), n = 0; vlan < 4095; vlan++) {
		if (!policy_has_vlan(policy, (uint16_t)vlan))
			continue;
		if (n++ == ANNOUNCED_AT_ONCE) {
			uint64_t none = 0;

			asked = (asked & ~((uint64_t)VID_MASK << 48)) | (uint64_t)vlan << 48;
			/* unless it is asked for anew */
			__atomic_compare_exchange_n(&guest->announce, &none, asked, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
			w->requests_seen--;
			return;
		}
		announce_in(w, snap, source, (const uint8_t *)&asked, vlan);
	}
}

static void call_if_asked(struct worker *w, struct xv_vring *vr, uint64_t *calls)
{
	uint64_t failed = 0; /* full: it has an interrupt pending */

	if (__atomic_exchange_n(&vr->call_asked, false, __ATOMIC_ACQ_REL))
		vring_call(vr, calls, &failed, &w->calls.calling);
}

static void serve_requests(struct worker *w, const struct snapshot *snap)
{
	const struct duty *duty = &snap->duties[w->index];
	uint32_t requests = load_acquire(&w->dp->requests);

	if (likely(requests == w->requests_seen))
		return;
	w->requests_seen = requests;
	for (uint32_t i = 0; i < duty->nr_tx; i++) {
		call_if_asked(w, duty->tx[i].vring, &duty->tx[i].vring->queue->tx.calls);
		if (!duty->tx[i].pair)
			announce(w, snap, &duty->tx[i]);
	}
	for (uint32_t i = 0; i < duty->nr_ctrl; i++)
		call_if_asked(w, duty->ctrl[i].vring, &duty->ctrl[i].vring->queue->tx.calls);
	for (uint32_t p = 0; p < snap->nr_ports; p++)
		for (uint32_t i = 0; i < snap->ports[p].nr_rx; i++)
			if (snap->ports[p].rx[i])
				call_if_asked(w, snap->ports[p].rx[i], &snap->ports[p].rx[i]->queue->rx.calls);
}

/* ---- a turn ---- */

/* Hand what was queued to the kernel; keep the queues that it did not take all of. */
static void flush(struct worker *w)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < w->dirty.nr; i++)
		if (!nicq_tx_flush(w->dirty.queues[i]))
			w->dirty.queues[kept++] = w->dirty.queues[i];
	w->dirty.nr = kept;
}

static inline uint32_t next_of(uint32_t i, uint32_t n)
{
	return i + 1 == n ? 0 : i + 1;
}

/* Pointers into the old snapshot are forgotten; what is left of the old one's work is found again. */
static void adopt(struct worker *w, const struct snapshot *snap)
{
	const struct duty *duty = &snap->duties[w->index];

	for (uint32_t i = 0; i < duty->nr_tx; i++) {
		duty->tx[i].vring->stalled_on = NULL;
		duty->tx[i].vring->not_before = 0;
	}
	for (uint32_t i = 0; i < duty->nr_xsk; i++)
		duty->xsk[i].xsk->stalled_on = NULL;
	for (uint32_t i = 0; i < duty->nr_packet; i++)
		duty->packet[i].socket->stalled_on = NULL;
	for (uint32_t i = 0; i < duty->nr_tap; i++)
		duty->tap[i].tap->stalled_on = NULL;
	w->serial = snap->serial;
	w->requests_seen = load_acquire(&w->dp->requests) - 1; /* new rings may ask for an interrupt */
	w->dirty.nr = 0;
	for (uint32_t i = 0; i < snap->nr_nics; i++)
		for (uint32_t q = w->index; q < snap->nics[i].nr_queues; q += snap->nr_workers)
			if (w->dirty.nr < DIRTY_MAX)
				w->dirty.queues[w->dirty.nr++] = snap->nics[i].queues[q];
	hot_adopt(w, snap);
}

static inline bool look(struct worker *w, const struct snapshot *snap, const struct source *source)
{
	if (likely(source->kind == SOURCE_XSK))
		return poll_xsk(w, snap, source->work);
	if (likely(source->kind == SOURCE_TX))
		return poll_tx(w, snap, source->work);
	if (source->kind == SOURCE_CTRL)
		return poll_ctrl(w, source->work);
	return source->kind == SOURCE_TAP ? poll_tap(w, snap, source->work) : poll_packet(w, snap, source->work);
}

/* What need not be done in every turn. */
static bool tend(struct worker *w, const struct snapshot *snap, uint64_t now, bool all)
{
	const struct duty *duty = &snap->duties[w->index];
	bool busy = false;

	if (!all)
		hot_tend(w, now);
	/* a system call even when there is nothing */
	if (all || now >= w->mcast_due) {
		w->mcast_due = now + MCAST_EVERY_US * w->dp->cycles_per_us;
		for (uint32_t i = 0; i < duty->nr_mcast; i++)
			busy |= poll_mcast(w, snap, &duty->mcast[i]);
	}
	return busy;
}

bool worker_turn(struct worker *w, const struct snapshot *snap, bool all)
{
	uint64_t start = cycles_now();
	bool busy = false, led = false;

	if (unlikely(snap->serial != w->serial))
		adopt(w, snap);
	w->tx_stalls = w->rx_stalls = w->ctrl_waits = false;
	w->due = UINT64_MAX;
	serve_requests(w, snap);
	if (unlikely(all || start >= w->tend_due))
		busy = tend(w, snap, start, all);
	for (uint32_t n = 0, i = w->first < w->hot.nr ? w->first : 0; n < w->hot.nr; n++) {
		struct source *source = w->hot.at[i];

		i = next_of(i, w->hot.nr);
		if (!look(w, snap, source))
			continue;
		source->active = true;
		if (!led) /* the next one that has something leads the next turn, however many have nothing in between */
			w->first = i;
		led = busy = true;
	}
	if (w->dirty.nr)
		flush(w);
	if (busy) {
		count(w->counters.polls_busy, 1);
		w->last_work = cycles_now();
		count(w->counters.cycles_busy, w->last_work - start);
	} else {
		count(w->counters.polls_idle, 1);
		hot_idle(w, start);
	}
	count(w->counters.heartbeat, 1);
	return busy;
}

/* ---- sleep ---- */

/* Milliseconds to sleep at most; -1: until something happens. */
static int longest_sleep(const struct worker *w)
{
	int timeout = -1;

	if (w->tx_stalls || w->ctrl_waits)
		timeout = 1;
	else if (w->rx_stalls || w->waiting.nr || load_once(&w->blind))
		timeout = 20;
	for (uint32_t i = 0; i < w->dirty.nr; i++)
		if (timeout < 0 || w->dirty.queues[i]->stuck < 100)
			timeout = w->dirty.queues[i]->stuck < 100 ? 1 : 100; /* the device may be down for good */
	return timeout;
}

/* As epoll_wait(), but no longer than until a guest may send again. */
static int wait_for_events(const struct worker *w, struct epoll_event *events, int timeout)
{
	const uint64_t now = cycles_now();
	struct timespec pause;
	uint64_t ns;
	int n;

	if (likely(w->due == UINT64_MAX))
		return epoll_wait(w->epfd, events, EVENTS, timeout);
	ns = w->due > now ? (w->due - now) * 1000 / w->dp->cycles_per_us : 0;
	ns = MIN(ns, timeout < 0 ? NS_LONGEST : (uint64_t)timeout * 1000000);
	pause = (struct timespec){(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
	n = epoll_pwait2(w->epfd, events, EVENTS, &pause, NULL);
	if (n < 0 && errno == ENOSYS) /* before Linux 5.11 */
		n = epoll_wait(w->epfd, events, EVENTS, (int)(ns / 1000000) + 1);
	return n;
}

static bool is_current(const struct worker *w)
{
	const struct snapshot *now = __atomic_load_n(&w->dp->snap, __ATOMIC_SEQ_CST);

	return now && now->serial == w->serial;
}

static void sleep_until_work(struct worker *w, const struct snapshot *snap)
{
	struct epoll_event events[EVENTS];
	int n = 0, timeout;

	if (!hot_drain(w))
		return;
	hot_arm(w);
	if (!worker_turn(w, snap, true) && !load_acquire(&w->dp->stopping)) {
		count(w->counters.sleeps, 1);
		timeout = longest_sleep(w);
		__atomic_store_n(&w->parked, true, __ATOMIC_SEQ_CST);
		/* a snapshot published before `parked` was seen is found here; one published after it, by the wake-up */
		if (__atomic_load_n(&w->dp->epoch, __ATOMIC_SEQ_CST) == w->seen)
			n = wait_for_events(w, events, timeout);
		__atomic_store_n(&w->parked, false, __ATOMIC_SEQ_CST);
		/* while parked the snapshot may have gone, and with it what the events and the lists point to */
		if (!is_current(w))
			return;
		if (n > 0) {
			count(w->counters.wakeups, 1);
			w->last_work = cycles_now(); /* whatever woke it is worth a look for spin_us */
		}
	}
	hot_wake(w, events, n);
}

/* ---- the loop ---- */

/*
 * A turn moved only a few frames: let more of them come. Looking again at once would find one or two, and the rings'
 * cache lines would go to and fro for each; after a microsecond there is a burst (docs/performance.md has the figures).
 */
static void gather(const struct xv_dp *dp)
{
	uint64_t until = cycles_now() + GATHER_NS * dp->cycles_per_us / 1000;

	while (cycles_now() < until)
		cpu_relax();
}

/*
 * Whether somebody else wants this CPU, too: the kernel took it from this thread lately. Then polling without work takes
 * it from a guest, or from whoever sends or receives what we move, and it is better to sleep at once.
 */
static bool contended(struct worker *w)
{
	uint64_t now = cycles_now(), us = w->dp->cycles_per_us;
	struct rusage usage;

	if (now >= w->contention_due) {
		w->contention_due = now + CONTENTION_EVERY_US * us;
		if (!getrusage(RUSAGE_THREAD, &usage) && usage.ru_nivcsw != w->preempted) {
			w->preempted = usage.ru_nivcsw;
			w->contended_until = now + CONTENTION_US * us;
		}
	}
	return now < w->contended_until;
}

int xv_worker_run(struct xv_dp *dp, uint32_t index)
{
	struct worker *w;
	uint64_t spin, moved;
	bool held = false;
	sigset_t pipe;

	if (index >= dp->conf.workers)
		return -EINVAL;
	w = &dp->workers[index];
	if (w->running)
		return -EBUSY;
	sigemptyset(&pipe);
	sigaddset(&pipe, SIGPIPE); /* a call descriptor may be a pipe whose reader has gone */
	pthread_sigmask(SIG_BLOCK, &pipe, NULL);
	spin = dp->conf.poll == XV_POLL_ADAPTIVE ? dp->conf.spin_us * dp->cycles_per_us : 0;
	w->thread = pthread_self();
	w->last_work = cycles_now();
	__atomic_store_n(&w->running, true, __ATOMIC_SEQ_CST);
	while (!load_acquire(&dp->stopping)) {
		uint64_t epoch = __atomic_load_n(&dp->epoch, __ATOMIC_SEQ_CST);
		const struct snapshot *snap = __atomic_load_n(&dp->snap, __ATOMIC_SEQ_CST);

		if (unlikely(!snap)) { /* held: control moves rings, and needs the CPU more than we do */
			/* the next one to send for a guest may be another worker, on another queue */
			if (!held && w->serial == load_once(&dp->held))
				flush(w);
			held = true;
			__atomic_store_n(&w->seen, epoch, __ATOMIC_RELEASE);
			sched_yield();
			continue;
		}
		held = false;
		/* from here on only `snap` is used, so control may count on it: it was loaded after the epoch */
		__atomic_store_n(&w->seen, epoch, __ATOMIC_RELEASE);
		moved = w->counters.packets;
		if (worker_turn(w, snap, false)) {
			if (w->counters.packets - moved < XV_BURST / 2)
				gather(dp);
			continue;
		}
		if (dp->conf.poll == XV_POLL_BUSY)
			continue;
		if (cycles_now() - w->last_work >= spin || contended(w))
			sleep_until_work(w, snap);
		else
			cpu_relax();
	}
	/* while it is running control waits for it, so the snapshot stays; but it may be one that no longer has the queues */
	if (is_current(w))
		flush(w);
	__atomic_store_n(&w->running, false, __ATOMIC_SEQ_CST);
	return 0;
}
