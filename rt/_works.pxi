# Channels, works, and the rules by which progress is made.
#
# May live here: what a work waits for, when it is done, how signatures are compared and how a work is taken away. May not: frames
# (_receive.pxi, _send.pxi), how a work begins (_submit.pxi), the Engine that Python sees (_engine.pxi).
#
# The rules.
#   Land, then apply (_receive.pxi).   In cache: bytes are reduced in pieces while they are hot, with no extra pass.
#   Bounded: core_progress() returns IDLE, BLOCKED or BUDGET; links are served round robin from where it stopped.
#   Sticky per group: the first error fails every work of that group; other groups on the same links go on.
#   Try first, arm later: submit() makes progress at once.


# -- steps ---------------------------------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t step_limit(WorkState *work, Step *step) noexcept nogil:
    """How many items of a step its hazards allow now; may be negative."""
    cdef Py_ssize_t limit = step.count
    cdef Py_ssize_t done
    cdef int i
    cdef Dep *dep = work.plan.deps + step.dep_first
    for i in range(step.dep_count):
        done = work.done[dep[i].step]
        if done < work.plan.steps[dep[i].step].count and dep[i].delta + done < limit:
            limit = dep[i].delta + done
    return limit


cdef inline Step *stream_step(StreamState *state) noexcept nogil:
    """The step at which a stream stands, NULL at its end."""
    if state.position == state.stream.count:
        return NULL
    return &state.work.plan.steps[state.work.plan.stream_steps[state.stream.first + state.position]]


cdef inline int stream_step_index(StreamState *state) noexcept nogil:
    return state.work.plan.stream_steps[state.stream.first + state.position]


cdef inline void step_advance(Core *core, WorkState *work, int index, Py_ssize_t items) noexcept nogil:
    work.done[index] += items
    if work.done[index] == work.plan.steps[index].count:
        work.remaining -= 1
        if work.remaining == 0:
            work_finish(core, work, STATE_DONE)


cdef void run_reduction(Step *step, char *dst, const char *a, const char *b, Py_ssize_t items) noexcept nogil:
    if step.style == BY_REDUCE:
        if step.swap:
            a, b = b, a
        (<rt_reduce_fn>step.kernel)(dst, a, b, items)
    else:
        if step.swap:
            a, b = b, a
        (<rt_mixed_fn>step.kernel)(<float *>dst, <const float *>a, b, items)


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
    cdef SlotState *slot = NULL
    cdef unsigned char *ours = NULL
    cdef Event *event
    cdef int i
    if channel.broken:
        return
    if work != NULL:
        ours = work.signature
        for i in range(work.slot_count):
            if work.slots[i].link == link:
                slot = &work.slots[i]
                ours = slot.signature
                break
    if work != NULL and memcmp(ours, theirs, SIGNATURE_BYTES) == 0:
        if slot == NULL or slot.peer_opened:
            link_fail(core, link, EVENT_PROTOCOL, FRAME_OPEN)
            return
        slot.peer_opened = True
        channel.paths[link.index].unacked -= slot.eager
        work.unopened -= 1
        if work.unopened == 0 and work.state != STATE_FLYING and work.handle == NULL:
            work_release(work)
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
        memcpy(event.mine, ours, SIGNATURE_BYTES)


# -- events, for Python to judge ----------------------------------------------------------------------------------------------------------

cdef Event *event_new(Core *core, int kind, int peer, int code) noexcept nogil:
    cdef Event *event
    cdef int room = 2 * core.event_room + 8
    if core.event_count == core.event_room:
        event = <Event *>realloc(core.events, room * sizeof(Event))
        if event == NULL:
            return NULL
        core.events = event
        core.event_room = room
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


# -- works ---------------------------------------------------------------------------------------------------------------------------------

cdef void work_finish(Core *core, WorkState *work, int state) noexcept nogil:
    if work.state != STATE_FLYING:
        return
    if state == STATE_DONE and work.channel.broken:
        return                              # a disagreement was found; it ends when Python breaks the group
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
    rt_check(work.state != STATE_FLYING and work.stashed == 0)
    channel_remove(work.channel, work)
    work_free(work)


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
            work.stashed -= 1
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
            link.stream = NULL
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
        copy_result(work, step, dst, src, items * step.dst_size)
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
            if link.rdma != NULL:
                rt_rdma_answer(link.rdma)
                continue
            if link.shared:
                ring_answer(link)
                if ready[i].flags & RT_POLL_HUP:        # it may lie behind a byte that wakes, and no other edge will tell
                    link.hangup = True
                continue
            if ready[i].flags & RT_POLL_READ:
                link.readable = True
                if link.owner != NULL:                      # one descriptor tells of both directions
                    link.writable = True
            if ready[i].flags & RT_POLL_WRITE:
                link.writable = True
            if ready[i].flags & RT_POLL_HUP:
                link.hangup = link.readable = True
        if count < 64:
            return


cdef int core_progress(Core *core, Py_ssize_t budget, bint look) noexcept nogil:
    """Move what can be moved, up to about ``budget`` bytes; first ``look`` at what sockets have to say, which takes a system call."""
    cdef bint moved = True
    cdef int i, served
    cdef Py_ssize_t rest
    cdef Link *link
    cdef WorkState *work
    cdef WorkState *following
    if look:
        take_events(core)
    core.budget = budget
    while moved and core.budget > 0:
        moved = False
        served = 0
        # A round over many links may be much more than the budget: half of it is for receiving, and the link that it did not suffice
        # for is the first in the next round. (Less than: where nothing was received, every link must have had its turn.)
        rest = core.budget - budget // 2
        for i in range(core.link_count):
            link = core.links[(core.turn + i) % core.link_count]
            served += 1
            if link.readable or link.scratch_len or link.stage_len:
                moved |= link_receive(core, link)
                if core.budget < rest:
                    break
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
                if core.budget <= 0:
                    break
        if core.link_count:
            core.turn = (core.turn + (1 if served == core.link_count else served)) % core.link_count
        if not moved and core.active_count > 1:
            for i in range(core.link_count):
                moved |= set_aside(core, core.links[i])
    if core.shared_count:
        for i in range(core.link_count):
            ring_settle(core.links[i])
            core.links[i].deaf = is_deaf(core, core.links[i])
    if core.any_goodbye and core.active_first != NULL:
        check_goodbyes(core)
    core.unfinished = moved
    if moved:
        return PROGRESS_BUDGET
    if core.alarmed and core.active_count == 1:
        check_deadlock(core)
    return PROGRESS_BLOCKED if core.active_first != NULL else PROGRESS_IDLE
