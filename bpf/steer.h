/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel plane and control share: the maps of steer.bpf.c, their keys and values.
 * Mirrored by ctl/xdp/maps.py; tests/bpf/test_steer.py compares the two.
 */
#ifndef XDPVHOST_STEER_H
#define XDPVHOST_STEER_H

#include <linux/types.h>

#define STEER_VLAN_NONE 0      /* untagged, and tagged with VLAN 0, which is a priority and no VLAN */
#define STEER_VLAN_ANY 0xffff  /* every tagged frame whose own VLAN has no entry */

/* Sizes before control sets the real ones, ahead of loading. */
#define STEER_MAX_SLOTS 512
#define STEER_MAX_QUEUES 64

/*
 * Section .bss: who owns an address in a VLAN, an open-addressed table that the program reads without a helper call, and
 * that control writes through a mapping. An address is in one of the STEER_PROBES entries from steer_hash() on, before
 * the first that is empty; one that was taken out leaves `gone` behind, unless nothing follows.
 *
 * Control writes an entry's slot before its key, and the program looks at the key once more after the slot: an entry that
 * changes hands meanwhile is nobody's.
 */
struct steer_mac {
	__u16 vlan; /* host byte order */
	__u8 mac[6];
};

struct steer_entry {
	__u64 key;  /* struct steer_mac; STEER_EMPTY; STEER_GONE */
	__u32 slot;
	__u32 unused;
};

#define STEER_BITS 16
#define STEER_ENTRIES (1 << STEER_BITS) /* at most 28 % of them taken: see MAX_MACS */
#define STEER_PROBES 32
#define STEER_EMPTY 0
#define STEER_GONE_MAC 0x01 /* first byte of the address in an entry that is gone: a group's, which is never looked up */

/* Section .rodata, set before loading, so that the verifier sees constants. All zero: nothing is steered. */
struct steer_config {
	__u32 nr_queues; /* receive queues of the NIC */
	__u32 unused;
	__u64 factor;    /* odd, and random: who can't know it can't choose addresses that meet in the table */
};

/* Where the search for a key begins. */
static inline __u32 steer_hash(__u64 key, __u64 factor)
{
	__u64 hash = key * factor;

	return (__u32)(((hash ^ hash >> 32) * 0x9e3779b97f4a7c15ull) >> (64 - STEER_BITS));
}

/* What became of a frame. */
enum steer_verdict {
	STEER_REDIRECT,       /* to the guest's socket; the kernel may still drop it there: see XDP_STATISTICS */
	STEER_NO_SOCKET,      /* a guest's, but it has no socket at this queue: dropped */
	STEER_PASS_UNICAST,   /* no guest's: to the kernel */
	STEER_PASS_MULTICAST, /* broadcast or multicast: to the kernel, and from there to everybody who listens */
	STEER_SHORT,          /* no whole Ethernet and VLAN header: to the kernel */
	STEER_NR_VERDICTS
};

/*
 * Map `verdicts`, per-CPU array at STEER_ROW(nr_queues, slot, queue); the host, which has no slot, is STEER_HOST.
 * Map `xsks`, XSKMAP at STEER_XSK(nr_queues, slot, queue).
 */
struct steer_counts {
	__u64 frames[STEER_NR_VERDICTS];
};

#define STEER_HOST (-1)
#define STEER_ROW(nr_queues, slot, queue) (((slot) + 1) * (nr_queues) + (queue))
#define STEER_XSK(nr_queues, slot, queue) ((slot) * (nr_queues) + (queue))

#endif
