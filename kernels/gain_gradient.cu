// gain_gradient: sums over rows of dy * x * r with r = 1 / sqrt(mean(x^2) + eps): the gradient by the gain of a norm.
//
// Layout   x, dy [rows, cols] f32 (hidden states) or fp16, a run of a row being a row here; inverse [rows] f32; partial
//          [chunks, cols] f32, of so many equal chunks of rows; sum [cols] f32, added to.
// Launch   inverse_*: a block a row, of 256 threads or as many as take eight values each. gain_partial_*, by the types of x
//          and dy: grid (columns / 128, chunks), 128 threads, a column each. gain_sum: 128 threads, a column each.
// Regime   memory: x is read twice. The chunks are the same for every card, and so is the order of sums.
// Bound    10 bytes a value (f32 x twice, fp16 dy) at 3 TB/s: 0.5 ms for 16384 rows of 8192.
#include "load.cuh"
#include "reduce.cuh"

namespace {

template <class X>
__device__ __forceinline__ void inverse(const X* x, float* to, int cols, float eps) {
    __shared__ float scratch[32];
    x += (long long)blockIdx.x * cols;
    float square = 0.0f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        const float v = load_1(x + i);
        square = fmaf(v, v, square);
    }
    square = block_reduce<Add>(square, scratch);
    if (threadIdx.x == 0) to[blockIdx.x] = 1.0f / sqrtf(square / cols + eps);
}

template <class X, class Y>
__device__ __forceinline__ void partial_sums(const X* x, const Y* dy, const float* inverse, float* partial,
                                             long long rows, int cols) {
    const int column = blockIdx.x * 128 + threadIdx.x;
    const long long chunk = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * chunk;
    if (column >= cols) return;
    float sum = 0.0f;
#pragma unroll 4
    for (long long row = first; row < min(first + chunk, rows); row++) {
        const long long at = row * cols + column;
        sum = fmaf(load_1(dy + at), load_1(x + at) * inverse[row], sum);
    }
    partial[(long long)blockIdx.y * cols + column] = sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
inverse_f32(const float* x, float* to, int cols, float eps) { inverse(x, to, cols, eps); }

extern "C" __global__ void __launch_bounds__(256)
inverse_f16(const half_t* x, float* to, int cols, float eps) { inverse(x, to, cols, eps); }

#define GAIN_PARTIAL(name, X, Y)                                                                              \
    extern "C" __global__ void __launch_bounds__(128) gain_partial_##name(                                    \
        const X* x, const Y* dy, const float* inverse, float* partial, long long rows, int cols) {            \
        partial_sums(x, dy, inverse, partial, rows, cols);                                                    \
    }
GAIN_PARTIAL(f32_f32, float, float)
GAIN_PARTIAL(f32_f16, float, half_t)
GAIN_PARTIAL(f16_f32, half_t, float)
GAIN_PARTIAL(f16_f16, half_t, half_t)

extern "C" __global__ void __launch_bounds__(128)
gain_sum(const float* partial, float* sum, int chunks, int cols) {
    const int column = blockIdx.x * 128 + threadIdx.x;
    if (column >= cols) return;
    float total = 0.0f;
    for (int chunk = 0; chunk < chunks; chunk++) total += partial[(long long)chunk * cols + column];
    sum[column] += total;
}
