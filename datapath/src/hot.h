/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which sources a worker looks at in every turn, so that its cost follows traffic and not the number of guests.
 *
 * Every source that a worker has (a guest's transmit or control ring, an AF_XDP or packet socket, a tap) is registered with
 * its epoll. A hot one is polled in every turn. One in which nothing came for a while is made cold: it is asked for
 * events and left alone until one comes. After xv_publish() all are hot, because kicks may have come before.
 *
 * No wake-up is lost. A hot source becomes cold in two steps, with turns between: it is armed (for a ring, the guest is told
 * to kick; then a full barrier), and if every look after that found nothing it goes. What came before the last look was
 * seen by it; what comes after it makes an event, because the ring was armed before, and sockets and taps always make one.
 * Events that a worker takes while a source is hot count as work, so a source does not go between an event and the look
 * that follows it.
 *
 * Frames for a guest that has no buffers may wait in their socket for as long as that takes. Such a source is no use in
 * every turn either: it waits in a list of its own, which is looked through when a receive ring is kicked, and every so often,
 * as another worker may get that kick, or disarm the ring.
 *
 * A few sources that have nothing cost less to poll than events: as long as there are no more, they all stay hot, and
 * guests are not asked for kicks while the worker is awake.
 *
 * A ring whose guest has sent all that it may stays hot until it has been looked at again: no event says when. It is not
 * armed meanwhile, and the worker sleeps no longer than until then (worker.c).
 *
 * What epoll refused stays hot. A guest that kicks for nothing keeps its rings hot, and costs no more than that: each of its
 * descriptors makes at most one event a look, and looks have their times.
 */
#ifndef XV_HOT_H
#define XV_HOT_H

#include <sys/epoll.h>

#include "dp.h"

/* All sources of the worker's duty are hot: it has just adopted the snapshot. Rings are disarmed. */
void hot_adopt(struct worker *w, const struct snapshot *snap);
/* Between two turns, at `now`, of a worker that is awake: take events, and let go of sources that had nothing for long. */
void hot_tend(struct worker *w, uint64_t now);
/* The turn that began at `now` found nothing: a look at epoll takes nothing from anybody. */
void hot_idle(struct worker *w, uint64_t now);
/* Before it sleeps: forget stale events. False: some source has become hot, look at it first. */
bool hot_drain(struct worker *w);
/* Ask all hot sources for events; then every one is to be looked at once more. */
void hot_arm(struct worker *w);
/* After the sleep, or instead of it: what the events are of becomes hot; many others that found nothing go cold. */
void hot_wake(struct worker *w, const struct epoll_event *events, int n);

#endif
