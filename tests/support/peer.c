/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the tests need on both sides of a guest's NIC and busybox does not have.
 *
 *	peer send ADDRESS PORT BYTES SEED	pseudo-random bytes over TCP; prints their number and SHA-256
 *	peer receive ADDRESS PORT		the other side; ends when the sender does, prints the same
 *	peer tell GROUP PORT ADDRESS TEXT	one datagram to a multicast group, by the interface with ADDRESS
 *	peer listen GROUP PORT ADDRESS		joins the group there, prints the first datagram
 *
 * The bytes are the AES-128-CTR key stream of SEED, so no two places in them are alike: a lost, doubled or swapped
 * segment changes the sum. A guest under User-Mode Linux pays some 70 us for each system call, and `openssl dgst`
 * reads 8 KiB at a time: hence the large blocks. What waits for a peer prints "listening" when it does.
 */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <openssl/evp.h>

#define BLOCK (1u << 20)

static unsigned char block[BLOCK];
static const unsigned char zeros[BLOCK];

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int tcp_socket(const char *address, const char *port, int passive)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | (passive ? AI_PASSIVE : 0) };
	struct addrinfo *info;
	int one = 1, fd;

	if (getaddrinfo(address, port, &hints, &info) != 0)
		return -1;
	fd = socket(info->ai_family, info->ai_socktype, 0);
	if (fd >= 0 && passive) {
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (bind(fd, info->ai_addr, info->ai_addrlen) != 0 || listen(fd, 1) != 0) {
			close(fd);
			fd = -1;
		}
	} else if (fd >= 0 && connect(fd, info->ai_addr, info->ai_addrlen) != 0) {
		close(fd);
		fd = -1;
	}
	freeaddrinfo(info);
	return fd;
}

static int print_sum(EVP_MD_CTX *sum, uint64_t bytes)
{
	unsigned char digest[EVP_MAX_MD_SIZE];
	unsigned int length, i;

	if (!EVP_DigestFinal_ex(sum, digest, &length))
		return 1;
	printf("%llu ", (unsigned long long)bytes);
	for (i = 0; i < length; i++)
		printf("%02x", digest[i]);
	printf("\n");
	return 0;
}

static int send_stream(int fd, uint64_t bytes, uint64_t seed, EVP_MD_CTX *sum)
{
	EVP_CIPHER_CTX *cipher = EVP_CIPHER_CTX_new();
	unsigned char key[16] = { 0 }, iv[16] = { 0 };
	uint64_t left = bytes;
	int length;

	memcpy(key, &seed, sizeof(seed));
	if (!cipher || !EVP_EncryptInit_ex(cipher, EVP_aes_128_ctr(), NULL, key, iv))
		return 1;
	while (left > 0) {
		size_t size = left < BLOCK ? left : BLOCK, done = 0;

		if (!EVP_EncryptUpdate(cipher, block, &length, zeros, (int)size))
			return 1;
		EVP_DigestUpdate(sum, block, size);
		while (done < size) {
			ssize_t n = send(fd, block + done, size - done, MSG_NOSIGNAL);

			if (n <= 0)
				return fail("send");
			done += (size_t)n;
		}
		left -= size;
	}
	EVP_CIPHER_CTX_free(cipher);
	if (shutdown(fd, SHUT_WR) != 0)
		return fail("shutdown");
	return read(fd, block, 1) == 0 ? print_sum(sum, bytes) : fail("the receiver's end of stream");
}

static int receive_stream(int listener, EVP_MD_CTX *sum)
{
	uint64_t bytes = 0;
	ssize_t n;
	int fd;

	printf("listening\n");
	fflush(stdout);
	fd = accept(listener, NULL, NULL);
	if (fd < 0)
		return fail("accept");
	while ((n = recv(fd, block, BLOCK, MSG_WAITALL)) > 0) {
		EVP_DigestUpdate(sum, block, (size_t)n);
		bytes += (uint64_t)n;
	}
	if (n < 0)
		return fail("recv");
	close(fd);
	return print_sum(sum, bytes);
}

static int transfer(char **argv, int sending)
{
	EVP_MD_CTX *sum = EVP_MD_CTX_new();
	int fd;

	if (!sum || !EVP_DigestInit_ex(sum, EVP_sha256(), NULL))
		return 1;
	fd = tcp_socket(argv[2], argv[3], !sending);
	if (fd < 0)
		return fail(sending ? "connect" : "listen");
	return sending ? send_stream(fd, strtoull(argv[4], NULL, 10), strtoull(argv[5], NULL, 10), sum)
		       : receive_stream(fd, sum);
}

static int multicast(char **argv, const char *text)
{
	struct sockaddr_in group = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[3])) };
	struct ip_mreq membership;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	ssize_t n;

	if (!inet_aton(argv[2], &group.sin_addr) || !inet_aton(argv[4], &membership.imr_interface))
		return fail("address");
	membership.imr_multiaddr = group.sin_addr;
	if (text) {
		if (setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, &membership.imr_interface, sizeof(struct in_addr)) != 0)
			return fail("IP_MULTICAST_IF");
		n = sendto(fd, text, strlen(text), 0, (struct sockaddr *)&group, sizeof(group));
		return n < 0 ? fail("sendto") : 0;
	}
	if (bind(fd, (struct sockaddr *)&group, sizeof(group)) != 0 ||
	    setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &membership, sizeof(membership)) != 0)
		return fail("joining the group");
	printf("listening\n");
	fflush(stdout);
	n = recv(fd, block, BLOCK, 0);
	if (n < 0)
		return fail("recv");
	printf("heard %.*s\n", (int)n, block);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 6 && strcmp(argv[1], "send") == 0)
		return transfer(argv, 1);
	if (argc == 4 && strcmp(argv[1], "receive") == 0)
		return transfer(argv, 0);
	if (argc == 6 && strcmp(argv[1], "tell") == 0)
		return multicast(argv, argv[5]);
	if (argc == 5 && strcmp(argv[1], "listen") == 0)
		return multicast(argv, NULL);
	fprintf(stderr, "usage: peer send ADDRESS PORT BYTES SEED | receive ADDRESS PORT | "
			"tell GROUP PORT ADDRESS TEXT | listen GROUP PORT ADDRESS\n");
	return 2;
}
