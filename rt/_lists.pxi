# Lists of arrays that travel as one.
#
# May live here: what is done for every array of a list, of which there may be hundreds in a call: telling lists apart, joining, cutting.
# May not: which arrays are joined, and what is refused (rt/fused.py).

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
    cdef Py_ssize_t left = cnp.PyArray_SIZE(joined), items, k
    cdef PyArray_Descr *descr = <PyArray_Descr *><PyObject *>cnp.PyArray_DESCR(joined)
    cdef cnp.npy_intp dims[64]  # numpy.ndarray has no more
    cdef tuple shape
    cdef cnp.ndarray view
    cdef int i
    for k in range(len(members)):
        shape = shapes[k]
        items = 1
        for i in range(len(shape)):
            dims[i] = shape[i]
            items *= dims[i]
        if items > left:
            raise ValueError(f"an array of {items} items where {left} are left")
        Py_INCREF(<object><PyObject *>descr)  # taken over by the view
        view = PyArray_NewFromDescr(&PyArray_Type, descr, <int>len(shape), dims, NULL, at, NPY_ARRAY_CARRAY, NULL)
        cnp.set_array_base(view, joined)
        pieces[members[k]] = view
        at += items * cnp.PyArray_ITEMSIZE(joined)
        left -= items
