// step_silu: silu(gate) * up of one new token of each sequence, in the order of a weight's columns.
//
// Layout   gate, up [tokens, cols] f32; `to` as in ordered.cuh.
// Launch   grid (blocks of 256 places, tokens), 256 threads.
// Regime   latency. Bound: 10 bytes a value, from the second-level cache: about 1 us.
#include "dependent.cuh"
#include "ordered.cuh"

extern "C" __global__ void __launch_bounds__(256)
step_silu(const float* gate, const float* up, const __grid_constant__ Ordered to, int cols) {
    __shared__ OrderedRoom room;
    launch_next();
    const int place = blockIdx.x * 256 + threadIdx.x;
    const int column = column_at(to, place, cols);
    wait_for_last();
    const long long token = blockIdx.y;
    float value = 0.0f;
    if (column >= 0) {
        const float g = gate[token * cols + column];
        value = g / (1.0f + __expf(-g)) * up[token * cols + column];
    }
    put_ordered(to, token, place, float_to_half(value), room);
}
