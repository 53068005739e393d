// SPDX-License-Identifier: Apache-2.0
/*
 * Control's side of the data plane: publishing snapshots and waiting until no worker sees the old one.
 *
 * A worker says in `seen` which epoch it knew when it began its turn, and in `parked` that it sleeps and holds nothing.
 * xv_publish() stores the new snapshot, moves the epoch, and waits for each worker to be parked or to have seen the
 * epoch. A worker that wakes up clears `parked` first and loads the snapshot afterwards, both sequentially consistent,
 * so either control sees it awake and waits, or it sees the new snapshot.
 */
#include "dp.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define WATCHDOG_SIGNAL SIGURG /* ignored by default, and its handler here does nothing: it only interrupts write() */

static void on_watchdog(int sig)
{
	(void)sig;
}

static int install_watchdog(void)
{
	struct sigaction action = {.sa_handler = on_watchdog}; /* no SA_RESTART: that is the point */

	sigemptyset(&action.sa_mask);
	return sigaction(WATCHDOG_SIGNAL, &action, NULL) ? -errno : 0;
}

static uint64_t nanoseconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t measure_cycles_per_us(void)
{
	uint64_t t0 = nanoseconds(), c0 = cycles_now(), t;

	do
		t = nanoseconds();
	while (t - t0 < 2000000);
	return MAX((cycles_now() - c0) * 1000 / (t - t0), 1u);
}

static int worker_init(struct xv_dp *dp, uint32_t index)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = NULL};
	struct worker *w = &dp->workers[index];

	w->dp = dp;
	w->index = index;
	w->serial = UINT64_MAX; /* of none */
	w->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	w->epfd = epoll_create1(EPOLL_CLOEXEC);
	if (w->wake_fd < 0 || w->epfd < 0 || epoll_ctl(w->epfd, EPOLL_CTL_ADD, w->wake_fd, &event))
		return -errno;
	return 0;
}

int xv_dp_new(const struct xv_dp_conf *conf, struct xv_dp **out)
{
	const struct xv_snapshot_conf nothing = {0};
	struct xv_dp *dp;
	size_t size;
	int result;

	if (!conf->workers || conf->workers > XV_MAX_WORKERS || conf->poll > XV_POLL_INTERRUPT)
		return -EINVAL;
	result = mem_guard_install();
	if (!result)
		result = install_watchdog();
	if (result)
		return result;
	size = ALIGN_UP(sizeof(*dp) + conf->workers * sizeof(dp->workers[0]), 64);
	dp = aligned_alloc(64, size);
	if (!dp)
		return -ENOMEM;
	memset(dp, 0, size);
	dp->conf = *conf;
	for (uint32_t i = 0; i < conf->workers; i++)
		dp->workers[i].wake_fd = dp->workers[i].epfd = -1;
	dp->generation = 1;
	dp->cycles_per_us = measure_cycles_per_us();
	for (uint32_t i = 0; i < conf->workers; i++)
		dp->workers[i].calls.capture.most = (int64_t)(CAPTURE_AT_ONCE_US * dp->cycles_per_us);
	dp->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	result = dp->event_fd < 0 ? -errno : snapshot_new(&nothing, conf->workers, &dp->snap);
	for (uint32_t i = 0; !result && i < conf->workers; i++)
		result = worker_init(dp, i);
	if (result) {
		xv_dp_free(dp);
		return result;
	}
	*out = dp;
	return 0;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

void xv_dp_free(struct xv_dp *dp)
{
	for (uint32_t i = 0; i < dp->conf.workers; i++) {
		close_fd(dp->workers[i].epfd);
		close_fd(dp->workers[i].wake_fd);
	}
	close_fd(dp->event_fd);
	snapshot_free(dp->snap);
	free(dp);
}

void worker_wake(struct worker *w)
{
	const uint64_t one = 1;

	if (write(w->wake_fd, &one, sizeof(one)) < 0)
		return; /* EAGAIN: it has a wake-up pending */
}

void dp_request(struct xv_dp *dp)
{
	if (!dp)
		return;
	__atomic_fetch_add(&dp->requests, 1u, __ATOMIC_RELEASE);
	for (uint32_t i = 0; i < dp->conf.workers; i++)
		worker_wake(&dp->workers[i]);
}

void xv_dp_stop(struct xv_dp *dp)
{
	store_release(&dp->stopping, true);
	for (uint32_t i = 0; i < dp->conf.workers; i++)
		worker_wake(&dp->workers[i]);
}

int xv_dp_event_fd(const struct xv_dp *dp)
{
	return dp->event_fd;
}

uint64_t xv_cycles_per_us(const struct xv_dp *dp)
{
	return dp->cycles_per_us;
}

const struct xv_worker_counters *xv_worker_counters(const struct xv_dp *dp, uint32_t worker)
{
	return worker < dp->conf.workers ? &dp->workers[worker].counters : NULL;
}

void xv_dp_watchdog(struct xv_dp *dp)
{
	for (uint32_t i = 0; i < dp->conf.workers; i++) {
		struct worker *w = &dp->workers[i];
		uint64_t turns = load_once(&w->counters.heartbeat);

		if (load_once(&w->calls.calling) && turns == w->watchdog_turns && load_acquire(&w->running))
			pthread_kill(w->thread, WATCHDOG_SIGNAL);
		w->watchdog_turns = turns;
	}
}

static bool is_past(const struct worker *w, uint64_t epoch)
{
	return !__atomic_load_n(&w->running, __ATOMIC_SEQ_CST) || __atomic_load_n(&w->parked, __ATOMIC_SEQ_CST) ||
	       __atomic_load_n(&w->seen, __ATOMIC_SEQ_CST) >= epoch;
}

uint64_t dp_new_epoch(struct xv_dp *dp)
{
	return __atomic_add_fetch(&dp->epoch, 1, __ATOMIC_SEQ_CST);
}

bool dp_is_past(const struct xv_dp *dp, uint64_t epoch, const struct worker *except)
{
	for (uint32_t i = 0; i < dp->conf.workers; i++)
		if (&dp->workers[i] != except && !is_past(&dp->workers[i], epoch))
			return false;
	return true;
}

void xv_quiesce(struct xv_dp *dp)
{
	const struct timespec pause = {.tv_nsec = 20000};
	uint64_t epoch = dp_new_epoch(dp);

	for (uint32_t i = 0; i < dp->conf.workers; i++) {
		for (uint32_t tries = 0; !is_past(&dp->workers[i], epoch); tries++) {
			if (tries < 200) {
				cpu_relax();
				continue;
			}
			nanosleep(&pause, NULL);
			if (tries % 1000 == 0) /* some 70 ms: it may hang in a call descriptor */
				xv_dp_watchdog(dp);
		}
	}
}

/* ---- what workers sleep on ---- */

static void unregister(struct source *source)
{
	if (source->epfd >= 0)
		epoll_ctl(source->epfd, EPOLL_CTL_DEL, source->fd, NULL);
	store_once(&source->epfd, -1); /* a worker may ask whether events will come; it adopts another snapshot before it relies on it */
}

static bool was_published(const struct xv_dp *dp, const struct source *source)
{
	return source->generation == dp->generation;
}

static void find_moves(struct xv_dp *dp, struct source *source, uint32_t worker, uint32_t events)
{
	(void)events;
	dp->moves |= was_published(dp, source) && source->worker != worker;
}

/* dp->generation is the new snapshot's already. */
static void mark(struct xv_dp *dp, struct source *source, uint32_t worker, uint32_t events)
{
	(void)events;
	if (source->generation != dp->generation - 1)
		source->state = SOURCE_UNLISTED; /* no worker has it */
	source->generation = dp->generation;
	source->worker = worker;
}

static void unregister_unmarked(struct xv_dp *dp, struct source *source, uint32_t worker, uint32_t events)
{
	(void)worker;
	(void)events;
	if (source->generation != dp->generation)
		unregister(source);
}

/* Edge-triggered where nobody reads: an eventfd need not be emptied to be quiet again. */
static void ensure_registered(struct xv_dp *dp, struct source *source, uint32_t worker, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.ptr = source};
	int epfd = dp->workers[worker].epfd;

	if (source->fd < 0 || source->epfd == epfd)
		return;
	unregister(source);
	if (!epoll_ctl(epfd, EPOLL_CTL_ADD, source->fd, &event))
		store_once(&source->epfd, epfd);
	else
		store_once(&dp->workers[worker].blind, true); /* ENOSPC, ENOMEM */
}

typedef void (*each_source)(struct xv_dp *dp, struct source *source, uint32_t worker, uint32_t events);

static void for_each_source(struct xv_dp *dp, const struct snapshot *snap, each_source visit)
{
	for (uint32_t w = 0; w < snap->nr_workers; w++) {
		const struct duty *duty = &snap->duties[w];

		for (uint32_t i = 0; i < duty->nr_tx; i++)
			visit(dp, &duty->tx[i].vring->kick, w, EPOLLIN | EPOLLET);
		for (uint32_t i = 0; i < duty->nr_ctrl; i++)
			visit(dp, &duty->ctrl[i].vring->kick, w, EPOLLIN | EPOLLET);
		for (uint32_t i = 0; i < duty->nr_xsk; i++)
			visit(dp, &duty->xsk[i].xsk->rx, w, EPOLLIN | EPOLLET);
		for (uint32_t i = 0; i < duty->nr_packet; i++)
			visit(dp, &duty->packet[i].socket->rx, w, EPOLLIN | EPOLLET);
		for (uint32_t i = 0; i < duty->nr_tap; i++)
			visit(dp, &duty->tap[i].tap->rx, w, EPOLLIN | EPOLLET);
		for (uint32_t i = 0; i < duty->nr_mcast; i++)
			visit(dp, &duty->mcast[i].mcast->rx, w, EPOLLIN); /* level: a burst may leave frames behind */
	}
	/* a receive ring's kicks go to the worker that reads the guest's socket of that number */
	for (uint32_t p = 0; p < snap->nr_ports; p++)
		for (uint32_t i = 0; i < snap->ports[p].nr_rx; i++)
			if (snap->ports[p].rx[i])
				visit(dp, &snap->ports[p].rx[i]->kick, (snap->ports[p].worker + i) % snap->nr_workers,
				      EPOLLIN | EPOLLET);
}

typedef void (*each_vring)(struct xv_vring *vr, bool *any);

static void for_each_vring(const struct snapshot *snap, each_vring visit, bool *any)
{
	for (uint32_t w = 0; w < snap->nr_workers; w++) {
		for (uint32_t i = 0; i < snap->duties[w].nr_tx; i++)
			visit(snap->duties[w].tx[i].vring, any);
		for (uint32_t i = 0; i < snap->duties[w].nr_ctrl; i++)
			visit(snap->duties[w].ctrl[i].vring, any);
	}
	for (uint32_t p = 0; p < snap->nr_ports; p++)
		for (uint32_t i = 0; i < snap->ports[p].nr_rx; i++)
			if (snap->ports[p].rx[i])
				visit(snap->ports[p].rx[i], any);
}

static void follows(struct xv_vring *vr, bool *any)
{
	*any |= vr->follows != NULL;
}

static void begin(struct xv_vring *vr, bool *any)
{
	(void)any;
	vring_begin(vr);
}

/*
 * No snapshot, nothing to do: when this returns no worker touches a ring, and what was queued for NICs has been flushed, as
 * far as they take it.
 */
static void hold(struct xv_dp *dp)
{
	store_once(&dp->held, dp->snap->serial);
	__atomic_store_n(&dp->snap, NULL, __ATOMIC_SEQ_CST);
	for (uint32_t i = 0; i < dp->conf.workers; i++)
		worker_wake(&dp->workers[i]); /* one that is about to sleep counts as held either way */
	xv_quiesce(dp);
}

static void set_limits(const struct xv_dp *dp, struct port *port)
{
	const struct policy *policy = port->policy;
	const uint64_t us = dp->cycles_per_us, now = cycles_now();

	if (!policy)
		return;
	port->tx_rate = limit_set(&port->guest->tx, &policy->tx, us, now);
	port->rx_rate = limit_set(&port->guest->rx, &policy->rx, us, now);
	port->storm = limit_set(&port->guest->storm, &policy->storm, us, now);
}

/* The table that the guest had is no worker's any more, if this is another. */
static void keep_learned(const struct port *port)
{
	if (port->guest->learned != port->learned)
		learned_free(port->guest->learned);
	port->guest->learned = port->learned;
}

/*
 * The workers are held while
 * - a source moves from one to another. No ring is ever read by two, no frame of the old worker's comes behind one of the new
 *   one's, and no event reaches a worker that does not have its source yet;
 * - rings take the place of others: they go on where those are, which must have come to a rest by then, and no frame may
 *   find neither.
 * What comes meanwhile, some microseconds, waits where it is.
 */
int xv_publish(struct xv_dp *dp, const struct xv_snapshot_conf *conf)
{
	struct snapshot *old = dp->snap, *snap;
	int result = snapshot_new(conf, dp->conf.workers, &snap);
	bool follow = false;

	if (result)
		return result;
	for (uint32_t i = 0; i < snap->nr_ports; i++) {
		snap->ports[i].guest->event_fd = dp->event_fd;
		snap->ports[i].guest->dp = dp;
		snap->ports[i].guest->cycles_per_us = dp->cycles_per_us;
		set_limits(dp, &snap->ports[i]);
	}
	snap->serial = old->serial + 1;
	for_each_vring(snap, follows, &follow);
	dp->moves = false;
	for_each_source(dp, snap, find_moves);
	if (dp->moves)
		hold(dp);
	dp->generation++;
	for_each_source(dp, snap, mark);
	for_each_source(dp, old, unregister_unmarked); /* first, for a new ring may have the old one's descriptor */
	for (uint32_t i = 0; i < dp->conf.workers; i++)
		store_once(&dp->workers[i].blind, false);
	for_each_source(dp, snap, ensure_registered);
	if (follow && !dp->moves)
		hold(dp);
	for_each_vring(snap, begin, NULL);
	__atomic_store_n(&dp->snap, snap, __ATOMIC_SEQ_CST);
	xv_quiesce(dp);
	for (uint32_t i = 0; i < snap->nr_ports; i++)
		keep_learned(&snap->ports[i]);
	for (uint32_t i = 0; i < dp->conf.workers; i++)
		worker_wake(&dp->workers[i]); /* rings may be full of frames whose kick came before */
	snapshot_free(old);
	return 0;
}
