// diagonal: out[i] = m[i, i].
//
// Layout   m [n, n] f32 row-major; out [n] f32.
// Launch   256 threads, grid-stride.
// Regime   latency: n scattered reads of 32 bytes.

extern "C" __global__ void __launch_bounds__(256)
diagonal(const float* m, float* out, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        out[i] = m[(long long)i * n + i];
    }
}
