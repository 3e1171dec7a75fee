# Two ranks that wait for each other in different calls.
#
# May live here: how a blocked rank says so, and how two that say so to each other are recognised. May not: disagreements within one
# channel; signatures find those (_works.pxi).
#
# A send under tag 1 and a recv under tag 2 are different channels, and so are a send and a collective: no signature compares them, and
# each rank may yet make the other's call. But a thread that blocks in one call, with nothing else in flight and no other thread to make
# calls, can make none. Once it has been blocked for a while it says so (WAITING, for the channel and number of its work) to the peers it
# has not heard of. A rank that blocks likewise, needs a peer, and holds that peer's WAITING for a call it has not made itself, will wait
# for ever, and so will the peer, who sees the same from the other side. Tasks of an event loop never say WAITING: others may go on.


cdef enum:
    ROLE_SENDER = 0
    ROLE_RECEIVER = 1
    ROLE_COLLECTIVE = 2


cdef int role_of(WorkState *work) noexcept nogil:
    cdef int i
    cdef bint sends = False
    cdef bint receives = False
    for i in range(work.plan.stream_count):
        if work.plan.streams[i].sending:
            sends = True
        else:
            receives = True
    return ROLE_COLLECTIVE if sends and receives else ROLE_RECEIVER if receives else ROLE_SENDER


cdef bint needs(WorkState *work, SlotState *slot) noexcept nogil:
    """Say whether a work cannot end before the peer of a slot joins it."""
    cdef int i
    cdef StreamState *state
    if slot.peer_opened:
        return False
    for i in range(work.plan.stream_count):
        state = &work.streams[i]
        if &work.slots[state.stream.slot] == slot and state.position < state.stream.count:
            return True
    return False


cdef void say_waiting(Core *core, WorkState *work) noexcept nogil:
    """Tell the peers a work needs that this rank blocks on it and on nothing else."""
    cdef int i
    cdef SlotState *slot
    if core.active_count != 1 or work.state != STATE_FLYING:
        return
    work.alone = True
    for i in range(work.slot_count):
        slot = &work.slots[i]
        if slot.open_queued and slot.link.frame_count < FRAMES_QUEUED and needs(work, slot):
            frame_new(slot.link, FRAME_WAITING, work.channel, work.sequence, role_of(work), 0)
    core.alarmed = True


cdef void waiting_received(Core *core, Link *link, Header *header) noexcept nogil:
    """A peer blocks on a call: note it on that call's OPEN, if this rank has not made the call by now."""
    cdef Channel *channel = channel_get(core, header.channel)
    cdef Stash *entry = channel.stash_first if channel != NULL else NULL
    while entry != NULL:
        if entry.link == link.index and entry.header.type == FRAME_OPEN and entry.header.sequence == header.sequence:
            entry.header.lane = <uint8_t>(WAITING_MARK | header.lane)
            core.alarmed = True
        entry = entry.next


cdef Stash *waiting_entry(Core *core, int peer) noexcept nogil:
    """Find a call on which a peer blocks and which this rank has not made."""
    cdef int i
    cdef Channel *channel
    cdef Stash *entry
    for i in range(BUCKETS):
        channel = core.buckets[i]
        while channel != NULL:
            entry = channel.stash_first
            while entry != NULL:
                if entry.header.type == FRAME_OPEN and entry.header.lane & WAITING_MARK and core.links[entry.link].peer == peer:
                    return entry
                entry = entry.next
            channel = channel.next_hash
    return NULL


cdef void check_deadlock(Core *core) noexcept nogil:
    """Report the peer with which the one blocked work waits crosswise."""
    cdef WorkState *work = core.active_first
    cdef SlotState *slot
    cdef Stash *entry
    cdef Event *event
    cdef int i
    core.alarmed = False
    if core.active_count != 1 or not work.alone or work.channel.broken:
        return
    for i in range(work.slot_count):
        slot = &work.slots[i]
        entry = waiting_entry(core, slot.link.peer) if needs(work, slot) else NULL
        if entry == NULL:
            continue
        work.channel.broken = True
        event = event_new(core, EVENT_MISMATCH, slot.link.peer, 0)
        if event != NULL:
            # The roles of both, so that a send and a recv can be told apart: their signatures are alike.
            event.code = 1 + role_of(work) + 3 * (entry.header.lane & ~WAITING_MARK)
            event.group = work.channel.group
            event.channel = work.channel.id
            event.sequence = work.sequence
            memcpy(event.mine, slot.signature, SIGNATURE_BYTES)
            memcpy(event.theirs, entry.data, SIGNATURE_BYTES)
        return
