/* A ring of bytes in memory that two processes share: one writes, the other reads, and each can ask to be woken.
 *
 * May live here: positions, the copy in, and the agreement about who sleeps. May not: frames, descriptors, Python, and how the two came
 * to share memory (transports/shm.py). tests/ring_stress.c runs it under ThreadSanitizer.
 *
 * Positions only grow; an index is a position modulo the capacity, a power of two. Each side keeps its own position and the last one it
 * saw of the other, so that it looks at the other's cache line only when that is not enough.
 *
 * Sleeping. Who is about to sleep writes so, and then looks once more; who has moved its position looks whether the other sleeps. Both
 * do it with sequentially consistent operations, so one of the two sees the other: no wake-up is lost, and none is sent to who is awake.
 * The exchange makes sure that one move rings once.
 *
 * The other side's position is believed only if it is possible, because the memory is another process's to write.
 *
 * Far caches. Where the two sides' processors share no cache (other sockets, other parts of one), each line of the ring that is written
 * must first be taken back from the reader's, and large messages take five times as long as if they were written past the caches; where
 * they do share one, writing past it takes up to twice as long. Which it is the writer learns from how long its own copies take, and asks
 * again from time to time, because processes, and the processors of virtual machines, move.
 */
#ifndef RT_RING_H
#define RT_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

enum {
    RT_RING_HEAD_BYTES = 512, /* of rt_ring_shared; its fields lie on lines of their own, in pairs, as processors fetch them */
    RT_RING_UNIT = 16,        /* a writer that can not write all had better stop at a multiple of this */
    RT_RING_PIECE = 32768,    /* bytes that are timed together, or written past the caches */
    RT_RING_FAR_NS = 8000,    /* a piece takes 1500 to 4000 where a cache is shared (memory included), 15000 and more where not */
    RT_RING_TIMED = 8,        /* pieces until a verdict, by the fastest: others were interrupted */
    RT_RING_PAST = 4096,      /* pieces written past the caches until the question is asked again */
};

typedef struct {
    _Alignas(128) _Atomic uint64_t written;
    _Atomic uint32_t place; /* the processor that the writer polled on last, and 1; beside what the reader polls */
    _Alignas(128) _Atomic uint64_t consumed;
    _Alignas(128) _Atomic uint32_t reader_sleeps;
    _Alignas(128) _Atomic uint32_t writer_sleeps;
} rt_ring_shared;

_Static_assert(sizeof(rt_ring_shared) <= RT_RING_HEAD_BYTES, "the head of a ring has outgrown its place");

/* One side's view: `at` is its own position, `seen` the last it saw of the other side. */
typedef struct {
    rt_ring_shared *shared;
    char *data;
    uint64_t capacity;
    uint64_t at;
    uint64_t seen;
    uint32_t past;    /* pieces still to be written past the caches */
    uint32_t timed;   /* pieces since the verdict before */
    uint64_t fastest; /* of those, in ns */
} rt_ring;

/* Lays a ring over memory that is zero; takes RT_RING_HEAD_BYTES + capacity bytes of it. */
static void rt_ring_open(rt_ring *ring, void *memory, uint64_t capacity)
{
    ring->shared = (rt_ring_shared *)memory;
    ring->data = (char *)memory + RT_RING_HEAD_BYTES;
    ring->capacity = capacity;
    ring->at = ring->seen = 0;
    ring->past = ring->timed = 0;
    ring->fastest = UINT64_MAX;
}

/* Says on which processor the writer runs. */
static void rt_ring_tell_place(rt_ring *ring, int processor)
{
    uint32_t place = (uint32_t)(processor + 1);
    if (atomic_load_explicit(&ring->shared->place, memory_order_relaxed) != place)
        atomic_store_explicit(&ring->shared->place, place, memory_order_relaxed);
}

/* On which processor the writer was last, -1 if it never said so. */
static int rt_ring_place(const rt_ring *ring) { return (int)atomic_load_explicit(&ring->shared->place, memory_order_relaxed) - 1; }

/* Whether the reader has said that it sleeps. */
static int rt_ring_reader_sleeps(const rt_ring *ring)
{
    return (int)atomic_load_explicit(&ring->shared->reader_sleeps, memory_order_relaxed);
}

/* Bytes that may be written now; negative if the reader's position is impossible. */
static int64_t rt_ring_room(rt_ring *ring)
{
    ring->seen = atomic_load_explicit(&ring->shared->consumed, memory_order_acquire);
    uint64_t used = ring->at - ring->seen;
    return used <= ring->capacity ? (int64_t)(ring->capacity - used) : -1;
}

/* Whether there may be something to read, or room to write, now. Nothing is changed or believed, so any thread may ask: one that looks while
 * another moves on gets an answer that is old, and asks again. */
static int rt_ring_has_news(const rt_ring *ring) { return atomic_load_explicit(&ring->shared->written, memory_order_relaxed) != ring->at; }

static int rt_ring_has_room(const rt_ring *ring)
{
    return ring->at - atomic_load_explicit(&ring->shared->consumed, memory_order_relaxed) + RT_RING_UNIT <= ring->capacity;
}

/* Between two looks at memory that another processor writes. */
static void rt_ring_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Bytes that may be read now; negative if the writer's position is impossible. */
static int64_t rt_ring_held(rt_ring *ring)
{
    uint64_t held = ring->seen - ring->at;
    if (held == 0) {
        ring->seen = atomic_load_explicit(&ring->shared->written, memory_order_acquire);
        held = ring->seen - ring->at;
    }
    return held <= ring->capacity ? (int64_t)held : -1;
}

/* As rt_ring_held, of those that lie in one piece, which starts at *data. */
static int64_t rt_ring_peek(rt_ring *ring, const char **data)
{
    uint64_t index = ring->at & (ring->capacity - 1);
    int64_t held = rt_ring_held(ring);
    *data = ring->data + index;
    return held > (int64_t)(ring->capacity - index) ? (int64_t)(ring->capacity - index) : held;
}

/* Copies in, without telling the reader; the caller has asked for room. */
static void rt_ring_put(rt_ring *ring, const char *from, size_t nbytes)
{
    uint64_t index = ring->at & (ring->capacity - 1);
    size_t first = nbytes < ring->capacity - index ? nbytes : ring->capacity - index;
    memcpy(ring->data + index, from, first);
    if (first < nbytes)
        memcpy(ring->data, from + first, nbytes - first);
    ring->at += nbytes;
}

/* The verdict after a piece was copied in so much time. */
static void rt_ring_judge(rt_ring *ring, uint64_t ns)
{
    if (ns < ring->fastest)
        ring->fastest = ns;
    if (++ring->timed < RT_RING_TIMED)
        return;
    ring->past = ring->fastest > RT_RING_FAR_NS ? RT_RING_PAST : 0;
    ring->timed = 0;
    ring->fastest = UINT64_MAX;
}

static uint64_t rt_ring_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Copies past the caches, into a ring or out of it; what is shown afterwards is there. */
static void rt_copy_past(char *to, const char *from, size_t nbytes)
{
#if defined(__x86_64__)
    size_t head = -(uintptr_t)to % 16, body = nbytes - head - (nbytes - head) % 64;
    memcpy(to, from, head);
    for (size_t i = head; i < head + body; i += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)(from + i)), b = _mm_loadu_si128((const __m128i *)(from + i + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + i + 32)), d = _mm_loadu_si128((const __m128i *)(from + i + 48));
        _mm_stream_si128((__m128i *)(to + i), a);
        _mm_stream_si128((__m128i *)(to + i + 16), b);
        _mm_stream_si128((__m128i *)(to + i + 32), c);
        _mm_stream_si128((__m128i *)(to + i + 48), d);
    }
    memcpy(to + head + body, from + head + body, nbytes - head - body);
    _mm_sfence();
#else
    memcpy(to, from, nbytes);
#endif
}

/* As rt_ring_put, of RT_RING_PIECE bytes that lie in one piece in the ring: in the way that is faster between these two. */
static void rt_ring_put_piece(rt_ring *ring, const char *from)
{
    if (ring->past) {
        ring->past--;
        rt_copy_past(ring->data + (ring->at & (ring->capacity - 1)), from, RT_RING_PIECE);
        ring->at += RT_RING_PIECE;
        return;
    }
    /* One in four: the clock costs something too. And the first time round the pages are made, which takes as long as a far cache. */
    if (ring->at / RT_RING_PIECE % 4 || ring->at < ring->capacity) {
        rt_ring_put(ring, from, RT_RING_PIECE);
        return;
    }
    uint64_t start = rt_ring_now();
    rt_ring_put(ring, from, RT_RING_PIECE);
    rt_ring_judge(ring, rt_ring_now() - start);
}

/* Shows the reader what was put; true if it sleeps and is to be woken. */
static int rt_ring_publish(rt_ring *ring)
{
    atomic_store_explicit(&ring->shared->written, ring->at, memory_order_seq_cst);
    return atomic_load_explicit(&ring->shared->reader_sleeps, memory_order_seq_cst) &&
           atomic_exchange_explicit(&ring->shared->reader_sleeps, 0, memory_order_seq_cst);
}

/* Gives room back to the writer. */
static void rt_ring_consume(rt_ring *ring, size_t nbytes)
{
    ring->at += nbytes;
    atomic_store_explicit(&ring->shared->consumed, ring->at, memory_order_seq_cst);
}

/* After rt_ring_consume: true if the writer sleeps and is to be woken. */
static int rt_ring_writer_waits(rt_ring *ring)
{
    return atomic_load_explicit(&ring->shared->writer_sleeps, memory_order_seq_cst) &&
           atomic_exchange_explicit(&ring->shared->writer_sleeps, 0, memory_order_seq_cst);
}

/* The reader is about to sleep; false if it must not, because something came. */
static int rt_ring_reader_may_sleep(rt_ring *ring)
{
    atomic_exchange_explicit(&ring->shared->reader_sleeps, 1, memory_order_seq_cst);
    if (atomic_load_explicit(&ring->shared->written, memory_order_seq_cst) == ring->at)
        return 1;
    atomic_exchange_explicit(&ring->shared->reader_sleeps, 0, memory_order_seq_cst);
    return 0;
}

/* The writer is about to sleep for want of room; false if it must not, because there is some. */
static int rt_ring_writer_may_sleep(rt_ring *ring)
{
    atomic_exchange_explicit(&ring->shared->writer_sleeps, 1, memory_order_seq_cst);
    uint64_t used = ring->at - atomic_load_explicit(&ring->shared->consumed, memory_order_seq_cst);
    if (used + RT_RING_UNIT > ring->capacity)
        return 1;
    atomic_exchange_explicit(&ring->shared->writer_sleeps, 0, memory_order_seq_cst);
    return 0;
}

/* Whoever is awake again takes its word back: a wake-up that comes all the same does no harm, but costs both a system call. */
static void rt_ring_reader_awake(rt_ring *ring)
{
    atomic_store_explicit(&ring->shared->reader_sleeps, 0, memory_order_relaxed);
}
#endif
