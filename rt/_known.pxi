# All-reduces that were made before: found by what lies at hand, and started in one go.
#
# May live here: the table of a group, and what a call does that is found in it, a short poll for its end included. May not: conversions,
# choices, and checks beyond the question whether arrays are plain; a call that needs more goes through rt/collectives.py, which puts what
# it found out into the table.
#
# Any allocation of an object may run the collector, hence finalizers, hence another thread that changes the table. So what is needed of a
# place is taken before objects are made, and the table is changed in one go.

from asyncio import _get_running_loop as running_loop


cdef tuple NO_ARGUMENTS = ()

cdef enum:
    KNOWN_MOST = 64                         # in a table of twice as many places
    KNOWN_PLACES = 128
    KNOWN_DIMS = 5


cdef struct Known:
    PyObject *op                            # one of Reductions.ops. NULL: a free place. Objects are kept alive by Reductions.kept
    PyObject *dtype
    PyObject *program
    PyObject *signature
    PyObject *about
    bint in_place
    int ndim
    cnp.npy_intp dims[KNOWN_DIMS]


cdef class Reductions:
    """The all-reduces of one group whose plan is made.

    Args:
        make: class of the works; its ``__init__`` is not called.
        group: the group, for its works; identity: its identity, and that of the channel of its collectives.
        ranks: world rank of each of its ranks.
        recent: where the numbers and signatures of its last calls are noted, in turns.
        ops: the operators by name.
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
                  dict ops not None):
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

    cdef Known *place(self, PyObject *op, cnp.ndarray x, bint in_place):
        """The place of a call in the table, free or not."""
        cdef PyObject *dtype = <PyObject *>cnp.PyArray_DESCR(x)
        cdef int ndim = cnp.PyArray_NDIM(x)
        cdef uint64_t mixed = <uintptr_t>op ^ (<uint64_t><uintptr_t>dtype << 1) ^ <uint64_t>in_place
        cdef Known *known
        cdef int i, at
        for i in range(ndim):
            mixed = (mixed ^ <uint64_t>cnp.PyArray_DIM(x, i)) * <uint64_t>0x9E3779B97F4A7C15
        at = <int>((mixed ^ (mixed >> 32)) % KNOWN_PLACES)
        while True:                         # half of the places are free
            known = &self.places[at]
            if known.op == NULL:
                return known
            if known.op == op and known.dtype == dtype and known.in_place == in_place and known.ndim == ndim:
                for i in range(ndim):
                    if known.dims[i] != cnp.PyArray_DIM(x, i):
                        break
                else:
                    return known
            at = (at + 1) % KNOWN_PLACES

    def remember(self, x, op, out, ready) -> None:
        """Keep the plan of a call that was checked: ``out`` is x, or lies apart from it."""
        cdef cnp.ndarray array
        cdef Known *known
        cdef int i
        if type(x) is not cnp.ndarray or cnp.PyArray_NDIM(<cnp.ndarray>x) > KNOWN_DIMS:
            return
        if self.count >= KNOWN_MOST:
            self.forget()
        array = <cnp.ndarray>x
        op, dtype = self.ops[op], array.dtype
        self.kept.append((op, dtype, ready.program, ready.signature, ready.about))
        known = self.place(<PyObject *>op, array, out is x)
        if known.op != NULL or self.count >= KNOWN_MOST or self.failure is not None:
            return
        known.op, known.dtype = <PyObject *>op, <PyObject *>dtype
        known.program, known.signature, known.about = <PyObject *>ready.program, <PyObject *>ready.signature, <PyObject *>ready.about
        known.in_place, known.ndim = out is x, cnp.PyArray_NDIM(array)
        for i in range(known.ndim):
            known.dims[i] = cnp.PyArray_DIM(array, i)
        self.count += 1

    cpdef object start(self, x, op, out, what, Py_ssize_t budget):
        """Start an all-reduce of an array; return its work, or None if the call is not in the table."""
        cdef cnp.ndarray array, target
        cdef Known *known
        cdef Work work
        cdef Program program
        cdef bytes signature
        if type(x) is not cnp.ndarray or type(op) is not str or self.count == 0:
            return None
        array = <cnp.ndarray>x
        if not cnp.PyArray_ISCARRAY_RO(array) or cnp.PyArray_NDIM(array) > KNOWN_DIMS:
            return None
        if out is None:
            if cnp.PyArray_NBYTES(array) >= POOLED_BYTES:    # a matter for those who keep memory
                return None
        elif not lies_like(out, array) or out is not x and not lie_apart(out, array):
            return None
        code = self.ops.get(op)
        if code is None:
            return None
        known = self.place(<PyObject *>code, array, out is x)
        if known.op == NULL:
            return None
        program, signature = <Program>known.program, <bytes>known.signature
        about, dtype = <object>known.about, <object>known.dtype
        work = <Work>(<PyTypeObject *>self.make).tp_new(self.make, <PyObject *>NO_ARGUMENTS, NULL)
        work.group, work.what, work.about = self.group, what, about
        work.borrows_source = True
        if out is None:
            Py_INCREF(dtype)                # taken over by the array
            target = PyArray_NewFromDescr(&PyArray_Type, <PyArray_Descr *><PyObject *>dtype, cnp.PyArray_NDIM(array),
                                          cnp.PyArray_DIMS(array), NULL, NULL, 0, NULL)
        else:
            target = <cnp.ndarray>out
            work.borrows_target = True
        work.result = target
        work.status = self.engine.submit(work, program, self.identity, self.identity, signature, self.ranks, <int>len(self.ranks), array,
                                         target, budget)
        self.recent[work.sequence % len(self.recent)] = (work.sequence, signature)
        if self.failure is not None and work.state == STATE_FLYING:
            self.engine.break_group(self.identity, self.failure)    # it broke between the two lines above
        return work

    def run(self, x, op, out, what, double spin):
        """As ``start``, and poll for ``spin`` seconds for its end. Not where a loop runs: a blocking call there may have to be refused."""
        cdef Work work
        cdef double until
        cdef int found = NEWS_IN_MEMORY
        if running_loop() is not None:
            return None
        work = self.start(x, op, out, what, BLOCKING_BUDGET)
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
