# The Python face of a work.
#
# May live here: what ties a WorkState to its owner (memory, outcome, who waits), giving the caller's memory back early, and the inner loops
# of waiting. May not: what the drivers (rt.aio, rt.sync) know about loops, threads and timeouts.

cdef class Work:
    """A collective in flight: its memory, its outcome, and who is to be told.

    Attributes:
        group: the group it runs on.
        what: what was called, for messages, for example ``all_sum``.
        about: dtype and size, for messages.
        borrows_source, borrows_target: whether the memory is the caller's.
        result: what the collective returns; valid once ``state`` is DONE.
        hand_out: callable that makes of the result what the caller gets, called once; None: the result itself.
        error: callable that makes the exception of a failed work from the work.
        state: FLYING, DONE or FAILED.
        sequence: number of the work in its channel.
        status: the engine's answer when it was submitted.
        received: bytes that had come for it when it failed.
        lent: a library has the memory, and gives it back only at the end.
        peer: rank in the group, of a message that a library carries.
        deadline: seconds it may take and when they end, until some loop watches that; None: for ever.
        since: when somebody began to wait for it, on the clock of ``time.monotonic``; 0: nobody has. Works that end at once never know.
    """
    cdef WorkState *work
    cdef Program program
    cdef public object group
    cdef public object what
    cdef public object about
    cdef public bint borrows_source
    cdef public bint borrows_target
    cdef readonly object source
    cdef readonly object target
    cdef public object result
    cdef public object hand_out
    cdef public object error
    cdef readonly int state
    cdef public uint32_t sequence
    cdef public int status
    cdef readonly Py_ssize_t received
    cdef readonly double since
    cdef public bint lent
    cdef public object peer
    cdef public object deadline
    cdef list waiters
    cdef object __weakref__

    def __cinit__(self):
        self.what = self.about = ""

    cdef void attach(self, WorkState *work, Program program, source, target):
        self.work = work
        self.program = program
        self.source = source
        self.target = target
        work.handle = <PyObject *>self
        Py_INCREF(self)

    cdef tell(self):
        """Let go of the memory and tell the waiters, without the lock: both may run any Python code. Returns an interrupt, or None."""
        cdef list waiters = self.waiters
        self.source = self.target = self.waiters = None
        interrupt = None
        if waiters is not None:
            for waiter in waiters:
                interrupt = call_waiter(waiter) or interrupt
        return interrupt

    def add_waiter(self, waiter):
        """Have ``waiter()`` called, by whatever thread makes the progress, when the work ends; False if it has ended."""
        cdef list fresh = []                        # may run the collector, hence anything: the state is asked afterwards
        if self.state != STATE_FLYING:
            return False
        if self.waiters is None:
            self.waiters = fresh
            if self.since == 0:
                self.since = rt_now()
        self.waiters.append(waiter)
        return True

    def remove_waiter(self, waiter):
        if self.waiters is not None and waiter in self.waiters:
            self.waiters.remove(waiter)

    def pending(self):
        """The work in flight on which this one waits: itself, but for works that are made of works."""
        return self

    def fail(self, error):
        """End a work that was never submitted."""
        self.error = error
        self.state = STATE_FAILED
        self._told()

    def finish(self, result):
        """End a work that had nothing to wait for."""
        self.result = result
        self.state = STATE_DONE
        self._told()

    cdef int _told(self) except -1:
        interrupt = self.tell()
        if interrupt is not None:
            raise interrupt
        return 0

    def outcome(self):
        """Return the result or raise the error; only once the work has ended."""
        cdef object hand_out, plain, handed
        if self.state == STATE_DONE:
            hand_out, plain = self.hand_out, self.result
            if hand_out is not None and plain is not None:
                handed = hand_out(plain)
                # Another thread may have been here meanwhile. None comes between these two: the old values live on in this frame.
                if self.hand_out is not None:
                    self.result = handed
                    self.hand_out = None
            return self.result
        if self.state == STATE_FAILED:
            raise self.error(self)
        raise RuntimeError("the work is still in flight")


cdef call_waiter(waiter):
    """Call ``waiter()``; what it raises must not keep others from being told."""
    try:
        waiter()
    except Exception:
        PyErr_WriteUnraisable(waiter)
    except BaseException as interrupt:
        return interrupt
    return None


cdef void rebase(WorkState *work, const char *start, Py_ssize_t nbytes, Py_ssize_t shift) noexcept nogil:
    """Move every pointer of a work into ``start .. start + nbytes`` by ``shift`` bytes."""
    cdef int i, k
    cdef Link *link
    cdef Frame *frame
    for i in range(2):
        if work.buffers[i] != NULL and start <= work.buffers[i] < start + nbytes:
            work.buffers[i] += shift
    for i in range(work.slot_count):
        link = work.slots[i].link
        for k in range(link.frame_count):
            frame = &link.frames[(link.frame_first + k) % FRAMES_QUEUED]
            # A link may serve several slots, so a frame may be met twice; the second time it lies outside.
            if frame.work == work and not frame.owned and start <= frame.body < start + nbytes:
                frame.body += shift


def move_memory(Engine engine not None, Work handle not None, old, new, bint copy):
    """Let a work in flight use ``new`` where it used ``old``, so that the caller's memory is free when this returns.

    Args:
        old: the caller's array, source or target of the work.
        new: an array of the same size, private to the runtime.
        copy: copy the bytes over first, with the engine stopped; False if ``new`` holds them already.
    """
    cdef const char *start = <const char *>cnp.PyArray_DATA(<cnp.ndarray>old)
    cdef char *fresh = <char *>cnp.PyArray_DATA(<cnp.ndarray>new)
    cdef Py_ssize_t nbytes = cnp.PyArray_NBYTES(<cnp.ndarray>old)
    engine.lock()
    if handle.work != NULL:
        with nogil:
            if copy:
                memcpy(fresh, start, nbytes)
            rebase(handle.work, start, nbytes, fresh - start)
        if handle.source is old:
            handle.source = new
        if handle.target is old:
            handle.target = new
    engine.unlock()


def works_of(Engine engine not None):
    """Return the works of an engine that have not ended, in the order in which they began."""
    cdef WorkState *work
    cdef list found = []
    engine.lock()                               # nothing below makes an object that the collector counts: it could call the engine
    work = engine.core.active_first
    while work != NULL:
        if work.handle != NULL:
            found.append(<Work>work.handle)
        work = work.next_active
    engine.unlock()
    return found


cdef Py_ssize_t received_bytes(WorkState *work) noexcept nogil:
    cdef Py_ssize_t total = 0
    cdef int i
    cdef Step *step
    for i in range(work.plan.step_count):
        step = &work.plan.steps[i]
        if step.kind == RECV or step.kind == RECV_REDUCE:
            total += work.done[i] * step.wire
    return total


cdef class Sleeper:
    """Puts one thread to sleep until an engine can make progress or a work ends. One per thread."""
    cdef int fds[2]

    def __cinit__(self):
        if rt_wake_create(self.fds) < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        close(self.fds[0])
        if self.fds[1] != self.fds[0]:
            close(self.fds[1])

    def __call__(self):
        rt_wake_signal(self.fds[1])


def turn(Engine engine not None, Py_ssize_t budget, double spin):
    """As ``Engine.progress``, but where one lone work is blocked poll on for ``spin`` seconds: for event loops.

    A sleep and a wake-up cost more than that, and where several works are in flight there is other work to do.
    """
    cdef int status = engine.advance(budget, True)
    cdef int found = 0
    cdef double until
    if status == PROGRESS_BLOCKED and engine.core.active_count == 1:
        if spin > 0:
            until = rt_now() + spin
            while status == PROGRESS_BLOCKED and rt_now() < until:
                if engine.core.shared_count:
                    found = engine.watch(until)
                status = engine.advance(budget, found != NEWS_IN_MEMORY)
        elif engine.core.shared_count:
            found = engine.give_way()
            if found:
                status = engine.advance(budget, found != NEWS_IN_MEMORY)
    if status == PROGRESS_BLOCKED and engine.rest():
        status = PROGRESS_BUDGET
    if status == PROGRESS_BUDGET and engine.sleepers > 1:
        engine.wake()                           # the loop will turn again, but when, and whether at all, is its own affair
    return status


cdef enum:
    LOOP_BUDGET = 1 << 20                   # bytes moved per turn of a loop: about 0.3 ms
    BLOCKING_BUDGET = 1 << 24               # bytes that a blocking thread moves before it looks at the clock
    BLOCKED_MILLISECONDS = 500              # before a blocked thread says so: long enough to be rare, short for who waits for ever

BUDGET_BYTES = LOOP_BUDGET


def wait(Engine engine not None, Work handle not None, Sleeper sleeper not None, double seconds, double spin, alone):
    """Drive the engine until a work ends; return False if ``seconds`` (negative: for ever) ended first.

    Spins for at most ``spin`` seconds before each sleep. Signals are handled while it sleeps (so Ctrl-C raises), and every so often
    while it is busy. ``alone``, asked before the first sleep: whether no other thread can make a call, so that two ranks that
    block in different calls can be told (_deadlock.pxi); None: no.
    """
    cdef double deadline = rt_now() + seconds if seconds >= 0 else -1
    cdef double until, now, signals = rt_now() + 0.05
    cdef int status, slept, found = NEWS_IN_MEMORY
    cdef bint told = False                      # whether who ends the work wakes this thread; a poll sees it by itself
    cdef double rest
    cdef Work blocking
    try:
        while handle.state == STATE_FLYING:
            until = rt_now() + spin
            while True:
                status = engine.advance(BLOCKING_BUDGET, found != NEWS_IN_MEMORY)
                if handle.state != STATE_FLYING:
                    return True
                now = rt_now()
                if now > signals:
                    PyErr_CheckSignals()
                    signals = now + 0.05
                if deadline >= 0 and now >= deadline:
                    return False
                if status != PROGRESS_BUDGET and now >= until:
                    break
                if status == PROGRESS_BLOCKED and engine.core.shared_count:
                    found = engine.watch(until)
                else:
                    found = 0
            if spin <= 0 and engine.core.shared_count:
                found = engine.give_way()
                if found:
                    continue
            found = 0
            if not told:
                rt_wake_drain(sleeper.fds[0])
                if not handle.add_waiter(sleeper):
                    return True
                told = True
            if engine.rest():
                continue
            rest = deadline - now if deadline >= 0 else -1
            if alone is not None and not alone():
                alone = None
            if alone is not None and (rest < 0 or rest > 1e-3 * BLOCKED_MILLISECONDS):
                rest = 1e-3 * BLOCKED_MILLISECONDS
            engine.sleepers += 1
            with nogil:
                slept = rt_poll_sleep(engine.core.poll_set, sleeper.fds[0], rest)
            engine.sleepers -= 1
            if slept < 0:
                PyErr_CheckSignals()
            elif slept == 0 and alone is not None:
                alone = None                    # said once
                blocking = handle.pending()
                engine.lock()
                if blocking.work != NULL:
                    say_waiting(&engine.core, blocking.work)
                engine.unlock()
        return True
    finally:
        if told:
            handle.remove_waiter(sleeper)
        # What one thread leaves undone another may be waiting for.
        if engine.core.active_count:
            engine.wake()
