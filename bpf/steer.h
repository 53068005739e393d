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
#define STEER_MAX_MACS 1024
#define STEER_MAX_SLOTS 512
#define STEER_MAX_QUEUES 64

/* Map `guests`, hash: who owns an address in a VLAN. */
struct steer_mac {
	__u16 vlan; /* host byte order */
	__u8 mac[6];
};

struct steer_guest {
	__u32 slot;
};

/* Map `config`, array of one. All zero: nothing is steered. */
struct steer_config {
	__u32 nr_queues; /* receive queues of the NIC */
};

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
