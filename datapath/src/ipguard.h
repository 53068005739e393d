/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Does a guest speak for itself only? Its ARP, neighbour discovery, DHCP and IP, by the addresses that it was given.
 *
 * What passes: packets from a listed address, or from the link-local address that its MAC makes (RFC 4291, appendix A);
 * what has to come from no address at all: ARP probes, DHCP and DHCPv6 clients, duplicate address detection, router
 * solicitations, MLD. What does not: another's address as a packet's source, as the sender of ARP or as the target of a
 * neighbour advertisement; another's MAC in any of those; a router's advertisements and redirects; what a DHCP server says.
 *
 * Behind any VLAN tags and LLC/SNAP headers (CVE-2021-27853, -27854, -27861, -27862), and behind IPv6 extension headers.
 * What cannot be seen does not pass: headers that end behind the bytes to be looked at, or that the frame has not got;
 * neighbour discovery in a fragment (RFC 6980); a first fragment without its ports. Of later fragments the source
 * counts alone: without a first one they are nothing. Any other Ethernet type passes.
 *
 * The guest may change a frame at any moment, so the bytes given here must be private, and those to be sent on.
 */
#ifndef XV_IPGUARD_H
#define XV_IPGUARD_H

#include "base.h"

#define IP_GUARD_FEW 96u    /* bytes that decide nearly always */
#define IP_GUARD_BYTES 256u /* bytes that are looked at at most: two tags, IPv6, and 194 more */

struct ip_guard; /* the addresses; immutable */

enum ip_verdict {
	IP_PASSES,
	IP_DROPPED,
	IP_UNSEEN, /* what decides lies behind the bytes that were given, in the frame: give more, or drop it */
};

/* 0 or -ENOMEM. Only addresses of version 4 and 6 count. To be freed with free(). */
int ip_guard_new(const struct xv_ip *addresses, uint32_t n, struct ip_guard **out);

/* Whether it goes on behind a header of this kind: what is there is judged, too. */
bool ip_guard_looks_behind(uint8_t protocol);

/*
 * Judge a frame of `len` bytes by its first `have`, no fewer than an Ethernet header. Its source MAC is taken for the
 * guest's: whether it is has been looked at before.
 */
enum ip_verdict ip_guard_judge(const struct ip_guard *guard, const uint8_t *frame, uint32_t have, uint32_t len);

#endif
