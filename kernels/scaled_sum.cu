// scaled_sum: hidden states and activations times factors.
//
//   scale:       x *= factor        add_scaled:  out += factor * x
//   add_rows:    out[rows[i], :] += weights[i] * x[i, :]
//
// Layout   n values each; x f32 or fp16, out f32. add_rows: out [*, cols], x [count, cols], rows u32 [count] of which
//          no two are the same, weights f32 [count].
// Launch   256 threads, grid-stride; add_rows: a block of 256 threads a row of x.
// Regime   memory. Bound at 3 TB/s, of fp16: 4 bytes a value, or 10 where a sum is read and written.
#include "load.cuh"

namespace {

__device__ __forceinline__ void put(float* to, float value) { *to = value; }
__device__ __forceinline__ void put(half_t* to, float value) { *to = float_to_half(value); }

template <class T>
__device__ __forceinline__ void scale(T* x, float factor, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        put(x + i, factor * load_1(x + i));
    }
}

template <class T>
__device__ __forceinline__ void add_scaled(float* out, const T* x, float factor, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        out[i] = fmaf(factor, load_1(x + i), out[i]);
    }
}

template <class T>
__device__ __forceinline__ void add_rows(float* out, const T* x, const unsigned* rows, const float* weights, int cols) {
    const float weight = weights[blockIdx.x];
    out += (long long)rows[blockIdx.x] * cols;
    x += (long long)blockIdx.x * cols;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) out[i] = fmaf(weight, load_1(x + i), out[i]);
}

}  // namespace

#define SCALED_SUM(T, type)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) scale_##type(T* x, float factor, long long n) {         \
        scale(x, factor, n);                                                                                  \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                         \
        add_scaled_##type(float* out, const T* x, float factor, long long n) {                                \
        add_scaled(out, x, factor, n);                                                                        \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                         \
        add_rows_##type(float* out, const T* x, const unsigned* rows, const float* weights, int cols) {       \
        add_rows(out, x, rows, weights, cols);                                                                \
    }

SCALED_SUM(float, f32)
SCALED_SUM(half_t, f16)
