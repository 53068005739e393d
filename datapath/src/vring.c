// SPDX-License-Identifier: Apache-2.0
#include "vring.h"

#include "nethdr.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* The two sides of a walk through descriptors: a table, and how many entries may still be visited. */
struct walk {
	const uint8_t *table; /* NULL: an indirect table that lies in two regions, read piecewise */
	uint64_t table_gpa;
	uint32_t entries;
};

static bool walk_read(struct xv_vring *vr, const struct walk *walk, uint32_t at, struct vring_desc *desc)
{
	if (likely(walk->table)) {
		*desc = desc_read(walk->table + (size_t)at * sizeof(*desc));
		return true;
	}
	for (uint32_t done = 0, got; done < sizeof(*desc); done += got) {
		const uint8_t *p = mem_at(vr->mem, walk->table_gpa + at * sizeof(*desc) + done, sizeof(*desc) - done, &got);

		if (!p) {
			vring_fault(vr, XV_FAULT_ADDRESS, walk->table_gpa + at * sizeof(*desc) + done);
			return false;
		}
		memcpy((uint8_t *)desc + done, p, got);
	}
	return true;
}

/* Enter the indirect table that `desc` (already a private copy) describes. */
static bool walk_indirect(struct xv_vring *vr, struct walk *walk, const struct vring_desc *desc)
{
	uint32_t got;

	/* whether it is marked writable is to be ignored (virtio 1.2, 2.7.5.3.2) */
	if (!vr->indirect || desc->flags & VRING_DESC_F_NEXT || desc->len == 0 || desc->len % sizeof(*desc) || desc->len / sizeof(*desc) > vr->num) {
		vring_fault(vr, XV_FAULT_CHAIN, desc->len);
		return false;
	}
	walk->table = mem_at(vr->mem, desc->addr, desc->len, &got);
	if (got < desc->len)
		walk->table = NULL;
	walk->table_gpa = desc->addr;
	walk->entries = desc->len / sizeof(*desc);
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

enum chain_result vring_chain(struct xv_vring *vr, uint16_t head, enum chain_direction direction, struct xv_seg *segs,
			      uint32_t max, uint32_t *nr, uint64_t *bytes, uint32_t *rest, uint32_t *budget)
{
	struct walk walk = {(const uint8_t *)vr->desc, 0, vr->num};
	bool indirect = false, wrong_way = false;
	uint32_t at = head;

	*nr = 0;
	*bytes = 0;
	if (rest)
		*rest = 0;
	for (uint32_t visited = 0;; visited++) {
		struct vring_desc desc;

		if (at >= walk.entries || visited >= walk.entries) {
			vring_fault(vr, at >= walk.entries && visited == 0 ? XV_FAULT_HEAD : XV_FAULT_CHAIN, at);
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
			visited = UINT32_MAX; /* the table's own entries are counted from 0 */
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

int xv_vring_new(struct xv_mem *mem, const struct xv_vring_conf *conf, struct xv_vring **out)
{
	const uint64_t features = conf->features;
	const uint32_t num = conf->num;
	struct xv_vring *vr;
	int result;

	if (num == 0 || num > XV_MAX_RING_SIZE || num & (num - 1) || conf->desc % 16 || conf->avail % 2 || conf->used % 4)
		return -EINVAL;
	result = check_pollable(conf->kick_fd);
	if (result)
		return result;
	vr = aligned_alloc(64, ALIGN_UP(sizeof(*vr), 64));
	if (!vr)
		return -ENOMEM;
	memset(vr, 0, sizeof(*vr));
	vr->mem = mem;
	vr->guest = mem->guest;
	vr->num = num;
	vr->mask = (uint16_t)(num - 1);
	/* 16 bytes a descriptor; flags, idx, num entries and used_event; flags, idx, num elements and avail_event */
	vr->desc = mem_at_user(mem, conf->desc, 16ull * num);
	vr->avail = mem_at_user(mem, conf->avail, 6 + 2ull * num);
	vr->used = mem_at_user(mem, conf->used, 6 + 8ull * num);
	if (!vr->desc || !vr->avail || !vr->used || (uintptr_t)vr->desc % 8 || (uintptr_t)vr->avail % 2 ||
	    (uintptr_t)vr->used % 4) {
		free(vr);
		return -EFAULT;
	}
	vr->event_idx = features & 1ull << VIRTIO_RING_F_EVENT_IDX;
	vr->indirect = features & 1ull << VIRTIO_RING_F_INDIRECT_DESC;
	vr->mergeable = features & 1ull << VIRTIO_NET_F_MRG_RXBUF;
	vr->csum = features & 1ull << VIRTIO_NET_F_CSUM;
	vr->guest_csum = features & 1ull << VIRTIO_NET_F_GUEST_CSUM;
	vr->host_gso = net_gso_bits(features, true);
	vr->guest_gso = net_gso_bits(features, false);
	vr->header_len = (vr->mergeable || features & 1ull << VIRTIO_F_VERSION_1) ? sizeof(struct virtio_net_hdr_mrg_rxbuf)
										 : sizeof(struct virtio_net_hdr);
	vr->call_fd = conf->call_fd;
	vr->call_is_socket = is_socket(conf->call_fd);
	vr->enabled = conf->enabled;
	vr->call_asked = true; /* an interrupt may have been lost with whoever served the ring before */
	vr->kick = (struct source){.fd = conf->kick_fd, .epfd = -1};
	/*
	 * Every buffer is used in the order it was made available and before the turn ends, so the used index that the
	 * guest sees is where to go on, also after this process or the last one was killed. conf->base agrees with it,
	 * unless the front-end lost it (DPDK's does, after a crash of the backend): then it would replay frames.
	 */
	vr->used_idx = load_once(&vr->used->idx);
	vr->last_avail = vr->used_idx;
	vr->signalled = vr->used_idx;
	vring_disarm(vr);
	if (vr->event_idx) /* as far from being passed as it can be; it comes into force when a worker arms the ring */
		store_once(avail_event_of(vr), (uint16_t)(vr->last_avail - 1));
	*out = vr;
	return 0;
}

void xv_vring_free(struct xv_vring *vr)
{
	free(vr);
}

uint32_t xv_vring_base(const struct xv_vring *vr)
{
	return vr->last_avail;
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
