// layer_norm: (x - mean) / sqrt(variance + eps) * gain of every run of a row, without bias.
//
// Layout   x [rows, gains * runs * cols] f32 (hidden states) or fp16, each run of `cols` values normed by itself; gain
//          [gains, cols] f32, run i of all runs taking gain i % gains; out fp16, as x.
// Launch   a block a run, of 256 threads or as many as take eight values each: a multiple of 32.
// Regime   memory: the run is read three times (mean, squares, values), the first time from memory.
// Bound    6 bytes a value (f32 in) at 3 TB/s: 9 ms for 128 * 4096 rows of 8192.
//
// Squares are of differences from the mean: the difference of two sums would lose them where the mean is large.
#include "load.cuh"
#include "reduce.cuh"

namespace {

// Sum over the run of what `term` makes of each value.
template <class T, class Term>
__device__ __forceinline__ float sum(const T* x, int cols, bool wide, float* scratch, Term term) {
    float sum = 0.0f;
    if (wide) {
        for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
            float v[8];
            load_8(x + i, v);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += term(v[j]);
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x) sum += term(load_1(x + i));
    }
    return block_reduce<Add>(sum, scratch);
}

template <class T>
__device__ __forceinline__ void layer_norm(const T* x, const float* gain, half_t* out, int cols, int gains, float eps) {
    __shared__ float scratch[32];
    x += (long long)blockIdx.x * cols;
    out += (long long)blockIdx.x * cols;
    gain += (long long)(blockIdx.x % gains) * cols;
    // Runs of other widths start at addresses that wide loads cannot take.
    const bool wide = cols % 8 == 0;
    const float mean = sum(x, cols, wide, scratch, [](float v) { return v; }) / cols;
    const float square = sum(x, cols, wide, scratch, [mean](float v) { return (v - mean) * (v - mean); });
    const float inverse = 1.0f / sqrtf(square / cols + eps);
    if (wide) {
        for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
            float v[8], g[8];
            load_8(x + i, v);
            load_8(gain + i, g);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = (v[j] - mean) * inverse * g[j];
            uint4 packed;
            packed.x = floats_to_half2(v[0], v[1]);
            packed.y = floats_to_half2(v[2], v[3]);
            packed.z = floats_to_half2(v[4], v[5]);
            packed.w = floats_to_half2(v[6], v[7]);
            *(uint4*)(out + i) = packed;
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x) {
            out[i] = float_to_half((load_1(x + i) - mean) * inverse * gain[i]);
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
layer_norm_f32(const float* x, const float* gain, half_t* out, int cols, int gains, float eps) {
    layer_norm(x, gain, out, cols, gains, eps);
}

extern "C" __global__ void __launch_bounds__(256)
layer_norm_f16(const half_t* x, const float* gain, half_t* out, int cols, int gains, float eps) {
    layer_norm(x, gain, out, cols, gains, eps);
}
