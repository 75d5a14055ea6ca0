// round_groups: every weight rounded to nearest on the grid of its row's group, without calibration.
//
// Layout   w, out [rows, columns] fp16 row-major; groups are group_size columns, the last one ragged.
// Launch   256 threads, a warp a row and group; grid (rows / 8, groups).
// Regime   memory: w once from memory and once more from L1 or L2, out once. Bound: 4 bytes a weight
//          at 3 TB/s, 0.31 ms for 28672 x 8192.
// Numerics AutoGPTQ's scale, rounded to fp16 as the file has it; IEEE division, ties to even; the value
//          is an fp16 scale times an integer, rounded once. As crates/quant/src/rtn.rs has it, to the
//          bit. What is NaN or infinite stays without a meaning, and shows in what is computed of it.

#include "half.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(256)
round_groups(const half_t* w, half_t* out, int rows, int columns, int group_size, float zero,
             float max_code) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const int start = blockIdx.y * group_size;
    const int width = min(group_size, columns - start);
    const long long first = (long long)row * columns + start;
    float low = 0.0f, high = 0.0f;
    for (int j = lane; j < width; j += 32) {
        const float x = half_to_float(w[first + j]);
        low = fminf(low, x);
        high = fmaxf(high, x);
    }
    low = -warp_reduce<Max>(-low);
    high = warp_reduce<Max>(high);
    const float scale = file_scale(absmax_scale(low, high, max_code), max_code, true);
    for (int j = lane; j < width; j += 32) {
        const float steps = rintf(__fdiv_rn(half_to_float(w[first + j]), scale));
        const float code = fminf(fmaxf(__fadd_rn(steps, zero), 0.0f), max_code);
        out[first + j] = float_to_half(__fmul_rn(scale, __fsub_rn(code, zero)));
    }
}
