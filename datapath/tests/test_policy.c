// SPDX-License-Identifier: Apache-2.0
/* What a guest may send and be sent, through rings: how much, from which addresses, and which it may add to its own. */
#include <errno.h>

#include "frames.h"

#define GSO_FEATURES (FEATURES | 1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_TSO6)
#define RX(i) (w.guests[i].guest->queues[0].rx)
#define TX(i) (w.guests[i].guest->queues[0].tx)

static const uint8_t nobody[6] = {0x52, 0x54, 0, 0, 9, 9}, everyone[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

static struct world w;
static struct built f;
static uint8_t frame[4096], got[70000];

/* Time stands still for the limits of all guests: what comes in is what earn() says. */
static void publish(void)
{
	world_publish(&w);
	for (uint32_t i = 0; i < 3; i++) {
		struct limit *limits[3] = {&w.guests[i].guest->tx, &w.guests[i].guest->rx, &w.guests[i].guest->storm};

		for (uint32_t l = 0; l < 3; l++)
			if (limits[l]->in_force)
				limits[l]->in_force->mult = 1;
		w.guests[i].ring[1].vr->not_before = 0; /* as adopt() in worker.c has it */
	}
}

static void earn(struct limit *limit, uint64_t units)
{
	bucket_give(limit->in_force, units);
	for (uint32_t i = 0; i < 3; i++)
		w.guests[i].ring[1].vr->not_before = 0;
}

static void begin(const struct xv_policy_conf *a, const struct xv_policy_conf *b, uint64_t features)
{
	world_init(&w, 3, features, 256, 0);
	w.policies[0] = a;
	w.policies[1] = b;
	w.policies[2] = NULL;
	publish();
}

static void post(uint32_t guest, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		ring_buffer(&w.guests[guest], &w.guests[guest].ring[0], 2048, VRING_DESC_F_WRITE);
}

/* Frames in the guest's buffers, with `got` the last one; its length in *len. */
static uint32_t take_all(uint32_t guest, uint32_t *len)
{
	struct driver *d = &w.guests[guest];
	uint32_t n = 0, bytes;
	int head;

	while ((head = ring_reap(&d->ring[0], &bytes)) >= 0) {
		*len = bytes - HEADER;
		memcpy(got, d->memory + (d->ring[0].desc[head].addr - GPA) + HEADER, *len);
		n++;
	}
	return n;
}

/* Frames that left by the NIC. */
static uint32_t leave_all(uint32_t *len)
{
	uint32_t n = 0, bytes;

	while ((bytes = nic_send(&w.nic, got))) {
		*len = bytes;
		n++;
	}
	return n;
}

/* `n` frames of `size` bytes from a guest, without forwarding them. */
static void offer(uint32_t guest, uint32_t n, uint32_t size, const uint8_t *to)
{
	make_frame(frame, size, to, w.guests[guest].mac, 1);
	for (uint32_t i = 0; i < n; i++)
		driver_send(&w.guests[guest], frame, size);
}

static uint32_t sent(uint32_t guest)
{
	return w.guests[guest].ring[1].used->idx;
}

static void turns(uint32_t n)
{
	while (n--)
		worker_turn(&w.dp->workers[0], w.dp->snap, false);
}

/* ---- how much ---- */

/* What a guest may not send yet waits in its ring, and nothing is lost. */
static void test_tx_waits(void)
{
	const struct xv_policy_conf slow = {.tx = {1, 10000}};
	const uint64_t *waits;
	uint32_t len, busy;

	begin(&slow, NULL, FEATURES);
	CHECK(!w.dp->snap->ports[0].judged);
	offer(0, 40, 1000, nobody);
	world_run(&w);
	CHECK_EQ(sent(0), 10);
	CHECK_EQ(leave_all(&len), 10);
	waits = &w.guests[0].ring[1].vr->not_before;
	CHECK(*waits > cycles_now() && w.dp->workers[0].due == *waits); /* it is not looked at before, nor later */
	busy = (uint32_t)w.dp->workers[0].counters.polls_busy;
	turns(100);
	CHECK_EQ(w.dp->workers[0].counters.polls_busy, busy);
	CHECK_EQ(sent(0), 10);
	earn(&w.guests[0].guest->tx, 2500);
	world_run(&w);
	CHECK_EQ(sent(0), 13); /* the last one took 500 bytes that were not there */
	earn(&w.guests[0].guest->tx, 400);
	world_run(&w);
	CHECK_EQ(sent(0), 13);
	earn(&w.guests[0].guest->tx, 10000);
	world_run(&w);
	CHECK_EQ(sent(0), 23);
	earn(&w.guests[0].guest->tx, 10000);
	world_run(&w);
	earn(&w.guests[0].guest->tx, 10000);
	world_run(&w);
	CHECK_EQ(sent(0), 40);
	CHECK_EQ(leave_all(&len), 30);
	for (uint32_t i = 0; i < XV_DROP_MAX; i++)
		CHECK_EQ(TX(0).drops[i], 0);
	CHECK_EQ(TX(0).bytes, 40000);
	world_free(&w);
}

/* It is published again: what was spent stays spent; with another limit, that one counts. */
static void test_tx_changes(void)
{
	const struct xv_policy_conf slow = {.tx = {1, 5000}}, slower = {.tx = {1, 2000}}, free = {.tx = {0, 0}};

	begin(&slow, NULL, FEATURES);
	offer(0, 40, 1000, nobody);
	world_run(&w);
	CHECK_EQ(sent(0), 5);
	publish();
	world_run(&w);
	CHECK_EQ(sent(0), 5);
	earn(&w.guests[0].guest->tx, 10000);
	w.policies[0] = &slower;
	publish();
	world_run(&w);
	CHECK_EQ(sent(0), 7);
	w.policies[0] = &free;
	publish();
	world_run(&w);
	CHECK_EQ(sent(0), 40);
	world_free(&w);
}

/* Whom a receiver without buffers makes wait does not pay for it. */
static void test_tx_pays_for_what_goes(void)
{
	const struct xv_policy_conf slow = {.tx = {1, 10000}};

	begin(&slow, NULL, FEATURES);
	w.guests[0].ring[1].vr->patience.left = 1ull << 40;
	w.guests[0].ring[1].vr->patience.at = cycles_now();
	post(1, 3);
	offer(0, 8, 1000, w.guests[1].mac);
	turns(50);
	CHECK_EQ(sent(0), 3);
	post(1, 20);
	turns(5);
	CHECK_EQ(sent(0), 8);
	CHECK_EQ(bucket_missing(w.guests[0].guest->tx.in_force->spent,
				bucket_earned(w.guests[0].guest->tx.in_force, cycles_now())), 8000);
	world_free(&w);
}

/* What was dropped because its receiver had no buffers for too long went: a flood to such a guest is limited, too. */
static void test_tx_pays_for_what_is_dropped(void)
{
	const struct xv_policy_conf slow = {.tx = {1, 10000}};

	begin(&slow, NULL, FEATURES);
	offer(0, 40, 1000, w.guests[1].mac);
	for (uint64_t until = cycles_now() + 20000 * w.dp->cycles_per_us; cycles_now() < until;)
		turns(1);
	CHECK_EQ(sent(0), 10);
	CHECK_EQ(RX(1).drops[XV_DROP_NO_BUFFERS], 10);
	world_free(&w);
}

/* A GSO frame counts with all of its bytes, and goes though it has more than the burst. */
static void send_gso(struct driver *d, const struct spec *s, const uint8_t *to, uint16_t size)
{
	struct virtio_net_hdr hdr = {.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .gso_size = size};
	uint8_t *buffer;

	build(&f, s, to, d->mac);
	hdr.gso_type = s->family == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
	hdr.csum_start = (uint16_t)f.transport;
	hdr.csum_offset = (uint16_t)f.field;
	buffer = ring_buffer(d, &d->ring[1], HEADER + f.len, 0);
	memset(buffer, 0, HEADER);
	memcpy(buffer, &hdr, sizeof(hdr));
	memcpy(buffer + HEADER, f.bytes, f.len);
}

static void test_tx_gso(void)
{
	const struct xv_policy_conf slow = {.tx = {1, 2000}};
	const struct spec s = {4, IPPROTO_TCP, 0, 0, 30000};
	uint32_t len;

	begin(&slow, NULL, GSO_FEATURES);
	send_gso(&w.guests[0], &s, nobody, 1400);
	offer(0, 1, 60, nobody);
	world_run(&w);
	CHECK_EQ(sent(0), 1);
	CHECK_EQ(leave_all(&len), 22);
	earn(&w.guests[0].guest->tx, 28000);
	world_run(&w);
	CHECK_EQ(sent(0), 1);
	earn(&w.guests[0].guest->tx, 100);
	world_run(&w);
	CHECK_EQ(sent(0), 2);
	world_free(&w);
}

/* To the guest: from another one, and from the NIC. What is over the limit is dropped, and costs the sender nothing. */
static void test_rx_drops(void)
{
	const struct xv_policy_conf slow = {.rx = {1, 5000}};
	uint32_t len;

	begin(&slow, &slow, FEATURES);
	post(0, 100);
	post(1, 100);
	offer(0, 20, 1000, w.guests[1].mac);
	world_run(&w);
	CHECK_EQ(sent(0), 20);
	CHECK_EQ(take_all(1, &len), 5);
	CHECK_EQ(RX(1).drops[XV_DROP_RATE], 15);
	make_frame(frame, 1000, w.guests[0].mac, nobody, 1);
	for (int i = 0; i < 20; i++)
		CHECK(nic_receive(&w.nic, frame, 1000));
	world_run(&w);
	CHECK_EQ(take_all(0, &len), 5);
	CHECK_EQ(RX(0).drops[XV_DROP_RATE], 15);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	earn(&w.guests[1].guest->rx, 1500);
	offer(2, 20, 1000, w.guests[1].mac);
	world_run(&w);
	CHECK_EQ(take_all(1, &len), 2);
	world_free(&w);
}

/* Frames that wait for buffers are not paid for until they are delivered, and not dropped for the limit meanwhile. */
static void test_rx_pays_for_what_comes(void)
{
	const struct xv_policy_conf slow = {.rx = {1, 8000}};
	uint32_t len;

	begin(&slow, NULL, FEATURES);
	post(0, 2);
	make_frame(frame, 1000, w.guests[0].mac, nobody, 1);
	for (int i = 0; i < 10; i++)
		CHECK(nic_receive(&w.nic, frame, 1000));
	turns(20);
	CHECK_EQ(take_all(0, &len), 2);
	CHECK_EQ(RX(0).drops[XV_DROP_RATE], 0);
	post(0, 20);
	world_run(&w);
	CHECK_EQ(take_all(0, &len), 6);
	CHECK_EQ(RX(0).drops[XV_DROP_RATE], 2);
	CHECK_EQ(w.nic.fill_p - w.nic.fill_c, FRAMES);
	world_free(&w);
}

/* Group frames are counted one by one, whoever they would reach; what is for one guest, and we in its name, are none. */
static void test_storm(void)
{
	const struct xv_policy_conf calm = {.storm = {1, 7}}, rarely = {.flags = XV_POLICY_SPOOF_CHECK, .storm = {1, 1}};
	uint32_t len;

	begin(&calm, NULL, FEATURES);
	post(1, 100);
	post(2, 100);
	offer(0, 20, 60, everyone);
	offer(0, 3, 60, w.guests[1].mac);
	offer(0, 10, 60, (uint8_t[]){0x33, 0x33, 0, 0, 0, 1});
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_STORM], 23);
	CHECK_EQ(take_all(1, &len), 10);
	CHECK_EQ(take_all(2, &len), 7);
	CHECK_EQ(leave_all(&len), 7);
	earn(&w.guests[0].guest->storm, 2);
	offer(0, 5, 60, everyone);
	world_run(&w);
	CHECK_EQ(TX(0).drops[XV_DROP_STORM], 26);
	w.policies[0] = &rarely;
	publish();
	offer(0, 3, 60, everyone);
	world_run(&w);
	leave_all(&len);
	for (int i = 0; i < 3; i++) {
		xv_guest_announce(w.guests[0].guest, w.guests[0].mac);
		world_run(&w);
		CHECK_EQ(leave_all(&len), 1);
	}
	world_free(&w);
}

/* ---- IP addresses ---- */

static const struct xv_ip addresses[] = {{{10, 1, 2, 3}, 4},
					 {{0x68, 0x75, 0x82, 0x8f, 0x9c, 0xa9, 0xb6, 0xc3, 0xd0, 0xdd, 0xea, 0xf7, 4, 0x11, 0x1e, 0x2b}, 6}};

static struct xv_policy_conf guarded(const struct xv_ip *list, uint32_t n)
{
	return (struct xv_policy_conf){.flags = XV_POLICY_SPOOF_CHECK | XV_POLICY_IP_CHECK, .addresses = (uintptr_t)list,
				       .nr_addresses = n};
}

static void send_in_pieces(struct driver *d, const uint8_t *data, uint32_t len, uint32_t step)
{
	struct ring *r = &d->ring[1];
	uint32_t total = HEADER + len, n = (total + step - 1) / step;
	uint64_t at = driver_alloc(d, total, 1), table = driver_alloc(d, 16ull * n, 16);
	struct vring_desc *descs = (void *)(d->memory + table);
	uint16_t head = r->next++ % r->num;

	memset(d->memory + at, 0, HEADER);
	memcpy(d->memory + at + HEADER, data, len);
	for (uint32_t i = 0; i < n; i++)
		descs[i] = (struct vring_desc){GPA + at + (uint64_t)i * step, MIN(step, total - i * step),
					       i + 1 < n ? VRING_DESC_F_NEXT : 0, (uint16_t)(i + 1)};
	ring_desc(r, head, GPA + table, 16 * n, VRING_DESC_F_INDIRECT, -1);
	ring_offer(r, head);
}

/* In any layout, and with headers that are longer than the first look: what passes arrives as it was. */
static void test_guard(void)
{
	static const struct spec specs[] = {{4, IPPROTO_UDP, 0, 0, 100}, {6, IPPROTO_TCP, 0, 0, 600}, {4, IPPROTO_TCP, 1, 40, 300},
					    {6, IPPROTO_UDP, 0, 160, 400}, {6, IPPROTO_UDP, 1, 64, 0}};
	static const uint32_t steps[] = {1, 7, 13, 64, 95, 96, 97, 108, 250, 1000, 5000};

	for (uint32_t s = 0; s < ARRAY_SIZE(specs); s++) {
		for (uint32_t i = 0; i < ARRAY_SIZE(steps); i++) {
			struct xv_policy_conf policy = guarded(addresses, 2);
			struct driver *d;
			uint32_t len = 0;

			begin(&policy, NULL, FEATURES);
			d = &w.guests[0];
			post(1, 4);
			build(&f, &specs[s], w.guests[1].mac, d->mac);
			if (f.len / steps[i] < 200)
				send_in_pieces(d, f.bytes, f.len, steps[i]);
			else
				send_in_pieces(d, f.bytes, f.len, 10);
			world_run(&w);
			CHECK_EQ(take_all(1, &len), 1);
			CHECK_EQ(len, f.len);
			CHECK(!memcmp(got, f.bytes, len));

			f.bytes[14 + 4 * specs[s].tags + (specs[s].family == 4 ? 15 : 23)] ^= 1; /* another's address */
			send_in_pieces(d, f.bytes, f.len, f.len / steps[i] < 200 ? steps[i] : 10);
			world_run(&w);
			CHECK_EQ(take_all(1, &len), 0);
			CHECK_EQ(TX(0).drops[XV_DROP_IP_SPOOFED], 1);
			world_free(&w);
		}
	}
}

/* A header that ends behind what may be looked at; and a guest without any address. */
static void test_guard_unseen(void)
{
	const struct spec s = {6, IPPROTO_UDP, 0, 208, 400};
	struct xv_policy_conf policy = guarded(addresses, 2), none = guarded(addresses, 0);
	uint32_t len;

	begin(&policy, &none, FEATURES);
	post(1, 4);
	build(&f, &s, w.guests[1].mac, w.guests[0].mac);
	send_in_pieces(&w.guests[0], f.bytes, f.len, 100);
	world_run(&w);
	CHECK_EQ(take_all(1, &len), 0);
	CHECK_EQ(TX(0).drops[XV_DROP_IP_SPOOFED], 1);
	offer(1, 1, 300, nobody); /* no IP */
	build(&f, &(struct spec){4, IPPROTO_TCP, 0, 0, 10}, nobody, w.guests[1].mac);
	driver_send(&w.guests[1], f.bytes, f.len);
	world_run(&w);
	CHECK_EQ(leave_all(&len), 1);
	CHECK_EQ(len, 300);
	CHECK_EQ(TX(1).drops[XV_DROP_IP_SPOOFED], 1);
	world_free(&w);
}

/* An access port's frame is judged with the tag that it got; its announcement passes. */
static void test_guard_access(void)
{
	struct xv_policy_conf policy = guarded(addresses, 2), other = {.access = 10};
	const struct spec plain = {4, IPPROTO_UDP, 0, 0, 200}, deep = {6, IPPROTO_UDP, 0, 160, 100};
	uint32_t len;

	policy.access = 10;
	begin(&policy, &other, FEATURES);
	CHECK(w.dp->snap->ports[2].judged); /* its frames may lose their tags, but not in its own memory */
	post(1, 8);
	for (int i = 0; i < 2; i++) {
		build(&f, i ? &deep : &plain, w.guests[1].mac, w.guests[0].mac);
		driver_send(&w.guests[0], f.bytes, f.len);
		world_run(&w);
		CHECK_EQ(take_all(1, &len), 1);
		CHECK_EQ(len, f.len);
		CHECK(!memcmp(got, f.bytes, len));
	}
	f.bytes[14 + 23] ^= 1;
	driver_send(&w.guests[0], f.bytes, f.len);
	xv_guest_announce(w.guests[0].guest, w.guests[0].mac);
	world_run(&w);
	CHECK_EQ(take_all(1, &len), 1);
	CHECK_EQ(got[12] << 8 | got[13], 0x8035);
	CHECK_EQ(TX(0).drops[XV_DROP_IP_SPOOFED], 1);
	CHECK_EQ(leave_all(&len), 1);
	CHECK_EQ(got[12] << 8 | got[13], 0x8100);
	world_free(&w);
}

/* A GSO frame is judged by the headers that were checked; they go on, and nothing is lost behind them. */
static void test_guard_gso(void)
{
	static const struct spec specs[] = {{4, IPPROTO_TCP, 0, 0, 5000}, {6, IPPROTO_TCP, 1, 16, 3999}};

	for (uint32_t i = 0; i < ARRAY_SIZE(specs); i++) {
		struct xv_policy_conf policy = guarded(addresses, 2);
		const uint32_t segments = (specs[i].payload + 1399) / 1400;
		uint32_t len, n = 0, payload = 0;

		begin(&policy, NULL, GSO_FEATURES);
		post(1, 20);
		send_gso(&w.guests[0], &specs[i], nobody, 1400);
		world_run(&w);
		while ((len = nic_send(&w.nic, got))) {
			const uint32_t header = f.transport + 20;

			CHECK(!memcmp(got + header, f.bytes + header + payload, len - header));
			payload += len - header;
			n++;
		}
		CHECK_EQ(n, segments);
		CHECK_EQ(payload, specs[i].payload);
		send_gso(&w.guests[0], &specs[i], nobody, 1400);
		w.guests[0].memory[w.guests[0].top - f.len + 14 + 4 * specs[i].tags + (specs[i].family == 4 ? 15 : 23)] ^= 1;
		world_run(&w);
		CHECK_EQ(leave_all(&len), 0);
		CHECK_EQ(TX(0).drops[XV_DROP_IP_SPOOFED], 1);
		world_free(&w);
	}
}

/* ---- learning ---- */

static const struct xv_policy_conf learns_3 = {.flags = XV_POLICY_SPOOF_CHECK, .learn = 3};

/* A frame from the guest with this last byte in its source, in VLAN `vlan`. */
static void send_from(uint32_t guest, uint8_t last, uint32_t vlan)
{
	const uint8_t source[6] = {2, 0, 0, 0, 1, last};

	make_frame(frame, 100, nobody, source, last);
	if (vlan) {
		frame[12] = 0x81;
		frame[13] = 0;
		put_be16(frame + 14, vlan);
	}
	driver_send(&w.guests[guest], frame, 100);
	world_run(&w);
}

static bool control_is_told(void)
{
	uint64_t n;

	return read(xv_dp_event_fd(w.dp), &n, sizeof(n)) == sizeof(n);
}

static void test_learning(void)
{
	const struct xv_policy_conf off = {.flags = XV_POLICY_SPOOF_CHECK}, learns_9 = {.flags = XV_POLICY_SPOOF_CHECK, .learn = 9};
	struct xv_learned out[8];
	uint32_t len;

	begin(&learns_3, NULL, FEATURES);
	CHECK(!control_is_told());
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 8), 0);
	for (uint8_t i = 1; i <= 5; i++) {
		send_from(0, i, i == 2 ? 7 : 0);
		CHECK_EQ(control_is_told(), i <= 3);
		CHECK_EQ(leave_all(&len), i <= 3);
	}
	CHECK_EQ(TX(0).drops[XV_DROP_SPOOFED], 2);
	send_from(0, 2, 0); /* in another VLAN it is another */
	CHECK_EQ(TX(0).drops[XV_DROP_SPOOFED], 3);
	send_from(0, 2, 7);
	CHECK_EQ(leave_all(&len), 1);
	offer(0, 1, 100, nobody); /* its own */
	world_run(&w);
	CHECK_EQ(leave_all(&len), 1);
	CHECK(!control_is_told());
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 2), 3);
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 8), 3);
	for (int i = 0; i < 3; i++) {
		CHECK(out[i].mac[0] == 2 && out[i].mac[5] >= 1 && out[i].mac[5] <= 3 && out[i].idle_ms < 60000);
		CHECK_EQ(out[i].vlan, out[i].mac[5] == 2 ? 7 : 0);
	}
	xv_guest_forget(w.guests[0].guest, (uint8_t[]){2, 0, 0, 0, 1, 2}, 7);
	send_from(0, 5, 0);
	CHECK(control_is_told());
	CHECK_EQ(leave_all(&len), 1);

	/* published again: kept; with more: kept, and more; with none: forgotten */
	publish();
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 8), 3);
	w.policies[0] = &learns_9;
	publish();
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 8), 3);
	send_from(0, 5, 0);
	send_from(0, 6, 0);
	CHECK_EQ(leave_all(&len), 2);
	w.policies[0] = &off;
	publish();
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 8), 0);
	send_from(0, 6, 0);
	CHECK_EQ(leave_all(&len), 0);
	w.policies[0] = &learns_9;
	publish();
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 8), 0);
	world_free(&w);
}

/* What is somebody's is not learned; nor is what is no address of a station. */
static void test_not_learned(void)
{
	struct xv_learned out[4];
	uint32_t len;

	begin(&learns_3, NULL, FEATURES);
	make_frame(frame, 100, nobody, w.guests[1].mac, 1);
	driver_send(&w.guests[0], frame, 100);
	make_frame(frame, 100, nobody, everyone, 1);
	driver_send(&w.guests[0], frame, 100);
	make_frame(frame, 100, nobody, (uint8_t[6]){0}, 1);
	driver_send(&w.guests[0], frame, 100);
	world_run(&w);
	CHECK_EQ(leave_all(&len), 0);
	CHECK_EQ(TX(0).drops[XV_DROP_SPOOFED], 3);
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 4), 0);
	CHECK(!control_is_told());

	/* learned, and then given to another guest: its no longer */
	send_from(1, 1, 0); /* guest 1 has no policy: it learns nothing, and may send anything */
	CHECK_EQ(leave_all(&len), 1);
	CHECK_EQ(xv_guest_learned(w.guests[1].guest, out, 4), 0);
	send_from(0, 77, 0);
	CHECK_EQ(leave_all(&len), 1);
	memcpy(w.guests[2].mac, (uint8_t[]){2, 0, 0, 0, 1, 77}, 6);
	publish();
	send_from(0, 77, 0);
	CHECK_EQ(leave_all(&len), 0);
	CHECK_EQ(TX(0).drops[XV_DROP_SPOOFED], 4);
	world_free(&w);
}

/* What control has given to the guest does not age while it is used; and without the check nothing is dropped. */
static void test_learned_stays_young(void)
{
	const struct xv_policy_conf lax = {.learn = 1};
	const uint8_t learned[6] = {2, 0, 0, 0, 1, 5};
	struct xv_learned out[4];
	uint32_t len;
	uint8_t first[6];
	uint64_t before;

	begin(&learns_3, NULL, FEATURES);
	send_from(0, 5, 0);
	memcpy(first, w.guests[0].mac, 6);
	memcpy(w.guests[0].mac, learned, 6); /* the harness publishes one address of a guest: now this one */
	publish();
	w.dp->snap->ports[0].mac = filter_word(first);
	w.guests[0].guest->cycles_per_us = 1; /* milliseconds of a thousand cycles */
	while (xv_guest_learned(w.guests[0].guest, out, 4) != 1 || out[0].idle_ms < 3000)
		;
	before = cycles_now();
	send_from(0, 5, 0);
	CHECK_EQ(leave_all(&len), 2);
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 4), 1);
	CHECK(out[0].idle_ms <= (cycles_now() - before) / 1000);
	memcpy(w.guests[0].mac, first, 6);
	w.policies[0] = &lax;
	publish();
	for (uint8_t i = 10; i < 15; i++)
		send_from(0, i, 0);
	CHECK_EQ(leave_all(&len), 5);
	world_free(&w);
}

/* A publication that fails leaves the guest as it was. */
static void test_failed_publication(void)
{
	struct xv_policy_conf policy = {.flags = XV_POLICY_SPOOF_CHECK, .learn = 5};
	struct xv_guest_conf guest = {.guest = (uintptr_t)NULL, .max_pairs = 1, .ctrl = XV_NO_RING, .policy = (uintptr_t)&policy};
	struct xv_mac_conf group = {.mac = {1}};
	struct xv_snapshot_conf conf = {.guests = (uintptr_t)&guest, .macs = (uintptr_t)&group, .nr_guests = 1, .nr_macs = 1};
	struct xv_learned out[4];

	begin(&learns_3, NULL, FEATURES);
	send_from(0, 1, 0);
	guest.guest = (uintptr_t)w.guests[0].guest;
	CHECK_EQ(xv_publish(w.dp, &conf), -EINVAL);
	policy.access = 5000;
	CHECK_EQ(xv_publish(w.dp, &conf), -EINVAL);
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 4), 1);
	send_from(0, 2, 0);
	CHECK_EQ(xv_guest_learned(w.guests[0].guest, out, 4), 2);
	world_free(&w);
}

/* ---- a worker that sleeps ---- */

static void *work(void *arg)
{
	CHECK_EQ(xv_worker_run(arg, 0), 0);
	return NULL;
}

/* It comes back in time, for a limit that is much less than what a tick of a millisecond allows. */
static void test_worker_comes_back(void)
{
	const struct xv_policy_conf limited = {.tx = {20000000, 10000}}; /* 500 us at once */
	const struct timespec ms = {.tv_nsec = 1000000};
	pthread_t thread;
	uint64_t started, us;

	begin(NULL, NULL, FEATURES);
	w.policies[0] = &limited;
	world_publish(&w);
	w.dp->conf.poll = XV_POLL_INTERRUPT;
	offer(0, 210, 1000, w.guests[0].mac); /* the uplink has 64 frames, and nobody sends them: dropped there */
	started = cycles_now();
	CHECK(!pthread_create(&thread, NULL, work, w.dp));
	while (load_acquire(&w.guests[0].ring[1].used->idx) < 210) {
		nanosleep(&ms, NULL);
		CHECK(cycles_now() - started < 5000000ull * w.dp->cycles_per_us);
	}
	us = (cycles_now() - started) / w.dp->cycles_per_us;
	xv_dp_stop(w.dp);
	CHECK(!pthread_join(thread, NULL));
	CHECK(us >= 9900); /* 200,000 bytes beyond the burst, less the last frame */
	CHECK(w.dp->workers[0].counters.sleeps > 10);
	w.dp->stopping = false;
	world_free(&w);
}

int main(void)
{
	test_tx_waits();
	test_tx_changes();
	test_tx_pays_for_what_goes();
	test_tx_pays_for_what_is_dropped();
	test_tx_gso();
	test_rx_drops();
	test_rx_pays_for_what_comes();
	test_storm();
	test_guard();
	test_guard_unseen();
	test_guard_access();
	test_guard_gso();
	test_learning();
	test_not_learned();
	test_learned_stays_young();
	test_failed_publication();
	test_worker_comes_back();
	puts("ok");
	return 0;
}
