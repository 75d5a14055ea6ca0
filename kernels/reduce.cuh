// Sums and maxima over a block. The order of additions depends on the block's size alone, so results
// are the same in every run.
#pragma once

struct Add {
    static __device__ __forceinline__ float identity() { return 0.0f; }
    static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};

struct Max {
    static __device__ __forceinline__ float identity() { return -__int_as_float(0x7f800000); }
    static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

template <class Op>
static __device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value = Op::join(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}

// The result is in every thread. `scratch` holds 32 floats in shared memory; blockDim.x is a multiple
// of 32. Safe to call again at once with the same scratch.
template <class Op>
static __device__ float block_reduce(float value, float* scratch) {
    value = warp_reduce<Op>(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : Op::identity();
    return warp_reduce<Op>(value);
}
