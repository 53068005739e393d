/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A TCP stream of numbered blocks whose content follows from their number.
 *
 *	hoard push ADDRESS PORT RATE	sends RATE blocks a second, in bursts, until SIGTERM; prints how many
 *	hoard pull ADDRESS PORT		the other end; looks at each block as it comes, and prints how many
 *	hoard keep ADDRESS PORT		the same, but it begins to read at SIGUSR1
 *
 * Why `keep` does not read: bytes in a socket still lie in the pages that the device wrote them to. Of a frame that
 * fills several buffers, the driver writes to none but the first. If a migration forgets such a page, because nobody
 * told that it was dirty, the content is another. What waits for a peer prints "listening" when it does.
 */
#include <arpa/inet.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define WORDS 175
#define TICKS 50 /* bursts a second: long enough for segments to be joined again on their way */
#define BURST 64

static uint64_t blocks[BURST][WORDS];

static int fail(const char *what)
{
	perror(what);
	return 1;
}

/* splitmix64: every word of every block is another. */
static uint64_t word(uint64_t number, unsigned int i)
{
	uint64_t z = (number * WORDS + i + 1) * 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static int push(int fd, unsigned int burst)
{
	struct timespec tick = { .tv_nsec = 1000000000 / TICKS };
	uint64_t number = 0;
	sigset_t end;

	sigemptyset(&end);
	sigaddset(&end, SIGTERM);
	sigprocmask(SIG_BLOCK, &end, NULL);
	while (sigtimedwait(&end, NULL, &tick) < 0) {
		size_t size = burst * sizeof(blocks[0]), done = 0;

		for (unsigned int b = 0; b < burst; b++, number++)
			for (unsigned int i = 0; i < WORDS; i++)
				blocks[b][i] = word(number, i);
		while (done < size) {
			ssize_t n = send(fd, (char *)blocks + done, size - done, MSG_NOSIGNAL);

			if (n <= 0)
				return fail("send");
			done += (size_t)n;
		}
	}
	printf("%llu pushed\n", (unsigned long long)number);
	return 0;
}

static int receive(int fd)
{
	uint64_t number = 0;
	ssize_t n;

	while ((n = recv(fd, blocks[0], sizeof(blocks[0]), MSG_WAITALL)) == sizeof(blocks[0])) {
		for (unsigned int i = 0; i < WORDS; i++)
			if (blocks[0][i] != word(number, i)) {
				printf("block %llu is wrong from word %u on\n", (unsigned long long)number, i);
				return 1;
			}
		number++;
	}
	if (n != 0)
		return fail("recv");
	printf("%llu received\n", (unsigned long long)number);
	return 0;
}

static int serve(int listener, int keep)
{
	int fd, number;
	sigset_t look;

	sigemptyset(&look);
	sigaddset(&look, SIGUSR1);
	sigprocmask(SIG_BLOCK, &look, NULL);
	if (listen(listener, 1) != 0)
		return fail("listen");
	printf("listening\n");
	fflush(stdout);
	fd = accept(listener, NULL, NULL);
	if (fd < 0)
		return fail("accept");
	if (keep)
		sigwait(&look, &number);
	return receive(fd);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	int room = 1 << 27, one = 1, keep;
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (argc < 4 || !inet_aton(argv[2], &address.sin_addr)) {
		fprintf(stderr, "usage: hoard push ADDRESS PORT RATE | pull|keep ADDRESS PORT\n");
		return 2;
	}
	address.sin_port = htons((uint16_t)atoi(argv[3]));
	if (strcmp(argv[1], "push") == 0 && argc == 5) {
		unsigned int burst = (unsigned int)atoi(argv[4]) / TICKS;

		if (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0)
			return fail("connect");
		return push(fd, burst < BURST ? burst : BURST);
	}
	keep = strcmp(argv[1], "keep") == 0;
	if (keep && setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) != 0)
		return fail("SO_RCVBUFFORCE");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0)
		return fail("bind");
	return serve(fd, keep);
}
