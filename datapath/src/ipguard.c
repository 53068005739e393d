// SPDX-License-Identifier: Apache-2.0
#include "ipguard.h"

#include <errno.h>
#include <netinet/icmp6.h>
#include <stdlib.h>

#include "nethdr.h"

#define DHCP_SERVER 67u
#define DHCP_CLIENT 68u
#define DHCP6_CLIENT 546u
#define DHCP6_SERVER 547u

#define NEXT_MOBILITY 135u
#define NEXT_HIP 139u
#define NEXT_SHIM6 140u
#define MLD2_REPORT 143u /* RFC 3810; netinet/icmp6.h has MLD of version 1 only */

struct ip6 {
	uint64_t high, low;
};

struct ip_guard {
	uint32_t nr_ip4, nr_ip6;
	uint32_t *ip4;  /* sorted, as is the next */
	struct ip6 ip6[];
};

/* ---- the addresses ---- */

static uint64_t be64(const uint8_t *p)
{
	return (uint64_t)be32(p) << 32 | be32(p + 4);
}

static struct ip6 ip6_at(const uint8_t *p)
{
	return (struct ip6){be64(p), be64(p + 8)};
}

static int compare_ip4(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static int compare_ip6(const void *a, const void *b)
{
	const struct ip6 *x = a, *y = b;

	if (x->high != y->high)
		return x->high < y->high ? -1 : 1;
	return x->low < y->low ? -1 : x->low > y->low;
}

int ip_guard_new(const struct xv_ip *addresses, uint32_t n, struct ip_guard **out)
{
	struct ip_guard *guard = calloc(1, sizeof(*guard) + n * (sizeof(guard->ip6[0]) + sizeof(guard->ip4[0])));

	if (!guard)
		return -ENOMEM;
	guard->ip4 = (uint32_t *)&guard->ip6[n];
	for (uint32_t i = 0; i < n; i++) {
		if (addresses[i].version == 4)
			guard->ip4[guard->nr_ip4++] = be32(addresses[i].address);
		else if (addresses[i].version == 6)
			guard->ip6[guard->nr_ip6++] = ip6_at(addresses[i].address);
	}
	qsort(guard->ip4, guard->nr_ip4, sizeof(guard->ip4[0]), compare_ip4);
	qsort(guard->ip6, guard->nr_ip6, sizeof(guard->ip6[0]), compare_ip6);
	*out = guard;
	return 0;
}

static bool has_ip4(const struct ip_guard *guard, uint32_t address)
{
	uint32_t low = 0, high = guard->nr_ip4;

	while (low < high) {
		const uint32_t half = low + (high - low) / 2;

		if (guard->ip4[half] == address)
			return true;
		if (guard->ip4[half] < address)
			low = half + 1;
		else
			high = half;
	}
	return false;
}

static bool has_ip6(const struct ip_guard *guard, const struct ip6 *address)
{
	uint32_t low = 0, high = guard->nr_ip6;

	while (low < high) {
		const uint32_t half = low + (high - low) / 2;
		const int order = compare_ip6(&guard->ip6[half], address);

		if (!order)
			return true;
		if (order < 0)
			low = half + 1;
		else
			high = half;
	}
	return false;
}

/* The frame's bytes, and how many of them there are to be seen. */
struct look {
	const struct ip_guard *guard;
	const uint8_t *frame;
	uint32_t have, len;
};

/* The address that its MAC makes: fe80::/64 with the modified EUI-64 (RFC 4291, appendix A). */
static bool is_link_local(const uint8_t *mac, const struct ip6 *address)
{
	const uint64_t id = (uint64_t)(be32(mac) >> 8 ^ 0x020000u) << 40 | 0xfffeull << 24 | (uint64_t)mac[3] << 16 | be16(mac + 4);

	return address->high == 0xfe80ull << 48 && address->low == id;
}

static bool owns_ip6(const struct look *l, const struct ip6 *address)
{
	return is_link_local(l->frame + 6, address) || has_ip6(l->guard, address);
}

/* ---- the frame ---- */

/* Whether the bytes up to `end` are there to be looked at. */
static enum ip_verdict sees(const struct look *l, uint32_t end)
{
	if (likely(end <= l->have))
		return IP_PASSES;
	return end <= l->len ? IP_UNSEEN : IP_DROPPED;
}

static enum ip_verdict verdict(bool passes)
{
	return passes ? IP_PASSES : IP_DROPPED;
}

/* RFC 826, RFC 5227 (probes), RFC 903. */
static enum ip_verdict judge_arp(const struct look *l, uint32_t at, bool reverse)
{
	const uint8_t *arp = l->frame + at;
	const enum ip_verdict seen = sees(l, at + 28);
	uint32_t operation, sender;

	if (seen != IP_PASSES)
		return seen;
	operation = be16(arp + 6);
	sender = be32(arp + 14);
	/* of Ethernet or IEEE 802, for IPv4 */
	if ((be16(arp) != 1 && be16(arp) != 6) || be16(arp + 2) != 0x0800 || arp[4] != 6 || arp[5] != 4)
		return IP_DROPPED;
	if (memcmp(arp + 8, l->frame + 6, 6))
		return IP_DROPPED;
	if (reverse) /* who asks, as an announcement does, but not who answers */
		return verdict(operation == 3 && (!sender || has_ip4(l->guard, sender)));
	return verdict((operation == 1 && !sender) || ((operation == 1 || operation == 2) && has_ip4(l->guard, sender)));
}

/* Ports by which hosts tell a DHCP server's word. Clients look at the one it comes to, too. */
static bool is_dhcp_server(bool ipv6, uint32_t from, uint32_t to)
{
	return ipv6 ? from == DHCP6_SERVER || to == DHCP6_CLIENT : from == DHCP_SERVER || to == DHCP_CLIENT;
}

/* The same frame without what follows the IP packet that ends there: nothing in a trailer is part of it. */
static struct look without_trailer(const struct look *l, uint32_t end)
{
	const uint32_t len = MIN(l->len, end);

	return (struct look){l->guard, l->frame, MIN(l->have, len), len};
}

static enum ip_verdict judge_ip4(const struct look *whole, uint32_t at)
{
	const uint8_t *ip = whole->frame + at;
	enum ip_verdict seen = sees(whole, at + 20);
	uint32_t source, from, to, fragment;
	struct look packet;
	const struct look *l = &packet;
	bool owned;

	if (seen != IP_PASSES)
		return seen;
	if (ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
		return IP_DROPPED;
	packet = without_trailer(whole, at + be16(ip + 2));
	source = be32(ip + 12);
	owned = has_ip4(l->guard, source);
	fragment = be16(ip + 6) & 0x3fff;
	if (likely(ip[9] != IPPROTO_UDP) || fragment & 0x1fff)
		return verdict(owned);
	at += 4u * (ip[0] & 15);
	seen = sees(l, at + 4);
	if (seen != IP_PASSES)
		return seen;
	from = be16(l->frame + at);
	to = be16(l->frame + at + 2);
	if (is_dhcp_server(false, from, to))
		return IP_DROPPED;
	return verdict(owned || (!source && !fragment && from == DHCP_CLIENT && to == DHCP_SERVER));
}

/* The options from `at` to `end`: link-layer addresses are its own. `none`: there may be none of them. */
static bool options_are_honest(const struct look *l, uint32_t at, uint32_t end, bool none)
{
	while (at < end) {
		const uint8_t *option = l->frame + at;
		uint32_t len;

		if (end - at < 8)
			return false;
		len = 8u * option[1];
		if (!len || len > end - at)
			return false;
		if (option[0] == ND_OPT_SOURCE_LINKADDR || option[0] == ND_OPT_TARGET_LINKADDR)
			if (none || len != 8 || memcmp(option + 2, l->frame + 6, 6))
				return false;
		at += len;
	}
	return true;
}

/* Neighbour discovery (RFC 4861): `at` is its ICMPv6 header, and `end` where the packet ends. `source` NULL: ::. */
static enum ip_verdict judge_nd(const struct look *l, uint32_t at, uint32_t end, const struct ip6 *source)
{
	const uint8_t type = l->frame[at];
	const uint32_t fixed = at + (type == ND_ROUTER_SOLICIT ? 8 : 24);
	enum ip_verdict seen;
	struct ip6 target;

	if (type == ND_ROUTER_ADVERT || type == ND_REDIRECT || fixed > end)
		return IP_DROPPED;
	seen = sees(l, end);
	if (seen != IP_PASSES)
		return seen;
	if (!source && type == ND_NEIGHBOR_ADVERT)
		return IP_DROPPED;
	if (type == ND_NEIGHBOR_ADVERT || (type == ND_NEIGHBOR_SOLICIT && !source)) {
		target = ip6_at(l->frame + at + 8);
		if (!owns_ip6(l, &target))
			return IP_DROPPED;
	}
	return verdict(options_are_honest(l, fixed, end, !source));
}

static enum ip_verdict judge_icmp6(const struct look *l, uint32_t at, uint32_t end, const struct ip6 *source, bool fragment)
{
	const enum ip_verdict seen = sees(l, at + 4);
	uint8_t type;

	if (seen != IP_PASSES)
		return seen;
	type = l->frame[at];
	if (type >= ND_ROUTER_SOLICIT && type <= ND_REDIRECT)
		return fragment ? IP_DROPPED : judge_nd(l, at, end, source);
	return verdict(source || (!fragment && (type == MLD_LISTENER_REPORT || type == MLD_LISTENER_REDUCTION ||
						type == MLD2_REPORT)));
}

static enum ip_verdict judge_udp6(const struct look *l, uint32_t at, const struct ip6 *source, bool fragment)
{
	const enum ip_verdict seen = sees(l, at + 4);
	uint32_t from, to;

	if (seen != IP_PASSES)
		return seen;
	from = be16(l->frame + at);
	to = be16(l->frame + at + 2);
	if (is_dhcp_server(true, from, to))
		return IP_DROPPED;
	return verdict(source || (!fragment && from == DHCP6_CLIENT && to == DHCP6_SERVER));
}

/* Bytes of an extension header of which 8 can be seen; 0: it is none. */
static uint32_t extension_bytes(uint8_t kind, const uint8_t *header)
{
	switch (kind) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case NEXT_MOBILITY:
	case NEXT_HIP:
	case NEXT_SHIM6:
		return 8u * (header[1] + 1u);
	case IPPROTO_AH:
		return 4u * (header[1] + 2u);
	case IPPROTO_FRAGMENT:
		return 8;
	default:
		return 0;
	}
}

static bool is_extension(uint8_t kind)
{
	return extension_bytes(kind, (const uint8_t[2]){0, 0});
}

bool ip_guard_looks_behind(uint8_t protocol)
{
	return is_extension(protocol);
}

static enum ip_verdict judge_ip6(const struct look *whole, uint32_t at)
{
	const uint8_t *ip = whole->frame + at;
	enum ip_verdict seen = sees(whole, at + 40);
	struct ip6 address;
	const struct ip6 *source = &address;
	struct look packet;
	const struct look *l = &packet;
	bool fragment = false;
	uint32_t end;
	uint8_t next;

	if (seen != IP_PASSES)
		return seen;
	if (ip[0] >> 4 != 6)
		return IP_DROPPED;
	end = at + 40 + be16(ip + 4);
	packet = without_trailer(whole, end);
	address = ip6_at(ip + 8);
	if (!(address.high | address.low))
		source = NULL;
	else if (!owns_ip6(l, source))
		return IP_DROPPED;
	next = ip[6];
	at += 40;
	while (unlikely(is_extension(next))) {
		const uint8_t *header = l->frame + at;

		seen = sees(l, at + 8);
		if (seen != IP_PASSES)
			return seen;
		if (next == IPPROTO_FRAGMENT) {
			if (be16(header + 2) & 0xfff8) /* not the first */
				return verdict(source);
			fragment = true;
		}
		at += extension_bytes(next, header);
		next = header[0];
	}
	if (next == IPPROTO_ICMPV6)
		return judge_icmp6(l, at, end, source, fragment);
	if (next == IPPROTO_UDP)
		return judge_udp6(l, at, source, fragment);
	return verdict(source);
}

/*
 * The place of the Ethernet type that counts: behind tags, and behind LLC and SNAP headers (RFC 1042), which some receivers
 * take as readily. IP_PASSES with *at 0: it is LLC, and not IP.
 */
static enum ip_verdict find_type(const struct look *l, uint32_t *at)
{
	bool snap = false;

	for (*at = 12;;) {
		const uint8_t *type = l->frame + *at;
		enum ip_verdict seen = sees(l, *at + 2);

		if (seen != IP_PASSES)
			return seen;
		if (net_is_tag(type) || be16(type) == 0x9100) {
			*at += 4;
			continue;
		}
		if (likely(be16(type) >= 0x0600))
			return IP_PASSES;
		/* a length, or what claims to be one */
		seen = snap ? IP_DROPPED : sees(l, *at + 5);
		if (seen != IP_PASSES)
			return seen;
		if ((type[2] & 0xfe) == 0x06 || (type[2] & 0xfe) == 0x98) /* IP and ARP, before there was SNAP */
			return IP_DROPPED;
		if ((type[2] & 0xfe) != 0xaa || (type[3] & 0xfe) != 0xaa) {
			*at = 0;
			return IP_PASSES;
		}
		seen = sees(l, *at + 10);
		if (seen != IP_PASSES)
			return seen;
		if (type[5] || type[6] || (type[7] && type[7] != 0xf8)) { /* a maker's own, not an Ethernet type */
			*at = 0;
			return IP_PASSES;
		}
		*at += 8;
		snap = true;
	}
}

enum ip_verdict ip_guard_judge(const struct ip_guard *guard, const uint8_t *frame, uint32_t have, uint32_t len)
{
	const struct look l = {guard, frame, MIN(have, IP_GUARD_BYTES), len};
	uint32_t at;
	const enum ip_verdict seen = find_type(&l, &at);

	if (seen != IP_PASSES || !at)
		return seen;
	switch (be16(frame + at)) {
	case 0x0806:
		return judge_arp(&l, at + 2, false);
	case 0x8035:
		return judge_arp(&l, at + 2, true);
	case 0x0800:
		return judge_ip4(&l, at + 2);
	case 0x86dd:
		return judge_ip6(&l, at + 2);
	default:
		return IP_PASSES;
	}
}
