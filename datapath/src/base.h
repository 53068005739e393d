/* SPDX-License-Identifier: Apache-2.0 */
/* What every file of the data plane uses: types, ordering, prefetch, spinlock, time. */
#ifndef XV_BASE_H
#define XV_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "xdpvhost.h"

#define XV_BURST 32u /* frames handled per port and turn */

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define cold __attribute__((noinline, cold))
#define always_inline __attribute__((always_inline))
/* Each argument is evaluated once: some are reads of shared rings. */
#define MIN(a, b)                                      \
	({                                             \
		__auto_type min_a_ = (a);              \
		__auto_type min_b_ = (b);              \
		min_a_ < min_b_ ? min_a_ : min_b_;     \
	})
#define MAX(a, b)                                      \
	({                                             \
		__auto_type max_a_ = (a);              \
		__auto_type max_b_ = (b);              \
		max_a_ > max_b_ ? max_a_ : max_b_;     \
	})
#define ALIGN_DOWN(x, a) ((x) & ~((__typeof__(x))(a) - 1))
#define ALIGN_UP(x, a) ALIGN_DOWN((x) + ((__typeof__(x))(a) - 1), a)
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* A word that another thread, the guest or the kernel may change: read or written exactly once. */
#define load_once(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define store_once(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define full_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* Counters have one writer each; a plain store of a whole word is all a reader needs. */
#define count(word, n) store_once(&(word), (word) + (n))

static inline void prefetch(const void *p)
{
	__builtin_prefetch(p, 0, 3);
}

static inline void prefetch_write(const void *p)
{
	__builtin_prefetch(p, 1, 3);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

struct spinlock {
	uint32_t held;
};

static inline void spin_lock(struct spinlock *lock)
{
	/* acquire pairs with the release in spin_unlock() */
	while (unlikely(__atomic_exchange_n(&lock->held, 1u, __ATOMIC_ACQUIRE)))
		while (load_once(&lock->held))
			cpu_relax();
}

static inline void spin_unlock(struct spinlock *lock)
{
	store_release(&lock->held, 0u);
}

/* Timestamp counter, or nanoseconds where there is none. xv_cycles_per_us() says how many make a microsecond. */
static inline uint64_t cycles_now(void)
{
#if defined(__x86_64__)
	return __builtin_ia32_rdtsc();
#else
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
#endif
}

#endif
