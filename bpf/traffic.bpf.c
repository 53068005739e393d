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

/* The same, at a rate: whoever starts it sets `interval`; it counts what it has sent. */
struct pace {
	__u64 interval; /* nanoseconds between two frames */
	__u64 due, sent;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pace);
} pace SEC(".maps");

#define CATCH_UP 100000 /* nanoseconds: what was missed for longer is not sent later */

SEC("xdp")
int paced(struct xdp_md *ctx __attribute__((unused)))
{
	__u32 zero = 0;
	__u32 *ifindex = bpf_map_lookup_elem(&device, &zero);
	struct pace *p = bpf_map_lookup_elem(&pace, &zero);
	__u64 now = bpf_ktime_get_ns();

	if (!ifindex || !p || !p->interval)
		return XDP_ABORTED;
	if (now < p->due)
		return XDP_DROP;
	if (now - p->due > CATCH_UP)
		p->due = now - CATCH_UP;
	p->due += p->interval;
	p->sent++;
	return bpf_redirect(*ifindex, 0);
}

/* Counts and drops what goes to addresses that begin with 06, and passes the rest. */
SEC("xdp")
int sift(struct xdp_md *ctx)
{
	const __u8 *data = (const void *)(long)ctx->data, *end = (const void *)(long)ctx->data_end;
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&received, &zero);

	if (data + 1 > end || data[0] != 0x06)
		return XDP_PASS;
	if (count)
		++*count;
	return XDP_DROP;
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
