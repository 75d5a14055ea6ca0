// step_norm: x / rms(x) * gain of one new token of each sequence, in the order of a weight's columns.
//
// Layout   hidden [tokens, cols] f32, gain [cols] f32; places [padded] the column that stands at each place, -1
//          for none, or null where all stand in their own places; out [tokens, padded] fp16, sums [tokens, padded / 32] f32 of every 32
//          of them, of which padded is a multiple then, or null.
// Launch   a block of 1024 threads a token.
// Regime   latency. Bound: 32 KiB of a row of 8192 at what one multiprocessor reads, about 1 us.
#include "dependent.cuh"
#include "half.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 1024;
constexpr int kHeld = 8;  // places of a thread whose columns it knows before it waits

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
step_norm(const float* hidden, const float* gain, const int* places, half_t* out, float* sums, int cols,
          int padded, float eps) {
    __shared__ float scratch[32];
    launch_next();
    const auto column_of = [&](int place) {
        return place >= padded ? -1 : places ? places[place] : place < cols ? place : -1;
    };
    int columns[kHeld];
    float values[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
        columns[h] = column_of(h * kThreads + threadIdx.x);
        values[h] = columns[h] < 0 ? 0.0f : gain[columns[h]];
    }
    wait_for_last();
    hidden += (long long)blockIdx.x * cols;
    out += (long long)blockIdx.x * padded;
    if (sums) sums += (long long)blockIdx.x * (padded / 32);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) values[h] *= columns[h] < 0 ? 0.0f : hidden[columns[h]];
    float squares = 0.0f;
#pragma unroll 8
    for (int i = threadIdx.x; i < cols; i += kThreads) squares = fmaf(hidden[i], hidden[i], squares);
    const float inverse = rsqrtf(block_reduce<Add>(squares, scratch) / cols + eps);
    const auto put = [&](int place, float value) {
        const half_t rounded = float_to_half(value * inverse);
        if (place < padded) out[place] = rounded;
        const float sum = warp_reduce<Add>(half_to_float(rounded));
        if (sums && place < padded && place % 32 == 0) sums[place / 32] = sum;
    };
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
        if (h * kThreads < padded) put(h * kThreads + threadIdx.x, values[h]);
    }
    for (int first = kHeld * kThreads; first < padded; first += kThreads) {
        const int column = column_of(first + threadIdx.x);
        put(first + threadIdx.x, column < 0 ? 0.0f : gain[column] * hidden[column]);
    }
}
