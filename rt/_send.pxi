# Sending: which frame goes next on a link, and what is known once it has gone.
#
# May live here: choosing and queueing of outgoing frames, and accounting for what a link has taken. May not: incoming frames
# (_receive.pxi), rules about when a work may begin or end (_works.pxi).


cdef Frame *frame_new(Link *link, int type, Channel *channel, uint32_t sequence, int lane, uint32_t length) noexcept nogil:
    cdef Frame *frame = &link.frames[(link.frame_first + link.frame_count) % FRAMES_QUEUED]
    cdef Header *header = <Header *>frame.head
    memset(frame, 0, sizeof(Frame))
    header.length = length
    header.type = <uint8_t>type
    header.lane = <uint8_t>lane
    header.sequence = <uint16_t>sequence
    header.channel = channel.id if channel != NULL else 0
    frame.type = <uint8_t>type
    frame.head_length = HEADER_BYTES
    frame.step = -1
    link.frame_count += 1
    link.queued_bytes += HEADER_BYTES + length
    return frame


cdef bint queue_open(Core *core, Link *link) noexcept nogil:
    """Queue the OPEN of the first work on this link whose channel has room for it."""
    cdef SlotState *slot = link.opening_first
    cdef SlotState *before = NULL
    cdef Path *path
    cdef Frame *frame
    while slot != NULL:
        path = &slot.work.channel.paths[link.index]
        if slot.peer_opened or path.unacked + HEADER_BYTES + SIGNATURE_BYTES <= EAGER_MOST:
            break
        before = slot
        slot = slot.next
    if slot == NULL:
        return False
    if before == NULL:
        link.opening_first = slot.next
    else:
        before.next = slot.next
    if link.opening_last == slot:
        link.opening_last = before
    frame = frame_new(link, FRAME_OPEN, slot.work.channel, slot.work.sequence, 0, SIGNATURE_BYTES)
    memcpy(frame.head + HEADER_BYTES, slot.signature, SIGNATURE_BYTES)
    frame.head_length += SIGNATURE_BYTES
    frame.work = slot.work
    slot.open_queued = True
    if not slot.peer_opened:
        slot.eager += HEADER_BYTES + SIGNATURE_BYTES
        path.unacked += HEADER_BYTES + SIGNATURE_BYTES
    return True


cdef Py_ssize_t sendable(Core *core, StreamState *state) noexcept nogil:
    """How many items of the stream's current step may be put into a frame now."""
    cdef Step *step = stream_step(state)
    cdef SlotState *slot = &state.work.slots[state.stream.slot]
    cdef Py_ssize_t items
    cdef Py_ssize_t room
    if step == NULL or not slot.open_queued:
        return 0
    items = step_limit(state.work, step) - state.queued
    if items <= 0:
        return 0
    room = core.frame_most // step.wire
    if room == 0:
        room = 1
    if items > room:
        items = room
    if not slot.peer_opened:
        room = (<Py_ssize_t>EAGER_MOST - <Py_ssize_t>state.work.channel.paths[state.link.index].unacked - HEADER_BYTES) // step.wire
        if items > room:
            items = room
    return items


cdef bint queue_data(Core *core, Link *link) noexcept nogil:
    """Queue a frame of the stream whose channel was served longest ago; within a channel, of the oldest work."""
    cdef StreamState *state = link.sending_first
    cdef StreamState *best = NULL
    cdef Py_ssize_t best_items = 0
    cdef Py_ssize_t items
    cdef Path *path
    cdef Frame *frame
    cdef SlotState *slot
    cdef Step *step
    cdef uint64_t best_tick = 0
    while state != NULL:
        path = &state.work.channel.paths[link.index]
        if best == NULL or path.tick < best_tick:
            items = sendable(core, state)
            if items > 0:
                best = state
                best_items = items
                best_tick = path.tick
                if path.tick == 0:
                    break
        state = state.next
    if best == NULL:
        return False
    state = best
    step = stream_step(state)
    path = &state.work.channel.paths[link.index]
    slot = &state.work.slots[state.stream.slot]
    frame = frame_new(link, FRAME_DATA, state.work.channel, state.work.sequence, state.stream.lane, <uint32_t>(best_items * step.wire))
    frame.body = state.work.buffers[step.src] + step.src_off + state.queued * step.wire
    frame.body_length = <uint32_t>(best_items * step.wire)
    frame.work = state.work
    frame.step = stream_step_index(state)
    frame.stream = state
    core.tick += 1
    path.tick = core.tick
    if not slot.peer_opened:
        slot.eager += HEADER_BYTES + frame.body_length
        path.unacked += HEADER_BYTES + frame.body_length
    state.queued += best_items
    if state.queued == step.count:
        state.position += 1
        state.queued = 0
        if state.position == state.stream.count:
            sending_remove(link, state)
    return True


cdef void sending_remove(Link *link, StreamState *state) noexcept nogil:
    if state.prev != NULL:
        state.prev.next = state.next
    elif link.sending_first == state:
        link.sending_first = state.next
    else:
        return                              # not in the list
    if state.next != NULL:
        state.next.prev = state.prev
    else:
        link.sending_last = state.prev
    state.next = state.prev = NULL


cdef void frame_progress(Core *core, Link *link, Frame *frame, size_t nbytes) noexcept nogil:
    """Account for payload bytes that the link has taken: their source may change from now on."""
    cdef uint32_t before = frame.body_sent
    cdef int wire
    frame.body_sent += <uint32_t>nbytes
    if frame.work == NULL or frame.step < 0:
        return
    wire = frame.work.plan.steps[frame.step].wire
    if frame.body_sent // wire > before // wire:
        step_advance(core, frame.work, frame.step, frame.body_sent // wire - before // wire)


cdef void frame_pop(Core *core, Link *link, Frame *frame) noexcept nogil:
    cdef WorkState *work = frame.work
    link.queued_bytes -= HEADER_BYTES + (<Header *>frame.head).length
    link.frame_first = (link.frame_first + 1) % FRAMES_QUEUED
    link.frame_count -= 1
    if frame.owned:
        free(frame.body)
    if frame.type == FRAME_OPEN and work != NULL:
        work.remaining -= 1
        if work.remaining == 0:
            work_finish(core, work, STATE_DONE)
    elif frame.type == FRAME_GOODBYE:
        link.goodbye_sent = True
        if link.fd >= 0 and not link.shared:    # in shared memory the peer must still be woken
            shutdown(link.fd, SHUT_WR)


cdef void frames_sent(Core *core, Link *link, size_t nbytes) noexcept nogil:
    cdef Frame *frame
    cdef size_t part
    while link.frame_count:
        frame = &link.frames[link.frame_first]
        part = frame.head_length - frame.head_sent
        if part > nbytes:
            part = nbytes
        frame.head_sent += <uint32_t>part
        nbytes -= part
        part = frame.body_length - frame.body_sent
        if part > nbytes:
            part = nbytes
        if part:
            frame_progress(core, link, frame, part)
            nbytes -= part
        if frame.head_sent < frame.head_length or frame.body_sent < frame.body_length:
            return
        frame_pop(core, link, frame)


cdef bint link_transmit(Core *core, Link *link) noexcept nogil:
    """Queue frames and write once; True if anything moved."""
    cdef iovec parts[2 * FRAMES_QUEUED]
    cdef int count = 0
    cdef int i
    cdef Frame *frame
    cdef ssize_t n
    cdef size_t total = 0
    if not link.writable or link.goodbye_sent:
        return False
    if link.tx_dead and not link.goodbye_in and not core.closing:
        return False                        # whether the peer died is found by reading; its works wait until their group breaks
    while link.frame_count < FRAMES_QUEUED and link.queued_bytes < FRAME_MOST:
        if link.opening_first != NULL and queue_open(core, link):
            continue
        if link.sending_first != NULL and queue_data(core, link):
            continue
        if core.closing and not link.goodbye_out and link.opening_first == NULL and link.sending_first == NULL:
            link.goodbye_out = True
            frame_new(link, FRAME_GOODBYE, NULL, 0, 0, 0)
        break
    if link.frame_count == 0:
        return False
    for i in range(link.frame_count):
        frame = &link.frames[(link.frame_first + i) % FRAMES_QUEUED]
        if frame.head_sent < frame.head_length:
            parts[count].iov_base = frame.head + frame.head_sent
            parts[count].iov_len = frame.head_length - frame.head_sent
            total += parts[count].iov_len
            count += 1
        if frame.body_sent < frame.body_length:
            parts[count].iov_base = frame.body + frame.body_sent
            parts[count].iov_len = frame.body_length - frame.body_sent
            total += parts[count].iov_len
            count += 1
    if link.tx_dead:
        # The peer left in order: nobody needs these bytes, and their source is free.
        frames_sent(core, link, total)
        return True
    if link.fd < 0:
        link.writable = False
    n = link.send(link, parts, count)
    if n > 0 and link.fd < 0:
        link.writable = True
    if n < 0:
        if n == -EAGAIN:
            if link.fd >= 0 and not link.shared:
                link.writable = False
            return False
        link.tx_dead = True
        link.readable = True                # what the peer still sent, and why it left, is found by reading
        return True
    core.budget -= n
    link.bytes_out += n
    if <size_t>n < total and link.fd >= 0 and not link.shared:
        link.writable = False
    frames_sent(core, link, n)
    return True
