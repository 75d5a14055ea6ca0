// step_norm: x / rms(x) * gain of one new token of each sequence, in the order of a weight's columns.
//
// Layout   hidden [tokens, cols] f32, gain [cols] f32; `to` as in ordered.cuh.
// Launch   grid (blocks of 256 places, tokens), 256 threads. Every block reads the whole row: that takes no longer
//          than reading a part of it, and a second kernel would.
// Regime   latency. Bound: 32 KiB of a row of 8192 from the second-level cache, about 1 us.
#include "dependent.cuh"
#include "ordered.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(256)
step_norm(const float* hidden, const float* gain, const __grid_constant__ Ordered to, int cols, float eps) {
    __shared__ float scratch[32];
    __shared__ OrderedRoom room;
    launch_next();
    const int place = blockIdx.x * 256 + threadIdx.x;
    const int column = column_at(to, place, cols);
    const float factor = column < 0 ? 0.0f : gain[column];
    wait_for_last();
    hidden += (long long)blockIdx.y * cols;
    const float value = column < 0 ? 0.0f : hidden[column] * factor;
    float squares = 0.0f;
    if (cols % 4 == 0) {
#pragma unroll 8
        for (int i = threadIdx.x; i < cols / 4; i += 256) {
            const float4 v = ((const float4*)hidden)[i];
            squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += 256) squares = fmaf(hidden[i], hidden[i], squares);
    }
    const float inverse = rsqrtf(block_reduce<Add>(squares, scratch) / cols + eps);
    put_ordered(to, blockIdx.y, place, float_to_half(value * inverse), room);
}
