# The one extension of rt: C data structures, and the parts that work on them.
#
# May live here: imports, constants of the wire format, the structs that the included parts share, and module-level odds and ends too
# small for a part of their own. The parts:
#   _pool.pxi      memory of large results, used again when arrays die
#   _program.pxi   a schedule, checked and compiled into flat arrays with its hazards
#   _links.pxi     a link: one ordered byte stream to one peer that never blocks
#   _shared.pxi    links through memory that two processes share
#   _receive.pxi   incoming frames: where they land
#   _send.pxi      outgoing frames: which goes next
#   _works.pxi     channels, works and the rules by which progress is made
#   _deadlock.pxi  blocked ranks that wait for each other in different calls
#   _submit.pxi    how a work begins
#   _engine.pxi    the Engine: what Python sees of all this
#   _work.pxi      the Python face of a work: what can be awaited
#   _known.pxi     collectives and messages that were made before, started in one go
#   _arrays.pxi    questions about arrays that every call asks
#   _lists.pxi     lists of arrays that travel as one
# The hot path is structs and nogil functions, not extension types: Cython cannot follow references to objects without the GIL.
# Directives stand in setup.py.

from cpython.ref cimport PyObject, PyTypeObject, Py_INCREF, Py_DECREF
from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetInterrupt, PyErr_WriteUnraisable
from libc.errno cimport EAGAIN, EINTR, EPIPE, EPROTO, ECONNRESET, errno
from libc.stdint cimport int16_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from posix.types cimport off_t
from libc.string cimport memcmp, memcpy, memset

cimport numpy as cnp

import os

cnp.import_array()

cdef extern from "_kernels.h" nogil:
    ctypedef void (*rt_reduce_fn)(void *dst, const void *left, const void *right, size_t count) noexcept nogil
    ctypedef void (*rt_mixed_fn)(float *dst, const float *acc, const void *half, size_t count) noexcept nogil
    ctypedef void (*rt_convert_fn)(void *dst, const void *src, size_t count) noexcept nogil
    ctypedef void (*rt_scale_fn)(void *dst, const void *src, size_t count, double divisor) noexcept nogil
    rt_reduce_fn rt_reduce_kernel(int dtype, int op)
    rt_mixed_fn rt_mixed_kernel(int half_dtype, int op)
    rt_convert_fn rt_convert_kernel(int dst_dtype, int src_dtype)
    rt_scale_fn rt_scale_kernel(int dtype)
    const size_t rt_itemsize[15]

cdef extern from "_poll.h" nogil:
    int RT_POLL_READ, RT_POLL_WRITE, RT_POLL_HUP
    ctypedef struct rt_event:
        uintptr_t token
        int flags
    int rt_poll_create()
    int rt_poll_add(int set, int fd, uintptr_t token)
    int rt_poll_remove(int set, int fd)
    int rt_poll_take(int set, rt_event *out, int most)
    int rt_wake_create(int *fds)
    void rt_wake_signal(int fd)
    void rt_wake_drain(int fd)
    double rt_now()
    int rt_poll_sleep(int fd_a, int fd_b, double seconds)

cdef extern from "_place.h" nogil:
    ctypedef struct rt_processors:
        pass
    int rt_processor()
    void rt_processors_none(rt_processors *set)
    void rt_processors_add(rt_processors *set, int processor)
    void rt_leave_processors(const rt_processors *taken)
    long rt_cache_bytes()

cdef extern from "_ring.h" nogil:
    int RT_RING_HEAD_BYTES, RT_RING_UNIT
    enum: RT_RING_PIECE
    ctypedef struct rt_ring:
        uint64_t at
        uint64_t capacity
    void rt_ring_open(rt_ring *ring, void *memory, uint64_t capacity)
    void rt_ring_tell_place(rt_ring *ring, int processor)
    int rt_ring_place(const rt_ring *ring)
    int rt_ring_reader_sleeps(const rt_ring *ring)
    int64_t rt_ring_room(rt_ring *ring)
    int rt_ring_has_news(const rt_ring *ring)
    int rt_ring_has_room(const rt_ring *ring)
    void rt_ring_pause()
    int64_t rt_ring_held(rt_ring *ring)
    int64_t rt_ring_peek(rt_ring *ring, const char **data)
    void rt_ring_put(rt_ring *ring, const char *source, size_t nbytes)
    void rt_copy_past(char *to, const char *source, size_t nbytes)
    void rt_ring_put_piece(rt_ring *ring, const char *source)
    int rt_ring_publish(rt_ring *ring)
    void rt_ring_consume(rt_ring *ring, size_t nbytes)
    int rt_ring_writer_waits(rt_ring *ring)
    int rt_ring_reader_may_sleep(rt_ring *ring)
    int rt_ring_writer_may_sleep(rt_ring *ring)
    void rt_ring_reader_awake(rt_ring *ring)

cdef extern from "_rdma.h" nogil:
    ctypedef struct rt_rdma:                # the rest: _rdma.pxi
        pass

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
    int munmap(void *address, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS
    void *MAP_FAILED

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t send(int fd, const void *buffer, size_t nbytes, int flags)
    ssize_t recv(int fd, void *buffer, size_t nbytes, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int shutdown(int fd, int how)
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from *:
    """
    #if RT_DEBUG
    #include <assert.h>
    #define rt_check(condition) assert(condition)
    #else
    #define rt_check(condition) ((void)0)
    #endif
    """
    void rt_check(bint condition) noexcept nogil     # what must hold whatever peers send; compiled in by RT_DEBUG=1

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_mutexattr_t:
        pass
    int PTHREAD_MUTEX_ERRORCHECK
    int pthread_mutexattr_init(pthread_mutexattr_t *attributes)
    int pthread_mutexattr_settype(pthread_mutexattr_t *attributes, int type)
    int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

# -- the wire format ------------------------------------------------------------------------------------------------------------
# A frame is a header of 16 bytes and at most FRAME_MOST bytes of payload. Both ends agreed on the byte order in HELLO.

cdef enum:
    FRAME_OPEN = 1      # payload: the signature of a work; "receiver posted"
    FRAME_DATA = 2      # payload: items of one step
    FRAME_ABORT = 3     # number taken; blame travels on the control connections
    FRAME_GOODBYE = 4   # no payload; nothing follows it
    FRAME_CREDIT = 5    # number kept free
    FRAME_ACK = 6       # number kept free
    FRAME_WAITING = 7   # no payload; "I block on this call and on nothing else" (_deadlock.pxi)

cdef enum:
    HEADER_BYTES = 16
    SIGNATURE_BYTES = 64
    FRAME_MOST = 262144      # payload of one frame: fits the second-level cache together with what it is reduced into
    # Sent in one frame: with its header just under four segments of the loopback interface (65483 bytes). A frame a little larger ends
    # in a segment of a few bytes that costs as much as a full one: 64 MiB between two ranks took 31.6 ms instead of 27.7.
    FRAME_SENT = 261904
    PIECE_BYTES = RT_RING_PIECE      # of a ring: written before it is shown, read before its room is given back
    YIELDS = 10              # rounds of letting others run before a sleep, where cores are scarce
    STAGE_BYTES = 4096       # read ahead of the current payload: small frames cost one system call, large ones a copy of 1.6 %
    EAGER_MOST = 65536 + 96  # bytes per channel and link that may be sent before the peer's OPEN: 64 KiB, its header and an OPEN
    FRAMES_QUEUED = 16
    WAITING_MARK = 128       # in the lane of an OPEN that was put aside: its sender blocks on it
    STEPS_MOST = 1 << 20

cdef packed struct Header:
    uint32_t length          # payload bytes
    uint8_t type
    uint8_t lane             # stream within the work; several lanes may share a socket
    uint16_t sequence        # low bits of the work's number in its channel
    uint64_t channel

# -- a compiled schedule ----------------------------------------------------------------------------------------------------------

cdef enum:
    SEND = 0
    RECV = 1
    RECV_REDUCE = 2
    COPY = 3
    REDUCE = 4
    SCALE = 5
    CONVERT = 6

cdef enum:
    BY_REDUCE = 1            # rt_reduce_fn(dst, left, right)
    BY_MIXED = 2             # rt_mixed_fn(dst, wide, half)

cdef struct Dep:
    int step                 # an earlier step of the same work
    Py_ssize_t delta         # items of mine allowed = delta + items of it done, until it is complete

cdef struct Step:
    int kind
    int stream
    int src
    int src2
    int dst
    int wire                 # bytes per item on the wire
    int src_size             # bytes per item of each operand
    int src2_size
    int dst_size
    int style                # BY_REDUCE or BY_MIXED
    bint read_later          # by a later step: what it writes had better stay in the caches
    bint swap                # the second operand is the left one (BY_REDUCE), or the wide one (BY_MIXED)
    void *kernel
    Py_ssize_t src_off       # bytes from the start of the buffer
    Py_ssize_t src2_off
    Py_ssize_t dst_off
    Py_ssize_t count         # items
    int dep_first
    int dep_count

cdef struct Stream:          # one direction of one lane to one peer: its steps in order
    int slot
    int lane
    bint sending
    int first
    int count

cdef struct Slot:            # one link that a schedule uses
    int peer                 # rank in the group
    int link                 # which of the links to that peer

cdef struct Plan:
    int step_count
    int stream_count
    int slot_count
    int local_count
    int buffer_count
    Step *steps
    Dep *deps
    Stream *streams
    Slot *slots
    int *stream_steps
    int *local_steps
    Py_ssize_t *temp_bytes   # [buffer_count], 0 for INPUT and OUTPUT
    Py_ssize_t temp_total
    Py_ssize_t touched[2]    # bytes of INPUT and OUTPUT from their start that steps touch
    Py_ssize_t footprint     # bytes of both together

# -- a work in flight --------------------------------------------------------------------------------------------------------------

cdef struct Link
cdef struct Channel
cdef struct WorkState

cdef struct Stash:           # a frame that came before the work it belongs to, or before it could be applied
    Stash *next
    Header header
    int link
    uint32_t used            # bytes already applied
    char data[1]

cdef struct StreamState:
    WorkState *work
    Stream *stream
    Link *link
    int position             # index among the stream's steps
    Py_ssize_t queued        # items of the current step handed to frames (sending)
    Py_ssize_t landed        # bytes of the current step landed (receiving)
    int claim_position       # where the next frame belongs: behind all that were accepted, landed or not (receiving)
    Py_ssize_t claimed
    Stash *stash
    StreamState *next        # in the link's list of sending streams
    StreamState *prev

cdef struct SlotState:
    WorkState *work
    Link *link
    bint open_queued
    bint peer_opened
    uint32_t eager           # bytes sent while the peer had not opened
    SlotState *next          # in the link's list of OPENs still to be queued
    unsigned char signature[SIGNATURE_BYTES]    # compared with this peer

cdef enum:
    STATE_FLYING = 0
    STATE_DONE = 1
    STATE_FAILED = 2

cdef struct WorkState:
    PyObject *handle         # the Python Work; NULL once it was told the outcome
    Plan *plan
    Channel *channel
    uint32_t sequence
    int state
    int remaining            # steps not complete and OPENs not handed over; 0 = done
    int unopened             # slots whose peer has not been heard of: kept until compared
    int stashed              # stash entries waiting in the streams
    int local_first          # first incomplete entry of plan.local_steps
    int slot_count
    bint past                # results are written past the caches, which what the ranks of this host touch would not fit
    bint alone               # its thread blocks on it and can make no other call
    double divisor           # size of the group, for SCALE
    char **buffers
    Py_ssize_t *done         # items complete, per step
    StreamState *streams
    SlotState *slots
    char *temps              # NULL: behind this struct
    WorkState *next               # in the channel, by sequence
    WorkState *prev
    WorkState *next_active
    WorkState *prev_active
    WorkState *next_finished
    unsigned char signature[SIGNATURE_BYTES]    # for peers that it has nothing to do with

cdef struct Path:            # what a channel knows of one link
    uint32_t unacked         # bytes sent for works that the peer has not opened
    uint32_t stashed
    uint64_t tick            # when it was served last, for round robin

cdef struct Channel:
    uint64_t id
    uint64_t group
    uint32_t next_sequence
    bint broken
    WorkState *first
    WorkState *last
    Stash *stash_first
    Stash *stash_last
    Path *paths
    Channel *next_hash

cdef struct Frame:           # a frame on its way out
    char head[80]            # header, and the signature of an OPEN
    uint32_t head_length
    uint32_t head_sent
    char *body
    uint32_t body_length
    uint32_t body_sent
    WorkState *work
    int step                 # -1: no data
    StreamState *stream
    bint owned               # body is a copy of ours, to be freed
    uint8_t type

cdef enum:
    TO_NOTHING = 0
    TO_OPEN = 1
    TO_STREAM = 2
    TO_STASH = 3
    TO_DROP = 4

ctypedef ssize_t (*transfer_fn)(Link *link, iovec *parts, int count) noexcept nogil

cdef struct Link:
    int fd
    int peer                 # rank in the world
    int index                # in the engine's list
    PyObject *owner          # the Python link behind a forwarding one
    transfer_fn send
    transfer_fn recv
    # Bytes go through rings in memory shared with the peer; the socket carries only wake-ups, and ends with the peer.
    bint shared
    bint asked               # the peer was told that this side sleeps
    bint deaf                # what comes can not be taken, and need not be for now
    uint32_t owed            # bytes consumed since the writer was last looked at
    rt_ring tx
    rt_ring rx
    void *memory
    size_t memory_bytes
    rt_rdma *rdma            # not NULL: the rings are written over RDMA; of `owner`
    bint readable
    bint writable
    bint hangup
    bint rx_dead
    bint tx_dead
    bint lost                # reported
    bint goodbye_in
    bint goodbye_out         # queued
    bint goodbye_sent
    # receiving
    char stage[STAGE_BYTES]
    uint32_t stage_pos
    uint32_t stage_len
    bint in_frame
    int target
    Header header
    uint32_t header_have     # bytes of the next header that came
    uint32_t left            # payload bytes not yet taken from the stream
    char open_bytes[SIGNATURE_BYTES]
    StreamState *stream
    Stash *stash
    char *scratch
    uint32_t scratch_pos
    uint32_t scratch_len
    # sending
    Frame frames[FRAMES_QUEUED]
    int frame_first
    int frame_count
    uint32_t queued_bytes
    StreamState *sending_first
    StreamState *sending_last
    SlotState *opening_first
    SlotState *opening_last
    uint64_t bytes_in
    uint64_t bytes_out

cdef enum:
    EVENT_LOST = 1
    EVENT_CLOSED = 2
    EVENT_MISMATCH = 3
    EVENT_PROTOCOL = 4

cdef struct Event:
    int kind
    int peer
    int code
    uint64_t group
    uint64_t channel
    uint32_t sequence
    unsigned char mine[SIGNATURE_BYTES]
    unsigned char theirs[SIGNATURE_BYTES]

cdef enum:
    BUCKETS = 1024

cdef struct Core:
    int poll_set
    int wake_read
    int wake_write
    int link_count
    int link_room
    int shared_count
    Py_ssize_t cache_bytes   # of the last level
    double moved             # when this rank last left a processor to its peers
    Link **links
    int turn
    Py_ssize_t budget
    uint64_t tick
    bint closing
    bint any_goodbye
    bint alarmed             # a peer or this rank began to block: see whether they wait for each other
    bint unfinished          # what moved last ended for want of budget: there may be more that no descriptor tells of
    WorkState *active_first
    WorkState *active_last
    int active_count
    WorkState *finished_first
    WorkState *finished_last
    Channel *buckets[BUCKETS]
    int channel_count
    Event *events            # at most one per link and one per channel
    int event_count
    int event_room
    Py_ssize_t segment       # bytes per piece of local work; small in tests
    uint32_t frame_most
    uint32_t scratch_room
    uint64_t works_done

cdef enum:
    PROGRESS_IDLE = 0        # nothing in flight
    PROGRESS_BLOCKED = 1     # waits for descriptors
    PROGRESS_BUDGET = 2      # could go on; the caller should let others run first

FLYING, DONE, FAILED = STATE_FLYING, STATE_DONE, STATE_FAILED
IDLE, BLOCKED, BUDGET = PROGRESS_IDLE, PROGRESS_BLOCKED, PROGRESS_BUDGET
LOST, CLOSED, MISMATCH, PROTOCOL = EVENT_LOST, EVENT_CLOSED, EVENT_MISMATCH, EVENT_PROTOCOL


def reduce_kernel(int dtype, int op):
    """Return the address of the loop that reduces ``dtype`` by ``op`` here, None where there is none; for ``rt.bench kernels``.

    It is ``void (void *dst, const void *left, const void *right, size_t items)``, the one that the engine calls.
    """
    cdef uintptr_t address = <uintptr_t>rt_reduce_kernel(dtype, op)
    return address or None


include "_arrays.pxi"
include "_lists.pxi"
include "_pool.pxi"
include "_program.pxi"
include "_links.pxi"
include "_rdma.pxi"
include "_shared.pxi"
include "_receive.pxi"
include "_send.pxi"
include "_works.pxi"
include "_deadlock.pxi"
include "_submit.pxi"
include "_engine.pxi"
include "_work.pxi"
include "_known.pxi"
