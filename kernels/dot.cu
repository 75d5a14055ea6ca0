// dot: sum of a[i] * b[i] in f64, one partial sum a block.
//
// Layout   a, b: n values of f32; out f64 [gridDim.x], added up by the caller in order.
// Launch   256 threads, grid-stride.
// Regime   memory. Bound: 8 bytes a product at 3 TB/s.

extern "C" __global__ void __launch_bounds__(256)
dot(const float* a, const float* b, double* out, long long n) {
    __shared__ double partial[256];
    double sum = 0.0;
    for (long long i = blockIdx.x * 256LL + threadIdx.x; i < n; i += gridDim.x * 256LL) {
        sum += (double)a[i] * (double)b[i];
    }
    partial[threadIdx.x] = sum;
    for (int width = 128; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}
