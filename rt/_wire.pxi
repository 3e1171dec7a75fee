# Frames: what is read from a link and what is written to it.
#
# May live here: parsing and landing of incoming frames, choosing and queueing of outgoing ones. May not: rules about when a work may
# begin or end (_engine.pxi).
#
# Land, then apply. What arrives for a posted work may always be read: in place where its hazards allow, else into the link's scratch,
# from where it is applied once they do. Not reading deadlocks (each waits for the other to read); landing too early destroys what
# still has to be sent. tests/test_engine.py keeps both wrong rules as negative tests.


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


# -- receiving ----------------------------------------------------------------------------------------------------------------------

cdef Py_ssize_t apply_bytes(Core *core, StreamState *state, const char *data, Py_ssize_t available) noexcept nogil:
    """Apply received bytes to the step at which the stream stands, as far as its hazards allow; return how many were used."""
    cdef WorkState *work = state.work
    cdef Step *step = stream_step(state)
    cdef int index
    cdef Py_ssize_t items
    cdef Py_ssize_t used
    if step == NULL:
        link_fail(core, state.link, EVENT_PROTOCOL, FRAME_DATA)
        return 0
    index = stream_step_index(state)
    used = step_limit(work, step) * step.wire - state.landed
    if used > available:
        used = available
    if used <= 0:
        return 0
    if step.kind == RECV:
        memcpy(work.buffers[step.dst] + step.dst_off + state.landed, data, used)
        landed_bytes(core, state, used)
        return used
    items = used // step.wire
    if items == 0:
        return 0
    used = items * step.wire
    run_reduction(
        step,
        work.buffers[step.dst] + step.dst_off + work.done[index] * step.dst_size,
        work.buffers[step.src] + step.src_off + work.done[index] * step.src_size,
        data,
        items,
    )
    landed_bytes(core, state, used)
    return used


cdef void landed_bytes(Core *core, StreamState *state, Py_ssize_t nbytes) noexcept nogil:
    cdef int index = stream_step_index(state)
    cdef Step *step = &state.work.plan.steps[index]
    cdef Py_ssize_t items
    state.landed += nbytes
    items = state.landed // step.wire - state.work.done[index]
    if state.landed == step.count * step.wire:
        state.position += 1
        state.landed = 0
    if items:
        step_advance(core, state.work, index, items)


cdef bint drain_stash(Core *core, StreamState *state) noexcept nogil:
    """Apply what was put aside for a stream; True if anything moved."""
    cdef Stash *entry = state.stash
    cdef WorkState *work = state.work
    cdef Py_ssize_t used
    cdef bint moved = False
    while entry != NULL and work.state == STATE_FLYING:
        used = apply_bytes(core, state, entry.data + entry.used, entry.header.length - entry.used)
        if used:
            moved = True
        entry.used += <uint32_t>used
        if entry.used < entry.header.length:
            return moved
        # The work may have been finished by this very entry: its memory lives on until the finished list is emptied.
        state.stash = entry.next
        work.stashed -= 1
        free(entry)
        entry = state.stash
    return moved


cdef bint drain_scratch(Core *core, Link *link) noexcept nogil:
    """Apply what lies in the scratch; True if anything moved."""
    cdef StreamState *state = link.stream
    cdef Py_ssize_t used
    if link.scratch_len == 0 or link.target != TO_STREAM:
        return False
    if state.stash != NULL:
        drain_stash(core, state)
        if state.stash != NULL:
            return False
    used = apply_bytes(core, state, link.scratch + link.scratch_pos, link.scratch_len)
    link.scratch_pos += <uint32_t>used
    link.scratch_len -= <uint32_t>used
    if link.scratch_len == 0:
        link.scratch_pos = 0
    return used > 0


cdef Py_ssize_t land_room(Link *link) noexcept nogil:
    """How many bytes of the frame's rest may be read straight to where they belong: all of them, or 0."""
    cdef StreamState *state = link.stream
    cdef Step *step = stream_step(state)
    if step.kind != RECV or link.scratch_len or state.stash != NULL:
        return 0
    if step_limit(state.work, step) * step.wire - state.landed < <Py_ssize_t>link.left:
        return 0
    return link.left


cdef void frame_begin(Core *core, Link *link) noexcept nogil:
    """Decide where the payload of the frame whose header was just read belongs."""
    cdef Header *header = &link.header
    cdef Channel *channel
    cdef WorkState *work
    cdef Step *step
    cdef bint wrong = False
    link.in_frame = True
    link.left = header.length
    link.target = TO_DROP
    if header.length > FRAME_MOST:
        wrong = True
    elif header.type == FRAME_GOODBYE:
        wrong = header.length != 0
        link.goodbye_in = True
        core.any_goodbye = True
    elif header.type == FRAME_OPEN or header.type == FRAME_DATA:
        if core.closing:
            return
        if header.type == FRAME_OPEN and header.length != SIGNATURE_BYTES:
            wrong = True
        channel = channel_get(core, header.channel)
        if wrong or channel == NULL:
            wrong = True
        elif not channel.broken:
            work = channel_find(channel, header.sequence)
            if work == NULL and <int16_t>(header.sequence - <uint16_t>channel.next_sequence) >= 0:
                wrong = not stash_begin(core, link, channel)
            elif header.type == FRAME_OPEN:
                link.target = TO_OPEN
            elif work == NULL or work.state != STATE_FLYING:
                wrong = True
            else:
                link.stream = receiving_stream(work, link, header.lane)
                if link.stream == NULL:
                    wrong = True
                else:
                    step = stream_step(link.stream)
                    wrong = frame_too_long(link.stream, header.length)
                    link.target = TO_STREAM
    else:
        wrong = True
    if wrong:
        link.target = TO_DROP
        link_fail(core, link, EVENT_PROTOCOL, header.type)


cdef bint frame_too_long(StreamState *state, uint32_t length) noexcept nogil:
    """A frame carries items of one step. Frames put aside in front of it count."""
    cdef Step *step = stream_step(state)
    cdef Stash *entry
    cdef Py_ssize_t ahead
    if step == NULL:
        return True
    if state.stash != NULL:
        return False                       # compared again when they are applied
    ahead = step.count * step.wire - state.landed
    return <Py_ssize_t>length > ahead or length % step.wire != 0 or length == 0


cdef StreamState *receiving_stream(WorkState *work, Link *link, int lane) noexcept nogil:
    cdef int i
    cdef StreamState *state
    for i in range(work.plan.stream_count):
        state = &work.streams[i]
        if state.link == link and state.stream.lane == lane and not state.stream.sending:
            if work.slots[state.stream.slot].peer_opened:
                return state
    return NULL


cdef bint stash_begin(Core *core, Link *link, Channel *channel) noexcept nogil:
    cdef Path *path = &channel.paths[link.index]
    cdef Stash *entry
    # A peer counts headers and payloads against EAGER_MOST, and so do we: more is not unposted data but a broken peer.
    if path.stashed + link.header.length + HEADER_BYTES > EAGER_MOST:
        return False
    entry = <Stash *>malloc(sizeof(Stash) + link.header.length)
    if entry == NULL:
        return False
    path.stashed += link.header.length + HEADER_BYTES
    entry.next = NULL
    entry.header = link.header
    entry.link = link.index
    entry.used = 0
    link.stash = entry
    link.target = TO_STASH
    return True


cdef void frame_take(Core *core, Link *link, const char *data, uint32_t nbytes) noexcept nogil:
    """Take payload bytes that were staged."""
    cdef uint32_t at = link.header.length - link.left
    if link.target == TO_OPEN:
        memcpy(link.open_bytes + at, data, nbytes)
    elif link.target == TO_STASH:
        memcpy(link.stash.data + at, data, nbytes)
    elif link.target == TO_STREAM:
        if land_room(link):
            apply_bytes(core, link.stream, data, nbytes)
        else:
            memcpy(link.scratch + link.scratch_pos + link.scratch_len, data, nbytes)
            link.scratch_len += nbytes
    link.left -= nbytes


cdef bint frame_end(Core *core, Link *link) noexcept nogil:
    """Finish a frame whose payload was read; False if it has to wait in the scratch."""
    cdef Channel *channel
    cdef WorkState *work
    if link.target == TO_STREAM and link.scratch_len:
        drain_scratch(core, link)
        if link.scratch_len:
            return False
    elif link.target == TO_OPEN:
        channel = channel_get(core, link.header.channel)
        open_received(core, link, channel, link.header.sequence, link.open_bytes)
    elif link.target == TO_STASH:
        channel = channel_get(core, link.header.channel)
        work = channel_find(channel, link.header.sequence)
        if work != NULL or channel.broken:
            # It was submitted while this frame was being read.
            channel.paths[link.index].stashed -= link.header.length + HEADER_BYTES
            replay(core, work, channel, link, link.stash)
        else:
            if channel.stash_last == NULL:
                channel.stash_first = link.stash
            else:
                channel.stash_last.next = link.stash
            channel.stash_last = link.stash
        link.stash = NULL
    link.in_frame = False
    link.target = TO_NOTHING
    return True


cdef bint parse_stage(Core *core, Link *link) noexcept nogil:
    """Take frames out of the stage; False if the link can take nothing more for now."""
    cdef uint32_t have
    cdef uint32_t nbytes
    while True:
        if link.in_frame:
            have = link.stage_len - link.stage_pos
            nbytes = link.left if link.left < have else have
            if nbytes:
                frame_take(core, link, link.stage + link.stage_pos, nbytes)
                link.stage_pos += nbytes
            if link.scratch_len:
                drain_scratch(core, link)
            if link.left:
                break
            if not frame_end(core, link):
                return False
        if link.stage_len - link.stage_pos < HEADER_BYTES:
            break
        memcpy(&link.header, link.stage + link.stage_pos, HEADER_BYTES)
        link.stage_pos += HEADER_BYTES
        frame_begin(core, link)
        if link.rx_dead:
            return False
    if link.stage_pos:
        memmove(link.stage, link.stage + link.stage_pos, link.stage_len - link.stage_pos)
        link.stage_len -= link.stage_pos
        link.stage_pos = 0
    return True


cdef bint link_receive(Core *core, Link *link) noexcept nogil:
    """Read once and take what came; True if anything moved."""
    cdef iovec parts[2]
    cdef int count = 0
    cdef Py_ssize_t direct = 0
    cdef ssize_t n
    cdef Py_ssize_t asked
    cdef bint moved = False
    cdef StreamState *state
    cdef Step *step
    if link.rx_dead:
        return False
    if link.scratch_len or link.stage_pos < link.stage_len:
        # Left over from before: a frame that had to wait for its hazards.
        moved = drain_scratch(core, link)
        if not parse_stage(core, link):
            return moved
    if not link.readable or link.rx_dead:
        return moved
    if link.in_frame and link.left:
        parts[0].iov_len = link.left
        if link.target == TO_STREAM:
            state = link.stream
            direct = land_room(link)
            if direct:
                step = stream_step(state)
                parts[0].iov_base = state.work.buffers[step.dst] + step.dst_off + state.landed
            else:
                parts[0].iov_base = link.scratch + link.scratch_pos + link.scratch_len
        elif link.target == TO_STASH:
            parts[0].iov_base = link.stash.data + (link.header.length - link.left)
        elif link.target == TO_OPEN:
            parts[0].iov_base = link.open_bytes + (link.header.length - link.left)
        else:
            parts[0].iov_base = link.scratch           # dropped
            if parts[0].iov_len > core.scratch_room:
                parts[0].iov_len = core.scratch_room
        count = 1
    asked = parts[0].iov_len if count else 0
    if count == 0 or asked == <Py_ssize_t>link.left:
        parts[count].iov_base = link.stage + link.stage_len
        parts[count].iov_len = STAGE_BYTES - link.stage_len
        asked += parts[count].iov_len
        count += 1
    if link.fd < 0:
        link.readable = False               # before asking: a Python link may say so again at any moment
    n = link.recv(link, parts, count)
    if n > 0 and link.fd < 0:
        link.readable = True
    if n <= 0:
        if n == -EAGAIN:
            link.readable = False
            if link.tx_dead:
                link_fail(core, link, EVENT_LOST, EPIPE)
        else:
            link.rx_dead = True
            if not link.goodbye_in:
                link_fail(core, link, EVENT_LOST, <int>-n)
        return moved
    # A short read empties a socket; new data raise a new edge. An end of stream already signalled does not, so read on to find it.
    if n < asked and not link.hangup and link.fd >= 0:
        link.readable = False
    core.budget -= n
    link.bytes_in += n
    if count == 2 or link.in_frame and link.left:
        if <uint32_t>n <= link.left and link.in_frame:
            received_payload(core, link, direct, n)
        else:
            asked = link.left if link.in_frame else 0
            if asked:
                received_payload(core, link, direct, asked)
            link.stage_len += <uint32_t>(n - asked)
    else:
        link.stage_len += <uint32_t>n
    parse_stage(core, link)
    return True


cdef void received_payload(Core *core, Link *link, Py_ssize_t direct, Py_ssize_t n) noexcept nogil:
    link.left -= <uint32_t>n
    if link.target == TO_STREAM:
        if direct:
            landed_bytes(core, link.stream, n)
        else:
            link.scratch_len += <uint32_t>n
            drain_scratch(core, link)


# -- sending --------------------------------------------------------------------------------------------------------------------------

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
    memcpy(frame.head + HEADER_BYTES, slot.work.signature, SIGNATURE_BYTES)
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
        if link.fd >= 0:
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
        # The peer is gone, in order or not (reading tells which); nobody needs these bytes, and their source is free.
        frames_sent(core, link, total)
        return True
    if link.fd < 0:
        link.writable = False
    n = link.send(link, parts, count)
    if n > 0 and link.fd < 0:
        link.writable = True
    if n < 0:
        if n == -EAGAIN:
            link.writable = False
            return False
        link.tx_dead = True
        link.readable = True                # what the peer still sent, and why it left, is found by reading
        return True
    core.budget -= n
    link.bytes_out += n
    if <size_t>n < total and link.fd >= 0:
        link.writable = False
    frames_sent(core, link, n)
    return True
