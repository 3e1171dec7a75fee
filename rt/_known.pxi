# Collectives that were made before: found by what lies at hand, and started in one go.
#
# May live here: the table of a group, and what a call does that is found in it, a short poll for its end included. May not: conversions,
# choices, and checks beyond the question whether arrays are plain; a call that needs more goes through rt/collectives.py, which puts what
# it found out into the table.
#
# Any allocation of an object may run the collector, hence finalizers, hence another thread that changes the table. So what is needed of a
# place is taken before objects are made, and the table is changed in one go.

from asyncio import _get_running_loop as running_loop
from threading import get_ident


cdef tuple NO_ARGUMENTS = ()

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


cdef class Calls:
    """The collectives of one group whose plan is made.

    A call is told by a number other than 0: the collective, and what else of it is not seen in the arrays (``known_as``).

    Args:
        make: class of the works; its ``__init__`` is not called.
        group: the group, for its works; identity: its identity, and that of the channel of its collectives.
        ranks: world rank of each of its ranks.
        recent: where the numbers and signatures of its last calls are noted, in turns.
        ops: the operators of all-reduces by name, each the number of such a call.
    """
    cdef Engine engine
    cdef object make, group
    cdef uint64_t identity
    cdef list ranks, recent, kept
    cdef dict ops
    cdef object failure
    cdef int count
    cdef Known places[KNOWN_PLACES]

    def __cinit__(self, make, group, Engine engine, uint64_t identity, list ranks not None, list recent not None,
                  dict ops not None, *_):
        self.make, self.group, self.engine, self.identity, self.ranks, self.recent = make, group, engine, identity, ranks, recent
        self.ops = ops
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
        """The place of a call in the table, free or not."""
        cdef PyObject *dtype = <PyObject *>cnp.PyArray_DESCR(x)
        cdef int ndim = cnp.PyArray_NDIM(x)
        cdef uint64_t mixed = call ^ (<uint64_t><uintptr_t>dtype << 1) ^ <uint64_t>shift
        cdef Known *known
        cdef int i, at
        for i in range(ndim):
            mixed = (mixed ^ <uint64_t>cnp.PyArray_DIM(x, i)) * <uint64_t>0x9E3779B97F4A7C15
        at = <int>((mixed ^ (mixed >> 32)) % KNOWN_PLACES)
        while True:                         # half of the places are free
            known = &self.places[at]
            if known.call == 0:
                return known
            if known.call == call and known.dtype == dtype and known.shift == shift and known.ndim == ndim:
                for i in range(ndim):
                    if known.dims[i] != cnp.PyArray_DIM(x, i):
                        break
                else:
                    return known
            at = (at + 1) % KNOWN_PLACES

    def remember(self, uint64_t call, x, out, ready) -> None:
        """Keep the plan of a call that was checked, of a plain array with a plain result ``out`` of the same dtype."""
        cdef cnp.ndarray array, target
        cdef Known *known
        cdef Py_ssize_t shift
        cdef int i
        if type(x) is not cnp.ndarray or cnp.PyArray_NDIM(<cnp.ndarray>x) > KNOWN_DIMS or cnp.PyArray_NDIM(<cnp.ndarray>out) > KNOWN_DIMS:
            return
        if self.count >= KNOWN_MOST:
            self.forget()
        array, target = <cnp.ndarray>x, <cnp.ndarray>out
        dtype = array.dtype
        self.kept.append((dtype, ready.program, ready.signature, ready.about))
        shift = shift_between(array, target)
        known = self.place(call, array, shift)
        if known.call != 0 or self.count >= KNOWN_MOST or self.failure is not None:
            return
        known.call, known.dtype = call, <PyObject *>dtype
        known.program, known.signature, known.about = <PyObject *>ready.program, <PyObject *>ready.signature, <PyObject *>ready.about
        known.shift, known.ndim, known.out_ndim = shift, cnp.PyArray_NDIM(array), cnp.PyArray_NDIM(target)
        known.out_bytes = cnp.PyArray_NBYTES(target)
        for i in range(known.ndim):
            known.dims[i] = cnp.PyArray_DIM(array, i)
        for i in range(known.out_ndim):
            known.out_dims[i] = cnp.PyArray_DIM(target, i)
        self.count += 1

    cdef Known *find(self, uint64_t call, x, out):
        """The call in the table, NULL if it is not there or not as it was."""
        cdef cnp.ndarray array, target
        cdef Known *known
        cdef Py_ssize_t shift = APART
        cdef int i
        if type(x) is not cnp.ndarray or self.count == 0:
            return NULL
        array = <cnp.ndarray>x
        if not cnp.PyArray_ISCARRAY_RO(array) or cnp.PyArray_NDIM(array) > KNOWN_DIMS:
            return NULL
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

    cdef Work made(self, what, about, x, target, out):
        """A work of this group for a call that was found."""
        cdef Work work = <Work>(<PyTypeObject *>self.make).tp_new(self.make, <PyObject *>NO_ARGUMENTS, NULL)
        work.group, work.what, work.about = self.group, what, about
        work.borrows_source = True
        work.borrows_target = out is not None
        work.result = target
        return work

    def reduce(self, x, op, out, what, Py_ssize_t budget):
        """As ``start``, of an all-reduce with an operator of this name."""
        if type(op) is not str:
            return None
        call = self.ops.get(op)
        return None if call is None else self.start(call, x, out, what, budget)

    cpdef object start(self, uint64_t call, x, out, what, Py_ssize_t budget):
        """Start a collective of an array; return its work, or None if the call is not in the table."""
        cdef Known *known = self.find(call, x, out)
        cdef cnp.ndarray array, target
        cdef Work work
        cdef Program program
        cdef bytes signature
        cdef int ndim
        cdef cnp.npy_intp dims[KNOWN_DIMS]
        if known == NULL:
            return None
        array = <cnp.ndarray>x
        program, signature = <Program>known.program, <bytes>known.signature
        about, dtype = <object>known.about, <object>known.dtype
        ndim = known.out_ndim
        memcpy(dims, known.out_dims, sizeof(dims))
        if out is None:
            Py_INCREF(dtype)                # taken over by the array
            target = PyArray_NewFromDescr(&PyArray_Type, <PyArray_Descr *><PyObject *>dtype, ndim, dims, NULL, NULL, 0, NULL)
        else:
            target = <cnp.ndarray>out
        work = self.made(what, about, x, target, out)
        work.status = self.engine.submit(work, program, self.identity, self.identity, signature, self.ranks, <int>len(self.ranks), array,
                                         target, budget)
        self.recent[work.sequence % len(self.recent)] = (work.sequence, signature)
        if self.failure is not None and work.state == STATE_FLYING:
            self.engine.break_group(self.identity, self.failure)    # it broke between the two lines above
        return work

    def run(self, x, op, out, what, double spin):
        """As ``reduce``, and poll for ``spin`` seconds for its end. Not where a loop runs: a blocking call there may have to be refused."""
        cdef Work work
        cdef double until
        cdef int found = NEWS_IN_MEMORY
        if running_loop() is not None:
            return None
        work = self.reduce(x, op, out, what, BLOCKING_BUDGET)
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

    def __init__(self, make, group, Engine engine, uint64_t identity, list ranks not None, list recent not None, dict ops not None,
                 begin, note, dict blocked not None, fail):
        self.begin, self.note, self.blocked, self.fail = begin, note, blocked, fail

    def remember(self, uint64_t call, x, out, ready) -> None:
        if ready.program is not None:
            Calls.remember(self, call, x, out, ready)

    cpdef object start(self, uint64_t call, x, out, what, Py_ssize_t budget):
        cdef Known *known = self.find(call, x, out)
        if known == NULL:
            return None
        (_, begins, operator, in_place, signature), about, dtype = <tuple>known.program, <object>known.about, <object>known.dtype
        target = empty(x.shape, dtype) if out is None else out
        work = self.made(what, about, x, target, out)
        self.begin(work, begins, (x if lie_apart(x, target) else in_place, target, operator), signature)
        return work

    def run(self, x, op, out, what, double spin):
        call = self.ops.get(op) if type(op) is str else None
        if call is None or running_loop() is not None:
            return None
        cdef Known *known = self.find(call, x, out)
        if known == NULL:
            return None
        (blocks, _, operator, in_place, _), about, dtype = <tuple>known.program, <object>known.about, <object>known.dtype
        signature = <object>known.signature
        target = empty(x.shape, dtype) if out is None else out
        work = self.made(what, about, x, target, out)
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
