// read_memory: the sum of a buffer's words, a block's at a time: how fast this card reads.
//
// Layout   words [n] of 16 bytes; out [blocks] a sum of each.
// Launch   256 threads, eight blocks a multiprocessor, grid-stride, eight reads under way a thread.
// Regime   memory: the yardstick of coded_linear. Bound: 16 bytes a word at the memory's speed.
extern "C" __global__ void __launch_bounds__(256) read_memory(const uint4* words, unsigned* out, long long n) {
    constexpr int AHEAD = 8;
    unsigned sum = 0;
    const long long stride = gridDim.x * 256ll;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += AHEAD * stride) {
        uint4 v[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) v[a] = i + a * stride < n ? __ldcs(words + i + a * stride) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) sum += v[a].x + v[a].y + v[a].z + v[a].w;
    }
    atomicAdd(out + blockIdx.x, sum);
}
