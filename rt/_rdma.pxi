# A link over RDMA: rings of registered memory that the peer's device writes.
#
# May live here: what the engine and Python see of such a stream. May not: the stream itself (_rdma.h), how a link with rings is received
# from and slept on (_shared.pxi), how queue pairs are made (transports/verbs.py).


cdef extern from "_rdma.h" nogil:
    ctypedef enum rt_rdma_fault:
        pass
    enum: RT_RDMA_MOST
    ctypedef struct rt_rdma_state "rt_rdma":     # what Python fills in and reads
        void *qp
        void *cq
        void *channel
        int (*get_event)(void *channel, void **cq, void **context) noexcept nogil
        void (*ack_events)(void *cq, unsigned int count) noexcept nogil
        char *outgoing
        const char *incoming
        uint64_t capacity
        uint64_t peer_address
        uint32_t outgoing_key
        uint32_t peer_key
        uint32_t inline_bytes
        int messages
        int credits
        uint64_t sent
        uint64_t posted
        int mark_all
        rt_rdma_fault fault
        int error
        int status
        int receiving
        uint32_t vendor
    int rt_rdma_open(rt_rdma *rdma)
    ssize_t rt_rdma_send(rt_rdma *rdma, const iovec *parts, int count)
    int64_t rt_rdma_came(rt_rdma *rdma)
    int64_t rt_rdma_peek(rt_rdma *rdma, const char **data)
    void rt_rdma_consume(rt_rdma *rdma, uint64_t nbytes)
    int64_t rt_rdma_held(const rt_rdma *rdma)
    int rt_rdma_over(const rt_rdma *rdma)
    int rt_rdma_has_news(rt_rdma *rdma, int receiving, int sending)
    int rt_rdma_may_sleep(rt_rdma *rdma, int receiving, int sending)
    void rt_rdma_answer(rt_rdma *rdma)
    void rt_rdma_say_goodbye(rt_rdma *rdma)
    int rt_rdma_unfinished(rt_rdma *rdma)
    void rt_rdma_close(rt_rdma *rdma)


cdef ssize_t rdma_send(Link *link, iovec *parts, int count) noexcept nogil:
    return rt_rdma_send(link.rdma, parts, count)


cdef class RdmaStream:
    """One connected queue pair as an ordered stream of bytes each way; what ``Engine.add_link`` takes. Nothing here waits.

    Args:
        qp, cq, channel: addresses of the verbs objects; requests complete in ``cq``, whose events come by ``channel``.
        get_event, ack_events: addresses of ``ibv_get_cq_event`` and ``ibv_ack_cq_events``.
        outgoing, incoming: addresses of the registered rings, of ``capacity`` bytes each, a power of two.
        outgoing_key, inline_bytes: of what is written.
        peer_address, peer_key: of the peer's incoming ring.
        messages, credits: how many may be under way to the peer, of data and of those that only give room back.

    The rings and the verbs objects must outlive it, or its ``shut``.
    """
    cdef rt_rdma_state state

    def __cinit__(self, *, uintptr_t qp, uintptr_t cq, uintptr_t channel, uintptr_t get_event, uintptr_t ack_events, uintptr_t outgoing,
                  uintptr_t incoming, uint64_t capacity, uint32_t outgoing_key, uint32_t inline_bytes, uint64_t peer_address,
                  uint32_t peer_key, int messages, int credits):
        if capacity < 4096 or capacity & (capacity - 1):
            raise ValueError(f"a ring holds a power of two of bytes, at least 4096, not {capacity}")
        if messages < 4 or credits < 4 or messages + credits > RT_RDMA_MOST:
            raise ValueError(f"found {messages} messages and {credits} credits, expected at least 4 each and {RT_RDMA_MOST} together")
        memset(&self.state, 0, sizeof(self.state))
        self.state.qp, self.state.cq, self.state.channel = <void *>qp, <void *>cq, <void *>channel
        self.state.get_event = <int (*)(void *, void **, void **) noexcept nogil>get_event
        self.state.ack_events = <void (*)(void *, unsigned int) noexcept nogil>ack_events
        self.state.outgoing, self.state.incoming, self.state.capacity = <char *>outgoing, <const char *>incoming, capacity
        self.state.outgoing_key, self.state.inline_bytes = outgoing_key, inline_bytes
        self.state.peer_address, self.state.peer_key = peer_address, peer_key
        self.state.messages, self.state.credits = messages, credits
        rt_rdma_open(self.rdma())

    cdef rt_rdma *rdma(self) noexcept:
        return <rt_rdma *>&self.state

    def send(self, const unsigned char[::1] data not None):
        """Take the first bytes of ``data``, as many as there is room for, and return how many; 0: none now.

        Raises:
            OSError: the peer has left, or the connection has failed; ``fault`` says how.
        """
        cdef iovec part
        cdef ssize_t n
        if data.shape[0] == 0:
            return 0
        part.iov_base, part.iov_len = <void *>&data[0], data.shape[0]
        n = rt_rdma_send(self.rdma(), &part, 1)
        if n < 0 and n != -EAGAIN:
            raise OSError(-n, os.strerror(-n))
        return 0 if n < 0 else n

    def recv_into(self, unsigned char[::1] buffer not None):
        """Fill the start of ``buffer`` with what has come and return how many bytes; 0: none now, -1: none ever again.

        Raises:
            OSError: the connection has failed, and all that came before has been handed out; ``fault`` says how.
        """
        cdef const char *data = NULL
        cdef int64_t n = rt_rdma_peek(self.rdma(), &data)
        if n > buffer.shape[0]:
            n = buffer.shape[0]
        if n:
            memcpy(&buffer[0], data, n)
            rt_rdma_consume(self.rdma(), n)
        elif self.state.error:
            raise OSError(self.state.error, os.strerror(self.state.error))
        elif rt_rdma_over(self.rdma()):
            return -1
        return n

    @property
    def bytes_sent(self):
        """How much was handed to the device."""
        return self.state.sent

    @property
    def messages_sent(self):
        """How many messages were handed to the device, credits included."""
        return self.state.posted

    def messages_came(self):
        """Return how many came; -1 once the stream is over. Any thread."""
        return rt_rdma_came(self.rdma())

    @property
    def fault(self):
        """What failed: ``(where, errno, status, vendor, receiving)``; ``where`` is 0 while nothing did.

        1 ibv_post_send, 2 ibv_post_recv, 3 ibv_poll_cq, 4 ibv_req_notify_cq, 5 a completion, of that status,
        6 a message that did not come before the next one.
        """
        return <int>self.state.fault, self.state.error, self.state.status, self.state.vendor, bool(self.state.receiving)

    def ending(self):
        """From here on every write is to complete, so that ``unfinished`` knows when the peer has it."""
        self.state.mark_all = True

    def say_goodbye(self):
        """Tell the peer that nothing follows, if it is still there."""
        rt_rdma_say_goodbye(self.rdma())

    def unfinished(self):
        """Whether the peer's device has not acknowledged everything yet; False too where it never will."""
        return bool(rt_rdma_unfinished(self.rdma()))

    def shut(self):
        """Touch the verbs objects no more."""
        rt_rdma_close(self.rdma())
