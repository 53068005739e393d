/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Receive-side scaling and hash reports (virtio 1.2, 5.1.6.4.3, 5.1.6.5.6.4 and 5.1.6.5.7): a Toeplitz hash of a frame's
 * addresses and ports, by the guest's key, that chooses the receive queue and is told in the frame's virtio-net header.
 *
 * The hash of n input bits is the exclusive or of those 32-bit windows of the key that begin where the input has a bit
 * set. It is linear, so each half byte of the input contributes a word that depends on nothing else: 72 small tables,
 * made once for a key, and a frame costs 16 (IPv4) to 72 (IPv6 with ports) look-ups. They take 4.5 KiB, which stays in a
 * core's first cache; tables for whole bytes would need half as many look-ups in eight times the memory.
 */
#ifndef XV_RSS_H
#define XV_RSS_H

#include "view.h"

#define RSS_KEY_MAX 40u    /* bytes: 36 of input and a last window */
#define RSS_TABLE_MAX 128u /* entries; what the specification asks for at least */
#define RSS_INPUT_MAX 36u  /* two IPv6 addresses, two ports */

/* VIRTIO_NET_RSS_HASH_TYPE_*: all nine of virtio 1.2 */
#define RSS_TYPES 0x1ffu

struct rss {
	uint32_t types;        /* VIRTIO_NET_RSS_HASH_TYPE_* that the guest asked for; 0: nothing is hashed */
	bool steer;            /* the table chooses the receive queue */
	uint16_t mask, unclassified;
	uint16_t table[RSS_TABLE_MAX]; /* queue pairs */
	uint32_t words[2 * RSS_INPUT_MAX][16];
};

/* No hashing, no steering. */
void rss_reset(struct rss *rss);
/*
 * Take the data of VIRTIO_NET_CTRL_MQ_RSS_CONFIG, or of _HASH_CONFIG if not `steer`. False: it is not well formed, names a
 * type we do not have, or a queue pair that is not there; then `rss` is not to be used. `*tx_pairs`: max_tx_vq.
 */
bool rss_set(struct rss *rss, const uint8_t *data, uint32_t len, bool steer, uint32_t max_pairs, uint16_t *tx_pairs);

/* The hash of a frame, and in `*report` what it is of (VIRTIO_NET_HASH_REPORT_*; NONE: it has no hash). */
uint32_t rss_hash(const struct rss *rss, const struct xv_view *view, uint16_t *report);

/* The queue pair that gets a frame. */
static inline uint32_t rss_pair(const struct rss *rss, uint32_t hash, uint16_t report)
{
	return report ? rss->table[hash & rss->mask] : rss->unclassified;
}

#endif
