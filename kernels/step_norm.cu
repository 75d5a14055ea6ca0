// step_norm: x / rms(x) * gain of one new token of each sequence, in the order of a weight's columns.
//
// Layout   hidden [tokens, cols] f32, gain [cols] f32; places [padded] the column that stands at each place, -1
//          for none, or null where all stand in their own places; out [tokens, padded] fp16, sums [tokens, padded /
//          32] f32 of every 32 of them, of which padded is a multiple then, or null.
// Launch   grid (blocks of 256 places, tokens), 256 threads. Every block reads the whole row: that takes no longer
//          than reading a part of it, and a second kernel would.
// Regime   latency. Bound: 32 KiB of a row of 8192 from the second-level cache, about 1 us.
#include "dependent.cuh"
#include "ordered.cuh"

extern "C" __global__ void __launch_bounds__(256)
step_norm(const float* hidden, const float* gain, const int* places, half_t* out, float* sums, int cols,
          int padded, float eps) {
    __shared__ float scratch[32];
    launch_next();
    const int place = blockIdx.x * 256 + threadIdx.x;
    const int column = column_at(places, place, cols, padded);
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
    const half_t rounded = float_to_half(value * inverse);
    const long long to = (long long)blockIdx.y * padded + place;
    if (place < padded) out[to] = rounded;
    if (sums) put_sum(sums, to, place, padded, rounded);
}
