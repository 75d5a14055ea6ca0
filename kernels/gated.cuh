// gate = activation(gate) * up over fp16 values, in place: what silu_mul and gelu_mul share. Layout, launch
// and bound are told at their heads.
#pragma once

#include "half.cuh"

namespace {

template <float (*kActivation)(float)>
__device__ __forceinline__ half2_t gated_2(half2_t gate, half2_t up) {
    float2 g = half2_to_floats(gate), u = half2_to_floats(up);
    return floats_to_half2(kActivation(g.x) * u.x, kActivation(g.y) * u.y);
}

template <float (*kActivation)(float)>
__device__ __forceinline__ void gated(half_t* gate, const half_t* up, long long n) {
    const long long eights = n / 8, first = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    for (long long i = first; i < eights; i += (long long)gridDim.x * blockDim.x) {
        uint4 g = ((const uint4*)gate)[i], u = ((const uint4*)up)[i];
        g.x = gated_2<kActivation>(g.x, u.x);
        g.y = gated_2<kActivation>(g.y, u.y);
        g.z = gated_2<kActivation>(g.z, u.z);
        g.w = gated_2<kActivation>(g.w, u.w);
        ((uint4*)gate)[i] = g;
    }
    const long long rest = eights * 8 + first;
    if (rest < n) gate[rest] = float_to_half(kActivation(half_to_float(gate[rest])) * half_to_float(up[rest]));
}

}  // namespace
