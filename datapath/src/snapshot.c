// SPDX-License-Identifier: Apache-2.0
#include "snapshot.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#define KEEP_LEAST 1u

static const void *at(uint64_t address)
{
	return (const void *)(uintptr_t)address;
}

/* Frames a socket may hold back when its guest has no buffers: together at most half of the receive frames. */
static uint32_t keep_of(const struct xv_xsk *xsk, uint32_t nr_guests)
{
	uint32_t share = (xsk->nicq->fill.size / 2) / MAX(nr_guests, 1u);

	share = MIN(share, xsk->size - xsk->size / 4);
	return MAX(share, KEEP_LEAST);
}

/* Which of the guest's rules count. Where the front-end has the control virtqueue, we know none of them. */
static uint32_t rules_of(const struct xv_guest_conf *conf)
{
	const uint64_t hashes = 1ull << VIRTIO_NET_F_RSS | 1ull << VIRTIO_NET_F_HASH_REPORT;

	/* without rules a frame is told to have no hash, for which its view must be visited all the same */
	return (conf->features & hashes ? PORT_HASHES : 0) |
	       (conf->ctrl != XV_NO_RING && conf->features & 1ull << VIRTIO_NET_F_CTRL_RX ? FILTER_BY_ADDRESS : 0) |
	       (conf->ctrl != XV_NO_RING && conf->features & 1ull << VIRTIO_NET_F_CTRL_VLAN ? FILTER_BY_VLAN : 0);
}

/* A joined frame needs several of the usual buffers, and cannot be cut again: every ring must take it. */
static uint32_t join_of(const struct port *port)
{
	uint32_t join = UINT32_MAX, rings = 0;

	for (uint32_t i = 0; i < port->nr_rx; i++) {
		if (!port->rx[i])
			continue;
		join &= port->rx[i]->mergeable ? port->rx[i]->guest_gso : 0;
		rings++;
	}
	return rings ? join : 0;
}

/* Where the guest's pair `i` sends to. */
static struct uplink uplink_of(const struct nic *nic, uint32_t first, uint32_t i)
{
	if (!nic || !(nic->nr_queues + nic->nr_taps))
		return (struct uplink){0};
	if (nic->nr_taps)
		return (struct uplink){.tap = nic->taps[(first + i) % nic->nr_taps]};
	return (struct uplink){.nicq = nic->queues[(first + i) % nic->nr_queues]};
}

/* Once, before workers see it. */
static void bind_ring(struct xv_vring *vr, uint32_t index, struct guest_queue *queue, uint64_t *kicks)
{
	if (vr->begun)
		return;
	vr->index = index;
	vr->queue = queue;
	vr->kick.events = kicks;
}

static int add_policy(struct port *port, const struct xv_policy_conf *conf)
{
	struct learned *has = port->guest->learned;
	int result = policy_new(conf, &port->policy);

	if (result)
		return result;
	port->gated = conf->access || conf->trunk || conf->flags & XV_POLICY_LINK_DOWN;
	if (conf->rx.rate)
		port->rules |= PORT_LIMITED;
	if (conf->learn)
		port->learned = has && learned_most(has) == conf->learn ? has : learned_new(conf->learn, has);
	return conf->learn && !port->learned ? -ENOMEM : 0;
}

/*
 * Whose frames are looked at where they come in. Where somebody is in some VLANs only, everybody's: its gate goes by their
 * tags, and takes them out in place, neither of which may be in the sender's memory.
 */
static void choose_judged(struct snapshot *snap)
{
	bool gates = false;

	for (uint32_t i = 0; i < snap->nr_ports; i++)
		gates |= snap->ports[i].gated;
	for (uint32_t i = 0; i < snap->nr_ports; i++)
		snap->ports[i].judged = gates || (snap->ports[i].policy && policy_judges(snap->ports[i].policy));
}

static int add_guest(struct snapshot *snap, uint32_t index, const struct xv_guest_conf *conf)
{
	struct xv_vring *const *rings = at(conf->rings);
	struct xv_xsk *const *xsks = at(conf->xsks);
	struct port *port = &snap->ports[index];
	struct nic *nic = conf->nic < snap->nr_nics ? &snap->nics[conf->nic] : NULL;
	uint32_t workers = snap->nr_workers;

	port->guest = (struct xv_guest *)(uintptr_t)conf->guest;
	port->nic = conf->nic;
	port->worker = conf->worker;
	port->capture = (struct xv_capture *)(uintptr_t)conf->capture;
	port->own_ctrl = conf->ctrl != XV_NO_RING;
	port->rules = rules_of(conf);
	if (!port->guest || !conf->max_pairs || conf->max_pairs > port->guest->max_pairs ||
	    conf->nr_rings > 2 * port->guest->max_pairs + 1)
		return -EINVAL;
	if (conf->policy) {
		int result = add_policy(port, at(conf->policy));

		if (result)
			return result;
	}
	port->rx = calloc(port->guest->max_pairs, sizeof(port->rx[0]));
	if (!port->rx)
		return -ENOMEM;
	for (uint32_t i = 0; i < conf->nr_rings; i++) {
		struct xv_vring *vr = rings[i];
		struct duty *duty = &snap->duties[(conf->worker + i / 2) % workers];
		struct guest_queue *queue;

		if (!vr)
			continue;
		if (i == conf->ctrl) {
			duty = &snap->duties[conf->worker % workers];
			bind_ring(vr, i, &port->guest->queues[0], NULL);
			guest_ctrl_begins(port->guest, vr->next != (vr->packed ? PACKED_WRAP : 0));
			duty->ctrl[duty->nr_ctrl++] = (struct ctrl_source){vr, conf->features, conf->max_pairs};
			continue;
		}
		if (i / 2 >= port->guest->max_pairs)
			return -EINVAL;
		queue = &port->guest->queues[i / 2];
		bind_ring(vr, i, queue, i & 1 ? &queue->tx.kicks : &queue->rx.kicks);
		if (i & 1) {
			duty->tx[duty->nr_tx++] = (struct tx_source){vr, uplink_of(nic, conf->uplink, i / 2), index, i / 2};
		} else {
			port->rx[i / 2] = vr;
			port->nr_rx = i / 2 + 1;
		}
	}
	port->join = join_of(port);
	if (conf->packet) {
		struct duty *duty = &snap->duties[conf->worker % workers];

		duty->packet[duty->nr_packet++] = (struct packet_source){(struct xv_packet *)(uintptr_t)conf->packet, index};
	}
	for (uint32_t i = 0; i < conf->nr_xsks; i++) {
		struct duty *duty = &snap->duties[(conf->worker + i) % workers];

		duty->xsk[duty->nr_xsk++] = (struct xsk_source){xsks[i], index, xsks[i]->nicq->queue};
		store_once(&xsks[i]->keep, keep_of(xsks[i], nic ? nic->nr_guests : 1));
	}
	return 0;
}

/* Queue q of NIC i is worker (i + q)'s. */
static int add_taps(struct snapshot *snap, uint32_t index, const struct xv_nic_conf *conf, bool alone)
{
	struct nic *nic = &snap->nics[index];

	nic->nr_taps = conf->nr_taps;
	nic->taps = calloc(MAX(nic->nr_taps, 1u), sizeof(nic->taps[0]));
	if (!nic->taps)
		return -ENOMEM;
	for (uint32_t q = 0; q < nic->nr_taps; q++) {
		struct duty *duty = &snap->duties[(index + q) % snap->nr_workers];

		nic->taps[q] = ((struct xv_tapq *const *)at(conf->taps))[q];
		duty->tap[duty->nr_tap++] = (struct tap_source){.tap = nic->taps[q], .nic = index, .alone = alone};
	}
	return 0;
}

/* Its tap, which the host sends into, and where frames from the NIC for it arrive. */
static int add_host_port(struct snapshot *snap, uint32_t index, const struct xv_nic_conf *conf)
{
	struct xv_xsk *const *xsks = at(conf->host_xsks);
	const uint32_t worker = index % snap->nr_workers;
	struct xv_tapq *tap = (struct xv_tapq *)(uintptr_t)conf->host;
	struct duty *duty = &snap->duties[worker];

	snap->nics[index].host = tap;
	if (!tap)
		return conf->nr_host_xsks || conf->host_packet ? -EINVAL : 0;
	duty->tap[duty->nr_tap++] = (struct tap_source){
		.tap = tap, .nic = index, .is_host = true, .uplink = uplink_of(&snap->nics[index], worker, 0)};
	if (conf->host_packet)
		duty->packet[duty->nr_packet++] =
			(struct packet_source){(struct xv_packet *)(uintptr_t)conf->host_packet, host_port(index)};
	for (uint32_t i = 0; i < conf->nr_host_xsks; i++) {
		duty = &snap->duties[(worker + i) % snap->nr_workers];
		duty->xsk[duty->nr_xsk++] = (struct xsk_source){xsks[i], host_port(index), xsks[i]->nicq->queue};
	}
	return 0;
}

static int add_nics(struct snapshot *snap, const struct xv_snapshot_conf *conf)
{
	const struct xv_nic_conf *confs = at(conf->nics);
	const struct xv_guest_conf *guests = at(conf->guests);

	for (uint32_t i = 0; i < snap->nr_nics; i++) {
		struct nic *nic = &snap->nics[i];
		int result;

		if (confs[i].nr_queues && confs[i].nr_taps)
			return -EINVAL;
		for (uint32_t g = 0; g < conf->nr_guests; g++)
			nic->nr_guests += guests[g].nic == i;
		result = add_taps(snap, i, &confs[i], nic->nr_guests + !!confs[i].host < 2);
		if (result)
			return result;
		nic->nr_queues = confs[i].nr_queues;
		nic->max_len = confs[i].mtu + 14;
		nic->capture = (struct xv_capture *)(uintptr_t)confs[i].capture;
		nic->mcast = (struct xv_packet *)(uintptr_t)confs[i].mcast;
		nic->queues = calloc(MAX(nic->nr_queues, 1u), sizeof(nic->queues[0]));
		if (!nic->queues)
			return -ENOMEM;
		memcpy(nic->queues, at(confs[i].queues), nic->nr_queues * sizeof(nic->queues[0]));
		result = add_host_port(snap, i, &confs[i]);
		if (result)
			return result;
		if (nic->mcast) {
			struct duty *duty = &snap->duties[i % snap->nr_workers];

			duty->mcast[duty->nr_mcast++] = (struct mcast_source){nic->mcast, i};
		}
	}
	return 0;
}

static bool port_exists(const struct snapshot *snap, uint32_t port)
{
	return port < snap->nr_ports || (port - XV_HOST_PORT < snap->nr_nics && snap->nics[port - XV_HOST_PORT].host);
}

static int add_macs(struct snapshot *snap, const struct xv_mac_conf *confs, uint32_t n)
{
	uint32_t bits = 4;

	while (1ull << bits < 2ull * n)
		bits++;
	snap->mac_mask = (uint32_t)((1ull << bits) - 1);
	snap->mac_shift = 64 - bits;
	if (getrandom(&snap->mac_factor, sizeof(snap->mac_factor), GRND_NONBLOCK) != sizeof(snap->mac_factor))
		snap->mac_factor = cycles_now(); /* early in the machine's life */
	snap->mac_factor |= 1;
	snap->macs = malloc(((size_t)snap->mac_mask + 1) * sizeof(snap->macs[0]));
	if (!snap->macs)
		return -ENOMEM;
	for (uint32_t i = 0; i <= snap->mac_mask; i++)
		snap->macs[i] = (struct mac_entry){MAC_EMPTY, NO_PORT};
	for (uint32_t i = 0; i < n; i++) {
		uint64_t key = mac_key(confs[i].mac, confs[i].vlan);
		uint32_t slot = mac_slot(snap, key);

		if (!port_exists(snap, confs[i].guest) || confs[i].mac[0] & 1 || mac_find(snap, key) != NO_PORT)
			return -EINVAL;
		if (confs[i].guest < snap->nr_ports && !snap->ports[confs[i].guest].mac)
			snap->ports[confs[i].guest].mac = filter_word(confs[i].mac);
		while (snap->macs[slot].key != MAC_EMPTY)
			slot = (slot + 1) & snap->mac_mask;
		snap->macs[slot] = (struct mac_entry){key, confs[i].guest};
	}
	return 0;
}

/* Room for everything in every duty: which worker gets what is decided while adding. */
static int make_duties(struct snapshot *snap, const struct xv_snapshot_conf *conf)
{
	const struct xv_guest_conf *guests = at(conf->guests);
	const struct xv_nic_conf *nics = at(conf->nics);
	size_t rings = 1, xsks = 1, taps = 1, packets = conf->nr_guests + 1, sources;

	for (uint32_t i = 0; i < conf->nr_guests; i++) {
		rings += guests[i].nr_rings;
		xsks += guests[i].nr_xsks;
	}
	for (uint32_t i = 0; i < conf->nr_nics; i++) {
		taps += nics[i].nr_taps + !!nics[i].host;
		xsks += nics[i].nr_host_xsks;
		packets += !!nics[i].host_packet;
	}
	sources = rings + xsks + taps + packets;
	for (uint32_t w = 0; w < snap->nr_workers; w++) {
		struct duty *duty = &snap->duties[w];

		duty->tx = calloc(rings, sizeof(duty->tx[0]));
		duty->ctrl = calloc((size_t)conf->nr_guests + 1, sizeof(duty->ctrl[0]));
		duty->xsk = calloc(xsks, sizeof(duty->xsk[0]));
		duty->mcast = calloc((size_t)conf->nr_nics + 1, sizeof(duty->mcast[0]));
		duty->packet = calloc(packets, sizeof(duty->packet[0]));
		duty->tap = calloc(taps, sizeof(duty->tap[0]));
		duty->hot = calloc(sources, sizeof(duty->hot[0]));
		duty->waiting = calloc(sources, sizeof(duty->waiting[0]));
		if (!duty->tx || !duty->ctrl || !duty->xsk || !duty->mcast || !duty->packet || !duty->tap || !duty->hot ||
		    !duty->waiting)
			return -ENOMEM;
	}
	return 0;
}

int snapshot_new(const struct xv_snapshot_conf *conf, uint32_t workers, struct snapshot **out)
{
	const struct xv_guest_conf *guests = at(conf->guests);
	struct snapshot *snap = calloc(1, sizeof(*snap) + workers * sizeof(snap->duties[0]));
	int result = -ENOMEM;

	if (!snap)
		return -ENOMEM;
	snap->nr_workers = workers;
	snap->nr_nics = conf->nr_nics;
	snap->nr_ports = conf->nr_guests;
	snap->ports = calloc((size_t)conf->nr_guests + 1, sizeof(snap->ports[0]));
	snap->nics = calloc((size_t)conf->nr_nics + 1, sizeof(snap->nics[0]));
	if (!snap->ports || !snap->nics)
		goto fail;
	result = make_duties(snap, conf);
	if (!result)
		result = add_nics(snap, conf);
	for (uint32_t i = 0; !result && i < conf->nr_guests; i++)
		result = add_guest(snap, i, &guests[i]);
	if (!result)
		result = add_macs(snap, at(conf->macs), conf->nr_macs);
	if (result)
		goto fail;
	choose_judged(snap);
	*out = snap;
	return 0;
fail:
	for (uint32_t i = 0; snap->ports && i < snap->nr_ports; i++)
		if (snap->ports[i].learned && snap->ports[i].learned != snap->ports[i].guest->learned)
			learned_free(snap->ports[i].learned);
	snapshot_free(snap);
	return result;
}

void snapshot_free(struct snapshot *snap)
{
	if (!snap)
		return;
	for (uint32_t i = 0; snap->ports && i < snap->nr_ports; i++) {
		free(snap->ports[i].rx);
		policy_free(snap->ports[i].policy);
	}
	for (uint32_t i = 0; snap->nics && i < snap->nr_nics; i++) {
		free(snap->nics[i].queues);
		free(snap->nics[i].taps);
	}
	for (uint32_t w = 0; w < snap->nr_workers; w++) {
		free(snap->duties[w].tx);
		free(snap->duties[w].ctrl);
		free(snap->duties[w].xsk);
		free(snap->duties[w].mcast);
		free(snap->duties[w].packet);
		free(snap->duties[w].tap);
		free(snap->duties[w].hot);
		free(snap->duties[w].waiting);
	}
	free(snap->ports);
	free(snap->nics);
	free(snap->macs);
	free(snap);
}
