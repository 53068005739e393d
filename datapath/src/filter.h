/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a guest wants to receive (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3), by destination address and by VLAN.
 *
 * A filter is part of the guest's rx_rules (guest.h), which nobody changes while a worker may read them.
 */
#ifndef XV_FILTER_H
#define XV_FILTER_H

#include "base.h"

#define FILTER_MULTICAST 256u /* addresses; a guest that wants more gets all multicast */

struct filter {
	uint64_t mac;                          /* the guest's own, as filter_word() has it; 0: any */
	uint64_t unicast[XV_MAX_MACS];         /* what it listens to besides; sorted, as is the next */
	uint64_t multicast[FILTER_MULTICAST];
	uint64_t vlans[64];                    /* a bit for each */
	uint32_t nr_unicast, nr_multicast;
	uint32_t mode;                         /* bit VIRTIO_NET_CTRL_RX_*: what is switched on */
	bool all_multicast;                    /* its table holds too many, or is not known */
};

/* Which parts of a filter count: those that the guest negotiated, and that we have the control virtqueue for. */
#define FILTER_BY_ADDRESS 1u
#define FILTER_BY_VLAN 2u

#define FILTER_PEEK 18u /* bytes of a frame that decide */

static inline uint64_t filter_word(const uint8_t mac[6])
{
	uint64_t word = 0;

	memcpy(&word, mac, 6);
	return word;
}

/* The lowest bit of an address's first byte, which is the lowest of the word on the machines we know. */
static inline bool filter_is_group(uint64_t word)
{
	uint8_t first;

	memcpy(&first, &word, 1);
	return first & 1;
}

/* After a reset of the device: its own address and broadcast, no VLAN (virtio 1.2, 5.1.6.5.2.1). */
void filter_reset(struct filter *filter, uint64_t mac);
/* Of a guest that was configured by commands that we have not seen: everything. */
void filter_open(struct filter *filter);

/*
 * Take the two tables of VIRTIO_NET_CTRL_MAC_TABLE_SET. An address counts as what its group bit says it is, whichever
 * table it is in; more group addresses than there is room for mean all of them. False, and nothing is changed: the data
 * is not well formed, or has a unicast address of zeros, or more of them than XV_MAX_MACS.
 */
bool filter_set_tables(struct filter *filter, const uint8_t *data, uint32_t len);

/* Whether the frame that begins with these bytes is one that the guest wants; `parts`: FILTER_BY_*. */
bool filter_passes(const struct filter *filter, const uint8_t header[FILTER_PEEK], uint32_t parts);

#endif
