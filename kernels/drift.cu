// drift: what the product D = (X_fp - X)^T X reads, with columns in solve order.
//
//   moved[t, j] = reference[t, order[j]] - x[t, order[j]]        gathered[t, j] = x[t, order[j]]
//
// Layout   all matrices [tokens, n] fp16 row-major; order u32 [n].
// Launch   512 threads, a CTA a row (grid-stride over rows); 2 n bytes of shared memory: 57 KB for
//          n = 28672. One operand after the other, so that a card with 99 KB takes n = 50688.
// Regime   memory: 4 B read (x once more, from L2) and 4 B written a value. The gather is of half a
//          word of shared memory a value, with some three conflicts a warp: 20 ms for 28672 x 524288.
// Bound    120 GB, 40 ms at 3 TB/s, for 28672 x 524288.
// Numerics the difference of two fp16 values is rounded to fp16: exact when one is at most twice the
//          other, as nearly all are here.

#include "half.cuh"

namespace {

// out[j] = row[order[j]]
__device__ __forceinline__ void gather(const half_t* row, const unsigned* order, half_t* out, int n) {
    __syncthreads();
#pragma unroll 4
    for (int j = threadIdx.x; j < n; j += blockDim.x) out[j] = row[order[j]];
    __syncthreads();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512)
drift_operands(const half_t* reference, const half_t* x, const unsigned* order, half_t* moved,
               half_t* gathered, int rows, int n) {
    extern __shared__ half_t row[];
    for (int token = blockIdx.x; token < rows; token += gridDim.x) {
        const long long at = (long long)token * n;
#pragma unroll 4
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            row[j] = float_to_half(half_to_float(reference[at + j]) - half_to_float(x[at + j]));
        }
        gather(row, order, moved + at, n);
#pragma unroll 4
        for (int j = threadIdx.x; j < n; j += blockDim.x) row[j] = x[at + j];
        gather(row, order, gathered + at, n);
    }
}
