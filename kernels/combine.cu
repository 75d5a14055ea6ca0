// combine: differences of activations, and shifted weights.
//
//   difference_f32, difference_f16:  out = a - b, in fp16          shift:  out += factor * a
//
// Layout   n values each. difference_f32: a, b f32; difference_f16: a, b fp16; shift: a, out f32.
// Launch   256 threads, grid-stride.
// Regime   memory. Bound at 3 TB/s: 10, 6 and 12 bytes a value; 14 ms for 128 * 4096 rows of 8192 f32.
// Numerics the difference of two fp16 values is rounded to fp16: exact when one is at most twice the
//          other, as nearly all are that this is used for.

#include "half.cuh"

extern "C" __global__ void __launch_bounds__(256)
difference_f32(const float* a, const float* b, half_t* out, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = float_to_half(a[i] - b[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256)
difference_f16(const half_t* a, const half_t* b, half_t* out, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = float_to_half(half_to_float(a[i]) - half_to_float(b[i]));
    }
}

extern "C" __global__ void __launch_bounds__(256)
shift(float* out, const float* a, float factor, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = fmaf(factor, a[i], out[i]);
    }
}
