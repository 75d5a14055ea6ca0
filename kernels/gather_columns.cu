// gather_columns: tokens in the order of a weight's columns.
//
// Layout   x [tokens, cols] fp16 or f32 row major; `to` as in ordered.cuh.
// Launch   grid (blocks of 256 places, tokens), 256 threads.
// Regime   latency: a few tokens; of a prompt memory, whose reads lie apart. Bound: 8 bytes a value.
#include "dependent.cuh"
#include "ordered.cuh"

namespace {

__device__ __forceinline__ half_t as_half(half_t value) { return value; }
__device__ __forceinline__ half_t as_half(float value) { return float_to_half(value); }

template <class T>
__device__ __forceinline__ void gather(const T* x, const Ordered& to, int cols) {
    __shared__ OrderedRoom room;
    launch_next();
    const int place = blockIdx.x * 256 + threadIdx.x;
    const int column = column_at(to, place, cols);
    wait_for_last();
    const half_t value = column < 0 ? 0 : as_half(x[(long long)blockIdx.y * cols + column]);
    put_ordered(to, blockIdx.y, place, value, room);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
gather_columns_f16(const half_t* x, const __grid_constant__ Ordered to, int cols) {
    gather(x, to, cols);
}

extern "C" __global__ void __launch_bounds__(256)
gather_columns_f32(const float* x, const __grid_constant__ Ordered to, int cols) {
    gather(x, to, cols);
}
