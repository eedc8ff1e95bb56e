/*
 * Counts packets and bytes, and prints one JSON object when it exits: a worker in C.
 *
 *     cc count.c $(pkg-config --cflags --libs xfan-worker) -o count
 *     xfan run -i eth1 -n 2 -- ./count
 *
 * `./count SOCKET` joins a running dispatcher.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>

#include <xfan_worker.h>

enum { BURST = 64, TIMEOUT_MS = 100 };

static int fail(const char *what) {
    fprintf(stderr, "count: %s: %s\n", what, xfan_last_error());
    return 1;
}

/* Publishes both counters. */
static bool publish(xfan_worker *worker, int32_t counters[2]) {
    counters[0] = xfan_counter(worker, "packets");
    counters[1] = xfan_counter(worker, "bytes");
    return counters[0] >= 0 && counters[1] >= 0;
}

int main(int argc, char **argv) {
    xfan_options options = {.socket = argc > 1 ? argv[1] : NULL, .flags = XFAN_LEAVE_ON_SIGNALS};
    xfan_worker *worker = xfan_attach(&options);
    if (!worker)
        return fail("cannot attach");

    int32_t counters[2];
    if (!publish(worker, counters))
        return fail("cannot publish a counter");

    uint64_t packets = 0, bytes = 0;
    xfan_packet burst[BURST];
    int32_t count;
    for (;;) {
        count = xfan_receive(worker, burst, BURST, TIMEOUT_MS);
        /* With `survive = true`, the worker continues with the next dispatcher. */
        uint32_t survival = xfan_survival_ms(worker);
        if (count == XFAN_DISPATCHER_GONE && survival > 0) {
            count = xfan_reattach(worker, survival);
            if (count == XFAN_OK && !publish(worker, counters))
                return fail("cannot publish a counter");
        }
        if (count < 0)
            break;
        for (int32_t i = 0; i < count; i++)
            bytes += burst[i].length;
        packets += (uint64_t)count;
        xfan_counter_set(worker, counters[0], packets);
        xfan_counter_set(worker, counters[1], bytes);
        if (xfan_commit(worker, (size_t)count) != XFAN_OK)
            return fail("cannot commit");
    }

    int status = count == XFAN_CLOSED ? 0 : fail("cannot receive");
    int printed = printf("{\"member\":\"%s\",\"packets\":%" PRIu64 ",\"bytes\":%" PRIu64 "}\n",
                         xfan_member(worker), packets, bytes);
    if (printed < 0 || fflush(stdout) != 0) {
        perror("count: cannot print the totals");
        status = 1;
    }
    xfan_free(worker);
    return status;
}
