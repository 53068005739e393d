// SPDX-License-Identifier: Apache-2.0
/* The control virtqueue: what a guest asks for there is what it gets, and every command is answered. */
#include <errno.h>

#include "frames.h"

#define BIT(n) (1ull << (n))
#define CTRL_FEATURES                                                                                             \
	(FEATURES | BIT(VIRTIO_NET_F_CTRL_VQ) | BIT(VIRTIO_NET_F_CTRL_RX) | BIT(VIRTIO_NET_F_CTRL_RX_EXTRA) |       \
	 BIT(VIRTIO_NET_F_CTRL_VLAN) | BIT(VIRTIO_NET_F_CTRL_MAC_ADDR) | BIT(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) |    \
	 BIT(VIRTIO_NET_F_GUEST_ANNOUNCE) | BIT(VIRTIO_NET_F_MQ))
#define CTRL 4
#define ROOM 2048u

static const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mdns[6] = {1, 0, 0x5e, 0, 0, 0xfb},
		     other_group[6] = {0x33, 0x33, 0, 0, 0, 1}, second_mac[6] = {0x52, 0x54, 0, 0, 1, 1};

static struct world w;
static struct driver *const guest = &w.guests[0], *const peer = &w.guests[1];

/* Guest 0 has a control virtqueue, guest 1 sends to it. */
static void begin(uint64_t features)
{
	world_init_mixed(&w, 2, (uint64_t[]){features, FEATURES | BIT(VIRTIO_NET_F_CSUM) | BIT(VIRTIO_NET_F_HOST_TSO4)}, 64, 0, 1);
	for (int i = 0; i < 16; i++) {
		ring_buffer(guest, &guest->ring[0], ROOM, VRING_DESC_F_WRITE);
		ring_buffer(guest, &guest->ring[2], ROOM, VRING_DESC_F_WRITE);
	}
}

/* Put a command into the control ring; where its answer will be. */
static const uint8_t *command(uint8_t class, uint8_t code, const void *data, uint32_t len)
{
	struct ring *r = &guest->ring[CTRL];
	uint64_t at = driver_alloc(guest, 2 + len + 1, 16);
	uint8_t *bytes = guest->memory + at;
	uint16_t i = (uint16_t)(r->next % r->num);

	bytes[0] = class;
	bytes[1] = code;
	if (len)
		memcpy(bytes + 2, data, len);
	bytes[2 + len] = 0xee;
	ring_desc(r, i, GPA + at, 2 + len, 0, (i + 1) % (int)r->num);
	ring_desc(r, (uint16_t)((i + 1) % r->num), GPA + at + 2 + len, 1, VRING_DESC_F_WRITE, -1);
	r->next = (uint16_t)(r->next + 2);
	ring_offer(r, i);
	return bytes + 2 + len;
}

static void finish_command(const uint8_t *answer, bool ok)
{
	uint32_t len;

	CHECK_EQ(*answer, ok ? VIRTIO_NET_OK : VIRTIO_NET_ERR);
	CHECK(ring_reap(&guest->ring[CTRL], &len) >= 0);
	CHECK_EQ(len, 1);
}

static void expect(bool ok, uint8_t class, uint8_t code, const void *data, uint32_t len)
{
	const uint8_t *answer = command(class, code, data, len);

	world_run(&w);
	finish_command(answer, ok);
}

static void rx_mode(uint8_t code, bool on)
{
	expect(true, VIRTIO_NET_CTRL_RX, code, (uint8_t[]){on}, 1);
}

static uint32_t make_tables(uint8_t *to, uint32_t unicast, uint32_t multicast, const uint8_t (*macs)[6])
{
	const uint32_t counts[2] = {unicast, multicast};
	uint8_t *p = to;

	for (int t = 0; t < 2; t++) {
		memcpy(p, &counts[t], 4);
		memcpy(p + 4, macs, 6ul * counts[t]);
		p += 4 + 6 * counts[t];
		macs += counts[t];
	}
	return (uint32_t)(p - to);
}

/* How many frames to `mac` arrive of one that the other guest sends; `vlan` < 0: untagged. On receive ring `pair`. */
static bool arrives_tagged(const uint8_t *mac, int vlan)
{
	static uint8_t seed;
	uint8_t f[64];
	uint32_t len;
	int id;

	make_frame(f, sizeof(f), mac, peer->mac, ++seed);
	if (vlan >= 0)
		memcpy(f + 12, (uint8_t[]){0x81, 0, (uint8_t)(vlan >> 8), (uint8_t)vlan}, 4);
	driver_send(peer, f, sizeof(f));
	world_run(&w);
	CHECK(ring_reap(&peer->ring[1], NULL) >= 0);
	id = ring_reap(&guest->ring[0], &len);
	if (id < 0)
		return false;
	CHECK_EQ(len, HEADER + sizeof(f));
	CHECK(!memcmp(guest->memory + (guest->ring[0].desc[id].addr - GPA) + HEADER, f, sizeof(f)));
	ring_offer(&guest->ring[0], (uint16_t)id);
	return true;
}

static bool arrives(const uint8_t *mac)
{
	return arrives_tagged(mac, -1);
}

/* A TCP segment for the guest, its checksum open. */
static const struct built *tcp_frame(uint16_t port, uint32_t payload)
{
	static struct built f;

	build(&f, &(struct spec){.family = 4, .protocol = IPPROTO_TCP, .payload = payload}, guest->mac, peer->mac);
	put_be16(f.bytes + f.transport, port);
	return &f;
}

static uint64_t filtered(void)
{
	return guest->guest->queues[0].rx.drops[XV_DROP_FILTERED];
}

static void test_after_reset(void)
{
	begin(CTRL_FEATURES);
	CHECK(arrives(guest->mac));
	CHECK(arrives(broadcast));
	CHECK_EQ(filtered(), 0);
	CHECK(!arrives(mdns));
	CHECK(!arrives_tagged(broadcast, 5));
	CHECK(!arrives_tagged(guest->mac, 4095));
	CHECK_EQ(filtered(), 3);
	CHECK(arrives_tagged(guest->mac, 0)); /* a priority, no VLAN */
	world_free(&w);

	/* who has not negotiated a filter gets everything */
	begin(FEATURES | BIT(VIRTIO_NET_F_CTRL_VQ));
	CHECK(arrives(mdns));
	CHECK(arrives_tagged(broadcast, 5));
	CHECK_EQ(filtered(), 0);
	world_free(&w);
}

static void test_modes(void)
{
	begin(CTRL_FEATURES);
	rx_mode(VIRTIO_NET_CTRL_RX_ALLMULTI, true);
	CHECK_EQ(guest->guest->ctrl.rx_mode, 1u << VIRTIO_NET_CTRL_RX_ALLMULTI);
	CHECK(arrives(mdns));
	rx_mode(VIRTIO_NET_CTRL_RX_NOMULTI, true); /* takes precedence, as with QEMU */
	CHECK(!arrives(mdns));
	CHECK(arrives(broadcast));
	rx_mode(VIRTIO_NET_CTRL_RX_NOBCAST, true);
	CHECK(!arrives(broadcast));
	rx_mode(VIRTIO_NET_CTRL_RX_NOUNI, true);
	CHECK(!arrives(guest->mac));
	rx_mode(VIRTIO_NET_CTRL_RX_PROMISC, true);
	CHECK(arrives(guest->mac) && arrives(broadcast) && arrives(mdns) && arrives_tagged(mdns, 9));
	rx_mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
	CHECK(!arrives(guest->mac));
	rx_mode(VIRTIO_NET_CTRL_RX_NOUNI, false);
	CHECK(arrives(guest->mac));
	world_free(&w);
}

static void test_multicast_table(void)
{
	static uint8_t data[8 + 6 * (FILTER_MULTICAST + 1)], many[FILTER_MULTICAST + 1][6];
	uint8_t table[2][6];
	uint32_t len;

	begin(CTRL_FEATURES);
	memcpy(table[0], other_group, 6);
	memcpy(table[1], mdns, 6);
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 0, 2, table));
	CHECK(arrives(mdns) && arrives(other_group));
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 0, 1, table));
	CHECK(!arrives(mdns) && arrives(other_group));
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 0, 0, table));
	CHECK(!arrives(other_group));

	for (uint32_t i = 0; i < ARRAY_SIZE(many); i++)
		memcpy(many[i], (uint8_t[]){0x33, 0x33, 9, 9, (uint8_t)(i >> 8), (uint8_t)i}, 6);
	len = make_tables(data, 0, FILTER_MULTICAST, many);
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, len);
	CHECK(arrives(many[0]) && arrives(many[100]) && arrives(many[FILTER_MULTICAST - 1]));
	CHECK(!arrives(many[FILTER_MULTICAST]) && !arrives(mdns));
	len = make_tables(data, 0, FILTER_MULTICAST + 1, many);
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, len);
	CHECK(arrives(many[FILTER_MULTICAST]) && arrives(mdns)); /* too many to remember: all */
	world_free(&w);
}

static void test_vlans(void)
{
	begin(CTRL_FEATURES);
	expect(true, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, (uint8_t[]){0xff, 0x0f}, 2);
	CHECK(arrives_tagged(guest->mac, 4095) && arrives_tagged(broadcast, 4095));
	CHECK(!arrives_tagged(guest->mac, 4094));
	expect(true, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, (uint8_t[]){0xff, 0x0f}, 2);
	CHECK(!arrives_tagged(guest->mac, 4095) && arrives(guest->mac));
	expect(false, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, (uint8_t[]){0x00, 0x10}, 2);
	expect(false, VIRTIO_NET_CTRL_VLAN, 2, (uint8_t[]){1, 0}, 2);
	expect(false, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, (uint8_t[]){1}, 1);
	world_free(&w);
}

/* ---- addresses: control decides ---- */

static struct xv_mac_request take_request(void)
{
	struct xv_mac_request request;

	world_run(&w);
	CHECK(ring_reap(&guest->ring[CTRL], NULL) < 0);
	CHECK_EQ(xv_guest_mac_request(guest->guest, &request), 1);
	CHECK_EQ(xv_guest_mac_request(guest->guest, &(struct xv_mac_request){0}), 0);
	return request;
}

static void test_mac_address(void)
{
	struct xv_mac_request request;
	const uint8_t *answer;

	begin(CTRL_FEATURES);
	answer = command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 6);
	request = take_request();
	CHECK(!memcmp(request.mac, second_mac, 6));
	CHECK_EQ(request.nr, 0);
	CHECK(arrives(guest->mac)); /* not changed yet */
	CHECK_EQ(xv_guest_mac_answer(guest->guest, 1), 0);
	world_run(&w);
	finish_command(answer, true);
	CHECK(!arrives(guest->mac)); /* it is steered to the guest, which does not want it any more */
	CHECK_EQ(filtered(), 1);
	memcpy(guest->mac, second_mac, 6);
	world_publish(&w);
	CHECK(arrives(second_mac));

	answer = command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, peer->mac, 6);
	take_request();
	CHECK_EQ(xv_guest_mac_answer(guest->guest, 0), 0);
	world_run(&w);
	finish_command(answer, false);
	CHECK(arrives(second_mac));
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 6); /* no change: nobody is asked */
	expect(false, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, mdns, 6);
	expect(false, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, (uint8_t[6]){0}, 6);
	expect(false, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 5);
	world_free(&w);
}

static void test_unicast_table(void)
{
	uint8_t data[8 + 6 * (XV_MAX_MACS + 1)], table[XV_MAX_MACS + 1][6];
	struct xv_mac_request request;
	const uint8_t *answer;

	begin(CTRL_FEATURES);
	memcpy(table[0], second_mac, 6);
	memcpy(table[1], mdns, 6);
	answer = command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 1, 1, table));
	request = take_request();
	CHECK_EQ(request.nr, 1);
	CHECK(!memcmp(request.others[0], second_mac, 6) && !memcmp(request.mac, guest->mac, 6));
	CHECK_EQ(xv_guest_mac_answer(guest->guest, 0), 0);
	world_run(&w);
	finish_command(answer, false);
	CHECK(arrives(mdns)); /* that part was not control's to refuse */
	CHECK_EQ(guest->guest->rules->filter.nr_unicast, 0);

	answer = command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 1, 1, table));
	take_request();
	CHECK_EQ(xv_guest_mac_answer(guest->guest, 1), 0);
	world_run(&w);
	finish_command(answer, true);
	CHECK_EQ(guest->guest->rules->filter.nr_unicast, 1);
	/* the same again is no change */
	expect(true, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 1, 1, table));

	for (uint32_t i = 0; i <= XV_MAX_MACS; i++)
		memcpy(table[i], (uint8_t[]){0x52, 0x54, 7, 7, 7, (uint8_t)i}, 6);
	expect(false, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, XV_MAX_MACS + 1, 0, table));
	memset(table[0], 0, 6);
	expect(false, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, data, make_tables(data, 1, 0, table));
	CHECK(arrives(mdns));
	world_free(&w);
}

/* Control does not answer, or too late: the guest is answered all the same, and control learns of it. */
static void test_control_is_late(void)
{
	const uint64_t cycles = UINT64_MAX >> 24;
	const uint8_t *answer;

	begin(CTRL_FEATURES);
	w.dp->cycles_per_us = cycles;
	answer = command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 6);
	world_run(&w);
	CHECK_EQ(*answer, 0xee);
	guest->guest->work.deadline = 0;
	world_run(&w);
	finish_command(answer, false);
	CHECK_EQ(xv_guest_mac_request(guest->guest, &(struct xv_mac_request){0}), 0);

	answer = command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 6);
	take_request();
	guest->guest->work.deadline = 0;
	world_run(&w);
	finish_command(answer, false);
	expect(false, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 6); /* while control is still at it */
	CHECK_EQ(xv_guest_mac_answer(guest->guest, 1), -ECANCELED);
	CHECK(arrives(guest->mac));

	/* a session that ends: the next one's requests are its own */
	command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, second_mac, 6);
	take_request();
	xv_guest_reset(guest->guest);
	CHECK_EQ(xv_guest_mac_answer(guest->guest, 1), -ECANCELED);
	CHECK_EQ(guest->guest->mac_state, MAC_IDLE);
	world_free(&w);
}

/* ---- other workers ---- */

/* Rules change at once, but the guest is told so only when no worker can be going by the old ones. */
static void test_answer_waits_for_other_workers(void)
{
	struct worker *other;
	const uint8_t *answer;

	world_init_mixed(&w, 2, (uint64_t[]){CTRL_FEATURES, FEATURES}, 64, 0, 2);
	other = &w.dp->workers[1];
	other->seen = w.dp->epoch;
	other->running = true;
	answer = command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, (uint8_t[]){1}, 1);
	world_run(&w);
	CHECK_EQ(*answer, 0xee);
	CHECK(w.dp->workers[0].ctrl_waits);
	CHECK(guest->guest->rules->filter.mode);
	other->seen = w.dp->epoch;
	world_run(&w);
	finish_command(answer, true);
	CHECK(!w.dp->workers[0].ctrl_waits);

	answer = command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, (uint8_t[]){0}, 1);
	world_run(&w);
	CHECK_EQ(*answer, 0xee);
	other->parked = true; /* asleep: it holds nothing */
	world_run(&w);
	finish_command(answer, true);
	other->parked = false;

	/* it hangs: the guest is answered, but may change nothing before the rules that it hangs on are free */
	answer = command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, (uint8_t[]){1}, 1);
	world_run(&w);
	CHECK_EQ(*answer, 0xee);
	guest->guest->work.deadline = 0;
	world_run(&w);
	finish_command(answer, true);
	expect(false, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, (uint8_t[]){0}, 1);
	other->running = false;
	rx_mode(VIRTIO_NET_CTRL_RX_PROMISC, false);
	world_free(&w);
}

/* ---- queues ---- */

static int arrived_at(uint32_t ring)
{
	int id = ring_reap(&guest->ring[ring], NULL), n = 0;

	for (; id >= 0; id = ring_reap(&guest->ring[ring], NULL), n++)
		ring_offer(&guest->ring[ring], (uint16_t)id);
	return n;
}

static void test_pairs(void)
{
	begin(CTRL_FEATURES);
	expect(true, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, (uint8_t[]){2, 0}, 2);
	CHECK_EQ(guest->guest->ctrl.pairs, 2);
	expect(false, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, (uint8_t[]){3, 0}, 2);
	expect(false, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, (uint8_t[]){0, 0}, 2);
	expect(false, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, (uint8_t[]){0}, 1);
	CHECK_EQ(guest->guest->ctrl.pairs, 2);
	world_free(&w);
}

/* One key for all: the frames' hashes are known from test_rss.c only by their spread; here they are compared. */
static void send_flow(uint16_t port)
{
	const struct built *f = tcp_frame(port, 20);

	driver_send(peer, f->bytes, f->len);
	world_run(&w);
}

static void test_rss(void)
{
	uint8_t data[8 + 4 + 3 + 40] = {VIRTIO_NET_RSS_HASH_TYPE_TCPv4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 2, 0, 40};
	const uint8_t *got;
	uint32_t hash, first = 0;
	uint16_t report;
	int id, n[2] = {0, 0};

	begin(CTRL_FEATURES | BIT(VIRTIO_NET_F_RSS) | BIT(VIRTIO_NET_F_HASH_REPORT));
	for (uint32_t i = 15; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 37);
	/* nothing configured: no hash, the first queue */
	send_flow(1);
	id = ring_reap(&guest->ring[0], &hash);
	CHECK(id >= 0);
	got = guest->memory + (guest->ring[0].desc[id].addr - GPA);
	memcpy(&report, got + 16, 2);
	CHECK_EQ(report, VIRTIO_NET_HASH_REPORT_NONE);
	CHECK(!memcmp(got + 20, guest->mac, 6));
	ring_offer(&guest->ring[0], (uint16_t)id);

	expect(true, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, data, sizeof(data));
	CHECK_EQ(guest->guest->ctrl.pairs, 2);
	for (uint16_t port = 1; port <= 64; port++) {
		send_flow(port);
		for (int pair = 0; pair < 2; pair++) {
			id = ring_reap(&guest->ring[2 * pair], NULL);
			if (id < 0)
				continue;
			got = guest->memory + (guest->ring[2 * pair].desc[id].addr - GPA);
			memcpy(&hash, got + 12, 4);
			memcpy(&report, got + 16, 2);
			CHECK_EQ(report, VIRTIO_NET_HASH_REPORT_TCPv4);
			CHECK_EQ(hash & 1, (uint32_t)pair);
			CHECK(port == 1 || hash != first);
			first = port == 1 ? hash : first;
			n[pair]++;
			ring_offer(&guest->ring[2 * pair], (uint16_t)id);
		}
	}
	CHECK_EQ(n[0] + n[1], 64);
	CHECK(n[0] > 16 && n[1] > 16);
	expect(true, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, (uint8_t[]){1, 0}, 2);
	for (uint16_t port = 1; port <= 16; port++)
		send_flow(port);
	CHECK_EQ(arrived_at(0), 16);
	CHECK_EQ(arrived_at(2), 0);
	data[4] = 2; /* three entries */
	expect(false, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, data, sizeof(data));
	world_free(&w);
}

/* A burst over two queues of which one is full: its frames are dropped there, the other's arrive. */
static void test_rss_with_a_full_queue(void)
{
	uint8_t data[8 + 4 + 3 + 40] = {VIRTIO_NET_RSS_HASH_TYPE_TCPv4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 2, 0, 40};
	int left;

	begin(CTRL_FEATURES | BIT(VIRTIO_NET_F_RSS));
	for (uint32_t i = 15; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 37);
	expect(true, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, data, sizeof(data));
	xv_vring_set_enabled(guest->ring[0].vr, 0); /* its frames go to the next queue that is on */
	for (uint16_t port = 1; port <= 30; port++) {
		const struct built *f = tcp_frame(port, 20);

		driver_send(peer, f->bytes, f->len);
	}
	world_run(&w);
	CHECK_EQ(arrived_at(0), 0);
	left = 30 - arrived_at(2);
	CHECK_EQ(left, 14);
	CHECK_EQ(guest->guest->queues[1].rx.drops[XV_DROP_NO_BUFFERS], 14);
	world_free(&w);
}

/* Two segments of a flow, as from a wire. */
static void receive_two(uint16_t port, bool damaged)
{
	struct built f = *tcp_frame(port, 600);

	for (uint32_t i = 0; i < 2; i++) {
		uint8_t *ip = f.bytes + 14, *tcp = f.bytes + f.transport;
		uint16_t sum;

		put_be16(ip + 4, i);
		put_be16(ip + 10, 0);
		sum = (uint16_t)~plain_sum(ip, 20);
		memcpy(ip + 10, &sum, 2);
		put_be32(tcp + 4, 600 * i);
		memcpy(tcp + 16, &f.pseudo, 2);
		sum = net_csum_finish(plain_sum(tcp, f.len - f.transport));
		memcpy(tcp + 16, &sum, 2);
		tcp[200] ^= damaged && i;
		CHECK(nic_receive(&w.nic, f.bytes, f.len));
	}
}

/* Joined segments of several flows, some damaged, over several queues: those arrive unjoined, the others joined. */
static void test_rss_with_damaged_flows(void)
{
	uint8_t data[8 + 4 + 3 + 40] = {VIRTIO_NET_RSS_HASH_TYPE_TCPv4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 2, 0, 40};
	uint32_t joined = 0, single = 0;

	begin(CTRL_FEATURES | BIT(VIRTIO_NET_F_RSS) | BIT(VIRTIO_NET_F_HASH_REPORT) | BIT(VIRTIO_NET_F_MRG_RXBUF) |
	      BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4));
	for (uint32_t i = 15; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 37);
	expect(true, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, data, sizeof(data));
	for (uint16_t port = 1; port <= 12; port++)
		receive_two(port, port % 3 == 0);
	world_run(&w);
	for (int pair = 0; pair < 2; pair++) {
		int id;

		while ((id = ring_reap(&guest->ring[2 * pair], NULL)) >= 0) {
			const uint8_t *got = guest->memory + (guest->ring[2 * pair].desc[id].addr - GPA);
			uint32_t hash;

			memcpy(&hash, got + 12, 4);
			CHECK_EQ(hash & 1, (uint32_t)pair);
			if (got[1]) {
				CHECK_EQ(got[1], VIRTIO_NET_HDR_GSO_TCPV4);
				joined++;
			} else {
				CHECK_EQ(got[0], 0);
				single++;
			}
		}
	}
	CHECK_EQ(joined, 8);
	CHECK_EQ(single, 8);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	world_free(&w);
}

/* ---- offloads ---- */

static void send_gso(void)
{
	const struct built *f = tcp_frame(7, 2500);
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
				     .gso_size = 1000, .hdr_len = 54, .csum_start = 34, .csum_offset = 16};
	uint8_t *buffer = ring_buffer(peer, &peer->ring[1], HEADER + f->len, 0);

	memset(buffer, 0, HEADER);
	memcpy(buffer, &hdr, sizeof(hdr));
	memcpy(buffer + HEADER, f->bytes, f->len);
	world_run(&w);
}

/* Of a TCP segment in IPv4 without options. */
static bool has_right_checksum(const uint8_t *frame, uint32_t len)
{
	uint8_t pseudo[12] = {[9] = IPPROTO_TCP};
	uint32_t sum;

	memcpy(pseudo, frame + 26, 8);
	put_be16(pseudo + 10, len - 34);
	sum = (uint32_t)plain_sum(pseudo, sizeof(pseudo)) + plain_sum(frame + 34, len - 34);
	return ((sum & 0xffff) + (sum >> 16)) == 0xffff;
}

static void test_guest_offloads(void)
{
	const uint64_t all = BIT(VIRTIO_NET_F_GUEST_CSUM) | BIT(VIRTIO_NET_F_GUEST_TSO4);
	uint64_t some = BIT(VIRTIO_NET_F_GUEST_CSUM), none = 0, unknown = BIT(VIRTIO_NET_F_GUEST_TSO6);
	uint32_t len;
	int id;

	begin(CTRL_FEATURES | all | BIT(VIRTIO_NET_F_MRG_RXBUF));
	for (int i = 0; i < 8; i++)
		ring_buffer(guest, &guest->ring[0], ROOM, VRING_DESC_F_WRITE);
	send_gso();
	id = ring_reap(&guest->ring[0], &len);
	CHECK_EQ(len, ROOM); /* whole, over two buffers */
	CHECK(ring_reap(&guest->ring[0], &len) >= 0);
	CHECK(ring_reap(&guest->ring[0], &len) < 0);

	expect(true, VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &some, 8);
	send_gso();
	for (int i = 0; i < 3; i++) {
		id = ring_reap(&guest->ring[0], &len);
		CHECK(id >= 0);
		CHECK_EQ(len, HEADER + 54 + (i < 2 ? 1000 : 500));
		CHECK_EQ(guest->memory[guest->ring[0].desc[id].addr - GPA], VIRTIO_NET_HDR_F_NEEDS_CSUM);
	}
	expect(true, VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &none, 8);
	send_gso();
	for (int i = 0; i < 3; i++) {
		const uint8_t *at;

		id = ring_reap(&guest->ring[0], &len);
		CHECK(id >= 0);
		at = guest->memory + (guest->ring[0].desc[id].addr - GPA);
		CHECK_EQ(at[0], 0);
		CHECK(has_right_checksum(at + HEADER, len - HEADER));
	}
	CHECK_EQ(guest->guest->queues[0].rx.csum_finished, 3);
	expect(true, VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &all, 8);
	send_gso();
	CHECK(ring_reap(&guest->ring[0], &len) >= 0);
	CHECK_EQ(len, ROOM);
	expect(false, VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &unknown, 8); /* not negotiated */
	expect(false, VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &all, 7);
	expect(false, VIRTIO_NET_CTRL_GUEST_OFFLOADS, 1, &all, 8);
	world_free(&w);
}

/* ---- commands as such ---- */

static void test_every_command_is_answered(void)
{
	const struct xv_ctrl_state *state;
	uint64_t commands = 0, refused = 0;

	begin(CTRL_FEATURES);
	for (uint32_t class = 0; class < 9; class++)
		for (uint8_t code = 0; code < 8; code++)
			for (uint32_t len = 0; len < 3; len++) {
				const uint8_t *answer = command((uint8_t)class, code, "\1\0\0", len);

				world_run(&w);
				CHECK(*answer == VIRTIO_NET_OK || *answer == VIRTIO_NET_ERR);
				CHECK(ring_reap(&guest->ring[CTRL], NULL) >= 0);
			}
	expect(false, 255, 255, "x", 1);
	for (uint32_t class = 0; class < XV_CTRL_OTHER; class++)
		expect(false, (uint8_t)class, 255, "x", 1);
	expect(true, VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, "", 0);
	state = &guest->guest->ctrl;
	for (uint32_t i = 0; i < XV_CTRL_CLASSES; i++) {
		CHECK(xv_ctrl_name(i));
		commands += state->accepted[i] + state->refused[i];
		refused += state->refused[i];
	}
	CHECK_EQ(commands, 9 * 8 * 3 + 2 + XV_CTRL_OTHER);
	CHECK_EQ(state->refused[XV_CTRL_OTHER], 3 * 8 * 3 + 1);
	CHECK(refused < commands);
	CHECK_EQ(state->announced, 4);
	CHECK(!xv_ctrl_name(XV_CTRL_CLASSES));
	world_free(&w);
}

static void test_shapes_of_chains(void)
{
	struct ring *r = &guest->ring[CTRL];
	uint8_t *bytes;
	uint64_t at;
	uint32_t len;

	begin(CTRL_FEATURES);
	at = driver_alloc(guest, 20000, 16);
	bytes = guest->memory + at;
	/* a command without room for an answer */
	bytes[2] = 1;
	ring_desc(r, 0, GPA + at, 3, 0, -1);
	ring_offer(r, 0);
	world_run(&w);
	CHECK_EQ(ring_reap(r, &len), 0);
	CHECK_EQ(len, 0);
	CHECK_EQ(guest->guest->ctrl.rx_mode, 1);
	/* an answer without a command */
	ring_desc(r, 1, GPA + at + 19999, 1, VRING_DESC_F_WRITE, -1);
	ring_offer(r, 1);
	world_run(&w);
	CHECK_EQ(ring_reap(r, &len), 1);
	CHECK_EQ(bytes[19999], VIRTIO_NET_ERR);
	/* every byte in a descriptor of its own, the answer's room longer than it needs to be */
	for (uint16_t i = 0; i < 3; i++)
		ring_desc(r, (uint16_t)(2 + i), GPA + at + i, 1, 0, 3 + i);
	ring_desc(r, 5, GPA + at + 100, 16, VRING_DESC_F_WRITE, -1);
	bytes[100] = bytes[101] = 0xee;
	ring_offer(r, 2);
	world_run(&w);
	CHECK_EQ(ring_reap(r, &len), 2);
	CHECK_EQ(len, 1);
	CHECK_EQ(bytes[100], VIRTIO_NET_OK);
	CHECK_EQ(bytes[101], 0xee);
	/* longer than any command */
	memset(bytes, 0, 3);
	ring_desc(r, 6, GPA + at, 19000, 0, 7);
	ring_desc(r, 7, GPA + at + 19500, 1, VRING_DESC_F_WRITE, -1);
	ring_offer(r, 6);
	world_run(&w);
	CHECK_EQ(ring_reap(r, &len), 6);
	CHECK_EQ(bytes[19500], VIRTIO_NET_ERR);
	CHECK_EQ(guest->guest->fault.code, XV_FAULT_NONE);
	world_free(&w);
}

/* ---- a guest that changes a command while it is read: the class of CVE-2026-86562 ---- */

static struct {
	uint32_t *entries; /* of the command's first table */
	bool stop;
} racer;

static void *race(void *nothing)
{
	for (uint32_t i = 0; !load_once(&racer.stop); i++)
		store_once(racer.entries, i & 1 ? 2u : i & 2 ? 700u : UINT32_MAX);
	return nothing;
}

static void test_a_command_that_changes_while_it_is_read(void)
{
	struct ring *r = &guest->ring[CTRL];
	pthread_t thread;
	uint8_t *bytes;
	uint64_t at;

	begin(CTRL_FEATURES);
	at = driver_alloc(guest, 8192, 16) + 2; /* so that the number of entries is one word */
	bytes = guest->memory + at;
	bytes[0] = VIRTIO_NET_CTRL_MAC;
	bytes[1] = VIRTIO_NET_CTRL_MAC_TABLE_SET;
	memset(bytes + 2, 1, 4 + 6 * 700 + 4);
	memset(bytes + 2 + 4 + 6 * 700, 0, 4); /* behind 700 entries an empty table, behind 2 nonsense */
	racer.entries = (uint32_t *)(void *)(bytes + 2);
	ring_desc(r, 0, GPA + at, 2 + 4 + 6 * 700 + 4, 0, 1);
	ring_desc(r, 1, GPA + at + 8000, 1, VRING_DESC_F_WRITE, -1);
	CHECK_EQ(pthread_create(&thread, NULL, race, NULL), 0);
	for (uint32_t i = 0; i < 20000; i++) {
		bytes[8000] = 0xee;
		ring_offer(r, 0);
		world_run(&w);
		CHECK_EQ(ring_reap(r, NULL), 0);
		CHECK(bytes[8000] == VIRTIO_NET_OK || bytes[8000] == VIRTIO_NET_ERR);
		CHECK(guest->guest->rules->filter.nr_multicast <= FILTER_MULTICAST);
	}
	store_release(&racer.stop, true);
	pthread_join(thread, NULL);
	CHECK_EQ(guest->guest->fault.code, XV_FAULT_NONE);
	world_free(&w);
}

/* A driver that has used its control virtqueue before was configured by commands that we have not seen. */
static void test_resumed_ring(void)
{
	struct xv_vring_conf conf;
	const struct xv_snapshot_conf nothing = {0};

	begin(CTRL_FEATURES);
	rx_mode(VIRTIO_NET_CTRL_RX_ALLMULTI, true);
	CHECK_EQ(guest->guest->ctrl.adopted, 0);
	for (int session = 0; session < 2; session++) {
		CHECK_EQ(xv_publish(w.dp, &nothing), 0);
		xv_vring_free(guest->ring[CTRL].vr);
		conf = ring_conf(guest, &guest->ring[CTRL]);
		conf.base = 1;
		if (session)
			xv_guest_reset(guest->guest);
		CHECK_EQ(xv_vring_new(guest->mem, &conf, &guest->ring[CTRL].vr), 0);
		world_publish(&w);
		CHECK_EQ(guest->guest->ctrl.adopted, session);
		CHECK_EQ(arrives_tagged(mdns, 7), session); /* within a session the rules are known */
		CHECK(arrives(mdns) && arrives(guest->mac));
	}
	rx_mode(VIRTIO_NET_CTRL_RX_NOMULTI, true);
	CHECK(!arrives(mdns));
	world_free(&w);
}

int main(void)
{
	test_after_reset();
	test_modes();
	test_multicast_table();
	test_vlans();
	test_mac_address();
	test_unicast_table();
	test_control_is_late();
	test_answer_waits_for_other_workers();
	test_pairs();
	test_rss();
	test_rss_with_a_full_queue();
	test_rss_with_damaged_flows();
	test_guest_offloads();
	test_every_command_is_answered();
	test_shapes_of_chains();
	test_a_command_that_changes_while_it_is_read();
	test_resumed_ring();
	puts("ok");
	return 0;
}
