/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The synthetic guest and its network, on one CPU: what `xdpvhost compare` and scripts/bench put in front of every
 * system, so that what the guest costs is the same for all of them. It trusts the device: no production code.
 *
 * xvg_run: rates. Rings are kept full; the kernel sends prepared frames into the veth (BPF_PROG_TEST_RUN with live
 * frames, or a packet socket where the device can't do that) in a thread beside the loop. BPF_PROG_TEST_RUN takes some
 * 25 ms to set up, so one call sends for as long as the job lasts, until a signal ends it; meanwhile the loop, at
 * real-time priority, empties the rings every 50 us.
 *
 * xvg_probe: round trips. One loop is the network's end, which sends frames at the times of a schedule and takes them
 * back, and the guest, which returns each with its MAC addresses swapped. A frame's latency counts from the time when it
 * was due, not from when it was sent: a stall delays all that were due in it, and all of them are counted. Other guests,
 * which make noise, have their rings turned by the same loop.
 *
 * Descriptor i always describes buffer i, and the ring names them in turn: every device here uses buffers in the order
 * in which they were offered, so only the indexes move.
 */
#define _GNU_SOURCE 1
#include <errno.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define BATCH 64

enum kind { SPLIT, E1000 };
enum notifier { EVENTFD, QTEST16, QTEST32 };

/* A virtqueue, or a ring of legacy e1000 descriptors (then `avail` is not used). */
struct xvg_ring {
	void *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint8_t *buffers;    /* num of `stride` bytes */
	uint64_t kick_addr;  /* QTEST*: the register that a notification writes */
	uint64_t done;       /* buffers that came back */
	uint64_t bytes;      /* written into them by the device */
	uint64_t kicks;      /* notifications of the device */
	uint32_t num, stride;
	int32_t kick_fd;
	uint32_t kick_value; /* QTEST16: the queue's index */
	uint16_t offered, seen;
	uint8_t kind, notifier;
	uint8_t header;      /* bytes before the frame in a buffer */
	uint8_t transmit;
};

/* What a descriptor of an 8254x is made of; both directions have length and status in the same place. */
struct e1000_desc {
	uint64_t addr;
	uint16_t length;
	uint8_t cso, cmd;
	uint8_t status, css;
	uint16_t special;
};

#define E1000_DONE 1
#define E1000_LAZY 32 /* receive buffers are given back so many at a time, as drivers do */

struct xvg_job {
	struct xvg_ring *rings; /* any direction: a buffer that comes back is offered again */
	uint64_t nr_rings;
	uint64_t nanoseconds;
	int32_t program_fd; /* -1: no live frames */
	int32_t socket_fd;  /* a packet socket that sends instead; -1: nothing comes from the network */
	uint32_t frame_len, reserved;
	void *frame;
};

struct xvg_probe {
	struct xvg_ring *rx, *tx; /* transmit buffers are free at first: nothing is offered */
	uint64_t nanoseconds, interval;
	uint64_t *buckets; /* log-linear, see bucket_of */
	uint64_t nr_buckets;
	uint64_t sent, received, refused; /* by the network's end; refused: its socket would not take them */
	int32_t socket_fd, guest_fd;      /* guest_fd: a packet socket in place of rings; -1: rings */
	uint32_t frame_len, run;
	uint8_t *frame;
	struct xvg_ring *others; /* other guests' rings, kept full meanwhile */
	uint64_t nr_others;
};

API void xvg_offer(struct xvg_ring *r, uint32_t n);
API uint32_t xvg_drain(struct xvg_ring *r, uint64_t nanoseconds);
API int xvg_run(struct xvg_job *job);
API int xvg_probe(struct xvg_probe *p);
API double xvg_bucket_middle(uint64_t bucket);
API double xvg_tsc_hz(void);
API int xvg_count_instructions(int tid);

struct stamp {
	uint64_t due;
	uint32_t run, magic;
};

#define MAGIC 0x78767068u
#define STAMP_AT 14
#define MAX_FRAME 2048

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void notify(struct xvg_ring *r, uint32_t value)
{
	static const uint64_t one = 1;
	char text[64], replies[4096];
	int n;

	r->kicks++;
	if (r->notifier == EVENTFD) {
		(void)!write(r->kick_fd, &one, sizeof(one));
		return;
	}
	n = snprintf(text, sizeof(text), "write%c 0x%llx 0x%x\n", r->notifier == QTEST16 ? 'w' : 'l',
		     (unsigned long long)r->kick_addr, value);
	(void)!send(r->kick_fd, text, (size_t)n, MSG_NOSIGNAL);
	(void)!recv(r->kick_fd, replies, sizeof(replies), MSG_DONTWAIT); /* the OKs of earlier ones */
}

/* How many buffers have come back, not yet taken. */
static uint32_t ready(const struct xvg_ring *r)
{
	if (r->kind == SPLIT)
		return (uint16_t)(__atomic_load_n(&r->used->idx, __ATOMIC_ACQUIRE) - r->seen);
	const volatile struct e1000_desc *d = r->desc;
	uint32_t n = 0, busy = (uint16_t)(r->offered - r->seen);

	while (n < busy && d[(r->seen + n) & (r->num - 1)].status & E1000_DONE)
		n++;
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	return n;
}

static uint32_t length_of(const struct xvg_ring *r, uint16_t at)
{
	if (r->kind == SPLIT)
		return r->used->ring[at & (r->num - 1)].len;
	return ((const struct e1000_desc *)r->desc)[at & (r->num - 1)].length;
}

static void take(struct xvg_ring *r, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		r->bytes += length_of(r, (uint16_t)(r->seen + i));
	r->seen += n;
	r->done += n;
}

/* Offer the next n buffers to the device. */
void xvg_offer(struct xvg_ring *r, uint32_t n)
{
	if (r->kind == SPLIT) {
		r->offered += n;
		__atomic_store_n(&r->avail->idx, r->offered, __ATOMIC_RELEASE);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (!(__atomic_load_n(&r->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY))
			notify(r, r->kick_value);
		return;
	}
	struct e1000_desc *d = r->desc;

	for (uint32_t i = 0; i < n; i++)
		d[(r->offered + i) & (r->num - 1)].status = 0;
	r->offered += n;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (r->transmit || r->offered / E1000_LAZY != (uint16_t)(r->offered - n) / E1000_LAZY)
		notify(r, r->offered & (r->num - 1));
}

/* Take back all buffers, and offer none; how many the device still has after so long. */
uint32_t xvg_drain(struct xvg_ring *r, uint64_t nanoseconds)
{
	uint64_t end = now() + nanoseconds;
	uint16_t left;

	do {
		take(r, ready(r));
		left = (uint16_t)(r->offered - r->seen);
	} while (left && now() < end);
	return left;
}

static uint32_t turn(struct xvg_ring *r)
{
	uint32_t n = ready(r);

	if (!n)
		return 0;
	take(r, n);
	xvg_offer(r, n);
	return n;
}

static void *generate(void *argument)
{
	const struct xvg_job *job = argument;
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.test.prog_fd = (uint32_t)job->program_fd;
	attr.test.data_in = (uint64_t)(uintptr_t)job->frame;
	attr.test.data_size_in = job->frame_len;
	attr.test.repeat = UINT32_MAX;
	attr.test.flags = BPF_F_TEST_XDP_LIVE_FRAMES;
	attr.test.batch_size = BATCH;
	syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr));
	return NULL;
}

/* Sends the frame by the packet socket until job->nanoseconds are over. */
static void *transmit(void *argument)
{
	const struct xvg_job *job = argument;
	uint64_t end = now() + job->nanoseconds;
	struct iovec iov = {job->frame, job->frame_len};
	struct mmsghdr batch[BATCH];

	memset(batch, 0, sizeof(batch));
	for (int i = 0; i < BATCH; i++)
		batch[i].msg_hdr = (struct msghdr){.msg_iov = &iov, .msg_iovlen = 1};
	while (now() < end)
		if (sendmmsg(job->socket_fd, batch, BATCH, 0) <= 0)
			sched_yield();
	return NULL;
}

static void on_stop(int number)
{
	(void)number; /* what matters is that one came: it ends BPF_PROG_TEST_RUN */
}

static void turn_until(struct xvg_job *job, uint64_t end, const struct timespec *pause)
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
int xvg_run(struct xvg_job *job)
{
	const struct sched_param urgent = {.sched_priority = 1}, normal = {.sched_priority = 0};
	const struct timespec pause = {.tv_nsec = 50000};
	const struct sigaction action = {.sa_handler = on_stop};
	struct sigaction before;
	uint64_t end = now() + job->nanoseconds;
	pthread_t generator;
	int error;

	if (job->program_fd < 0 && job->socket_fd < 0) {
		turn_until(job, end, NULL);
		return 0;
	}
	sigaction(SIGUSR1, &action, &before);
	error = pthread_create(&generator, NULL, job->program_fd < 0 ? transmit : generate, job);
	if (error)
		return error;
	error = pthread_setschedparam(pthread_self(), SCHED_FIFO, &urgent);
	turn_until(job, end, &pause);
	pthread_setschedparam(pthread_self(), SCHED_OTHER, &normal);
	pthread_kill(generator, SIGUSR1);
	pthread_join(generator, NULL);
	sigaction(SIGUSR1, &before, NULL);
	turn_until(job, now() + 10000000, NULL); /* what is still under way */
	return error;
}

/* 32 buckets an octave: no figure is more than 3 % off. Below 64 ns a bucket a nanosecond. */
static uint64_t bucket_of(uint64_t ns)
{
	uint32_t shift = ns < 64 ? 0 : 58u - (uint32_t)__builtin_clzll(ns);

	return ((uint64_t)shift << 5) + (ns >> shift);
}

/* Nanoseconds in the middle of a bucket. */
double xvg_bucket_middle(uint64_t bucket)
{
	uint64_t shift = bucket < 64 ? 0 : (bucket >> 5) - 1;

	return ((double)(bucket - (shift << 5)) + 0.5) * (double)(1ull << shift);
}

static void swap_macs(uint8_t *frame)
{
	uint8_t mac[6];

	memcpy(mac, frame, 6);
	memcpy(frame, frame + 6, 6);
	memcpy(frame + 6, mac, 6);
}

/* Whether it is one of ours, which the guest returns; a bridge and a kernel send other things, too. */
static int is_ours(const uint8_t *frame, uint32_t length)
{
	struct stamp stamp;

	if (length < STAMP_AT + sizeof(stamp))
		return 0;
	memcpy(&stamp, frame + STAMP_AT, sizeof(stamp));
	return stamp.magic == MAGIC;
}

/* The guest: what came goes back. */
static void echo(struct xvg_ring *rx, struct xvg_ring *tx)
{
	uint32_t n = ready(rx), sent = ready(tx), free, out = 0;

	take(tx, sent);
	if (!n)
		return;
	free = tx->num - 1 - (uint16_t)(tx->offered - tx->seen);
	for (uint32_t i = 0; i < n && out < free; i++) {
		uint16_t from = (uint16_t)(rx->seen + i) & (rx->num - 1), to = (uint16_t)(tx->offered + out) & (tx->num - 1);
		uint32_t length = length_of(rx, (uint16_t)(rx->seen + i));
		const uint8_t *frame = rx->buffers + (uint64_t)from * rx->stride + rx->header;
		uint8_t *copy = tx->buffers + (uint64_t)to * tx->stride + tx->header;

		if (length <= rx->header || length - rx->header > MAX_FRAME || !is_ours(frame, length - rx->header))
			continue;
		length -= rx->header;
		memcpy(copy, frame, length);
		swap_macs(copy);
		if (tx->kind == SPLIT)
			((struct vring_desc *)tx->desc)[to].len = tx->header + length;
		else
			((struct e1000_desc *)tx->desc)[to].length = (uint16_t)length;
		out++;
	}
	if (out)
		xvg_offer(tx, out);
	take(rx, n);
	xvg_offer(rx, n);
}

/* The same where a kernel's device in a namespace is the guest. */
static void echo_socket(int fd)
{
	uint8_t frame[MAX_FRAME];
	ssize_t n = recv(fd, frame, sizeof(frame), MSG_DONTWAIT);

	if (n > 0 && is_ours(frame, (uint32_t)n)) {
		swap_macs(frame);
		(void)!send(fd, frame, (size_t)n, MSG_DONTWAIT);
	}
}

static void receive(struct xvg_probe *p)
{
	uint8_t frame[MAX_FRAME];
	struct stamp stamp;
	ssize_t n;

	while ((n = recv(p->socket_fd, frame, sizeof(frame), MSG_DONTWAIT)) > 0) {
		if (!is_ours(frame, (uint32_t)n))
			continue;
		memcpy(&stamp, frame + STAMP_AT, sizeof(stamp));
		if (stamp.run != p->run)
			continue; /* late, from the run before */
		uint64_t at = bucket_of(now() - stamp.due);

		p->buckets[at < p->nr_buckets ? at : p->nr_buckets - 1]++;
		p->received++;
	}
}

/* Send a frame each `interval` for `nanoseconds`, then wait for the last up to 100 ms. 0 or an errno. */
int xvg_probe(struct xvg_probe *p)
{
	uint64_t start = now(), due = start + p->interval, end = start + p->nanoseconds, t;
	struct stamp stamp = {.run = p->run, .magic = MAGIC};

	if (p->frame_len < STAMP_AT + sizeof(stamp) || p->frame_len > MAX_FRAME)
		return EINVAL;
	while ((t = now()) < end + 100000000 && (t < end || p->received < p->sent)) {
		if (t >= due && due < end) {
			stamp.due = due;
			memcpy(p->frame + STAMP_AT, &stamp, sizeof(stamp));
			if (send(p->socket_fd, p->frame, p->frame_len, MSG_DONTWAIT) > 0)
				p->sent++;
			else
				p->refused++;
			due += p->interval;
		}
		if (p->guest_fd >= 0)
			echo_socket(p->guest_fd);
		else
			echo(p->rx, p->tx);
		for (uint64_t r = 0; r < p->nr_others; r++)
			turn(&p->others[r]);
		receive(p);
	}
	return 0;
}

/* Cycles of the time stamp counter a second; 0 where the machine has none that programs can read. */
double xvg_tsc_hz(void)
{
#ifdef __x86_64__
	uint64_t begin = now(), first = __builtin_ia32_rdtsc(), end, last;

	do {
		end = now();
		last = __builtin_ia32_rdtsc();
	} while (end - begin < 50000000);
	return (double)(last - first) * 1e9 / (double)(end - begin);
#else
	return 0;
#endif
}

/* A counter of the instructions of thread `tid`, user and kernel; its fd or a negative errno. */
int xvg_count_instructions(int tid)
{
	struct perf_event_attr attr;
	long fd;

	memset(&attr, 0, sizeof(attr));
	attr.type = PERF_TYPE_HARDWARE;
	attr.size = sizeof(attr);
	attr.config = PERF_COUNT_HW_INSTRUCTIONS;
	fd = syscall(SYS_perf_event_open, &attr, tid, -1, -1, PERF_FLAG_FD_CLOEXEC);
	return fd < 0 ? -errno : (int)fd;
}
