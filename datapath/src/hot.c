// SPDX-License-Identifier: Apache-2.0
#include "hot.h"

#define FEW 16u       /* hot sources that are left alone */
#define FEW_BUSY 64u  /* of a worker that never sleeps */
#define SWEEP_US 50u  /* between two looks for sources that had nothing; one goes at the second or third */
#define TEND_US 20u   /* between two looks at epoll, while there is work */
#define TEND_IDLE_US 2u
#define WAITING_US 1000u

/* ---- one source ---- */

static struct xv_vring *ring_of(const struct source *source)
{
	switch (source->kind) {
	case SOURCE_TX:
		return ((const struct tx_source *)source->work)->vring;
	case SOURCE_CTRL:
		return ((const struct ctrl_source *)source->work)->vring;
	default:
		return NULL;
	}
}

/* The receive ring whose buffers ran out for it, or NULL. */
static struct xv_vring *stalled_on(const struct source *source)
{
	switch (source->kind) {
	case SOURCE_TX:
		return ring_of(source)->stalled_on;
	case SOURCE_XSK:
		return ((const struct xsk_source *)source->work)->xsk->stalled_on;
	case SOURCE_PACKET:
		return ((const struct packet_source *)source->work)->socket->stalled_on;
	case SOURCE_TAP:
		return ((const struct tap_source *)source->work)->tap->stalled_on;
	default:
		return NULL;
	}
}

/* Then looks at it that find nothing say that there is nothing, and an event will say when there is. */
static bool can_go(const struct worker *w, const struct source *source)
{
	if (load_once(&source->epfd) != w->epfd)
		return false;
	switch (source->kind) {
	case SOURCE_TX:
		if (ring_of(source)->not_before) /* no event says when it may send again */
			return false;
		__attribute__((fallthrough));
	case SOURCE_TAP:
		return !stalled_on(source); /* its patience is measured in turns */
	case SOURCE_CTRL:
		return ring_of(source)->guest->work.state == CTRL_NONE;
	default:
		return true;
	}
}

/* full_barrier() is the caller's. */
static void arm(struct source *source)
{
	struct xv_vring *vr = ring_of(source), *stalled = stalled_on(source);

	if (vr && vr->not_before) /* it is looked at when it may send again: its kicks are no news */
		return;
	if (vr)
		vring_arm(vr);
	if (stalled)
		vring_arm_behind(stalled);
	source->armed = true;
}

static void disarm(struct source *source)
{
	struct xv_vring *vr = ring_of(source);

	/* receive rings are disarmed by whoever next delivers into them: guest_tx_burst() */
	if (vr)
		vring_disarm(vr);
	source->armed = false;
}

/* ---- lists ---- */

static void add(struct source_list *list, struct source *source, enum source_state state)
{
	source->state = state;
	source->place = list->nr;
	list->at[list->nr++] = source;
}

static void take(struct source_list *list, struct source *source)
{
	struct source *last = list->at[--list->nr];

	list->at[source->place] = last;
	last->place = source->place;
}

static void make_cold(struct worker *w, struct source *source)
{
	take(&w->hot, source);
	if (stalled_on(source))
		add(&w->waiting, source, SOURCE_WAITING);
	else
		source->state = SOURCE_COLD;
}

/* Whether it was cold. */
static bool make_hot(struct worker *w, struct source *source)
{
	source->active = true;
	if (source->state == SOURCE_HOT)
		return false;
	if (source->state == SOURCE_WAITING)
		take(&w->waiting, source);
	disarm(source);
	add(&w->hot, source, SOURCE_HOT);
	return true;
}

static void adopt(struct worker *w, struct source *source, enum source_kind kind, const void *work)
{
	source->kind = kind;
	source->work = work;
	source->active = true;
	disarm(source);
	add(&w->hot, source, SOURCE_HOT);
}

void hot_adopt(struct worker *w, const struct snapshot *snap)
{
	const struct duty *duty = &snap->duties[w->index];

	w->hot = (struct source_list){duty->hot, 0};
	w->waiting = (struct source_list){duty->waiting, 0};
	for (uint32_t i = 0; i < duty->nr_xsk; i++)
		adopt(w, &duty->xsk[i].xsk->rx, SOURCE_XSK, &duty->xsk[i]);
	for (uint32_t i = 0; i < duty->nr_tx; i++)
		adopt(w, &duty->tx[i].vring->kick, SOURCE_TX, &duty->tx[i]);
	for (uint32_t i = 0; i < duty->nr_ctrl; i++)
		adopt(w, &duty->ctrl[i].vring->kick, SOURCE_CTRL, &duty->ctrl[i]);
	for (uint32_t i = 0; i < duty->nr_packet; i++)
		adopt(w, &duty->packet[i].socket->rx, SOURCE_PACKET, &duty->packet[i]);
	for (uint32_t i = 0; i < duty->nr_tap; i++)
		adopt(w, &duty->tap[i].tap->rx, SOURCE_TAP, &duty->tap[i]);
	w->sources = w->hot.nr;
}

/* ---- events ---- */

/* Those that wait for buffers that may be there now. Whether there are any. */
static bool look_at_waiting(struct worker *w)
{
	bool any = false;

	for (uint32_t i = w->waiting.nr; i-- > 0;) {
		struct source *source = w->waiting.at[i];
		const struct xv_vring *vr = stalled_on(source);

		if (!vring_usable(vr) || vring_has_buffers(vr))
			any |= make_hot(w, source);
	}
	return any;
}

/* Whether something has become hot. */
static bool handle(struct worker *w, const struct epoll_event *events, int n)
{
	bool any = false, kicked = false;

	for (int i = 0; i < n; i++) {
		struct source *source = events[i].data.ptr;

		if (!source) /* wake_fd: the worker's loop knows what to look at */
			continue;
		if (source->events)
			__atomic_fetch_add(source->events, 1u, __ATOMIC_RELAXED);
		if (source->state == SOURCE_UNLISTED)
			kicked = true;
		else
			any |= make_hot(w, source);
	}
	if (kicked && w->waiting.nr)
		any |= look_at_waiting(w);
	return any;
}

/* Take what epoll has. Whether something has become hot. */
static bool take_events(struct worker *w)
{
	struct epoll_event events[EVENTS];
	const int n = epoll_wait(w->epfd, events, EVENTS, 0);

	if (n == EVENTS)
		w->tend_due = 0; /* there are more */
	return handle(w, events, n);
}

/* ---- from hot to cold ---- */

static uint32_t few(const struct worker *w)
{
	return w->dp->conf.poll == XV_POLL_BUSY ? FEW_BUSY : FEW;
}

static void sweep(struct worker *w)
{
	bool any = false;

	if (w->hot.nr <= few(w))
		return;
	for (uint32_t i = w->hot.nr; i-- > 0;) {
		struct source *source = w->hot.at[i];

		if (source->active) {
			source->active = false;
			if (source->armed)
				disarm(source);
		} else if (!can_go(w, source)) {
			continue;
		} else if (source->armed) {
			make_cold(w, source);
		} else {
			arm(source);
			any = true;
		}
	}
	if (any) /* pairs with the driver's, as in hot_arm() */
		full_barrier();
}

void hot_tend(struct worker *w, uint64_t now)
{
	w->tend_due = now + TEND_US * w->dp->cycles_per_us;
	if (w->hot.nr < w->sources)
		take_events(w);
	if (now >= w->waiting_due) {
		w->waiting_due = now + WAITING_US * w->dp->cycles_per_us;
		look_at_waiting(w);
	}
	if (now >= w->sweep_due) {
		w->sweep_due = now + SWEEP_US * w->dp->cycles_per_us;
		sweep(w);
	}
}

void hot_idle(struct worker *w, uint64_t now)
{
	if (w->hot.nr < w->sources)
		w->tend_due = MIN(w->tend_due, now + TEND_IDLE_US * w->dp->cycles_per_us);
}

/* ---- sleep ---- */

bool hot_drain(struct worker *w)
{
	return !take_events(w);
}

void hot_arm(struct worker *w)
{
	for (uint32_t i = 0; i < w->hot.nr; i++) {
		w->hot.at[i]->active = false;
		arm(w->hot.at[i]);
	}
	/* pairs with the driver's barrier between moving avail.idx and reading flags or avail_event (virtio 1.2, 2.7.13.4) */
	full_barrier();
}

void hot_wake(struct worker *w, const struct epoll_event *events, int n)
{
	bool many;

	handle(w, events, n);
	look_at_waiting(w);
	many = w->hot.nr > few(w);
	for (uint32_t i = w->hot.nr; i-- > 0;) {
		struct source *source = w->hot.at[i];

		if (many && source->armed && !source->active && can_go(w, source))
			make_cold(w, source);
		else if (source->armed)
			disarm(source);
	}
}
