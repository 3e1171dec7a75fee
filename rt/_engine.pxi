# The Engine: what Python sees of links and works in flight.
#
# May live here: the entry points, the lock, and telling the outcome. May not: waiting. The engine never waits, never sleeps and never
# imports asyncio.
#
# One lock: every entry point takes it; what completes is told to its waiters, after the lock was released, by whoever made the
# progress. No Python code runs under the lock but that of Python links (and finalizers that the collector may run at any moment);
# code that comes back to the engine from there gets a RuntimeError, not a deadlock.


cdef char *array_memory(array, Py_ssize_t nbytes) except? NULL:
    """Return where a C-contiguous array of at least ``nbytes`` starts; NULL for None."""
    if array is None and not nbytes:
        return NULL
    cdef bint fits = cnp.PyArray_Check(array) and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>array)
    if not fits or cnp.PyArray_NBYTES(<cnp.ndarray>array) < nbytes:
        raise ValueError(f"needs a C-contiguous array of {nbytes} bytes, not {array!r}")
    return <char *>cnp.PyArray_DATA(<cnp.ndarray>array)


cdef call_out(function, argument):
    """Call ``function(argument)``; report what it raises, but return an interrupt, to be raised when all is in order."""
    try:
        function(argument)
    except Exception:
        PyErr_WriteUnraisable(function)
    except BaseException as interrupt:
        return interrupt
    return None


def engine_gone(work):
    """Make the error of a work whose engine was thrown away."""
    return RuntimeError("the engine of this work does not exist any more")


cdef class Engine:
    """All links of a process and the works in flight on them. Methods may be called from any thread.

    Args:
        pollable: False for engines whose links are all Python objects and polled by their owner (simulation).
        segment: bytes per piece of local work.
        frame_most: payload bytes per frame.
    """
    cdef Core core
    cdef pthread_mutex_t mutex
    cdef list link_table         # per world rank: list of indexes into core.links
    cdef object on_events        # called with a list of events, without the lock
    cdef readonly bint closed
    cdef readonly int watching   # threads that poll rings without the lock; changes under the GIL
    cdef public int sleepers     # threads that sleep on the descriptor, and loops that may; changes under the GIL
    cdef bint orphan             # in a forked child: nothing here may be believed
    cdef object __weakref__

    def __cinit__(self, *, bint pollable=True, Py_ssize_t segment=65536, uint32_t frame_most=FRAME_SENT, Py_ssize_t cache_bytes=0):
        cdef int fds[2]
        memset(&self.core, 0, sizeof(Core))
        self._new_lock()
        self.core.poll_set = self.core.wake_read = self.core.wake_write = -1
        self.core.cache_bytes = cache_bytes or rt_cache_bytes()
        self.core.segment = segment
        self.core.frame_most = min(frame_most, <uint32_t>FRAME_MOST)
        self.core.scratch_room = FRAME_MOST
        self.link_table = []
        self.on_events = None
        if pollable:
            self.core.poll_set = rt_poll_create()
            if self.core.poll_set < 0 or rt_wake_create(fds) < 0:
                raise OSError(errno, os.strerror(errno))
            self.core.wake_read, self.core.wake_write = fds[0], fds[1]
            if rt_poll_add(self.core.poll_set, self.core.wake_read, 0) < 0:
                raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        cdef int i
        cdef Channel *channel
        cdef Channel *next_channel
        self._close_links()
        while self.core.active_first != NULL:
            self._forsake(self.core.active_first)
        for i in range(BUCKETS):
            channel = self.core.buckets[i]
            while channel != NULL:
                next_channel = channel.next_hash
                while channel.first != NULL:
                    work_release(channel.first)
                self._free_stash(channel)
                free(channel.paths)
                free(channel)
                channel = next_channel
        for i in range(self.core.link_count):
            free(self.core.links[i].scratch)
            free(self.core.links[i])
        free(self.core.links)
        free(self.core.events)

    cdef int watch(self, double until) except -1:
        """Poll the rings, without the GIL, until there may be something to do or ``until`` has come; see ``core_watch``."""
        cdef int found
        self.watching += 1
        with nogil:
            found = core_watch(&self.core, until)
        self._watched()
        return found

    cdef int give_way(self) except -1:
        """Let other processes run for a moment; not 0 if there may be something to do then."""
        cdef int found
        self.watching += 1
        with nogil:
            found = core_yield(&self.core)
        self._watched()
        return found

    cdef void _watched(self):
        self.watching -= 1
        if self.closed:
            self._unmap()

    cdef void _unmap(self):
        """Give shared memory back, unless another thread still looks at it: then that one does."""
        cdef int i
        if self.watching == 0:
            for i in range(self.core.link_count):
                ring_unmap(self.core.links[i])

    cdef void _forsake(self, WorkState *work):
        """End a work whose engine goes away."""
        cdef Work handle = <Work>work.handle
        work_abandon(&self.core, work)
        work_finish(&self.core, work, STATE_FAILED)
        work.handle = NULL
        handle.work = NULL
        handle.fail(engine_gone)
        Py_DECREF(handle)

    cdef void _new_lock(self):
        cdef pthread_mutexattr_t attributes
        pthread_mutexattr_init(&attributes)
        pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK)
        pthread_mutex_init(&self.mutex, &attributes)

    cdef void _free_stash(self, Channel *channel):
        cdef Stash *entry
        while channel.stash_first != NULL:
            entry = channel.stash_first
            channel.stash_first = entry.next
            free(entry)
        channel.stash_last = NULL

    cdef void _free_told(self, Channel *channel):
        """Forget works that ended and only waited to be compared."""
        cdef WorkState *work = channel.first
        cdef WorkState *following
        while work != NULL:
            following = work.next
            if work.handle == NULL:
                work_release(work)
            work = following

    cdef inline int lock(self) except -1:
        cdef int failed
        # Never block with the GIL held: a Python link inside progress() may need it.
        if pthread_mutex_trylock(&self.mutex) != 0:
            with nogil:
                failed = pthread_mutex_lock(&self.mutex)
            if failed:
                raise RuntimeError("the engine was called from inside itself: by a Python link, a signal handler or a finalizer")
        return 0

    cdef inline void unlock(self):
        pthread_mutex_unlock(&self.mutex)

    # -- links

    def add_socket(self, int peer, sock):
        """Take over a connected, non-blocking socket as the next link to world rank ``peer``."""
        cdef Link *link
        self.lock()
        try:
            link = link_new(&self.core, peer)
            link.send, link.recv = tcp_send, tcp_recv
            link.fd = sock.detach()
            if rt_poll_add(self.core.poll_set, link.fd, <uintptr_t>(link.index + 1)) < 0:
                raise OSError(errno, os.strerror(errno))
            self._links_to(peer).append(link.index)
        finally:
            self.unlock()

    def add_shared(self, int peer, sock, int fd, Py_ssize_t offset, Py_ssize_t capacity, bint first):
        """Add a link to world rank ``peer`` through memory that both map; it takes over the socket, which only wakes.

        Args:
            fd: of the memory, which must be zero; it is mapped, and stays the caller's.
            offset: where in it this link's rings begin, a multiple of the page size.
            capacity: bytes of each ring, a power of two, at least 4096. Rings take ``2 * (512 + capacity)`` bytes.
            first: whether this rank is the one that writes into the first ring.
        """
        cdef Link *link
        if capacity < 4096 or capacity & (capacity - 1):
            raise ValueError(f"a ring holds a power of two of bytes, at least 4096, not {capacity}")
        self.lock()
        try:
            link = link_new(&self.core, peer)
            ring_map(&self.core, link, fd, offset, capacity, first)
            link.send = ring_send
            link.fd = sock.detach()
            if rt_poll_add(self.core.poll_set, link.fd, <uintptr_t>(link.index + 1)) < 0:
                raise OSError(errno, os.strerror(errno))
            self._links_to(peer).append(link.index)
        finally:
            self.unlock()

    def add_link(self, int peer, owner, int fd=-1):
        """Add a Python link: an object with ``send(memoryview) -> int`` and ``recv_into(memoryview) -> int``.

        Both move what they can now and return how much, 0 for nothing; ``recv_into`` returns -1 at the end of the stream. If there is a
        ``sendmsg(list of memoryviews) -> int``, it is called in place of ``send``. A descriptor ``fd`` that becomes readable says that the
        link can send or receive again, as ``ready`` does; it stays the owner's. An ``RdmaStream`` is not called, but used as it is.
        """
        cdef Link *link
        self.lock()
        try:
            link = link_new(&self.core, peer)
            Py_INCREF(owner)
            link.owner = <PyObject *>owner
            if isinstance(owner, RdmaStream):
                link.rdma, link.send, link.shared = (<RdmaStream>owner).rdma(), rdma_send, True
                link.fd = fd = os.dup(fd)
                self.core.shared_count += 1
            else:
                link.send, link.recv = (python_sendmsg if hasattr(owner, "sendmsg") else python_send), python_recv
            if fd >= 0 and rt_poll_add(self.core.poll_set, fd, <uintptr_t>(link.index + 1)) < 0:
                raise OSError(errno, os.strerror(errno))
            self._links_to(peer).append(link.index)
            return link.index
        finally:
            self.unlock()

    cdef list _links_to(self, int peer):
        if peer < 0:
            raise ValueError(f"there is no rank {peer}")
        while len(self.link_table) <= peer:
            self.link_table.append([])
        return self.link_table[peer]

    def links_to(self, int peer):
        """How many links lead to a world rank."""
        return len(self.link_table[peer]) if 0 <= peer < len(self.link_table) else 0

    cdef Link *_link(self, int peer, int which) except NULL:
        if not 0 <= which < self.links_to(peer):
            raise ValueError(f"there is no link {which} to rank {peer}")
        return self.core.links[<int>(<list>self.link_table[peer])[which]]

    @property
    def shares_memory(self):
        """Whether some link goes through rings in memory: then who submits must see to it that ``progress`` is called before he sleeps."""
        return self.core.shared_count > 0

    def fileno(self):
        """The descriptor that is readable when progress is possible."""
        return self.core.poll_set

    def ready(self, int index):
        """Say that a Python link can send or receive again, and wake whoever drives the engine. From any thread."""
        if not 0 <= index < self.core.link_count:
            raise IndexError(f"there is no link {index}")
        self.core.links[index].readable = self.core.links[index].writable = True
        self.wake()

    def wake(self):
        if self.core.wake_write >= 0:
            rt_wake_signal(self.core.wake_write)

    def set_event_handler(self, handler):
        self.on_events = handler

    # -- works

    cpdef int submit(self, Work handle, Program program, uint64_t group, uint64_t channel_id, bytes signature, list ranks, int size,
                     source, target, Py_ssize_t budget) except -1:
        """Start a work and make progress at once.

        Args:
            handle: told of the outcome.
            group, channel_id: identities agreed by all ranks.
            signature: 64 bytes compared with the peers'; the first four are filled in here. Or as many for every rank of the group, to be
                compared with that one only.
            ranks: world rank of each rank of the group.
            source, target: C-contiguous arrays, or None. They are kept until the work ends.
            budget: bytes of progress to make now.

        Returns:
            IDLE, BLOCKED or BUDGET.
        """
        cdef Plan *plan = &program.plan
        cdef WorkState *work
        cdef Channel *channel
        cdef int i, status
        cdef char *memory[2]
        cdef bint by_peer = PyBytes_GET_SIZE(signature) != SIGNATURE_BYTES
        if by_peer and PyBytes_GET_SIZE(signature) != SIGNATURE_BYTES * size:
            raise ValueError("a signature has 64 bytes")
        memory[0] = array_memory(source, plan.touched[0])
        memory[1] = array_memory(target, plan.touched[1])
        if handle.work != NULL or handle.state != STATE_FLYING:
            raise RuntimeError("a work is submitted once")
        work = work_new(plan)
        if work == NULL:
            raise MemoryError
        memcpy(work.signature, PyBytes_AS_STRING(signature), SIGNATURE_BYTES)
        work.divisor = size
        work.buffers[0], work.buffers[1] = memory[0], memory[1]
        try:
            for i in range(plan.slot_count):
                work.slots[i].link = self._link(ranks[plan.slots[i].peer], plan.slots[i].link)
                memcpy(work.slots[i].signature,
                       PyBytes_AS_STRING(signature) + (plan.slots[i].peer * SIGNATURE_BYTES if by_peer else 0), SIGNATURE_BYTES)
            self.lock()
        except BaseException:
            work_free(work)
            raise
        channel = channel_get(&self.core, channel_id) if not self.closed else NULL
        if channel == NULL:
            self.unlock()
            work_free(work)
            raise RuntimeError("the engine is closed") if self.closed else MemoryError()
        channel.group = group
        handle.attach(work, program, source, target)
        with nogil:
            work_start(&self.core, work, channel)
            handle.sequence = work.sequence
            status = core_progress(&self.core, budget, self.core.link_count > self.core.shared_count)
        self._after()
        # The caller is served and may not come back, or not soon, but others may wait for the rest.
        if handle.state != STATE_FLYING or self.sleepers > 1:
            if status == PROGRESS_BUDGET or self.core.active_count and self.rest():
                self.wake()
        return status

    def progress(self, Py_ssize_t budget):
        """Move what can be moved, up to about ``budget`` bytes; return IDLE, BLOCKED or BUDGET.

        After IDLE and BLOCKED the descriptor becomes readable when there is more to do: the caller may sleep on it.
        """
        cdef int status = self.advance(budget, True)
        return PROGRESS_BUDGET if status != PROGRESS_BUDGET and self.rest() else status

    cdef int advance(self, Py_ssize_t budget, bint look) except -1:
        """As ``progress``, for callers that will ask again: before anyone sleeps, ``rest`` must say that he may.

        Without ``look`` sockets are not asked; whoever has not slept need not, where they only wake.
        """
        cdef int status
        self.lock()
        if self.closed:
            self.unlock()
            return PROGRESS_IDLE
        with nogil:
            status = core_progress(&self.core, budget, look or self.core.link_count > self.core.shared_count)
        self._after()
        return status

    cdef bint rest(self) except -1:
        """Arm the descriptor before a sleep; True if there is something to do already."""
        cdef bint busy
        if self.core.shared_count == 0 and not self.core.unfinished:
            return False
        self.lock()
        # Who was told of the end of a work may have submitted the next one since the engine was asked, and its budget may have ended.
        busy = not self.closed and (self.core.unfinished or core_rest(&self.core))
        self.unlock()
        return busy

    cdef int _after(self) except -1:
        """Tell the outcome of finished works, with the lock held on entry and released on return."""
        cdef WorkState *work
        cdef Work handle
        cdef list ended = None
        cdef list events = None
        while self.core.finished_first != NULL:
            work = self.core.finished_first
            self.core.finished_first = work.next_finished
            if self.core.finished_first == NULL:
                self.core.finished_last = NULL
            handle = <Work>work.handle
            handle.work = NULL
            handle.state = work.state
            work.handle = NULL
            if ended is None:
                ended = []
            ended.append(handle)
            Py_DECREF(handle)
            if work.unopened == 0 or work.channel.broken:
                work_release(work)
        if self.core.event_count:
            events = self._take_events()
        self.unlock()
        # Whatever one of these calls raises, the others are owed theirs.
        interrupt = None
        if ended is not None:
            for handle in ended:
                interrupt = (<Work>handle).tell() or interrupt
        if events is not None and self.on_events is not None:
            interrupt = call_out(self.on_events, events) or interrupt
        if interrupt is not None:
            self.wake()                             # who asked for progress will not look after the rest
            raise interrupt
        return 0

    cdef list _take_events(self):
        cdef Event *event
        cdef int i
        events = []
        for i in range(self.core.event_count):
            event = &self.core.events[i]
            events.append((event.kind, event.peer, event.code, event.group, event.channel, event.sequence,
                           PyBytes_FromStringAndSize(<char *>event.mine, SIGNATURE_BYTES),
                           PyBytes_FromStringAndSize(<char *>event.theirs, SIGNATURE_BYTES)))
        self.core.event_count = 0
        return events

    def break_group(self, uint64_t group, error):
        """Fail every work of a group, in flight and stashed; ``error`` makes the exception of each from its Work. Returns one, or None."""
        cdef object ended = None
        cdef WorkState *work
        cdef WorkState *following
        cdef Channel *channel
        cdef int i
        self.lock()
        if self.orphan:
            self.unlock()
            return None
        work = self.core.active_first
        while work != NULL:
            following = work.next_active
            if work.channel.group == group:
                if ended is None:
                    ended = <Work>work.handle
                (<Work>work.handle).error = error
                (<Work>work.handle).received = received_bytes(work)
                work_abandon(&self.core, work)
                work_finish(&self.core, work, STATE_FAILED)
            work = following
        for i in range(BUCKETS):
            channel = self.core.buckets[i]
            while channel != NULL:
                if channel.group == group:
                    channel.broken = True
                    self._free_stash(channel)
                    self._free_told(channel)
                channel = channel.next_hash
        self._after()
        if self.core.active_count:
            self.wake()                         # a frame of this group may have held up a link; what lies behind it raises no new edge
        return ended

    def waiting_for(self, Work handle):
        """Whom a work in flight waits for, for messages: ``(absent, late)``, sorted world ranks.

        Absent ranks have not called; late ones have, but owe data: they may be held up themselves.
        """
        cdef WorkState *work
        cdef int i
        cdef StreamState *state
        absent = set()
        late = set()
        self.lock()
        work = handle.work
        if work != NULL:
            for i in range(work.slot_count):
                if not work.slots[i].peer_opened:
                    absent.add(work.slots[i].link.peer)
            for i in range(work.plan.stream_count):
                state = &work.streams[i]
                if not state.stream.sending and state.position < state.stream.count:
                    late.add(state.link.peer)
        self.unlock()
        return sorted(absent), sorted(late - absent)

    def in_flight(self):
        """Number of works that have not ended."""
        return self.core.active_count

    def statistics(self):
        """``{"works": ended so far, "bytes_in": ..., "bytes_out": ...}`` over all links."""
        cdef int i
        bytes_in = bytes_out = 0
        for i in range(self.core.link_count):
            bytes_in += self.core.links[i].bytes_in
            bytes_out += self.core.links[i].bytes_out
        return {"works": self.core.works_done, "bytes_in": bytes_in, "bytes_out": bytes_out}

    # -- leaving

    def say_goodbye(self):
        """Begin an orderly exit: GOODBYE on every link after what is queued; what still comes is read and dropped."""
        self.lock()
        self.core.closing = True
        self.unlock()

    def goodbyes_missing(self):
        """World ranks whose GOODBYE, or ours to them, is still outstanding."""
        cdef int i
        cdef Link *link
        missing = set()
        for i in range(self.core.link_count):
            link = self.core.links[i]
            if not (link.goodbye_in or link.rx_dead) or not (link.goodbye_sent or link.tx_dead):
                missing.add(link.peer)
        return sorted(missing)

    def close(self):
        """Close every descriptor. Works still in flight must have been failed before."""
        self.lock()
        self.closed = True
        self._close_links()
        self.unlock()

    cdef void _close_links(self):
        cdef int i
        for i in range(self.core.link_count):
            link_close(&self.core, self.core.links[i])
        self._unmap()
        self._close_poll_set()

    cdef void _close_poll_set(self):
        if self.core.poll_set >= 0:
            close(self.core.poll_set)
            close(self.core.wake_read)
            if self.core.wake_write != self.core.wake_read:
                close(self.core.wake_write)
        self.core.poll_set = self.core.wake_read = self.core.wake_write = -1

    def abandon_in_child(self):
        """After fork, in the child: close the descriptors, so that the child cannot keep the parent's connections open."""
        cdef int i
        cdef Link *link
        self._new_lock()                            # whoever held it does not exist here, and left things as they were
        self.closed = self.orphan = True
        for i in range(self.core.link_count):
            link = self.core.links[i]
            link.rx_dead = link.tx_dead = link.lost = True
            ring_unmap(link)
            if link.fd >= 0:
                close(link.fd)
                link.fd = -1
        self._close_poll_set()                      # an epoll set is shared with the parent: remove nothing from it
