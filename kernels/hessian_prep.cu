// hessian_prep: from a Gram matrix to the matrix whose Cholesky factor GPTQ needs.
//
// With J the reversal of indices, the solver's U (upper, U^T U = H^-1) is J L^-1 J where L is the
// lower Cholesky factor of J H J. So H is written reversed, in solve order, and only the half that
// the factorization reads:
//
//   out[a, b] = scale * gram[order[n-1-a], order[n-1-b]]   for b <= a
//   on the diagonal: 1 for dead columns, then + damp
//
// Layout   gram [n, n] f32 row-major, upper triangle valid; out [n, n] f32 or f64 row-major, lower
//          triangle (the upper triangle for a column-major library); order u32 [n], dead u8 [n].
// Launch   256 threads, a CTA a row of out (grid-stride over rows).
// Regime   memory, gathered: half of the reads scatter over the Gram, 32 B a value.
// Bound    n^2/2 * 4 B written, n^2/4 * 32 B gathered and n^2/4 * 4 B within a row: 9 GB or 3 ms at
//          3 TB/s for n = 28672 (act-order); 1.6 ms in natural order.

namespace {

template <typename T>
__device__ __forceinline__ void prepare(const float* gram, const unsigned* order,
                                        const unsigned char* dead, T* out, int n, float scale,
                                        float damp) {
    for (int a = blockIdx.x; a < n; a += gridDim.x) {
        const unsigned from = order[n - 1 - a];
        for (int b = threadIdx.x; b <= a; b += blockDim.x) {
            const unsigned other = order[n - 1 - b];
            const long long at = (long long)min(from, other) * n + max(from, other);
            float value = __fmul_rn(gram[at], scale);
            if (a == b) value = __fadd_rn(dead[from] ? 1.0f : value, damp);
            out[(long long)a * n + b] = (T)value;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
hessian_prep_f32(const float* gram, const unsigned* order, const unsigned char* dead, float* out,
                 int n, float scale, float damp) {
    prepare(gram, order, dead, out, n, scale, damp);
}

extern "C" __global__ void __launch_bounds__(256)
hessian_prep_f64(const float* gram, const unsigned* order, const unsigned char* dead, double* out,
                 int n, float scale, float damp) {
    prepare(gram, order, dead, out, n, scale, damp);
}
