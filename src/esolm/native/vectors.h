/* Vectors of floats as wide as the processor's, weights of any dtype as such vectors, and the functions of a network.
 *
 * GCC's and Clang's own vectors, so one text serves every processor; what they lack is an intrinsic under a guard.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 8 }; /* rows of a tile of a product: as many as the registers hold sums of */
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 3 };
#else
enum { LANES = 4, TILE_ROWS = 2 };
#endif
enum { FLOAT32, FLOAT16, BFLOAT16, INT8, PAIRS }; /* dtypes of weights; PAIRS: words of two bfloat16, of two inputs */
#if defined(__AVX512BF16__)
enum { HAS_PAIRS = 1 };
#else
enum { HAS_PAIRS = 0 };
#endif

enum { LINE = 64, AHEAD = 4096 }; /* bytes that memory gives at once; how far ahead they are asked for */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef vec any_vec __attribute__((aligned(4), may_alias)); /* at any address */
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *at) { return *(const any_vec *)at; }
INLINE void store(float *at, vec v) { *(any_vec *)at = v; }

/* Ask for what is read soon. Into the second cache: the first waits for too few lines at once to keep memory busy. */
INLINE void ask_ahead(const void *at) { __builtin_prefetch((const char *)at + AHEAD, 0, 2); }

/* Let the compiler keep no number of memory in a register: AVX-512 multiplies by it as fast where it lies, and rows of a
 * product that are kept beside their sums cost a tenth of its speed. Elsewhere, and where PAIRS are multiplied, they do not. */
INLINE void keep_nothing(int dtype)
{
#if defined(__AVX512F__)
    if (dtype != PAIRS) __asm__ volatile("" ::: "memory");
#endif
}

INLINE vec load_first(const float *at, int64_t n) /* the first n, zeros behind them */
{
    if (n >= LANES) return load(at);
    vec v = {0};
    memcpy(&v, at, (size_t)n * sizeof(float));
    return v;
}

INLINE void store_first(float *at, vec v, int64_t n)
{
    if (n >= LANES) store(at, v);
    else memcpy(at, &v, (size_t)n * sizeof(float));
}

INLINE vec pick(ivec which, vec a, vec b) { return (vec)((which & (ivec)a) | (~which & (ivec)b)); }
#if defined(__AVX512F__)
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); } /* b where one is NaN */
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); } /* b where one is NaN */
INLINE vec smaller(vec a, vec b) { return pick(a < b, a, b); }
#endif

INLINE float largest(vec v)
{
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

INLINE float sum(vec v)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

INLINE int size_of(int dtype) { return dtype == INT8 ? 1 : dtype == FLOAT16 || dtype == BFLOAT16 ? 2 : 4; }

/* Weights of a dtype, from element `at` on, as floats. */
INLINE vec weights(int dtype, const void *from, int64_t at)
{
    const float *floats = (const float *)from + at;
    const uint16_t *two = (const uint16_t *)from + at;
    const int8_t *one = (const int8_t *)from + at;
    if (dtype == FLOAT32 || dtype == PAIRS) return load(floats);
#if defined(__AVX512F__)
    if (dtype == FLOAT16) return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)two));
    if (dtype == BFLOAT16) return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)two)), 16);
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)one)));
#elif defined(__AVX2__) && defined(__F16C__)
    if (dtype == FLOAT16) return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)two));
    if (dtype == BFLOAT16) return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)two)), 16);
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)one)));
#else
    if (dtype == INT8) return __builtin_convertvector(__builtin_convertvector(*(const bytes *)one, ivec), vec);
    ivec bits = __builtin_convertvector(*(const halves *)two, ivec);
    if (dtype == BFLOAT16) return (vec)(bits << 16);
    vec plain = (vec)((bits & 0x7fff) << 13) * 0x1p112f; /* exponents are 112 apart; no NaN, no infinity */
    return (vec)((ivec)plain | (bits & 0x8000) << 16);
#endif
}

/* Floats to float32 or to the nearest float16, from element `at` on. */
INLINE void put(int dtype, void *to, int64_t at, vec v)
{
    if (dtype == FLOAT32) return store((float *)to + at, v);
    const vec most = (vec){0} + 65504.0f;
    halves *two = (halves *)((uint16_t *)to + at);
    v = larger(-most, smaller(most, v)); /* NaN stays NaN */
#if defined(__AVX512F__)
    *two = (halves)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__AVX__) && defined(__F16C__)
    *two = (halves)_mm256_cvtps_ph((__m256)v, 0);
#else
    ivec bits = (ivec)(v * 0x1p-112f), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    *two = __builtin_convertvector((bits + 0xfff + (bits >> 13 & 1)) >> 13 | sign, halves);
#endif
}

INLINE vec all(float x) { return x - (vec){0}; }

/* total + a b, rounded once where the processor can. By name: a compiler rounds twice in some loops, by their length, and
 * then a row's bits would depend on its company. */
INLINE vec add_product(vec total, vec a, vec b)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
    return total + a * b;
#endif
}

/* total + w x; of words of PAIRS, both products of each. */
INLINE vec add_weighted(int dtype, vec total, vec w, float x)
{
#if defined(__AVX512BF16__)
    if (dtype == PAIRS) return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)w, (__m512bh)_mm512_set1_ps(x));
#endif
    return add_product(total, w, all(x));
}

/* The first n floats of a row, rounded, as n / 2 words of PAIRS; zeros behind them, up to a whole vector. */
INLINE void pair(const float *from, int64_t n, float *to)
{
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < n; i += LANES)
        _mm256_storeu_si256((void *)(to + i / 2), (__m256i)_mm512_cvtneps_pbh((__m512)load_first(from + i, n - i)));
#endif
}

/* e^x within 2 units of the last place; 0 below -87, NaN for NaN. Cephes' polynomial. */
INLINE vec exponential(vec x)
{
    const vec magic = (vec){0} + 12582912.0f, low = (vec){0} - 87.0f, high = (vec){0} + 88.0f;
    ivec tiny = x < low;
    x = smaller(high, x);
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec y = ((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
             + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    ivec power = (ivec)(((ivec)shifted - (ivec)magic + 127) << 23);
    return pick(tiny, (vec){0}, y * (vec)power);
}

INLINE vec gelu(vec x) { return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x))); }
INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }
