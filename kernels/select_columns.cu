// select_columns: out[i, :] = x[i, first..first + cols].
//
// Layout   x rows of `stride` bytes, out rows of `bytes`, of which the first is byte `first` of x's; all multiples
//          of 2.
// Launch   a block of 256 threads a row.
// Regime   memory. Bound: 2 * bytes a row at 3 TB/s.

extern "C" __global__ void __launch_bounds__(256)
select_columns(const char* x, char* out, long long stride, long long first, long long bytes) {
    const char* from = x + blockIdx.x * stride + first;
    char* to = out + blockIdx.x * bytes;
    if ((stride | first | bytes) % 16 == 0) {
        for (long long i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
            ((uint4*)to)[i] = ((const uint4*)from)[i];
        }
    } else {
        for (long long i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
            ((short*)to)[i] = ((const short*)from)[i];
        }
    }
}
