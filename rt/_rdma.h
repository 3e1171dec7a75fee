/* One direction each way over RDMA: rings of registered memory that are written by RDMA WRITE WITH IMMEDIATE.
 *
 * May live here: the stream over one connected queue pair, its flow control and its completions, and the little of the verbs' ABI that it
 * needs. May not: how queue pairs are made and connected (transports/verbs.py), frames, Python.
 *
 * What is sent is copied into a ring here and written from there to the same place of the peer's ring, so the peer learns of it in one
 * message. The immediate number says what the message is:
 *
 *     bit 31 clear   data; its length is in the completion, and the other 31 bits number it among all messages, these and credits
 *     bit 31 set     a credit: the other 31 bits are the bytes that were consumed since the last one; none at all: the sender has left
 *
 * A place in the ring is free again when the peer has consumed what was there (its credit) and the device has let go of it here (the
 * completion of the write): a write that must be repeated reads its source again. Both sides count messages as well as bytes, because
 * every one takes a receive that the peer has posted. There are as many of those as data messages that may be under way and credits that
 * may be, so the peer always has one.
 *
 * A connection that is not reliable may lose a message, or the middle of one. The next that comes has a number too high then, and ends the
 * stream; where none comes the two sides compare their counts by other means (rt/tallies.py).
 *
 * Posting and polling go through the function table of the device's context, as the inline functions of <infiniband/verbs.h> do; that
 * header is not needed to build. The structs below are the part of the ABI (IBVERBS_1.1) that inline functions have compiled into every
 * program, so they cannot change. Constants are those of the same ABI.
 *
 * One lock: the engine calls under its own, but who polls (rt_rdma_has_news) does not hold that. It never waits for this one.
 */
#ifndef RT_RDMA_H
#define RT_RDMA_H

#include <arpa/inet.h>
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

/* -- the verbs' ABI ------------------------------------------------------------------------------------------------------------------ */

enum { RT_WR_WRITE_WITH_IMM = 1, RT_SEND_SIGNALED = 2, RT_SEND_SOLICITED = 4, RT_SEND_INLINE = 8 };

typedef struct { uint64_t address; uint32_t length, key; } rt_verbs_piece;

typedef struct rt_verbs_send { /* 128 bytes there: what follows the remote key belongs to other operations */
    uint64_t id;
    struct rt_verbs_send *next;
    rt_verbs_piece *pieces;
    int piece_count, opcode;
    unsigned flags;
    uint32_t immediate;
    uint64_t remote_address;
    uint32_t remote_key;
    uint32_t others[19];
} rt_verbs_send;

typedef struct rt_verbs_receive {
    uint64_t id;
    struct rt_verbs_receive *next;
    rt_verbs_piece *pieces;
    int piece_count;
} rt_verbs_receive;

typedef struct {
    uint64_t id;
    int status, opcode;
    uint32_t vendor, bytes, immediate, number, source;
    unsigned flags;
    uint16_t partition, from_lid;
    uint8_t level, path;
} rt_verbs_completion;

typedef struct {
    void *device;
    void *others[11];
    int (*poll_cq)(void *cq, int most, rt_verbs_completion *found);
    int (*req_notify_cq)(void *cq, int solicited_only);
    void *more[12];
    int (*post_send)(void *qp, rt_verbs_send *request, rt_verbs_send **bad);
    int (*post_recv)(void *qp, rt_verbs_receive *request, rt_verbs_receive **bad);
} rt_verbs_context;

/* -- a stream ------------------------------------------------------------------------------------------------------------------------ */

enum {
    RT_RDMA_RECEIVE = 1, RT_RDMA_SEND = 2, /* ids of work requests */
    RT_RDMA_MOST = 256,                    /* work requests of a kind */
};
#define RT_RDMA_CREDIT 0x80000000u

typedef enum { RT_RDMA_WELL, RT_RDMA_POSTING, RT_RDMA_REPOSTING, RT_RDMA_POLLING, RT_RDMA_ARMING, RT_RDMA_COMPLETED, RT_RDMA_LOST } rt_rdma_fault;

typedef struct {
    /* Given: */
    void *qp, *cq, *channel;
    int (*get_event)(void *channel, void **cq, void **context);
    void (*ack_events)(void *cq, unsigned count);
    char *outgoing;
    const char *incoming;
    uint64_t capacity; /* of either ring, a power of two */
    uint64_t peer_address;
    uint32_t outgoing_key, peer_key, inline_bytes;
    int messages, credits; /* under way to the peer, at most */
    /* Sending: positions count bytes since the beginning; a place in the ring is the remainder. */
    uint64_t sent, consumed, completed;
    uint64_t ends[RT_RDMA_MOST]; /* of data messages that the peer has not consumed, a queue */
    unsigned end_first, end_count;
    uint64_t posted, finished;                               /* work requests, ever */
    struct { uint64_t posted, sent; } marks[RT_RDMA_MOST];   /* requests that will complete, a queue */
    unsigned mark_first, mark_count;
    uint64_t marked, unmarked_bytes;
    int mark_all;
    /* Receiving. */
    uint64_t landed; /* messages, ever */
    uint64_t arrived, taken, credited;
    uint64_t arrivals[RT_RDMA_MOST]; /* ends of messages that were not consumed here, a queue */
    unsigned arrival_first, arrival_count;
    int uncredited;
    /* The state of both. */
    int armed;   /* 1: for what comes from the peer, 2: for all */
    int stirred; /* something completed since */
    int ended;   /* the peer has left */
    int closed;
    rt_rdma_fault fault;
    int error, status, receiving;
    uint32_t vendor;
    atomic_flag busy;
} rt_rdma;

static rt_verbs_context *rt_rdma_context(const rt_rdma *r) { return *(rt_verbs_context **)r->qp; } /* its first field */

static void rt_rdma_enter(rt_rdma *r)
{
    while (atomic_flag_test_and_set_explicit(&r->busy, memory_order_acquire))
        sched_yield();
}

static void rt_rdma_leave(rt_rdma *r) { atomic_flag_clear_explicit(&r->busy, memory_order_release); }

/* Always 0, which is what callers answer then. */
static int rt_rdma_fail(rt_rdma *r, rt_rdma_fault fault, int error)
{
    if (!r->error) {
        r->fault = fault;
        r->error = error > 0 ? error : EIO;
    }
    return 0;
}

static int rt_rdma_depth(const rt_rdma *r) { return r->messages + r->credits; }

static void rt_rdma_write(rt_rdma *r, uint64_t at, uint32_t nbytes, uint32_t number, int solicited, int marked)
{
    rt_verbs_piece piece = {(uintptr_t)r->outgoing + at, nbytes, r->outgoing_key};
    rt_verbs_send request = {.id = RT_RDMA_SEND, .pieces = &piece, .piece_count = nbytes > 0, .opcode = RT_WR_WRITE_WITH_IMM};
    rt_verbs_send *bad;
    request.flags = (solicited ? RT_SEND_SOLICITED : 0) | (marked ? RT_SEND_SIGNALED : 0) | (nbytes <= r->inline_bytes ? RT_SEND_INLINE : 0);
    request.immediate = htonl(number);
    request.remote_address = r->peer_address + at;
    request.remote_key = r->peer_key;
    r->posted++;
    if (marked) {
        unsigned last = (r->mark_first + r->mark_count++) % RT_RDMA_MOST;
        r->marks[last].posted = r->marked = r->posted;
        r->marks[last].sent = r->sent;
        r->unmarked_bytes = 0;
    }
    int failed = rt_rdma_context(r)->post_send(r->qp, &request, &bad);
    if (failed)
        rt_rdma_fail(r, RT_RDMA_POSTING, failed);
}

/* Tells the peer what was consumed, a quarter of the ring or half of the messages at a time: it has room for that many credits. */
static void rt_rdma_give_credit(rt_rdma *r)
{
    uint64_t owed = r->taken - r->credited;
    if (owed < r->capacity / 4 && r->uncredited < r->messages / 2)
        return;
    if (r->posted - r->finished >= (uint64_t)rt_rdma_depth(r) || r->error)
        return; /* a completion makes room, and comes by here */
    r->credited = r->taken;
    r->uncredited = 0;
    rt_rdma_write(r, 0, 0, RT_RDMA_CREDIT | (uint32_t)owed, 0, 1);
}

static int rt_rdma_receive_again(rt_rdma *r)
{
    rt_verbs_receive request = {.id = RT_RDMA_RECEIVE};
    rt_verbs_receive *bad;
    int failed = rt_rdma_context(r)->post_recv(r->qp, &request, &bad);
    return failed ? rt_rdma_fail(r, RT_RDMA_REPOSTING, failed) : 1;
}

static void rt_rdma_landed(rt_rdma *r, const rt_verbs_completion *found)
{
    uint32_t number = ntohl(found->immediate), expected = (uint32_t)r->landed++ & ~RT_RDMA_CREDIT;
    if (number == RT_RDMA_CREDIT) {
        r->ended = 1;
    } else if (number & RT_RDMA_CREDIT) {
        r->consumed += number ^ RT_RDMA_CREDIT;
        while (r->end_count && r->ends[r->end_first] <= r->consumed) {
            r->end_first = (r->end_first + 1) % RT_RDMA_MOST;
            r->end_count--;
        }
    } else if (number != expected) {
        rt_rdma_fail(r, RT_RDMA_LOST, EIO);
    } else {
        r->arrived += found->bytes;
        r->arrivals[(r->arrival_first + r->arrival_count++) % RT_RDMA_MOST] = r->arrived;
    }
    rt_rdma_receive_again(r);
}

/* Takes what has completed; whether that was anything. */
static int rt_rdma_settle(rt_rdma *r)
{
    rt_verbs_completion found[16];
    if (r->error || r->closed)
        return 0;
    int count = rt_rdma_context(r)->poll_cq(r->cq, 16, found);
    if (count < 0)
        return rt_rdma_fail(r, RT_RDMA_POLLING, EIO);
    for (int i = 0; i < count && !r->error; i++) {
        if (found[i].status) {
            r->status = found[i].status;
            r->vendor = found[i].vendor;
            r->receiving = found[i].id == RT_RDMA_RECEIVE;
            rt_rdma_fail(r, RT_RDMA_COMPLETED, EIO);
            return 1;
        }
        if (found[i].id == RT_RDMA_RECEIVE) {
            rt_rdma_landed(r, &found[i]);
        } else {
            r->finished = r->marks[r->mark_first].posted;
            r->completed = r->marks[r->mark_first].sent;
            r->mark_first = (r->mark_first + 1) % RT_RDMA_MOST;
            r->mark_count--;
        }
    }
    if (count) {
        r->stirred = 1;
        rt_rdma_give_credit(r);
    }
    return count > 0;
}

/* Bytes that may be put into the outgoing ring now. */
static int64_t rt_rdma_room(const rt_rdma *r)
{
    if (r->end_count >= (unsigned)r->messages || r->posted - r->finished >= (uint64_t)r->messages)
        return 0; /* the rest of the depth is for credits */
    return (int64_t)(r->capacity - (r->sent - (r->consumed < r->completed ? r->consumed : r->completed)));
}

/* Writes what lies between what was sent and `position`. */
static void rt_rdma_post(rt_rdma *r, uint64_t position)
{
    uint64_t at = r->sent & (r->capacity - 1);
    uint32_t nbytes = (uint32_t)(position - r->sent);
    r->sent = position;
    r->ends[(r->end_first + r->end_count++) % RT_RDMA_MOST] = position;
    r->unmarked_bytes += nbytes;
    uint64_t since = r->posted - (r->mark_count ? r->marked : r->finished);
    int marked = r->mark_all || r->unmarked_bytes >= r->capacity / 8 || since >= (uint64_t)r->messages / 4;
    rt_rdma_write(r, at, nbytes, (uint32_t)r->posted & ~RT_RDMA_CREDIT, 1, marked);
}

/* Messages that have come, ever; -1 once the stream is over. */
static int64_t rt_rdma_came(rt_rdma *r)
{
    rt_rdma_enter(r);
    while (rt_rdma_settle(r)) {
    }
    int64_t found = r->error || r->ended || r->closed ? -1 : (int64_t)r->landed;
    rt_rdma_leave(r);
    return found;
}

/* Takes the first bytes of the parts, as many as there is room for; how many, -EAGAIN for none now, another errno: the stream is over. */
static ssize_t rt_rdma_send(rt_rdma *r, const struct iovec *parts, int count)
{
    uint64_t piece = r->capacity / 4; /* of a message, at most: it is under way while the next is copied */
    rt_rdma_enter(r);
    int64_t room = rt_rdma_room(r);
    while (room <= 0 && rt_rdma_settle(r))
        room = rt_rdma_room(r);
    uint64_t begin = r->sent, at = begin, limit = begin + (room > 0 ? (uint64_t)room : 0);
    ssize_t result = r->error ? -r->error : r->ended || r->closed ? -EPIPE : 0;
    for (int i = 0; i < count && at < limit && result == 0; i++) {
        const char *source = parts[i].iov_base;
        uint64_t left = parts[i].iov_len;
        while (left && at < limit) {
            uint64_t nbytes = piece - (at & (piece - 1));
            if (nbytes > left)
                nbytes = left;
            if (nbytes > limit - at)
                nbytes = limit - at;
            memcpy(r->outgoing + (at & (r->capacity - 1)), source, nbytes);
            at += nbytes;
            source += nbytes;
            left -= nbytes;
            if ((at & (piece - 1)) == 0) {
                rt_rdma_post(r, at);
                if (r->error || rt_rdma_room(r) <= 0)
                    limit = at;
            }
        }
    }
    if (at > r->sent)
        rt_rdma_post(r, at);
    if (result == 0)
        result = at > begin ? (ssize_t)(at - begin) : -EAGAIN;
    rt_rdma_leave(r);
    return result;
}

/* How many bytes lie in one piece at the front of what has come, and where. */
static int64_t rt_rdma_peek(rt_rdma *r, const char **data)
{
    rt_rdma_enter(r);
    while (r->arrived == r->taken && rt_rdma_settle(r)) {
    }
    uint64_t at = r->taken & (r->capacity - 1), have = r->arrived - r->taken;
    if (have > r->capacity - at)
        have = r->capacity - at;
    *data = r->incoming + at;
    rt_rdma_leave(r);
    return (int64_t)have;
}

static void rt_rdma_consume(rt_rdma *r, uint64_t nbytes)
{
    rt_rdma_enter(r);
    r->taken += nbytes;
    while (r->arrival_count && r->arrivals[r->arrival_first] <= r->taken) {
        r->arrival_first = (r->arrival_first + 1) % RT_RDMA_MOST;
        r->arrival_count--;
        r->uncredited++;
    }
    rt_rdma_give_credit(r);
    rt_rdma_leave(r);
}

/* Bytes that have come and were not consumed, as far as known. */
static int64_t rt_rdma_held(const rt_rdma *r) { return (int64_t)(r->arrived - r->taken); }

/* Whether nothing will come any more behind what has come. */
static int rt_rdma_over(const rt_rdma *r) { return r->error || r->ended || r->closed; }

static int rt_rdma_news(const rt_rdma *r, int receiving, int sending)
{
    return (receiving && r->arrived != r->taken) || (sending && rt_rdma_room(r) > 0) || ((receiving || sending) && rt_rdma_over(r));
}

/* For who polls without the engine's lock: whether there is something to receive, or, for who wants to send, room. */
static int rt_rdma_has_news(rt_rdma *r, int receiving, int sending)
{
    if (atomic_flag_test_and_set_explicit(&r->busy, memory_order_acquire))
        return 0; /* whoever is at it finds it */
    rt_rdma_settle(r);
    int found = !r->closed && rt_rdma_news(r, receiving, sending);
    rt_rdma_leave(r);
    return found;
}

/* Sees to it that the channel's descriptor tells of news; 0 if there are some already. */
static int rt_rdma_may_sleep(rt_rdma *r, int receiving, int sending)
{
    int wanted = sending ? 2 : 1, may = 1;
    rt_rdma_enter(r);
    if (!rt_rdma_over(r) && (r->armed < wanted || r->stirred)) {
        int failed = rt_rdma_context(r)->req_notify_cq(r->cq, !sending);
        if (failed)
            rt_rdma_fail(r, RT_RDMA_ARMING, failed);
        r->armed = wanted;
        r->stirred = 0;
        while (rt_rdma_settle(r)) {
        }
    }
    may = !rt_rdma_news(r, receiving, sending);
    rt_rdma_leave(r);
    return may;
}

/* Takes the events that earlier calls of rt_rdma_may_sleep brought. */
static void rt_rdma_answer(rt_rdma *r)
{
    void *cq, *context;
    rt_rdma_enter(r);
    while (!r->closed && r->get_event(r->channel, &cq, &context) == 0)
        r->ack_events(cq, 1);
    r->armed = 0;
    rt_rdma_leave(r);
}

/* Lets the peer write. Once, before anything else; 0 if it failed. */
static int rt_rdma_open(rt_rdma *r)
{
    for (int i = 0; i < rt_rdma_depth(r); i++)
        if (!rt_rdma_receive_again(r))
            return 0;
    return 1;
}

/* Tells the peer that nothing follows. */
static void rt_rdma_say_goodbye(rt_rdma *r)
{
    rt_rdma_enter(r);
    while (rt_rdma_settle(r)) {
    }
    if (!rt_rdma_over(r))
        rt_rdma_write(r, 0, 0, RT_RDMA_CREDIT, 1, 1);
    rt_rdma_leave(r);
}

/* Whether writes are under way that the peer's device has yet to acknowledge. A peer that has left acknowledges nothing. */
static int rt_rdma_unfinished(rt_rdma *r)
{
    rt_rdma_enter(r);
    rt_rdma_settle(r);
    int left = !rt_rdma_over(r) && r->mark_count;
    rt_rdma_leave(r);
    return left;
}

static void rt_rdma_close(rt_rdma *r)
{
    rt_rdma_enter(r);
    r->closed = 1;
    rt_rdma_leave(r);
}
#endif
