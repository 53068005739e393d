/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory that a capture's writers (capture.c: workers of the daemon) share with its reader (capread.c: another
 * process).
 *
 * One page of facts, then a ring of records: a power of two of bytes. A record begins at a multiple of RECORD_ALIGN, lies
 * in one piece, and is 32 bytes of header and the bytes kept of the frame. Where the next one does not fit before the ring's
 * end, an empty one fills it. Positions count bytes since the beginning; masked, they are places in the ring.
 *
 * Several workers write, each a record of its own: they take room by moving `head`, which only the daemon has, and say that
 * a record is complete by its `commit` word, last. That word is the record's position, exclusive-or a key that nobody
 * outside the two processes knows: whatever else is left at that place by earlier records (frames, which somebody on
 * the network or a guest made up) is not taken for it. The reader goes from record to record and needs no `head`.
 *
 * The daemon trusts nothing here: it reads but `tail`, and a wrong one only makes the ring look full, or lets it write over
 * records that were not read.
 */
#ifndef XV_CAPRING_H
#define XV_CAPRING_H

#include "base.h"

#define CAPTURE_MAGIC 0x43565558u /* "XUVC", little-endian */
#define CAPTURE_PAGE 4096u
#define RECORD_ALIGN 32u

struct capture_shared {
	uint32_t magic, abi;
	uint64_t size; /* of the ring, in bytes */
	uint64_t key;
	uint32_t snaplen, ended; /* ended: nothing comes any more */
	uint64_t tail __attribute__((aligned(64))); /* the reader's: what is before it was read */
	uint64_t lost __attribute__((aligned(64))); /* frames that are not in it */
} __attribute__((aligned(64)));

enum capture_flags {
	CAPTURE_FILLER = 1, /* no frame */
	CAPTURE_OUT = 2,
	CAPTURE_NEEDS_CSUM = 4,
};

struct capture_record {
	uint64_t commit;   /* position ^ key, when all else is there */
	uint64_t time;     /* nanoseconds since the epoch */
	uint32_t len;      /* of the frame */
	uint32_t kept;     /* its leading bytes, which follow */
	uint16_t queue;
	uint8_t flags;     /* enum capture_flags */
	uint8_t drop;      /* 1 + enum xv_drop, 0: not dropped */
	uint8_t gso_type;  /* VIRTIO_NET_HDR_GSO_* */
	uint8_t reserved[3];
};

_Static_assert(sizeof(struct capture_record) == RECORD_ALIGN, "a filler fits wherever a record may begin");
_Static_assert(sizeof(struct capture_shared) <= CAPTURE_PAGE, "");

static inline uint64_t record_bytes(uint32_t kept)
{
	return ALIGN_UP(sizeof(struct capture_record) + kept, (uint64_t)RECORD_ALIGN);
}

#endif
