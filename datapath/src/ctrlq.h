/* SPDX-License-Identifier: Apache-2.0 */
/* The control virtqueue (virtio 1.2, 5.1.6.5), for front-ends that leave it to the backend. */
#ifndef XV_CTRLQ_H
#define XV_CTRLQ_H

#include "port.h"

/* Answer the waiting commands; the number of them. */
uint32_t ctrlq_poll(struct xv_vring *vr, uint64_t features, uint32_t max_pairs, struct call_ctx *ctx);

#endif
