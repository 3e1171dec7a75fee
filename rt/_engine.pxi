# Channels, works, and the rules by which progress is made.
#
# May live here: what a work waits for, when it is done, how signatures are compared, how a group breaks, and the Engine that Python
# sees. May not: waiting. The engine never waits, never sleeps and never imports asyncio.
#
# The rules.
#   Land, then apply (_wire.pxi).   In cache: bytes are reduced in pieces while they are hot, with no extra pass.
#   Bounded: progress() returns IDLE, BLOCKED or BUDGET; links are served round robin from where it stopped.
#   Sticky per group: the first error fails every work of that group; other groups on the same links go on.
#   Try first, arm later: submit() makes progress at once.
#   One lock: every entry point takes it; what completes is told to its waiters by whoever made the progress.


# -- channels --------------------------------------------------------------------------------------------------------------------------

cdef Channel *channel_get(Core *core, uint64_t id) noexcept nogil:
    """Find a channel, or make it: frames may come before the group or the tag is known here."""
    cdef int bucket = <int>((id ^ (id >> 32)) % BUCKETS)
    cdef Channel *channel = core.buckets[bucket]
    while channel != NULL:
        if channel.id == id:
            return channel
        channel = channel.next_hash
    channel = <Channel *>calloc(1, sizeof(Channel))
    if channel == NULL:
        return NULL
    channel.paths = <Path *>calloc(core.link_count + 1, sizeof(Path))
    if channel.paths == NULL:
        free(channel)
        return NULL
    channel.id = id
    channel.next_hash = core.buckets[bucket]
    core.buckets[bucket] = channel
    core.channel_count += 1
    return channel


cdef WorkState *channel_find(Channel *channel, uint16_t sequence) noexcept nogil:
    cdef WorkState *work = channel.first
    while work != NULL and <uint16_t>work.sequence != sequence:
        work = work.next
    return work


cdef void channel_remove(Channel *channel, WorkState *work) noexcept nogil:
    if work.prev != NULL:
        work.prev.next = work.next
    else:
        channel.first = work.next
    if work.next != NULL:
        work.next.prev = work.prev
    else:
        channel.last = work.prev


cdef void open_received(Core *core, Link *link, Channel *channel, uint16_t sequence, const char *theirs) noexcept nogil:
    """Compare a peer's signature with ours. Nothing that comes under a differing one is ever applied."""
    cdef WorkState *work = channel_find(channel, sequence)
    cdef SlotState *slot
    cdef Event *event
    cdef int i
    if work != NULL and memcmp(work.signature, theirs, SIGNATURE_BYTES) == 0:
        for i in range(work.slot_count):
            slot = &work.slots[i]
            if slot.link == link and not slot.peer_opened:
                slot.peer_opened = True
                channel.paths[link.index].unacked -= slot.eager
                work.unopened -= 1
                if work.unopened == 0 and work.state != STATE_FLYING and work.handle == NULL:
                    work_release(work)
                return
        link_fail(core, link, EVENT_PROTOCOL, FRAME_OPEN)
        return
    channel.broken = True
    event = event_new(core, EVENT_MISMATCH, link.peer, 0)
    if event == NULL:
        return
    event.group = channel.group
    event.channel = channel.id
    memcpy(event.theirs, theirs, SIGNATURE_BYTES)
    if work != NULL:
        event.sequence = work.sequence
        memcpy(event.mine, work.signature, SIGNATURE_BYTES)


# -- events, for Python to judge ----------------------------------------------------------------------------------------------------------

cdef Event *event_new(Core *core, int kind, int peer, int code) noexcept nogil:
    cdef Event *event
    if core.event_count == EVENTS_MOST:
        return NULL                         # the first causes are the ones that matter
    event = &core.events[core.event_count]
    core.event_count += 1
    memset(event, 0, sizeof(Event))
    event.kind = kind
    event.peer = peer
    event.code = code
    return event


cdef void link_fail(Core *core, Link *link, int kind, int code) noexcept nogil:
    """A link broke: nothing more is read from it, and Python is told once."""
    link.rx_dead = link.tx_dead = True
    if not link.lost:
        link.lost = True
        if not core.closing:
            event_new(core, kind, link.peer, code)


# -- works ----------------------------------------------------------------------------------------------------------------------------------

cdef void work_finish(Core *core, WorkState *work, int state) noexcept nogil:
    if work.state != STATE_FLYING:
        return
    work.state = state
    if work.prev_active != NULL:
        work.prev_active.next_active = work.next_active
    else:
        core.active_first = work.next_active
    if work.next_active != NULL:
        work.next_active.prev_active = work.prev_active
    else:
        core.active_last = work.prev_active
    core.active_count -= 1
    core.works_done += 1
    work.next_finished = NULL
    if core.finished_last != NULL:
        core.finished_last.next_finished = work
    else:
        core.finished_first = work
    core.finished_last = work


cdef void work_release(WorkState *work) noexcept nogil:
    """Forget a finished work: its outcome was told, and every peer's signature was compared or never will be."""
    channel_remove(work.channel, work)
    free(work)


cdef void work_abandon(Core *core, WorkState *work) noexcept nogil:
    """Take a failing work out of its links, so that its memory is free at once; frames under way are finished from a copy."""
    cdef Link *link
    cdef Frame *frame
    cdef Stash *entry
    cdef SlotState *slot
    cdef SlotState **at
    cdef char *copy
    cdef int i, k
    for i in range(work.plan.stream_count):
        sending_remove(work.streams[i].link, &work.streams[i])
        while work.streams[i].stash != NULL:
            entry = work.streams[i].stash
            work.streams[i].stash = entry.next
            free(entry)
    for i in range(work.slot_count):
        link = work.slots[i].link
        at = &link.opening_first
        link.opening_last = NULL
        while at[0] != NULL:
            slot = at[0]
            if slot.work == work:
                at[0] = slot.next
            else:
                link.opening_last = slot
                at = &slot.next
        if link.in_frame and link.target == TO_STREAM and link.stream.work == work:
            link.target = TO_DROP
            link.scratch_len = link.scratch_pos = 0
        for k in range(link.frame_count):
            frame = &link.frames[(link.frame_first + k) % FRAMES_QUEUED]
            if frame.work != work:
                continue
            frame.work = NULL
            if frame.body_length and not frame.owned:
                copy = <char *>malloc(frame.body_length)
                if copy != NULL:
                    memcpy(copy, frame.body, frame.body_length)
                    frame.body = copy
                    frame.owned = True
                else:
                    link_fail(core, link, EVENT_LOST, 0)


cdef bint run_local(Core *core, WorkState *work) noexcept nogil:
    """Run the local steps of a work as far as hazards and budget allow; True if anything moved."""
    cdef Plan *plan = work.plan
    cdef bint moved = False
    cdef int i, index
    cdef Py_ssize_t items, piece, limit
    cdef Step *step
    if work.stashed:
        for i in range(plan.stream_count):
            if work.streams[i].stash != NULL and drain_stash(core, &work.streams[i]):
                moved = True
            if work.state != STATE_FLYING:
                return True
    for i in range(work.local_first, plan.local_count):
        index = plan.local_steps[i]
        step = &plan.steps[index]
        if work.done[index] == step.count:
            if i == work.local_first:
                work.local_first += 1
            continue
        limit = step_limit(work, step)
        piece = core.segment // step.dst_size
        if piece < 1:
            piece = 1
        while work.done[index] < limit and core.budget > 0:
            items = limit - work.done[index]
            if items > piece:
                items = piece
            run_step(work, step, work.done[index], items)
            core.budget -= items * step.dst_size
            moved = True
            step_advance(core, work, index, items)
            if work.state != STATE_FLYING:
                return True
    return moved


cdef void run_step(WorkState *work, Step *step, Py_ssize_t at, Py_ssize_t items) noexcept nogil:
    cdef char *dst = work.buffers[step.dst] + step.dst_off + at * step.dst_size
    cdef char *src = work.buffers[step.src] + step.src_off + at * step.src_size
    if step.kind == COPY:
        memcpy(dst, src, items * step.dst_size)
    elif step.kind == REDUCE:
        run_reduction(step, dst, src, work.buffers[step.src2] + step.src2_off + at * step.src2_size, items)
    elif step.kind == SCALE:
        (<rt_scale_fn>step.kernel)(dst, src, items, work.divisor)
    else:
        (<rt_convert_fn>step.kernel)(dst, src, items)


cdef bint peer_left(WorkState *work, int *peer) noexcept nogil:
    """Say whether a work needs something from a peer that said GOODBYE without giving it."""
    cdef int i
    cdef StreamState *state
    for i in range(work.slot_count):
        if work.slots[i].link.goodbye_in and not work.slots[i].peer_opened:
            peer[0] = work.slots[i].link.peer
            return True
    for i in range(work.plan.stream_count):
        state = &work.streams[i]
        if state.link.goodbye_in and not state.stream.sending and state.stash == NULL and state.position < state.stream.count:
            if not (state.link.in_frame and state.link.stream == state):
                peer[0] = state.link.peer
                return True
    return False


cdef void check_goodbyes(Core *core) noexcept nogil:
    cdef WorkState *work = core.active_first
    cdef Event *event
    cdef int peer = -1
    while work != NULL:
        if not work.channel.broken and peer_left(work, &peer):
            work.channel.broken = True
            event = event_new(core, EVENT_CLOSED, peer, 0)
            if event != NULL:
                event.group = work.channel.group
                event.channel = work.channel.id
                event.sequence = work.sequence
                memcpy(event.mine, work.signature, SIGNATURE_BYTES)
        work = work.next_active


cdef void take_events(Core *core) noexcept nogil:
    """Learn which sockets became ready."""
    cdef rt_event ready[64]
    cdef int count, i
    cdef Link *link
    if core.poll_set < 0:
        return
    while True:
        count = rt_poll_take(core.poll_set, ready, 64)
        for i in range(count):
            if ready[i].token == 0:
                rt_wake_drain(core.wake_read)
                continue
            link = core.links[ready[i].token - 1]
            if ready[i].flags & RT_POLL_READ:
                link.readable = True
            if ready[i].flags & RT_POLL_WRITE:
                link.writable = True
            if ready[i].flags & RT_POLL_HUP:
                link.hangup = link.readable = True
        if count < 64:
            return


cdef int core_progress(Core *core, Py_ssize_t budget) noexcept nogil:
    cdef bint moved = True
    cdef int i
    cdef Link *link
    cdef WorkState *work
    cdef WorkState *following
    take_events(core)
    core.budget = budget
    while moved and core.budget > 0:
        moved = False
        for i in range(core.link_count):
            link = core.links[(core.turn + i) % core.link_count]
            if link.readable or link.scratch_len or link.stage_len:
                moved |= link_receive(core, link)
        work = core.active_first
        while work != NULL:
            following = work.next_active
            if work.local_first < work.plan.local_count or work.stashed:
                moved |= run_local(core, work)
            work = following
        for i in range(core.link_count):
            link = core.links[(core.turn + i) % core.link_count]
            if link.frame_count or link.sending_first != NULL or link.opening_first != NULL or core.closing:
                moved |= link_transmit(core, link)
        if core.link_count:
            core.turn = (core.turn + 1) % core.link_count
    if core.any_goodbye and core.active_first != NULL:
        check_goodbyes(core)
    if moved:
        return PROGRESS_BUDGET
    return PROGRESS_BLOCKED if core.active_first != NULL else PROGRESS_IDLE


# -- submitting -----------------------------------------------------------------------------------------------------------------------------

cdef Py_ssize_t aligned(Py_ssize_t nbytes) noexcept nogil:
    return (nbytes + 63) // 64 * 64


cdef WorkState *work_new(Plan *plan) noexcept nogil:
    """One block for everything a work needs, temporary buffers included."""
    cdef Py_ssize_t base = aligned(sizeof(WorkState))
    cdef Py_ssize_t at_buffers = base
    cdef Py_ssize_t at_done = at_buffers + aligned(plan.buffer_count * sizeof(char *))
    cdef Py_ssize_t at_streams = at_done + aligned(plan.step_count * sizeof(Py_ssize_t))
    cdef Py_ssize_t at_slots = at_streams + aligned(plan.stream_count * sizeof(StreamState))
    cdef Py_ssize_t at_temps = at_slots + aligned(plan.slot_count * sizeof(SlotState))
    cdef char *block = <char *>malloc(at_temps + plan.temp_total + 64)
    cdef WorkState *work = <WorkState *>block
    cdef char *temp
    cdef int i
    if block == NULL:
        return NULL
    # Small temporaries are cleared too: barriers send an item that nobody wrote.
    memset(block, 0, at_temps + (plan.temp_total + 64 if plan.temp_total <= 4096 else 0))
    work.plan = plan
    work.buffers = <char **>(block + at_buffers)
    work.done = <Py_ssize_t *>(block + at_done)
    work.streams = <StreamState *>(block + at_streams)
    work.slots = <SlotState *>(block + at_slots)
    temp = block + at_temps
    temp += (64 - <uintptr_t>temp % 64) % 64
    for i in range(2, plan.buffer_count):
        work.buffers[i] = temp
        temp += plan.temp_bytes[i]
    return work


cdef void work_start(Core *core, WorkState *work, Channel *channel) noexcept nogil:
    """Give a work its place in its channel and on its links, and apply what already came for it."""
    cdef Plan *plan = work.plan
    cdef SlotState *slot
    cdef StreamState *state
    cdef Stash **at
    cdef Stash *entry
    cdef Link *link
    cdef int i
    work.channel = channel
    work.sequence = channel.next_sequence
    channel.next_sequence += 1
    memcpy(work.signature, &work.sequence, 4)
    work.prev = channel.last
    if channel.last != NULL:
        channel.last.next = work
    else:
        channel.first = work
    channel.last = work
    work.prev_active = core.active_last
    if core.active_last != NULL:
        core.active_last.next_active = work
    else:
        core.active_first = work
    core.active_last = work
    core.active_count += 1
    work.slot_count = work.unopened = plan.slot_count
    work.remaining = plan.step_count + plan.slot_count
    for i in range(plan.slot_count):
        slot = &work.slots[i]
        slot.work = work
        if slot.link.opening_last != NULL:
            slot.link.opening_last.next = slot
        else:
            slot.link.opening_first = slot
        slot.link.opening_last = slot
    for i in range(plan.stream_count):
        state = &work.streams[i]
        state.work = work
        state.stream = &plan.streams[i]
        state.link = work.slots[plan.streams[i].slot].link
        if state.stream.sending:
            state.prev = state.link.sending_last
            if state.link.sending_last != NULL:
                state.link.sending_last.next = state
            else:
                state.link.sending_first = state
            state.link.sending_last = state
    at = &channel.stash_first
    channel.stash_last = NULL
    while at[0] != NULL:
        entry = at[0]
        if entry.header.sequence != <uint16_t>work.sequence:
            channel.stash_last = entry
            at = &entry.next
            continue
        at[0] = entry.next
        entry.next = NULL
        link = core.links[entry.link]
        channel.paths[entry.link].stashed -= entry.header.length + HEADER_BYTES
        replay(core, work, channel, link, entry)
    if work.remaining == 0:
        work_finish(core, work, STATE_DONE)


cdef void replay(Core *core, WorkState *work, Channel *channel, Link *link, Stash *entry) noexcept nogil:
    """Hand a frame that came too early to the work it was for."""
    cdef StreamState *state
    cdef Stash **tail
    if channel.broken:
        free(entry)
    elif entry.header.type == FRAME_OPEN:
        open_received(core, link, channel, entry.header.sequence, entry.data)
        free(entry)
    else:
        state = receiving_stream(work, link, entry.header.lane)
        if state == NULL:
            link_fail(core, link, EVENT_PROTOCOL, FRAME_DATA)
            free(entry)
            return
        tail = &state.stash
        while tail[0] != NULL:
            tail = &tail[0].next
        tail[0] = entry
        work.stashed += 1


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
    cdef object __weakref__

    def __cinit__(self, *, bint pollable=True, Py_ssize_t segment=65536, uint32_t frame_most=FRAME_MOST):
        cdef int fds[2]
        memset(&self.core, 0, sizeof(Core))
        pthread_mutex_init(&self.mutex, NULL)
        self.core.poll_set = self.core.wake_read = self.core.wake_write = -1
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
        for i in range(self.core.link_count):
            free(self.core.links[i].scratch)
            free(self.core.links[i])
        free(self.core.links)
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

    cdef void _free_stash(self, Channel *channel):
        cdef Stash *entry
        while channel.stash_first != NULL:
            entry = channel.stash_first
            channel.stash_first = entry.next
            free(entry)
        channel.stash_last = NULL

    cdef inline void lock(self):
        # Never block with the GIL held: a Python link inside progress() may need it.
        if pthread_mutex_trylock(&self.mutex) != 0:
            with nogil:
                pthread_mutex_lock(&self.mutex)

    cdef inline void unlock(self):
        pthread_mutex_unlock(&self.mutex)

    # -- links

    def add_socket(self, int peer, sock):
        """Take over a connected, non-blocking socket as the next link to world rank ``peer``."""
        cdef int fd = sock.detach()
        cdef Link *link = link_new(&self.core, peer)
        link.fd = fd
        link.send, link.recv = tcp_send, tcp_recv
        if rt_poll_add(self.core.poll_set, fd, <uintptr_t>(link.index + 1)) < 0:
            raise OSError(errno, os.strerror(errno))
        self._link_of(peer).append(link.index)

    def add_link(self, int peer, owner):
        """Add a Python link: an object with ``send(memoryview) -> int`` and ``recv_into(memoryview) -> int``.

        Both move what they can now and return how much, 0 for nothing; ``recv_into`` returns -1 at the end of the stream.
        """
        cdef Link *link = link_new(&self.core, peer)
        Py_INCREF(owner)
        link.owner = <PyObject *>owner
        link.send, link.recv = python_send, python_recv
        self._link_of(peer).append(link.index)
        return link.index

    cdef list _link_of(self, int peer):
        while len(self.link_table) <= peer:
            self.link_table.append([])
        return self.link_table[peer]

    def links_to(self, int peer):
        """How many links lead to a world rank."""
        return len(self.link_table[peer]) if peer < len(self.link_table) else 0

    def fileno(self):
        """The descriptor that is readable when progress is possible."""
        return self.core.poll_set

    def ready(self, int index):
        """Say that a Python link can send or receive again, and wake whoever drives the engine. From any thread."""
        self.core.links[index].readable = self.core.links[index].writable = True
        self.wake()

    def wake(self):
        if self.core.wake_write >= 0:
            rt_wake_signal(self.core.wake_write)

    def set_event_handler(self, handler):
        self.on_events = handler

    # -- works

    def submit(self, Work handle not None, Program program not None, uint64_t group, uint64_t channel_id, bytes signature,
               ranks, int size, source, target, Py_ssize_t budget):
        """Start a work and make progress at once.

        Args:
            handle: told of the outcome.
            group, channel_id: identities agreed by all ranks.
            signature: 64 bytes compared with the peers'; the first four are filled in here.
            ranks: world rank of each rank of the group.
            source, target: C-contiguous arrays, or None. They are kept until the work ends.
            budget: bytes of progress to make now.

        Returns:
            IDLE, BLOCKED or BUDGET.
        """
        cdef Plan *plan = &program.plan
        cdef WorkState *work = work_new(plan)
        cdef Channel *channel
        cdef int i, peer, status
        cdef bint wake_others
        if work == NULL:
            raise MemoryError
        if PyBytes_GET_SIZE(signature) != SIGNATURE_BYTES:
            free(work)
            raise ValueError("a signature has 64 bytes")
        memcpy(work.signature, PyBytes_AS_STRING(signature), SIGNATURE_BYTES)
        work.divisor = size
        if source is not None:
            work.buffers[0] = <char *>cnp.PyArray_DATA(<cnp.ndarray>source)
        if target is not None:
            work.buffers[1] = <char *>cnp.PyArray_DATA(<cnp.ndarray>target)
        self.lock()
        if self.closed:
            self.unlock()
            free(work)
            raise RuntimeError("the engine is closed")
        for i in range(plan.slot_count):
            peer = ranks[plan.slots[i].peer]
            work.slots[i].link = self.core.links[<int>(<list>self.link_table[peer])[plan.slots[i].link]]
        channel = channel_get(&self.core, channel_id)
        if channel == NULL:
            self.unlock()
            free(work)
            raise MemoryError
        channel.group = group
        handle.attach(work, program, source, target)
        with nogil:
            work_start(&self.core, work, channel)
        handle.sequence = work.sequence
        with nogil:
            status = core_progress(&self.core, budget)
        self._after()
        return status

    def progress(self, Py_ssize_t budget):
        """Move what can be moved, up to about ``budget`` bytes; return IDLE, BLOCKED or BUDGET."""
        cdef int status
        self.lock()
        with nogil:
            status = core_progress(&self.core, budget)
        self._after()
        return status

    cdef int _after(self) except -1:
        """Tell the outcome of finished works, with the lock held on entry and released on return."""
        cdef WorkState *work
        cdef Work handle
        cdef list told = None
        cdef list events = None
        while self.core.finished_first != NULL:
            work = self.core.finished_first
            self.core.finished_first = work.next_finished
            if self.core.finished_first == NULL:
                self.core.finished_last = NULL
            handle = <Work>work.handle
            handle.detach(work.state)
            work.handle = NULL
            if handle.waiters is not None:
                if told is None:
                    told = []
                told.append(handle)
            Py_DECREF(handle)
            if work.unopened == 0 or work.channel.broken:
                work_release(work)
        if self.core.event_count:
            events = self._take_events()
        self.unlock()
        if told is not None:
            for handle in told:
                (<Work>handle).tell()
        if events is not None and self.on_events is not None:
            self.on_events(events)
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
        """Fail every work of a group, in flight and stashed; ``error`` makes the exception of each from its Work."""
        cdef WorkState *work
        cdef WorkState *following
        cdef Channel *channel
        cdef int i
        self.lock()
        work = self.core.active_first
        while work != NULL:
            following = work.next_active
            if work.channel.group == group:
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
                channel = channel.next_hash
        self._after()

    def waiting_for(self, Work handle):
        """World ranks a work in flight still needs something from; for messages."""
        cdef WorkState *work
        cdef int i
        cdef StreamState *state
        peers = set()
        self.lock()
        work = handle.work
        if work != NULL:
            for i in range(work.slot_count):
                if not work.slots[i].peer_opened:
                    peers.add(work.slots[i].link.peer)
            for i in range(work.plan.stream_count):
                state = &work.streams[i]
                if not state.stream.sending and state.position < state.stream.count:
                    peers.add(state.link.peer)
        self.unlock()
        return sorted(peers)

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
        if self.core.poll_set >= 0:
            close(self.core.poll_set)
            close(self.core.wake_read)
            if self.core.wake_write != self.core.wake_read:
                close(self.core.wake_write)
        self.core.poll_set = self.core.wake_read = self.core.wake_write = -1

    def abandon_in_child(self):
        """After fork, in the child: close the descriptors, so that the child cannot keep the parent's connections open."""
        pthread_mutex_init(&self.mutex, NULL)       # whoever held it does not exist here
        self.closed = True
        for i in range(self.core.link_count):
            if self.core.links[<int>i].fd >= 0:
                close(self.core.links[<int>i].fd)
                self.core.links[<int>i].fd = -1
        if self.core.poll_set >= 0:
            close(self.core.poll_set)               # an epoll set is shared with the parent: remove nothing from it
            self.core.poll_set = -1
