// rms_norm_backward: the gradient of x * r * gain with r = 1 / sqrt(mean(x^2) + eps), row by row:
// r * (gain * dy - x * r^2 * mean(x * gain * dy)).
//
// Layout   x, dy [rows, cols] f32 (hidden states) or fp16, as named in this order; gain [cols] f32; dx [rows, cols] f32,
//          to which rms_norm_backward_*_add adds, or fp16, which rms_norm_backward_* writes.
// Launch   a block a row, of 256 threads or as many as take eight values each: a multiple of 32.
// Regime   memory: the row is read twice, the second time from the first-level cache.
// Bound    14 bytes a value (f32 x, fp16 dy, f32 dx read and written) at 3 TB/s: 0.6 ms for 16384 rows of 8192.
#include "load.cuh"
#include "reduce.cuh"

namespace {

__device__ __forceinline__ void put_8(float* to, const float (&v)[8]) {
    float4 a = ((float4*)to)[0], b = ((float4*)to)[1];
    a.x += v[0], a.y += v[1], a.z += v[2], a.w += v[3];
    b.x += v[4], b.y += v[5], b.z += v[6], b.w += v[7];
    ((float4*)to)[0] = a, ((float4*)to)[1] = b;
}

__device__ __forceinline__ void put_8(half_t* to, const float (&v)[8]) {
    uint4 packed;
    packed.x = floats_to_half2(v[0], v[1]), packed.y = floats_to_half2(v[2], v[3]);
    packed.z = floats_to_half2(v[4], v[5]), packed.w = floats_to_half2(v[6], v[7]);
    *(uint4*)to = packed;
}

__device__ __forceinline__ void put_1(float* to, float v) { *to += v; }
__device__ __forceinline__ void put_1(half_t* to, float v) { *to = float_to_half(v); }

template <class X, class Y, class Out>
__device__ __forceinline__ void backward(const X* x, const float* gain, const Y* dy, Out* dx, int cols, float eps) {
    __shared__ float scratch[32];
    x += (long long)blockIdx.x * cols;
    dy += (long long)blockIdx.x * cols;
    dx += (long long)blockIdx.x * cols;
    // Rows of other widths start at addresses that wide loads cannot take.
    const bool wide = cols % 8 == 0;
    float square = 0.0f, along = 0.0f;
    if (wide) {
        for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
            float v[8], d[8], g[8];
            load_8(x + i, v);
            load_8(dy + i, d);
            load_8(gain + i, g);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                square = fmaf(v[j], v[j], square);
                along = fmaf(v[j], g[j] * d[j], along);
            }
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x) {
            const float v = load_1(x + i);
            square = fmaf(v, v, square);
            along = fmaf(v, gain[i] * load_1(dy + i), along);
        }
    }
    const float inverse = 1.0f / sqrtf(block_reduce<Add>(square, scratch) / cols + eps);
    const float back = block_reduce<Add>(along, scratch) / cols * inverse * inverse;
    if (wide) {
        for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
            float v[8], d[8], g[8];
            load_8(x + i, v);
            load_8(dy + i, d);
            load_8(gain + i, g);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = inverse * (g[j] * d[j] - v[j] * back);
            put_8(dx + i, v);
        }
    } else {
        for (int i = threadIdx.x; i < cols; i += blockDim.x) {
            put_1(dx + i, inverse * (gain[i] * load_1(dy + i) - load_1(x + i) * back));
        }
    }
}

}  // namespace

#define RMS_NORM_BACKWARD(name, X, Y, OUT)                                                          \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_backward_##name(                     \
        const X* x, const float* gain, const Y* dy, OUT* dx, int cols, float eps) {                 \
        backward(x, gain, dy, dx, cols, eps);                                                       \
    }

RMS_NORM_BACKWARD(f32_f32, float, float, half_t)
RMS_NORM_BACKWARD(f32_f16, float, half_t, half_t)
RMS_NORM_BACKWARD(f16_f32, half_t, float, half_t)
RMS_NORM_BACKWARD(f16_f16, half_t, half_t, half_t)
RMS_NORM_BACKWARD(f32_f32_add, float, float, float)
RMS_NORM_BACKWARD(f32_f16_add, float, half_t, float)
RMS_NORM_BACKWARD(f16_f32_add, half_t, float, float)
RMS_NORM_BACKWARD(f16_f16_add, half_t, half_t, float)
