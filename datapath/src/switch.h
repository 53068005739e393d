/* SPDX-License-Identifier: Apache-2.0 */
/* Where a frame goes: by destination MAC and VLAN to a guest, to the uplink, or to everyone. */
#ifndef XV_SWITCH_H
#define XV_SWITCH_H

#include "snapshot.h"

#define DIRTY_MAX 256u /* more than a worker's share of the queues of several NICs */

/* NIC queues that frames were queued on, and that the kernel must be told of. */
struct dirty {
	struct xv_nicq *queues[DIRTY_MAX];
	uint32_t nr;
};

/* Where a burst comes from. */
struct origin {
	uint32_t port;          /* a guest, a host_port(), or NO_PORT: from a NIC */
	uint32_t nic;
	uint32_t hint;          /* queue it came in on: frames of one flow keep to one queue */
	struct uplink uplink;   /* nowhere: there is none, or the burst came from there */
	uint64_t *drops;        /* of the sending guest or host port; NULL for a NIC */
	bool judged;            /* a guest whose frames are looked at first */
	bool announces;         /* what we say in its name: it counts as none of its group frames */
};

/*
 * Forward a burst by its destination addresses; answers how many views, from the first on, are done with. Fewer than
 * burst->nr only when all that is left goes to one guest that has no buffers, which `*stalled` then names.
 */
uint32_t switch_burst(const struct snapshot *snap, const struct origin *from, struct xv_burst *burst, struct call_ctx *ctx,
		      struct dirty *dirty, struct xv_vring **stalled);
/* Forward a burst that XDP has already found to be for one guest. The same answer. */
uint32_t switch_to_guest(const struct snapshot *snap, uint32_t port, uint32_t hint, const struct xv_view *const *views,
			 uint32_t n, struct call_ctx *ctx, struct xv_vring **stalled);
/* Frames for the NIC's host port, which there is. `drops`: of who sent them, NULL for the NIC. */
void switch_to_host(const struct snapshot *snap, uint32_t nic, const struct xv_view *const *views, uint32_t n,
		    uint64_t *drops, struct call_ctx *ctx);
/* Count frames from the NIC that were for its host port and were dropped. */
void switch_drop_to_host(const struct snapshot *snap, uint32_t nic, uint64_t n);
/* Count frames that were for a guest (its place in the snapshot) and were dropped. */
void switch_drop(const struct snapshot *snap, uint32_t port, uint32_t hint, enum xv_drop why, uint32_t n);
/* GSO_BITs of what frames from a NIC may be joined to before they are switched to this guest. */
uint32_t switch_joins(const struct port *port);
/* Count frames dropped because the guest had no buffers for them. */
void switch_drop_stalled(struct xv_vring *stalled, uint32_t n);
/* Drop what switch_burst() was not done with, for want of the one guest's buffers that it named. */
void switch_give_up(const struct snapshot *snap, struct xv_vring *stalled, const struct xv_burst *burst, uint32_t done,
		    struct call_ctx *ctx);

#endif
