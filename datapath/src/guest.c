// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "guest.h"

/* Give control something to read. Async-signal-safe. */
static void tell_control(const struct xv_guest *guest)
{
	const uint64_t one = 1;

	if (guest->event_fd >= 0 && write(guest->event_fd, &one, sizeof(one)) < 0)
		return; /* EAGAIN: the counter is saturated, so control has an event to read anyway */
}

void guest_fault(struct xv_guest *guest, enum xv_fault_code code, uint32_t ring, uint64_t detail)
{
	uint32_t none = XV_FAULT_NONE;

	/* UINT32_MAX claims the record while it is filled; readers take any code past XV_FAULT_MAX for "being written" */
	if (!__atomic_compare_exchange_n(&guest->fault.code, &none, UINT32_MAX, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return;
	guest->fault.ring = ring;
	guest->fault.detail = detail;
	store_release(&guest->fault.code, (uint32_t)code);
	tell_control(guest);
}

bool guest_learns(const struct xv_guest *guest, struct learned *table, uint64_t key, bool may_add)
{
	const enum learning result = learned_use(table, key, cycles_now(), may_add);

	if (unlikely(result == LEARN_NEW))
		tell_control(guest);
	return result != LEARN_FULL;
}

uint32_t xv_guest_learned(struct xv_guest *guest, struct xv_learned *out, uint32_t n)
{
	return guest->learned ? learned_list(guest->learned, cycles_now(), guest->cycles_per_us, out, n) : 0;
}

void xv_guest_forget(struct xv_guest *guest, const uint8_t mac[6], uint16_t vlan)
{
	if (guest->learned)
		learned_forget(guest->learned, filter_word(mac) | (uint64_t)vlan << 48);
}

void xv_guest_deny(struct xv_guest *guest, const uint8_t mac[6], uint16_t vlan)
{
	if (guest->learned)
		learned_deny(guest->learned, filter_word(mac) | (uint64_t)vlan << 48, cycles_now());
}

int xv_guest_new(uint32_t max_pairs, struct xv_guest **out)
{
	struct xv_guest *guest;

	if (max_pairs == 0 || max_pairs > XV_MAX_PAIRS)
		return -EINVAL;
	guest = aligned_alloc(64, ALIGN_UP(sizeof(*guest) + max_pairs * sizeof(guest->queues[0]), 64));
	if (!guest)
		return -ENOMEM;
	memset(guest, 0, sizeof(*guest) + max_pairs * sizeof(guest->queues[0]));
	guest->max_pairs = max_pairs;
	guest->event_fd = -1;
	xv_guest_reset_ctrl(guest);
	*out = guest;
	return 0;
}

void xv_guest_free(struct xv_guest *guest)
{
	if (guest)
		learned_free(guest->learned);
	free(guest);
}

const struct xv_rx_counters *xv_guest_rx_counters(const struct xv_guest *guest, uint32_t pair)
{
	return pair < guest->max_pairs ? &guest->queues[pair].rx : NULL;
}

const struct xv_tx_counters *xv_guest_tx_counters(const struct xv_guest *guest, uint32_t pair)
{
	return pair < guest->max_pairs ? &guest->queues[pair].tx : NULL;
}

const struct xv_ctrl_state *xv_guest_ctrl(const struct xv_guest *guest)
{
	return &guest->ctrl;
}

const struct xv_fault *xv_guest_fault(const struct xv_guest *guest)
{
	return &guest->fault;
}

void xv_guest_set_mac(struct xv_guest *guest, const uint8_t mac[6])
{
	guest->mac = filter_word(mac);
	xv_guest_reset_ctrl(guest);
}

void xv_guest_reset_ctrl(struct xv_guest *guest)
{
	struct xv_ctrl_state *ctrl = &guest->ctrl;
	uint32_t taken = MAC_TAKEN;

	ctrl->pairs = 1;
	ctrl->rx_mode = ctrl->announced = ctrl->adopted = 0;
	filter_reset(&guest->room[0].filter, guest->mac);
	rss_reset(&guest->room[0].rss);
	guest->rules = &guest->room[0];
	guest->offloads = UINT32_MAX;
	guest->fresh = true;
	guest->work = (struct ctrl_work){.state = CTRL_NONE};
	if (!__atomic_compare_exchange_n(&guest->mac_state, &taken, MAC_GIVEN_UP, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED) &&
	    taken != MAC_GIVEN_UP)
		store_release(&guest->mac_state, (uint32_t)MAC_IDLE);
}

void guest_ctrl_begins(struct xv_guest *guest, bool resumed)
{
	if (guest->fresh && resumed) {
		filter_open(&guest->room[0].filter);
		guest->ctrl.adopted = 1;
	}
	guest->fresh = false;
}

void xv_guest_set_pairs(struct xv_guest *guest, uint32_t pairs)
{
	store_once(&guest->ctrl.pairs, MIN(MAX(pairs, 1u), guest->max_pairs));
}

uint64_t xv_guest_bytes(const struct xv_guest *guest)
{
	return sizeof(*guest) + guest->max_pairs * sizeof(guest->queues[0]) +
	       (guest->learned ? learned_bytes(guest->learned) : 0);
}

int xv_guest_mac_asks(const struct xv_guest *guest)
{
	return load_once(&guest->mac_state) == MAC_ASKED;
}

int xv_guest_mac_request(struct xv_guest *guest, struct xv_mac_request *out)
{
	uint32_t asked = MAC_ASKED;

	/* acquire pairs with the worker's release when it asked */
	if (!__atomic_compare_exchange_n(&guest->mac_state, &asked, MAC_TAKEN, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return 0;
	*out = guest->mac_request;
	return 1;
}

int xv_guest_mac_answer(struct xv_guest *guest, int granted)
{
	uint32_t taken = MAC_TAKEN;

	if (!__atomic_compare_exchange_n(&guest->mac_state, &taken, granted ? MAC_GRANTED : MAC_DENIED, false,
					 __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
		store_release(&guest->mac_state, (uint32_t)MAC_IDLE);
		return -ECANCELED;
	}
	dp_request(guest->dp);
	return 0;
}

void xv_guest_reset(struct xv_guest *guest)
{
	xv_guest_reset_ctrl(guest);
	store_release(&guest->announce, 0u);
	store_release(&guest->fault.code, (uint32_t)XV_FAULT_NONE);
}

void xv_guest_announce(struct xv_guest *guest, const uint8_t mac[6])
{
	uint64_t word = 0;

	memcpy(&word, mac, 6);
	store_release(&guest->announce, word | 1ull << 63);
	dp_request(guest->dp);
}
