# Lists of arrays that travel as one.
#
# May live here: what is done for every array of a list, of which there may be hundreds in a call: telling lists apart, joining, cutting,
# copying back, finding what overlaps. May not: which arrays are joined, and what is refused (rt/fused.py).

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArray_Descr:
        pass
    object PyArray_NewFromDescr(PyTypeObject *subtype, PyArray_Descr *descr, int nd, const cnp.npy_intp *dims, const cnp.npy_intp *strides,
                                void *data, int flags, PyObject *like)
    PyTypeObject PyArray_Type
    int NPY_ARRAY_CARRAY


def forms_key(list arrays not None) -> bytes | None:
    """Return dtype and shape of every array as bytes, equal for lists of the same form; None if one is not a plain array.

    Dtypes are told apart by their address: who keeps the key must keep the dtypes alive.
    """
    cdef Py_ssize_t words = 0
    cdef int i
    cdef cnp.ndarray array
    for each in arrays:
        if type(each) is not cnp.ndarray:
            return None
        words += 2 + cnp.PyArray_NDIM(<cnp.ndarray>each)
    cdef bytes key = PyBytes_FromStringAndSize(NULL, words * sizeof(int64_t))
    cdef int64_t *at = <int64_t *>PyBytes_AS_STRING(key)
    for each in arrays:
        array = <cnp.ndarray>each
        at[0] = <int64_t><uintptr_t>cnp.PyArray_DESCR(array)
        at[1] = cnp.PyArray_NDIM(array)
        at += 2
        for i in range(cnp.PyArray_NDIM(array)):
            at[i] = cnp.PyArray_DIM(array, i)
        at += cnp.PyArray_NDIM(array)
    return key


def join(list arrays not None, list members not None, cnp.ndarray joined not None) -> bool:
    """Copy the ``members`` of a list one behind the other into ``joined``; False if one is not of its dtype or lies scattered."""
    cdef char *at = cnp.PyArray_BYTES(joined)
    cdef char *end = at + cnp.PyArray_NBYTES(joined)
    cdef cnp.ndarray array
    for index in members:
        array = arrays[index]
        if cnp.PyArray_DESCR(array) != cnp.PyArray_DESCR(joined) or not cnp.PyArray_IS_C_CONTIGUOUS(array):
            return False
        if cnp.PyArray_NBYTES(array) > end - at:
            raise ValueError(f"an array of {cnp.PyArray_NBYTES(array)} B where {end - at} B are left")
        memcpy(at, cnp.PyArray_BYTES(array), cnp.PyArray_NBYTES(array))
        at += cnp.PyArray_NBYTES(array)
    return True


def cut(cnp.ndarray joined not None, list members not None, list shapes not None, list pieces not None) -> None:
    """Put views of ``joined``, of one shape after the other, into ``pieces`` at the places that ``members`` name."""
    cdef char *at = cnp.PyArray_BYTES(joined)
    cdef Py_ssize_t left = cnp.PyArray_SIZE(joined), items, k, place
    cdef PyArray_Descr *descr = <PyArray_Descr *><PyObject *>cnp.PyArray_DESCR(joined)
    cdef cnp.npy_intp dims[64]  # numpy.ndarray has no more
    cdef tuple shape
    cdef cnp.ndarray view
    cdef int i
    for k in range(len(members)):
        shape, place = shapes[k], members[k]
        items = 1
        for i in range(len(shape)):
            dims[i] = shape[i]
            items *= dims[i]
        if items > left:
            raise ValueError(f"an array of {items} items where {left} are left")
        Py_INCREF(<object><PyObject *>descr)  # taken over by the view
        view = PyArray_NewFromDescr(&PyArray_Type, descr, <int>len(shape), dims, NULL, at, NPY_ARRAY_CARRAY, NULL)
        cnp.set_array_base(view, joined)
        pieces[place] = view
        at += items * cnp.PyArray_ITEMSIZE(joined)
        left -= items


def spread(cnp.ndarray joined not None, list members not None, list outs not None) -> None:
    """Copy ``joined`` to the arrays of ``outs`` that ``members`` name, one behind the other; the opposite of ``join``."""
    cdef char *at = cnp.PyArray_BYTES(joined)
    cdef char *end = at + cnp.PyArray_NBYTES(joined)
    cdef Py_ssize_t place
    cdef cnp.ndarray out
    for place in members:
        out = outs[place] if place < len(outs) else None
        if out is None or not cnp.PyArray_ISCARRAY(out) or cnp.PyArray_NBYTES(out) > end - at:  # another thread has been at it
            raise ValueError(f"item {place}: out is not what it was when the call began")
        memcpy(cnp.PyArray_BYTES(out), at, cnp.PyArray_NBYTES(out))
        at += cnp.PyArray_NBYTES(out)


def all_lie_like(list arrays not None, list likes not None) -> bool:
    """Whether ``lies_like`` says yes of every array and the one at its place; the lists are of one length."""
    cdef Py_ssize_t i
    for i in range(len(arrays)):
        if not lies_like(arrays[i], likes[i]):
            return False
    return True


cdef struct Span:
    char *begin
    char *end
    Py_ssize_t place
    bint written


cdef Span span_of(cnp.ndarray array, Py_ssize_t place, bint written) noexcept:
    """From the first byte of an array to behind its last."""
    cdef Span span
    cdef cnp.npy_intp reach
    cdef int i
    span.begin = span.end = cnp.PyArray_BYTES(array)
    span.place, span.written = place, written
    if cnp.PyArray_SIZE(array) == 0:
        return span
    for i in range(cnp.PyArray_NDIM(array)):
        reach = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        if reach < 0:
            span.begin += reach
        else:
            span.end += reach
    span.end += cnp.PyArray_ITEMSIZE(array)
    return span


cdef int in_memory(const void *left, const void *right) noexcept nogil:
    cdef const Span *a = <const Span *>left
    cdef const Span *b = <const Span *>right
    if a.begin != b.begin:
        return -1 if a.begin < b.begin else 1
    if a.end != b.end:
        return -1 if a.end < b.end else 1
    return (a.place > b.place) - (a.place < b.place)


def overlap(list arrays not None, list outs not None) -> tuple[int, int] | None:
    """Find an array of ``outs`` that shares memory with another of them, or with one of ``arrays`` but for the very same memory at its
    own place. Returns the places of the out and of the other; None if all are well."""
    cdef Py_ssize_t count = 0, i
    cdef Span own, result
    cdef Span *spans
    cdef Span *span
    cdef Span *other
    cdef Span *furthest[2]                      # of those so far that are read and that are written: what ends last
    cdef bint itself
    cdef int kind
    if len(arrays) != len(outs):
        raise ValueError(f"{len(arrays)} arrays and {len(outs)} outs")
    spans = <Span *>malloc((2 * len(outs) + 1) * sizeof(Span))
    if spans == NULL:
        raise MemoryError()
    try:
        for i in range(len(outs)):
            result, own = span_of(<cnp.ndarray?>outs[i], i, True), span_of(<cnp.ndarray?>arrays[i], i, False)
            itself = own.begin == result.begin and own.end == result.end and cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>arrays[i])
            if result.begin < result.end:
                spans[count] = result
                count += 1
            if own.begin < own.end and not itself:
                spans[count] = own
                count += 1
        qsort(spans, count, sizeof(Span), in_memory)
        furthest[0] = furthest[1] = NULL
        for i in range(count):
            span = &spans[i]
            for kind in range(1, -1 if span.written else 0, -1):  # what is read may overlap what is read
                other = furthest[kind]
                if other != NULL and other.end > span.begin:
                    return (span.place, other.place) if span.written else (other.place, span.place)
            if furthest[span.written] == NULL or furthest[span.written].end < span.end:
                furthest[span.written] = span
        return None
    finally:
        free(spans)
