// group_scales: one scale for each row and each of several groups of consecutive columns.
//
//   group_scales         AutoGPTQ's find_params (symmetric): the range widened by zero, made symmetric
//                        only where a value is negative, -1..1 where all are zero; / max_code.
//   group_scales_search  s = ratio * 2 absmax / max_code for the ratio, of either sign, that minimizes
//                        sum diag (w - v)^2, v being w on the grid of s; the first of equals.
//
// Layout   w [rows, ld] f32 row-major, w at the first group's first column; diag f32 likewise. Groups
//          are group_size columns, the last one ragged at `columns`. scales [groups, rows] f32.
//          half_scales rounds a scale to fp16 before it is judged and stored; file_scale keeps every
//          scale within fp16.
// Launch   256 threads, a warp a row and group; grid (rows / 8, groups).
// Regime   group_scales: memory, W once (0.94 GB or 0.31 ms for 28672 x 8192). The search: issue,
//          24 instructions or so an element and candidate, 20 ms for 96 of them and 28672 x 8192 on 132
//          SMs; W and diag are read 1 + 96/16 times, all but the first from L1.
// Numerics IEEE division, ties to even. The sum runs over a lane's columns, then over lanes by xor
//          shuffles: always the same order.

#include "half.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRatios = 16;  // candidates summed in one pass: a third of a sign's, all in registers

struct Range {
    float low, high;  // both widened by zero
};

__device__ __forceinline__ Range range_of(const float* w, int width) {
    Range r{0.0f, 0.0f};
    for (int j = threadIdx.x % 32; j < width; j += 32) {
        r.low = fminf(r.low, w[j]);
        r.high = fmaxf(r.high, w[j]);
    }
    return {-warp_reduce<Max>(-r.low), warp_reduce<Max>(r.high)};
}

// Weighted squared errors of kRatios candidates, summed over the warp.
__device__ __forceinline__ void judge(const float* w, const float* diag, int width,
                                      const float (&scale)[kRatios], float zero, float max_code,
                                      float (&error)[kRatios]) {
#pragma unroll
    for (int k = 0; k < kRatios; ++k) error[k] = 0.0f;
    for (int j = threadIdx.x % 32; j < width; j += 32) {
        const float x = w[j], weight = diag[j];
#pragma unroll
        for (int k = 0; k < kRatios; ++k) {
            const float code = fminf(fmaxf(rintf(__fdiv_rn(x, scale[k])), -zero), max_code - zero);
            const float d = __fsub_rn(__fmul_rn(code, scale[k]), x);
            error[k] = __fadd_rn(error[k], __fmul_rn(__fmul_rn(d, d), weight));
        }
    }
#pragma unroll
    for (int k = 0; k < kRatios; ++k) error[k] = warp_reduce<Add>(error[k]);
}

__device__ __forceinline__ int row_of_warp() {
    return blockIdx.x * kWarps + threadIdx.x / 32;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
group_scales(const float* w, float* scales, int rows, int ld, int columns, int group_size,
             float max_code, int half_scales) {
    const int row = row_of_warp();
    if (row >= rows) return;
    const int start = blockIdx.y * group_size;
    const Range r = range_of(w + (long long)row * ld + start, min(group_size, columns - start));
    const float scale = absmax_scale(r.low, r.high, max_code);
    if (threadIdx.x % 32 == 0) {
        scales[(long long)blockIdx.y * rows + row] = file_scale(scale, max_code, half_scales != 0);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
group_scales_search(const float* w, const float* diag, const float* ratios, int ratio_count,
                    float* scales, int rows, int ld, int columns, int group_size, float zero,
                    float max_code, int half_scales) {
    const int row = row_of_warp();
    if (row >= rows) return;
    const int start = blockIdx.y * group_size;
    const int width = min(group_size, columns - start);
    w += (long long)row * ld + start;
    const Range r = range_of(w, width);
    const float absmax = fmaxf(r.high, -r.low);
    const float base = __fdiv_rn(2.0f * (absmax == 0.0f ? 1.0f : absmax), max_code);
    float best = file_scale(base, max_code, half_scales != 0);
    float least = __int_as_float(0x7f800000);
    for (int first = 0; first < ratio_count; first += kRatios) {
        float scale[kRatios], error[kRatios];
#pragma unroll
        for (int k = 0; k < kRatios; ++k) {
            const float ratio = first + k < ratio_count ? ratios[first + k] : 1.0f;
            scale[k] = file_scale(__fmul_rn(ratio, base), max_code, half_scales != 0);
        }
        judge(w, diag + start, width, scale, zero, max_code, error);
#pragma unroll
        for (int k = 0; k < kRatios; ++k) {
            if (first + k < ratio_count && error[k] < least) least = error[k], best = scale[k];
        }
    }
    if (threadIdx.x % 32 == 0) scales[(long long)blockIdx.y * rows + row] = best;
}
