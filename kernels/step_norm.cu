// step_norm: x / rms(x) * gain of one new token of each sequence, in the order of a weight's columns.
//
// Layout   hidden [tokens, cols] f32, gain [cols] f32; places [padded] the column that stands at each place, -1
//          for none, or null where all stand in their own places; out [tokens, padded] fp16.
// Launch   a block of 1024 threads a token.
// Regime   latency. Bound: 32 KiB of a row of 8192 at what one multiprocessor reads, about 1 us.
#include "dependent.cuh"
#include "half.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(1024)
step_norm(const float* hidden, const float* gain, const int* places, half_t* out, int cols, int padded, float eps) {
    __shared__ float scratch[32];
    launch_next();
    wait_for_last();
    hidden += (long long)blockIdx.x * cols;
    out += (long long)blockIdx.x * padded;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < cols; i += 1024) squares = fmaf(hidden[i], hidden[i], squares);
    const float inverse = rsqrtf(block_reduce<Add>(squares, scratch) / cols + eps);
    for (int i = threadIdx.x; i < padded; i += 1024) {
        const int column = places ? places[i] : i < cols ? i : -1;
        out[i] = column < 0 ? 0 : float_to_half(hidden[column] * inverse * gain[column]);
    }
}
