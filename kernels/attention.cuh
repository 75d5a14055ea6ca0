// Pieces of attention on tensor cores, which attention*.cu put together: scores of a warp's
// queries against a step of keys, their weights, and the weighted sum of values. Nothing of them is in memory.
//
// A warp has ROW_TILES tiles of 16 queries: each K and V fragment loaded serves all of them. Rows of the shared tiles
// are padded by 16 bytes: D / 8 + 1 chunks of 16 bytes is odd for every D that is a multiple of 16, so eight rows at
// one column touch all banks once.
#pragma once
#include "mma.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Scores of this warp's queries against KEYS keys.
template <int D, int ROW_TILES, int KEYS>
__device__ __forceinline__ void scores(float (&s)[ROW_TILES][KEYS / 8][4], unsigned q, unsigned k,
                                       int lane) {
    constexpr int PITCH = (D / 8 + 1) * 16;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[r][n][i] = 0.0f;
    unsigned a_at = q + (lane % 16) * PITCH + (lane / 16) * 16;
    unsigned b_at = k + (lane / 16 * 8 + lane % 8) * PITCH + (lane / 8 % 2) * 16;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned a[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) load_tiles(a[r], a_at + r * 16 * PITCH + step * 32);
#pragma unroll
        for (int pair = 0; pair < KEYS / 16; pair++) {
            unsigned b[4];
            load_tiles(b, b_at + pair * 16 * PITCH + step * 32);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                multiply_add(s[r][2 * pair], a[r], b[0], b[1]);
                multiply_add(s[r][2 * pair + 1], a[r], b[2], b[3]);
            }
        }
    }
}

// Turns scores into weights exp2((s - max) * scale), with the running maximum and sum of each of the
// two rows that this thread sees; earlier outputs are rescaled to the new maximum. A row that may have seen no
// key so far, BLIND, has weights of 0.
template <int D, int KEYS, bool BLIND = false>
__device__ __forceinline__ void soften(float (&s)[KEYS / 8][4], float (&out)[D / 8][4], float (&top)[2],
                                       float (&sum)[2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float best = top[half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) best = fmaxf(best, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        float shift = BLIND && best == -__int_as_float(0x7f800000) ? 0.0f : best * scale;
        float fade = exp2_approx(top[half] * scale - shift);
        top[half] = best;
        sum[half] *= fade;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[n][i] = exp2_approx(fmaf(s[n][i], scale, -shift));
                sum[half] += s[n][i];
            }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            out[n][2 * half] *= fade;
            out[n][2 * half + 1] *= fade;
        }
    }
}

// out += weights · V over the C columns of V, which has D, that start at v; the accumulators of two 8-column tiles are
// the A operand of one 16-wide step.
template <int D, int ROW_TILES, int KEYS, int C = D>
__device__ __forceinline__ void weigh(float (&out)[ROW_TILES][C / 8][4],
                                      float (&p)[ROW_TILES][KEYS / 8][4], unsigned v, int lane) {
    constexpr int PITCH = (D / 8 + 1) * 16;
    unsigned b_at = v + (lane % 16) * PITCH + (lane / 16) * 16;
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        unsigned a[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &p[r][2 * step + i / 2][2 * (i % 2)];
                a[r][i] = floats_to_half2(pair[0], pair[1]);
            }
#pragma unroll
        for (int pair = 0; pair < C / 16; pair++) {
            unsigned b[4];
            load_tiles_transposed(b, b_at + step * 16 * PITCH + pair * 32);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                multiply_add(out[r][2 * pair], a[r], b[0], b[1]);
                multiply_add(out[r][2 * pair + 1], a[r], b[2], b[3]);
            }
        }
    }
}

// Queues the copy of ROWS rows of `dim` values from `from` (row stride `stride`), in pieces of 16 bytes or, of
// heads that start at other addresses, of 4; rows from `rows` on and columns from `dim` on become zeros.
template <int D, int ROWS, bool WORDS>
__device__ __forceinline__ void copy_heads(unsigned to, const half_t* from, long long stride, int rows, int dim) {
    constexpr int SIZE = WORDS ? 2 : 8, PIECES = D / SIZE, PITCH = D * 2 + 16;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, column = i % PIECES * SIZE;
        const bool valid = row < rows && column < dim;
        const half_t* piece = from + (valid ? row * stride + column : 0);
        if (WORDS) copy_async_4(to + row * PITCH + column * 2, piece, valid);
        if (!WORDS) copy_async_16(to + row * PITCH + column * 2, piece, valid);
    }
}

// Turns products into tanh(product * scale / cap).
template <int KEYS>
__device__ __forceinline__ void cap(float (&s)[KEYS / 8][4], float inner) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = 1.0f - __fdividef(2.0f, exp2_approx(s[n][i] * inner) + 1.0f);
}

// Hides keys that a query may not see: later ones, those before its window, and those past the last.
template <int KEYS>
__device__ __forceinline__ void hide(float (&s)[KEYS / 8][4], int first_query, int first_key, int keys, int window,
                                     int lane) {
    const int place = first_key + lane % 4 * 2;  // of this thread's first key
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = first_query + lane / 4 + half * 8;
        const int newest = min(query, keys - 1) - place, oldest = query - window + 1 - place;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int key = n * 8 + i;
                if (key > newest || key < oldest) s[n][2 * half + i] = -__int_as_float(0x7f800000);
            }
    }
}

}  // namespace
