/* SPDX-License-Identifier: Apache-2.0 */
/* The dirty log: which pages of the guest's memory we wrote, for whoever migrates it (vhost-user, "Migration"). */
#ifndef XV_LOG_H
#define XV_LOG_H

#include "mem.h"

/*
 * Mark the pages of [at, at + len), which were translated with `mem`, in the bitmap `log`: a bit for each 4096 bytes of
 * guest physical memory. Pages behind its end are not marked: control refuses a bitmap that is too small for the table.
 */
void log_write(const struct xv_mem *log, const struct xv_mem *mem, const void *at, uint32_t len);

#endif
