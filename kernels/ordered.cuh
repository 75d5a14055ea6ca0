// Tokens' values in the order of a weight's columns, as coded_linear takes them.
#pragma once
#include "half.cuh"
#include "reduce.cuh"

// The column of `cols` that stands at a place of `padded`, -1 for none; without `places` each in its own.
static __device__ __forceinline__ int column_at(const int* places, int place, int cols, int padded) {
    return place >= padded ? -1 : places ? places[place] : place < cols ? place : -1;
}

// Writes the sum of every 32 values of a token; `to` is where the place's own value is. Lanes of a warp have neighboring
// places, from a multiple of 32 on; what is beyond `padded` is 0.
static __device__ __forceinline__ void put_sum(float* sums, long long to, int place, int padded, half_t value) {
    const float sum = warp_reduce<Add>(half_to_float(value));
    if (place < padded && place % 32 == 0) sums[to / 32] = sum;
}
