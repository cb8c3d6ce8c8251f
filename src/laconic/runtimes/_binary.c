/* Convolution of signs: +1 is a set bit, -1 a cleared one; a product of two is XNOR, a sum a count.
 *
 * Rastegari et al. 2016, "XNOR-Net" (arXiv 1603.05279). Activations lie as [image][row][column]
 * [words of 64 channels], weights as [kernel row][kernel column][word][output, padded to 8], so that
 * one vector holds the same word of eight outputs. Bits beyond the last channel are 0 on both sides
 * and never differ. Places outside of the image count nothing, as zeros do in a float convolution.
 */

#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_VECTORS 1
#include <immintrin.h>
#define VECTORS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq")))
#endif

typedef struct {
    long images, height, width, words, channels, outputs, kernel_height, kernel_width, stride,
        padding, out_height, out_width;
} Shape;

typedef struct {
    const uint64_t *bits, *weights;
    const float *scale, *bias; /* bias may be null */
    float *out;                /* [image][row][column][output] */
    Shape s;
} Job;

int laconic_binary_vectors(void) {
#ifdef HAS_VECTORS
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

/* packing: one bit a channel, set where the value less its threshold is not negative -------------- */

static void pack_plain(const float *x, const float *threshold, uint64_t *bits, long channels) {
    for (long first = 0; first < channels; first += 64) {
        uint64_t word = 0;
        long last = channels - first < 64 ? channels - first : 64;
        for (long i = 0; i < last; i++)
            word |= (uint64_t)(x[first + i] >= (threshold ? threshold[first + i] : 0.0f)) << i;
        bits[first / 64] = word;
    }
}

#ifdef HAS_VECTORS
VECTORS static void pack_vectors(const float *x, const float *threshold, uint64_t *bits,
                                 long channels) {
    for (long first = 0; first < channels; first += 64) {
        uint64_t word = 0;
        for (long part = 0; part < 64 && first + part < channels; part += 16) {
            long left = channels - first - part;
            __mmask16 held = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            __m512 value = _mm512_maskz_loadu_ps(held, x + first + part);
            __m512 from = threshold ? _mm512_maskz_loadu_ps(held, threshold + first + part)
                                    : _mm512_setzero_ps();
            word |= (uint64_t)_mm512_mask_cmp_ps_mask(held, value, from, _CMP_GE_OQ) << part;
        }
        bits[first / 64] = word;
    }
}
#endif

/* x: [places][channels] -> bits: [places][words] */
void laconic_binary_pack(const float *x, const float *threshold, uint64_t *bits, long places,
                         long channels, int threads, int vectors) {
    long words = (channels + 63) / 64;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long place = 0; place < places; place++) {
#ifdef HAS_VECTORS
        if (vectors) {
            pack_vectors(x + place * channels, threshold, bits + place * words, channels);
            continue;
        }
#endif
        pack_plain(x + place * channels, threshold, bits + place * words, channels);
    }
}

/* weights: [outputs][channels][kernel area] -> [kernel area][words][outputs padded to 8] */
void laconic_binary_pack_weights(const uint8_t *codes, uint64_t *packed, long outputs, long channels,
                                 long area) {
    long words = (channels + 63) / 64, wide = (outputs + 7) / 8 * 8;
    for (long i = 0; i < area * words * wide; i++)
        packed[i] = 0;
    for (long o = 0; o < outputs; o++)
        for (long c = 0; c < channels; c++)
            for (long k = 0; k < area; k++)
                if (codes[(o * channels + c) * area + k])
                    packed[(k * words + c / 64) * wide + o] |= 1ull << (c % 64);
}

/* convolution ------------------------------------------------------------------------------------ */

typedef struct {
    long ky0, ky1, kx0, kx1; /* taps inside of the image */
} Taps;

static void store(const Job *job, long place, long output, const int64_t *differing, long count,
                  long valid) {
    float *out = job->out + place * job->s.outputs + output;
    for (long i = 0; i < count; i++) {
        float sum = (float)(valid - 2 * differing[i]) * job->scale[output + i];
        out[i] = job->bias ? sum + job->bias[output + i] : sum;
    }
}

/* `origin`: the place of the kernel's first tap, which may lie outside of the image */
static void tile_plain(const Job *job, long origin, long place, long pixels, Taps t) {
    const Shape *s = &job->s;
    long wide = (s->outputs + 7) / 8 * 8;
    long valid = (t.ky1 - t.ky0) * (t.kx1 - t.kx0) * s->channels;
    for (long p = 0; p < pixels; p++)
        for (long first = 0; first < s->outputs; first += 8) {
            int64_t differing[8] = {0};
            long count = s->outputs - first < 8 ? s->outputs - first : 8;
            for (long ky = t.ky0; ky < t.ky1; ky++)
                for (long kx = t.kx0; kx < t.kx1; kx++) {
                    const uint64_t *a =
                        job->bits + (origin + ky * s->width + kx + p * s->stride) * s->words;
                    const uint64_t *w = job->weights +
                                        (ky * s->kernel_width + kx) * s->words * wide + first;
                    for (long i = 0; i < s->words; i++)
                        for (long o = 0; o < count; o++)
                            differing[o] += __builtin_popcountll(a[i] ^ w[i * wide + o]);
                }
            store(job, place + p, first, differing, count, valid);
        }
}

#ifdef HAS_VECTORS
/* PIXELS neighbours by 8 * BLOCKS outputs, all sums in registers */
#define TILE(PIXELS, BLOCKS)                                                                       \
    VECTORS static void tile_##PIXELS##_##BLOCKS(const Job *job, long origin, long place,          \
                                                 long first, Taps t) {                             \
        const Shape *s = &job->s;                                                                  \
        long wide = (s->outputs + 7) / 8 * 8;                                                      \
        __m512i sums[PIXELS][BLOCKS];                                                              \
        for (int p = 0; p < PIXELS; p++)                                                           \
            for (int b = 0; b < BLOCKS; b++)                                                       \
                sums[p][b] = _mm512_setzero_si512();                                               \
        for (long ky = t.ky0; ky < t.ky1; ky++)                                                    \
            for (long kx = t.kx0; kx < t.kx1; kx++) {                                              \
                const uint64_t *a = job->bits + (origin + ky * s->width + kx) * s->words;          \
                const uint64_t *w =                                                                \
                    job->weights + (ky * s->kernel_width + kx) * s->words * wide + first;          \
                for (long i = 0; i < s->words; i++, w += wide) {                                   \
                    __m512i held[BLOCKS];                                                          \
                    for (int b = 0; b < BLOCKS; b++)                                               \
                        held[b] = _mm512_loadu_si512(w + 8 * b);                                   \
                    for (int p = 0; p < PIXELS; p++) {                                             \
                        __m512i one = _mm512_set1_epi64((long long)a[p * s->stride * s->words + i]); \
                        for (int b = 0; b < BLOCKS; b++)                                           \
                            sums[p][b] = _mm512_add_epi64(                                         \
                                sums[p][b],                                                        \
                                _mm512_popcnt_epi64(_mm512_xor_si512(one, held[b])));              \
                    }                                                                              \
                }                                                                                  \
            }                                                                                      \
        long valid = (t.ky1 - t.ky0) * (t.kx1 - t.kx0) * s->channels;                              \
        __m256i whole = _mm256_set1_epi32((int)valid);                                             \
        for (int p = 0; p < PIXELS; p++)                                                           \
            for (int b = 0; b < BLOCKS; b++) {                                                     \
                long output = first + 8 * b, left = s->outputs - output;                           \
                if (left <= 0)                                                                     \
                    continue;                                                                      \
                __mmask8 held = left >= 8 ? 0xff : (__mmask8)((1u << left) - 1);                   \
                __m256i off = _mm512_cvtepi64_epi32(sums[p][b]);                                   \
                __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(whole, _mm256_slli_epi32(off, 1))); \
                sum = _mm256_mul_ps(sum, _mm256_maskz_loadu_ps(held, job->scale + output));        \
                if (job->bias)                                                                     \
                    sum = _mm256_add_ps(sum, _mm256_maskz_loadu_ps(held, job->bias + output));     \
                _mm256_mask_storeu_ps(job->out + (place + p) * s->outputs + output, held, sum);    \
            }                                                                                      \
    }

TILE(4, 4)
TILE(4, 1)
TILE(1, 4)
TILE(1, 1)

static void tile_vectors(const Job *job, long origin, long place, long pixels, Taps t) {
    const Shape *s = &job->s;
    long wide = (s->outputs + 7) / 8 * 8;
    long first = 0;
    for (; first + 32 <= wide; first += 32) {
        long p = 0;
        for (; p + 4 <= pixels; p += 4)
            tile_4_4(job, origin + p * s->stride, place + p, first, t);
        for (; p < pixels; p++)
            tile_1_4(job, origin + p * s->stride, place + p, first, t);
    }
    for (; first < wide; first += 8) {
        long p = 0;
        for (; p + 4 <= pixels; p += 4)
            tile_4_1(job, origin + p * s->stride, place + p, first, t);
        for (; p < pixels; p++)
            tile_1_1(job, origin + p * s->stride, place + p, first, t);
    }
}
#endif

static void tile(const Job *job, long origin, long place, long pixels, Taps t, int vectors) {
    if (pixels <= 0)
        return;
#ifdef HAS_VECTORS
    if (vectors) {
        tile_vectors(job, origin, place, pixels, t);
        return;
    }
#endif
    tile_plain(job, origin, place, pixels, t);
}

static long clamp(long value, long low, long high) {
    return value < low ? low : value > high ? high : value;
}

static void row(const Job *job, long image, long oy, int vectors) {
    const Shape *s = &job->s;
    Taps t;
    long y = oy * s->stride - s->padding;
    t.ky0 = clamp(-y, 0, s->kernel_height);
    t.ky1 = clamp(s->height - y, t.ky0, s->kernel_height);
    long place = (image * s->out_height + oy) * s->out_width;
    /* columns whose whole kernel lies inside: all of a stretch at once; the others one by one */
    long inner0 = clamp((s->padding + s->stride - 1) / s->stride, 0, s->out_width);
    long room = s->width + s->padding - s->kernel_width;
    long inner1 = room < 0 ? inner0 : clamp(room / s->stride + 1, inner0, s->out_width);
    for (long ox = 0; ox < s->out_width;) {
        long x = ox * s->stride - s->padding;
        long count = ox >= inner0 && ox < inner1 ? inner1 - ox : 1;
        t.kx0 = clamp(-x, 0, s->kernel_width);
        t.kx1 = clamp(s->width - x, t.kx0, s->kernel_width);
        tile(job, (image * s->height + y) * s->width + x, place + ox, count, t, vectors);
        ox += count;
    }
}

/* All pointers as their names say in Job; returns 0, or 1 for shapes that make no sense. */
int laconic_binary_conv2d(const uint64_t *bits, const uint64_t *weights, const float *scale,
                          const float *bias, float *out, const long *shape, int threads,
                          int vectors) {
    Job job = {bits, weights, scale, bias, out, {shape[0], shape[1], shape[2], shape[3], shape[4],
               shape[5], shape[6], shape[7], shape[8], shape[9], shape[10], shape[11]}};
    const Shape *s = &job.s;
    if (s->words != (s->channels + 63) / 64 || s->stride < 1 || s->padding < 0)
        return 1;
    long rows = s->images * s->out_height;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long index = 0; index < rows; index++)
        row(&job, index / s->out_height, index % s->out_height, vectors);
    return 0;
}
