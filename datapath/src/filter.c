// SPDX-License-Identifier: Apache-2.0
#include "filter.h"

#include <linux/virtio_net.h>
#include <stdlib.h>

void filter_reset(struct filter *filter, uint64_t mac)
{
	memset(filter, 0, sizeof(*filter));
	filter->mac = mac;
}

void filter_open(struct filter *filter)
{
	filter->mode = 1u << VIRTIO_NET_CTRL_RX_ALLUNI;
	filter->all_multicast = true;
	memset(filter->vlans, 0xff, sizeof(filter->vlans));
}

static int compare(const void *a, const void *b)
{
	const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Both tables are sorted: at most nine steps, whatever addresses the guest has chosen. */
static bool contains(const uint64_t *sorted, uint32_t n, uint64_t word)
{
	uint32_t low = 0;

	while (n) {
		const uint32_t half = n / 2;

		if (sorted[low + half] < word) {
			low += half + 1;
			n -= half + 1;
		} else {
			n = half;
		}
	}
	return sorted[low] == word;
}

static bool has(const uint64_t *sorted, uint32_t n, uint64_t word)
{
	return n && word <= sorted[n - 1] && contains(sorted, n, word);
}

static uint32_t le32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

bool filter_set_tables(struct filter *filter, const uint8_t *data, uint32_t len)
{
	uint64_t unicast[XV_MAX_MACS], multicast[FILTER_MULTICAST];
	uint32_t nr_unicast = 0, nr_multicast = 0;
	bool all = false;

	for (int table = 0; table < 2; table++) {
		uint32_t entries;

		if (len < 4)
			return false;
		entries = le32(data);
		data += 4;
		len -= 4;
		if (entries > len / 6)
			return false;
		for (uint32_t i = 0; i < entries; i++, data += 6) {
			const uint64_t word = filter_word(data);

			if (filter_is_group(word)) {
				if (nr_multicast < FILTER_MULTICAST)
					multicast[nr_multicast++] = word;
				else
					all = true;
			} else if (word != filter->mac) {
				if (!word || nr_unicast == XV_MAX_MACS)
					return false;
				unicast[nr_unicast++] = word;
			}
		}
		len -= 6 * entries;
	}
	if (len)
		return false;
	qsort(unicast, nr_unicast, sizeof(unicast[0]), compare);
	qsort(multicast, nr_multicast, sizeof(multicast[0]), compare);
	memcpy(filter->unicast, unicast, nr_unicast * sizeof(unicast[0]));
	memcpy(filter->multicast, multicast, nr_multicast * sizeof(multicast[0]));
	filter->nr_unicast = nr_unicast;
	filter->nr_multicast = nr_multicast;
	filter->all_multicast = all;
	return true;
}

static bool vlan_passes(const struct filter *filter, const uint8_t *header)
{
	uint32_t vlan;

	/* a service tag (802.1ad) is none of the VLANs that the guest can name; VLAN 0 is a priority only */
	if (likely(header[12] != 0x81 || header[13] != 0x00))
		return true;
	vlan = (uint32_t)(header[14] & 15) << 8 | header[15];
	return !vlan || filter->vlans[vlan / 64] >> vlan % 64 & 1;
}

bool filter_passes(const struct filter *filter, const uint8_t header[FILTER_PEEK], uint32_t parts)
{
	static const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
	const uint64_t to = filter_word(header);
	const uint32_t mode = filter->mode;

	if (parts & FILTER_BY_ADDRESS && mode & 1u << VIRTIO_NET_CTRL_RX_PROMISC)
		return true; /* whatever else is set (virtio 1.2, 5.1.6.5.1.1), VLANs included, as QEMU has it */
	if (parts & FILTER_BY_VLAN && !vlan_passes(filter, header))
		return false;
	if (!(parts & FILTER_BY_ADDRESS))
		return true;
	if (!filter_is_group(to)) {
		if (mode & 1u << VIRTIO_NET_CTRL_RX_NOUNI)
			return false;
		return likely(to == filter->mac) || !filter->mac || mode & 1u << VIRTIO_NET_CTRL_RX_ALLUNI ||
		       has(filter->unicast, filter->nr_unicast, to);
	}
	if (to == filter_word(broadcast))
		return !(mode & 1u << VIRTIO_NET_CTRL_RX_NOBCAST);
	if (mode & 1u << VIRTIO_NET_CTRL_RX_NOMULTI)
		return false;
	return filter->all_multicast || mode & 1u << VIRTIO_NET_CTRL_RX_ALLMULTI ||
	       has(filter->multicast, filter->nr_multicast, to);
}
