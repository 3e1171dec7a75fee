# The beginning of a work: its memory, its place in channel and links, and the frames that came before it.
#
# May live here: making and starting works. May not: what happens to them afterwards (_works.pxi).


cdef Py_ssize_t aligned(Py_ssize_t nbytes) noexcept nogil:
    return (nbytes + 63) // 64 * 64


cdef WorkState *work_new(Plan *plan) noexcept nogil:
    """One block for everything a work needs, temporary buffers included; those of 1 MiB and more come from where results do."""
    cdef Py_ssize_t base = aligned(sizeof(WorkState))
    cdef Py_ssize_t at_buffers = base
    cdef Py_ssize_t at_done = at_buffers + aligned(plan.buffer_count * sizeof(char *))
    cdef Py_ssize_t at_streams = at_done + aligned(plan.step_count * sizeof(Py_ssize_t))
    cdef Py_ssize_t at_slots = at_streams + aligned(plan.stream_count * sizeof(StreamState))
    cdef Py_ssize_t at_temps = at_slots + aligned(plan.slot_count * sizeof(SlotState))
    cdef bint apart = plan.temp_total >= POOLED_BYTES
    cdef char *block = <char *>malloc(at_temps + (0 if apart else plan.temp_total + 64))
    cdef WorkState *work = <WorkState *>block
    cdef char *temp
    cdef int i
    if block == NULL:
        return NULL
    # Small temporaries are cleared too: barriers send an item that nobody wrote.
    memset(block, 0, at_temps + (plan.temp_total + 64 if plan.temp_total <= 4096 else 0))
    if apart:
        work.temps = <char *>pool_take(plan.temp_total)
        if work.temps == NULL:
            free(block)
            return NULL
    work.plan = plan
    work.buffers = <char **>(block + at_buffers)
    work.done = <Py_ssize_t *>(block + at_done)
    work.streams = <StreamState *>(block + at_streams)
    work.slots = <SlotState *>(block + at_slots)
    temp = work.temps if apart else block + at_temps
    temp += (64 - <uintptr_t>temp % 64) % 64
    for i in range(2, plan.buffer_count):
        work.buffers[i] = temp
        temp += plan.temp_bytes[i]
    return work


cdef void work_free(WorkState *work) noexcept nogil:
    if work.temps != NULL:
        pool_give(work.temps)
    free(work)


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
    work.past = plan.footprint * (core.shared_count + 1) >= core.cache_bytes
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
        memcpy(slot.signature, &work.sequence, 4)
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
    """Hand a frame that came too early to the work it was for (NULL: there is none)."""
    cdef StreamState *state
    if channel.broken:
        free(entry)
    elif entry.header.type == FRAME_OPEN:
        open_received(core, link, channel, entry.header.sequence, entry.data)
        free(entry)
    else:
        # A work that has ended may have outlived its plan: it must not be asked for its streams.
        state = receiving_stream(work, link, entry.header.lane) if work != NULL and work.state == STATE_FLYING else NULL
        if state == NULL or not stream_claim(state, entry.header.length):
            link_fail(core, link, EVENT_PROTOCOL, FRAME_DATA)
            free(entry)
            return
        stash_push(state, entry)
