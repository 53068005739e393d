/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The benchmark's guests and its network, on one CPU: fills transmit rings and empties receive rings in a loop, and has
 * the kernel send prepared frames into the veth (BPF_PROG_TEST_RUN with live frames) in a thread beside it. The same
 * loop drives every back-end, so what it costs is the same for all of them.
 *
 * BPF_PROG_TEST_RUN takes some 25 ms to set up, so one call sends for as long as the job lasts, until a signal ends it;
 * meanwhile the loop, at real-time priority, empties the rings every 50 us.
 *
 * Descriptor i always describes buffer i and the avail ring always names them in turn: both back-ends use buffers in
 * the order they were offered, so only the indexes move.
 */
#define _GNU_SOURCE 1
#include <linux/bpf.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct ring {
	struct vring_avail *avail;
	struct vring_used *used;
	uint64_t done;  /* buffers that came back */
	uint64_t bytes; /* written into them by the device */
	uint32_t num;
	int32_t kick_fd;
	uint16_t offered, seen;
};

struct job {
	struct ring *rings; /* any direction: a buffer that comes back is offered again */
	uint64_t nr_rings;
	uint64_t nanoseconds;
	int32_t program_fd; /* -1: nothing comes from the network */
	uint32_t frame_len;
	void *frame;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint32_t turn(struct ring *r)
{
	uint16_t used = __atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE), n = (uint16_t)(used - r->seen);
	static const uint64_t one = 1;

	if (!n)
		return 0;
	for (uint16_t i = r->seen; i != used; i++)
		r->bytes += r->used->ring[i & (r->num - 1)].len;
	r->seen = used;
	r->done += n;
	r->offered += n;
	__atomic_store_n(&r->avail->idx, r->offered, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!(__atomic_load_n(&r->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY))
		(void)!write(r->kick_fd, &one, sizeof(one));
	return n;
}

static void *generate(void *argument)
{
	const struct job *job = argument;
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.test.prog_fd = (uint32_t)job->program_fd;
	attr.test.data_in = (uint64_t)(uintptr_t)job->frame;
	attr.test.data_size_in = job->frame_len;
	attr.test.repeat = UINT32_MAX;
	attr.test.flags = BPF_F_TEST_XDP_LIVE_FRAMES;
	attr.test.batch_size = 64;
	syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr));
	return NULL;
}

static void on_stop(int number)
{
	(void)number; /* what matters is that one came: it ends BPF_PROG_TEST_RUN */
}

static void turn_until(struct job *job, uint64_t end, const struct timespec *pause)
{
	do {
		for (int i = 0; i < 64; i++) {
			for (uint64_t r = 0; r < job->nr_rings; r++)
				turn(&job->rings[r]);
			if (pause)
				nanosleep(pause, NULL);
		}
	} while (now() < end);
}

/* Drive the rings for job->nanoseconds; 0 or the errno of what could not be set up. */
__attribute__((visibility("default"))) int run(struct job *job)
{
	const struct sched_param urgent = {.sched_priority = 1}, normal = {.sched_priority = 0};
	const struct timespec pause = {.tv_nsec = 50000};
	const struct sigaction action = {.sa_handler = on_stop};
	uint64_t end = now() + job->nanoseconds;
	pthread_t generator;
	int error;

	if (job->program_fd < 0) {
		turn_until(job, end, NULL);
		return 0;
	}
	sigaction(SIGUSR1, &action, NULL);
	error = pthread_create(&generator, NULL, generate, job);
	if (error)
		return error;
	error = pthread_setschedparam(pthread_self(), SCHED_FIFO, &urgent);
	turn_until(job, end, &pause);
	pthread_setschedparam(pthread_self(), SCHED_OTHER, &normal);
	pthread_kill(generator, SIGUSR1);
	pthread_join(generator, NULL);
	turn_until(job, now() + 10000000, NULL); /* what is still under way */
	return error;
}
