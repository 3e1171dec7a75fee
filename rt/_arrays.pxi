# Questions about NumPy arrays that every call asks.
#
# May live here: answers that are "yes" for what nearly all callers pass, and cost next to nothing; "no" sends the caller to rt/arrays.py,
# which finds out the rest and says what is wrong. May not: anything about links or works.


cpdef bint lies_like(array, like):
    """Whether ``array`` is a plain array of the shape and dtype of ``like`` to which results can be written where it lies."""
    cdef cnp.ndarray a, b
    cdef int i
    if type(array) is not cnp.ndarray or type(like) is not cnp.ndarray:
        return False
    a, b = array, like
    if cnp.PyArray_DESCR(a) != cnp.PyArray_DESCR(b) or not cnp.PyArray_ISCARRAY(a) or cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cpdef bint lie_apart(a, b):
    """Whether two plain, C-contiguous arrays share no memory."""
    cdef char *start_a
    cdef char *start_b
    if type(a) is not cnp.ndarray or type(b) is not cnp.ndarray:
        return False
    if not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>a) or not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray>b):
        return False
    start_a, start_b = cnp.PyArray_BYTES(<cnp.ndarray>a), cnp.PyArray_BYTES(<cnp.ndarray>b)
    return start_a + cnp.PyArray_NBYTES(<cnp.ndarray>a) <= start_b or start_b + cnp.PyArray_NBYTES(<cnp.ndarray>b) <= start_a
