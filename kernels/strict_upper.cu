// strict_upper: zeros on and below the diagonal of the square tiles along a matrix's diagonal.
//
// Layout   a [n, n] f32 row-major; tiles of `tile` rows and columns, the last one ragged.
// Launch   256 threads, a CTA a row (grid-stride).
// Regime   memory: n * tile / 2 values written, 0.1 GB or 0.04 ms at 3 TB/s for n = 28672, tile 2048.

extern "C" __global__ void __launch_bounds__(256) strict_upper(float* a, int n, int tile) {
    for (int row = blockIdx.x; row < n; row += gridDim.x) {
        float* values = a + (long long)row * n;
        for (int j = row / tile * tile + threadIdx.x; j <= row; j += blockDim.x) values[j] = 0.0f;
    }
}
