// SPDX-License-Identifier: Apache-2.0
/*
 * What a guest may say, frame by frame: those that Linux sends (recorded on a veth) pass, those that speak for somebody else
 * do not. Each case is judged again behind tags and behind LLC/SNAP headers, by fewer of its bytes, and cut off.
 */
#include "../src/ipguard.h"

#include <stdio.h>
#include <stdlib.h>

#define OWN "525400000002"
#define OTHER "525400000001"
#define ALL "ffffffffffff"
#define ALL6 "333300000001"

#define ARP(type, head, operation, mac, ip) ALL OWN type head operation mac ip "000000000000" "0a000001"
#define ARP4 "0001" "0800" "06" "04"

#define MINE4 "0a000002"
#define NONE4 "00000000"
#define IP4(protocol, fragment, from, payload) ALL OWN "0800" "4500" "0054" "2663" fragment "40" protocol "0000" from "0a000001" payload
#define UDP(from, to) from to "0010" "0000" "0001020304050607"
#define TCP "d4310050" "00000001" "00000000" "5002ffff" "00000000"

#define NONE6 "00000000000000000000000000000000"
#define MINE6 "fd000000000000000000000000000002"
#define LINK6 "fe80000000000000505400fffe000002"   /* by its MAC */
#define LISTED6 "fe800000000000000000000000001234" /* configured */
#define OTHER6 "fd000000000000000000000000000001"
#define OTHERLINK6 "fe80000000000000505400fffe000001"
#define NODES6 "ff020000000000000000000000000001"
#define IP6(len, next, from, payload) ALL6 OWN "86dd" "60000000" len next "ff" from NODES6 payload
#define ICMP6(type) type "000000"
#define SLLA(mac) "0101" mac
#define TLLA(mac) "0201" mac
#define NONCE "0e01" "cf4ea0f09b32"
#define NS(target) ICMP6("87") "00000000" target
#define NA(target) ICMP6("88") "60000000" target
#define RS ICMP6("85") "00000000"
#define RA ICMP6("86") "40000708" "0000000000000000"
#define FRAGMENT(next, where) next "00" where "00000001"
#define OPTIONS(next, units) next units "010400000000"
#define ZEROS8 "0000000000000000"
#define ZEROS64 ZEROS8 ZEROS8 ZEROS8 ZEROS8 ZEROS8 ZEROS8 ZEROS8 ZEROS8

static const struct example {
	const char *what, *frame;
	bool passes;
} examples[] = {
	/* ---- recorded: a veth with 10.0.0.2 and fd00::2 comes up, is pinged and pings ---- */
	{"MLDv2 report before there is an address",
	 "33330000001652540000000286dd600000000024000100000000000000000000000000000000ff020000000000000000000000000016"
	 "3a000502000001008f006f880000000104000000ff0200000000000000000001ff000002", true},
	{"DAD of the link-local address",
	 "3333ff00000252540000000286dd6000000000203aff00000000000000000000000000000000ff0200000000000000000001ff000002"
	 "8700135400000000fe80000000000000505400fffe0000020e01cf4ea0f09b32", true},
	{"DAD of its address",
	 "3333ff00000252540000000286dd6000000000203aff00000000000000000000000000000000ff0200000000000000000001ff000002"
	 "8700c6b400000000fd0000000000000000000000000000020e01085b70373053", true},
	{"MLDv2 report",
	 "33330000001652540000000286dd6000000000240001fe80000000000000505400fffe000002ff020000000000000000000000000016"
	 "3a000502000001008f0021b10000000104000000ff0200000000000000000001ff000002", true},
	{"router solicitation",
	 "33330000000252540000000286dd6000000000103afffe80000000000000505400fffe000002ff020000000000000000000000000002"
	 "8500da81000000000101525400000002", true},
	{"ARP request", "ffffffffffff525400000002080600010800060400015254000000020a0000020000000000000a000001", true},
	{"ARP reply", "525400000001525400000002080600010800060400025254000000020a0000025254000000010a000001", true},
	{"ping",
	 "52540000000152540000000208004500005426634000400100440a0000020a0000010800865e002500012be2036b00000000815b0200"
	 "00000000101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637", true},
	{"neighbour solicitation",
	 "3333ff00000152540000000286dd6000000000203afffd000000000000000000000000000002ff0200000000000000000001ff000001"
	 "87002d4300000000fd0000000000000000000000000000010101525400000002", true},
	{"neighbour advertisement",
	 "52540000000152540000000286dd6000000000203afffd000000000000000000000000000002fd000000000000000000000000000001"
	 "8800cc4560000000fd0000000000000000000000000000020201525400000002", true},
	{"ping by IPv6",
	 "52540000000152540000000286dd60062dbc00403a40fd000000000000000000000000000002fd000000000000000000000000000001"
	 "800009c4002600012be2036b000000008b75020000000000101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d"
	 "2e2f3031323334353637", true},

	/* ---- ARP and RARP ---- */
	{"its other address", ARP("0806", ARP4, "0001", OWN, "0a000009"), true},
	{"an address below all", ARP("0806", ARP4, "0001", OWN, "0a000001"), false},
	{"an address between", ARP("0806", ARP4, "0001", OWN, "0a000005"), false},
	{"an address above all", ARP("0806", ARP4, "0002", OWN, "0b000002"), false},
	{"a probe", ARP("0806", ARP4, "0001", OWN, NONE4), true},
	{"a reply from no address", ARP("0806", ARP4, "0002", OWN, NONE4), false},
	{"another's MAC", ARP("0806", ARP4, "0001", OTHER, MINE4), false},
	{"a probe of another's MAC", ARP("0806", ARP4, "0001", OTHER, NONE4), false},
	{"by IEEE 802", ARP("0806", "0006" "0800" "06" "04", "0001", OWN, MINE4), true},
	{"other hardware", ARP("0806", "0007" "0800" "06" "04", "0001", OWN, MINE4), false},
	{"another protocol", ARP("0806", "0001" "86dd" "06" "04", "0001", OWN, MINE4), false},
	{"odd lengths", ARP("0806", "0001" "0800" "05" "04", "0001", OWN, MINE4), false},
	{"inverse ARP", ARP("0806", ARP4, "0009", OWN, MINE4), false},
	{"an announcement by RARP", ARP("8035", ARP4, "0003", OWN, NONE4), true},
	{"another's announcement by RARP", ARP("8035", ARP4, "0003", OTHER, NONE4), false},
	{"RARP from another's address", ARP("8035", ARP4, "0003", OWN, "0a000005"), false},
	{"a RARP server", ARP("8035", ARP4, "0004", OWN, MINE4), false},

	/* ---- IPv4 ---- */
	{"TCP", IP4("06", "4000", MINE4, TCP), true},
	{"TCP from another's address", IP4("06", "4000", "0a000005", TCP), false},
	{"TCP from no address", IP4("06", "0000", NONE4, TCP), false},
	{"TCP from everyone", IP4("06", "0000", "ffffffff", TCP), false},
	{"version 6 by the wrong type", ALL OWN "0800" "65000028" "00000000" "40060000" MINE4 "0a000001" TCP, false},
	{"a header of 16 bytes", ALL OWN "0800" "44000028" "00000000" "40060000" MINE4 "0a000001" TCP, false},
	{"UDP", IP4("11", "0000", MINE4, UDP("d431", "0035")), true},
	{"UDP behind options",
	 ALL OWN "0800" "46000028" "00000000" "40110000" MINE4 "0a000001" "01010101" UDP("d431", "0035"), true},
	{"a DHCP client", IP4("11", "0000", NONE4, UDP("0044", "0043")), true},
	{"a DHCP client with its address", IP4("11", "0000", MINE4, UDP("0044", "0043")), true},
	{"a DHCP client with another's", IP4("11", "0000", "0a000005", UDP("0044", "0043")), false},
	{"a DHCP client in a fragment", IP4("11", "2000", NONE4, UDP("0044", "0043")), false},
	{"other UDP from no address", IP4("11", "0000", NONE4, UDP("0044", "0035")), false},
	{"a DHCP server", IP4("11", "0000", MINE4, UDP("0043", "0044")), false},
	{"a DHCP server to a relay", IP4("11", "0000", MINE4, UDP("0043", "0043")), false},
	{"a DHCP server by another port", IP4("11", "0000", MINE4, UDP("d431", "0044")), false},
	{"a DHCP server behind options",
	 ALL OWN "0800" "46000028" "00000000" "40110000" MINE4 "0a000001" "01010101" UDP("0043", "0044"), false},
	{"a DHCP server's first fragment", IP4("11", "2000", MINE4, UDP("0043", "0044")), false},
	{"a first fragment", IP4("11", "2000", MINE4, UDP("d431", "0035")), true},
	{"a later fragment", IP4("11", "2001", MINE4, UDP("0043", "0044")), true},
	{"a last fragment", IP4("11", "0001", MINE4, UDP("0043", "0044")), true},
	{"another's later fragment", IP4("11", "0001", "0a000005", UDP("d431", "0035")), false},
	{"a later fragment from no address", IP4("11", "0001", NONE4, UDP("0044", "0043")), false},
	{"UDP of no more than two bytes", IP4("11", "0000", MINE4, "d431"), false},

	/* ---- IPv6 ---- */
	{"TCP by IPv6", IP6("0014", "06", MINE6, TCP), true},
	{"TCP from the link-local address", IP6("0014", "06", LINK6, TCP), true},
	{"TCP from a listed link-local address", IP6("0014", "06", LISTED6, TCP), true},
	{"TCP from another's address by IPv6", IP6("0014", "06", OTHER6, TCP), false},
	{"TCP from another's link-local address", IP6("0014", "06", OTHERLINK6, TCP), false},
	{"its interface identifier elsewhere", IP6("0014", "06", "fd80000000000000505400fffe000002", TCP), false},
	{"not quite its interface identifier", IP6("0014", "06", "fe80000000000000525400fffe000002", TCP), false},
	{"TCP from no address by IPv6", IP6("0014", "06", NONE6, TCP), false},
	{"from a group", IP6("0014", "06", NODES6, TCP), false},
	{"version 4 by the wrong type", ALL6 OWN "86dd" "40000000" "0014" "06ff" MINE6 NODES6 TCP, false},
	{"UDP by IPv6", IP6("0010", "11", MINE6, UDP("d431", "0035")), true},
	{"UDP from no address by IPv6", IP6("0010", "11", NONE6, UDP("d431", "0035")), false},
	{"a DHCPv6 client", IP6("0010", "11", LINK6, UDP("0222", "0223")), true},
	{"a DHCPv6 client without an address", IP6("0010", "11", NONE6, UDP("0222", "0223")), true},
	{"a DHCPv6 client's fragment without an address", IP6("0018", "2c", NONE6, FRAGMENT("11", "0001") UDP("0222", "0223")), false},
	{"a DHCPv6 server", IP6("0010", "11", LINK6, UDP("0223", "0222")), false},
	{"a DHCPv6 relay", IP6("0010", "11", MINE6, UDP("0223", "0223")), false},
	{"a DHCPv6 server by another port", IP6("0010", "11", MINE6, UDP("d431", "0222")), false},
	{"a DHCPv6 server's first fragment", IP6("0018", "2c", LINK6, FRAGMENT("11", "0001") UDP("0223", "0222")), false},
	{"a DHCPv6 server behind options", IP6("0018", "3c", LINK6, OPTIONS("11", "00") UDP("0223", "0222")), false},
	{"a first fragment by IPv6", IP6("0018", "2c", MINE6, FRAGMENT("11", "0001") UDP("d431", "0035")), true},
	{"a later fragment by IPv6", IP6("0018", "2c", MINE6, FRAGMENT("11", "0100") UDP("0223", "0222")), true},
	{"a later fragment of ND", IP6("0020", "2c", LINK6, FRAGMENT("3a", "0020") ICMP6("86") ZEROS8 ZEROS8), true},
	{"a later fragment of another's", IP6("0018", "2c", OTHER6, FRAGMENT("11", "0100") UDP("d431", "0035")), false},
	{"a later fragment from no address by IPv6", IP6("0018", "2c", NONE6, FRAGMENT("11", "0100") UDP("0222", "0223")), false},
	{"encrypted", IP6("0010", "32", MINE6, "00000001" "00000001" ZEROS8), true},
	{"no next header", IP6("0000", "3b", MINE6, ""), true},
	{"another header than there is", IP6("0018", "2c", MINE6, FRAGMENT("3c", "0000")), false},

	/* ---- ICMPv6 ---- */
	{"an echo from another's address", IP6("0008", "3a", OTHER6, ICMP6("80") "00000000"), false},
	{"an echo from no address", IP6("0008", "3a", NONE6, ICMP6("80") "00000000"), false},
	{"an ICMPv6 type that is not there", IP6("0000", "3a", MINE6, ""), false},
	{"a router solicitation from no address", IP6("0008", "3a", NONE6, RS), true},
	{"a router solicitation from no address with a MAC", IP6("0010", "3a", NONE6, RS SLLA(OWN)), false},
	{"a router solicitation for another", IP6("0010", "3a", LINK6, RS SLLA(OTHER)), false},
	{"a router solicitation from another's address", IP6("0010", "3a", OTHERLINK6, RS SLLA(OWN)), false},
	{"a router", IP6("0010", "3a", LINK6, RA), false},
	{"a router from no address", IP6("0010", "3a", NONE6, RA), false},
	{"a router behind options", IP6("0018", "00", LINK6, OPTIONS("3a", "00") RA), false},
	{"a router behind options and routing", IP6("0020", "3c", LINK6, OPTIONS("2b", "00") OPTIONS("3a", "00") RA), false},
	{"a router behind other headers", IP6("0028", "87", LINK6, OPTIONS("8b", "00") OPTIONS("8c", "00") OPTIONS("3a", "00") RA), false},
	{"a router behind an authentication header", IP6("001c", "33", LINK6, "3a010000" "00000001" "00000001" RA), false},
	{"a router behind a long header", IP6("0058", "3c", LINK6, OPTIONS("3a", "08") ZEROS64 RA), false},
	{"a router behind what cannot be seen", IP6("00e8", "3c", LINK6, OPTIONS("3a", "1a") ZEROS64 ZEROS64 ZEROS64 ZEROS8 ZEROS8 RA), false},
	{"an echo behind what cannot be seen",
	 IP6("00e0", "3c", LINK6, OPTIONS("3a", "1a") ZEROS64 ZEROS64 ZEROS64 ZEROS8 ZEROS8 ICMP6("80") "00000000"), false},
	{"a router in one fragment", IP6("0018", "2c", LINK6, FRAGMENT("3a", "0000") RA), false},
	{"a router's first fragment", IP6("0018", "2c", LINK6, FRAGMENT("3a", "0001") RA), false},
	{"a first fragment that ends before its last header", IP6("0010", "2c", LINK6, FRAGMENT("3c", "0001") OPTIONS("3a", "01")), false},
	{"a redirect", IP6("0028", "3a", LINK6, ICMP6("89") "00000000" OTHER6 OTHER6), false},
	{"a solicitation in one fragment", IP6("0028", "2c", MINE6, FRAGMENT("3a", "0000") NS(OTHER6) SLLA(OWN)), false},
	{"a solicitation with another's MAC", IP6("0020", "3a", MINE6, NS(OTHER6) SLLA(OTHER)), false},
	{"a solicitation with another's MAC second", IP6("0028", "3a", MINE6, NS(OTHER6) NONCE SLLA(OTHER)), false},
	{"a solicitation with two MACs", IP6("0028", "3a", MINE6, NS(OTHER6) SLLA(OWN) SLLA(OTHER)), false},
	{"a solicitation from another's address", IP6("0020", "3a", OTHER6, NS(MINE6) SLLA(OWN)), false},
	{"a solicitation without options", IP6("0018", "3a", MINE6, NS(OTHER6)), true},
	{"a solicitation that says no target", IP6("0010", "3a", MINE6, ICMP6("87") "00000000" ZEROS8), false},
	{"an option of no length", IP6("0020", "3a", MINE6, NS(OTHER6) "0100" OWN), false},
	{"an option longer than the packet", IP6("0020", "3a", MINE6, NS(OTHER6) "0102" OWN), false},
	{"another option longer than the packet", IP6("0020", "3a", MINE6, NS(OTHER6) "0e02" OWN), false},
	{"a byte of an option", IP6("0019", "3a", MINE6, NS(OTHER6) "0e"), false},
	{"half an option", IP6("001c", "3a", MINE6, NS(OTHER6) "01015254"), false},
	{"a long option with a MAC", IP6("0028", "3a", MINE6, NS(OTHER6) "0102" OWN ZEROS8), false},
	{"less packet than its header says", IP6("0028", "3a", MINE6, NS(OTHER6) SLLA(OWN)), false},
	{"padding that looks like an option", IP6("0018", "3a", MINE6, NS(OTHER6) SLLA(OTHER)), true},
	{"DAD of a listed link-local address", IP6("0018", "3a", NONE6, NS(LISTED6)), true},
	{"DAD of another's address", IP6("0018", "3a", NONE6, NS(OTHER6)), false},
	{"DAD of another's link-local address", IP6("0018", "3a", NONE6, NS(OTHERLINK6)), false},
	{"DAD with a MAC", IP6("0020", "3a", NONE6, NS(MINE6) SLLA(OWN)), false},
	{"an advertisement of the link-local address", IP6("0020", "3a", MINE6, NA(LINK6) TLLA(OWN)), true},
	{"an advertisement without options", IP6("0018", "3a", MINE6, NA(MINE6)), true},
	{"an advertisement of another's address", IP6("0020", "3a", MINE6, NA(OTHER6) TLLA(OWN)), false},
	{"an advertisement with another's MAC", IP6("0020", "3a", MINE6, NA(MINE6) TLLA(OTHER)), false},
	{"an advertisement from another's address", IP6("0020", "3a", OTHER6, NA(MINE6) TLLA(OWN)), false},
	{"an advertisement from no address", IP6("0020", "3a", NONE6, NA(MINE6) TLLA(OWN)), false},
	{"an advertisement from no address without options", IP6("0018", "3a", NONE6, NA(MINE6)), false},
	{"an advertisement behind options", IP6("0028", "3c", MINE6, OPTIONS("3a", "00") NA(OTHER6) TLLA(OWN)), false},
	{"an MLDv1 report from no address", IP6("0020", "00", NONE6, OPTIONS("3a", "00") ICMP6("83") "00000000" NODES6), true},
	{"an MLDv1 done from no address", IP6("0020", "00", NONE6, OPTIONS("3a", "00") ICMP6("84") "00000000" NODES6), true},
	{"an MLD query from no address", IP6("0020", "00", NONE6, OPTIONS("3a", "00") ICMP6("82") "00000000" NODES6), false},

	/* ---- what is not IP ---- */
	{"local experimental", ALL OWN "88b5" ZEROS64, true},
	{"LLDP", "0180c200000e" OWN "88cc" ZEROS64, true},
	{"no payload", ALL OWN "88b5", true},
};

/* What may stand before an Ethernet type without hiding it. */
static const char *const disguises[] = {
	"", "81000005", "88a80005" "81000006", "8100000081000000" "81000000", "9100000a",
	"0040" "aaaa03" "000000", "81000005" "05dc" "aaaa03" "0000f8", "0008" "abab03" "000000" "81000005",
};

/* Behind a length, and not IP; and what must not pass there. */
static const struct example plain[] = {
	{"a spanning tree", "0180c2000000" OWN "0026" "424203" ZEROS64, true},
	{"SNAP of a maker's own", ALL OWN "0026" "aaaa03" "00000c" "2000" ZEROS64, true},
	{"IP by LLC", ALL OWN "0026" "060603" "45000028" ZEROS64, false},
	{"ARP by LLC", ALL OWN "0026" "989803" ARP4 ZEROS64, false},
	{"SNAP in SNAP", ALL OWN "0026" "aaaa03" "000000" "0026" "aaaa03" "000000" "0800" "45000028" "00000000" "40060000" MINE4
	 "0a000001" TCP, false},
	{"a length, and no more", ALL OWN "0026" "aa", false},
	{"a tag, and no more", ALL OWN "8100", false},
	{"SNAP cut off", ALL OWN "0026" "aaaa03" "000000", false},
};

static struct ip_guard *guard;

static uint32_t from_hex(const char *hex, uint8_t *out)
{
	uint32_t n = 0;

	for (; hex[2 * n]; n++) {
		unsigned int byte;

		if (sscanf(hex + 2 * n, "%2x", &byte) != 1)
			exit(2);
		out[n] = (uint8_t)byte;
	}
	return n;
}

/* By a copy of exactly `have` bytes, so that a look behind them is seen. */
static enum ip_verdict judge(const uint8_t *frame, uint32_t have, uint32_t len)
{
	uint8_t *copy = malloc(have);
	enum ip_verdict result;

	memcpy(copy, frame, have);
	result = ip_guard_judge(guard, copy, have, len);
	free(copy);
	return result;
}

static void fail(const char *what, const char *disguise, uint32_t have, uint32_t len, enum ip_verdict got)
{
	fprintf(stderr, "%s%s%s: %u of %u bytes: verdict %u\n", what, *disguise ? " behind " : "", disguise, have, len, got);
	exit(1);
}

static void check(const struct example *example, const char *disguise, const uint8_t *frame, uint32_t len)
{
	const enum ip_verdict want = example->passes ? IP_PASSES : IP_DROPPED;
	const uint32_t most = len < IP_GUARD_BYTES ? len : IP_GUARD_BYTES;
	enum ip_verdict got = judge(frame, most, len);

	/* behind what cannot be seen, dropped by whoever asked */
	if (got != want && !(got == IP_UNSEEN && want == IP_DROPPED && len > IP_GUARD_BYTES))
		fail(example->what, disguise, most, len, got);
	for (uint32_t have = 14; have < most; have++) {
		const enum ip_verdict early = judge(frame, have, len), cut = judge(frame, have, have);

		if (early != got && early != IP_UNSEEN) /* fewer bytes say less, but nothing else */
			fail(example->what, disguise, have, len, early);
		if (cut == IP_UNSEEN || (cut == IP_PASSES && want == IP_DROPPED))
			fail(example->what, disguise, have, have, cut);
	}
}

static void test_examples(void)
{
	uint8_t frame[1024], hidden[1024];

	for (uint32_t i = 0; i < ARRAY_SIZE(examples); i++) {
		const uint32_t len = from_hex(examples[i].frame, frame);

		for (uint32_t d = 0; d < ARRAY_SIZE(disguises); d++) {
			uint32_t more = from_hex(disguises[d], hidden + 12);

			memcpy(hidden, frame, 12);
			memcpy(hidden + 12 + more, frame + 12, len - 12);
			check(&examples[i], disguises[d], hidden, len + more);
		}
	}
	for (uint32_t i = 0; i < ARRAY_SIZE(plain); i++)
		check(&plain[i], "", frame, from_hex(plain[i].frame, frame));
}

/* As many tags as there are bytes to look at, and what is behind them. */
static void test_tags_without_end(void)
{
	uint8_t frame[400];

	from_hex(ALL OWN, frame);
	for (uint32_t at = 12; at < sizeof(frame); at += 4)
		from_hex("81000005", frame + at);
	if (judge(frame, IP_GUARD_BYTES, sizeof(frame)) != IP_UNSEEN || judge(frame, 200, 200) != IP_DROPPED)
		fail("tags without end", "", IP_GUARD_BYTES, sizeof(frame), IP_PASSES);
}

/* What follows the packet in the frame is no part of it: the rest of a first fragment's headers can't be there. */
static void test_trailers(void)
{
	static const struct {
		const char *frame;
		bool passes;
	} cases[] = {
		{IP6("0010", "2c", MINE6, FRAGMENT("3c", "0001") OPTIONS("11", "00") "d431" "0035" ZEROS8), false},
		{IP6("0018", "2c", MINE6, FRAGMENT("3c", "0001") OPTIONS("11", "00") "d431" "0035" "00080000" ZEROS8), true},
		{IP6("0008", "00", MINE6, OPTIONS("3a", "00") "80000000" ZEROS8), false},
		{ALL OWN "0800" "4500" "0014" "2663" "2000" "40" "11" "0000" MINE4 "0a000001" "d431" "0035" ZEROS8, false},
		{ALL OWN "0800" "4500" "001c" "2663" "2000" "40" "11" "0000" MINE4 "0a000001" "d431" "0035" ZEROS8, true},
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		uint8_t frame[256];
		const uint32_t len = from_hex(cases[i].frame, frame);
		const enum ip_verdict got = judge(frame, len, len);

		if (got != (cases[i].passes ? IP_PASSES : IP_DROPPED))
			fail("a trailer", "", len, (uint32_t)i, got);
	}
}

/* Many addresses: each is found, and nothing between them. */
static void test_many_addresses(void)
{
	struct xv_ip many[64];
	uint8_t frame[128];
	const uint32_t len4 = from_hex(IP4("06", "4000", MINE4, TCP), frame);

	memset(many, 0, sizeof(many));
	for (uint32_t n = 0; n <= ARRAY_SIZE(many); n += n < 4 ? 1 : 20) {
		for (uint32_t i = 0; i < n; i++) { /* the other way round: it is for us to sort them */
			many[i].version = i % 2 ? 6 : 4;
			many[i].address[0] = (uint8_t)(250 - 2 * i);
			many[i].address[i % 2 ? 15 : 3] = 1;
		}
		free(guard);
		if (ip_guard_new(many, n, &guard))
			exit(2);
		for (uint32_t first = 0; first < 256; first++) {
			bool want4 = false, want6 = false;
			uint32_t len6;

			for (uint32_t i = 0; i < n; i++) {
				want4 |= many[i].version == 4 && many[i].address[0] == first;
				want6 |= many[i].version == 6 && many[i].address[0] == first;
			}
			from_hex(IP4("06", "4000", "00000001", TCP), frame);
			frame[26] = (uint8_t)first;
			if (judge(frame, len4, len4) != (want4 ? IP_PASSES : IP_DROPPED))
				fail("one of many addresses", "", len4, n, first);
			len6 = from_hex(IP6("0014", "06", "00000000000000000000000000000001", TCP), frame);
			frame[22] = (uint8_t)first;
			if (judge(frame, len6, len6) != (want6 ? IP_PASSES : IP_DROPPED))
				fail("one of many addresses of version 6", "", len6, n, first);
		}
	}
}

int main(void)
{
	static const char *const addresses[] = {"0a000009", MINE6, LISTED6, MINE4};
	struct xv_ip list[ARRAY_SIZE(addresses)];

	memset(list, 0, sizeof(list));
	for (uint32_t i = 0; i < ARRAY_SIZE(addresses); i++)
		list[i].version = from_hex(addresses[i], list[i].address) == 4 ? 4 : 6;
	if (ip_guard_new(list, ARRAY_SIZE(list), &guard))
		return 2;
	test_examples();
	test_tags_without_end();
	test_trailers();
	test_many_addresses();
	free(guard);
	puts("ok");
	return 0;
}
