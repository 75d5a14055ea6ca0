// select_columns: out[i, to..to + cols] = x[i, first..first + cols].
//
// Layout   x rows of `stride` bytes, of which those from byte `first` on are copied; out rows of `to_stride` bytes,
//          whose byte `to` is the first that is written; all, and `bytes`, multiples of 2.
// Launch   a block of 256 threads a row.
// Regime   memory. Bound: 2 * bytes a row at 3 TB/s.

extern "C" __global__ void __launch_bounds__(256)
select_columns(const char* x, char* out, long long stride, long long first, long long to_stride, long long to,
               long long bytes) {
    const char* from = x + blockIdx.x * stride + first;
    char* target = out + blockIdx.x * to_stride + to;
    if ((stride | first | to_stride | to | bytes) % 16 == 0) {
        for (long long i = threadIdx.x; i < bytes / 16; i += blockDim.x) {
            ((uint4*)target)[i] = ((const uint4*)from)[i];
        }
    } else {
        for (long long i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
            ((short*)target)[i] = ((const short*)from)[i];
        }
    }
}
