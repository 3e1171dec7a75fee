/* The glue that lets test_kernels.py call the static functions of _kernels.h, each instruction set by itself.
 *
 * May live here: exported wrappers without logic of their own. May not: expectations (test_kernels.py).
 */
#include "_kernels.h"

int check_isa(void) { return rt_isa(); }
size_t check_itemsize(int dtype) { return rt_itemsize[dtype]; }

/* What the extension gets. */
void *check_reduce_kernel(int dtype, int op) { return (void *)rt_reduce_kernel(dtype, op); }
void *check_mixed_kernel(int half_dtype, int op) { return (void *)rt_mixed_kernel(half_dtype, op); }
void *check_convert_kernel(int dst_dtype, int src_dtype) { return (void *)rt_convert_kernel(dst_dtype, src_dtype); }
void *check_scale_kernel(int dtype) { return (void *)rt_scale_kernel(dtype); }

/* The same, for one instruction set. */
void *check_reduce(int isa, int dtype, int op) { return (void *)rt_reduce_table[isa][dtype][op]; }
void *check_mixed(int isa, int half_dtype, int op) { return (void *)rt_mixed_table[isa][half_dtype - RT_FLOAT16][op]; }
void *check_widen(int isa, int half_dtype) { return (void *)rt_convert_table[isa][half_dtype - RT_FLOAT16][0]; }
void *check_narrow(int isa, int half_dtype) { return (void *)rt_convert_table[isa][half_dtype - RT_FLOAT16][1]; }
void *check_scale(int isa, int dtype) { return (void *)rt_scale_table[isa][dtype]; }

/* Convert as in a process where some library has set flush-to-zero and denormals-are-zero. */
void check_convert_flushed(rt_convert_fn convert, void *dst, const void *src, size_t count) {
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040);
    convert(dst, src, count);
    __builtin_ia32_ldmxcsr(before);
#else
    convert(dst, src, count);
#endif
}
