/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The benchmark's network: sends prepared frames into the veth, and counts and drops what comes out of it. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} device SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} received SEC(".maps");

SEC("xdp")
int source(struct xdp_md *ctx __attribute__((unused)))
{
	__u32 zero = 0;
	__u32 *ifindex = bpf_map_lookup_elem(&device, &zero);

	return ifindex ? bpf_redirect(*ifindex, 0) : XDP_ABORTED;
}

SEC("xdp")
int sink(struct xdp_md *ctx __attribute__((unused)))
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&received, &zero);

	if (count)
		++*count;
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
