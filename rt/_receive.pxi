# Receiving: frames are taken from a link and land where they belong.
#
# May live here: parsing of incoming frames, landing and applying their payload, setting aside what cannot be applied yet. May not:
# outgoing frames (_send.pxi), rules about when a work may begin or end (_works.pxi).
#
# Land, then apply. What arrives for a posted work may always be read: in place where its hazards allow, else into the link's scratch,
# from where it is applied once they do. Not reading deadlocks (each waits for the other to read); landing too early destroys what
# still has to be sent. tests/test_engine.py keeps both wrong rules as negative tests.
#
# One frame fits the scratch, and a link whose frame waits there is not read on: the peer feels it and slows down, and memory stays
# bounded. But what another work needs may lie behind that frame, and what the frame waits for may lie behind a frame of that work on
# another link. So where nothing else can move, such a frame is set aside at its own work, and the link is read on (set_aside).


cdef enum:
    PAST_LEAST = 4096        # bytes that are worth a fence


cdef void copy_result(WorkState *work, Step *step, char *to, const char *source, Py_ssize_t nbytes) noexcept nogil:
    """Copy what a step received or moves; past the caches, where no line is fetched first, if they could not hold it for a reader."""
    if work.past and not step.read_later and nbytes >= PAST_LEAST:
        rt_copy_past(to, source, nbytes)
    else:
        memcpy(to, source, nbytes)


cdef Py_ssize_t apply_bytes(Core *core, StreamState *state, const char *data, Py_ssize_t available) noexcept nogil:
    """Apply received bytes to the step at which the stream stands, as far as its hazards allow; return how many were used."""
    cdef WorkState *work = state.work
    cdef Step *step = stream_step(state)
    cdef int index
    cdef Py_ssize_t items
    cdef Py_ssize_t used
    rt_check(step != NULL and work.state == STATE_FLYING)       # frames are claimed before they are taken
    index = stream_step_index(state)
    used = step_limit(work, step) * step.wire - state.landed
    if used > available:
        used = available
    if used <= 0:
        return 0
    if step.kind == RECV:
        copy_result(work, step, work.buffers[step.dst] + step.dst_off + state.landed, data, used)
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
    rt_check(state.landed <= step.count * step.wire)
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
        # This very entry may have finished the work; its memory lives on until the finished list is emptied.
        state.stash = entry.next
        work.stashed -= 1
        free(entry)
        entry = state.stash
    return moved


cdef bint drain_scratch(Core *core, Link *link) noexcept nogil:
    """Apply what lies in the scratch; True if anything moved."""
    cdef StreamState *state = link.stream
    cdef Py_ssize_t used
    cdef bint moved = False
    if link.scratch_len == 0 or link.target != TO_STREAM:
        return False
    if state.stash != NULL:
        moved = drain_stash(core, state)
        if state.stash != NULL:
            return moved
    used = apply_bytes(core, state, link.scratch + link.scratch_pos, link.scratch_len)
    link.scratch_pos += <uint32_t>used
    link.scratch_len -= <uint32_t>used
    if link.scratch_len == 0:
        link.scratch_pos = 0
    return moved or used > 0


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
    cdef bint wrong = False
    link.in_frame = True
    link.left = header.length
    link.target = TO_DROP
    if header.length > FRAME_MOST or link.goodbye_in:
        wrong = True
    elif header.type == FRAME_GOODBYE:
        wrong = header.length != 0
        link.goodbye_in = not wrong
        core.any_goodbye = True
    elif header.type == FRAME_WAITING:
        wrong = header.length != 0
        waiting_received(core, link, header)
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
            if work == NULL and not_yet_posted(channel, header.sequence):
                wrong = not stash_begin(core, link, channel)
            elif header.type == FRAME_OPEN:
                link.target = TO_OPEN
            elif work == NULL or work.state != STATE_FLYING:
                wrong = True
            else:
                link.stream = receiving_stream(work, link, header.lane)
                wrong = link.stream == NULL or not stream_claim(link.stream, header.length)
                link.target = TO_STREAM
    else:
        wrong = True
    if wrong:
        link.target = TO_DROP
        link_fail(core, link, EVENT_PROTOCOL, header.type)


cdef inline bint not_yet_posted(Channel *channel, uint16_t sequence) noexcept nogil:
    # Neither side can be so far ahead that 16 bits mislead: its OPENs alone would be more than EAGER_MOST.
    return <int16_t>(sequence - <uint16_t>channel.next_sequence) >= 0


cdef bint stream_claim(StreamState *state, uint32_t length) noexcept nogil:
    """Give a frame its place in its stream: whole items of one step, behind all frames before it. False if it has none there."""
    cdef Plan *plan = state.work.plan
    cdef Step *step
    if length == 0 or state.claim_position == state.stream.count:
        return False
    step = &plan.steps[plan.stream_steps[state.stream.first + state.claim_position]]
    if length % <uint32_t>step.wire or <Py_ssize_t>length > step.count * step.wire - state.claimed:
        return False
    state.claimed += length
    if state.claimed == step.count * step.wire:
        state.claim_position += 1
        state.claimed = 0
    return True


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
    entry = stash_new(link, link.header.length)
    if entry == NULL:
        return False
    path.stashed += link.header.length + HEADER_BYTES
    link.stash = entry
    link.target = TO_STASH
    return True


cdef Stash *stash_new(Link *link, uint32_t room) noexcept nogil:
    cdef Stash *entry = <Stash *>malloc(sizeof(Stash) + room)
    if entry != NULL:
        entry.next = NULL
        entry.header = link.header
        entry.link = link.index
        entry.used = 0
    return entry


cdef void stash_push(StreamState *state, Stash *entry) noexcept nogil:
    cdef Stash **tail = &state.stash
    while tail[0] != NULL:
        tail = &tail[0].next
    tail[0] = entry
    state.work.stashed += 1


cdef bint set_aside(Core *core, Link *link) noexcept nogil:
    """Take a waiting frame out of a link's way, if a work other than its own may wait for what is behind it; True if done.

    Two works that are applied in different orders can otherwise wait for each other, each behind the other's frame. What is set aside
    is part of posted works, so their size bounds it.
    """
    cdef StreamState *state = link.stream
    cdef Stash *entry
    if link.rx_dead or not link.in_frame or link.target != TO_STREAM or link.left or not link.scratch_len:
        return False
    if not more_behind(link) or not others_wait(core, link, state.work):
        return False
    entry = stash_new(link, link.scratch_len)
    if entry == NULL:
        return False
    memcpy(entry.data, link.scratch + link.scratch_pos, link.scratch_len)
    entry.header.length = link.scratch_len
    stash_push(state, entry)
    link.scratch_pos = link.scratch_len = 0
    frame_end(core, link)
    return True


cdef inline bint more_behind(Link *link) noexcept nogil:
    # The end of the peer is news, too.
    if link.rdma != NULL:
        return rt_rdma_held(link.rdma) > 0 or rt_rdma_over(link.rdma)
    if link.shared:
        return rt_ring_held(&link.rx) > 0 or link.hangup
    return link.readable or link.stage_pos < link.stage_len


cdef bint others_wait(Core *core, Link *link, WorkState *work) noexcept nogil:
    """Say whether a work other than this one still has to hear something on a link."""
    cdef WorkState *other = core.active_first
    cdef StreamState *state
    cdef int i
    while other != NULL:
        if other != work:
            for i in range(other.slot_count):
                if other.slots[i].link == link and not other.slots[i].peer_opened:
                    return True
            for i in range(other.plan.stream_count):
                state = &other.streams[i]
                if state.link == link and not state.stream.sending and state.claim_position < state.stream.count:
                    return True
        other = other.next_active
    return False


cdef void frame_take(Core *core, Link *link, const char *data, uint32_t nbytes) noexcept nogil:
    """Take payload bytes that lie in the stage or in a ring."""
    cdef uint32_t at = link.header.length - link.left
    cdef uint32_t used = 0
    if link.target == TO_OPEN:
        memcpy(link.open_bytes + at, data, nbytes)
    elif link.target == TO_STASH:
        memcpy(link.stash.data + at, data, nbytes)
    elif link.target == TO_STREAM:
        # From a stage only as a whole: the rest of the frame is better read to where it belongs than behind a part in the scratch.
        if land_room(link) or link.shared and not link.scratch_len and link.stream.stash == NULL:
            used = <uint32_t>apply_bytes(core, link.stream, data, nbytes)
        if used < nbytes:
            rt_check(link.scratch_pos + link.scratch_len + nbytes - used <= core.scratch_room)
            memcpy(link.scratch + link.scratch_pos + link.scratch_len, data + used, nbytes - used)
            link.scratch_len += nbytes - used
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
        if channel.broken or not not_yet_posted(channel, link.header.sequence):
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
    link.stream = NULL
    return True


cdef bint parse(Core *core, Link *link, const char *data, uint32_t have, uint32_t *used) noexcept nogil:
    """Take frames out of bytes that lie in the stage or in a ring: all of them, or False if the link can take nothing more for now.

    ``used`` counts the bytes of ``data`` that were taken.
    """
    cdef uint32_t nbytes
    while not link.rx_dead:
        nbytes = have - used[0]
        if link.in_frame:
            if nbytes > link.left:
                nbytes = link.left
            if nbytes:
                frame_take(core, link, data + used[0], nbytes)
                used[0] += nbytes
            if link.scratch_len:
                drain_scratch(core, link)
            if link.left:
                return True
            if not frame_end(core, link):
                return False
            continue                            # the frame may have ended the link
        if nbytes > HEADER_BYTES - link.header_have:
            nbytes = HEADER_BYTES - link.header_have
        memcpy(<char *>&link.header + link.header_have, data + used[0], nbytes)
        used[0] += nbytes
        link.header_have += nbytes
        if link.header_have < HEADER_BYTES:
            return True
        link.header_have = 0
        frame_begin(core, link)
    return False


cdef bint parse_stage(Core *core, Link *link) noexcept nogil:
    """Take frames out of the stage; False if the link can take nothing more for now."""
    if not parse(core, link, link.stage, link.stage_len, &link.stage_pos):
        return False
    link.stage_pos = link.stage_len = 0
    return True


cdef bint link_receive(Core *core, Link *link) noexcept nogil:
    """Read once and take what came; True if anything moved."""
    cdef iovec parts[2]
    cdef int count = 0
    cdef Py_ssize_t direct = 0
    cdef ssize_t n
    cdef Py_ssize_t asked
    cdef bint moved = False
    cdef bint unhindered
    cdef uint32_t staged = link.stage_len - link.stage_pos
    cdef StreamState *state
    cdef Step *step
    if link.rx_dead:
        return False
    if link.shared:
        return ring_receive(core, link)
    if link.scratch_len or link.stage_len:
        # Left over from before: a frame that had to wait for its hazards, and what was read behind it.
        moved = drain_scratch(core, link)
        unhindered = parse_stage(core, link)
        moved |= staged != link.stage_len - link.stage_pos
        if not unhindered:
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
    rt_check(asked > 0)                     # reading nothing looks like the end of the stream
    if link.fd < 0:
        link.readable = False               # before asking: a Python link may say so again at any moment
    n = link.recv(link, parts, count)
    if n > 0 and link.fd < 0:
        link.readable = True
    if n <= 0:
        if n == -EAGAIN:
            if link.fd >= 0:
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
