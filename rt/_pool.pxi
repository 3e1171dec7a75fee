# Memory for results of 1 MiB and more, which comes back when arrays die: fresh pages cost as much as a collective.
#
# May live here: slabs of memory, how NumPy gets and returns them, how much is kept, and a word to whoever gives unused ones back. May
# not: when that happens (rt/pool.py), what results are (rt/arrays.py).
#
# Arrays own this memory as they own any other: NumPy asks the handler below (NEP 49) in place of malloc, and tells it when an array dies,
# in whatever thread and however late that is. So `base` is None, `resize` works, and no object stands between an array and its memory.
#
# Each slab is a mapping of its own, for only that is sure to go back to the system. Slabs are reused by size class, eight to a power of
# two: what an array leaves untouched costs addresses, no memory. A slab describes itself in the page before the memory that it offers.

from cpython.pycapsule cimport PyCapsule_New
from posix.unistd cimport _SC_PAGESIZE, sysconf

import numpy

cdef extern from *:
    """
    #include <sys/mman.h>
    static void rt_want_huge_pages(void *start, size_t nbytes)
    {
    #ifdef MADV_HUGEPAGE
        int ignored = madvise(start, nbytes, MADV_HUGEPAGE);   /* a wish: where there are none, small pages serve */
        (void)ignored;
    #endif
    }
    """
    void rt_want_huge_pages(void *start, size_t nbytes) noexcept nogil

cdef enum:
    POOLED_BYTES = 1 << 20           # results of so many bytes come from here; malloc keeps memory for smaller ones
    KEPT_BYTES = 64 << 20            # that may lie idle whatever was in use: as much as glibc's malloc may keep of what it was given back
    HUGE_BYTES = 2 << 20             # of a huge page
    HUGE_FROM = 4 << 20              # slabs of so many bytes ask for them, as NumPy's own arrays do
    LEAST_BYTES = 1 << 17            # of a slab; only an array that was resized can need so little
    CLASSES = 8 * 64
    SLAB_BYTES = 128                 # from a Slab to its memory: more than it takes, and what follows stays aligned

cdef struct Slab:                    # lies just before its memory
    char *start                      # of the mapping
    size_t mapped
    size_t room                      # bytes of its memory: its size class
    int number                       # of the class
    uint64_t turn                    # of the pool when it was given back
    uint64_t order                   # of all that were given back, the lowest has been idle longest
    Slab *newer                      # idle ones of the class
    Slab *older

cdef struct Pool:
    Slab *newest[CLASSES]
    Slab *oldest[CLASSES]
    size_t live                      # bytes that arrays have
    size_t idle                      # bytes that wait for one
    size_t peak                      # the most that were live at once since the turn before
    uint64_t turn
    uint64_t order
    uint64_t reused                  # slabs handed out again
    bint watched                     # somebody gives back what lies unused; else nothing is kept
    bint told                        # and knows that something is kept
    int wake[2]

cdef Pool pool
cdef pthread_mutex_t pool_mutex      # arrays die where they like
pthread_mutex_init(&pool_mutex, NULL)


cdef size_t class_of(size_t nbytes, int *number) noexcept nogil:
    """Round a size up to that of its class."""
    cdef size_t step = LEAST_BYTES // 16
    nbytes = nbytes if nbytes > LEAST_BYTES else LEAST_BYTES
    number[0] = -8
    while nbytes > 16 * step:
        step *= 2
        number[0] += 8
    number[0] += <int>((nbytes + step - 1) // step)
    return (nbytes + step - 1) // step * step


cdef Slab *slab_new(size_t room, int number) noexcept nogil:
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef size_t spare = HUGE_BYTES if room >= HUGE_FROM else 0
    cdef size_t mapped = page + room + spare
    cdef char *start = <char *>mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef char *memory = start + page
    cdef Slab *slab
    if start == MAP_FAILED:
        return NULL
    if spare:                        # a huge page begins at a multiple of its size: what lies around is not needed
        memory += (HUGE_BYTES - <uintptr_t>memory % HUGE_BYTES) % HUGE_BYTES
        if memory - page > start:
            munmap(start, memory - page - start)
        if start + mapped > memory + room:
            munmap(memory + room, start + mapped - (memory + room))
        start, mapped = memory - page, page + room
        rt_want_huge_pages(memory, room)
    slab = <Slab *>(memory - SLAB_BYTES)
    slab.start, slab.mapped, slab.room, slab.number = start, mapped, room, number
    return slab


cdef void unmap_all(Slab *slab) noexcept nogil:
    """Give slabs that were taken out of the pool, chained by `older`, back to the system."""
    cdef Slab *following
    while slab != NULL:
        following = slab.older
        munmap(slab.start, slab.mapped)
        slab = following


cdef void pool_remove(Slab *slab) noexcept nogil:
    """Take an idle slab out of its class. With the lock."""
    if slab.newer != NULL:
        slab.newer.older = slab.older
    else:
        pool.newest[slab.number] = slab.older
    if slab.older != NULL:
        slab.older.newer = slab.newer
    else:
        pool.oldest[slab.number] = slab.newer
    pool.idle -= slab.room


cdef Slab *pool_shed(size_t bound, uint64_t before) noexcept nogil:
    """Take out what was given back before that turn, and the longest idle until at most `bound` bytes are. With the lock."""
    cdef Slab *shed = NULL
    cdef Slab *slab
    cdef Slab *oldest
    cdef int i
    while True:
        oldest = NULL
        for i in range(CLASSES):
            slab = pool.oldest[i]
            if slab != NULL and (oldest == NULL or slab.order < oldest.order):
                oldest = slab
        if oldest == NULL or (pool.idle <= bound and oldest.turn >= before):
            return shed
        pool_remove(oldest)
        oldest.older = shed
        shed = oldest


cdef void *pool_take(size_t nbytes) noexcept nogil:
    """Memory of at least so many bytes; NULL if there is none."""
    cdef int number
    cdef size_t room = class_of(nbytes, &number)
    cdef Slab *shed = NULL
    cdef Slab *slab
    pthread_mutex_lock(&pool_mutex)
    slab = pool.newest[number]
    if slab != NULL:
        pool_remove(slab)
        pool.reused += 1
    pool.live += room
    pool.peak = pool.live if pool.live > pool.peak else pool.peak
    pthread_mutex_unlock(&pool_mutex)
    if slab == NULL:
        slab = slab_new(room, number)
    if slab == NULL:                 # what is idle may be what is missing
        pthread_mutex_lock(&pool_mutex)
        shed = pool_shed(0, 0)
        pthread_mutex_unlock(&pool_mutex)
        unmap_all(shed)
        slab = slab_new(room, number)
    if slab == NULL:
        pthread_mutex_lock(&pool_mutex)
        pool.live -= room
        pthread_mutex_unlock(&pool_mutex)
        return NULL
    return <char *>slab + SLAB_BYTES


cdef void pool_give(void *memory) noexcept nogil:
    """Take memory back.

    So much is kept at most as was in use at once, lately, and 64 MiB: a loop that needs the same again finds it, and nobody pays for more
    than twice what he used. What is kept goes when it lay unused for a while (`pool_turn`).
    """
    cdef Slab *slab = <Slab *>(<char *>memory - SLAB_BYTES)
    cdef Slab *shed = slab
    pthread_mutex_lock(&pool_mutex)
    pool.live -= slab.room
    slab.older = slab.newer = NULL
    if pool.watched:
        slab.turn, slab.order = pool.turn, pool.order
        pool.order += 1
        slab.older = pool.newest[slab.number]
        if slab.older != NULL:
            slab.older.newer = slab
        else:
            pool.oldest[slab.number] = slab
        pool.newest[slab.number] = slab
        pool.idle += slab.room
        shed = pool_shed(pool.peak + KEPT_BYTES, 0) if pool.idle > pool.peak + KEPT_BYTES else NULL
        if not pool.told:
            pool.told = True
            rt_wake_signal(pool.wake[1])
    pthread_mutex_unlock(&pool_mutex)
    unmap_all(shed)


# -- what NumPy calls ----------------------------------------------------------------------------------------------------------------------

cdef void *handler_malloc(void *context, size_t nbytes) noexcept nogil:
    return pool_take(nbytes)


cdef void *handler_calloc(void *context, size_t count, size_t nbytes) noexcept nogil:
    cdef void *memory = pool_take(count * nbytes)
    if memory != NULL:
        memset(memory, 0, count * nbytes)
    return memory


cdef void *handler_realloc(void *context, void *memory, size_t nbytes) noexcept nogil:
    cdef size_t room
    cdef void *other
    if memory == NULL:
        return pool_take(nbytes)
    room = (<Slab *>(<char *>memory - SLAB_BYTES)).room
    if room // 2 <= nbytes <= room:
        return memory
    other = pool_take(nbytes)
    if other != NULL:
        memcpy(other, memory, room if room < nbytes else nbytes)
        pool_give(memory)
    return other


cdef void handler_free(void *context, void *memory, size_t nbytes) noexcept nogil:
    if memory != NULL:
        pool_give(memory)


cdef cnp.PyDataMem_Handler handler
memcpy(handler.name, b"rt", 3)
handler.version = 1
handler.allocator.malloc = handler_malloc
handler.allocator.calloc = handler_calloc
handler.allocator.realloc = handler_realloc
handler.allocator.free = handler_free
cdef object handler_capsule = PyCapsule_New(&handler, "mem_handler", NULL)
cdef object numpy_empty = numpy.empty


def empty(tuple shape not None, cnp.dtype dtype not None):
    """As ``numpy.empty``, for results: from 1 MiB up in memory of the pool, while there is somebody to give it back in the end."""
    cdef double nbytes = dtype.itemsize
    for side in shape:
        nbytes *= side
    if nbytes < POOLED_BYTES or not pool.watched:
        return numpy_empty(shape, dtype)
    before = cnp.PyDataMem_SetHandler(handler_capsule)
    try:
        return numpy_empty(shape, dtype)
    finally:
        cnp.PyDataMem_SetHandler(before)


# -- what gives memory back to the system ----------------------------------------------------------------------------------------------

def pool_open():
    """Begin to keep memory; return a descriptor that becomes readable when some is kept, None if somebody else has been told to watch.

    Who watches calls ``pool_turn`` now and then from there on, until nothing is left, and ``pool_close`` in the end.
    """
    cdef int wake[2]
    if pool.watched:
        return None
    if rt_wake_create(wake) < 0:
        raise OSError(errno, os.strerror(errno))
    pthread_mutex_lock(&pool_mutex)
    pool.wake[0], pool.wake[1] = wake[0], wake[1]
    pool.watched, pool.told = True, False
    pool.peak = pool.live
    pthread_mutex_unlock(&pool_mutex)
    return wake[0]


def pool_turn():
    """Give back what was idle at the last turn and is so still. Return the bytes that went, and those that are kept.

    When none are, the next array that dies makes the descriptor readable.
    """
    cdef size_t before, left
    cdef Slab *shed
    with nogil:
        pthread_mutex_lock(&pool_mutex)
        before = pool.idle
        pool.peak = pool.live
        pool.turn += 1
        shed = pool_shed(<size_t>-1, pool.turn - 1)
        left = pool.idle
        pool.told = left != 0
        pthread_mutex_unlock(&pool_mutex)
        unmap_all(shed)
    return before - left, left


def pool_close():
    """Give back everything that is idle, and keep nothing from here on."""
    cdef Slab *shed
    with nogil:
        pthread_mutex_lock(&pool_mutex)
        shed = pool_shed(0, 0)
        pool_end_watch()
        pthread_mutex_unlock(&pool_mutex)
        unmap_all(shed)


cdef void pool_end_watch() noexcept nogil:
    if pool.watched:
        close(pool.wake[0])
        if pool.wake[1] != pool.wake[0]:
            close(pool.wake[1])
    pool.watched = False


def pool_abandon_in_child():
    """After fork, in the child: nobody watches here. What is idle goes, so that the parent need not copy what it writes to."""
    cdef Slab *shed = NULL
    if pthread_mutex_trylock(&pool_mutex) == 0:     # else another thread was just changing the lists: its slabs stay where they are
        shed = pool_shed(0, 0)
    else:
        memset(pool.newest, 0, sizeof(pool.newest))
        memset(pool.oldest, 0, sizeof(pool.oldest))
        pool.idle = 0
    pool_end_watch()
    pthread_mutex_init(&pool_mutex, NULL)
    unmap_all(shed)


def pool_statistics():
    """Bytes that arrays have, bytes kept for others, and how often memory was used again."""
    return {"live": pool.live, "idle": pool.idle, "reused": pool.reused}
