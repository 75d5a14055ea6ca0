// gather_columns: tokens in the order of a weight's columns.
//
// Layout   x [tokens, cols] fp16 or f32 row major; places [padded] the column that stands at each place, -1 for
//          none, or null where all stand in their own places; out [tokens, padded] fp16, padded a multiple of 32; sums
//          [tokens, padded / 32] f32 of every 32 of them.
// Launch   grid (blocks of 256 places, tokens), 256 threads.
// Regime   latency: a few tokens; of a prompt memory, whose reads lie apart. Bound: 8 bytes a value.
#include "ordered.cuh"

namespace {

__device__ __forceinline__ half_t as_half(half_t value) { return value; }
__device__ __forceinline__ half_t as_half(float value) { return float_to_half(value); }

template <class T>
__device__ __forceinline__ void gather(const T* x, const int* places, half_t* out, float* sums, int cols, int padded) {
    const int place = blockIdx.x * 256 + threadIdx.x;
    if (place >= padded) return;
    const int column = column_at(places, place, cols, padded);
    const long long token = blockIdx.y;
    const half_t value = column < 0 ? 0 : as_half(x[token * cols + column]);
    out[token * padded + place] = value;
    put_sum(sums, token * padded + place, place, padded, value);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
gather_columns_f16(const half_t* x, const int* places, half_t* out, float* sums, int cols, int padded) {
    gather(x, places, out, sums, cols, padded);
}

extern "C" __global__ void __launch_bounds__(256)
gather_columns_f32(const float* x, const int* places, half_t* out, float* sums, int cols, int padded) {
    gather(x, places, out, sums, cols, padded);
}
