/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames that stand for many: cutting a guest's GSO frame into what a wire or another guest takes, and joining
 * segments from the wire into what a guest takes in one piece. Neither copies payload: both only make views, whose
 * headers are new and whose payload lies where it lay.
 */
#ifndef XV_GSO_H
#define XV_GSO_H

#include "nethdr.h"

#define GSO_HEADER_MAX 192u /* Ethernet, two tags, IPv6 with some extensions, TCP with all options */

/* One of the frames that a joined one is made of; its payload is in segments of its own. */
struct gso_part {
	const struct xv_view *view; /* the frame itself */
	uint32_t len; /* bytes of payload */
	uint16_t sum; /* with VIEW_VERIFY, of pseudo-header and transport header: 0xffff with the payload's, if it is whole */
};

/* Room for the views of one call. */
struct gso_room {
	struct gso_part parts[XV_BURST];
	struct xv_view views[XV_BURST];
	const struct xv_view *list[XV_BURST];
	struct xv_seg segs[XV_BURST_SEGS + 2 * XV_BURST];
	uint8_t headers[XV_BURST][GSO_HEADER_MAX];
};

/* The headers of a guest's GSO frame: a private copy, for the guest may change its own. */
struct gso_header {
	uint8_t bytes[GSO_HEADER_MAX];
	struct net_headers h;
	uint32_t len;
};

/* A GSO frame while it is being cut. */
struct gso_cut {
	const struct xv_view *view;
	uint32_t payload;       /* bytes */
	uint32_t done, index;   /* payload bytes and segments that have been cut */
	uint32_t seg, offset;   /* where in the view the next one begins */
};

/* Check a guest's GSO frame against its own headers, and keep them. False: it is not what its virtio-net header says. */
bool gso_check(struct xv_view *view, struct gso_header *header);
void gso_cut_init(struct gso_cut *cut, const struct xv_view *view);
/* The next segments, XV_BURST at most, each with only its pseudo-header's sum; 0 at the end. */
uint32_t gso_cut_next(struct gso_cut *cut, struct gso_room *room);
/* The frame's own headers, as those of a segment that is all of it: with the pseudo-header's sum and IPv4's checksum. */
void gso_whole_header(const struct xv_view *view, uint8_t header[GSO_HEADER_MAX]);
/* Put a tag into the headers of a GSO frame, or take it out; the view's own bytes and lengths are tag.h's. */
bool gso_push_tag(struct xv_view *view, uint16_t tci); /* false: they have no room */
void gso_pop_tag(struct xv_view *view);
void gso_set_tag(struct xv_view *view, uint16_t tci);
/* Segments that have not been cut yet. */
static inline uint32_t gso_cut_left(const struct gso_cut *cut)
{
	return (cut->payload - cut->done + cut->view->gso_size - 1) / cut->view->gso_size;
}

/*
 * Join consecutive segments of one TCP flow, or datagrams of one UDP flow, among views[plain..n), which must stay
 * unchanged, as Linux's GRO would; `gso`: the GSO_BITs that the receiver takes. Answers how many views are in
 * room->list then; frames[i] is how many of the given ones the first i + 1 of them stand for.
 *
 * Where the sender's stack has left the checksum open it vouches for the data. A finished checksum is compared while
 * the joined frame is copied (VIEW_VERIFY), and if one is wrong the same frames are offered again, with `plain`.
 */
uint32_t gso_join(const struct xv_view *views, uint32_t n, uint32_t plain, uint32_t gso, struct gso_room *room,
		  uint32_t *frames);

/* How many frames a view stands for: those that it was joined of, or one. */
static inline uint32_t gso_frames(const struct xv_view *view)
{
	uint32_t n = 0;

	if (likely(!view->gso_type || !view->parts))
		return 1;
	for (uint32_t bytes = view->hdr_len; bytes < view->len; n++)
		bytes += view->parts[n].len;
	return n;
}

#endif
