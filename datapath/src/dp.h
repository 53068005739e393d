/* SPDX-License-Identifier: Apache-2.0 */
/* The data plane as a whole: its workers and the snapshot they share. */
#ifndef XV_DP_H
#define XV_DP_H

#include <pthread.h>

#include "switch.h"

#define EVENTS 64 /* taken from epoll at once */

struct source_list {
	struct source **at; /* room in the snapshot */
	uint32_t nr;
};

struct worker {
	struct xv_dp *dp;
	uint32_t index;
	int epfd;
	int wake_fd;           /* eventfd: look at the snapshot, or stop */
	/* said to control */
	uint64_t seen;         /* epoch at the beginning of the turn */
	bool running, parked;  /* parked: asleep, holding nothing */
	bool blind;            /* control's: something could not be registered with epoll, so look again every so often */
	pthread_t thread;      /* valid while running */
	/* its own */
	uint64_t serial;       /* of the snapshot it works on */
	uint32_t requests_seen;
	struct source_list hot, waiting; /* hot.h */
	uint32_t sources;      /* that it polls when they are hot */
	uint64_t tend_due, sweep_due, waiting_due;
	uint64_t mcast_due, last_work, watchdog_turns;
	uint64_t contention_due, contended_until;
	long preempted;        /* how often the kernel had taken its CPU from it when it looked last */
	bool tx_stalls;        /* a guest's or a tap's frames wait for a guest's buffers, as long as their patience lasts */
	bool ctrl_waits;       /* a control command waits for control, or for other workers */
	uint64_t due;          /* when the first of the guests may send again that have sent all they may; UINT64_MAX: none */
	bool rx_stalls;        /* a NIC's frames wait for buffers; another worker may get their kick */
	uint32_t first;        /* where in `hot` its next turn begins: no port is always served last */
	struct call_ctx calls;
	struct dirty dirty;
	struct burst_chains chains;
	struct xv_burst burst;
	struct xv_view sent[XV_BURST]; /* a captured guest's burst, as it sent it */
	struct xv_worker_counters counters;
};

struct xv_dp {
	struct xv_dp_conf conf;
	int event_fd;
	struct snapshot *snap; /* NULL: workers are held, xv_publish() */
	uint64_t held;         /* serial of the snapshot that is being replaced, while snap is NULL */
	uint64_t epoch;        /* moved by xv_publish(), xv_quiesce() and workers that change a guest's rules */
	uint32_t requests;     /* moved when a guest is to be announced or interrupted */
	uint32_t generation;   /* of sources registered with epoll; never that of a source which is in no snapshot yet */
	bool moves;            /* control's: a source has another worker than before */
	bool stopping;
	uint64_t cycles_per_us;
	struct worker workers[];
};

void worker_wake(struct worker *worker);
/* Begin an epoch: whoever has seen it sees all that was stored before. */
uint64_t dp_new_epoch(struct xv_dp *dp);
/* Whether every worker but `except` (NULL: none) has begun a turn in this epoch, or holds nothing. */
bool dp_is_past(const struct xv_dp *dp, uint64_t epoch, const struct worker *except);
/*
 * Adopt the snapshot if it is new, and visit every hot source of the worker once; whether there was work. `all`: it is
 * about to sleep, so look at multicast, too, and let the lists be.
 */
bool worker_turn(struct worker *w, const struct snapshot *snap, bool all);

#endif
