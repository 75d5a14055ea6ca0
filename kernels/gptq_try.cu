// gptq_try: what solving one group would leave, for each of several candidate scales of a row:
// s = ratio * 2 absmax / max_code, ratios being of either sign. gptq_pick: the candidate with the least,
// the first of equals. A group of more than 128 columns is tried in blocks of 128, each as if the others'
// errors did not reach it: the sum over blocks is not what the solve leaves, but tells scales apart.
//
// Layout   w, u and lanes as in gptq_block.cu, the group's blocks being along U's diagonal. ratios [y]
//          f32. trials [ratios, rows] float2: a candidate's scale and its sum of err^2. scales [rows] f32.
//          half_scales rounds a scale to fp16 before it is tried, and the values that it gives;
//          file_scale keeps every scale within fp16.
// Launch   gptq_try: 256 threads, 64 rows a CTA, grid (rows / 64, ratios). gptq_pick: a thread a row.
// Regime   issue. Bound: gptq_block's, 30 us for 28672 rows and 128 columns on 132 SMs, times the
//          ratios: 48 of a sign take 1.4 ms, 92 ms for 28672 x 8192, and both signs twice that. Codes
//          and errors are not stored, and W and U come from L2 after the first ratio.
// Numerics as in gptq_block.cu; the four lanes of a row have the same sum.

#include "gptq.cuh"

namespace {

// Sum of err^2 of each row's group under one candidate scale a row.
__device__ __forceinline__ float attempt(float (&x)[kChunks][4], float (&su)[2][kStage],
                                         const float* u, int ld, int width, float scale,
                                         const Grid& grid) {
    const int lane = threadIdx.x % kLanes;
    const int chunks = (width + kChunk - 1) / kChunk;
    float next_u[kFetch];
    fetch(u, ld, width, 0, next_u);
    float loss = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int left = chunks - chunk;
        const float* uc = su[chunk & 1];
        stage(su[chunk & 1], next_u);
        __syncthreads();  // as in solve
        if (left > 1) fetch(u, ld, width, chunk + 1, next_u);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            const float wi = __shfl_sync(0xffffffffu, x[0][i % 4], i / 4, kLanes);
            const Solved s = quantize(wi, scale, uc[i * kWidth + i], grid);
            // Beyond the width w is 0, and so is its error.
            loss = fmaf(s.error, s.error, loss);
            spread_error(x, uc, i, left, s.error, lane);
        }
        move_down(x);
    }
    return loss;
}

}  // namespace

// One group of `columns` columns at w, and U's blocks from its place on the diagonal on.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
gptq_try(const float* w, const float* u, const float* ratios, float2* trials, int rows, int ld,
         int columns, float zero, float max_code, int half_scales) {
    __shared__ __align__(16) float su[2][kStage];
    const int lane = threadIdx.x % kLanes;
    const int row = blockIdx.x * kRows + threadIdx.x / kLanes;
    const bool live = row < rows;
    w += (long long)(live ? row : 0) * ld + 4 * lane;
    float x[kChunks][4];
    float absmax = 0.0f;
    for (int start = 0; start < columns; start += kWidth) {
        load_row(x, w + start, min(columns - start, kWidth), lane);
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
#pragma unroll
            for (int c = 0; c < 4; ++c) absmax = fmaxf(absmax, fabsf(x[k][c]));
        }
    }
    absmax = fmaxf(absmax, __shfl_xor_sync(0xffffffffu, absmax, 1));
    absmax = fmaxf(absmax, __shfl_xor_sync(0xffffffffu, absmax, 2));
    const float base = __fdiv_rn(2.0f * (absmax == 0.0f ? 1.0f : absmax), max_code);
    const float scale = file_scale(__fmul_rn(ratios[blockIdx.y], base), max_code, half_scales != 0);
    const Grid grid{zero, max_code, half_scales != 0};
    float loss = 0.0f;
    for (int start = 0; start < columns; start += kWidth) {
        const int width = min(columns - start, kWidth);
        // A group of one block is in the registers already.
        if (columns > kWidth) load_row(x, w + start, width, lane);
        loss += attempt(x, su, u + (long long)start * ld + start, ld, width, scale, grid);
        __syncthreads();  // the last chunk of U is read to its end before the next is brought
    }
    if (live && lane == 0) trials[(long long)blockIdx.y * rows + row] = {scale, loss};
}

extern "C" __global__ void __launch_bounds__(kThreads)
gptq_pick(const float2* trials, float* scales, int rows, int ratio_count) {
    const int row = blockIdx.x * kThreads + threadIdx.x;
    if (row >= rows) return;
    float best = trials[row].x;
    float least = __int_as_float(0x7f800000);
    for (int k = 0; k < ratio_count; ++k) {
        const float2 trial = trials[(long long)k * rows + row];
        if (trial.y < least) best = trial.x, least = trial.y;
    }
    scales[row] = best;
}
