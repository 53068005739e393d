/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A port's frames for somebody who looks on: `xdpvhost capture`.
 *
 * A port that nobody looks at has no capture, and pays a predictable branch a burst. A worker that has frames of a captured
 * port copies their leading bytes into a ring (capring.h) that another process reads. It never waits: frames that
 * find the ring full are counted as lost, and go their way as always.
 *
 * The copies cost time that the worker's other ports want, too. So a worker gives all captures together an eighth of its time,
 * a millisecond at once (struct capture_share); what would be more is lost, too. Losing a frame costs next to nothing.
 *
 * Why a frame was dropped is known deep in the switch; the capture of its port comes later. In between the view carries it
 * (view.h: tx_drop, rx_drop).
 */
#ifndef XV_CAPTURE_H
#define XV_CAPTURE_H

#include "view.h"

#define CAPTURE_FATES XV_DROP_MAX /* instead of a reason: each view's own, if it has one */

/* What a worker may still spend on captures; its own. */
struct capture_share {
	int64_t most; /* cycles at once */
	int64_t left; /* less than 0: it has taken more than it had, and must save that first */
	uint64_t at;
};

#define CAPTURE_AT_ONCE_US 1000u

enum capture_direction {
	CAPTURE_TO,   /* to the guest; from the network, as a NIC sees it */
	CAPTURE_FROM, /* from the guest; to the network */
};

/*
 * Record views[0..n). `why`: they were dropped for it; CAPTURE_FATES: each view says it, in rx_drop (to) or tx_drop (from).
 */
void capture_views(struct xv_capture *capture, struct capture_share *share, const struct xv_view *const *views, uint32_t n,
		   enum capture_direction direction, uint32_t queue, enum xv_drop why);
/* The same of views that lie one behind another. */
void capture_row(struct xv_capture *capture, struct capture_share *share, const struct xv_view *views, uint32_t n,
		 enum capture_direction direction, uint32_t queue, enum xv_drop why);
/* Record that n frames were dropped which can't be shown. */
void capture_unseen(struct xv_capture *capture, struct capture_share *share, uint64_t n, enum capture_direction direction,
		    uint32_t queue, enum xv_drop why);

/* They are about to go (from: on from their sender; to: to a receiver): forget what became of them, or others, before. */
static inline void capture_begin(const struct xv_view *const *views, uint32_t n, enum capture_direction direction)
{
	for (uint32_t i = 0; i < n; i++) {
		struct xv_view *view = (struct xv_view *)(uintptr_t)views[i]; /* see view.h */

		*(direction == CAPTURE_FROM ? &view->tx_drop : &view->rx_drop) = 0;
	}
}

#endif
