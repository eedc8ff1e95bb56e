// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * A traffic source. BPF_PROG_TEST_RUN runs it on live frames, once per frame. It fills in the flow
 * and the sequence number and redirects the frame into an interface. generator.rs has the layout.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MARK_EVERY 512          /* frames between two readings of the clock */
#define LATE_NS 1000000         /* catching up on a later burst would overrun the receiver */
#define SPINS_MAX (1 << 20)     /* readings of the clock before a burst; some 30 ms */

/* The layout of `Config` in generator.rs. */
struct generator_config {
	__u64 frames_per_second; /* 0: as fast as possible */
	__u32 burst;             /* frames sent between two checks of the schedule */
	__u32 interface;         /* index, in the namespace of the running thread */
	__u32 flows;
	__u32 client_base;       /* addresses, in host order; flow f comes from client_base + f */
	__u32 server;
	__u32 server_port;
	__u32 checksum;          /* sum of the IPv4 header's 16-bit words without the client's address */
	__u32 both_directions;   /* every other round over the flows goes from server to client */
};

/* The layout of `State` in generator.rs. */
struct generator_state {
	__u64 offered;   /* frames handed to the redirect */
	__u64 start_ns;  /* origin of the schedule */
	__u64 first_ns;  /* when the first frame was made */
	__u64 mark_ns;   /* when frame number `mark` was made */
	__u64 mark;
	__u64 late;      /* times the schedule was given up */
	__u32 flow;
	__u32 backwards;
};

/* The frame on the wire; the sequence number follows the UDP header. */
struct frame {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
	__be64 sequence;
} __attribute__((packed));

const volatile struct generator_config CONFIG = {};
struct generator_state STATE = {};

static long reached(__u32 i, __u64 *due)
{
	return bpf_ktime_get_ns() >= *due;
}

static __always_inline void keep_schedule(__u64 sequence)
{
	__u64 now = bpf_ktime_get_ns(), due;

	if (!STATE.start_ns)
		STATE.start_ns = now;
	due = STATE.start_ns + sequence * 1000000000ULL / CONFIG.frames_per_second;
	if (now < due) {
		bpf_loop(SPINS_MAX, reached, &due, 0);
	} else if (now > due + LATE_NS) {
		STATE.late++;
		STATE.start_ns += now - due;
	}
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
	struct frame *frame = (void *)(long)ctx->data;
	__u64 sequence = STATE.offered;
	__u32 client, sum;
	__be16 port;

	if ((void *)(frame + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	if (CONFIG.frames_per_second && sequence % CONFIG.burst == 0)
		keep_schedule(sequence);
	if (sequence % MARK_EVERY == 0) {
		STATE.mark_ns = bpf_ktime_get_ns();
		STATE.mark = sequence;
		if (!sequence)
			STATE.first_ns = STATE.mark_ns;
	}
	STATE.offered = sequence + 1;

	client = CONFIG.client_base + STATE.flow;
	port = bpf_htons((__u16)(STATE.flow * 0x9e37)); /* an odd factor: all flows below 65,536 differ */
	if (STATE.backwards) {
		frame->ip.saddr = bpf_htonl(CONFIG.server);
		frame->ip.daddr = bpf_htonl(client);
		frame->udp.source = bpf_htons((__u16)CONFIG.server_port);
		frame->udp.dest = port;
	} else {
		frame->ip.saddr = bpf_htonl(client);
		frame->ip.daddr = bpf_htonl(CONFIG.server);
		frame->udp.source = port;
		frame->udp.dest = bpf_htons((__u16)CONFIG.server_port);
	}
	sum = CONFIG.checksum + (client >> 16) + (client & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	frame->ip.check = bpf_htons((__u16)~sum);
	frame->sequence = bpf_cpu_to_be64(sequence);

	if (++STATE.flow >= CONFIG.flows) {
		STATE.flow = 0;
		STATE.backwards = CONFIG.both_directions && !STATE.backwards;
	}
	return bpf_redirect(CONFIG.interface, 0);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
