/*
 * Write a worker of the xfan packet dispatcher in C: attach, receive packets in place, commit them.
 *
 *     xfan_worker *worker = xfan_attach(NULL);
 *     if (!worker)
 *         return fail(xfan_last_error());
 *     xfan_packet packets[64];
 *     int32_t count;
 *     while ((count = xfan_receive(worker, packets, 64, 100)) >= 0) {
 *         for (int32_t i = 0; i < count; i++)
 *             look_at(packets[i].data, packets[i].length);
 *         xfan_commit(worker, (size_t)count);
 *     }
 *     if (count != XFAN_CLOSED)
 *         fail(xfan_last_error());
 *     xfan_free(worker);
 *
 * A pointer must be NULL or lead to what the function asks for: a worker to one that was not freed, an
 * array to room for its capacity, text to a zero byte at its end. NULL where something is needed is
 * XFAN_INVALID.
 *
 * A worker is for one thread at a time. No function ends the process or throws.
 *
 * Made by cbindgen from workers/capi/src; do not edit.
 */

#ifndef XFAN_WORKER_H
#define XFAN_WORKER_H

#include <stddef.h>
#include <stdint.h>

/**
 * An option: SIGTERM and SIGINT make xfan_receive do what xfan_request_detach does; the second ends the
 * process at once. The handlers stay until the process ends.
 */
#define XFAN_LEAVE_ON_SIGNALS 1

/**
 * Of a packet: the dispatcher could not read a 5-tuple. It is no IP, or cut off.
 */
#define XFAN_PACKET_UNPARSED 1

/**
 * Of a packet: another worker had it before, and is gone without having committed it. It may have done with
 * it what this one is about to do.
 */
#define XFAN_PACKET_REDELIVERED 2

/**
 * Of a packet: its data is shorter than its IP length. It was cut on its way to this host, or by
 * the network card's driver.
 */
#define XFAN_PACKET_CUT 4

/**
 * Done.
 */
#define XFAN_OK 0

/**
 * No error: there will be no more packets, and all there were are committed. Free the worker.
 */
#define XFAN_CLOSED -1

/**
 * An argument is not possible: NULL, no text, out of range.
 */
#define XFAN_INVALID -2

/**
 * Neither the environment nor the options name a control socket.
 */
#define XFAN_NO_SOCKET -3

/**
 * No dispatcher listens on the socket.
 */
#define XFAN_NO_DISPATCHER -4

/**
 * The socket's permissions forbid to connect.
 */
#define XFAN_PERMISSION -5

/**
 * The dispatcher said no; the sentence says why.
 */
#define XFAN_REFUSED -6

/**
 * The dispatcher has died. All its packets are committed.
 */
#define XFAN_DISPATCHER_GONE -7

/**
 * What the dispatcher said or sent makes no sense. Both must be of the same release.
 */
#define XFAN_PROTOCOL -8

/**
 * A counter's name is not possible or taken, or there are too many.
 */
#define XFAN_COUNTER -9

/**
 * A system call failed.
 */
#define XFAN_SYSTEM -10

/**
 * A fault of this library. Do nothing more with the worker than to free it.
 */
#define XFAN_INTERNAL -11

/**
 * The dispatcher has ended this worker's membership: it hung, or did not leave when it was to. Its packets have gone to others.
 */
#define XFAN_EVICTED -12

/**
 * A worker.
 */
typedef struct xfan_worker xfan_worker;

/**
 * How to attach. All zero is a good choice.
 */
typedef struct xfan_options {
  /**
   * The dispatcher's control socket. NULL: the environment says where, as it does for workers that
   * `xfan run` starts.
   */
  const char *socket;
  /**
   * The group to join. NULL: the dispatcher's first.
   */
  const char *group;
  /**
   * The member to become, such as "default/0". NULL: the one the environment names, or any vacant one.
   */
  const char *member;
  /**
   * The program's name, for the dispatcher's log. NULL: the executable's file name.
   */
  const char *program;
  /**
   * Most packets that are received at once, 1 to 256. 0: 64.
   */
  uint32_t batch;
  /**
   * XFAN_LEAVE_ON_SIGNALS, or 0.
   */
  uint32_t flags;
} xfan_options;

/**
 * A packet, where the network card put it.
 */
typedef struct xfan_packet {
  /**
   * Its bytes, from the Ethernet header on. They may be read until the packet is committed or the worker
   * is freed.
   */
  const uint8_t *data;
  /**
   * When the dispatcher received it, in nanoseconds of CLOCK_MONOTONIC: a multiple of 1,024, up
   * to 2,000 early. Within a lane it never decreases, but for packets of
   * XFAN_PACKET_REDELIVERED.
   */
  uint64_t receive_time_ns;
  /**
   * The hash of its flow, equal for both directions.
   */
  uint32_t hash;
  /**
   * Number of its bytes.
   */
  uint16_t length;
  /**
   * The lane that received it, which is to say the RX queue; less than xfan_lanes.
   */
  uint16_t lane;
  /**
   * The interface that it came in by, for xfan_port_name.
   */
  uint8_t port;
  /**
   * XFAN_PACKET_UNPARSED, XFAN_PACKET_REDELIVERED, XFAN_PACKET_CUT.
   */
  uint8_t flags;
} xfan_packet;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of this library, such as "0.1.0".
 */
const char *xfan_version(void);

/**
 * Becomes a worker of a dispatcher, and pins the calling thread to the core that it names. NULL for the
 * options is the same as options that are all zero. Returns NULL if it does not succeed: xfan_last_error says
 * why.
 */
struct xfan_worker *xfan_attach(const struct xfan_options *options);

/**
 * After XFAN_DISPATCHER_GONE or XFAN_EVICTED: attaches to the dispatcher that listens on the same socket now, or
 * will within `patience_ms`, as the member that the worker was if that can be had, else as any; UINT32_MAX:
 * however long it takes. For workers that came by themselves, and for those that survive (xfan_survival_ms).
 *
 * Returns XFAN_OK; XFAN_CLOSED if a signal asked the worker to leave; or another negative code, and may be
 * tried again. Packets, counters and names from before are no more: publish the counters anew.
 */
int32_t xfan_reattach(struct xfan_worker *worker,
                      uint32_t patience_ms);

/**
 * For how many milliseconds a worker that a dispatcher started is to look for the next one when that is gone
 * (`survive = true` in its configuration): the patience for xfan_reattach. 0: it is to end then; also for a
 * NULL worker.
 */
uint32_t xfan_survival_ms(struct xfan_worker *worker);

/**
 * Receives packets of one lane, at most `capacity` of them and at most a batch, and describes them in
 * `packets`. If there are none, waits for `timeout_ms`: spinning, yielding and sleeping for as long as the
 * dispatcher's configuration says; 0 does none of these.
 *
 * Returns the number of packets; 0 if none came in time or a signal came: call again; or a negative code,
 * XFAN_CLOSED among them.
 *
 * What was received before and is not committed comes again, first. Finding packets costs no system call, lock
 * or allocation.
 */
int32_t xfan_receive(struct xfan_worker *worker,
                     struct xfan_packet *packets,
                     size_t capacity,
                     uint32_t timeout_ms);

/**
 * Whether the packets of the last xfan_receive are still this worker's: 1, or 0 if the dispatcher has ended its
 * membership since, because it hung or did not leave when it was to. What was read of them may then have been of
 * other packets: ask after reading and before acting on it, where that matters. Or a negative code.
 */
int32_t xfan_is_current(struct xfan_worker *worker);

/**
 * Gives back the first `packets` of those that the last xfan_receive returned and that were not committed since:
 * all, or a part. They must not be read any more; the others may. Committing more than there are is
 * XFAN_INVALID, and then nothing is committed. 0 is always possible.
 */
int32_t xfan_commit(struct xfan_worker *worker,
                    size_t packets);

/**
 * Asks the dispatcher to let this worker go. Packets that are on their way still come: keep receiving
 * until XFAN_CLOSED, then free the worker, and nothing is lost. Asking again does nothing.
 */
int32_t xfan_request_detach(struct xfan_worker *worker);

/**
 * Ends the membership and frees the worker. What is not committed goes to other workers, so request to detach
 * first if nothing may come twice. NULL does nothing.
 */
void xfan_free(struct xfan_worker *worker);

/**
 * Publishes a counter with value 0: `xfan stats` shows it under this name, of 1 to 24 characters a-z, 0-9
 * and _. Returns its number, for the following functions, or a negative code.
 */
int32_t xfan_counter(struct xfan_worker *worker,
                     const char *name);

/**
 * Adds to a counter; wraps around at 2^64.
 */
int32_t xfan_counter_add(struct xfan_worker *worker, int32_t counter, uint64_t more);

/**
 * Sets a counter, for what goes up and down.
 */
int32_t xfan_counter_set(struct xfan_worker *worker, int32_t counter, uint64_t value);

/**
 * The member that the worker is, such as "default/0"; NULL for a NULL worker. Valid until the worker is
 * freed or attached again.
 */
const char *xfan_member(struct xfan_worker *worker);

/**
 * Number of lanes that serve it, or a negative code.
 */
int32_t xfan_lanes(struct xfan_worker *worker);

/**
 * The name of an interface, such as "eth1", from a packet's port; NULL if there is no such port. Valid until
 * the worker is freed or attached again.
 */
const char *xfan_port_name(struct xfan_worker *worker,
                           uint8_t port);

/**
 * The last error in the calling thread, as a sentence; empty if there was none. A success does not change
 * it. It stays until the thread's next error.
 */
const char *xfan_last_error(void);

/**
 * The last error in the calling thread, as a code; XFAN_OK if there was none.
 */
int32_t xfan_last_error_code(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* XFAN_WORKER_H */
