// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * What a NIC does to frames before they are received, done by the sending end of a veth: tests/support/wire.py.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct mac {
	__u8 bytes[ETH_ALEN];
};

/* As an n-tuple rule `ether dst MAC action QUEUE`. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, struct mac);
	__type(value, __u32);
} queues SEC(".maps");

/* A socket's mark is the tag that its frames get, protocol and tag control information, beside the frame. */
SEC("tc")
int wire(struct __sk_buff *skb)
{
	struct mac destination;
	__u32 *queue;

	if (bpf_skb_load_bytes(skb, 0, &destination, sizeof(destination)))
		return TC_ACT_OK;
	queue = bpf_map_lookup_elem(&queues, &destination);
	if (queue)
		skb->queue_mapping = *queue + 1; /* 0: none chosen */
	if (skb->mark)
		bpf_skb_vlan_push(skb, bpf_htons(skb->mark >> 16), (__u16)skb->mark);
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual BSD/GPL";
