// coded_join: adds up what the slices of a product left, in their order, into its outputs.
//
// Layout   Product's, `rows` of a unit and `units` of them as the product's variant has them.
// Launch   256 threads, grid-stride over fours of a unit's rows.
// Regime   latency. Bound: 4 bytes a slice, row and token from the second-level cache, 1 to 4 us.
#include "coded_ring.cuh"

extern "C" __global__ void __launch_bounds__(256) coded_join(const __grid_constant__ Product p, int rows, int units) {
    launch_next();
    const int size = rows * p.tokens / 4;
    const long long all = (long long)units * size;
    wait_for_last();
    const float4* shares = (const float4*)p.shares;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < all; i += gridDim.x * 256ll) {
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (int s = 0; s < p.slices; ++s) {
            const float4 v = __ldcg(shares + s * all + i);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        int unit = (int)(i / size), part = 0;
        const int at = (int)(i % size) * 4, token = at / rows;
        for (; part + 1 < p.part_count; ++part) {
            const int of_part = (p.parts[part].rows + rows - 1) / rows;
            if (unit < of_part) break;
            unit -= of_part;
        }
        const Part& w = p.parts[part];
        const int row = unit * rows + at % rows;
        const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (row + k < w.rows) put_output(p, w, row + k, token, sums[k]);
        }
    }
}
