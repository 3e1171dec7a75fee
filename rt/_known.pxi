# Collectives and messages that were made before: found by what lies at hand, and started in one go.
#
# May live here: the table of a group, and what a call does that is found in it, a short poll for its end included. May not: conversions,
# choices, and checks beyond the question whether arrays are plain; a call that needs more goes through rt/collectives.py, which puts what
# it found out into the table.
#
# Any allocation of an object may run the collector, hence finalizers, hence another thread that changes the table. So what is needed of a
# place is taken before objects are made, and the table is changed in one go.

from asyncio import _get_running_loop as running_loop
from functools import update_wrapper
from threading import get_ident


cdef tuple NO_ARGUMENTS = ()
cdef object NOWHERE = object()

cdef enum:
    KNOWN_MOST = 64                         # in a table of twice as many places
    KNOWN_PLACES = 128
    KNOWN_DIMS = 5


cdef struct Known:
    uint64_t call                           # what is called, as Calls.start wants it. 0: a free place. Objects are kept alive by Calls.kept
    PyObject *dtype
    PyObject *program
    PyObject *signature
    PyObject *about
    uint64_t channel
    Py_ssize_t shift                        # bytes from the result to x where they share memory, else APART
    int ndim
    int out_ndim
    cnp.npy_intp dims[KNOWN_DIMS]
    cnp.npy_intp out_dims[KNOWN_DIMS]
    Py_ssize_t out_bytes


cdef Py_ssize_t APART = <Py_ssize_t>(1) << 62


cdef Py_ssize_t shift_between(cnp.ndarray x, cnp.ndarray out):
    """Bytes from ``out`` to ``x``, both contiguous, or APART if they share no memory."""
    cdef char *start = cnp.PyArray_BYTES(x)
    cdef char *result = cnp.PyArray_BYTES(out)
    if start + cnp.PyArray_NBYTES(x) <= result or result + cnp.PyArray_NBYTES(out) <= start:
        return APART
    return start - result


cdef inline bint plain(x):
    return type(x) is cnp.ndarray and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray>x) and cnp.PyArray_NDIM(<cnp.ndarray>x) <= KNOWN_DIMS


cdef bint takes(Known *known, out):
    """Whether this is a message that was found, and which ``out``, None for a new array, can receive as it is."""
    cdef int i
    if known.call == 0:
        return False
    if out is None:
        return known.out_bytes < POOLED_BYTES   # memory for large results is a matter for those who keep it
    if type(out) is not cnp.ndarray or <PyObject *>cnp.PyArray_DESCR(<cnp.ndarray>out) != known.dtype:
        return False
    if not cnp.PyArray_ISCARRAY(<cnp.ndarray>out) or cnp.PyArray_NDIM(<cnp.ndarray>out) != known.ndim:
        return False
    for i in range(known.ndim):
        if known.dims[i] != cnp.PyArray_DIM(<cnp.ndarray>out, i):
            return False
    return True


cpdef uint64_t known_message(int kind, peer, tag):
    """The number that tells a message to or from a rank in the table of calls; 0 if it is not put there."""
    cdef int64_t rank, number
    if type(peer) is not int or type(tag) is not int:
        return 0
    try:
        rank, number = peer, tag
    except OverflowError:
        return 0
    if not (0 <= rank < <int64_t>1 << 30 and 0 <= number < <int64_t>1 << 15):
        return 0
    return <uint64_t>kind | <uint64_t>(rank + 1) << 16 | <uint64_t>number << 48


cdef class Calls:
    """The collectives and messages of one group whose plan is made.

    A call is told by a number other than 0: what is called, and what of it is not seen in the arrays (``known_as``, ``known_message``).

    Args:
        make: class of the works; its ``__init__`` is not called.
        group: the group, for its works; identity: its identity, and that of the channel of its collectives.
        ranks: world rank of each of its ranks.
        recent: where the numbers and signatures of its last calls are noted, in turns.
    """
    cdef Engine engine
    cdef object make, group
    cdef uint64_t identity
    cdef list ranks, recent, kept
    cdef object failure
    cdef int count
    cdef Known places[KNOWN_PLACES]

    def __cinit__(self, make, group, Engine engine, uint64_t identity, list ranks not None, list recent not None, *_):
        self.make, self.group, self.engine, self.identity, self.ranks, self.recent = make, group, engine, identity, ranks, recent
        self.failure = None
        self.forget()

    def forget(self) -> None:
        """Empty the table: from now on every call is checked again."""
        cdef list fresh = []
        memset(self.places, 0, sizeof(self.places))
        self.count = 0
        self.kept, fresh = fresh, self.kept     # what the places named goes last

    def break_off(self, failure) -> None:
        """Find no call any more; a work that is just being started fails with ``failure``."""
        self.failure = failure
        self.forget()

    cdef Known *place(self, uint64_t call, cnp.ndarray x, Py_ssize_t shift):
        """The place of a call of x in the table, free or not."""
        return self.place_of(call, <PyObject *>cnp.PyArray_DESCR(x), cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), shift)

    cdef Known *place_of(self, uint64_t call, PyObject *dtype, int ndim, const cnp.npy_intp *dims, Py_ssize_t shift):
        cdef uint64_t mixed = call ^ (<uint64_t><uintptr_t>dtype << 1) ^ <uint64_t>shift
        cdef Known *known
        cdef int i, at
        for i in range(ndim):
            mixed = (mixed ^ <uint64_t>dims[i]) * <uint64_t>0x9E3779B97F4A7C15
        at = <int>((mixed ^ (mixed >> 32)) % KNOWN_PLACES)
        while True:                         # half of the places are free
            known = &self.places[at]
            if known.call == 0:
                return known
            if known.call == call and known.dtype == dtype and known.shift == shift and known.ndim == ndim:
                for i in range(ndim):
                    if known.dims[i] != dims[i]:
                        break
                else:
                    return known
            at = (at + 1) % KNOWN_PLACES

    def remember(self, uint64_t call, x, out, ready) -> None:
        """Keep the plan of a call that was checked, of a plain array with a plain result ``out`` of the same dtype."""
        if type(x) is cnp.ndarray:
            self.keep(call, <cnp.ndarray>x, <cnp.ndarray>out, shift_between(<cnp.ndarray>x, <cnp.ndarray>out), ready)

    def remember_message(self, int kind, peer, tag, x, call) -> None:
        """Keep the plan of a message of this array, or into it; ``call`` is the group's for it."""
        cdef uint64_t number = known_message(kind, peer, tag)
        if number != 0 and type(x) is cnp.ndarray:
            self.keep(number, <cnp.ndarray>x, <cnp.ndarray>x, APART, self.group.ready(call))

    cdef int keep(self, uint64_t call, cnp.ndarray array, cnp.ndarray target, Py_ssize_t shift, ready) except -1:
        cdef Known *known
        cdef uint64_t channel
        cdef int i
        if cnp.PyArray_NDIM(array) > KNOWN_DIMS or cnp.PyArray_NDIM(target) > KNOWN_DIMS:
            return 0
        if self.count >= KNOWN_MOST:
            self.forget()
        if self.place(call, array, shift).call != 0:
            return 0                        # known, and one that goes the long way all the same: what it makes is too large
        dtype = array.dtype
        channel = ready.channel
        self.kept.append((dtype, ready.program, ready.signature, ready.about))
        known = self.place(call, array, shift)      # again: an allocation may run anything
        if known.call != 0 or self.count >= KNOWN_MOST or self.failure is not None:
            return 0
        known.call, known.dtype, known.channel = call, <PyObject *>dtype, channel
        known.program, known.signature, known.about = <PyObject *>ready.program, <PyObject *>ready.signature, <PyObject *>ready.about
        known.shift, known.ndim, known.out_ndim = shift, cnp.PyArray_NDIM(array), cnp.PyArray_NDIM(target)
        known.out_bytes = cnp.PyArray_NBYTES(target)
        for i in range(known.ndim):
            known.dims[i] = cnp.PyArray_DIM(array, i)
        for i in range(known.out_ndim):
            known.out_dims[i] = cnp.PyArray_DIM(target, i)
        self.count += 1
        return 0

    cdef Known *find(self, uint64_t call, x, out):
        """The call in the table, NULL if it is not there or not as it was."""
        cdef cnp.ndarray array, target
        cdef Known *known
        cdef Py_ssize_t shift = APART
        cdef int i
        if self.count == 0 or not plain(x):
            return NULL
        array = <cnp.ndarray>x
        if out is None:
            known = self.place(call, array, APART)
            # Memory for large results is a matter for those who keep it.
            return known if known.call != 0 and known.out_bytes < POOLED_BYTES else NULL
        if type(out) is not cnp.ndarray:
            return NULL
        target = <cnp.ndarray>out
        if cnp.PyArray_DESCR(target) != cnp.PyArray_DESCR(array) or not cnp.PyArray_ISCARRAY(target):
            return NULL
        known = self.place(call, array, shift_between(array, target))
        if known.call == 0 or known.out_ndim != cnp.PyArray_NDIM(target):
            return NULL
        for i in range(known.out_ndim):
            if known.out_dims[i] != cnp.PyArray_DIM(target, i):
                return NULL
        return known

    cdef Work made(self, what, about, result, bint borrows_source, bint borrows_target):
        """A work of this group for a call that was found."""
        cdef Work work = <Work>(<PyTypeObject *>self.make).tp_new(self.make, <PyObject *>NO_ARGUMENTS, NULL)
        work.group, work.what, work.about = self.group, what, about
        work.borrows_source, work.borrows_target = borrows_source, borrows_target
        work.result = result
        return work

    cpdef object start(self, uint64_t call, x, out, what, Py_ssize_t budget):
        """Start a collective of an array; return its work, or None if the call is not in the table."""
        cdef Known *known = self.find(call, x, out)
        return None if known == NULL else self.begin_known(known, x, out, what, budget)

    cdef object begin_known(self, Known *known, source, out, what, Py_ssize_t budget):
        """Start what was found; ``out`` is where its result goes: None: a new array, NOWHERE: there is none but ``source`` itself."""
        cdef cnp.ndarray target
        cdef Work work
        cdef Program program = <Program>known.program
        cdef bytes signature = <bytes>known.signature
        cdef uint64_t channel = known.channel
        cdef int ndim = known.out_ndim
        cdef cnp.npy_intp dims[KNOWN_DIMS]
        about, dtype = <object>known.about, <object>known.dtype
        memcpy(dims, known.out_dims, sizeof(dims))
        if out is not None:
            result = source if out is NOWHERE else out
        else:
            Py_INCREF(dtype)                # taken over by the array
            result = PyArray_NewFromDescr(&PyArray_Type, <PyArray_Descr *><PyObject *>dtype, ndim, dims, NULL, NULL, 0, NULL)
        work = self.made(what, about, result, source is not None, out is not None and out is not NOWHERE)
        try:
            work.status = self.engine.submit(work, program, self.identity, channel, signature, self.ranks, <int>len(self.ranks), source,
                                             None if out is NOWHERE else result, budget)
        except BaseException:               # a signal's handler has raised: the caller gets no work to wait for, and its memory back
            work.give_back()
            raise
        if channel == self.identity:
            self.recent[work.sequence % len(self.recent)] = (work.sequence, signature)
        if self.failure is not None and work.state == STATE_FLYING:
            self.engine.break_group(self.identity, self.failure)    # it broke between the two lines above
        return work

    def send(self, int kind, x, dst, tag, Py_ssize_t budget):
        """Start a send of an array; return its work, or None if it is not in the table. ``kind`` is that of sends."""
        cdef uint64_t call = known_message(kind, dst, tag)
        cdef Known *known
        if call == 0 or self.count == 0 or not plain(x):
            return None
        known = self.place(call, <cnp.ndarray>x, APART)
        return self.begin_known(known, x, NOWHERE, "send", budget) if known.call != 0 else None

    def recv_like(self, int kind, x, src, out, tag, Py_ssize_t budget):
        """As ``send``, of a receive of an array of x's form."""
        cdef uint64_t call = known_message(kind, src, tag)
        if call == 0 or self.count == 0 or not plain(x):
            return None
        return self.receive(self.place(call, <cnp.ndarray>x, APART), out, "recv_like", budget)

    def recv(self, int kind, shape, dtype, src, out, tag, Py_ssize_t budget):
        """As ``send``, of a receive; ``dtype`` is NumPy's."""
        cdef uint64_t call = known_message(kind, src, tag)
        cdef cnp.npy_intp dims[KNOWN_DIMS]
        cdef int i, ndim
        if call == 0 or self.count == 0 or type(shape) is not tuple or not len(<tuple>shape) <= KNOWN_DIMS:
            return None
        ndim = <int>len(<tuple>shape)
        for i in range(ndim):
            side = (<tuple>shape)[i]
            if type(side) is not int or not 0 <= side < APART:
                return None
            dims[i] = side
        return self.receive(self.place_of(call, <PyObject *>dtype, ndim, dims, APART), out, "recv", budget)

    def sendrecv(self, int sends, int receives, x, dst, src, out, tag, Py_ssize_t budget):
        """As ``recv_like`` of ``out``, else of x, and ``send``; returns the sending and the receiving work, or None: neither has begun.

        The receive begins first: the peer may send its message only once it knows of that, and would hear of it behind ours.
        """
        cdef uint64_t call = known_message(sends, dst, tag), other = known_message(receives, src, tag)
        cdef Known *sent
        cdef Known *received
        cdef Known copied
        like = x if out is None else out
        if call == 0 or other == 0 or self.count == 0 or not plain(x) or not plain(like):
            return None
        if out is not None and shift_between(<cnp.ndarray>x, <cnp.ndarray>out) != APART:
            return None                     # two works know nothing of each other's memory
        sent, received = self.place(call, <cnp.ndarray>x, APART), self.place(other, <cnp.ndarray>like, APART)
        if sent.call == 0 or not takes(received, out):
            return None
        copied = sent[0]                    # the first work may have the table changed
        program, signature, about, dtype = <object>copied.program, <object>copied.signature, <object>copied.about, <object>copied.dtype
        first = self.begin_known(received, None, out, "sendrecv", budget)
        try:
            return self.begin_known(&copied, x, NOWHERE, "sendrecv", budget), first
        except BaseException:
            first.give_back()
            raise

    cdef object receive(self, Known *known, out, what, Py_ssize_t budget):
        return self.begin_known(known, None, out, what, budget) if takes(known, out) else None

    cpdef object run(self, uint64_t call, x, out, what, double spin):
        """As ``start``, and poll for ``spin`` seconds for its end. Not where a loop runs: a blocking call there may have to be refused."""
        cdef Work work
        cdef double until
        cdef int found = NEWS_IN_MEMORY
        if running_loop() is not None:
            return None
        work = self.start(call, x, out, what, BLOCKING_BUDGET)
        if work is None or work.state != STATE_FLYING:
            return work
        try:
            if spin > 0 and self.engine.core.shared_count:
                until = rt_now() + spin
                while found and work.state == STATE_FLYING and rt_now() < until:
                    found = self.engine.watch(until)
                    self.engine.advance(BLOCKING_BUDGET, found != NEWS_IN_MEMORY)
            PyErr_CheckSignals()            # here, where the caller's memory can still be given back
        except BaseException:
            work.give_back()
            raise
        finally:
            if self.engine.core.active_count:
                self.engine.wake()          # what one thread leaves undone another may be waiting for
        return work


cdef class LibraryCalls(Calls):
    """As ``Calls``, of a group whose collectives a library makes: its all-reduces. Instead of a program ``remember`` is given what makes
    the call: the function that blocks, the one that begins (None where a thread makes the call), the operator, what stands in place of x
    where out is x, and the signature of a call that is awaited. It is given None where that is not all that is to do.

    Args:
        begin: called with a work, the function that begins, its arguments, and the signature.
        note: called with a work and its signature before a call that blocks.
        blocked: where the work stands meanwhile, by thread.
        fail: called with a work and what the library raised; raises what the caller gets.
    """
    cdef object begin, note, fail
    cdef dict blocked

    def __init__(self, make, group, Engine engine, uint64_t identity, list ranks not None, list recent not None, begin, note,
                 dict blocked not None, fail):
        self.begin, self.note, self.blocked, self.fail = begin, note, blocked, fail

    def remember(self, uint64_t call, x, out, ready) -> None:
        if ready.program is not None:
            Calls.remember(self, call, x, out, ready)

    def remember_message(self, int kind, peer, tag, x, call) -> None:
        """Do nothing."""

    cpdef object start(self, uint64_t call, x, out, what, Py_ssize_t budget):
        cdef Known *known = self.find(call, x, out)
        if known == NULL:
            return None
        (_, begins, operator, in_place, signature), about, dtype = <tuple>known.program, <object>known.about, <object>known.dtype
        target = empty(x.shape, dtype) if out is None else out
        work = self.made(what, about, target, True, out is not None)
        self.begin(work, begins, (x if lie_apart(x, target) else in_place, target, operator), signature)
        return work

    cpdef object run(self, uint64_t call, x, out, what, double spin):
        if running_loop() is not None:
            return None
        cdef Known *known = self.find(call, x, out)
        if known == NULL:
            return None
        (blocks, _, operator, in_place, _), about, dtype = <tuple>known.program, <object>known.about, <object>known.dtype
        signature = <object>known.signature
        target = empty(x.shape, dtype) if out is None else out
        work = self.made(what, about, target, True, out is not None)
        self.note(work, signature)
        thread = get_ident()
        self.blocked[thread] = work
        try:
            if self.failure is not None:    # since it was found; from now on who breaks the group ends this process
                raise self.failure(work, True)
            blocks(x if lie_apart(x, target) else in_place, target, operator)
        except Exception as error:
            self.fail(work, error)
        finally:
            del self.blocked[thread]
        work.finish(target)
        return work


# -- before the layers of Python that most calls go through

cdef Calls world_calls = None               # of the group that calls without group= mean; None: it is to be asked for
cdef double world_spin = 0.0
cdef object world_waits = ()                # calls of before it formed, which have to be started first


def calls_of_world(Calls calls, double spin) -> None:
    """Say which table calls without ``group=`` look into, and for how many seconds those that block poll."""
    global world_calls, world_spin
    world_calls, world_spin = calls, spin


def calls_that_wait(waiting) -> None:
    """Say which queue holds the calls that go before all others."""
    global world_waits
    world_waits = waiting


cdef object called_before(uint64_t call, x, out, what, wait):
    """The work of a call that was made before, with ``wait`` its result; NOWHERE if it is not known."""
    cdef Calls calls = world_calls
    cdef Work work
    if calls is None or world_waits:
        return NOWHERE
    work = calls.start(call, x, out, what, LOOP_BUDGET) if wait is None else calls.run(call, x, out, what, world_spin)
    if work is None:
        return NOWHERE
    if wait is None:
        calls.group.follow(work.status)
        return work
    return work.result if work.state == STATE_DONE else wait(work, None)


cdef object renamed(collective, long_way, wait):
    """Give a function the name and the words of ``long_way``, and the place where users find it, for pickle."""
    update_wrapper(collective, long_way)
    collective.__module__, collective.__qualname__ = "rt" if wait is None else "rt.sync", long_way.__name__
    return collective


def shortened(long_way, uint64_t call, wait=None):
    """Return a collective like ``long_way`` that takes a short way to what was called before, under this number.

    Args:
        wait: of calls that block: ``wait(work, None)`` drives a work that does not end at once, and returns its result.
    """
    what = long_way.__name__

    def collective(x=NOWHERE, /, *rest, group=None, stream=None, out=None, timeout=None, key=None, **others):
        if group is None and stream is None and timeout is None and key is None and not rest and not others:
            made = called_before(call, x, out, what, wait)
            if made is not NOWHERE:
                return made
        given = () if x is NOWHERE else (x, *rest)      # arguments that it does not take are for the long way to refuse, by its name
        return long_way(*given, group=group, stream=stream, out=out, timeout=timeout, key=key, **others)

    return renamed(collective, long_way, wait)


def shortened_by_op(long_way, dict calls not None, wait=None):
    """As ``shortened``, of a collective whose second argument is an operator; ``calls`` are the numbers by its name."""
    what = long_way.__name__

    def collective(x=NOWHERE, op=NOWHERE, /, *rest, group=None, stream=None, out=None, timeout=None, key=None, **others):
        if op is NOWHERE and x is not NOWHERE:
            op = others.pop("op", "sum")
        if group is None and stream is None and timeout is None and key is None and not rest and not others:
            if type(op) is str and op in calls:
                made = called_before(calls[op], x, out, what, wait)
                if made is not NOWHERE:
                    return made
        given = () if x is NOWHERE else (x, op, *rest)
        return long_way(*given, group=group, stream=stream, out=out, timeout=timeout, key=key, **others)

    return renamed(collective, long_way, wait)


def shortened_barrier(long_way, uint64_t call, nothing, wait=None):
    """As ``shortened``, of a call without arrays, which stands in the table under an array of no items."""
    def collective(*given, group=None, stream=None, timeout=None, key=None, **others):
        if group is None and stream is None and timeout is None and key is None and not given and not others:
            made = called_before(call, nothing, nothing, "barrier", wait)
            if made is not NOWHERE:
                if wait is not None:
                    return None
                (<Work>made).result = None
                return made
        return long_way(*given, group=group, stream=stream, timeout=timeout, key=key, **others)

    return renamed(collective, long_way, wait)
