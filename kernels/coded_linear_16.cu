// coded_linear_16: up to 16 tokens times fp16 values in the order of coded.cuh, of heads and of models that are not
// quantized.
//
// Layout   as coded_linear's, but x [tokens, x_stride] fp16, columns in the order of the tiles; no cells, one slice.
// Launch   as many CTAs as the card has multiprocessors, or fewer. Dynamic shared memory: Shape's rings and sums.
// Regime   memory: every value is read once, whatever the number of tokens.
// Bound    2 bytes a value: 470 MB of 8192 x 28672 take 0.12 ms at 4 TB/s.
#include "coded_ring.cuh"

namespace {

// Eights of tokens.
template <class S>
constexpr int kEights = (S::TOKENS + 7) / 8;

template <class S>
using Sums = float[S::RT][kEights<S>][4];

// Where a lane finds its tokens: 16 bytes of every sub-block, of every eight tokens one or none.
template <class S>
struct Tokens {
    const half_t* x[kEights<S>];
    bool there[kEights<S>];
};

// One step of a unit.
template <class S>
__device__ __forceinline__ void multiply_step(const unsigned char* stage, const Tokens<S>& tokens, int step, int lane,
                                              Sums<S>& acc) {
    unsigned words[S::RT][4 * S::VECTORS];
    read_stage<S>(stage, lane, words);
#pragma unroll
    for (int sub = 0; sub < S::SUBS; ++sub) {
        uint4 b[kEights<S>];
#pragma unroll
        for (int n = 0; n < kEights<S>; ++n) {
            // A lane without a token would cost a read of its own.
            b[n] = {0, 0, 0, 0};
            if (tokens.there[n]) b[n] = *(const uint4*)(tokens.x[n] + (step * S::SUBS + sub) * kSub);
        }
#pragma unroll
        for (int rt = 0; rt < S::RT; ++rt) {
            const unsigned* a = words[rt] + 8 * sub;
            const unsigned first[4] = {a[0], a[1], a[2], a[3]}, second[4] = {a[4], a[5], a[6], a[7]};
#pragma unroll
            for (int n = 0; n < kEights<S>; ++n) {
                multiply_add(acc[rt][n], first, b[n].x, b[n].y);
                multiply_add(acc[rt][n], second, b[n].z, b[n].w);
            }
        }
    }
}

// Leaves a warp's sums of a unit in shared memory.
template <class S>
__device__ __forceinline__ void put_sums(float* sums, const Sums<S>& acc, int tokens, int warp, int lane) {
#pragma unroll
    for (int rt = 0; rt < S::RT; ++rt)
#pragma unroll
        for (int n = 0; n < kEights<S>; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = n * 8 + lane % 4 * 2 + i % 2, row = rt * kTileRows + lane / 4 + i / 2 * 8;
                if (token < tokens) sums[(warp * tokens + token) * S::ROWS + row] = acc[rt][n][i];
            }
}

template <class S>
__device__ __forceinline__ void dense_linear(const Product& p) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    unsigned char* const ring = (unsigned char*)shared + warp * S::DEPTH * S::STAGE;
    float* all_sums = (float*)((unsigned char*)shared + S::RINGS);
    const Share share = share_of<S>(p, warp);

    launch_next();
    Fetcher<S> fetcher(p, share, shared_address(ring), lane);
#pragma unroll 1
    for (int i = 0; i < S::DEPTH - 1; ++i) fetcher.next();
    // The weights are nobody's to write: only from here on something is read that the kernel ahead makes.
    wait_for_last();
    Tokens<S> tokens;
#pragma unroll
    for (int n = 0; n < kEights<S>; ++n) {
        const int token = n * 8 + lane / 4;
        tokens.there[n] = token < p.tokens;
        tokens.x[n] = (const half_t*)p.x + (long long)min(token, p.tokens - 1) * p.x_stride +
                      share.first * S::SUBS * kSub + lane % 4 * 8;
    }
    int slot = 0, turn = 0;
    for (int unit = share.unit; unit < share.units; unit += share.apart, ++turn) {
        int part;
        const int tile = find_unit<S>(p, unit, part);
        Sums<S> acc = {};
        for (int step = 0; step < share.steps; ++step) {
            copy_async_wait<S::DEPTH - 2>();
            __syncwarp();
            // Into the stage of the step before, with which every lane is done.
            fetcher.next();
            __syncwarp();
            multiply_step<S>(ring + slot, tokens, step, lane, acc);
            slot = slot == (S::DEPTH - 1) * S::STAGE ? 0 : slot + S::STAGE;
        }
        finish_unit<S>(p, share, all_sums, unit, part, tile, turn, warp, lane,
                       [&](float* sums) { put_sums<S>(sums, acc, p.tokens, warp, lane); });
    }
}

}  // namespace

#define DENSE_LINEAR(NAME, TOKENS, RT, WARPS, TURNS, ROOM)                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                         \
        coded_linear_16_##NAME(const __grid_constant__ Product p) {                                     \
        dense_linear<Shape<16, 1, RT, WARPS, TOKENS, TURNS, ROOM>>(p);                                  \
    }

// For up to so many tokens, as of codes. The launcher knows these numbers, too.
DENSE_LINEAR(pair, 2, 2, (kLarge ? 16 : 8), 4, (kLarge ? 184320 : 101376))
DENSE_LINEAR(single, 2, 1, (kLarge ? 16 : 8), 4, (kLarge ? 184320 : 101376))
DENSE_LINEAR(eight, 8, (kLarge ? 2 : 1), (kLarge ? 16 : 8), 2, (kLarge ? 184320 : 101376))
DENSE_LINEAR(sixteen, 16, (kLarge ? 4 : 1), 8, 2, (kLarge ? 221184 : 101376))
