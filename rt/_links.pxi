# A link: one ordered byte stream to one peer, that never blocks.
#
# May live here: how bytes are moved through a socket or through a Python object, and how links are made and closed. May not: frames
# (_receive.pxi, _send.pxi), configuration of sockets (transports/).
#
# The contract of send and recv: move what can be moved now and return the number of bytes; -EAGAIN if that is none; another negative
# errno if the link is broken; recv returns 0 at the end of the stream.


cdef ssize_t tcp_send(Link *link, iovec *parts, int count) noexcept nogil:
    cdef msghdr message
    cdef ssize_t n
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    message.msg_iovlen = count
    while True:
        n = sendmsg(link.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if n >= 0:
            return n
        if errno != EINTR:
            return -errno


cdef ssize_t tcp_recv(Link *link, iovec *parts, int count) noexcept nogil:
    cdef msghdr message
    cdef ssize_t n
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    message.msg_iovlen = count
    while True:
        n = recvmsg(link.fd, &message, MSG_DONTWAIT)
        if n >= 0:
            return n
        if errno != EINTR:
            return -errno


cdef ssize_t python_send(Link *link, iovec *parts, int count) noexcept with gil:
    """Forward to ``owner.send(memoryview) -> int``: how much was taken, 0 for none now."""
    cdef ssize_t total = 0
    cdef ssize_t n
    try:
        for i in range(count):
            if not parts[i].iov_len:
                continue
            n = python_part((<object>link.owner).send, &parts[i], PyBUF_READ)
            if n < 0:
                raise ValueError("send returned a negative number")
            total += n
            if n < <ssize_t>parts[i].iov_len:
                break
    except BaseException as error:
        return total if total and isinstance(error, OSError) else owner_failed(link, error, EPIPE)
    return total if total else -EAGAIN


cdef ssize_t python_sendmsg(Link *link, iovec *parts, int count) noexcept with gil:
    """Forward to ``owner.sendmsg(list of memoryviews) -> int``, for owners to which each call costs a message."""
    cdef ssize_t total = 0
    cdef ssize_t n = 0
    views = []
    try:
        for i in range(count):
            if parts[i].iov_len:
                views.append(PyMemoryView_FromMemory(<char *>parts[i].iov_base, parts[i].iov_len, PyBUF_READ))
                total += parts[i].iov_len
        n = (<object>link.owner).sendmsg(views)
        for view in views:
            view.release()
        if not 0 <= n <= total:
            raise ValueError(f"moved {n} bytes of {total}")
    except BaseException as error:
        return owner_failed(link, error, EPIPE)
    return n if n else -EAGAIN


cdef ssize_t python_recv(Link *link, iovec *parts, int count) noexcept with gil:
    """Forward to ``owner.recv_into(memoryview) -> int``: how much came, 0 for none now, -1 at the end of the stream."""
    cdef ssize_t total = 0
    cdef ssize_t n
    try:
        for i in range(count):
            if not parts[i].iov_len:
                continue
            n = python_part((<object>link.owner).recv_into, &parts[i], PyBUF_WRITE)
            if n < 0:
                return total
            total += n
            if n < <ssize_t>parts[i].iov_len:
                break
    except BaseException as error:
        return total if total and isinstance(error, OSError) else owner_failed(link, error, ECONNRESET)
    return total if total else -EAGAIN


cdef ssize_t python_part(transfer, iovec *part, int access) except? -1:
    """Let a Python link move one part; the view dies with the call, as the memory may."""
    view = PyMemoryView_FromMemory(<char *>part.iov_base, part.iov_len, access)
    cdef ssize_t n = transfer(view)
    view.release()
    if n > <ssize_t>part.iov_len:
        raise ValueError(f"moved {n} bytes of {part.iov_len}")
    return n


cdef ssize_t owner_failed(Link *link, error, int otherwise):
    """Return the negative errno for what a Python link raised. A fault ends that link; what it was must not vanish."""
    import logging

    if isinstance(error, OSError):
        return -(error.errno or otherwise)
    if isinstance(error, Exception):
        logging.getLogger("rt").error("%r failed, its link is closed", <object>link.owner, exc_info=error)
    else:
        # Ctrl-C amid a transfer: nobody knows how much was moved. Raised again where it can be seen.
        PyErr_SetInterrupt()
    return -otherwise


cdef Link *link_new(Core *core, int peer) except NULL:
    cdef Link *link
    cdef Link **grown
    if core.channel_count:
        raise RuntimeError("links are added before anything is sent: channels have a place for each")
    if core.link_count == core.link_room:
        grown = <Link **>realloc(core.links, (2 * core.link_room + 8) * sizeof(Link *))
        if grown == NULL:
            raise MemoryError
        core.links = grown
        core.link_room = 2 * core.link_room + 8
    link = <Link *>calloc(1, sizeof(Link))
    if link != NULL:
        link.scratch = <char *>malloc(core.scratch_room)
    if link == NULL or link.scratch == NULL:
        free(link)
        raise MemoryError
    link.fd = -1
    link.peer = peer
    link.index = core.link_count
    link.readable = link.writable = True
    core.links[core.link_count] = link
    core.link_count += 1
    return link


cdef void link_close(Core *core, Link *link):
    """Close the descriptor; the struct stays, dead, so that nothing can dangle."""
    cdef Frame *frame
    while link.frame_count:
        frame = &link.frames[link.frame_first]
        if frame.owned:
            free(frame.body)
        link.frame_first = (link.frame_first + 1) % FRAMES_QUEUED
        link.frame_count -= 1
    if link.fd >= 0:
        rt_poll_remove(core.poll_set, link.fd)
        close(link.fd)
        link.fd = -1
    if link.owner != NULL and link.rdma == NULL:    # that one goes with its rings (ring_unmap)
        Py_DECREF(<object>link.owner)
        link.owner = NULL
    link.rx_dead = link.tx_dead = True
    free(link.stash)
    link.stash = NULL
    link.in_frame = False
