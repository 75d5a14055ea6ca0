// scale_gradient: sums over each group's columns of dw * w, the gradient by the log of the group's scale; and the
// scales that log factors make.
//
// Layout   dw [rows, cols] f32, w [rows, cols] fp16; columns [cols] those of group 0, of group 1 and so on, starts
//          [groups + 1] where each group's begin; sum [rows, groups] f32, added to.
//          scales, from [groups, rows] fp16; factors [rows, groups] f32.
// Launch   scale_gradient: a block of 256 threads a row; a warp sums a group, or the block where there are fewer than
//          eight. rescale: 256 threads, grid-stride over the scales.
// Regime   memory: under act-order a warp's columns are scattered over the row, which its block reads once from
//          memory and then from the first-level cache.
// Bound    6 bytes a weight at 3 TB/s: 1.7 ms for the 856 M weights of a 70B block; the product that makes dw takes
//          25 times longer for 16384 tokens.
#include "half.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(256)
scale_gradient(const float* dw, const half_t* w, const unsigned* columns, const unsigned* starts, float* sum, int cols,
               int groups) {
    __shared__ float scratch[32];
    dw += (long long)blockIdx.x * cols;
    w += (long long)blockIdx.x * cols;
    sum += (long long)blockIdx.x * groups;
    const bool whole = groups < 8;
    const int width = whole ? 256 : 32, at = threadIdx.x % width;
    for (int group = threadIdx.x / width; group < groups; group += 256 / width) {
        float total = 0.0f;
        for (unsigned i = starts[group] + at; i < starts[group + 1]; i += width) {
            const unsigned column = columns[i];
            total = fmaf(dw[column], half_to_float(w[column]), total);
        }
        total = whole ? block_reduce<Add>(total, scratch) : warp_reduce<Add>(total);
        if (at == 0) sum[group] += total;
    }
}

extern "C" __global__ void __launch_bounds__(256)
rescale(const half_t* from, const float* factors, half_t* scales, int rows, int groups, float max_code) {
    const long long count = (long long)rows * groups;
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < count; i += gridDim.x * 256LL) {
        const float factor = expf(factors[i % rows * groups + i / rows]);
        scales[i] = float_to_half(file_scale(half_to_float(from[i]) * factor, max_code, true));
    }
}
