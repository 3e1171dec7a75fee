/* What `rt.bench kernels` compares rt's kernels with: loops vectorised by hand, as fast as we know how to write them.
 *
 * May live here: dst = left op right in intrinsics, one function per operator and format, for 256 bits (AVX2, F16C) or 512 (AVX-512 F, BW,
 * DQ, VL), whichever HAND_BITS says. May not: timing, choosing (kernels.py), anything that rt itself uses.
 *
 * Semantics are rt's (docs/design.md), so that no loop is faster for doing less: integers wrap; min and max of floats give the canonical
 * NaN if either side is NaN and put +0 above -0; half types compute in float32 and round once to nearest even; any byte but 0 is true.
 * Only the sign and payload of a NaN that a sum or product gives are left open.
 *
 * Pointers are aligned to 64 bytes and the memory is a multiple of 256 bytes: no head, no tail.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* ---- what differs between the widths ----------------------------------------------------------------------------------------- */

#if HAND_BITS == 512
typedef __m512i V;
typedef __m512 F;
typedef __m512d D;
typedef __m256i H; /* as many 16-bit items as F has */
#define M(NAME) _mm512_##NAME
#define SI(NAME) _mm512_##NAME##_si512
#define FV _mm512_castps_si512
#define VF _mm512_castsi512_ps
#define DV _mm512_castpd_si512
#define VD _mm512_castsi512_pd
#define LOAD_H _mm256_load_si256
#define STORE_H _mm256_store_si256

int hand_runs_here(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

INLINE V prod_i8(V a, V b) { /* odd bytes land in place if one factor stays shifted; then (even & 0xff) | odd */
    V even = M(mullo_epi16)(a, b), odd = M(mullo_epi16)(M(srli_epi16)(a, 8), SI(and)(b, M(set1_epi16)((short)0xff00)));
    return M(ternarylogic_epi32)(even, M(set1_epi16)(0xff), odd, 0xEA);
}
INLINE V prod_i64(V a, V b) { return M(mullo_epi64)(a, b); }
INLINE V min_i64(V a, V b) { return M(min_epi64)(a, b); }
INLINE V max_i64(V a, V b) { return M(max_epi64)(a, b); }
INLINE V min_u64(V a, V b) { return M(min_epu64)(a, b); }
INLINE V max_u64(V a, V b) { return M(max_epu64)(a, b); }

/* vrange orders the zeros, and ignores a NaN. */
#define EXTREME(NAME, HOW) \
    INLINE F NAME##_f32(F a, F b) { \
        return M(mask_blend_ps)(M(cmp_ps_mask)(a, b, _CMP_UNORD_Q), M(range_ps)(a, b, HOW), VF(M(set1_epi32)(0x7fc00000))); \
    } \
    INLINE D NAME##_f64(D a, D b) { \
        return M(mask_blend_pd)(M(cmp_pd_mask)(a, b, _CMP_UNORD_Q), M(range_pd)(a, b, HOW), VD(M(set1_epi64)(0x7ff8000000000000))); \
    }
EXTREME(min, 4) EXTREME(max, 5)

INLINE V half_nan(V a, V b, V found, short inf, short nan) {
    V magnitude = M(set1_epi16)(0x7fff), most = M(max_epi16)(SI(and)(a, magnitude), SI(and)(b, magnitude));
    return M(mask_blend_epi16)(M(cmpgt_epi16_mask)(most, M(set1_epi16)(inf)), found, M(set1_epi16)(nan));
}
INLINE V pick_negative(V sign, V positive, V negative) { return M(mask_blend_epi16)(M(movepi16_mask)(sign), positive, negative); }

INLINE V bf16_round(F x) {
    V u = FV(x), near = M(add_epi32)(u, M(set1_epi32)(0x7fff));
    return M(mask_add_epi32)(near, M(test_epi32_mask)(u, M(set1_epi32)(0x10000)), near, M(set1_epi32)(1));
}
INLINE V bf16_join(V low, V high) { return M(mask_blend_epi16)(0xAAAAAAAA, M(srli_epi32)(low, 16), high); }

/* A product by 1 is exact, so this is a plain subtraction and addition in turns. */
INLINE F turns_f32(F x, F y) { return M(fmaddsub_ps)(x, M(set1_ps)(1), y); }
INLINE D turns_f64(D x, D y) { return M(fmaddsub_pd)(x, M(set1_pd)(1), y); }
#define SWAP_D(X) M(permute_pd)(X, 0x55)

/* Complex order: a bit per part. A number wins if its real part does, or that one is equal and the imaginary part wins. */
#define WINNER(K) ((((K##_wins) | (K##_equal & (K##_wins >> 1))) & EVEN) * 3)
#define LEXICAL(NAME, BEFORE, AFTER, COMBINE) \
    INLINE F NAME##_c64(F a, F b) { \
        const unsigned EVEN = 0x5555; \
        unsigned l_wins = M(cmp_ps_mask)(a, b, BEFORE), r_wins = M(cmp_ps_mask)(a, b, AFTER), l_equal = M(cmp_ps_mask)(a, b, _CMP_EQ_OQ); \
        unsigned r_equal = l_equal, nan = M(cmp_ps_mask)(a, b, _CMP_UNORD_Q), bad = ((nan | nan >> 1) & EVEN) * 3; \
        F found = M(COMBINE##_ps)(M(mask_blend_ps)((__mmask16)WINNER(l), b, a), M(mask_blend_ps)((__mmask16)WINNER(r), a, b)); \
        return M(mask_blend_ps)((__mmask16)bad, found, VF(M(set1_epi32)(0x7fc00000))); \
    } \
    INLINE D NAME##_c128(D a, D b) { \
        const unsigned EVEN = 0x55; \
        unsigned l_wins = M(cmp_pd_mask)(a, b, BEFORE), r_wins = M(cmp_pd_mask)(a, b, AFTER), l_equal = M(cmp_pd_mask)(a, b, _CMP_EQ_OQ); \
        unsigned r_equal = l_equal, nan = M(cmp_pd_mask)(a, b, _CMP_UNORD_Q), bad = ((nan | nan >> 1) & EVEN) * 3; \
        D found = M(COMBINE##_pd)(M(mask_blend_pd)((__mmask8)WINNER(l), b, a), M(mask_blend_pd)((__mmask8)WINNER(r), a, b)); \
        return M(mask_blend_pd)((__mmask8)bad, found, VD(M(set1_epi64)(0x7ff8000000000000))); \
    }
LEXICAL(min, _CMP_LT_OQ, _CMP_GT_OQ, or) LEXICAL(max, _CMP_GT_OQ, _CMP_LT_OQ, and)

#else
typedef __m256i V;
typedef __m256 F;
typedef __m256d D;
typedef __m128i H;
#define M(NAME) _mm256_##NAME
#define SI(NAME) _mm256_##NAME##_si256
#define FV _mm256_castps_si256
#define VF _mm256_castsi256_ps
#define DV _mm256_castpd_si256
#define VD _mm256_castsi256_pd
#define LOAD_H _mm_load_si128
#define STORE_H _mm_store_si128

int hand_runs_here(void) { return __builtin_cpu_supports("avx2"); } /* every processor with AVX2 has F16C */

INLINE V prod_i8(V a, V b) {
    V even = M(mullo_epi16)(a, b), odd = M(mullo_epi16)(M(srli_epi16)(a, 8), SI(and)(b, M(set1_epi16)((short)0xff00)));
    return SI(or)(SI(and)(even, M(set1_epi16)(0xff)), odd);
}
INLINE V prod_i64(V a, V b) {
    V cross = M(mullo_epi32)(a, M(shuffle_epi32)(b, 0xB1));
    return M(add_epi64)(M(mul_epu32)(a, b), M(slli_epi64)(M(add_epi32)(cross, M(srli_epi64)(cross, 32)), 32));
}
INLINE V above(V a, V b) { return M(cmpgt_epi64)(a, b); }
INLINE V above_u(V a, V b) {
    V top = M(set1_epi64x)(INT64_MIN);
    return above(SI(xor)(a, top), SI(xor)(b, top));
}
INLINE V min_i64(V a, V b) { return M(blendv_epi8)(a, b, above(a, b)); }
INLINE V max_i64(V a, V b) { return M(blendv_epi8)(b, a, above(a, b)); }
INLINE V min_u64(V a, V b) { return M(blendv_epi8)(a, b, above_u(a, b)); }
INLINE V max_u64(V a, V b) { return M(blendv_epi8)(b, a, above_u(a, b)); }

/* vminps gives its second operand where they are zeros or one is NaN: both orders together know the zeros. */
#define EXTREME(NAME, COMBINE) \
    INLINE F NAME##_f32(F a, F b) { \
        F both = M(COMBINE##_ps)(M(NAME##_ps)(a, b), M(NAME##_ps)(b, a)); \
        return M(blendv_ps)(both, VF(M(set1_epi32)(0x7fc00000)), M(cmp_ps)(a, b, _CMP_UNORD_Q)); \
    } \
    INLINE D NAME##_f64(D a, D b) { \
        D both = M(COMBINE##_pd)(M(NAME##_pd)(a, b), M(NAME##_pd)(b, a)); \
        return M(blendv_pd)(both, VD(M(set1_epi64x)(0x7ff8000000000000)), M(cmp_pd)(a, b, _CMP_UNORD_Q)); \
    }
EXTREME(min, or) EXTREME(max, and)

INLINE V half_nan(V a, V b, V found, short inf, short nan) {
    V magnitude = M(set1_epi16)(0x7fff), most = M(max_epi16)(SI(and)(a, magnitude), SI(and)(b, magnitude));
    return M(blendv_epi8)(found, M(set1_epi16)(nan), M(cmpgt_epi16)(most, M(set1_epi16)(inf)));
}
INLINE V pick_negative(V sign, V positive, V negative) { return M(blendv_epi8)(positive, negative, M(srai_epi16)(sign, 15)); }

INLINE V bf16_round(F x) {
    V u = FV(x), odd = SI(and)(M(srli_epi32)(u, 16), M(set1_epi32)(1));
    return M(add_epi32)(M(add_epi32)(u, M(set1_epi32)(0x7fff)), odd);
}
INLINE V bf16_join(V low, V high) { return M(blend_epi16)(M(srli_epi32)(low, 16), high, 0xAA); }

INLINE F turns_f32(F x, F y) { return M(addsub_ps)(x, y); }
INLINE D turns_f64(D x, D y) { return M(addsub_pd)(x, y); }
#define SWAP_D(X) M(permute_pd)(X, 5)

/* Complex order, each mask as wide as a part: a number wins if its real part does, or that one is equal and the imaginary part wins. */
#define REAL_F(X) M(moveldup_ps)(X)
#define IMAG_F(X) M(movehdup_ps)(X)
#define REAL_D(X) M(movedup_pd)(X)
#define IMAG_D(X) M(permute_pd)(X, 15)
#define LEXICAL_OF(NAME, T, S, REAL, IMAG, BEFORE, AFTER, COMBINE, NAN) \
    INLINE T NAME(T a, T b) { \
        T less = M(cmp_##S)(a, b, BEFORE), more = M(cmp_##S)(a, b, AFTER), bad = M(cmp_##S)(a, b, _CMP_UNORD_Q); \
        T equal = REAL(M(cmp_##S)(a, b, _CMP_EQ_OQ)); \
        T left = M(or_##S)(REAL(less), M(and_##S)(equal, IMAG(less))), right = M(or_##S)(REAL(more), M(and_##S)(equal, IMAG(more))); \
        T found = M(COMBINE##_##S)(M(blendv_##S)(b, a, left), M(blendv_##S)(a, b, right)); \
        return M(blendv_##S)(found, NAN, M(or_##S)(REAL(bad), IMAG(bad))); \
    }
#define LEXICAL(NAME, BEFORE, AFTER, COMBINE) \
    LEXICAL_OF(NAME##_c64, F, ps, REAL_F, IMAG_F, BEFORE, AFTER, COMBINE, VF(M(set1_epi32)(0x7fc00000))) \
    LEXICAL_OF(NAME##_c128, D, pd, REAL_D, IMAG_D, BEFORE, AFTER, COMBINE, VD(M(set1_epi64x)(0x7ff8000000000000)))
LEXICAL(min, _CMP_LT_OQ, _CMP_GT_OQ, or) LEXICAL(max, _CMP_GT_OQ, _CMP_LT_OQ, and)
#endif

/* ---- what is alike ----------------------------------------------------------------------------------------------------------- */

INLINE V sum_i8(V a, V b) { return M(add_epi8)(a, b); }
INLINE V sum_i16(V a, V b) { return M(add_epi16)(a, b); }
INLINE V sum_i32(V a, V b) { return M(add_epi32)(a, b); }
INLINE V sum_i64(V a, V b) { return M(add_epi64)(a, b); }
INLINE V prod_i16(V a, V b) { return M(mullo_epi16)(a, b); }
INLINE V prod_i32(V a, V b) { return M(mullo_epi32)(a, b); }
#define ORDER(T, S) INLINE V min_##T(V a, V b) { return M(min_##S)(a, b); } INLINE V max_##T(V a, V b) { return M(max_##S)(a, b); }
ORDER(i8, epi8) ORDER(u8, epu8) ORDER(i16, epi16) ORDER(u16, epu16) ORDER(i32, epi32) ORDER(u32, epu32)
INLINE V and_bits(V a, V b) { return SI(and)(a, b); }
INLINE V or_bits(V a, V b) { return SI(or)(a, b); }
INLINE V xor_bits(V a, V b) { return SI(xor)(a, b); }

INLINE V truth(V a) { return M(min_epu8)(a, M(set1_epi8)(1)); }
INLINE V or_bool(V a, V b) { return truth(SI(or)(a, b)); }
INLINE V and_bool(V a, V b) { return truth(M(min_epu8)(a, b)); }
INLINE V xor_bool(V a, V b) { return SI(xor)(truth(a), truth(b)); }

INLINE F sum_f32(F a, F b) { return M(add_ps)(a, b); }
INLINE F prod_f32(F a, F b) { return M(mul_ps)(a, b); }
INLINE D sum_f64(D a, D b) { return M(add_pd)(a, b); }
INLINE D prod_f64(D a, D b) { return M(mul_pd)(a, b); }
INLINE F prod_c64(F a, F b) { return turns_f32(M(mul_ps)(M(moveldup_ps)(a), b), M(mul_ps)(M(movehdup_ps)(a), M(permute_ps)(b, 0xB1))); }
INLINE D prod_c128(D a, D b) { return turns_f64(M(mul_pd)(M(movedup_pd)(a), b), M(mul_pd)(M(permute_pd)(a, 0xFF), SWAP_D(b))); }

/* As signed integers, floats of one sign or of two are in order, but negative ones the wrong way round. */
#define HALF_EXTREME(H, INF, NAN) \
    INLINE V min_##H(V a, V b) { \
        V low = M(min_epi16)(a, b), high = M(max_epi16)(a, b); \
        return half_nan(a, b, pick_negative(high, low, high), INF, NAN); \
    } \
    INLINE V max_##H(V a, V b) { \
        V low = M(min_epi16)(a, b), high = M(max_epi16)(a, b); \
        return half_nan(a, b, pick_negative(high, high, low), INF, NAN); \
    }
HALF_EXTREME(f16, 0x7c00, 0x7e00) HALF_EXTREME(bf16, 0x7f80, 0x7fc0)

/* Two bfloat16 in each 32 bits. A NaN that comes of them has zeros in its lower half, so rounding carries nothing into the upper one. */
INLINE F low_of(V pair) { return VF(M(slli_epi32)(pair, 16)); }
INLINE F high_of(V pair) { return VF(SI(and)(pair, M(set1_epi32)((int)0xffff0000))); }
INLINE V sum_bf16(V a, V b) { return bf16_join(bf16_round(sum_f32(low_of(a), low_of(b))), bf16_round(sum_f32(high_of(a), high_of(b)))); }
INLINE V prod_bf16(V a, V b) { return bf16_join(bf16_round(prod_f32(low_of(a), low_of(b))), bf16_round(prod_f32(high_of(a), high_of(b)))); }

/* ---- loops ------------------------------------------------------------------------------------------------------------------- */

/* Four vectors at a time, and one: which is faster depends on the processor and on how much there is to do. */
#define LOOP(NAME, OP, T, LOAD, STORE, STRIDE) \
    void hand_##NAME##_x4(char *dst, const char *left, const char *right, size_t nbytes) { \
        for (size_t i = 0; i < nbytes; i += 4 * (STRIDE)) { \
            const char *l = left + i, *r = right + i; \
            T a = LOAD(l), b = LOAD(l + (STRIDE)), c = LOAD(l + 2 * (STRIDE)), d = LOAD(l + 3 * (STRIDE)); \
            a = OP(a, LOAD(r)), b = OP(b, LOAD(r + (STRIDE))), c = OP(c, LOAD(r + 2 * (STRIDE))), d = OP(d, LOAD(r + 3 * (STRIDE))); \
            STORE(dst + i, a), STORE(dst + i + (STRIDE), b), STORE(dst + i + 2 * (STRIDE), c), STORE(dst + i + 3 * (STRIDE), d); \
        } \
    } \
    void hand_##NAME##_x1(char *dst, const char *left, const char *right, size_t nbytes) { \
        for (size_t i = 0; i < nbytes; i += (STRIDE)) STORE(dst + i, OP(LOAD(left + i), LOAD(right + i))); \
    }
#define LOAD_V(P) SI(load)((const V *)(P))
#define STORE_V(P, X) SI(store)((V *)(P), X)
#define LOAD_F(P) M(load_ps)((const float *)(P))
#define STORE_F(P, X) M(store_ps)((float *)(P), X)
#define LOAD_D(P) M(load_pd)((const double *)(P))
#define STORE_D(P, X) M(store_pd)((double *)(P), X)
#define LOAD_F16(P) M(cvtph_ps)(LOAD_H((const H *)(P)))
#define STORE_F16(P, X) STORE_H((H *)(P), M(cvtps_ph)(X, _MM_FROUND_TO_NEAREST_INT))
#define LOOP_V(NAME) LOOP(NAME, NAME, V, LOAD_V, STORE_V, sizeof(V))
#define LOOP_F(NAME) LOOP(NAME, NAME, F, LOAD_F, STORE_F, sizeof(F))
#define LOOP_D(NAME) LOOP(NAME, NAME, D, LOAD_D, STORE_D, sizeof(D))

LOOP_V(sum_i8) LOOP_V(sum_i16) LOOP_V(sum_i32) LOOP_V(sum_i64) LOOP_V(prod_i8) LOOP_V(prod_i16) LOOP_V(prod_i32) LOOP_V(prod_i64)
LOOP_V(min_i8) LOOP_V(min_u8) LOOP_V(min_i16) LOOP_V(min_u16) LOOP_V(min_i32) LOOP_V(min_u32) LOOP_V(min_i64) LOOP_V(min_u64)
LOOP_V(max_i8) LOOP_V(max_u8) LOOP_V(max_i16) LOOP_V(max_u16) LOOP_V(max_i32) LOOP_V(max_u32) LOOP_V(max_i64) LOOP_V(max_u64)
LOOP_V(and_bits) LOOP_V(or_bits) LOOP_V(xor_bits) LOOP_V(or_bool) LOOP_V(and_bool) LOOP_V(xor_bool)
LOOP_F(sum_f32) LOOP_F(prod_f32) LOOP_F(min_f32) LOOP_F(max_f32) LOOP_F(prod_c64) LOOP_F(min_c64) LOOP_F(max_c64)
LOOP_D(sum_f64) LOOP_D(prod_f64) LOOP_D(min_f64) LOOP_D(max_f64) LOOP_D(prod_c128) LOOP_D(min_c128) LOOP_D(max_c128)
LOOP(sum_f16, sum_f32, F, LOAD_F16, STORE_F16, sizeof(H)) LOOP(prod_f16, prod_f32, F, LOAD_F16, STORE_F16, sizeof(H))
LOOP_V(min_f16) LOOP_V(max_f16) LOOP_V(sum_bf16) LOOP_V(prod_bf16) LOOP_V(min_bf16) LOOP_V(max_bf16)

/* Apply one loop again and again: a call from Python costs as much as a thousand items. The last argument of rt's kernels counts items,
 * that of ours bytes. */
typedef void loop_fn(char *dst, const char *left, const char *right, size_t count);
void hand_repeat(loop_fn *loop, char *dst, const char *left, const char *right, size_t count, size_t times) {
    while (times--) loop(dst, left, right, count);
}
