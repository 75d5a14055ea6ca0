// fourth_powers: turned vectors brought to one norm, y = v * sqrt(cols / sum v^2), their cubes, and the mean of their
// fourth powers: what a learned rotation is judged by, and its gradient, normedT * cubes, made of. A vector of zeros stays
// so.
//
// Layout   turned [rows, cols] f32; normed, cubes [rows, cols] fp16, cubes times `scale`, a power of two that keeps the
//          largest, cols^1.5, within fp16; means [rows] f32.
// Launch   a block of 256 threads a row.
// Regime   memory: a row is read twice, the second time from the first-level cache.
// Bound    8 bytes a value at 3 TB/s: 0.18 ms for 8192 rows of 8192, beside 3.7 ms of their two products.
#include "load.cuh"
#include "reduce.cuh"

namespace {

__device__ __forceinline__ void put_8(half_t* to, const float (&v)[8]) {
    uint4 packed;
    packed.x = floats_to_half2(v[0], v[1]), packed.y = floats_to_half2(v[2], v[3]);
    packed.z = floats_to_half2(v[4], v[5]), packed.w = floats_to_half2(v[6], v[7]);
    *(uint4*)to = packed;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
fourth_powers(const float* turned, half_t* normed, half_t* cubes, float* means, int cols, float scale) {
    __shared__ float scratch[32];
    const long long first = (long long)blockIdx.x * cols;
    turned += first, normed += first, cubes += first;
    // Rows of other widths start at addresses that wide accesses cannot take.
    const bool wide = cols % 8 == 0;
    float square = 0.0f;
    if (wide) {
        for (int i = threadIdx.x * 8; i < cols; i += 256 * 8) {
            float v[8];
            load_8(turned + i, v);
#pragma unroll
            for (int j = 0; j < 8; j++) square = fmaf(v[j], v[j], square);
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += 256) square = fmaf(turned[i], turned[i], square);
    }
    square = block_reduce<Add>(square, scratch);
    // What is no number stays none.
    const float by = square == 0.0f ? 0.0f : sqrtf(cols / square);
    float fourth = 0.0f;
    if (wide) {
        for (int i = threadIdx.x * 8; i < cols; i += 256 * 8) {
            float v[8], cube[8];
            load_8(turned + i, v);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                v[j] *= by;
                const float v2 = v[j] * v[j];
                cube[j] = v2 * v[j] * scale;
                fourth = fmaf(v2, v2, fourth);
            }
            put_8(normed + i, v);
            put_8(cubes + i, cube);
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += 256) {
            const float v = turned[i] * by, v2 = v * v;
            normed[i] = float_to_half(v);
            cubes[i] = float_to_half(v2 * v * scale);
            fourth = fmaf(v2, v2, fourth);
        }
    }
    fourth = block_reduce<Add>(fourth, scratch);
    if (threadIdx.x == 0) means[blockIdx.x] = fourth / cols;
}
