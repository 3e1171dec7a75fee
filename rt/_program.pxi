# A schedule, checked and compiled into flat arrays.
#
# May live here: the translation of rt.schedule.Schedule (data) into a Plan: byte offsets, kernels, streams per link, and the hazards
# between steps. May not: anything that moves bytes.
#
# Hazards. The steps are a sequential program; the engine runs them concurrently. For each step and each earlier step that touches the
# same items of the same buffer, where at least one of the two writes, a Dep says how far the later one may go: by item, so that data are
# forwarded while they arrive (cut-through). One watermark serves all cases: `done` of a receiving or local step says what was written
# *and* what was read, `done` of a sending step says what the link has let go of.


cdef struct Region:
    int buffer
    Py_ssize_t start         # items
    Py_ssize_t stop


cdef int kernel_error(str what) except -1:
    raise ValueError(f"schedule: {what}")


cdef class Program:
    """A schedule compiled for one dtype and operator, one aliasing of input and output, and the links of one group.

    Args:
        schedule: a ``rt.schedule.Schedule``.
        dtype: code of the arrays' dtype.
        op: code of the operator (any where nothing is reduced).
        links: for every rank of the group, how many links lead to it (0 for oneself).
        alias: None out of place; else ``(input_offset, output_offset)`` in items: where the two buffers start in their shared memory.
    """
    cdef Plan plan
    cdef readonly str name
    cdef readonly tuple peers

    def __cinit__(self, schedule, int dtype, int op, links, alias=None):
        memset(&self.plan, 0, sizeof(Plan))
        self.name = schedule.name
        steps = [step for step in schedule.steps if not is_noop(step, alias)]
        if len(steps) > STEPS_MOST:
            kernel_error(f"{len(steps)} steps")
        cdef int sizes[3]
        sizes[0] = <int>rt_itemsize[dtype]
        sizes[1] = 4
        temps = schedule.temps
        self.plan.buffer_count = 2 + len(temps)
        self.plan.temp_bytes = <Py_ssize_t *>calloc(self.plan.buffer_count, sizeof(Py_ssize_t))
        wide = [False, False]
        for index, temp in enumerate(temps):
            wide.append(temp.wide)
            # Rounded up so that every buffer starts on its own cache line.
            self.plan.temp_bytes[2 + index] = (temp.count * sizes[1 if temp.wide else 0] + 63) // 64 * 64
            self.plan.temp_total += self.plan.temp_bytes[2 + index]
        self._streams(steps, links)
        self._steps(steps, wide, sizes, dtype, op)
        touched = (self.plan.touched[0], self.plan.touched[1])
        self.plan.footprint = sum(touched) if alias is None else max(touched)
        self._hazards(steps, alias)

    def __dealloc__(self):
        free(self.plan.steps)
        free(self.plan.deps)
        free(self.plan.streams)
        free(self.plan.slots)
        free(self.plan.stream_steps)
        free(self.plan.local_steps)
        free(self.plan.temp_bytes)

    cdef int _streams(self, list steps, links) except -1:
        """Sort the communicating steps by (peer, lane, direction); each such stream lives on one link."""
        cdef Plan *plan = &self.plan
        by_stream = {}
        local = []
        for index, step in enumerate(steps):
            if step.kind in (SEND, RECV, RECV_REDUCE):
                if not 0 <= step.peer < len(links) or links[step.peer] < 1:
                    kernel_error(f"step {index} needs a link to rank {step.peer}, and there is none")
                if not 0 <= step.lane <= LANES_MOST:
                    kernel_error(f"step {index} is on lane {step.lane}")
                by_stream.setdefault((step.peer, step.lane, step.kind == SEND), []).append(index)
            else:
                local.append(index)
        slots = {}
        for peer, lane, _ in by_stream:
            slots.setdefault((peer, lane % links[peer]), len(slots))
        self.peers = tuple(sorted({peer for peer, _ in slots}))
        plan.stream_count = len(by_stream)
        plan.slot_count = len(slots)
        plan.local_count = len(local)
        plan.step_count = len(steps)
        plan.streams = <Stream *>calloc(len(by_stream) + 1, sizeof(Stream))
        plan.slots = <Slot *>calloc(len(slots) + 1, sizeof(Slot))
        plan.stream_steps = <int *>calloc(len(steps) + 1, sizeof(int))
        plan.local_steps = <int *>calloc(len(local) + 1, sizeof(int))
        plan.steps = <Step *>calloc(len(steps) + 1, sizeof(Step))
        for (peer, link), index in slots.items():
            plan.slots[index].peer = peer
            plan.slots[index].link = link
        for index, step in enumerate(local):
            plan.local_steps[index] = step
        cdef int at = 0
        for index, ((peer, lane, sending), members) in enumerate(by_stream.items()):
            plan.streams[index].slot = slots[peer, lane % links[peer]]
            plan.streams[index].lane = lane
            plan.streams[index].sending = sending
            plan.streams[index].first = at
            plan.streams[index].count = len(members)
            for member in members:
                plan.stream_steps[at] = member
                plan.steps[<int>member].stream = index
                at += 1
        return 0

    cdef int _steps(self, list steps, list wide, int *sizes, int dtype, int op) except -1:
        cdef Step *c
        cdef int index
        for index, step in enumerate(steps):
            c = &self.plan.steps[index]
            c.kind = step.kind
            c.src, c.src2, c.dst = step.src, step.src2, step.dst
            c.count = step.count
            src_wide = step.src >= 0 and wide[step.src]
            dst_wide = step.dst >= 0 and wide[step.dst]
            c.src_size, c.dst_size = sizes[src_wide], sizes[dst_wide]
            c.src_off, c.dst_off = step.src_off * c.src_size, step.dst_off * c.dst_size
            if step.kind == SEND:
                c.wire = c.src_size
            elif step.kind == RECV:
                c.wire = c.dst_size
            elif step.kind == RECV_REDUCE:
                c.wire = c.src2_size = sizes[1 if step.wire_wide else 0]
                c.swap = step.wire_left
                pick_reduction(c, dtype, op, src_wide, step.wire_wide, dst_wide)
            elif step.kind == REDUCE:
                src2_wide = wide[step.src2]
                c.src2_size = sizes[src2_wide]
                c.src2_off = step.src2_off * c.src2_size
                pick_reduction(c, dtype, op, src_wide, src2_wide, dst_wide)
            elif step.kind == SCALE:
                c.kernel = <void *>rt_scale_kernel(FLOAT32_CODE if src_wide else dtype)
                if c.kernel == NULL or src_wide != dst_wide:
                    kernel_error(f"SCALE is not defined on dtype {dtype}")
            elif step.kind == CONVERT:
                c.kernel = <void *>rt_convert_kernel(FLOAT32_CODE if dst_wide else dtype, FLOAT32_CODE if src_wide else dtype)
                if c.kernel == NULL:
                    kernel_error(f"CONVERT is not defined on dtype {dtype}")
            self._touch(step.src, c.src_off, step.count * c.src_size)
            self._touch(step.src2, c.src2_off, step.count * c.src2_size)
            self._touch(step.dst, c.dst_off, step.count * c.dst_size)
        return 0

    cdef int _touch(self, int buffer, Py_ssize_t start, Py_ssize_t nbytes) except -1:
        """Check what a step touches against its buffer; those of the caller are checked when it submits."""
        if start < 0 or nbytes < 0 or buffer >= self.plan.buffer_count:
            kernel_error(f"a step touches bytes {start} to {start + nbytes} of buffer {buffer}")
        if buffer >= 2 and start + nbytes > self.plan.temp_bytes[buffer]:
            kernel_error(f"a step touches byte {start + nbytes} of scratch buffer {buffer}")
        if 0 <= buffer < 2 and start + nbytes > self.plan.touched[buffer]:
            self.plan.touched[buffer] = start + nbytes
        return 0

    cdef int _hazards(self, list steps, alias) except -1:
        cdef Plan *plan = &self.plan
        cdef Py_ssize_t room = 64, count = 0, i, j, k, m, n, delta
        cdef int n_steps = plan.step_count
        cdef Region *reads = <Region *>malloc((2 * n_steps + 1) * sizeof(Region))
        cdef Region *writes = <Region *>malloc((n_steps + 1) * sizeof(Region))
        cdef Py_ssize_t offsets[2]
        cdef Dep *grown
        cdef Region *mine
        cdef Region *theirs
        plan.deps = <Dep *>malloc(room * sizeof(Dep))
        if reads == NULL or writes == NULL or plan.deps == NULL:
            free(reads)
            free(writes)
            raise MemoryError
        offsets[0], offsets[1] = alias if alias is not None else (-1, -1)
        for index, step in enumerate(steps):
            place(&reads[2 * index], step.src, step.src_off, step.count, offsets)
            place(&reads[2 * index + 1], step.src2, step.src2_off, step.count, offsets)
            place(&writes[index], step.dst, step.dst_off, step.count, offsets)
        for i in range(n_steps):
            plan.steps[i].dep_first = <int>count
            for j in range(i):
                # (my region, its region): read after write, write after read, write after write.
                for k in range(5):
                    if k < 2:
                        mine, theirs = &reads[2 * i + k], &writes[j]
                    elif k < 4:
                        mine, theirs = &writes[i], &reads[2 * j + k - 2]
                    else:
                        mine, theirs = &writes[i], &writes[j]
                    if mine.buffer < 0 or mine.buffer != theirs.buffer or mine.start >= theirs.stop or theirs.start >= mine.stop:
                        continue
                    if k < 2:
                        plan.steps[j].read_later = True
                    delta = theirs.start - mine.start
                    # One bound per earlier step is enough: the tightest.
                    if count > plan.steps[i].dep_first and plan.deps[count - 1].step == j:
                        if delta < plan.deps[count - 1].delta:
                            plan.deps[count - 1].delta = delta
                        continue
                    if count == room:
                        grown = <Dep *>realloc(plan.deps, 2 * room * sizeof(Dep))
                        if grown == NULL:
                            free(reads)
                            free(writes)
                            raise MemoryError
                        plan.deps = grown
                        room *= 2
                    plan.deps[count].step = <int>j
                    plan.deps[count].delta = delta
                    count += 1
            # A step on the same stream as an earlier one follows it anyway, and what that one waits for need not be asked twice;
            # but dropping such entries gains little, so the list stays complete and simple.
            plan.steps[i].dep_count = <int>count - plan.steps[i].dep_first
        free(reads)
        free(writes)
        return 0

    @property
    def step_count(self):
        return self.plan.step_count

    @property
    def dependencies(self):
        """``(step, earlier step, delta)`` for every hazard; for tests and ``repr``."""
        return [
            (i, self.plan.deps[d].step, self.plan.deps[d].delta)
            for i in range(self.plan.step_count)
            for d in range(self.plan.steps[i].dep_first, self.plan.steps[i].dep_first + self.plan.steps[i].dep_count)
        ]

    @property
    def last_writes(self):
        """The steps whose results no later step reads; for tests."""
        return [i for i in range(self.plan.step_count) if self.plan.steps[i].dst >= 0 and not self.plan.steps[i].read_later]


cdef enum:
    FLOAT32_CODE = 11
    LANES_MOST = 255         # a lane is one byte of the header


cdef is_noop(step, alias):
    """A COPY onto itself (in place) is nothing to do."""
    if step.kind != COPY or alias is None or step.src > 1 or step.dst > 1:
        return step.count == 0
    return step.count == 0 or alias[step.src] + step.src_off == alias[step.dst] + step.dst_off


cdef void place(Region *region, int buffer, Py_ssize_t start, Py_ssize_t count, const Py_ssize_t *offsets) noexcept:
    """Name the items a step touches; INPUT and OUTPUT are one buffer where they share memory (offsets are not negative)."""
    if offsets[0] >= 0 and 0 <= buffer <= 1:
        start += offsets[buffer]
        buffer = 0
    region.buffer = buffer
    region.start = start
    region.stop = start + count


cdef int pick_reduction(Step *c, int dtype, int op, bint a_wide, bint b_wide, bint dst_wide) except -1:
    """Choose the kernel for dst = a op b, where a or b may be half and the rest float32."""
    if a_wide == b_wide:
        if a_wide != dst_wide:
            kernel_error("a reduction must store what it computes")
        c.style = BY_REDUCE
        c.kernel = <void *>rt_reduce_kernel(FLOAT32_CODE if a_wide else dtype, op)
    else:
        if not dst_wide:
            kernel_error("a mixed reduction stores float32")
        c.style = BY_MIXED
        c.swap = b_wide
        c.kernel = <void *>rt_mixed_kernel(dtype, op)
    if c.kernel == NULL:
        kernel_error(f"operator {op} is not defined on dtype {dtype}")
    return 0
