/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A configured guest: what outlives its connections.
 *
 * What a guest asked for through the control virtqueue (its rules) is read by every worker that has frames for it, and
 * changed by the one that has its control virtqueue. Readers take no lock: there are two sets of rules, `rules` points to
 * the one in force, and the other one is changed and then put in its place. It may be changed again when every worker has
 * begun a turn after that, or sleeps: no turn holds on to rules of the one before. A command is answered at that moment,
 * too, so when the guest sees its answer, no worker goes by the old rules any more (ctrlq.c).
 */
#ifndef XV_GUEST_H
#define XV_GUEST_H

#include "base.h"
#include "bucket.h"
#include "filter.h"
#include "learn.h"
#include "rss.h"

struct guest_queue {
	struct xv_rx_counters rx;
	struct xv_tx_counters tx;
	struct spinlock rx_lock __attribute__((aligned(64))); /* several workers may deliver into one receive ring */
};

struct rx_rules {
	struct filter filter;
	struct rss rss;
};

/* A request to control for other addresses. Who may move it on: see the arrows. */
enum mac_request_state {
	MAC_IDLE,    /* -> ASKED: the worker */
	MAC_ASKED,   /* -> TAKEN: control; -> IDLE: the worker, when time is up */
	MAC_TAKEN,   /* -> GRANTED, DENIED: control; -> GIVEN_UP: the worker, when time is up */
	MAC_GRANTED, /* -> IDLE: the worker, which answers the guest */
	MAC_DENIED,  /* -> IDLE: as above */
	MAC_GIVEN_UP, /* -> IDLE: control, which undoes what it did */
};

/* The control virtqueue's worker: the command that it has not answered yet. */
struct ctrl_work {
	enum { CTRL_NONE, CTRL_ASKS_CONTROL, CTRL_WAITS_FOR_WORKERS } state;
	bool ok;            /* the answer, when every worker has seen the change */
	uint8_t class;
	uint32_t rest;      /* turns before the next command is looked at */
	uint64_t epoch;     /* of the last change of the rules, 0 when every worker has seen it */
	uint64_t deadline;  /* in cycles */
};

#define OFFLOAD_CSUM (1u << 31) /* beside GSO_BITs in xv_guest.offloads */

struct xv_guest {
	struct xv_fault fault;
	struct xv_ctrl_state ctrl;
	uint64_t announce; /* MAC in the low 48 bits and bit 63: a RARP is asked for */
	uint64_t mac;      /* as configured, see filter_word() */
	int event_fd;      /* the data plane's, -1 until first published */
	uint32_t max_pairs;
	struct xv_dp *dp;  /* NULL until first published */
	uint64_t cycles_per_us; /* of that, as is event_fd */
	uint32_t offloads; /* GSO_BITs and OFFLOAD_CSUM: of what was negotiated, what is switched on */
	bool fresh;        /* control's: its control virtqueue has not been published since the last reset */
	const struct rx_rules *rules; /* one of `room` */
	struct rx_rules room[2];
	struct ctrl_work work;
	struct learned *learned; /* as of the last publication, NULL: it may not */
	struct limit tx, rx, storm;
	uint32_t mac_state; /* enum mac_request_state */
	struct xv_mac_request mac_request;
	struct guest_queue queues[];
};

/* Give the guest up: the first fault is kept, control is told. Async-signal-safe. */
void guest_fault(struct xv_guest *guest, enum xv_fault_code code, uint32_t ring, uint64_t detail);

/*
 * It uses an address (mac_key()) that it has not been given: whether it may. `may_add`: it is nobody else's. A new one is
 * told to control.
 */
bool guest_learns(const struct xv_guest *guest, struct learned *table, uint64_t key, bool may_add);

/* Its control virtqueue is about to be published. `resumed`: its driver has used it before. */
void guest_ctrl_begins(struct xv_guest *guest, bool resumed);

/* Have a worker look for what control asked of this guest's rings; nothing before it is published. In dp.c. */
void dp_request(struct xv_dp *dp);

static inline bool guest_faulted(const struct xv_guest *guest)
{
	return unlikely(load_once(&guest->fault.code) != XV_FAULT_NONE);
}

#endif
