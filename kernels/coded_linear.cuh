// coded_linear: up to 16 tokens times weights that lie as coded.cuh says, for all widths.
//
// Layout   of up to three weights that read the same tokens: tiles, scales [row tiles, runs, 16] fp16, zeros
//          the same in bytes or null where all are `zero`, bias [rows] f32 or null, out [tokens, out_stride]
//          f32, set or added to. x [tokens, x_stride] fp16, columns in the order of the tiles.
// Launch   as many CTAs as the card has multiprocessors, or fewer; each takes every so many-th unit of RT row
//          tiles. Its warps share the steps of a unit. Dynamic shared memory: see kRing, and the launcher.
// Regime   memory: every code is read once, whatever the number of tokens.
// Bound    bits / 8 bytes a code and 2 a scale: 117 MB of 8192 x 28672 at 4 bits take 29 us at 4 TB/s. A lane
//          spends about 1.5 instructions a code, half of what four schedulers give meanwhile.
//
// Each lane copies what it alone will read into a ring of its own in shared memory, so that many kilobytes
// are on the way without registers that wait for them; no barrier is needed but for the scales, that lanes
// of a warp share. A weight is scale (code - zero): the sums of code * x and of x over the columns of a
// group are made by tensor cores, exact but for the rounding of f32 sums, and put together group by group.
// The sums of the warps are added up in their order: the same inputs give the same bytes.
#pragma once
#include "coded.cuh"
#include "dependent.cuh"

struct Part {
    const uint4* tiles;
    const half_t* scales;
    const unsigned char* zeros;
    const float* bias;
    float* out;
    int rows, zero, out_stride;
};

struct Product {
    Part parts[3];
    const half_t* x;
    int part_count, steps, run, runs, x_stride, tokens, add;
};

namespace {

// As copy_async_16, of memory that is not read again soon.
__device__ __forceinline__ void copy_once_16(unsigned shared, const void* global, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "l"(policy)
                 : "memory");
}

__device__ __forceinline__ unsigned long long read_once() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// What a variant takes. NT: eights of tokens. RT: row tiles of a unit.
template <int BITS_, int NT_, int RT_, int WARPS_, int TOKENS_>
struct Shape {
    static constexpr int BITS = BITS_, NT = NT_, RT = RT_, WARPS = WARPS_, TOKENS = TOKENS_;
    static constexpr int VECTORS = kVectors<BITS>, SUBS = kSubs<BITS>;
    static constexpr int CODES = RT * VECTORS * 512;               // bytes of a warp's stage
    static constexpr int SCALES = BITS < 16 ? RT * SUBS * 32 : 0;  // and what follows them
    static constexpr int ZEROS = BITS < 16 ? RT * SUBS * 16 : 0;
    static constexpr int STAGE = CODES + SCALES + ZEROS;
    static constexpr int SUMS = WARPS * RT * kTileRows * TOKENS * 4;  // bytes of what warps add up
    static constexpr int FITTING = (204800 - SUMS) / (WARPS * STAGE);
    static constexpr int DEPTH = FITTING < 8 ? FITTING : 8;  // stages of a warp's ring
    static_assert(DEPTH >= 2, "a ring of one stage");
};

// The unit's weight and its first row tile there.
template <class S>
__device__ __forceinline__ int find_unit(const Product& p, int unit, int& part) {
    part = 0;
    while (true) {
        const int units = (p.parts[part].rows + S::RT * kTileRows - 1) / (S::RT * kTileRows);
        if (unit < units || part + 1 == p.part_count) return unit * S::RT;
        unit -= units;
        ++part;
    }
}

// Queues the copies of one step of a unit into a stage; one group of copies, empty beyond the last unit.
template <class S>
struct Fetcher {
    const Product& p;
    unsigned ring;
    int lane, first, last, units;
    unsigned long long policy = read_once();
    int unit, step, slot = 0;
    int part, tile;

    __device__ __forceinline__ Fetcher(const Product& p, unsigned ring, int lane, int first, int last, int units)
        : p(p), ring(ring), lane(lane), first(first), last(last), units(units), unit(blockIdx.x), step(first) {
        tile = find_unit<S>(p, unit, part);
    }

    __device__ __forceinline__ void next() {
        if (unit < units) {
            copy();
            if (++step == last) {
                step = first;
                unit += gridDim.x;
                if (unit < units) tile = find_unit<S>(p, unit, part);
            }
        }
        slot = slot + 1 == S::DEPTH ? 0 : slot + 1;
        copy_async_commit();
    }

    __device__ __forceinline__ void copy() {
        const Part& w = p.parts[part];
        const int last_tile = (w.rows - 1) / kTileRows;
        const unsigned to = ring + slot * S::STAGE;
#pragma unroll
        for (int rt = 0; rt < S::RT; ++rt) {
            const int row_tile = min(tile + rt, last_tile);
            const uint4* from = w.tiles + ((long long)row_tile * p.steps + step) * S::VECTORS * 32 + lane;
#pragma unroll
            for (int v = 0; v < S::VECTORS; ++v) {
                copy_once_16(to + (rt * S::VECTORS + v) * 512 + lane * 16, from + v * 32, policy);
            }
            if (S::BITS == 16 || lane >= 2 * S::SUBS) continue;
            const int run = min((step * S::SUBS + lane / 2) / p.run, p.runs - 1);
            const long long cells = ((long long)row_tile * p.runs + run) * kTileRows;
            const unsigned scales = to + S::CODES + rt * S::SUBS * 32 + lane * 16;
            copy_once_16(scales, w.scales + cells + lane % 2 * 8, policy);
            if (w.zeros && lane % 2 == 0) {
                copy_once_16(to + S::CODES + S::SCALES + rt * S::SUBS * 16 + lane * 8, w.zeros + cells, policy);
            }
        }
    }
};

template <class S>
using Sums = float[S::RT][S::NT][4];

// acc += scale (sum of codes - zero * sum of x) of the columns since the last time, for one row tile.
template <class S>
__device__ __forceinline__ void join(float (&acc)[S::NT][4], float (&codes)[S::NT][4], const float (&ones)[S::NT][4],
                                     const unsigned char* stage, int rt, int sub, int zero, bool zeros, int lane) {
    const int row = lane / 4;
    const half_t* scales = (const half_t*)(stage + S::CODES) + (rt * S::SUBS + sub) * kTileRows;
    const unsigned char* places = stage + S::CODES + S::SCALES + (rt * S::SUBS + sub) * kTileRows;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const float s = half_to_float(scales[row + 8 * below]) * kUnit;
        const float z = zeros ? places[row + 8 * below] : zero;
#pragma unroll
        for (int n = 0; n < S::NT; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& sum = codes[n][2 * below + i];
                acc[n][2 * below + i] = fmaf(s, fmaf(-z, ones[n][i], sum), acc[n][2 * below + i]);
                sum = 0.0f;
            }
        }
    }
}

// One step of a unit. Scales are applied every EVERY sub-blocks, all of one group.
template <class S, int EVERY>
__device__ __forceinline__ void multiply_step(const unsigned char* stage, const half_t* const (&x)[S::NT], int step,
                                              int zero, bool zeros, int lane, Sums<S>& acc) {
    const unsigned unit[4] = {0x00010001u, 0x00010001u, 0x00010001u, 0x00010001u};
    Sums<S> codes = {};
    float ones[S::NT][4] = {};
    unsigned words[S::RT][4 * S::VECTORS];
#pragma unroll
    for (int i = 0; i < S::RT * S::VECTORS; ++i) {
        const uint4 v = *(const uint4*)(stage + i * 512 + lane * 16);
        unsigned* to = words[i / S::VECTORS] + i % S::VECTORS * 4;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
#pragma unroll
    for (int sub = 0; sub < S::SUBS; ++sub) {
        uint4 b[S::NT];
#pragma unroll
        for (int n = 0; n < S::NT; ++n) b[n] = *(const uint4*)(x[n] + (step * S::SUBS + sub) * kSub);
#pragma unroll
        for (int rt = 0; rt < S::RT; ++rt) {
            unsigned a[2][4];
            pairs_of<S::BITS>(words[rt], sub, a);
#pragma unroll
            for (int n = 0; n < S::NT; ++n) {
                float(&to)[4] = S::BITS < 16 ? codes[rt][n] : acc[rt][n];
                multiply_add(to, a[0], b[n].x, b[n].y);
                multiply_add(to, a[1], b[n].z, b[n].w);
            }
        }
        if (S::BITS == 16) continue;
#pragma unroll
        for (int n = 0; n < S::NT; ++n) {
            multiply_add(ones[n], unit, b[n].x, b[n].y);
            multiply_add(ones[n], unit, b[n].z, b[n].w);
        }
        if ((sub + 1) % EVERY != 0) continue;
#pragma unroll
        for (int rt = 0; rt < S::RT; ++rt) {
            join<S>(acc[rt], codes[rt], ones, stage, rt, sub, zero, zeros, lane);
        }
#pragma unroll
        for (int n = 0; n < S::NT; ++n) ones[n][0] = ones[n][1] = ones[n][2] = ones[n][3] = 0.0f;
    }
}

// Adds up the warps' sums of a unit and writes them.
template <class S>
__device__ __forceinline__ void finish_unit(const Product& p, float* sums, const Sums<S>& acc, int part, int tile,
                                            int warp, int lane) {
    constexpr int ROWS = S::RT * kTileRows;
    const Part& w = p.parts[part];
#pragma unroll
    for (int rt = 0; rt < S::RT; ++rt)
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = n * 8 + lane % 4 * 2 + i % 2, row = rt * kTileRows + lane / 4 + i / 2 * 8;
                if (token < p.tokens) sums[(warp * p.tokens + token) * ROWS + row] = acc[rt][n][i];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * p.tokens; i += S::WARPS * 32) {
        const int row = tile * kTileRows + i % ROWS, token = i / ROWS;
        if (row >= w.rows) continue;
        float sum = w.bias ? w.bias[row] : 0.0f;
#pragma unroll
        for (int from = 0; from < S::WARPS; ++from) sum += sums[from * p.tokens * ROWS + i];
        float* out = w.out + (long long)token * w.out_stride + row;
        *out = p.add ? *out + sum : sum;
    }
    __syncthreads();
}

template <class S, int EVERY>
__device__ __forceinline__ void coded_linear(const Product& p) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned char* ring = (unsigned char*)shared + warp * S::DEPTH * S::STAGE;
    float* sums = (float*)((unsigned char*)shared + S::WARPS * S::DEPTH * S::STAGE);
    const int first = warp * p.steps / S::WARPS, last = (warp + 1) * p.steps / S::WARPS;
    int units = 0;
    for (int i = 0; i < p.part_count; ++i) units += (p.parts[i].rows + S::RT * kTileRows - 1) / (S::RT * kTileRows);

    launch_next();
    Fetcher<S> fetcher(p, shared_address(ring), lane, first, last, first < last ? units : 0);
    for (int i = 0; i < S::DEPTH - 1; ++i) fetcher.next();
    // The weights are nobody's to write: only from here on something is read that the kernel ahead makes.
    wait_for_last();
    const half_t* x[S::NT];
#pragma unroll
    for (int n = 0; n < S::NT; ++n) {
        // Tokens that are not there are another's twin, and nobody asks for their outputs.
        x[n] = p.x + (long long)min(n * 8 + lane / 4, p.tokens - 1) * p.x_stride + lane % 4 * 8;
    }
    int slot = 0;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        int part;
        const int tile = find_unit<S>(p, unit, part);
        const int zero = p.parts[part].zero;
        const bool zeros = p.parts[part].zeros != nullptr;
        Sums<S> acc = {};
        for (int step = first; step < last; ++step) {
            copy_async_wait<S::DEPTH - 2>();
            __syncwarp();
            // Into the stage of the step before, with which every lane is done.
            fetcher.next();
            multiply_step<S, EVERY>(ring + slot * S::STAGE, x, step, zero, zeros, lane, acc);
            slot = slot + 1 == S::DEPTH ? 0 : slot + 1;
        }
        finish_unit<S>(p, sums, acc, part, tile, warp, lane);
    }
}

}  // namespace

#define CODED_LINEAR(BITS, TOKENS, NAME, EVERY, NT, RT, WARPS)                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                           \
        coded_linear_##BITS##_##TOKENS##NAME(const __grid_constant__ Product p) {                         \
        coded_linear<Shape<BITS, NT, RT, WARPS, TOKENS>, EVERY>(p);                                       \
    }

// Of groups of whole 128 columns, or of any.
#define CODED_LINEAR_OF(BITS)                           \
    CODED_LINEAR(BITS, 2, , 1, 1, 1, 16)                \
    CODED_LINEAR(BITS, 8, , 1, 1, 2, 16)                \
    CODED_LINEAR(BITS, 16, , 1, 2, 4, 8)                \
    CODED_LINEAR(BITS, 2, _by_128, 4, 1, 1, 16)         \
    CODED_LINEAR(BITS, 8, _by_128, 4, 1, 2, 16)         \
    CODED_LINEAR(BITS, 16, _by_128, 4, 2, 4, 8)
