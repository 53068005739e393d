// SPDX-License-Identifier: Apache-2.0
#include "vring.h"

#include "nethdr.h"

#include <errno.h>
#include <linux/vhost_types.h>
#include <linux/virtio_config.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* Where a walk through descriptors is. A packed ring's chain lies in consecutive entries and its length is known. */
struct walk {
	const uint8_t *table; /* NULL: an indirect table that lies in two regions, read piecewise */
	uint64_t table_gpa;
	uint32_t size;        /* entries of the table */
	uint32_t left;        /* that may still be visited */
};

static bool walk_read(struct xv_vring *vr, struct walk *walk, uint32_t at, struct vring_desc *desc)
{
	if (likely(walk->table)) {
		*desc = desc_read(walk->table + (size_t)at * sizeof(*desc));
	} else {
		for (uint32_t done = 0, got; done < sizeof(*desc); done += got) {
			const uint64_t gpa = walk->table_gpa + at * sizeof(*desc) + done;
			const uint8_t *p = mem_at(vr->mem, gpa, (uint32_t)sizeof(*desc) - done, &got);

			if (!p) {
				vring_fault(vr, XV_FAULT_ADDRESS, gpa);
				return false;
			}
			memcpy((uint8_t *)desc + done, p, got);
		}
	}
	walk->left--;
	if (vr->packed) {
		struct vring_packed_desc packed;

		memcpy(&packed, desc, sizeof(packed));
		desc->flags = packed.flags & (VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT);
		if (walk->left)
			desc->flags |= VRING_DESC_F_NEXT;
		desc->next = (uint16_t)(at + 1 == walk->size ? 0 : at + 1);
	}
	return true;
}

/* Enter the indirect table that `desc` (already a private copy) describes. */
static bool walk_indirect(struct xv_vring *vr, struct walk *walk, const struct vring_desc *desc)
{
	uint32_t got;

	/* whether it is marked writable is to be ignored (virtio 1.2, 2.7.5.3.2 and 2.8.7) */
	if (!vr->indirect || desc->flags & VRING_DESC_F_NEXT || desc->len == 0 || desc->len % sizeof(*desc) ||
	    desc->len / sizeof(*desc) > vr->num) {
		vring_fault(vr, XV_FAULT_CHAIN, desc->len);
		return false;
	}
	walk->table = mem_at(vr->mem, desc->addr, desc->len, &got);
	if (got < desc->len)
		walk->table = NULL;
	walk->table_gpa = desc->addr;
	walk->size = walk->left = desc->len / (uint32_t)sizeof(*desc);
	return true;
}

/* Add [addr, addr + len), which may cross regions, to the segments. */
static enum chain_result add_segs(struct xv_vring *vr, uint64_t addr, uint32_t len, struct xv_seg *segs, uint32_t max,
				  uint32_t *nr)
{
	while (len) {
		uint32_t got;
		uint8_t *p = mem_at(vr->mem, addr, len, &got);

		if (!p) {
			vring_fault(vr, XV_FAULT_ADDRESS, addr);
			return CHAIN_FAULT;
		}
		if (*nr == max)
			return CHAIN_TOO_LONG;
		segs[(*nr)++] = (struct xv_seg){p, got};
		addr += got;
		len -= got;
	}
	return CHAIN_OK;
}

enum chain_result vring_chain(struct xv_vring *vr, const struct xv_buf *buf, enum chain_direction direction,
			      struct xv_seg *segs, uint32_t max, uint32_t *nr, uint64_t *bytes, uint32_t *rest,
			      uint32_t *budget)
{
	struct walk walk = {(const uint8_t *)vr->desc, 0, vr->num, vr->packed ? buf->slots : vr->num};
	uint32_t at = vr->packed ? packed_slot(buf->at) : buf->id;
	bool indirect = false, wrong_way = false;

	*nr = 0;
	*bytes = 0;
	if (rest)
		*rest = 0;
	for (;;) {
		struct vring_desc desc;

		if (at >= walk.size || !walk.left) {
			vring_fault(vr, XV_FAULT_CHAIN, at);
			return CHAIN_FAULT;
		}
		if (!*budget)
			return CHAIN_TOO_LONG;
		--*budget;
		if (!walk_read(vr, &walk, at, &desc))
			return CHAIN_FAULT;
		if (desc.flags & VRING_DESC_F_INDIRECT) {
			if (indirect) { /* may end a chain of plain descriptors, may not nest (virtio 1.2, 2.7.5.3) */
				vring_fault(vr, XV_FAULT_CHAIN, at);
				return CHAIN_FAULT;
			}
			if (!walk_indirect(vr, &walk, &desc))
				return CHAIN_FAULT;
			indirect = true;
			at = 0;
			continue;
		}
		if (!!(desc.flags & VRING_DESC_F_WRITE) != (direction == CHAIN_WRITE)) {
			if (!rest || !(desc.flags & VRING_DESC_F_WRITE))
				wrong_way = true;
			direction = CHAIN_WRITE;
		}
		if (!wrong_way) {
			uint32_t before = *nr;
			enum chain_result result = add_segs(vr, desc.addr, desc.len, segs, max, nr);

			if (result != CHAIN_OK)
				return result;
			*bytes += desc.len;
			if (rest && direction == CHAIN_WRITE)
				*rest += *nr - before;
		}
		if (!(desc.flags & VRING_DESC_F_NEXT))
			return wrong_way ? CHAIN_WRONG_WAY : CHAIN_OK;
		at = desc.next;
	}
}

void vring_call(struct xv_vring *vr, uint64_t *calls, uint64_t *failed, const struct xv_vring **worker_calling)
{
	static const uint64_t one = 1;
	int fd = load_once(&vr->call_fd);
	ssize_t done;

	if (fd < 0)
		return;
	/* a signal of the watchdog ends a write that blocks: the front-end may clear O_NONBLOCK behind our back */
	store_once(worker_calling, vr);
	if (vr->call_is_socket)
		done = send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL);
	else
		done = write(fd, &one, sizeof(one));
	store_once(worker_calling, (const struct xv_vring *)NULL);
	if (likely(done == sizeof(one))) {
		__atomic_fetch_add(calls, 1u, __ATOMIC_RELAXED); /* the queue's lock is not held here: two workers may count */
		return;
	}
	__atomic_fetch_add(failed, 1u, __ATOMIC_RELAXED);
	if (done < 0 && errno == EINTR)
		vring_fault(vr, XV_FAULT_CALL_BLOCKED, (uint64_t)fd);
	/* EAGAIN: the guest has an interrupt pending. Anything else: its descriptor is dead, and so is only it. */
}

static bool is_socket(int fd)
{
	struct stat st;

	return fd >= 0 && fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
}

/* A regular file, a directory, a loop of epolls: epoll refuses them. Found out here, not while publishing. */
static int check_pollable(int fd)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET};
	int epfd, result = 0;

	if (fd < 0)
		return 0;
	epfd = epoll_create1(EPOLL_CLOEXEC);
	if (epfd < 0)
		return -errno;
	if (epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event))
		result = -EBADF;
	close(epfd);
	return result;
}

/* Where the ring's three parts lie. 0, -EINVAL or -EFAULT. */
static int place(struct xv_vring *vr, const struct xv_mem *mem, const struct xv_vring_conf *conf)
{
	const uint64_t num = conf->num;
	/* split (2.7): 16 bytes a descriptor; flags, idx, num entries and used_event; flags, idx, num elements and
	 * avail_event. Packed (2.8.10): 16 bytes a descriptor, and 4 bytes each of event suppression */
	const uint64_t sizes[3] = {16 * num, vr->packed ? 4 : 6 + 2 * num, vr->packed ? 4 : 6 + 8 * num};
	const uint64_t aligned[3] = {8, vr->packed ? 4 : 2, 4};
	const uint64_t at[3] = {conf->desc, conf->avail, conf->used};
	void *parts[3];

	if (num == 0 || num > XV_MAX_RING_SIZE || at[0] % 16 || at[1] % aligned[1] || at[2] % 4)
		return -EINVAL;
	if (!vr->packed && (num & (num - 1) || conf->base > UINT16_MAX))
		return -EINVAL;
	for (int i = 0; i < 3; i++) {
		parts[i] = mem_at_user(mem, at[i], sizes[i]);
		if (!parts[i] || (uintptr_t)parts[i] % aligned[i])
			return -EFAULT;
	}
	vr->desc = parts[0];
	vr->avail = parts[1];
	vr->used = parts[2];
	return 0;
}

/* Where a split ring goes on. */
static cursor split_start(const struct xv_vring *vr)
{
	/*
	 * Every buffer is used in the order it was made available and before the turn ends, so the used index that the
	 * guest sees is where to go on, also after this process or the last one was killed. conf->base agrees with it,
	 * unless the front-end lost it (DPDK's does, after a crash of the backend): then it would replay frames.
	 */
	return load_once(&vr->used->idx);
}

static cursor inflight_cursor(uint16_t slot, uint8_t wrap)
{
	return (cursor)((slot & (PACKED_WRAP - 1u)) | (wrap & 1u) << 15);
}

/*
 * Where a packed ring goes on. The ring doesn't tell, so it is what the front-end says, unless a predecessor has left
 * it in the in-flight region: the front-end cannot know how far one came that was killed. Between its two writes there
 * it may or may not have written the ring: then the descriptor at the old place is still available, or it is not.
 */
static int packed_start(struct xv_vring *vr, uint32_t base, cursor *start)
{
	struct inflight_packed *region = vr->inflight;
	const uint16_t version = region ? load_once(&region->version) : 0;
	cursor at = (cursor)(base >> 16); /* of the next used one: what lies between it and the available one is done again */

	if (version) {
		const cursor new_at = inflight_cursor(load_once(&region->used_idx), load_once(&region->used_wrap_counter)),
			     old_at = inflight_cursor(load_once(&region->old_used_idx),
						      load_once(&region->old_used_wrap_counter));

		if (version != 1 || load_once(&region->desc_num) != vr->num)
			return -EINVAL;
		at = new_at;
		if (new_at != old_at && packed_slot(old_at) < vr->num && packed_is_available(vr, old_at))
			at = old_at;
	}
	if (packed_slot(at) >= vr->num)
		return -EINVAL;
	*start = at;
	if (region) {
		region->version = 1;
		region->desc_num = (uint16_t)vr->num;
		region->used_idx = region->old_used_idx = (uint16_t)packed_slot(at);
		region->used_wrap_counter = region->old_used_wrap_counter = (uint8_t)(at / PACKED_WRAP);
	}
	return 0;
}

/* A split ring's part: its used index in the guest's memory says more than we could write here. */
struct inflight_split {
	uint64_t features;
	uint16_t version, desc_num, last_batch_head, used_idx;
};

#define INFLIGHT_ALIGN 64u /* of the parts of a region */
#define INFLIGHT_DESC_SPLIT 16u
#define INFLIGHT_DESC_PACKED 32u

uint32_t xv_inflight_size(uint32_t num, int packed)
{
	return ALIGN_UP(packed ? (uint32_t)sizeof(struct inflight_packed) + num * INFLIGHT_DESC_PACKED
			       : (uint32_t)sizeof(struct inflight_split) + num * INFLIGHT_DESC_SPLIT,
			INFLIGHT_ALIGN);
}

static int place_inflight(struct xv_vring *vr, const struct xv_vring_conf *conf)
{
	const struct xv_mem *region = (const struct xv_mem *)(uintptr_t)conf->inflight;
	const uint32_t size = xv_inflight_size(conf->num, vr->packed);
	struct inflight_split *split;
	uint32_t got;
	void *part;

	if (!region)
		return 0;
	part = mem_at(region, conf->inflight_offset, size, &got);
	if (!part || got < size || (uintptr_t)part % 8)
		return -EINVAL;
	if (vr->packed) {
		vr->inflight = part;
		return 0;
	}
	split = part;
	if (split->version && (split->version != 1 || split->desc_num != conf->num))
		return -EINVAL;
	split->version = 1;
	split->desc_num = (uint16_t)conf->num;
	return 0;
}

int xv_vring_new(struct xv_mem *mem, const struct xv_vring_conf *conf, struct xv_vring **out)
{
	const uint64_t features = conf->features;
	struct xv_vring *vr;
	cursor start = 0;
	int result;

	vr = aligned_alloc(64, ALIGN_UP(sizeof(*vr), 64));
	if (!vr)
		return -ENOMEM;
	memset(vr, 0, sizeof(*vr));
	vr->mem = mem;
	vr->guest = mem->guest;
	vr->num = conf->num;
	vr->mask = (uint16_t)(conf->num - 1);
	vr->packed = features & 1ull << VIRTIO_F_RING_PACKED;
	result = place(vr, mem, conf);
	if (!result)
		result = check_pollable(conf->kick_fd);
	if (!result)
		result = place_inflight(vr, conf);
	if (!result && vr->packed)
		result = packed_start(vr, conf->base, &start);
	if (result) {
		free(vr);
		return result;
	}
	if (!vr->packed)
		start = split_start(vr);
	vr->in_order = features & 1ull << VIRTIO_F_IN_ORDER;
	vr->event_idx = features & 1ull << VIRTIO_RING_F_EVENT_IDX;
	vr->indirect = features & 1ull << VIRTIO_RING_F_INDIRECT_DESC;
	vr->mergeable = features & 1ull << VIRTIO_NET_F_MRG_RXBUF;
	vr->csum = features & 1ull << VIRTIO_NET_F_CSUM;
	vr->guest_csum = features & 1ull << VIRTIO_NET_F_GUEST_CSUM;
	vr->host_gso = net_gso_bits(features, true);
	vr->guest_gso = net_gso_bits(features, false);
	vr->header_len = (vr->mergeable || features & 1ull << VIRTIO_F_VERSION_1) ? sizeof(struct virtio_net_hdr_mrg_rxbuf)
										 : sizeof(struct virtio_net_hdr);
	if (features & 1ull << VIRTIO_NET_F_HASH_REPORT)
		vr->header_len = sizeof(struct net_header);
	if (features & 1ull << VHOST_F_LOG_ALL) {
		vr->log = (const struct xv_mem *)(uintptr_t)conf->log;
		vr->log_used = vr->log && conf->flags & XV_VRING_LOG_USED;
	}
	vr->call_fd = conf->call_fd;
	vr->call_is_socket = is_socket(conf->call_fd);
	vr->enabled = conf->enabled;
	vr->call_asked = true; /* an interrupt may have been lost with whoever served the ring before */
	vr->kick = (struct source){.fd = conf->kick_fd, .epfd = -1};
	vr->next = vr->published = vr->signalled = start;
	*out = vr;
	return 0;
}

void xv_vring_free(struct xv_vring *vr)
{
	free(vr);
}

uint64_t xv_vring_bytes(void)
{
	return sizeof(struct xv_vring);
}

uint32_t xv_vring_base(const struct xv_vring *vr)
{
	/* packed: the place of the next available descriptor and that of the next used one; split: the former */
	return vr->packed ? (uint32_t)vr->next << 16 | vr->next : vr->next;
}

void xv_vring_follow(struct xv_vring *vr, const struct xv_vring *old)
{
	vr->follows = old;
}

void xv_vring_set_call(struct xv_vring *vr, int call_fd)
{
	/* between the two stores a worker may use write() on a socket or send() on an eventfd: a lost interrupt, which the
	 * one asked for here makes up for, as it does for those that the old descriptor swallowed */
	vr->call_is_socket = is_socket(call_fd);
	store_release(&vr->call_fd, call_fd);
	store_release(&vr->call_asked, true);
	dp_request(vr->guest->dp);
}

void xv_vring_set_enabled(struct xv_vring *vr, int enabled)
{
	store_release(&vr->enabled, (bool)enabled);
}
