// SPDX-License-Identifier: Apache-2.0
/* The hash: Microsoft's published test vectors, every hash type, fragments, extension headers, and hostile commands. */
#include <arpa/inet.h>

#include "../src/rss.h"
#include "harness.h"

static const uint8_t key[RSS_KEY_MAX] = {
	0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb,
	0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa};

static struct rss rss;

/* RSS_CONFIG's data: types, mask, unclassified queue, table (pair i for entry i, or 0 with `pairs` 1), pairs, key. */
static uint32_t make_config(uint8_t *to, uint32_t types, uint32_t entries, uint16_t unclassified, uint16_t pairs)
{
	uint8_t *p = to;
	uint16_t word;

	memcpy(p, &types, 4);
	word = (uint16_t)(entries - 1);
	memcpy(p + 4, &word, 2);
	memcpy(p + 6, &unclassified, 2);
	p += 8;
	for (uint32_t i = 0; i < entries; i++, p += 2) {
		word = (uint16_t)(i % pairs);
		memcpy(p, &word, 2);
	}
	memcpy(p, &pairs, 2);
	p[2] = sizeof(key);
	memcpy(p + 3, key, sizeof(key));
	return (uint32_t)(p - to) + 3 + (uint32_t)sizeof(key);
}

static void configure(uint32_t types)
{
	uint8_t data[512];
	uint16_t pairs;

	CHECK(rss_set(&rss, data, make_config(data, types, 4, 3, 4), true, 4, &pairs));
	CHECK_EQ(pairs, 4);
}

static uint32_t hash_of(uint8_t *frame, uint32_t len, uint16_t expected_report)
{
	struct xv_view view = {.first = {frame, len}, .len = len};
	uint32_t hash;
	uint16_t report;

	hash = rss_hash(&rss, &view, &report);
	CHECK_EQ(report, expected_report);
	/* the same, wherever the frame is cut in two */
	for (uint32_t cut = 1; cut < len; cut++) {
		struct xv_seg rest = {frame + cut, len - cut};
		struct xv_view pieces = {.first = {frame, cut}, .more = &rest, .nr_more = 1, .len = len};

		CHECK_EQ(rss_hash(&rss, &pieces, &report), hash);
		CHECK_EQ(report, expected_report);
	}
	return hash;
}

static uint32_t frame4(uint8_t *f, const char *from, const char *to, uint16_t sport, uint16_t dport, uint8_t protocol,
		       uint32_t options)
{
	uint32_t ip = 14, l4 = ip + 20 + options, len = l4 + 20;

	memset(f, 0, len);
	f[12] = 8;
	f[ip] = (uint8_t)(0x45 + options / 4);
	put_be16(f + ip + 2, len - ip);
	f[ip + 9] = protocol;
	CHECK_EQ(inet_pton(AF_INET, from, f + ip + 12), 1);
	CHECK_EQ(inet_pton(AF_INET, to, f + ip + 16), 1);
	put_be16(f + l4, sport);
	put_be16(f + l4 + 2, dport);
	return len;
}

/* IPv6 with `extra` bytes of extension headers, of which the first is `first`. */
static uint32_t frame6(uint8_t *f, const char *from, const char *to, uint16_t sport, uint16_t dport, uint8_t first,
		       const uint8_t *extension, uint32_t extra)
{
	uint32_t ip = 14, l4 = ip + 40 + extra, len = l4 + 20;

	memset(f, 0, len);
	f[12] = 0x86;
	f[13] = 0xdd;
	f[ip] = 0x60;
	put_be16(f + ip + 4, len - ip - 40);
	f[ip + 6] = first;
	CHECK_EQ(inet_pton(AF_INET6, from, f + ip + 8), 1);
	CHECK_EQ(inet_pton(AF_INET6, to, f + ip + 24), 1);
	if (extra)
		memcpy(f + ip + 40, extension, extra);
	put_be16(f + l4, sport);
	put_be16(f + l4 + 2, dport);
	return len;
}

static const struct vector {
	const char *from, *to;
	uint16_t sport, dport;
	uint32_t plain, with_ports;
} ipv4[] = {
	{"66.9.149.187", "161.142.100.80", 2794, 1766, 0x323e8fc2, 0x51ccc178},
	{"199.92.111.2", "65.69.140.83", 14230, 4739, 0xd718262a, 0xc626b0ea},
	{"24.19.198.95", "12.22.207.184", 12898, 38024, 0xd2d0a5de, 0x5c2b394a},
	{"38.27.205.30", "209.142.163.6", 48228, 2217, 0x82989176, 0xafc7327f},
	{"153.39.163.191", "202.188.127.2", 44251, 1303, 0x5d1809c5, 0x10e828a2},
}, ipv6[] = {
	{"3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", 2794, 1766, 0x2cc18cd5, 0x40207d3d},
	{"3ffe:501:8::260:97ff:fe40:efab", "ff02::1", 14230, 4739, 0x0f0c461c, 0xdde51bbf},
	{"3ffe:1900:4545:3:200:f8ff:fe21:67cf", "fe80::200:f8ff:fe21:67cf", 44251, 38024, 0x4b61e985, 0x02d1feef},
};

/* "Verifying the RSS hash calculation", Windows network driver documentation */
static void test_published_vectors(void)
{
	uint8_t f[256];

	for (uint32_t i = 0; i < ARRAY_SIZE(ipv4); i++) {
		const struct vector *v = &ipv4[i];
		uint32_t len = frame4(f, v->from, v->to, v->sport, v->dport, IPPROTO_TCP, 0);

		configure(VIRTIO_NET_RSS_HASH_TYPE_IPv4);
		CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_IPv4), v->plain);
		configure(RSS_TYPES);
		CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_TCPv4), v->with_ports);
		len = frame4(f, v->from, v->to, v->sport, v->dport, IPPROTO_UDP, 40);
		CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_UDPv4), v->with_ports);
	}
	for (uint32_t i = 0; i < ARRAY_SIZE(ipv6); i++) {
		const struct vector *v = &ipv6[i];
		uint32_t len = frame6(f, v->from, v->to, v->sport, v->dport, IPPROTO_TCP, NULL, 0);

		configure(VIRTIO_NET_RSS_HASH_TYPE_IPv6);
		CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_IPv6), v->plain);
		configure(RSS_TYPES);
		CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_TCPv6), v->with_ports);
		len = frame6(f, v->from, v->to, v->sport, v->dport, IPPROTO_UDP, NULL, 0);
		CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_UDPv6), v->with_ports);
	}
}

static void test_vlan_tags(void)
{
	uint8_t plain[256], f[264];
	uint32_t len = frame4(plain, ipv4[0].from, ipv4[0].to, ipv4[0].sport, ipv4[0].dport, IPPROTO_TCP, 0);

	configure(RSS_TYPES);
	memcpy(f, plain, 12);
	memcpy(f + 12, (uint8_t[]){0x88, 0xa8, 0, 5, 0x81, 0, 0, 7}, 8);
	memcpy(f + 20, plain + 12, len - 12);
	CHECK_EQ(hash_of(f, len + 8, VIRTIO_NET_HASH_REPORT_TCPv4), ipv4[0].with_ports);
}

/* Fragments have no ports: all of one datagram go to one queue. */
static void test_fragments(void)
{
	const struct vector *v = &ipv4[1];
	uint8_t f[256];
	uint32_t len = frame4(f, v->from, v->to, v->sport, v->dport, IPPROTO_UDP, 0);

	configure(RSS_TYPES);
	f[20] = 0x20; /* more fragments */
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_IPv4), v->plain);
	f[20] = 0x00;
	f[21] = 0x10;
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_IPv4), v->plain);
	f[20] = 0x40; /* "don't fragment" is none */
	f[21] = 0;
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_UDPv4), v->with_ports);
	configure(RSS_TYPES & ~(uint32_t)VIRTIO_NET_RSS_HASH_TYPE_IPv4);
	f[20] = 0x20;
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_NONE), 0);

	v = &ipv6[0];
	configure(RSS_TYPES);
	len = frame6(f, v->from, v->to, v->sport, v->dport, IPPROTO_FRAGMENT, (uint8_t[]){IPPROTO_TCP, 0, 0, 1, 0, 0, 0, 0}, 8);
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_IPv6_EX), v->plain);
	/* an "atomic fragment" is whole */
	len = frame6(f, v->from, v->to, v->sport, v->dport, IPPROTO_FRAGMENT, (uint8_t[]){IPPROTO_TCP, 0, 0, 0, 0, 0, 0, 9}, 8);
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_TCPv6_EX), v->with_ports);
}

/* Mobile IPv6: the hash is of the home address and of the final destination, so that a flow keeps its queue. */
static void test_extension_headers(void)
{
	const uint32_t plain_types = VIRTIO_NET_RSS_HASH_TYPE_IPv6 | VIRTIO_NET_RSS_HASH_TYPE_TCPv6;
	const struct vector *v = &ipv6[2];
	uint8_t ext[24 + 24] = {IPPROTO_DSTOPTS, 2, 2, 1}, f[256];
	uint32_t len;

	/* a type 2 routing header, then destination options: PadN of two bytes, home address */
	CHECK_EQ(inet_pton(AF_INET6, v->to, ext + 8), 1);
	memcpy(ext + 24, (uint8_t[]){IPPROTO_TCP, 2, 1, 2, 0, 0, 0xc9, 16}, 8);
	CHECK_EQ(inet_pton(AF_INET6, v->from, ext + 32), 1);
	len = frame6(f, "2001:db8::1", "2001:db8::2", v->sport, v->dport, IPPROTO_ROUTING, ext, sizeof(ext));
	configure(RSS_TYPES);
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_TCPv6_EX), v->with_ports);
	configure(VIRTIO_NET_RSS_HASH_TYPE_IP_EX);
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_IPv6_EX), v->plain);

	/* the guest did not ask for _EX: as if the extension headers were not there (virtio 1.2, 5.1.6.4.3.4) */
	configure(plain_types);
	memset(ext, 0, 24);
	memcpy(ext, (uint8_t[]){IPPROTO_TCP, 0, 1, 4}, 4);
	len = frame6(f, v->from, v->to, v->sport, v->dport, IPPROTO_HOPOPTS, ext, 8);
	CHECK_EQ(hash_of(f, len, VIRTIO_NET_HASH_REPORT_TCPv6), v->with_ports);
}

static void test_unclassified(void)
{
	static const uint8_t arp[60] = {[12] = 8, [13] = 6};
	uint8_t f[60];

	memcpy(f, arp, sizeof(f));
	configure(RSS_TYPES);
	CHECK_EQ(hash_of(f, sizeof(f), VIRTIO_NET_HASH_REPORT_NONE), 0);
	CHECK_EQ(rss_pair(&rss, 0, VIRTIO_NET_HASH_REPORT_NONE), 3);
	CHECK_EQ(rss_pair(&rss, 6, VIRTIO_NET_HASH_REPORT_IPv4), 2);
	/* no frame is too short to look at, whatever it claims to be */
	for (uint32_t len = 14; len < 60; len++) {
		uint8_t *exact = malloc(len);
		struct xv_view view = {.first = {exact, len}, .len = len};
		uint16_t report;

		for (int kind = 0; kind < 4; kind++) {
			memset(exact, 0xff, len);
			memcpy(exact + 12, (uint8_t[4][2]){{8, 0}, {0x86, 0xdd}, {0x81, 0}, {0x88, 0xa8}}[kind], 2);
			if (len > 20)
				exact[14] = kind ? 0x60 : 0x4f;
			if (len > 20 && kind)
				exact[20] = IPPROTO_DSTOPTS;
			rss_hash(&rss, &view, &report);
		}
		free(exact);
	}
}

static void test_config(void)
{
	uint8_t data[512];
	uint16_t pairs;
	uint32_t len;

	len = make_config(data, RSS_TYPES, RSS_TABLE_MAX, 0, 8);
	CHECK(rss_set(&rss, data, len, true, 8, &pairs));
	CHECK(!rss_set(&rss, data, len, true, 7, &pairs)); /* the table names pair 7 */
	for (uint32_t i = 0; i < len; i++)
		CHECK(!rss_set(&rss, data, i, true, 8, &pairs));
	CHECK(!rss_set(&rss, data, len + 1, true, 8, &pairs));
	CHECK(!rss_set(&rss, data, make_config(data, 1u << 9, 4, 0, 1), true, 1, &pairs)); /* no such type */
	CHECK(!rss_set(&rss, data, make_config(data, 1, 3, 0, 1), true, 1, &pairs));
	CHECK(!rss_set(&rss, data, make_config(data, 1, 4, 1, 1), true, 1, &pairs)); /* no such pair */
	make_config(data, 1, 128, 0, 1);
	data[4] = data[5] = 0xff; /* a mask of 65535 */
	CHECK(!rss_set(&rss, data, sizeof(data), true, 1, &pairs));

	/* a shorter key counts as one with zeros behind it */
	len = make_config(data, VIRTIO_NET_RSS_HASH_TYPE_IPv4, 1, 0, 1);
	data[len - 41] = 0;
	CHECK(rss_set(&rss, data, len - 40, true, 1, &pairs));
	len = frame4(data, ipv4[0].from, ipv4[0].to, 1, 2, IPPROTO_TCP, 0);
	CHECK_EQ(hash_of(data, len, VIRTIO_NET_HASH_REPORT_IPv4), 0);

	/* HASH_CONFIG: types, four reserved words, key */
	memset(data, 0, sizeof(data));
	data[0] = VIRTIO_NET_RSS_HASH_TYPE_TCPv4;
	data[12] = sizeof(key);
	memcpy(data + 13, key, sizeof(key));
	CHECK(rss_set(&rss, data, 13 + sizeof(key), false, 1, &pairs));
	CHECK(!rss.steer);
	len = frame4(data, ipv4[0].from, ipv4[0].to, ipv4[0].sport, ipv4[0].dport, IPPROTO_TCP, 0);
	CHECK_EQ(hash_of(data, len, VIRTIO_NET_HASH_REPORT_TCPv4), ipv4[0].with_ports);

	rss_reset(&rss);
	CHECK_EQ(hash_of(data, len, VIRTIO_NET_HASH_REPORT_NONE), 0);
}

int main(void)
{
	test_published_vectors();
	test_vlan_tags();
	test_fragments();
	test_extension_headers();
	test_unclassified();
	test_config();
	puts("ok");
	return 0;
}
