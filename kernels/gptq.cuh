// What gptq_block and gptq_try share: how a CTA holds rows of W and walks along a block of U. The
// layout is told at the head of gptq_block.cu.
#pragma once

#include "half.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;                      // lanes that share a row
constexpr int kRows = kThreads / kLanes;       // rows of a CTA
constexpr int kChunk = 16;                     // columns between two barriers
constexpr int kWidth = 128;                    // most columns of a block
constexpr int kChunks = kWidth / kChunk;
constexpr int kStage = kChunk * kWidth;        // floats of U in one buffer
constexpr int kFetch = kStage / kThreads;      // of which a thread brings this many

struct Grid {
    float zero, max_code;
    bool half_values;  // v is rounded to fp16, as loaders of the file do
};

struct Solved {
    float code, error;
};

__device__ __forceinline__ Solved quantize(float w, float scale, float pivot, const Grid& grid) {
    const float rounded = __fadd_rn(rintf(__fdiv_rn(w, scale)), grid.zero);
    const float code = fminf(fmaxf(rounded, 0.0f), grid.max_code);
    float value = __fmul_rn(scale, __fsub_rn(code, grid.zero));
    if (grid.half_values) value = half_to_float(float_to_half(value));
    return {code, __fdiv_rn(__fsub_rn(w, value), pivot)};
}

// Rows of U from 16 * chunk on, columns relative to 16 * chunk; identity beyond the width.
__device__ __forceinline__ void fetch(const float* matrix, int ld, int width, int chunk,
                                      float (&out)[kFetch]) {
#pragma unroll
    for (int t = 0; t < kFetch; ++t) {
        const int at = threadIdx.x + t * kThreads;
        const int row = kChunk * chunk + at / kWidth;
        const int col = kChunk * chunk + at % kWidth;
        const bool inside = row < width && col < width && row <= col;
        out[t] = inside ? matrix[(long long)row * ld + col] : (row == col ? 1.0f : 0.0f);
    }
}

__device__ __forceinline__ void stage(float* shared, const float (&values)[kFetch]) {
#pragma unroll
    for (int t = 0; t < kFetch; ++t) shared[threadIdx.x + t * kThreads] = values[t];
}

// `valid` (at most 4) floats of a row; the rest are 0. Groups of odd sizes start unaligned blocks.
__device__ __forceinline__ float4 load4(const float* p, int valid) {
    if (valid >= 4 && (reinterpret_cast<size_t>(p) & 15) == 0) {
        return *reinterpret_cast<const float4*>(p);
    }
    return {valid > 0 ? p[0] : 0.0f, valid > 1 ? p[1] : 0.0f, valid > 2 ? p[2] : 0.0f,
            valid > 3 ? p[3] : 0.0f};
}

__device__ __forceinline__ void store4(float* p, const float (&v)[4], int valid) {
    if (valid >= 4 && (reinterpret_cast<size_t>(p) & 15) == 0) {
        *reinterpret_cast<float4*>(p) = {v[0], v[1], v[2], v[3]};
        return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        if (c < valid) p[c] = v[c];
    }
}

// w += factor * u, component by component.
__device__ __forceinline__ void axpy(float (&w)[4], float factor, float4 u) {
    w[0] = fmaf(factor, u.x, w[0]);
    w[1] = fmaf(factor, u.y, w[1]);
    w[2] = fmaf(factor, u.z, w[2]);
    w[3] = fmaf(factor, u.w, w[3]);
}

// A lane's values of a row of at most kWidth columns.
__device__ __forceinline__ void load_row(float (&x)[kChunks][4], const float* w, int width,
                                         int lane) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
        const float4 v = load4(w + kChunk * k, width - kChunk * k - 4 * lane);
        x[k][0] = v.x, x[k][1] = v.y, x[k][2] = v.z, x[k][3] = v.w;
    }
}

// The columns to come, in `left` chunks, corrected for the error of column i of this chunk.
__device__ __forceinline__ void spread_error(float (&x)[kChunks][4], const float* u, int i,
                                             int left, float error, int lane) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
        if (k < left) {
            const int at = i * kWidth + kChunk * k + 4 * lane;
            axpy(x[k], -error, *reinterpret_cast<const float4*>(u + at));
        }
    }
}

// The next chunk's columns become the first.
__device__ __forceinline__ void move_down(float (&x)[kChunks][4]) {
#pragma unroll
    for (int k = 0; k < kChunks - 1; ++k) {
#pragma unroll
        for (int c = 0; c < 4; ++c) x[k][c] = x[k + 1][c];
    }
}

}  // namespace
