// SPDX-License-Identifier: Apache-2.0
/*
 * A command is one chain: class, command and data readable, one writable byte for the answer. The readable part is
 * copied once and then judged, so the guest cannot change it in between. Every command is answered, whatever it holds,
 * and soon: Linux spins on the answer.
 *
 * Most commands change the guest's rules (guest.h) and are answered when every worker goes by the new ones: at once where
 * there is one worker, else when the others have begun another turn. Commands that change the addresses that are steered
 * to the guest are control's to decide: it knows who owns what, and has the XDP program's map. Such a command waits in
 * the ring until control has done it, a second at most; then it is refused, and control undoes what it does too late.
 *
 * So there may be one command that was executed and is not answered yet (struct ctrl_work). It stays where it is in the
 * ring. For the answer only its chain is walked again, to find the writable byte; its bytes are not read a second time.
 *
 * A guest may send commands as fast as it can. After each one its ring rests for some turns, so that a worker that has
 * anything else to do spends little of its time on them.
 */
#include "ctrlq.h"

#include <unistd.h>

#include "nethdr.h"

#define COMMAND_MAX 16384u /* class, command, and MAC tables of more than two thousand addresses */
#define SEGS_MAX 64u
#define REST_TURNS 8u
#define WAIT_US 1000000u

struct command {
	struct worker *worker;
	struct xv_guest *guest;
	uint64_t features; /* negotiated */
	uint32_t max_pairs;
	uint8_t code;
	const uint8_t *data; /* len bytes */
	uint32_t len;
};

enum outcome { REFUSED, DONE, CHANGED, ASKS_CONTROL };

static uint16_t le16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static uint64_t le64(const uint8_t *p)
{
	uint64_t value = 0;

	for (int i = 8; i--;)
		value = value << 8 | p[i];
	return value;
}

static bool negotiated(const struct command *cmd, uint32_t feature)
{
	return cmd->features >> feature & 1;
}

/* ---- the guest's rules: guest.h says who reads them when ---- */

/* Once true, it stays so: a worker that was asleep wakes up with the epoch that it fell asleep in. */
static bool all_workers_know(const struct worker *w, struct xv_guest *guest)
{
	if (guest->work.epoch && dp_is_past(w->dp, guest->work.epoch, w))
		guest->work.epoch = 0;
	return !guest->work.epoch;
}

static struct rx_rules *other_rules(struct xv_guest *guest)
{
	return &guest->room[guest->rules == &guest->room[0]];
}

/* A copy of the rules to change; NULL while a worker may still look at those that were there before. */
static struct rx_rules *edit_rules(const struct command *cmd)
{
	struct rx_rules *next = other_rules(cmd->guest);

	if (!all_workers_know(cmd->worker, cmd->guest))
		return NULL;
	*next = *cmd->guest->rules;
	return next;
}

static void put_rules_in_force(struct xv_guest *guest)
{
	/* release pairs with the acquire of whoever switches frames to the guest */
	store_release(&guest->rules, (const struct rx_rules *)other_rules(guest));
}

/* ---- requests to control ---- */

/* Ask for the addresses of the edited rules, which come into force when control agrees. */
static enum outcome ask_control(const struct command *cmd, const struct filter *filter)
{
	struct xv_guest *guest = cmd->guest;
	struct xv_mac_request *request = &guest->mac_request;

	if (load_acquire(&guest->mac_state) != MAC_IDLE)
		return REFUSED; /* control is still at one that took too long */
	memcpy(request->mac, &filter->mac, 6);
	request->nr = (uint16_t)filter->nr_unicast;
	for (uint32_t i = 0; i < filter->nr_unicast; i++)
		memcpy(request->others[i], &filter->unicast[i], 6);
	store_release(&guest->mac_state, (uint32_t)MAC_ASKED);
	return ASKS_CONTROL;
}

/* Whether control has answered, or time is up; then `*granted`. */
static bool control_has_answered(struct xv_guest *guest, bool late, bool *granted)
{
	uint32_t state = load_acquire(&guest->mac_state), next = state == MAC_TAKEN ? MAC_GIVEN_UP : MAC_IDLE;

	*granted = state == MAC_GRANTED;
	if ((state == MAC_ASKED || state == MAC_TAKEN) && !late)
		return false;
	/* fails when control takes the request or answers it at this moment: the next turn sees that */
	return __atomic_compare_exchange_n(&guest->mac_state, &state, next, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* ---- commands, by class ---- */

static enum outcome on_rx(const struct command *cmd)
{
	struct rx_rules *next;
	uint32_t bit;

	if (!negotiated(cmd, VIRTIO_NET_F_CTRL_RX) || cmd->len != 1 || cmd->code > VIRTIO_NET_CTRL_RX_NOBCAST)
		return REFUSED;
	if (cmd->code > VIRTIO_NET_CTRL_RX_ALLMULTI && !negotiated(cmd, VIRTIO_NET_F_CTRL_RX_EXTRA))
		return REFUSED;
	next = edit_rules(cmd);
	if (!next)
		return REFUSED;
	bit = 1u << cmd->code;
	next->filter.mode = (next->filter.mode & ~bit) | (cmd->data[0] ? bit : 0);
	put_rules_in_force(cmd->guest);
	store_once(&cmd->guest->ctrl.rx_mode, next->filter.mode);
	return CHANGED;
}

static bool same_unicast(const struct filter *a, const struct filter *b)
{
	return a->nr_unicast == b->nr_unicast && !memcmp(a->unicast, b->unicast, a->nr_unicast * sizeof(a->unicast[0]));
}

static enum outcome on_mac(const struct command *cmd)
{
	const struct filter *now = &cmd->guest->rules->filter;
	struct rx_rules *next = edit_rules(cmd);

	if (!next)
		return REFUSED;
	if (cmd->code == VIRTIO_NET_CTRL_MAC_TABLE_SET && negotiated(cmd, VIRTIO_NET_F_CTRL_RX)) {
		if (!filter_set_tables(&next->filter, cmd->data, cmd->len))
			return REFUSED;
		if (!same_unicast(&next->filter, now))
			return ask_control(cmd, &next->filter);
		put_rules_in_force(cmd->guest);
		return CHANGED;
	}
	if (cmd->code == VIRTIO_NET_CTRL_MAC_ADDR_SET && negotiated(cmd, VIRTIO_NET_F_CTRL_MAC_ADDR) && cmd->len == 6) {
		next->filter.mac = filter_word(cmd->data);
		if (!next->filter.mac || filter_is_group(next->filter.mac))
			return REFUSED;
		return next->filter.mac == now->mac ? DONE : ask_control(cmd, &next->filter);
	}
	return REFUSED;
}

static enum outcome on_vlan(const struct command *cmd)
{
	struct rx_rules *next;
	uint16_t vlan;

	if (!negotiated(cmd, VIRTIO_NET_F_CTRL_VLAN) || cmd->len != 2 || cmd->code > VIRTIO_NET_CTRL_VLAN_DEL)
		return REFUSED;
	vlan = le16(cmd->data);
	next = vlan < 4096 ? edit_rules(cmd) : NULL;
	if (!next)
		return REFUSED;
	if (cmd->code == VIRTIO_NET_CTRL_VLAN_ADD)
		next->filter.vlans[vlan / 64] |= 1ull << vlan % 64;
	else
		next->filter.vlans[vlan / 64] &= ~(1ull << vlan % 64);
	put_rules_in_force(cmd->guest);
	return CHANGED;
}

static enum outcome on_announce(const struct command *cmd)
{
	if (!negotiated(cmd, VIRTIO_NET_F_GUEST_ANNOUNCE) || cmd->code != VIRTIO_NET_CTRL_ANNOUNCE_ACK)
		return REFUSED;
	count(cmd->guest->ctrl.announced, 1);
	return DONE;
}

static bool are_pairs(const struct command *cmd, uint16_t pairs)
{
	return pairs >= VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN && pairs <= cmd->max_pairs;
}

/* The last of VQ_PAIRS_SET and RSS_CONFIG counts (virtio 1.2, 5.1.6.5.5). */
static enum outcome on_mq(const struct command *cmd)
{
	struct rx_rules *next = edit_rules(cmd);
	uint16_t pairs;

	if (!next)
		return REFUSED;
	if (cmd->code == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET && negotiated(cmd, VIRTIO_NET_F_MQ) && cmd->len == 2) {
		pairs = le16(cmd->data);
		next->rss.steer = false;
	} else if (cmd->code == VIRTIO_NET_CTRL_MQ_RSS_CONFIG && negotiated(cmd, VIRTIO_NET_F_RSS)) {
		if (!rss_set(&next->rss, cmd->data, cmd->len, true, cmd->max_pairs, &pairs))
			return REFUSED;
	} else if (cmd->code == VIRTIO_NET_CTRL_MQ_HASH_CONFIG && negotiated(cmd, VIRTIO_NET_F_HASH_REPORT)) {
		if (!rss_set(&next->rss, cmd->data, cmd->len, false, cmd->max_pairs, &pairs))
			return REFUSED;
		pairs = (uint16_t)cmd->guest->ctrl.pairs;
	} else {
		return REFUSED;
	}
	if (!are_pairs(cmd, pairs))
		return REFUSED;
	put_rules_in_force(cmd->guest);
	store_once(&cmd->guest->ctrl.pairs, (uint32_t)pairs);
	return CHANGED;
}

static enum outcome on_guest_offloads(const struct command *cmd)
{
	const uint64_t all = 1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_GUEST_TSO4 |
			     1ull << VIRTIO_NET_F_GUEST_TSO6 | 1ull << VIRTIO_NET_F_GUEST_ECN | 1ull << F_GUEST_USO4 |
			     1ull << F_GUEST_USO6;
	uint64_t wanted;
	uint32_t offloads;

	if (!negotiated(cmd, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) || cmd->code != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET ||
	    cmd->len != 8)
		return REFUSED;
	wanted = le64(cmd->data);
	if (wanted & ~(all & cmd->features))
		return REFUSED;
	offloads = net_gso_bits(wanted, false);
	if (wanted & 1ull << VIRTIO_NET_F_GUEST_CSUM)
		offloads |= OFFLOAD_CSUM;
	store_release(&cmd->guest->offloads, offloads);
	return CHANGED;
}

static enum outcome on_other(const struct command *cmd)
{
	(void)cmd;
	return REFUSED;
}

_Static_assert((int)XV_CTRL_RX == VIRTIO_NET_CTRL_RX && (int)XV_CTRL_MAC == VIRTIO_NET_CTRL_MAC &&
		       (int)XV_CTRL_VLAN == VIRTIO_NET_CTRL_VLAN && (int)XV_CTRL_ANNOUNCE == VIRTIO_NET_CTRL_ANNOUNCE &&
		       (int)XV_CTRL_MQ == VIRTIO_NET_CTRL_MQ &&
		       (int)XV_CTRL_GUEST_OFFLOADS == VIRTIO_NET_CTRL_GUEST_OFFLOADS,
	       "classes are numbered as the specification does");

static enum outcome (*const handlers[XV_CTRL_CLASSES])(const struct command *cmd) = {
	[XV_CTRL_RX] = on_rx,
	[XV_CTRL_MAC] = on_mac,
	[XV_CTRL_VLAN] = on_vlan,
	[XV_CTRL_ANNOUNCE] = on_announce,
	[XV_CTRL_MQ] = on_mq,
	[XV_CTRL_GUEST_OFFLOADS] = on_guest_offloads,
	[XV_CTRL_OTHER] = on_other,
};

/* ---- the ring ---- */

static void tell_control(const struct xv_guest *guest)
{
	const uint64_t one = 1;

	if (guest->event_fd >= 0 && write(guest->event_fd, &one, sizeof(one)) < 0)
		return; /* saturated: control has an event to read anyway */
}

/* The next command's chain; `nr` segments, the last `writable` of which are for the answer. False: there is none. */
static bool walk(struct xv_vring *vr, struct xv_seg *segs, struct xv_buf *buf, uint32_t *nr, uint32_t *writable)
{
	uint32_t budget = SEGS_MAX;
	struct vring_desc desc;
	uint64_t bytes;
	enum chain_result result;

	if (!vring_peek(vr, vr->packed, vr->next, buf, &desc, 1))
		return false;
	result = vring_chain(vr, buf, CHAIN_READ, segs, SEGS_MAX, nr, &bytes, writable, &budget);
	if (result == CHAIN_FAULT)
		return false;
	if (result != CHAIN_OK)
		*nr = *writable = 0; /* no answer can be written, and no command is to be read */
	return true;
}

static void answer(struct worker *w, struct xv_vring *vr, const struct xv_buf *buf, struct xv_seg *to, bool ok,
		   uint8_t class)
{
	const uint32_t written = to ? 1 : 0;
	struct xv_guest *guest = vr->guest;

	if (to) {
		*to->data = ok ? VIRTIO_NET_OK : VIRTIO_NET_ERR;
		vring_wrote(vr, to->data, 1);
	}
	if (ok)
		count(guest->ctrl.accepted[class], 1);
	else
		count(guest->ctrl.refused[class], 1);
	vring_use(vr, vr->packed, buf, &written, 1);
	if (vring_publish(vr, vr->packed))
		vring_call(vr, &vr->queue->tx.calls, &vr->queue->tx.calls_failed, &w->calls.calling);
	guest->work.state = CTRL_NONE;
	guest->work.rest = REST_TURNS;
	tell_control(guest);
}

/* Copy and execute the command; what is left to do for its answer is in guest->work. */
static void execute(struct worker *w, const struct ctrl_source *source, const struct xv_seg *segs, uint32_t nr)
{
	struct xv_guest *guest = source->vring->guest;
	struct ctrl_work *work = &guest->work;
	struct command cmd = {.worker = w, .guest = guest, .features = source->features, .max_pairs = source->max_pairs};
	uint8_t bytes[COMMAND_MAX];
	enum outcome outcome = REFUSED;
	uint32_t len = 0;

	work->class = XV_CTRL_OTHER;
	for (uint32_t i = 0; i < nr; len += segs[i++].len) {
		if (segs[i].len > sizeof(bytes) - len) {
			len = 0;
			break;
		}
		memcpy(bytes + len, segs[i].data, segs[i].len);
	}
	if (len >= 2) {
		work->class = MIN(bytes[0], (uint8_t)XV_CTRL_OTHER);
		cmd.code = bytes[1];
		cmd.data = bytes + 2;
		cmd.len = len - 2;
		outcome = handlers[work->class](&cmd);
	}
	work->ok = outcome != REFUSED;
	work->state = CTRL_NONE;
	work->deadline = cycles_now() + WAIT_US * w->dp->cycles_per_us;
	if (outcome == CHANGED) {
		work->state = CTRL_WAITS_FOR_WORKERS;
		work->epoch = dp_new_epoch(w->dp);
	} else if (outcome == ASKS_CONTROL) {
		work->state = CTRL_ASKS_CONTROL;
		tell_control(guest);
	}
}

/* Get on with the command that is not answered yet; whether it can be answered now. */
static bool proceed(struct worker *w, struct xv_guest *guest)
{
	struct ctrl_work *work = &guest->work;
	const bool late = cycles_now() >= work->deadline;

	if (work->state == CTRL_ASKS_CONTROL) {
		if (!control_has_answered(guest, late, &work->ok))
			return false;
		if (!work->ok) {
			/* what it asked for besides is none of control's business: multicast, above all */
			struct filter *refused = &other_rules(guest)->filter;
			const struct filter *now = &guest->rules->filter;

			refused->mac = now->mac;
			refused->nr_unicast = now->nr_unicast;
			memcpy(refused->unicast, now->unicast, sizeof(now->unicast));
		}
		put_rules_in_force(guest);
		work->state = CTRL_WAITS_FOR_WORKERS;
		work->epoch = dp_new_epoch(w->dp);
	}
	return work->state == CTRL_NONE || all_workers_know(w, guest) || late;
}

bool ctrlq_poll(struct worker *w, const struct ctrl_source *source)
{
	struct xv_vring *vr = source->vring;
	struct xv_guest *guest = vr->guest;
	struct xv_seg segs[SEGS_MAX];
	uint32_t nr, writable;
	struct xv_buf buf;

	if (guest->work.rest) {
		guest->work.rest--;
		return true;
	}
	if (guest->work.state == CTRL_NONE) {
		if (!walk(vr, segs, &buf, &nr, &writable))
			return false;
		execute(w, source, segs, nr - writable);
	}
	if (!proceed(w, guest)) {
		w->ctrl_waits = true;
		return false;
	}
	if (guest_faulted(guest) || !walk(vr, segs, &buf, &nr, &writable)) {
		guest->work.state = CTRL_NONE;
		return false;
	}
	answer(w, vr, &buf, writable ? &segs[nr - writable] : NULL, guest->work.ok, guest->work.class);
	return true;
}
