/* Two threads and one ring (rt/_ring.h): every byte arrives, in order, and neither thread sleeps for ever.
 *
 * May live here: the stress that test_ring.py compiles with ThreadSanitizer. May not: frames, processes.
 *
 * With a CAPACITY of at least RT_RING_PIECE, whole pieces are written too, half of them past the caches.
 *
 * Usage: ring_stress BYTES SEED. Both sleep as engines do: they say so, look once more, and wait for a byte in a pipe. Exit status 0: all
 * is well; 1: wrong data or an impossible position; 2: nobody was woken for ten seconds. ThreadSanitizer has its own.
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "_ring.h"

#ifndef CAPACITY
#define CAPACITY 4096
#endif
enum { PATIENCE_MS = 10000 };

static _Alignas(128) char memory[RT_RING_HEAD_BYTES + CAPACITY];
static uint64_t total;
static unsigned seed;
static int to_reader[2], to_writer[2];
static uint64_t slept[2];
static uint64_t past;

static void fail(int status, const char *what)
{
    fprintf(stderr, "%s\n", what);
    _exit(status);
}

static void ring_bell(int fd)
{
    if (write(fd, "", 1) != 1)
        fail(2, "the pipe is full: more bells than sleeps");
}

static void sleep_on(int fd, int who)
{
    char bells[64];
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    if (poll(&ready, 1, PATIENCE_MS) != 1)
        fail(2, who ? "nobody woke the writer" : "nobody woke the reader");
    if (read(fd, bells, sizeof bells) < 1)
        fail(2, "the pipe broke");
    slept[who]++;
}

static char byte_at(uint64_t position) { return (char)(position * 2654435761u >> 13); }

enum { PLACES = 3 };

static void *writer(void *unused)
{
    rt_ring ring;
    char piece[CAPACITY];
    unsigned dice = seed;
    (void)unused;
    rt_ring_open(&ring, memory, CAPACITY);
    while (ring.at < total) {
        int64_t room = rt_ring_room(&ring);
        if (room < 0)
            fail(1, "impossible position of the reader");
        if (!rt_ring_reader_sleeps(&ring))
            rt_ring_tell_place(&ring, rand_r(&dice) % PLACES);
        if (room < RT_RING_UNIT) {
            for (int i = rand_r(&dice) % 50; i > 0 && !rt_ring_has_room(&ring); i--)
                rt_ring_pause();
            if (rt_ring_writer_may_sleep(&ring))
                sleep_on(to_writer[0], 1);
            continue;
        }
        uint64_t count = 1 + rand_r(&dice) % (rand_r(&dice) % 4 ? 40 : CAPACITY);
        uint64_t to_piece = RT_RING_PIECE - ring.at % RT_RING_PIECE;
        if (count > to_piece || (CAPACITY >= RT_RING_PIECE && rand_r(&dice) % 4 == 0))
            count = to_piece;
        if (count > (uint64_t)room)
            count = (uint64_t)room;
        if (count > total - ring.at)
            count = total - ring.at;
        for (uint64_t i = 0; i < count; i++)
            piece[i] = byte_at(ring.at + i);
        if (count == RT_RING_PIECE) {
            ring.past = rand_r(&dice) % 2;
            past += ring.past;
            rt_ring_put_piece(&ring, piece);
        } else
            rt_ring_put(&ring, piece, count);
        if (rt_ring_publish(&ring))
            ring_bell(to_reader[1]);
    }
    return NULL;
}

static void *reader(void *unused)
{
    rt_ring ring;
    const char *data;
    unsigned dice = seed + 1;
    (void)unused;
    rt_ring_open(&ring, memory, CAPACITY);
    while (ring.at < total) {
        int64_t have = rt_ring_peek(&ring, &data);
        if (have < 0)
            fail(1, "impossible position of the writer");
        if (rt_ring_place(&ring) < -1 || rt_ring_place(&ring) >= PLACES)
            fail(1, "the writer said no such place");
        if (have == 0) {
            for (int i = rand_r(&dice) % 50; i > 0 && !rt_ring_has_news(&ring); i--)
                rt_ring_pause();
            if (rt_ring_reader_may_sleep(&ring))
                sleep_on(to_reader[0], 0);
            else
                rt_ring_reader_awake(&ring);
            continue;
        }
        uint64_t count = 1 + rand_r(&dice) % (uint64_t)have;
        for (uint64_t i = 0; i < count; i++)
            if (data[i] != byte_at(ring.at + i))
                fail(1, "a byte is not the one that was written there");
        rt_ring_consume(&ring, count);
        if (rt_ring_writer_waits(&ring))
            ring_bell(to_writer[1]);
    }
    return NULL;
}

/* By the fastest of so many pieces, and asked again after those that were written past the caches. */
static void verdicts(void)
{
    rt_ring ring;
    static _Alignas(128) char other[RT_RING_HEAD_BYTES + 2 * RT_RING_PIECE];
    static char piece[RT_RING_PIECE];
    rt_ring_open(&ring, other, 2 * RT_RING_PIECE);
    for (int i = 1; i < RT_RING_TIMED; i++)
        rt_ring_judge(&ring, RT_RING_FAR_NS + 1);
    if (ring.past)
        fail(1, "a verdict before its time");
    rt_ring_judge(&ring, RT_RING_FAR_NS + 1);
    for (int i = 0; i < RT_RING_PAST; i++) {
        if (!ring.past)
            fail(1, "far, and not written past the caches");
        rt_ring_put_piece(&ring, piece);
    }
    if (ring.past || ring.timed)
        fail(1, "never asked again");
    rt_ring_judge(&ring, RT_RING_FAR_NS);
    for (int i = 1; i < RT_RING_TIMED; i++)
        rt_ring_judge(&ring, 1000 * RT_RING_FAR_NS);
    if (ring.past)
        fail(1, "judged by those that were interrupted");
}

int main(int argc, char **argv)
{
    pthread_t threads[2];
    verdicts();
    if (argc != 3 || pipe(to_reader) || pipe(to_writer))
        return 2;
    total = strtoull(argv[1], NULL, 10);
    seed = (unsigned)atoi(argv[2]);
    if (pthread_create(&threads[0], NULL, writer, NULL) || pthread_create(&threads[1], NULL, reader, NULL))
        return 2;
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    printf("%llu bytes; the reader slept %llu times, the writer %llu times; %llu pieces past the caches\n", (unsigned long long)total,
           (unsigned long long)slept[0], (unsigned long long)slept[1], (unsigned long long)past);
    return 0;
}
