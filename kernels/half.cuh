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

// A scale as the solver is to use it: in fp16 a group of tiny weights must not get the scale 0.
static __device__ __forceinline__ float file_scale(float scale, bool half_scales) {
    if (!half_scales) return scale;
    const float rounded = half_to_float(float_to_half(scale));
    return rounded == 0.0f ? 0x1p-24f : rounded;
}
