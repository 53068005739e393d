/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Source addresses that a guest has used without having been given them, as many as it may.
 *
 * Each address has two places to be: a line of 8 keys each, chosen by two parts of its hash, and at most a quarter of all
 * places is taken. So a look is at 16 keys at most, whatever addresses a guest makes up, and takes no lock. Adding
 * one takes a lock, which only this guest's own workers share; when the guest has all that it may have, nothing is
 * locked or written any more. Control takes addresses out or denies them, one word each, and needs no lock. A denied one
 * keeps its place, so that the guest's next frame doesn't add it again, until control takes it out.
 *
 * Made by control while it publishes, and handed on when it publishes again; a worker never allocates.
 */
#ifndef XV_LEARN_H
#define XV_LEARN_H

#include "base.h"

struct learned; /* a table */

/*
 * A table of `most` addresses, with what is in `old` (or NULL), which its workers may still be adding to. What they add
 * meanwhile is learned again. NULL: no memory.
 */
struct learned *learned_new(uint32_t most, const struct learned *old);
void learned_free(struct learned *table);
uint32_t learned_most(const struct learned *table);
uint64_t learned_bytes(const struct learned *table);

/* What was found of a source address, or done about it. LEARN_FULL: the guest may not use it; it is denied, too. */
enum learning { LEARN_KNOWN, LEARN_NEW, LEARN_FULL };

/* The address has been used: note that, or add it if `may_add` and there is room. `key`: mac_key(). */
enum learning learned_use(struct learned *table, uint64_t key, uint64_t now, bool may_add);
/* Control's: take it out. */
void learned_forget(struct learned *table, uint64_t key);
/* Control's: the guest may not use it. Nothing happens if it isn't there. */
void learned_deny(struct learned *table, uint64_t key, uint64_t now);
/* Control's: fill out[0..n), and answer how many there are. */
uint32_t learned_list(const struct learned *table, uint64_t now, uint64_t cycles_per_us, struct xv_learned *out, uint32_t n);

#endif
