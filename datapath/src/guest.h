/* SPDX-License-Identifier: Apache-2.0 */
/* A configured guest: what outlives its connections. */
#ifndef XV_GUEST_H
#define XV_GUEST_H

#include "base.h"

struct guest_queue {
	struct xv_rx_counters rx;
	struct xv_tx_counters tx;
	struct spinlock rx_lock __attribute__((aligned(64))); /* several workers may deliver into one receive ring */
};

struct xv_guest {
	struct xv_fault fault;
	struct xv_ctrl_state ctrl;
	uint64_t announce; /* MAC in the low 48 bits and bit 63: a RARP is asked for */
	int event_fd;      /* the data plane's, -1 until first published */
	uint32_t max_pairs;
	struct xv_dp *dp;  /* NULL until first published */
	struct guest_queue queues[];
};

/* Give the guest up: the first fault is kept, control is told. Async-signal-safe. */
void guest_fault(struct xv_guest *guest, enum xv_fault_code code, uint32_t ring, uint64_t detail);

/* Have a worker look for what control asked of this guest's rings; nothing before it is published. In dp.c. */
void dp_request(struct xv_dp *dp);

static inline bool guest_faulted(const struct xv_guest *guest)
{
	return unlikely(load_once(&guest->fault.code) != XV_FAULT_NONE);
}

#endif
