// finite: raises a flag when a value is NaN or infinite.
//
// Layout   n values of fp16 or f32; `bad` is one word, zero before the launch.
// Launch   256 threads, grid-stride.
// Regime   memory. Bound: 2 or 4 bytes a value at 3 TB/s.
//
// fp16 is read two values a word; a last odd value is read alone.

extern "C" __global__ void __launch_bounds__(256)
finite_f16(const unsigned* values, long long n, unsigned* bad) {
    const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    bool found = false;
    for (long long i = first; i < n / 2; i += (long long)gridDim.x * blockDim.x) {
        unsigned v = values[i];
        found |= (v & 0x7c00u) == 0x7c00u || (v & 0x7c000000u) == 0x7c000000u;
    }
    if (first == 0 && n % 2) found |= (((const unsigned short*)values)[n - 1] & 0x7c00) == 0x7c00;
    if (found) *bad = 1;
}

extern "C" __global__ void __launch_bounds__(256)
finite_f32(const unsigned* values, long long n, unsigned* bad) {
    bool found = false;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
         i += (long long)gridDim.x * blockDim.x) {
        found |= (values[i] & 0x7f800000u) == 0x7f800000u;
    }
    if (found) *bad = 1;
}
