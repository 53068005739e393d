/* SPDX-License-Identifier: Apache-2.0 */
/* The control virtqueue (virtio 1.2, 5.1.6.5), for front-ends that leave it to the backend. */
#ifndef XV_CTRLQ_H
#define XV_CTRLQ_H

#include "dp.h"

/* Serve a control virtqueue for a moment; whether there was work. Sets w->ctrl_waits while a command is not answered. */
bool ctrlq_poll(struct worker *w, const struct ctrl_source *source);

#endif
