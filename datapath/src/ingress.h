/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a guest's frames come into the switch: may it send this one, and in which VLAN?
 *
 * The guest may change a frame at any moment. So the bytes that are judged are copied first, into a head of our own, and
 * the view is made of that head and of what follows it in the guest's memory: what is sent on is what was judged. That
 * is 18 bytes a frame, not a copy of it; with XV_POLICY_IP_CHECK 96, and more where headers are longer.
 *
 * In this order: link, VLAN, source MAC, IP addresses, then how many group frames. How many bytes it may send is
 * looked at before (worker.c), for there its frames wait, and whoever sends what is refused is to be slowed down, too.
 */
#ifndef XV_INGRESS_H
#define XV_INGRESS_H

#include "snapshot.h"
#include "tag.h"

struct origin;

/*
 * Give each view of a burst a head, and judge it: one that is not to go on is VIEW_REFUSED, and counted in from->drops.
 * The others' view->first.data has TAGGED_HEADER bytes of our own, fewer only if the frame has no more. Answers how many
 * were refused.
 */
uint32_t ingress_burst(const struct snapshot *snap, const struct origin *from, struct xv_burst *burst,
		       struct ingress_room *room);

#endif
