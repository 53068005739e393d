// SPDX-License-Identifier: Apache-2.0
/*
 * The reading end of a capture, in a process of its own: records become the Enhanced Packet Blocks of a pcapng file
 * (draft-ietf-opsawg-pcapng, 4.3). See capring.h for the memory that both ends share.
 */
#include <errno.h>
#include <linux/virtio_net.h>
#include <stdlib.h>

#include "capring.h"

#define BLOCK_EPB 6u
#define OPTION_COMMENT 1u
#define OPTION_EPB_FLAGS 2u
#define OPTION_EPB_QUEUE 6u
#define EPB_IN 1u
#define EPB_OUT 2u
#define EPB_UNICAST (1u << 2)
#define EPB_MULTICAST (2u << 2)
#define EPB_BROADCAST (3u << 2)
#define EPB_CSUM_NOT_READY (1u << 9)
#define EPB_TSO (1u << 11)
#define EPB_FIXED 28u    /* what stands before the frame */
#define EPB_REST 96u     /* what follows it, at most: three options and their end, the length once more */
#define TAIL_EVERY 65536u /* bytes read between two words to the writers */

struct xv_capread {
	struct capture_shared *shared;
	const uint8_t *ring;
	uint64_t size, key, tail, told;
	struct xv_capread_conf conf;
	struct xv_capread_counters counters;
};

/* The next record's position must be the reader's; NULL: it is not complete yet. */
static const struct capture_record *next_record(const struct xv_capread *reader)
{
	const struct capture_record *record = (const void *)(reader->ring + (reader->tail & (reader->size - 1)));

	/* acquire pairs with the worker's release in commit() */
	return load_acquire(&record->commit) == (reader->tail ^ reader->key) ? record : NULL;
}

static bool wanted(const struct xv_capread *reader, const struct capture_record *record)
{
	const struct xv_capread_conf *conf = &reader->conf;
	uint32_t (*filter)(const void *program, const uint8_t *frame, uint32_t len, uint32_t kept) =
		(void *)(uintptr_t)conf->filter;

	if (!(conf->directions & (record->flags & CAPTURE_OUT ? XV_CAPTURE_OUT : XV_CAPTURE_IN)))
		return false;
	if (conf->drops_only && !record->drop)
		return false;
	return !filter || filter((const void *)(uintptr_t)conf->program, (const uint8_t *)(record + 1), record->len, record->kept);
}

static uint32_t flags_word(const struct capture_record *record)
{
	const uint8_t *to = (const uint8_t *)(record + 1);
	const uint8_t gso = record->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
	uint32_t word = record->flags & CAPTURE_OUT ? EPB_OUT : EPB_IN;

	if (record->kept >= 6)
		word |= !(to[0] & 1) ? EPB_UNICAST : memcmp(to, "\xff\xff\xff\xff\xff\xff", 6) ? EPB_MULTICAST : EPB_BROADCAST;
	if (record->flags & CAPTURE_NEEDS_CSUM)
		word |= EPB_CSUM_NOT_READY;
	if (gso == VIRTIO_NET_HDR_GSO_TCPV4 || gso == VIRTIO_NET_HDR_GSO_TCPV6)
		word |= EPB_TSO;
	return word;
}

static uint8_t *put32(uint8_t *to, uint32_t word)
{
	memcpy(to, &word, sizeof(word));
	return to + sizeof(word);
}

/* `len` bytes, and zeros up to a multiple of four. */
static uint8_t *put_padded(uint8_t *to, const void *from, uint32_t len)
{
	memcpy(to, from, len);
	for (; len % 4; len++)
		to[len] = 0;
	return to + len;
}

static uint8_t *put_option(uint8_t *to, uint16_t code, const void *value, uint32_t len)
{
	return put_padded(put32(to, (uint32_t)code | len << 16), value, len); /* little-endian, or the file's own order */
}

static uint32_t put_block(uint8_t *out, const struct capture_record *record)
{
	const uint32_t queue = record->queue, flags = flags_word(record);
	uint8_t *to = out;

	to = put32(to, BLOCK_EPB);
	to = put32(to, 0); /* its length, below */
	to = put32(to, 0); /* the only interface */
	to = put32(to, (uint32_t)(record->time >> 32));
	to = put32(to, (uint32_t)record->time);
	to = put32(to, record->kept);
	to = put32(to, record->len);
	to = put_padded(to, record + 1, record->kept);
	to = put_option(to, OPTION_EPB_FLAGS, &flags, sizeof(flags));
	to = put_option(to, OPTION_EPB_QUEUE, &queue, sizeof(queue));
	if (record->drop) {
		const char *why = xv_drop_name(record->drop - 1u);
		char comment[40] = "dropped: ";

		strncat(comment, why ? why : "for an unknown reason", sizeof(comment) - strlen(comment) - 1);
		to = put_option(to, OPTION_COMMENT, comment, (uint32_t)strlen(comment));
	}
	to = put32(to, 0); /* no more options */
	to = put32(to, (uint32_t)(to - out) + 4);
	put32(out + 4, (uint32_t)(to - out));
	return (uint32_t)(to - out);
}

static void tell(struct xv_capread *reader)
{
	/* release pairs with the worker's acquire in take(): what was read may be written over */
	store_release(&reader->shared->tail, reader->tail);
	reader->told = reader->tail;
}

int64_t xv_capread_blocks(struct xv_capread *reader, void *out, uint64_t room, uint64_t frames)
{
	const uint64_t begin = reader->tail;
	const struct capture_record *record;
	uint64_t done = 0;

	/* not for ever, when frames come as fast as they are found not to be wanted */
	while (frames && reader->tail - begin < reader->size / 2 && (record = next_record(reader))) {
		const uint64_t left = reader->size - (reader->tail & (reader->size - 1));

		if (record->flags & CAPTURE_FILLER) {
			reader->tail += left;
			continue;
		}
		if (record_bytes(record->kept) > left)
			return -EBADMSG;
		if (room - done < EPB_FIXED + ALIGN_UP((uint64_t)record->kept, 4) + EPB_REST)
			break;
		reader->counters.seen++;
		if (wanted(reader, record)) {
			done += put_block((uint8_t *)out + done, record);
			reader->counters.taken++;
			frames--;
		}
		reader->tail += record_bytes(record->kept);
		if (reader->tail - reader->told >= TAIL_EVERY)
			tell(reader);
	}
	tell(reader);
	reader->counters.lost = load_once(&reader->shared->lost);
	return (int64_t)done;
}

int xv_capread_ended(const struct xv_capread *reader)
{
	/* acquire: who sees the end sees every record before it */
	return load_acquire(&reader->shared->ended) != 0;
}

int xv_capread_new(const struct xv_capread_conf *conf, struct xv_capread **out)
{
	struct capture_shared *shared = (void *)(uintptr_t)conf->memory;
	const uint64_t size = conf->size - CAPTURE_PAGE;
	struct xv_capread *reader;

	if (conf->memory % CAPTURE_PAGE || conf->size <= CAPTURE_PAGE || size & (size - 1) || size < XV_CAPTURE_LEAST)
		return -EINVAL;
	if (shared->magic != CAPTURE_MAGIC || shared->abi != XV_ABI || shared->size != size)
		return -EPROTO;
	reader = calloc(1, sizeof(*reader));
	if (!reader)
		return -ENOMEM;
	reader->shared = shared;
	reader->ring = (const uint8_t *)shared + CAPTURE_PAGE;
	reader->size = size;
	reader->key = shared->key;
	reader->conf = *conf;
	*out = reader;
	return 0;
}

void xv_capread_free(struct xv_capread *reader)
{
	free(reader);
}

const struct xv_capread_counters *xv_capread_counters(const struct xv_capread *reader)
{
	return &reader->counters;
}
