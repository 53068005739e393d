// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * VMDq in software: sorts the frames that a NIC receives into the AF_XDP sockets of the guests.
 *
 * (VLAN, destination MAC) -> guest's slot, and (slot, receive queue) -> socket, because a socket takes frames from the
 * one queue that it is bound to. Whatever is no guest's is passed to the kernel, which keeps the NIC as its own. So is
 * every broadcast and multicast frame: one frame can't be redirected to many sockets, and the data plane hears those
 * on a packet socket. A guest's frame at a queue where the guest has no socket is dropped, never passed: the host must
 * not see it, nor answer it.
 *
 * The VLAN is the 802.1Q tag's. An 802.1ad service tag is another number space: such frames go to those guests that
 * take any tag.
 *
 * Compiled twice. steer_tags.bpf.o (STEER_TAGS_BESIDE) is for devices whose drivers hand over frames with the outermost tag
 * beside them: a NIC that strips it, a veth whose other end leaves it to "the device". It asks the driver, and puts the tag
 * of a guest's frame back into it, so that the data plane finds every tag in its frame. What it passes stays as it came.
 * The kernel takes it on one device only (it is "device-bound", since 6.8), in native mode, and steer.bpf.o anywhere.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <xdp/xdp_helpers.h>

#include "steer.h"

#define VLAN_VID_MASK 0x0fff

struct vlan_tag {
	__be16 tci;
	__be16 proto;
};

/* The outermost tag of a frame. Host byte order but for the protocol; `proto` 0: there is none. */
struct tag {
	__be16 proto;
	__u16 tci;
};

const volatile struct steer_config config;
volatile struct steer_entry table[STEER_ENTRIES];

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, STEER_MAX_SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, STEER_MAX_SLOTS + 1);
	__type(key, __u32);
	__type(value, struct steer_counts);
} verdicts SEC(".maps");

/* A program that comes after this one in libxdp's dispatcher sees what was passed. */
struct {
	__uint(priority, 50);
	__uint(XDP_PASS, 1);
} XDP_RUN_CONFIG(xdpvhost_steer);

/* A queue that the NIC got after control looked is counted at queue 0: its own row would be the next slot's. */
static __always_inline void count(__u32 queue, int slot, enum steer_verdict verdict)
{
	__u32 row = STEER_ROW(config.nr_queues, slot, queue < config.nr_queues ? queue : 0);
	struct steer_counts *counts = bpf_map_lookup_elem(&verdicts, &row);

	if (counts)
		counts->frames[verdict]++;
}

/* The destination address as a key, in three reads: it is aligned to two bytes, which the header's type does not say. */
static __always_inline __u64 make_key(const struct ethhdr *eth, __u16 vlan)
{
	const __u16 *mac = (const void *)eth->h_dest;
	union {
		__u16 words[4];
		__u64 key;
	} u = { .words = { vlan, mac[0], mac[1], mac[2] } };

	return u.key;
}

/* The slot that has this key, or -1. */
static __always_inline int find(__u64 key)
{
	__u32 at = steer_hash(key, config.factor);

	for (int i = 0; i < STEER_PROBES; i++, at++) {
		volatile struct steer_entry *entry = &table[at & (STEER_ENTRIES - 1)];
		__u64 found = entry->key;

		if (found == STEER_EMPTY)
			break;
		if (found == key) {
			__u32 slot = entry->slot;

			return entry->key == key ? (int)slot : -1;
		}
	}
	return -1;
}

#ifdef STEER_TAGS_BESIDE

extern int bpf_xdp_metadata_rx_vlan_tag(const struct xdp_md *ctx, __be16 *vlan_proto, __u16 *vlan_tci) __ksym;

/* The tag that the driver has beside the frame. */
static __always_inline struct tag tag_beside(struct xdp_md *ctx)
{
	struct tag tag = {};

	if (bpf_xdp_metadata_rx_vlan_tag(ctx, &tag.proto, &tag.tci))
		tag.proto = 0;
	return tag;
}

/* Puts it where it was on the wire. False: there is no room before the frame, which no driver that we know of does. */
static __always_inline int put_tag_back(struct xdp_md *ctx, struct tag tag)
{
	struct vlan_ethhdr {
		__u16 macs[6];
		__be16 proto;
		__be16 tci;
	} *eth;
	const __u16 *macs;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct vlan_tag)))
		return 0;
	eth = (void *)(long)ctx->data;
	macs = eth->macs + sizeof(struct vlan_tag) / sizeof(*macs);
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return 0;
	for (int i = 0; i < 6; i++)
		eth->macs[i] = macs[i];
	eth->proto = tag.proto;
	eth->tci = bpf_htons(tag.tci);
	return 1;
}

#else

static __always_inline struct tag tag_beside(struct xdp_md *ctx __attribute__((unused)))
{
	return (struct tag){};
}

static __always_inline int put_tag_back(struct xdp_md *ctx __attribute__((unused)),
					struct tag tag __attribute__((unused)))
{
	return 1;
}

#endif

static __always_inline int find_guest(const struct ethhdr *eth, __u16 vlan, int tagged)
{
	int slot = find(make_key(eth, vlan));

	if (slot < 0 && tagged)
		slot = find(make_key(eth, STEER_VLAN_ANY));
	return slot;
}

SEC("xdp")
int xdpvhost_steer(struct xdp_md *ctx)
{
	const void *data = (const void *)(long)ctx->data;
	const void *end = (const void *)(long)ctx->data_end;
	const struct ethhdr *eth = data;
	const struct vlan_tag *tag = data + sizeof(*eth);
	__u32 queue = ctx->rx_queue_index;
	__u16 vlan = STEER_VLAN_NONE;
	struct tag beside, outer;
	int tagged = 0;
	int action;
	int slot;

	if (!config.nr_queues)
		return XDP_PASS;
	if (data + sizeof(*eth) > end) {
		count(queue, STEER_HOST, STEER_SHORT);
		return XDP_PASS;
	}
	if (eth->h_dest[0] & 1) {
		count(queue, STEER_HOST, STEER_PASS_MULTICAST);
		return XDP_PASS;
	}
	outer = beside = tag_beside(ctx);
	if (!outer.proto && eth->h_proto == bpf_htons(ETH_P_8021Q)) {
		if ((const void *)(tag + 1) > end) {
			count(queue, STEER_HOST, STEER_SHORT);
			return XDP_PASS;
		}
		outer.tci = bpf_ntohs(tag->tci);
	}
	if (!outer.proto)
		outer.proto = eth->h_proto;
	if (outer.proto == bpf_htons(ETH_P_8021Q)) {
		vlan = outer.tci & VLAN_VID_MASK;
		tagged = vlan != STEER_VLAN_NONE;
	} else if (outer.proto == bpf_htons(ETH_P_8021AD)) {
		vlan = STEER_VLAN_ANY;
		tagged = 1;
	}

	slot = find_guest(eth, vlan, tagged);
	if (slot < 0) {
		count(queue, STEER_HOST, STEER_PASS_UNICAST);
		return XDP_PASS;
	}
	action = XDP_DROP;
	if (queue < config.nr_queues)
		action = bpf_redirect_map(&xsks, STEER_XSK(config.nr_queues, slot, queue), XDP_DROP);
	if (action == XDP_REDIRECT && beside.proto && !put_tag_back(ctx, beside))
		action = XDP_DROP;
	count(queue, slot, action == XDP_REDIRECT ? STEER_REDIRECT : STEER_NO_SOCKET);
	return action;
}

char _license[] SEC("license") = "Dual BSD/GPL";
