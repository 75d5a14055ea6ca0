// Pieces of attention on tensor cores, which attention.cu and attention_ruled.cu put together: scores of a warp's
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

// out += weights · V; the accumulators of two 8-column tiles are the A operand of one 16-wide step.
template <int D, int ROW_TILES, int KEYS>
__device__ __forceinline__ void weigh(float (&out)[ROW_TILES][D / 8][4],
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
        for (int pair = 0; pair < D / 16; pair++) {
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

}  // namespace
