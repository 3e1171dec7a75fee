# A link through memory that two processes share: a ring for each direction, and a socket that wakes.
#
# May live here: how bytes go into and out of the rings of a link, and who wakes whom. May not: the ring itself (_ring.h), frames
# (_receive.pxi, _send.pxi), how two processes come to share memory (transports/shm.py).
#
# Rings that a peer writes over RDMA (_rdma.pxi) are received from, polled and slept on in the same way.
#
# Readiness is in the memory, not in a descriptor: such a link is always asked. The socket is read for two things only. A byte on it means
# "look again"; it is sent to a side that said it would sleep, for data as for room. Its end means that the peer is gone: what the peer
# wrote before is still in the ring, and is taken first.
#
# Before anybody sleeps on the engine's descriptor it must be armed (core_rest). Whoever polls instead need not, and costs the peer nothing.


cdef void ring_bell(Link *link) noexcept nogil:
    # A failure is the end of the peer, and that is found by reading. A full socket already holds bytes that wake.
    cdef char nothing = 0
    send(link.fd, &nothing, 1, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef void ring_answer(Link *link) noexcept nogil:
    """Read what was sent to wake this side, and find the end of the peer."""
    cdef char nothing[64]
    cdef ssize_t n = 64
    while n == 64:
        n = recv(link.fd, nothing, 64, MSG_DONTWAIT)
    if n == 0 or n < 0 and errno != EAGAIN and errno != EINTR:
        link.hangup = True


cdef ssize_t ring_send(Link *link, iovec *parts, int count) noexcept nogil:
    """Copy into the ring what fits, and show it piece by piece, so that the reader starts while this side still copies."""
    cdef int64_t room = rt_ring_room(&link.tx)
    cdef int64_t total = 0
    cdef int64_t rest
    cdef size_t nbytes, piece
    cdef const char *source
    cdef int i
    for i in range(count):
        total += parts[i].iov_len
    if room < 0:
        return -EPROTO
    if total > room:
        # So that items are seldom torn: those the reader must put together elsewhere.
        total = room - <int64_t>((link.tx.at + <uint64_t>room) % <uint64_t>RT_RING_UNIT)
    if total <= 0:
        return -EAGAIN
    rest = total
    for i in range(count):
        source = <const char *>parts[i].iov_base
        nbytes = parts[i].iov_len if <int64_t>parts[i].iov_len < rest else <size_t>rest
        rest -= nbytes
        while nbytes:
            piece = PIECE_BYTES - <size_t>(link.tx.at % PIECE_BYTES)
            if piece > nbytes:
                piece = nbytes
            if piece == PIECE_BYTES:
                rt_ring_put_piece(&link.tx, source)
            else:
                rt_ring_put(&link.tx, source, piece)
            source += piece
            nbytes -= piece
            if link.tx.at % PIECE_BYTES == 0 and rt_ring_publish(&link.tx):
                ring_bell(link)
        if not rest:
            break
    if rt_ring_publish(&link.tx):
        ring_bell(link)
    return total


cdef bint ring_receive(Core *core, Link *link) noexcept nogil:
    """Take what lies in the ring, where it lies; True if anything moved."""
    cdef const char *data = NULL
    cdef int64_t have
    cdef int64_t most = FRAME_MOST
    cdef uint32_t used = 0
    cdef bint moved = False
    cdef bint unhindered, ended
    if link.asked:
        rt_ring_reader_awake(&link.rx)
        link.asked = False
    if link.scratch_len:
        moved = drain_scratch(core, link)
        if not parse(core, link, data, 0, &used):
            return moved
    while most > 0 and not link.rx_dead:
        ended = link.hangup                     # asked first: what was written before the end must be found after it
        if link.rdma != NULL:
            have = rt_rdma_peek(link.rdma, &data)
            ended = have == 0 and rt_rdma_over(link.rdma)
        else:
            have = rt_ring_peek(&link.rx, &data)
        if have == 0 and not ended:
            break
        if have <= 0:
            if have < 0 or not link.goodbye_in:
                link_fail(core, link, EVENT_PROTOCOL if have < 0 else EVENT_LOST, 0)
            link.rx_dead = link.tx_dead = True
            return moved
        if have > PIECE_BYTES:
            have = PIECE_BYTES
        used = 0
        unhindered = parse(core, link, data, <uint32_t>have, &used)
        if used:
            moved = True
            most -= used
            core.budget -= used
            link.bytes_in += used
            if link.rdma != NULL:
                rt_rdma_consume(link.rdma, used)
            else:
                rt_ring_consume(&link.rx, used)
                link.owed += used
                if 4 * <uint64_t>link.owed >= link.rx.capacity:
                    ring_settle(link)
        if not unhindered:
            break
    return moved


cdef inline bint is_deaf(Core *core, Link *link) noexcept nogil:
    """Say whether the last frame of a link waits for other links, and nobody for what may come behind it: then it is not read on.

    Where somebody does, what comes is a reason to wake up: the frame is then set aside.
    """
    if not link.in_frame or link.left or link.target != TO_STREAM:
        return False
    return core.active_count < 2 or not others_wait(core, link, link.stream.work)


cdef void ring_settle(Link *link) noexcept nogil:
    """Wake a writer that waits for the room which was made."""
    if link.owed:
        link.owed = 0
        if rt_ring_writer_waits(&link.rx):
            ring_bell(link)


cdef bint core_rest(Core *core) noexcept nogil:
    """Ask to be woken; True if something can be moved already, so that nobody may sleep."""
    cdef int i
    cdef Link *link
    if core.shared_count == 0 or core.active_first == NULL and not core.closing:
        return False
    for i in range(core.link_count):
        link = core.links[i]
        if not link.shared or link.rx_dead:
            continue
        if link.rdma != NULL:
            if not rt_rdma_may_sleep(link.rdma, not link.deaf, link.frame_count and not link.tx_dead):
                return True
            continue
        if not link.deaf:
            link.asked = True
            if not rt_ring_reader_may_sleep(&link.rx):
                return True
        if link.frame_count and not link.tx_dead and not rt_ring_writer_may_sleep(&link.tx):
            return True
    return False


cdef enum:
    NEWS_IN_MEMORY = 1
    NEWS_OF_SOCKETS = 2


cdef double MOVE_SECONDS = 1e-3              # between two moves to another processor, which cost some 20 us


cdef void core_spread(Core *core, double now) noexcept nogil:
    """Leave a processor on which a peer that is awake runs too (_place.h). Who polls moves: it has nothing in that processor's cache."""
    cdef rt_processors taken
    cdef int here = rt_processor()
    cdef bint together = False
    cdef int i, place
    cdef Link *link
    rt_processors_none(&taken)
    for i in range(core.link_count):
        link = core.links[i]
        if link.shared and link.memory != NULL:
            rt_ring_tell_place(&link.tx, here)
            place = rt_ring_place(&link.rx)
            if place >= 0 and not rt_ring_reader_sleeps(&link.tx):
                rt_processors_add(&taken, place)
                together = together or place == here
    if together and now >= core.moved + MOVE_SECONDS:
        core.moved = now
        rt_leave_processors(&taken)


cdef int core_watch(Core *core, double until) noexcept nogil:
    """Poll the rings until there may be something to do or ``until`` has come; 0 then. Changes nothing, and needs no lock.

    Sockets are asked seldom, with a system call: the rest of the time goes to memory. With ``until`` 0, where cores are scarce, it looks
    once.
    """
    cdef int i, round
    cdef double now
    cdef Link *link
    while True:
        for round in range(64):
            for i in range(core.link_count):
                link = core.links[i]
                if link.rdma != NULL and not link.rx_dead:
                    if rt_rdma_has_news(link.rdma, not link.deaf, link.frame_count and not link.tx_dead):
                        return NEWS_IN_MEMORY
                elif link.shared and not link.rx_dead and link.memory != NULL:
                    if rt_ring_has_news(&link.rx) and not link.deaf:
                        return NEWS_IN_MEMORY
                    if link.frame_count and rt_ring_has_room(&link.tx):
                        return NEWS_IN_MEMORY
            rt_ring_pause()
        if rt_poll_sleep(core.poll_set, core.poll_set, 0) > 0:
            return NEWS_OF_SOCKETS
        now = rt_now()
        if now >= until:
            return 0
        core_spread(core, now)


cdef int core_yield(Core *core) noexcept nogil:
    """Where cores are scarce: let others run for a moment, since one of them may be who is waited for. Answers as ``core_watch``."""
    cdef int round, found
    for round in range(YIELDS):
        sched_yield()
        found = core_watch(core, 0)
        if found:
            return found
    return 0


cdef int ring_map(Core *core, Link *link, int fd, Py_ssize_t offset, Py_ssize_t capacity, bint first) except -1:
    """Map a pair of rings; ``first`` is the side that writes into the first of the two."""
    cdef Py_ssize_t one = RT_RING_HEAD_BYTES + capacity
    cdef char *memory = <char *>mmap(NULL, 2 * one, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)
    if <void *>memory == MAP_FAILED:
        raise OSError(errno, os.strerror(errno))
    link.memory, link.memory_bytes = memory, 2 * one
    rt_ring_open(&link.tx, memory + (0 if first else one), capacity)
    rt_ring_open(&link.rx, memory + (one if first else 0), capacity)
    link.shared = True
    core.shared_count += 1
    return 0


cdef void ring_unmap(Link *link) noexcept:
    """Let go of the rings, for who knows that nobody looks at them."""
    if link.memory != NULL:
        munmap(link.memory, link.memory_bytes)
        link.memory = NULL
    if link.rdma != NULL:
        link.rdma = NULL
        Py_DECREF(<object>link.owner)
        link.owner = NULL
