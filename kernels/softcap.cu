// softcap: x = cap * tanh(x / cap), in place.
//
// Layout   x: n values of f32 (logits).
// Launch   256 threads, grid-stride.
// Regime   memory. Bound: 8 bytes a value at 3 TB/s; the product that makes the logits takes a hundred times longer.

extern "C" __global__ void __launch_bounds__(256)
softcap(float* x, float cap, long long n) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        x[i] = cap * tanhf(x[i] / cap);
    }
}
