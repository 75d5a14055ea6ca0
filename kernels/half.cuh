// fp16 values as bit patterns, so that no toolkit header is needed at run time.
#pragma once

typedef unsigned short half_t;  // one IEEE binary16
typedef unsigned int half2_t;   // two of them, the first in the low half

static __device__ __forceinline__ float half_to_float(half_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// Rounds to nearest even; values past 65519 become infinite.
static __device__ __forceinline__ half_t float_to_half(float f) {
    half_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

static __device__ __forceinline__ half2_t floats_to_half2(float low, float high) {
    half2_t h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}

static __device__ __forceinline__ float2 half2_to_floats(half2_t h) {
    float2 f;
    asm("{ .reg .f16 low, high;\n"
        "  mov.b32 {low, high}, %2;\n"
        "  cvt.f32.f16 %0, low;\n"
        "  cvt.f32.f16 %1, high; }"
        : "=f"(f.x), "=f"(f.y)
        : "r"(h));
    return f;
}

// A scale as the solver is to use it: one that the file can hold. What fp16 rounds to 0 is lifted to
// 2^-24, and no code may mean more than 65504; what fp16 cannot hold at all is left for the host to
// refuse. A negative scale is treated as its magnitude. crates/quant/src/grid.rs has the same rule, with
// the reasons.
static __device__ __forceinline__ float file_scale(float scale, float max_code, bool half_scales) {
    const float rounded = half_to_float(float_to_half(scale));
    if (rounded == 0.0f) return copysignf(0x1p-24f, scale);
    if (!(fabsf(rounded) <= 65504.0f)) return scale;
    const float most = __fdiv_rn(65504.0f, 0.5f * (max_code + 1.0f));
    return fmaxf(fminf(half_scales ? rounded : scale, most), -most);
}

// AutoGPTQ's scale of a group whose values reach from low to high, both widened by zero: symmetric only
// where a value is negative, -1..1 where all are zero.
static __device__ __forceinline__ float absmax_scale(float low, float high, float max_code) {
    if (low < 0.0f) {
        high = fmaxf(high, -low);
        low = -high;
    }
    if (low == 0.0f && high == 0.0f) low = -1.0f, high = 1.0f;
    return __fdiv_rn(__fsub_rn(high, low), max_code);
}
