// step_silu: silu(gate) * up of one new token of each sequence, in the order of a weight's columns.
//
// Layout   gate, up [tokens, cols] f32; places [padded] the column that stands at each place, -1 for none, or null
//          where all stand in their own places; out [tokens, padded] fp16, padded a multiple of 32; sums [tokens,
//          padded / 32] f32 of every 32 of them.
// Launch   grid (blocks of 256 places, tokens), 256 threads.
// Regime   latency. Bound: 10 bytes a value, from the second-level cache: about 1 us.
#include "dependent.cuh"
#include "ordered.cuh"

extern "C" __global__ void __launch_bounds__(256)
step_silu(const float* gate, const float* up, const int* places, half_t* out, float* sums, int cols,
          int padded) {
    launch_next();
    const int place = blockIdx.x * 256 + threadIdx.x;
    const int column = column_at(places, place, cols, padded);
    wait_for_last();
    if (place >= padded) return;
    const long long token = blockIdx.y;
    float value = 0.0f;
    if (column >= 0) {
        const float g = gate[token * cols + column];
        value = g / (1.0f + __expf(-g)) * up[token * cols + column];
    }
    const half_t rounded = float_to_half(value);
    out[token * padded + place] = rounded;
    put_sum(sums, token * padded + place, place, padded, rounded);
}
