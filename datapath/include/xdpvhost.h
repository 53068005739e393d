/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The data plane's public face: what control may ask of it, and nothing else.
 *
 * Everything here is opaque handles, plain fixed-width structs and negative errno results, so that ctl/datapath.py
 * can mirror it without a compiler. xv_layout() exports every struct's size and offsets, and a test compares them
 * with the mirror; xv_abi() is what the loader checks first.
 *
 * Life of an object: xv_*_new() makes it, xv_publish() makes the workers see it, a later xv_publish() that leaves it
 * out makes them forget it (they have when the call returns), and only then may xv_*_free() be called. File
 * descriptors and mappings named in a conf struct stay the caller's and must outlive the object.
 *
 * Only control threads call these functions, one at a time; workers are inside xv_worker_run().
 */
#ifndef XDPVHOST_H
#define XDPVHOST_H

#include <stdint.h>

#define XV_API __attribute__((visibility("default")))

#define XV_ABI 10u /* changes with every change of a struct or of a meaning below */

#define XV_MAX_WORKERS 64u
#define XV_MAX_REGIONS 509u    /* memory slots of one guest: what VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS grants */
#define XV_MAX_PAIRS 128u      /* queue pairs of one guest */
#define XV_MAX_RING_SIZE 32768u /* virtio 1.2, 2.7 */
#define XV_MAX_MACS 16u        /* unicast addresses that a guest may listen to besides its own */
#define XV_NO_RING UINT32_MAX
#define XV_HOST_PORT 0x80000000u /* in xv_mac_conf.guest */
#define XV_MAX_LEARNED 1024u   /* of one guest */
#define XV_MAX_ADDRESSES 64u   /* IP addresses of one guest */
#define XV_CAPTURE_LEAST (256u << 10) /* bytes of a capture's ring: it holds some of the largest frames */
#define XV_VLAN_ANY 0xffffu    /* in xv_mac_conf.vlan: every tagged frame for this MAC, whatever its VLAN */

/* How a worker waits for work. */
enum xv_poll {
	XV_POLL_ADAPTIVE = 0,  /* poll for spin_us after the last frame, then sleep until notified */
	XV_POLL_BUSY = 1,      /* never sleep */
	XV_POLL_INTERRUPT = 2, /* sleep as soon as there is nothing to do */
};

/* Why a frame was dropped; xv_drop_name() names it in metrics. Counted at the guest whose frame it was. */
enum xv_drop {
	XV_DROP_NOT_CONNECTED, /* to a guest with no front-end, or with its rings stopped or disabled */
	XV_DROP_NO_BUFFERS,    /* to a guest that has no receive buffer free */
	XV_DROP_TOO_BIG,       /* larger than the guest's buffers, than a UMEM frame, or than the device's MTU allows */
	XV_DROP_RUNT,          /* from a guest: shorter than an Ethernet header */
	XV_DROP_BAD_HEADER,    /* from a guest: virtio-net header missing, or asking for what was not negotiated */
	XV_DROP_BAD_CHAIN,     /* from a guest: a descriptor chain the device may not read */
	XV_DROP_NO_FRAMES,     /* to the NIC: no UMEM frame free, the NIC is slower than the guest */
	XV_DROP_DISABLED,      /* from a guest: the ring is disabled, frames are consumed and discarded */
	XV_DROP_NO_UPLINK,     /* from a guest: not for a guest here, and there is no NIC queue to send on */
	XV_DROP_FILTERED,      /* to a guest: an address or a VLAN that it has not asked for; no loss */
	XV_DROP_LINK_DOWN,     /* to a tap that is down, or was deleted; from or to a guest whose link is switched off */
	XV_DROP_SPOOFED,       /* from a guest: a source MAC that is not its own */
	XV_DROP_IP_SPOOFED,    /* from a guest: an IP address that is not its own, or a router's or DHCP server's word */
	XV_DROP_VLAN,          /* from or to a guest: a VLAN that it is not in, or a tag where it may send none */
	XV_DROP_ISOLATED,      /* from a guest: for another guest, and one of the two is isolated */
	XV_DROP_STORM,         /* from a guest: more broadcast and multicast than its limit */
	XV_DROP_RATE,          /* to a guest: more than its limit */
	XV_DROP_MAX
};

/* Classes of control commands (virtio 1.2, 5.1.6.5); xv_ctrl_name() names them in metrics. */
enum xv_ctrl_class {
	XV_CTRL_RX,
	XV_CTRL_MAC,
	XV_CTRL_VLAN,
	XV_CTRL_ANNOUNCE,
	XV_CTRL_MQ,
	XV_CTRL_GUEST_OFFLOADS,
	XV_CTRL_OTHER, /* a class that there is not, or no whole command */
	XV_CTRL_CLASSES
};

/* Why the data plane gave a guest up; control ends the connection. xv_fault_name() has the sentence. */
enum xv_fault_code {
	XV_FAULT_NONE,
	XV_FAULT_MEMORY_GONE,   /* SIGBUS: a region was truncated under us */
	XV_FAULT_AVAIL_INDEX,   /* avail.idx ran ahead by more than the ring's size */
	XV_FAULT_HEAD,          /* an avail entry names a descriptor outside the table */
	XV_FAULT_CHAIN,         /* a loop, a next outside the table, a bad indirect table */
	XV_FAULT_ADDRESS,       /* a descriptor points outside the guest's memory */
	XV_FAULT_CALL_BLOCKED,  /* writing the call descriptor blocked */
	XV_FAULT_MAX
};

struct xv_dp;    /* one data plane: workers, snapshot */
struct xv_mem;   /* a guest's memory table, immutable */
struct xv_guest; /* a guest: its counters and locks, as long as it is configured */
struct xv_vring; /* one started virtqueue */
struct xv_nicq;  /* one NIC queue: UMEM, fill, completion and TX ring */
struct xv_xsk;   /* one guest's receiving AF_XDP socket on one NIC queue */
struct xv_tapq;  /* one queue of a tap: the way to the network, as NIC queues are */
struct xv_packet; /* packet socket that hears a NIC's broadcast and multicast, or one guest's frames */
struct xv_capture; /* copies a port's frames for another process to read */
struct xv_capread; /* that process's end of it */

struct xv_dp_conf {
	uint32_t workers;
	uint32_t poll;    /* enum xv_poll */
	uint32_t spin_us; /* adaptive: microseconds of polling after the last frame */
	uint32_t reserved;
};

struct xv_region {
	uint64_t gpa;       /* guest physical address of the first byte */
	uint64_t size;      /* bytes */
	uint64_t user_addr; /* the front-end's virtual address of the first byte */
	uint64_t host;      /* where control mapped it here */
};

#define XV_VRING_LOG_USED 1u /* writes to the ring itself are logged too (VHOST_VRING_F_LOG) */

struct xv_vring_conf {
	/* front-end virtual addresses, translated and checked against the memory table; of a packed ring: descriptor ring,
	 * driver area, device area */
	uint64_t desc, avail, used;
	uint64_t features;          /* negotiated virtio features; VHOST_F_LOG_ALL among them: `log` is written */
	uint64_t log;               /* struct xv_mem * whose one region, at 0, is the dirty bitmap, or 0 */
	uint64_t inflight;          /* struct xv_mem * whose one region, at 0, is the in-flight region, or 0 */
	uint64_t inflight_offset;   /* of this ring's part in it, xv_inflight_size() bytes */
	uint32_t num;               /* descriptors */
	/*
	 * Where to go on, as in SET_VRING_BASE. Split: an avail index; where the guest's used index disagrees, that one
	 * counts. Packed: bits 0-14 avail index, 15 its wrap counter, 16-30 used index, 31 its wrap counter; what an
	 * in-flight region says counts more.
	 */
	uint32_t base;
	int32_t kick_fd, call_fd;   /* -1: none */
	uint32_t enabled;
	uint32_t flags;             /* XV_VRING_* */
};

/* One AF_XDP ring as the kernel mapped it (linux/if_xdp.h: struct xdp_ring_offset). Addresses in this process. */
struct xv_ring {
	uint64_t producer, consumer, flags, ring;
	uint32_t mask, size;
};

#define XV_NICQ_PARTIAL_CSUM 1u /* local stacks send into this device: frames may carry only a pseudo-header checksum */
#define XV_NICQ_SG 2u           /* bound with XDP_USE_SG: a frame may have several pieces, each a chunk of its own */
#define XV_NICQ_TX_CSUM 4u      /* the device finishes checksums: UMEM registered with XV_TX_METADATA bytes for it */
#define XV_TX_METADATA 24u      /* sizeof(struct xsk_tx_metadata) */

/* GSO frames that a device takes whole. */
#define XV_NICQ_GSO_TCP4 1u
#define XV_NICQ_GSO_TCP6 2u
#define XV_NICQ_GSO_ECN 4u /* of either, with TCP's ECN flags */
#define XV_NICQ_GSO_UDP 8u

struct xv_nicq_conf {
	uint64_t umem, umem_size;
	uint32_t chunk;               /* bytes a frame, a power of two */
	uint32_t rx_frames, tx_frames; /* frames [0, rx_frames) go to the fill ring, the next tx_frames are for sending */
	uint32_t flags;
	struct xv_ring fill, comp, tx;
	int32_t fd;     /* the socket that owns tx */
	uint32_t queue; /* the NIC's queue number */
	uint32_t gso;   /* XV_NICQ_GSO_*: frames to be sent whole by gso_fd; 0: all are cut */
	int32_t gso_fd; /* AF_PACKET socket, bound to the NIC, without protocol; PACKET_VNET_HDR on */
};

struct xv_xsk_conf {
	struct xv_ring rx;
	int32_t fd;
	uint32_t reserved;
};

/* One queue of a tap. */
struct xv_tapq_conf {
	int32_t fd;          /* of /dev/net/tun, attached with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; O_NONBLOCK */
	uint32_t header_len; /* TUNSETVNETHDRSZ: 10 or 12 */
	uint32_t gso;        /* XV_NICQ_GSO_*: frames that are written whole; 0: all are cut */
	uint32_t queue;      /* its number: a hint for the queue pair that its frames go to */
};

/* What a guest may do. Enforced where its frames enter the switch, and where frames would reach it. */
#define XV_POLICY_SPOOF_CHECK 1u /* it sends only from addresses that xv_mac_conf gives it, or that it has learned */
#define XV_POLICY_ISOLATED 2u    /* it only talks to the NIC: no guest and no host port */
#define XV_POLICY_IP_CHECK 4u    /* ARP, ND, DHCP and IP only from its `addresses` */
#define XV_POLICY_LINK_DOWN 8u   /* nothing in, nothing out */

struct xv_ip {
	uint8_t address[16]; /* an IPv4 address is in the first 4 bytes */
	uint32_t version;    /* 4 or 6 */
};

/* A token bucket: `rate` units a second on average, `burst` of them at once. rate 0: no limit. */
struct xv_bucket_conf {
	uint64_t rate, burst;
};

struct xv_policy_conf {
	uint64_t trunk;     /* uint64_t[64]: bit v % 64 of word v / 64 is VLAN v, in which it sends and receives tagged; 0: no trunk */
	uint64_t addresses; /* struct xv_ip[nr_addresses] */
	uint32_t nr_addresses;
	uint32_t access;    /* the VLAN that its untagged frames are in, and it may send no other; 0: it is no access port */
	uint32_t flags;     /* XV_POLICY_* */
	uint32_t learn;     /* source MACs that it may add to its own at a time, up to XV_MAX_LEARNED */
	struct xv_bucket_conf tx, rx; /* bytes of frames, from and to it */
	struct xv_bucket_conf storm;  /* broadcast and multicast frames from it */
};

struct xv_guest_conf {
	uint64_t guest;    /* struct xv_guest * */
	uint64_t rings;    /* struct xv_vring *[nr_rings], by vring index, NULL where not started: even RX, odd TX */
	uint64_t xsks;     /* struct xv_xsk *[nr_xsks]: where its frames arrive */
	uint64_t packet;   /* struct xv_packet *: where they arrive without XDP, or 0 */
	uint64_t features; /* negotiated virtio features, 0 when no front-end is connected */
	uint64_t policy;   /* struct xv_policy_conf *, or 0: untagged and every VLAN, nothing checked, no limit */
	uint64_t capture;  /* struct xv_capture * that its frames are copied to, or 0 */
	uint32_t nr_rings, nr_xsks;
	uint32_t ctrl;     /* vring index of the control virtqueue, XV_NO_RING when the front-end has it */
	uint32_t nic;      /* index of its uplink in xv_snapshot_conf.nics */
	uint32_t worker;   /* of queue pair 0; pair i is on worker (worker + i) % workers */
	uint32_t max_pairs; /* queue pairs that the control virtqueue may switch on */
	uint32_t uplink;   /* pair i sends on NIC queue, or to tap, (uplink + i) % queues, whichever worker it is on */
	uint32_t reserved;
};

struct xv_nic_conf {
	uint64_t queues; /* struct xv_nicq *[nr_queues] */
	uint64_t mcast;  /* struct xv_packet *, or 0 */
	uint64_t taps;   /* struct xv_tapq *[nr_taps]: instead of NIC queues */
	uint64_t host;   /* struct xv_tapq *: the host's own port among the guests of this NIC, or 0 */
	uint64_t host_xsks; /* struct xv_xsk *[nr_host_xsks]: where frames from the NIC for that port's address arrive */
	uint64_t host_packet; /* struct xv_packet *: where they arrive without XDP, or 0 */
	uint64_t capture; /* struct xv_capture * that the guests' frames from and to it are copied to, or 0 */
	uint32_t nr_queues, nr_taps;
	uint32_t mtu;    /* of the device, in bytes after the Ethernet header and tags */
	uint32_t nr_host_xsks; /* 0 without a host port; its socket i is on worker (nic's index + i) % workers */
};

struct xv_mac_conf {
	uint8_t mac[6];
	uint16_t vlan;  /* 0: untagged and priority-tagged frames; 1-4094; XV_VLAN_ANY */
	uint32_t guest; /* index in xv_snapshot_conf.guests, or XV_HOST_PORT + index in xv_snapshot_conf.nics */
};

struct xv_snapshot_conf {
	uint64_t guests, nics, macs; /* arrays of the structs above */
	uint32_t nr_guests, nr_nics, nr_macs;
	uint32_t reserved;
};

/* ---- counters: 64-bit words with one writer each, read without a lock ---- */

struct xv_rx_counters { /* towards the guest; the writer holds the queue's lock */
	uint64_t packets, bytes;
	uint64_t copied_bytes; /* payload bytes that the CPU copied to deliver `bytes` */
	uint64_t kicks;        /* wake-ups by the guest's notifications for this ring */
	uint64_t calls;        /* interrupts sent to the guest */
	uint64_t calls_failed;
	uint64_t csum_partial;  /* frames handed over as NEEDS_CSUM */
	uint64_t csum_finished; /* frames whose checksum was completed during the copy */
	uint64_t drops[XV_DROP_MAX];
} __attribute__((aligned(64)));

struct xv_tx_counters { /* from the guest; the writer is the ring's worker */
	uint64_t packets; /* chains that the guest sent, delivered or not */
	uint64_t bytes;   /* of those that were frames: not bad_chain, bad_header, runt or too_big */
	uint64_t kicks;   /* wake-ups by the guest's notifications: while the worker polls there are none */
	uint64_t calls, calls_failed;
	uint64_t reserved;
	uint64_t drops[XV_DROP_MAX];
} __attribute__((aligned(64)));

struct xv_xsk_counters {
	uint64_t packets, bytes;
} __attribute__((aligned(64)));

struct xv_nicq_counters { /* the writer holds the TX lock, or adds atomically */
	uint64_t tx_packets, tx_bytes; /* by AF_XDP */
	uint64_t copied_bytes; /* payload bytes that the CPU copied into UMEM for tx_bytes */
	uint64_t csum_finished;
	uint64_t sendto_calls;
	uint64_t sendto_busy; /* frames that the kernel took and dropped: EBUSY of sendto(), ENOBUFS for a GSO frame; atomic */
	uint64_t gso_packets, gso_bytes; /* GSO frames that the packet socket took whole: the kernel copied them, we did not */
} __attribute__((aligned(64)));

struct xv_tapq_counters {
	/* the writer is the queue's worker */
	uint64_t rx_packets, rx_bytes; /* read, and found to be frames; GSO frames count once */
	uint64_t rx_dropped;   /* read, and not what their virtio-net header says */
	uint64_t rx_unclaimed; /* of rx_packets: for no guest here, as a bridge floods them */
	uint64_t drops[XV_DROP_MAX]; /* a host port: of rx_packets, what the NIC did not take */
	uint64_t gone;         /* errno with which the tap ended, 0 while it is there */
	/* added to atomically by every worker; the kernel copied all of these from the guest's memory, we did not */
	uint64_t tx_packets, tx_bytes;
	uint64_t tx_gso_packets, tx_gso_bytes; /* GSO frames written whole, not in tx_packets and tx_bytes */
	uint64_t tx_csum_partial; /* of tx_packets: handed over with an open checksum */
	uint64_t tx_dropped; /* a host port: frames from the NIC that it did not take */
} __attribute__((aligned(64)));

struct xv_packet_counters {
	uint64_t packets, bytes;
	uint64_t dropped; /* too long, too short, or not what their virtio-net header says */
} __attribute__((aligned(64)));

struct xv_capture_counters { /* added to atomically by every worker */
	uint64_t frames, bytes; /* in the ring: frames, and bytes kept of them */
	uint64_t lost;          /* frames that found it full, or a worker that has spent its share of time */
} __attribute__((aligned(64)));

struct xv_capread_counters {
	uint64_t seen;  /* frames read */
	uint64_t taken; /* of those, what filter and conf let through */
	uint64_t lost;  /* as the writers said when blocks were asked for last */
};

struct xv_worker_counters {
	uint64_t polls_busy, polls_idle; /* loop turns that moved frames, and that found none */
	uint64_t sleeps, wakeups;
	uint64_t cycles_busy;   /* timestamp-counter cycles of the turns that moved frames */
	uint64_t packets;       /* frames read from any port */
	uint64_t heartbeat;     /* loop turns, for the watchdog */
} __attribute__((aligned(64)));

/* Net device state that the guest set through the control virtqueue; single words, read without a lock. */
struct xv_ctrl_state {
	uint32_t pairs;      /* queue pairs switched on by VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET or _RSS_CONFIG */
	uint32_t rx_mode;    /* bit VIRTIO_NET_CTRL_RX_*: last value of each command */
	uint32_t announced;  /* times that it acknowledged VIRTIO_NET_S_ANNOUNCE */
	uint32_t adopted;    /* 1: it had been configured before this session, by commands that we have not seen */
	uint64_t accepted[XV_CTRL_CLASSES], refused[XV_CTRL_CLASSES]; /* commands, by their answer */
};

/* The addresses that a guest asks for by VIRTIO_NET_CTRL_MAC_*. */
struct xv_mac_request {
	uint8_t mac[6];     /* its own */
	uint16_t nr;        /* others */
	uint8_t others[XV_MAX_MACS][6];
};

/* An address that a guest has used as a source without having it, in the data plane's table (policy.learn). */
struct xv_learned {
	uint8_t mac[6];
	uint16_t vlan;
	uint32_t idle_ms; /* since it was last used, or denied */
	uint32_t denied;  /* xv_guest_deny() */
};

struct xv_fault { /* why the guest was given up */
	uint32_t code; /* enum xv_fault_code; written last */
	uint32_t ring; /* vring index */
	uint64_t detail;
};

/* ---- layout table, for the mirror's test ---- */
struct xv_layout_entry {
	const char *structure, *field; /* field NULL: the struct's own size */
	uint32_t offset, size;
};
XV_API uint32_t xv_abi(void);
XV_API const struct xv_layout_entry *xv_layout(uint32_t *count);
XV_API const char *xv_drop_name(uint32_t drop);   /* NULL past the end */
XV_API const char *xv_fault_name(uint32_t code);  /* NULL past the end */
XV_API const char *xv_ctrl_name(uint32_t class);  /* NULL past the end */
XV_API uint64_t xv_features(void); /* virtio feature bits that the rings and the copy implement */

/* ---- a data plane and its workers ---- */
XV_API int xv_dp_new(const struct xv_dp_conf *conf, struct xv_dp **out);
XV_API void xv_dp_free(struct xv_dp *dp); /* after every worker has returned */
XV_API int xv_worker_run(struct xv_dp *dp, uint32_t worker); /* the calling thread becomes the worker until xv_dp_stop */
XV_API void xv_dp_stop(struct xv_dp *dp);
XV_API int xv_dp_event_fd(const struct xv_dp *dp); /* readable when a guest faulted or changed its control state */
XV_API uint64_t xv_cycles_per_us(const struct xv_dp *dp); /* what the workers' cycles are counted in */
XV_API void xv_dp_watchdog(struct xv_dp *dp);      /* call a few times a second: frees a worker stuck in a call fd */
XV_API const struct xv_worker_counters *xv_worker_counters(const struct xv_dp *dp, uint32_t worker);
XV_API int xv_publish(struct xv_dp *dp, const struct xv_snapshot_conf *conf); /* returns when no worker sees the old one */
XV_API void xv_quiesce(struct xv_dp *dp); /* returns when every worker has begun a new turn */

/* ---- guests ---- */
XV_API int xv_guest_new(uint32_t max_pairs, struct xv_guest **out);
XV_API void xv_guest_free(struct xv_guest *guest);
XV_API const struct xv_rx_counters *xv_guest_rx_counters(const struct xv_guest *guest, uint32_t pair);
XV_API const struct xv_tx_counters *xv_guest_tx_counters(const struct xv_guest *guest, uint32_t pair);
XV_API const struct xv_ctrl_state *xv_guest_ctrl(const struct xv_guest *guest);
XV_API const struct xv_fault *xv_guest_fault(const struct xv_guest *guest);
XV_API void xv_guest_set_mac(struct xv_guest *guest, const uint8_t mac[6]); /* as configured; before it is published */
XV_API void xv_guest_reset(struct xv_guest *guest); /* forget fault and control state: a new front-end session */
XV_API void xv_guest_reset_ctrl(struct xv_guest *guest); /* forget control state: a new driver. No ring is published. */
XV_API void xv_guest_set_pairs(struct xv_guest *guest, uint32_t pairs); /* a driver resumes. No ring is published. */
XV_API int xv_guest_mac_asks(const struct xv_guest *guest); /* whether it asks for other addresses */
/* 1: it asks for these addresses, and waits for xv_guest_mac_answer(); 0: it does not ask. */
XV_API int xv_guest_mac_request(struct xv_guest *guest, struct xv_mac_request *out);
/* 0, or -ECANCELED: it was refused meanwhile, because this took too long, or its session ended. Then undo the change. */
XV_API int xv_guest_mac_answer(struct xv_guest *guest, int granted);
/*
 * What it has learned: fills out[0..n), answers how many there are. A new one makes xv_dp_event_fd() readable. Frames from it
 * are forwarded at once; frames to it only when an xv_mac_conf says so.
 */
XV_API uint32_t xv_guest_learned(struct xv_guest *guest, struct xv_learned *out, uint32_t n);
XV_API void xv_guest_forget(struct xv_guest *guest, const uint8_t mac[6], uint16_t vlan); /* it is too old */
/* Frames from a learned address are dropped as XV_DROP_SPOOFED until it is forgotten. It takes one of policy.learn places. */
XV_API void xv_guest_deny(struct xv_guest *guest, const uint8_t mac[6], uint16_t vlan);
/* Bytes that it takes: counters, rules and table of learned addresses. Without rings and sockets. */
XV_API uint64_t xv_guest_bytes(const struct xv_guest *guest);
XV_API void xv_guest_announce(struct xv_guest *guest, const uint8_t mac[6]); /* send a RARP for it on the uplink */

XV_API int xv_mem_new(const struct xv_region *regions, uint32_t count, struct xv_guest *guest, struct xv_mem **out);
XV_API void xv_mem_free(struct xv_mem *mem);

/* -EINVAL: size, alignment, base or in-flight part; -EFAULT: a part of the ring is not inside one region; -ENOMEM */
XV_API int xv_vring_new(struct xv_mem *mem, const struct xv_vring_conf *conf, struct xv_vring **out);
XV_API void xv_vring_free(struct xv_vring *vring);
XV_API uint64_t xv_vring_bytes(void); /* that one takes here; the ring itself is the guest's memory */
XV_API uint32_t xv_vring_base(const struct xv_vring *vring); /* where to go on, as xv_vring_conf.base */
XV_API uint32_t xv_inflight_size(uint32_t num, int packed);   /* bytes of one ring's part of an in-flight region */
/* Interrupt through call_fd from now on, and once at once; then xv_quiesce() before the old one is closed. */
XV_API void xv_vring_set_call(struct xv_vring *vring, int call_fd);
XV_API void xv_vring_set_enabled(struct xv_vring *vring, int enabled);
/*
 * `vring` is the same ring as `old` with other settings, and xv_publish() is about to put it in its place: it goes on where
 * `old` is then, no buffer is lost or seen twice, and no frame finds neither. Not for rings with an in-flight part.
 */
XV_API void xv_vring_follow(struct xv_vring *vring, const struct xv_vring *old);

/* ---- NIC side ---- */
XV_API int xv_nicq_new(const struct xv_nicq_conf *conf, struct xv_nicq **out); /* fills the fill ring */
XV_API void xv_nicq_free(struct xv_nicq *nicq);
XV_API const struct xv_nicq_counters *xv_nicq_counters(const struct xv_nicq *nicq);
XV_API int xv_xsk_new(struct xv_nicq *nicq, const struct xv_xsk_conf *conf, struct xv_xsk **out);
XV_API void xv_xsk_free(struct xv_xsk *xsk); /* before its nicq: frames in the ring go back to the fill ring */
XV_API uint64_t xv_xsk_bytes(void); /* that one takes; its ring is the kernel's memory */
XV_API const struct xv_xsk_counters *xv_xsk_counters(const struct xv_xsk *xsk);
/* -EINVAL: the descriptor may block, or header_len; -EBADF */
XV_API int xv_tapq_new(const struct xv_tapq_conf *conf, struct xv_tapq **out);
XV_API void xv_tapq_free(struct xv_tapq *tap);
XV_API const struct xv_tapq_counters *xv_tapq_counters(const struct xv_tapq *tap);
XV_API int xv_packet_new(int fd, struct xv_packet **out); /* AF_PACKET socket, PACKET_VNET_HDR and PACKET_AUXDATA on */
XV_API void xv_packet_free(struct xv_packet *packet);
XV_API uint64_t xv_packet_bytes(void); /* that one takes, room for frames included */
XV_API const struct xv_packet_counters *xv_packet_counters(const struct xv_packet *packet);

/* ---- captures ---- */
/*
 * `memory`: `size` bytes, a page and a power of two, at a page's address, shared with the process that reads, which can't make
 * them go away (a sealed memfd). Of each frame `snaplen` bytes are kept. -EINVAL, -ENOMEM, -EIO
 */
XV_API int xv_capture_new(void *memory, uint64_t size, uint32_t snaplen, struct xv_capture **out);
XV_API void xv_capture_end(struct xv_capture *capture); /* no port publishes it any more: tell the reader */
XV_API void xv_capture_free(struct xv_capture *capture); /* the memory stays the caller's */
XV_API const struct xv_capture_counters *xv_capture_counters(const struct xv_capture *capture);

#define XV_CAPTURE_IN 1u  /* to the guest; at a NIC, from the network */
#define XV_CAPTURE_OUT 2u /* from the guest; at a NIC, to the network */

struct xv_capread_conf {
	uint64_t memory, size; /* of xv_capture_new(), as this process has it mapped */
	uint64_t filter;       /* address of libpcap's bpf_filter(), or 0 */
	uint64_t program;      /* struct bpf_insn *, for it */
	uint32_t directions;   /* XV_CAPTURE_* */
	uint32_t drops_only;   /* 1: only frames that were dropped */
};

/* -EINVAL; -EPROTO: the writer is of another version, or there is none */
XV_API int xv_capread_new(const struct xv_capread_conf *conf, struct xv_capread **out);
XV_API void xv_capread_free(struct xv_capread *reader);
/*
 * Read up to `frames` wanted frames and write each as an Enhanced Packet Block of pcapng to out[0..room): bytes written. 0:
 * there was none (`seen` tells whether there were others), or no room: 70000 bytes are enough for any. It looks at half of
 * the ring at most. -EBADMSG: the ring is damaged
 */
XV_API int64_t xv_capread_blocks(struct xv_capread *reader, void *out, uint64_t room, uint64_t frames);
XV_API int xv_capread_ended(const struct xv_capread *reader); /* whether nothing comes after what is there */
XV_API const struct xv_capread_counters *xv_capread_counters(const struct xv_capread *reader);

#endif
