/* The arithmetic of rt: reduce, mixed-precision reduce, convert and scale loops for every dtype and operator.
 *
 * May live here: loops over memory, and the choice of the widest instructions this CPU has. May not: Python, links, schedules.
 * Included once, by the extension; everything is static. Compile with -O3 -ffp-contract=off (a fused complex product would make
 * a*b differ from b*a), without -ffast-math, and without -march=native (the choice is made at run time).
 *
 * Wide vectors. Each kernel is compiled per instruction set by RT_EACH_ISA, and the getters at the end hand out the best pointer.
 * That is what target_clones would do, without its two gaps: GCC resolves arch=haswell by CPU *model* (never true on AMD), and it
 * needs ifunc (absent on macOS and musl). Here sets can be combined (AVX2 with F16C), and tests reach each one on a single machine.
 * FMA is left out; AVX-512 has it built in, so complex products stay with AVX2: GCC 12 fuses them there whatever -ffp-contract says.
 * RT_NO_CLONES leaves only the plain loops, as does any machine but x86-64.
 *
 * Aliasing. dst may equal an input exactly and overlaps nothing otherwise. Then no iteration touches what another one writes, which
 * is just what `ivdep` says; `restrict` would be a lie, and without either the compiler's overlap check would send in-place calls,
 * the common ones, to the scalar loop. All loads go through may_alias types of alignment 1: wire scratch holds any dtype anywhere.
 *
 * Values. Integers wrap. Floating min/max give the canonical quiet NaN if either side is NaN, +0 above -0, in both operand orders, so
 * they commute bitwise. Sum and prod are plain IEEE: they commute too, except for sign and payload of a NaN result, which
 * canonicalising would fix at the price of a compare and a blend per vector. Rounding assumes the default mode (nearest even).
 */
#ifndef RT_KERNELS_H
#define RT_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void (*rt_reduce_fn)(void *dst, const void *left, const void *right, size_t count);
typedef void (*rt_mixed_fn)(float *dst, const float *acc, const void *half, size_t count);
typedef void (*rt_convert_fn)(void *dst, const void *src, size_t count);
typedef void (*rt_scale_fn)(void *dst, const void *src, size_t count, double divisor);

/* The codes of dtypes.py. */
enum { RT_BOOL, RT_INT8, RT_UINT8, RT_INT16, RT_UINT16, RT_INT32, RT_UINT32, RT_INT64, RT_UINT64,
       RT_FLOAT16, RT_BFLOAT16, RT_FLOAT32, RT_FLOAT64, RT_COMPLEX64, RT_COMPLEX128, RT_DTYPES };
enum { RT_SUM, RT_PROD, RT_MIN, RT_MAX, RT_AND, RT_OR, RT_XOR, RT_MEAN, RT_OPS };

static const size_t rt_itemsize[RT_DTYPES] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 8, 16};

#define RT_INLINE static inline __attribute__((always_inline, unused))
#define RT_ITEM __attribute__((may_alias, aligned(1)))

#if defined(__clang__)
#define RT_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define RT_IVDEP _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(RT_NO_CLONES)
#define RT_WIDE 1
#include <cpuid.h>
#include <immintrin.h>
#define RT_AVX2 __attribute__((target("avx2,f16c")))
#define RT_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define RT_EACH_ISA(DEFINE, ...) DEFINE(, _base, __VA_ARGS__) DEFINE(RT_AVX2, _avx2, __VA_ARGS__) DEFINE(RT_AVX512, _avx512, __VA_ARGS__)
#define RT_EACH_UNFUSED(DEFINE, ...) DEFINE(, _base, __VA_ARGS__) DEFINE(RT_AVX2, _avx2, __VA_ARGS__) DEFINE(RT_AVX2, _avx512, __VA_ARGS__)
#define RT_TABLES(TABLE) {TABLE(_base), TABLE(_avx2), TABLE(_avx512)}
enum { RT_ISAS = 3 };
#else
#define RT_WIDE 0
#define RT_EACH_ISA(DEFINE, ...) DEFINE(, _base, __VA_ARGS__)
#define RT_EACH_UNFUSED RT_EACH_ISA
#define RT_TABLES(TABLE) {TABLE(_base)}
enum { RT_ISAS = 1 };
#endif

/* Loops whose wide forms stand apart, in intrinsics: compilers find neither F16C nor a good form of a float's min and max by themselves. */
#define RT_PLAIN(DEFINE, ...) DEFINE(, _base, __VA_ARGS__)

/* ---- items ------------------------------------------------------------------------------------------------------------------- */

typedef uint8_t RT_ITEM rt_u8;
typedef uint16_t RT_ITEM rt_u16;
typedef uint32_t RT_ITEM rt_u32;
typedef uint64_t RT_ITEM rt_u64;
typedef int8_t RT_ITEM rt_i8;
typedef int16_t RT_ITEM rt_i16;
typedef int32_t RT_ITEM rt_i32;
typedef int64_t RT_ITEM rt_i64;
typedef float RT_ITEM rt_f32;
typedef double RT_ITEM rt_f64;

/* min/max: p and q differ in bits only where the operands are zeros of either sign (AND is +0, OR is -0) or one is NaN. */
#define RT_FLOAT_ITEM(F, T, U, QNAN) \
    RT_INLINE U rt_##F##_bits(T x) { U u; memcpy(&u, &x, sizeof u); return u; } \
    RT_INLINE T rt_##F##_from(U u) { T x; memcpy(&x, &u, sizeof x); return x; } \
    RT_INLINE T rt_##F##_add(T a, T b) { return a + b; } \
    RT_INLINE T rt_##F##_mul(T a, T b) { return a * b; } \
    RT_INLINE T rt_##F##_max(T a, T b) { \
        T p = a > b ? a : b, q = b > a ? b : a; \
        U both = rt_##F##_bits(p) & rt_##F##_bits(q); \
        return rt_##F##_from(__builtin_isunordered(a, b) ? QNAN : both); \
    } \
    RT_INLINE T rt_##F##_min(T a, T b) { \
        T p = a < b ? a : b, q = b < a ? b : a; \
        U both = rt_##F##_bits(p) | rt_##F##_bits(q); \
        return rt_##F##_from(__builtin_isunordered(a, b) ? QNAN : both); \
    } \
    RT_LEXICAL(lexmax, F, T, U, QNAN, >, &) RT_LEXICAL(lexmin, F, T, U, QNAN, <, |)
/* Complex order: lexicographic, a + ib against x + iy. Gives p from the left or q from the right, a part of the operand that wins; equal
 * operands (whose zeros may differ in sign) combine like reals. */
#define RT_LEXICAL(NAME, F, T, U, QNAN, BEFORE, COMBINE) \
    RT_INLINE T rt_##F##_##NAME(T a, T b, T x, T y, T p, T q) { \
        int left = (a BEFORE x) | ((a == x) & (b BEFORE y)), right = (x BEFORE a) | ((a == x) & (y BEFORE b)); \
        U both = rt_##F##_bits(left ? p : q) COMBINE rt_##F##_bits(right ? q : p); \
        return rt_##F##_from(__builtin_isunordered(a, b) | __builtin_isunordered(x, y) ? QNAN : both); \
    }
RT_FLOAT_ITEM(f32, float, uint32_t, UINT32_C(0x7fc00000))
RT_FLOAT_ITEM(f64, double, uint64_t, UINT64_C(0x7ff8000000000000))

/* Half types. Masks instead of branches, so that GCC vectorises the loops; no subnormal float32 operands, so that flush-to-zero set by
 * some other library does no harm. Bit for bit what the F16C instructions give, NaN payloads included. */
RT_INLINE uint32_t rt_pick(int yes, uint32_t x, uint32_t y) { return y ^ ((x ^ y) & (0 - (uint32_t)yes)); }

RT_INLINE float rt_f16_load(uint16_t half) {
    uint32_t a = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t tiny = rt_f32_bits((float)(int32_t)a * 0x1p-24f), normal = (a << 13) + (UINT32_C(112) << 23);
    uint32_t special = UINT32_C(0x7f800000) | a << 13 | (uint32_t)((int32_t)a > 0x7c00) << 22; /* << 22 makes a signalling NaN quiet */
    return rt_f32_from(sign | rt_pick((int32_t)a < 0x400, tiny, rt_pick((int32_t)a < 0x7c00, normal, special)));
}

RT_INLINE uint16_t rt_f16_store(float value) {
    uint32_t u = rt_f32_bits(value), a = u & UINT32_C(0x7fffffff), sign = u >> 16 & 0x8000;
    int32_t order = (int32_t)a; /* signed, because SSE2 compares nothing else */
    uint32_t tiny = rt_f32_bits(rt_f32_from(a) + 0.5f) - UINT32_C(0x3f000000); /* the last bit of 0.5 is that of a subnormal f16 */
    uint32_t normal = (a - (UINT32_C(112) << 23) + 0xfff + (a >> 13 & 1)) >> 13;
    uint32_t special = 0x7c00 | ((0x200 | (a >> 13 & 0x3ff)) & (0 - (uint32_t)(order > 0x7f800000)));
    return (uint16_t)(sign | rt_pick(order < 0x38800000, tiny, rt_pick(order < 0x47800000, normal, special)));
}

/* bfloat16 is the upper half of a float32. Loops that both read and write it take a word of two items at a time, so that every lane is
 * 32 bits wide and nothing has to be shuffled together (nearly twice as fast as item by item). Both functions give the rounded number in
 * the upper half and garbage in the lower one. The plain one is also right for a NaN whose lower half is 0, since then nothing carries:
 * those are the NaN that sums and products of bfloat16 give. */
RT_INLINE uint32_t rt_bf16_nearest(float value) { uint32_t u = rt_f32_bits(value); return u + 0x7fff + (u >> 16 & 1); }
RT_INLINE uint32_t rt_bf16_round(float value) { return rt_pick(value != value, rt_f32_bits(value) | 0x400000, rt_bf16_nearest(value)); }
RT_INLINE float rt_bf16_load(uint16_t half) { return rt_f32_from((uint32_t)half << 16); }
RT_INLINE uint16_t rt_bf16_store(float value) { return (uint16_t)(rt_bf16_round(value) >> 16); }
RT_INLINE float rt_bf16_low(uint32_t pair) { return rt_f32_from(pair << 16); }
RT_INLINE float rt_bf16_high(uint32_t pair) { return rt_f32_from(pair & UINT32_C(0xffff0000)); }
RT_INLINE uint32_t rt_bf16_pair(float low, float high) {
    return rt_bf16_nearest(low) >> 16 | (rt_bf16_nearest(high) & UINT32_C(0xffff0000));
}

/* min/max of half types needs no float: as signed integers sign-and-magnitude numbers are in order, but for two negative ones, which are
 * the wrong way round. */
RT_INLINE uint16_t rt_half_extreme(uint16_t a, uint16_t b, int min, int16_t inf, uint16_t qnan) {
    int16_t x = (int16_t)a, y = (int16_t)b, low = x < y ? x : y, high = x > y ? x : y;
    int16_t size_a = a & 0x7fff, size_b = b & 0x7fff, size = size_a > size_b ? size_a : size_b;
    int16_t smaller = high < 0 ? high : low, larger = high < 0 ? low : high;
    return size > inf ? qnan : (uint16_t)(min ? smaller : larger);
}

/* ---- loops ------------------------------------------------------------------------------------------------------------------- */

/* One loop over items: a and b name the operands in EXPR. DP and LP are the types that the signature has for dst and left. */
#define RT_BINARY_LOOP(ISA, S, NAME, DP, LP, D, L, R, EXPR) \
    ISA static void NAME##S(DP *dst, const LP *left, const void *right, size_t count) { \
        D *d = (D *)dst; const L *l = (const L *)left; const R *r = (const R *)right; \
        RT_IVDEP for (size_t i = 0; i < count; i++) { const L a = l[i]; const R b = r[i]; d[i] = (D)(EXPR); } \
    }
#define RT_CONVERT_LOOP(ISA, S, NAME, D, L, EXPR) \
    ISA static void NAME##S(void *dst, const void *src, size_t count) { \
        D *d = (D *)dst; const L *l = (const L *)src; \
        RT_IVDEP for (size_t i = 0; i < count; i++) { const L a = l[i]; d[i] = (D)(EXPR); } \
    }
#define RT_SCALE_LOOP(ISA, S, NAME, T, N, ITEMS, EXPR) \
    ISA static void NAME##S(void *dst, const void *src, size_t count, double divisor) { \
        T *d = (T *)dst; const T *l = (const T *)src; const N n = (N)divisor; \
        RT_IVDEP for (size_t i = 0; i < count * ITEMS; i++) { const T a = l[i]; d[i] = (T)(EXPR); } \
    }
/* Complex numbers are pairs of reals, a + ib and x + iy in RE and IM. */
#define RT_COMPLEX_LOOP(ISA, S, NAME, T, V, RE, IM) \
    ISA static void NAME##S(void *dst, const void *left, const void *right, size_t count) { \
        T *d = (T *)dst; const T *l = (const T *)left, *r = (const T *)right; \
        RT_IVDEP for (size_t i = 0; i < count; i++) { \
            const V a = l[2 * i], b = l[2 * i + 1], x = r[2 * i], y = r[2 * i + 1]; \
            d[2 * i] = RE; d[2 * i + 1] = IM; \
        } \
    }
#define RT_REDUCE(NAME, T, EXPR) RT_EACH_ISA(RT_BINARY_LOOP, NAME, void, void, T, T, T, EXPR)
/* Items of type T by the word W that holds two; PAIR is for a word, ITEM for the odd one at the end. */
#define RT_PAIR_LOOP(ISA, S, NAME, W, T, PAIR, ITEM) \
    RT_BINARY_LOOP(ISA, S, NAME##_pair, void, void, W, W, W, PAIR) \
    ISA static void NAME##S(void *dst, const void *left, const void *right, size_t count) { \
        NAME##_pair##S(dst, left, right, count / 2); \
        if (count % 2) { const T a = ((const T *)left)[count - 1], b = ((const T *)right)[count - 1]; ((T *)dst)[count - 1] = (T)(ITEM); } \
    }

/* Integers: 1u keeps uint16 * uint16 out of signed int. Wrapping and bitwise results do not depend on the sign: one kernel for both. */
#define RT_UNSIGNED(T) \
    RT_REDUCE(rt_sum_##T, rt_##T, 1u * a + b) RT_REDUCE(rt_and_##T, rt_##T, a & b) RT_REDUCE(rt_or_##T, rt_##T, a | b) \
    RT_REDUCE(rt_xor_##T, rt_##T, a ^ b)
#define RT_PRODUCT(T) RT_REDUCE(rt_prod_##T, rt_##T, 1u * a * b)
#define RT_ORDERED(T) RT_REDUCE(rt_min_##T, rt_##T, a < b ? a : b) RT_REDUCE(rt_max_##T, rt_##T, a > b ? a : b)
RT_UNSIGNED(u8) RT_UNSIGNED(u16) RT_UNSIGNED(u32) RT_UNSIGNED(u64) RT_PRODUCT(u16) RT_PRODUCT(u32) RT_PRODUCT(u64)
RT_ORDERED(u8) RT_ORDERED(u16) RT_ORDERED(u32) RT_ORDERED(u64) RT_ORDERED(i8) RT_ORDERED(i16) RT_ORDERED(i32) RT_ORDERED(i64)

/* No processor multiplies bytes, and widening them costs shuffles: in words of two, the high byte's product lands in place by itself. */
#define RT_BYTES_LOW(A, B) ((uint16_t)(1u * (A) * (B)) & 0xff)
#define RT_BYTES_HIGH(A, B) ((uint16_t)(1u * (uint16_t)((A) >> 8) * (uint16_t)((B) & 0xff00)))
RT_EACH_ISA(RT_PAIR_LOOP, rt_prod_u8, rt_u16, rt_u8, RT_BYTES_LOW(a, b) | RT_BYTES_HIGH(a, b), 1u * a * b)

RT_REDUCE(rt_or_bool, rt_u8, (a | b) != 0) RT_REDUCE(rt_and_bool, rt_u8, (a != 0) & (b != 0))
RT_REDUCE(rt_xor_bool, rt_u8, (a != 0) ^ (b != 0))

#define RT_FLOAT(F) \
    RT_REDUCE(rt_sum_##F, rt_##F, rt_##F##_add(a, b)) RT_REDUCE(rt_prod_##F, rt_##F, rt_##F##_mul(a, b)) \
    RT_PLAIN(RT_BINARY_LOOP, rt_min_##F, void, void, rt_##F, rt_##F, rt_##F, rt_##F##_min(a, b)) \
    RT_PLAIN(RT_BINARY_LOOP, rt_max_##F, void, void, rt_##F, rt_##F, rt_##F, rt_##F##_max(a, b))
RT_FLOAT(f32) RT_FLOAT(f64)

#define RT_COMPLEX(C, F, V) \
    RT_EACH_ISA(RT_COMPLEX_LOOP, rt_sum_##C, rt_##F, V, a + x, b + y) \
    RT_EACH_UNFUSED(RT_COMPLEX_LOOP, rt_prod_##C, rt_##F, V, a * x - b * y, a * y + b * x) \
    RT_EACH_ISA(RT_COMPLEX_LOOP, rt_min_##C, rt_##F, V, rt_##F##_lexmin(a, b, x, y, a, x), rt_##F##_lexmin(a, b, x, y, b, y)) \
    RT_EACH_ISA(RT_COMPLEX_LOOP, rt_max_##C, rt_##F, V, rt_##F##_lexmax(a, b, x, y, a, x), rt_##F##_lexmax(a, b, x, y, b, y))
RT_COMPLEX(c64, f32, float) RT_COMPLEX(c128, f64, double)

/* Half types: min and max are exact in integers; all else computes in float32 and rounds once. */
#define RT_HALF_ITEM(H, OP) rt_##H##_store(rt_f32_##OP(rt_##H##_load(a), rt_##H##_load(b)))
#define RT_HALF(EACH, H, INF, QNAN) \
    RT_REDUCE(rt_min_##H, rt_u16, rt_half_extreme(a, b, 1, INF, QNAN)) RT_REDUCE(rt_max_##H, rt_u16, rt_half_extreme(a, b, 0, INF, QNAN)) \
    EACH(RT_BINARY_LOOP, rt_sum_mixed_##H, float, float, rt_f32, rt_f32, rt_u16, rt_f32_add(a, rt_##H##_load(b))) \
    EACH(RT_BINARY_LOOP, rt_prod_mixed_##H, float, float, rt_f32, rt_f32, rt_u16, rt_f32_mul(a, rt_##H##_load(b))) \
    RT_PLAIN(RT_BINARY_LOOP, rt_min_mixed_##H, float, float, rt_f32, rt_f32, rt_u16, rt_f32_min(a, rt_##H##_load(b))) \
    RT_PLAIN(RT_BINARY_LOOP, rt_max_mixed_##H, float, float, rt_f32, rt_f32, rt_u16, rt_f32_max(a, rt_##H##_load(b))) \
    EACH(RT_CONVERT_LOOP, rt_widen_##H, rt_f32, rt_u16, rt_##H##_load(a)) \
    EACH(RT_CONVERT_LOOP, rt_narrow_##H, rt_u16, rt_f32, rt_##H##_store(a))
RT_HALF(RT_EACH_ISA, bf16, 0x7f80, 0x7fc0)
#define RT_BF16_PAIR(OP) rt_bf16_pair(rt_f32_##OP(rt_bf16_low(a), rt_bf16_low(b)), rt_f32_##OP(rt_bf16_high(a), rt_bf16_high(b)))
RT_EACH_ISA(RT_PAIR_LOOP, rt_sum_bf16, rt_u32, rt_u16, RT_BF16_PAIR(add), RT_HALF_ITEM(bf16, add))
RT_EACH_ISA(RT_PAIR_LOOP, rt_prod_bf16, rt_u32, rt_u16, RT_BF16_PAIR(mul), RT_HALF_ITEM(bf16, mul))
RT_EACH_ISA(RT_SCALE_LOOP, rt_scale_bf16, rt_u16, float, 1, rt_bf16_store(rt_bf16_load(a) / n))

/* float16 plainly; its wide loops follow. */
RT_HALF(RT_PLAIN, f16, 0x7c00, 0x7e00)
RT_BINARY_LOOP(, _base, rt_sum_f16, void, void, rt_u16, rt_u16, rt_u16, RT_HALF_ITEM(f16, add))
RT_BINARY_LOOP(, _base, rt_prod_f16, void, void, rt_u16, rt_u16, rt_u16, RT_HALF_ITEM(f16, mul))
RT_SCALE_LOOP(, _base, rt_scale_f16, rt_u16, float, 1, rt_f16_store(rt_f16_load(a) / n))

RT_EACH_ISA(RT_SCALE_LOOP, rt_scale_f32, rt_f32, float, 1, a / n)
RT_EACH_ISA(RT_SCALE_LOOP, rt_scale_f64, rt_f64, double, 1, a / n)
RT_EACH_ISA(RT_SCALE_LOOP, rt_scale_c64, rt_f32, float, 2, a / n)
RT_EACH_ISA(RT_SCALE_LOOP, rt_scale_c128, rt_f64, double, 2, a / n)

#if RT_WIDE
typedef __m256 rt_x8;
#define RT_X8 RT_INLINE RT_AVX2
RT_X8 rt_x8 rt_x8_load_f16(const rt_u16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
RT_X8 rt_x8 rt_x8_load_bf16(const rt_u16 *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
RT_X8 rt_x8 rt_x8_load_f32(const rt_f32 *p) { return _mm256_loadu_ps((const float *)p); }
RT_X8 void rt_x8_store_f16(rt_u16 *p, rt_x8 x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
RT_X8 void rt_x8_store_f32(rt_f32 *p, rt_x8 x) { _mm256_storeu_ps((float *)p, x); }
RT_X8 rt_x8 rt_x8_add(rt_x8 a, rt_x8 b) { return _mm256_add_ps(a, b); }
RT_X8 rt_x8 rt_x8_mul(rt_x8 a, rt_x8 b) { return _mm256_mul_ps(a, b); }
RT_X8 rt_x8 rt_x8_quiet(rt_x8 x, rt_x8 a, rt_x8 b) {
    return _mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
}
RT_X8 rt_x8 rt_x8_max(rt_x8 a, rt_x8 b) { return rt_x8_quiet(_mm256_and_ps(_mm256_max_ps(a, b), _mm256_max_ps(b, a)), a, b); }
RT_X8 rt_x8 rt_x8_min(rt_x8 a, rt_x8 b) { return rt_x8_quiet(_mm256_or_ps(_mm256_min_ps(a, b), _mm256_min_ps(b, a)), a, b); }

/* Eight at a time; the plain kernel, which agrees bit for bit, does what is left. P, D and T say what dst and left are, H what right is. */
#define RT_X8_BINARY(ISA, S, NAME, P, D, T, R, H, OP) \
    ISA static void NAME##S(P *dst, const P *left, const void *right, size_t count) { \
        D *d = (D *)dst; const D *l = (const D *)left; const R *r = (const R *)right; size_t i = 0; \
        for (; i + 8 <= count; i += 8) rt_x8_store_##T(d + i, rt_x8_##OP(rt_x8_load_##T(l + i), rt_x8_load_##H(r + i))); \
        NAME##_base((P *)(d + i), (const P *)(l + i), r + i, count - i); \
    }
#define RT_X8_CONVERT(ISA, S, NAME, DT, D, LT, L) \
    ISA static void NAME##S(void *dst, const void *src, size_t count) { \
        D *d = (D *)dst; const L *l = (const L *)src; size_t i = 0; \
        for (; i + 8 <= count; i += 8) rt_x8_store_##DT(d + i, rt_x8_load_##LT(l + i)); \
        NAME##_base(d + i, l + i, count - i); \
    }
#define RT_X8_SCALE(ISA, S, NAME) \
    ISA static void NAME##S(void *dst, const void *src, size_t count, double divisor) { \
        rt_u16 *d = (rt_u16 *)dst; const rt_u16 *l = (const rt_u16 *)src; const rt_x8 n = _mm256_set1_ps((float)divisor); size_t i = 0; \
        for (; i + 8 <= count; i += 8) rt_x8_store_f16(d + i, _mm256_div_ps(rt_x8_load_f16(l + i), n)); \
        NAME##_base(d + i, l + i, count - i, divisor); \
    }
#define RT_X8_MIXED(ISA, S, OP, H, DO) RT_X8_BINARY(ISA, S, rt_##OP##_mixed_##H, float, rt_f32, f32, rt_u16, H, DO)
#define RT_X8_ALL(ISA, S) \
    RT_X8_BINARY(ISA, S, rt_sum_f16, void, rt_u16, f16, rt_u16, f16, add) \
    RT_X8_BINARY(ISA, S, rt_prod_f16, void, rt_u16, f16, rt_u16, f16, mul) \
    RT_X8_MIXED(ISA, S, sum, f16, add) RT_X8_MIXED(ISA, S, prod, f16, mul) RT_X8_MIXED(ISA, S, min, f16, min) \
    RT_X8_MIXED(ISA, S, max, f16, max) RT_X8_MIXED(ISA, S, min, bf16, min) RT_X8_MIXED(ISA, S, max, bf16, max) \
    RT_X8_CONVERT(ISA, S, rt_widen_f16, f32, rt_f32, f16, rt_u16) RT_X8_CONVERT(ISA, S, rt_narrow_f16, f16, rt_u16, f32, rt_f32) \
    RT_X8_SCALE(ISA, S, rt_scale_f16)
RT_X8_ALL(RT_AVX2, _avx2) RT_X8_ALL(RT_AVX512, _avx512)
RT_X8_BINARY(RT_AVX2, _avx2, rt_min_f32, void, rt_f32, f32, rt_f32, f32, min)
RT_X8_BINARY(RT_AVX2, _avx2, rt_max_f32, void, rt_f32, f32, rt_f32, f32, max)

/* min and max of the other floats, by vectors V with the instructions M##name_##P. */
#define RT_VECTOR_EXTREME(ISA, S, NAME, F, V, M, P, T, EXTREME) \
    ISA static void NAME##S(void *dst, const void *left, const void *right, size_t count) { \
        rt_##F *d = (rt_##F *)dst; const rt_##F *l = (const rt_##F *)left, *r = (const rt_##F *)right; \
        const size_t per = sizeof(V) / sizeof(T); size_t i = 0; \
        for (; i + per <= count; i += per) { \
            const V a = M##loadu_##P((const T *)(l + i)), b = M##loadu_##P((const T *)(r + i)); \
            M##storeu_##P((T *)(d + i), EXTREME); \
        } \
        NAME##_base(d + i, l + i, r + i, count - i); \
    }
#define RT_D4(HOW, BOTH) \
    _mm256_blendv_pd(_mm256_##BOTH##_pd(_mm256_##HOW##_pd(a, b), _mm256_##HOW##_pd(b, a)), \
                     _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000)), _mm256_cmp_pd(a, b, _CMP_UNORD_Q))
RT_VECTOR_EXTREME(RT_AVX2, _avx2, rt_min_f64, f64, __m256d, _mm256_, pd, double, RT_D4(min, or))
RT_VECTOR_EXTREME(RT_AVX2, _avx2, rt_max_f64, f64, __m256d, _mm256_, pd, double, RT_D4(max, and))
/* AVX-512 has an instruction that orders the zeros as we do (4: min, 5: max); what it makes of NaN is not ours. */
#define RT_RANGE(P, NAN, WHICH) _mm512_mask_blend_##P(_mm512_cmp_##P##_mask(a, b, _CMP_UNORD_Q), _mm512_range_##P(a, b, WHICH), NAN)
#define RT_NAN_X16 _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000))
#define RT_NAN_D8 _mm512_castsi512_pd(_mm512_set1_epi64(0x7ff8000000000000))
RT_VECTOR_EXTREME(RT_AVX512, _avx512, rt_min_f32, f32, __m512, _mm512_, ps, float, RT_RANGE(ps, RT_NAN_X16, 4))
RT_VECTOR_EXTREME(RT_AVX512, _avx512, rt_max_f32, f32, __m512, _mm512_, ps, float, RT_RANGE(ps, RT_NAN_X16, 5))
RT_VECTOR_EXTREME(RT_AVX512, _avx512, rt_min_f64, f64, __m512d, _mm512_, pd, double, RT_RANGE(pd, RT_NAN_D8, 4))
RT_VECTOR_EXTREME(RT_AVX512, _avx512, rt_max_f64, f64, __m512d, _mm512_, pd, double, RT_RANGE(pd, RT_NAN_D8, 5))
#endif

/* ---- tables and getters ------------------------------------------------------------------------------------------------------ */

#define RT_INTEGER_ROW(S, T, U) \
    {[RT_SUM] = rt_sum_##U##S, [RT_PROD] = rt_prod_##U##S, [RT_MIN] = rt_min_##T##S, [RT_MAX] = rt_max_##T##S, \
     [RT_AND] = rt_and_##U##S, [RT_OR] = rt_or_##U##S, [RT_XOR] = rt_xor_##U##S}
#define RT_INEXACT_ROW(S, T) \
    {[RT_SUM] = rt_sum_##T##S, [RT_PROD] = rt_prod_##T##S, [RT_MIN] = rt_min_##T##S, [RT_MAX] = rt_max_##T##S, [RT_MEAN] = rt_sum_##T##S}
#define RT_BOOL_ROW(S) \
    {[RT_SUM] = rt_or_bool##S, [RT_PROD] = rt_and_bool##S, [RT_MIN] = rt_and_bool##S, [RT_MAX] = rt_or_bool##S, \
     [RT_AND] = rt_and_bool##S, [RT_OR] = rt_or_bool##S, [RT_XOR] = rt_xor_bool##S}
#define RT_REDUCE_TABLE(S) { \
    [RT_BOOL] = RT_BOOL_ROW(S), [RT_INT8] = RT_INTEGER_ROW(S, i8, u8), [RT_UINT8] = RT_INTEGER_ROW(S, u8, u8), \
    [RT_INT16] = RT_INTEGER_ROW(S, i16, u16), [RT_UINT16] = RT_INTEGER_ROW(S, u16, u16), [RT_INT32] = RT_INTEGER_ROW(S, i32, u32), \
    [RT_UINT32] = RT_INTEGER_ROW(S, u32, u32), [RT_INT64] = RT_INTEGER_ROW(S, i64, u64), [RT_UINT64] = RT_INTEGER_ROW(S, u64, u64), \
    [RT_FLOAT16] = RT_INEXACT_ROW(S, f16), [RT_BFLOAT16] = RT_INEXACT_ROW(S, bf16), [RT_FLOAT32] = RT_INEXACT_ROW(S, f32), \
    [RT_FLOAT64] = RT_INEXACT_ROW(S, f64), [RT_COMPLEX64] = RT_INEXACT_ROW(S, c64), [RT_COMPLEX128] = RT_INEXACT_ROW(S, c128)}
#define RT_MIXED_TABLE(S) {RT_INEXACT_ROW(S, mixed_f16), RT_INEXACT_ROW(S, mixed_bf16)}
#define RT_CONVERT_TABLE(S) {{rt_widen_f16##S, rt_narrow_f16##S}, {rt_widen_bf16##S, rt_narrow_bf16##S}}
#define RT_SCALE_TABLE(S) { \
    [RT_FLOAT16] = rt_scale_f16##S, [RT_BFLOAT16] = rt_scale_bf16##S, [RT_FLOAT32] = rt_scale_f32##S, [RT_FLOAT64] = rt_scale_f64##S, \
    [RT_COMPLEX64] = rt_scale_c64##S, [RT_COMPLEX128] = rt_scale_c128##S}

static const rt_reduce_fn rt_reduce_table[RT_ISAS][RT_DTYPES][RT_OPS] = RT_TABLES(RT_REDUCE_TABLE);
static const rt_mixed_fn rt_mixed_table[RT_ISAS][2][RT_OPS] = RT_TABLES(RT_MIXED_TABLE);
static const rt_convert_fn rt_convert_table[RT_ISAS][2][2] = RT_TABLES(RT_CONVERT_TABLE);
static const rt_scale_fn rt_scale_table[RT_ISAS][RT_DTYPES] = RT_TABLES(RT_SCALE_TABLE);

/* The widest set this CPU and its operating system can run: 0 plain, 1 AVX2, 2 AVX-512. Tests index the tables with less. Asked once:
 * under a hypervisor CPUID traps, which costs more than reducing a small array. Threads that ask at once find the same. */
static int rt_isa(void) {
#if RT_WIDE
    static int found = -1;
    int isa = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (isa >= 0) return isa;
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    isa = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2");
    if (isa && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl")) isa = 2;
    __atomic_store_n(&found, isa, __ATOMIC_RELAXED);
    return isa;
#else
    return 0;
#endif
}

static int rt_known(int code, int limit) { return code >= 0 && code < limit; }
static int rt_is_half(int dtype) { return dtype == RT_FLOAT16 || dtype == RT_BFLOAT16; }

/* Each getter returns NULL where the combination is not defined. MEAN is SUM; dividing is rt_scale_kernel's work. */
__attribute__((unused)) static rt_reduce_fn rt_reduce_kernel(int dtype, int op) {
    return rt_known(dtype, RT_DTYPES) && rt_known(op, RT_OPS) ? rt_reduce_table[rt_isa()][dtype][op] : NULL;
}

/* dst[i] = acc[i] op (float)half[i]: a half type from the wire into a float32 accumulator. */
__attribute__((unused)) static rt_mixed_fn rt_mixed_kernel(int half_dtype, int op) {
    return rt_is_half(half_dtype) && rt_known(op, RT_OPS) ? rt_mixed_table[rt_isa()][half_dtype - RT_FLOAT16][op] : NULL;
}

/* Between a half type and float32. Rounds to nearest even; beyond the range is infinity; NaN stays NaN. dst and src do not overlap. */
__attribute__((unused)) static rt_convert_fn rt_convert_kernel(int dst_dtype, int src_dtype) {
    if (rt_is_half(src_dtype) && dst_dtype == RT_FLOAT32) return rt_convert_table[rt_isa()][src_dtype - RT_FLOAT16][0];
    if (rt_is_half(dst_dtype) && src_dtype == RT_FLOAT32) return rt_convert_table[rt_isa()][dst_dtype - RT_FLOAT16][1];
    return NULL;
}

/* dst = src / divisor, each part of a complex number by itself, half types in float32 and rounded once. dst may be src. */
__attribute__((unused)) static rt_scale_fn rt_scale_kernel(int dtype) {
    return rt_known(dtype, RT_DTYPES) ? rt_scale_table[rt_isa()][dtype] : NULL;
}

#endif
