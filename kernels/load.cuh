// Values of f32 or fp16, by wide loads or one by one.
#pragma once
#include "half.cuh"

// Eight values from f32 or fp16.
static __device__ __forceinline__ void load_8(const float* x, float (&v)[8]) {
    float4 a = ((const float4*)x)[0], b = ((const float4*)x)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

static __device__ __forceinline__ void load_8(const half_t* x, float (&v)[8]) {
    uint4 a = *(const uint4*)x;
    float2 p = half2_to_floats(a.x), q = half2_to_floats(a.y);
    float2 r = half2_to_floats(a.z), s = half2_to_floats(a.w);
    v[0] = p.x, v[1] = p.y, v[2] = q.x, v[3] = q.y;
    v[4] = r.x, v[5] = r.y, v[6] = s.x, v[7] = s.y;
}

static __device__ __forceinline__ float load_1(const float* x) { return *x; }
static __device__ __forceinline__ float load_1(const half_t* x) { return half_to_float(*x); }
