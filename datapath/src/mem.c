// SPDX-License-Identifier: Apache-2.0
/*
 * Guest memory: translation tables, and the guard against truncation.
 *
 * The front-end keeps the other end of the memfd and may truncate it at any moment; touching a page past its end then
 * raises SIGBUS in the worker. The handler finds the guest whose region it was, records the fault, and puts an anonymous
 * page of zeros in the place of the one that is gone, so that the access succeeds on memory that nobody else sees. The
 * worker goes on, sees the fault before its next burst of that guest, and control ends the connection: a few pages at
 * most are replaced. No lock held by the worker is disturbed and no frame of another guest is touched.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"
#include "mem.h"

static struct spinlock tables_lock; /* held by control for list changes and by the handler; never while touching guest memory */
static struct xv_mem *tables;
static struct sigaction previous;

/* Put zeros in the place of the page at `at`; what kind of page it was is found out by trying. */
static bool replace_page(const uint8_t *at)
{
	/* hugetlb files can only be replaced in whole pages of theirs; control maps them so, and the kernel says EINVAL */
	static const uint64_t page_sizes[] = {4096, 2u << 20, 1u << 30};

	for (size_t i = 0; i < ARRAY_SIZE(page_sizes); i++) {
		void *page = (void *)ALIGN_DOWN((uintptr_t)at, page_sizes[i]);

		if (mmap(page, page_sizes[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
			 -1, 0) != MAP_FAILED)
			return true;
		if (errno != EINVAL)
			return false;
	}
	return false;
}

static bool guard_page(const uint8_t *at)
{
	for (struct xv_mem *mem = tables; mem; mem = mem->next) {
		for (uint32_t i = 0; i < mem->count; i++) {
			const struct mem_range *range = &mem->by_gpa[i];
			uint64_t offset = (uint64_t)(at - range->host);

			if (offset >= range->size)
				continue;
			guest_fault(mem->guest, XV_FAULT_MEMORY_GONE, XV_NO_RING, range->start + offset);
			return replace_page(at);
		}
	}
	return false;
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	bool ours = false;

	/* an asynchronous SIGBUS (kill, memory failure on another thread) has no address of ours */
	if (info->si_code > 0) {
		spin_lock(&tables_lock);
		ours = guard_page(info->si_addr);
		spin_unlock(&tables_lock);
	}
	errno = saved;
	if (ours)
		return;
	if (previous.sa_flags & SA_SIGINFO && previous.sa_sigaction) {
		previous.sa_sigaction(sig, info, context);
	} else {
		/* the default: the instruction faults again and the process dies of it */
		sigaction(SIGBUS, &previous, NULL);
		if (info->si_code <= 0)
			raise(SIGBUS);
	}
}

static int install_result;

static void install(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};

	sigemptyset(&action.sa_mask);
	install_result = sigaction(SIGBUS, &action, &previous) ? -errno : 0;
}

int mem_guard_install(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install);
	return install_result;
}

static int by_start(const void *a, const void *b)
{
	const struct mem_range *x = a, *y = b;

	return x->start < y->start ? -1 : x->start > y->start;
}

/* Sorted, none empty, none wrapping, none overlapping the next. */
static bool well_formed(const struct mem_range *ranges, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (ranges[i].size == 0 || ranges[i].start + (ranges[i].size - 1) < ranges[i].start)
			return false;
		if (i && ranges[i].start - ranges[i - 1].start < ranges[i - 1].size)
			return false;
	}
	return true;
}

int xv_mem_new(const struct xv_region *regions, uint32_t n, struct xv_guest *guest, struct xv_mem **out)
{
	struct xv_mem *mem;

	if (n > XV_MAX_REGIONS)
		return -EINVAL;
	mem = calloc(1, sizeof(*mem) + 2 * (size_t)n * sizeof(struct mem_range));
	if (!mem)
		return -ENOMEM;
	mem->guest = guest;
	mem->count = n;
	mem->by_user = mem->by_gpa + n;
	for (uint32_t i = 0; i < n; i++) {
		uint8_t *host = (uint8_t *)(uintptr_t)regions[i].host;

		mem->by_gpa[i] = (struct mem_range){regions[i].gpa, regions[i].size, host};
		mem->by_user[i] = (struct mem_range){regions[i].user_addr, regions[i].size, host};
	}
	qsort(mem->by_gpa, n, sizeof(mem->by_gpa[0]), by_start);
	qsort(mem->by_user, n, sizeof(mem->by_user[0]), by_start);
	if (!well_formed(mem->by_gpa, n) || !well_formed(mem->by_user, n)) {
		free(mem);
		return -EINVAL;
	}
	spin_lock(&tables_lock);
	mem->next = tables;
	tables = mem;
	spin_unlock(&tables_lock);
	*out = mem;
	return 0;
}

void xv_mem_free(struct xv_mem *mem)
{
	if (!mem)
		return;
	spin_lock(&tables_lock);
	for (struct xv_mem **at = &tables; *at; at = &(*at)->next) {
		if (*at == mem) {
			*at = mem->next;
			break;
		}
	}
	spin_unlock(&tables_lock);
	free(mem);
}

void *mem_at_user(const struct xv_mem *mem, uint64_t addr, uint64_t len)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct mem_range *range = &mem->by_user[i];
		uint64_t offset = addr - range->start;

		if (offset < range->size)
			return range->size - offset >= len ? range->host + offset : NULL;
	}
	return NULL;
}
