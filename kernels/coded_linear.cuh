// coded_linear: up to 16 tokens times weights that lie as coded.cuh says, for all widths.
//
// Layout   of up to three weights that read the same tokens: tiles and cells as in coded.cuh, `tail` vectors of
//          cells a step, bias [rows] f32 or null, out [tokens, out_stride] f32, set or added to. x [tokens,
//          x_stride] fp16, columns in the order of the tiles, and the sums of every 32 of them, x_sums [tokens,
//          x_stride / 32] f32, of what was rounded to fp16.
// Launch   as many CTAs as the card has multiprocessors, or fewer; each takes every so many-th unit of RT row
//          tiles. Its warps share the steps of a unit. Dynamic shared memory: see Shape, and the launcher.
// Regime   memory: every code is read once, whatever the number of tokens.
// Bound    bits / 8 bytes a code and 2 a scale: 117 MB of 8192 x 28672 at 4 bits take 29 us at 4 TB/s. A lane
//          spends about 1.5 instructions a code, half of what four schedulers give meanwhile.
//
// Each lane copies what it alone will read into a ring of its own in shared memory, so that many kilobytes
// are on the way without registers that wait for them; no barrier is needed but for the cells, that lanes
// of a warp share. A weight is scale (code - zero): the sums of code * x over the columns of a cell are made by
// tensor cores, exact but for the rounding of f32 sums, and put together cell by cell with the sums of x.
// The sums of the warps are added up in their order: the same inputs give the same bytes.
#pragma once
#include "coded.cuh"
#include "dependent.cuh"

struct Part {
    const uint4* tiles;
    const uint4* cells;
    const float* bias;
    float* out;
    int rows, zero, zeros, out_stride, tail;
};

struct Product {
    Part parts[3];
    const half_t* x;
    const float* x_sums;
    int part_count, steps, x_stride, tokens, add;
};

namespace {

// As copy_async_16; nothing where `wanted` is false. It is no branch: the products that follow are made by whole
// warps. No cache hint: with one, ptxas 13.0 puts a uniform offset beside the descriptor, an instruction that the card
// refuses.
__device__ __forceinline__ void copy_16_if(unsigned shared, const void* global, bool wanted) {
    asm volatile(
        "{ .reg .pred wanted;\n"
        "  setp.ne.b32 wanted, %2, 0;\n"
        "  @wanted cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(shared),
        "l"(global), "r"((int)wanted)
        : "memory");
}

// A barrier of all threads that a warp may pass without waiting for the others...
__device__ __forceinline__ void arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ...or not.
__device__ __forceinline__ void await(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Whether a block may have 227 KiB of shared memory (Hopper and the Blackwell of data centers), of which what is
// left caches x and has room for attention's first blocks; all others have 99 KiB at least.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr bool kLarge = true;
#else
constexpr bool kLarge = false;
#endif

// What a variant takes. NT: eights of tokens. RT: row tiles of a unit. EVERY: sub-blocks of a cell.
template <int BITS_, int EVERY_, int NT_, int RT_, int WARPS_, int TOKENS_>
struct Shape {
    static constexpr int BITS = BITS_, EVERY = EVERY_, NT = NT_, RT = RT_, WARPS = WARPS_, TOKENS = TOKENS_;
    static constexpr int VECTORS = kVectors<BITS>, SUBS = kSubs<BITS>, CELLS = BITS < 16 ? SUBS / EVERY : 0;
    static constexpr int CODES = VECTORS * 512;             // bytes of a row tile's codes,
    static constexpr int RECORD = CODES + CELLS * 48;       // with cells and zeros,
    static constexpr int STAGE = RT * RECORD;               // of a warp's stage,
    static constexpr int ROWS = RT * kTileRows;
    static constexpr int SUMS = WARPS * ROWS * TOKENS * 4;  // of what warps add up of a unit,
    static constexpr int TURNS = TOKENS == 2 ? 4 : 2;       // for so many units at a time
    static constexpr int ROOM = kLarge ? TOKENS == 16 ? 221184 : 184320 : 101376;
    static constexpr int FITTING = (ROOM - TURNS * SUMS) / (WARPS * STAGE);
    static constexpr int DEPTH = FITTING < 8 ? FITTING : 8;  // stages of a warp's ring
    static_assert(DEPTH >= 2, "a ring of one stage");
};

// Units of a weight.
template <class S>
__device__ __forceinline__ int units_of(const Part& part) {
    return (part.rows + S::RT * kTileRows - 1) / (S::RT * kTileRows);
}

// The unit's weight and its first row tile there.
template <class S>
__device__ __forceinline__ int find_unit(const Product& p, int unit, int& part) {
    for (part = 0; part + 1 < p.part_count; ++part) {
        const int units = units_of<S>(p.parts[part]);
        if (unit < units) break;
        unit -= units;
    }
    return unit * S::RT;
}

// Queues the copies of one step of a unit into a stage; one group of copies, empty beyond the last unit.
template <class S>
struct Fetcher {
    const Product& p;
    const unsigned ring;
    const int lane, first, steps, units;
    const uint4 *from[S::RT], *cells[S::RT];
    int unit, left = 0, tail = 0, slot = 0;

    __device__ __forceinline__ Fetcher(const Product& p, unsigned ring, int lane, int first, int steps, int units)
        : p(p), ring(ring), lane(lane), first(first), steps(steps), units(units),
          unit((int)blockIdx.x - (int)gridDim.x) {
        start();
    }

    // The next unit of this CTA, if there is one.
    __device__ __forceinline__ void start() {
        unit += gridDim.x;
        if (unit >= units || steps == 0) return;
        int part;
        const int tile = find_unit<S>(p, unit, part);
        const Part& w = p.parts[part];
        tail = w.tail;
        left = steps;
        const int last_tile = (w.rows - 1) / kTileRows;
#pragma unroll
        for (int rt = 0; rt < S::RT; ++rt) {
            const long long record = (long long)min(tile + rt, last_tile) * p.steps + first;
            from[rt] = w.tiles + record * S::VECTORS * 32 + lane;
            cells[rt] = w.cells + record * tail + lane;
        }
    }

    __device__ __forceinline__ void next() {
        if (left > 0) {
            const unsigned to = ring + slot + lane * 16;
#pragma unroll
            for (int rt = 0; rt < S::RT; ++rt) {
                const unsigned at = to + rt * S::RECORD;
#pragma unroll
                for (int v = 0; v < S::VECTORS; ++v) copy_async_16(at + v * 512, from[rt] + v * 32, true);
                copy_16_if(at + S::CODES, cells[rt], lane < tail);
                from[rt] += S::VECTORS * 32;
                cells[rt] += tail;
            }
            if (--left == 0) start();
        }
        copy_async_commit();
        slot = slot == (S::DEPTH - 1) * S::STAGE ? 0 : slot + S::STAGE;
    }
};

template <class S>
using Sums = float[S::RT][S::NT][4];

// What a unit's weight has instead of zeros in its records.
struct Zero {
    bool differ;
    float value;
};

// Where a lane finds its tokens: 16 bytes of every sub-block, of every eight tokens one or none; and the sums
// over sub-blocks of the two tokens whose outputs it has.
template <class S>
struct Tokens {
    const half_t* x[S::NT];
    bool there[S::NT];
    const float* sums[S::NT][2];
};

// The sums of x over a cell's columns, as multiples of what a code of 1 is, negative.
template <class S>
__device__ __forceinline__ void sums_of_x(const Tokens<S>& tokens, int block, float (&sums)[S::NT][2]) {
#pragma unroll
    for (int n = 0; n < S::NT; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* at = tokens.sums[n][i] + block;
            float sum = at[0];
            if (S::EVERY == 2) {
                const float2 v = *(const float2*)at;
                sum = v.x + v.y;
            } else if (S::EVERY == 4) {
                const float4 v = *(const float4*)at;
                sum = (v.x + v.y) + (v.z + v.w);
            }
            sums[n][i] = sum * (-1.0f / kUnit);
        }
}

// What the sums of codes * x begin with, so that they become those of (code - zero) * x.
template <class S>
__device__ __forceinline__ void begin_cell(float (&codes)[S::NT][4], const float (&sums)[S::NT][2],
                                           const unsigned char* cells, int cell, Zero zero, int lane) {
    const unsigned char* zeros = cells + S::CELLS * 32 + cell * kTileRows + lane / 4;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const float z = (zero.differ ? zeros[8 * below] : zero.value) * (below ? 1 << kLift<S::BITS> : 1);
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) codes[n][2 * below + i] = z * sums[n][i];
    }
}

// acc += scale * sum of (code - zero) * x over the columns of a cell.
template <class S>
__device__ __forceinline__ void end_cell(float (&acc)[S::NT][4], const float (&codes)[S::NT][4],
                                         const unsigned char* cells, int cell, int lane) {
    const half_t* scales = (const half_t*)cells + cell * kTileRows + lane / 4;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const float s = half_to_float(scales[8 * below]) * (below ? kUnit / (1 << kLift<S::BITS>) : kUnit);
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& to = acc[n][2 * below + i];
                to = fmaf(s, codes[n][2 * below + i], to);
            }
    }
}

// One step of a unit.
template <class S>
__device__ __forceinline__ void multiply_step(const unsigned char* stage, const Tokens<S>& tokens, int step, Zero zero,
                                              int lane, Sums<S>& acc) {
    unsigned words[S::RT][4 * S::VECTORS];
#pragma unroll
    for (int i = 0; i < S::RT * S::VECTORS; ++i) {
        const int rt = i / S::VECTORS, vector = i % S::VECTORS;
        const uint4 v = *(const uint4*)(stage + rt * S::RECORD + vector * 512 + lane * 16);
        unsigned* to = words[rt] + vector * 4;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    const half_t* x[S::NT];
#pragma unroll
    for (int n = 0; n < S::NT; ++n) x[n] = tokens.x[n] + step * S::SUBS * kSub;
    float codes[S::RT][S::NT][4];
#pragma unroll
    for (int sub = 0; sub < S::SUBS; ++sub) {
        const int block = step * S::SUBS + sub, cell = sub / S::EVERY;
        uint4 b[S::NT];
#pragma unroll
        for (int n = 0; n < S::NT; ++n) {
            // A lane without a token would cost a read of its own.
            b[n] = {0, 0, 0, 0};
            if (tokens.there[n]) b[n] = *(const uint4*)(x[n] + sub * kSub);
        }
        if (S::BITS < 16 && sub % S::EVERY == 0) {
            float sums[S::NT][2];
            sums_of_x<S>(tokens, block, sums);
#pragma unroll
            for (int rt = 0; rt < S::RT; ++rt) {
                begin_cell<S>(codes[rt], sums, stage + rt * S::RECORD + S::CODES, cell, zero, lane);
            }
        }
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
            if (S::BITS < 16 && (sub + 1) % S::EVERY == 0) {
                end_cell<S>(acc[rt], codes[rt], stage + rt * S::RECORD + S::CODES, cell, lane);
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
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = n * 8 + lane % 4 * 2 + i % 2, row = rt * kTileRows + lane / 4 + i / 2 * 8;
                if (token < tokens) sums[(warp * tokens + token) * S::ROWS + row] = acc[rt][n][i];
            }
}

// Adds up all warps' sums of a unit, by so many threads.
template <class S>
__device__ __forceinline__ void add_up(const Product& p, const float* sums, const Part& w, int tile, int thread,
                                       int threads) {
    for (int i = thread; i < S::ROWS * p.tokens; i += threads) {
        const int row = tile * kTileRows + i % S::ROWS, token = i / S::ROWS;
        if (row >= w.rows) continue;
        float* out = w.out + (long long)token * w.out_stride + row;
        const float before = (p.add ? *out : 0.0f) + (w.bias ? w.bias[row] : 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < S::WARPS; ++from) sum += sums[from * p.tokens * S::ROWS + i];
        *out = before + sum;
    }
}

// A warp's sums of a unit, the turn-th of this block. Of a few tokens one warp after the other adds up those of
// all, while the others go on; a place is written again when it has been read. More are added up by all.
template <class S>
__device__ __forceinline__ void finish_unit(const Product& p, float* all_sums, const Sums<S>& acc, int part, int tile,
                                            int turn, bool last, int warp, int lane) {
    constexpr int THREADS = S::WARPS * 32;
    const int place = turn % S::TURNS, full = 1 + place, empty = 1 + S::TURNS + place;
    float* sums = all_sums + place * (S::SUMS / 4);
    if (S::TOKENS > 2) {
        put_sums<S>(sums, acc, p.tokens, warp, lane);
        __syncthreads();
        add_up<S>(p, sums, p.parts[part], tile, warp * 32 + lane, THREADS);
        return;
    }
    if (turn >= S::TURNS && (turn - S::TURNS) % S::WARPS != warp) await(empty, THREADS);
    put_sums<S>(sums, acc, p.tokens, warp, lane);
    if (turn % S::WARPS != warp) {
        arrive(full, THREADS);
        return;
    }
    await(full, THREADS);
    add_up<S>(p, sums, p.parts[part], tile, lane, 32);
    __syncwarp();
    if (!last) arrive(empty, THREADS);
}

template <class S>
__device__ __forceinline__ void coded_linear(const Product& p) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    unsigned char* ring = (unsigned char*)shared + warp * S::DEPTH * S::STAGE;
    float* sums = (float*)((unsigned char*)shared + S::WARPS * S::DEPTH * S::STAGE);
    const int first = warp * p.steps / S::WARPS, last = (warp + 1) * p.steps / S::WARPS;
    int units = 0;
    for (int i = 0; i < p.part_count; ++i) units += units_of<S>(p.parts[i]);

    launch_next();
    Fetcher<S> fetcher(p, shared_address(ring), lane, first, last - first, units);
    for (int i = 0; i < S::DEPTH - 1; ++i) fetcher.next();
    // The weights are nobody's to write: only from here on something is read that the kernel ahead makes.
    wait_for_last();
    Tokens<S> tokens;
#pragma unroll
    for (int n = 0; n < S::NT; ++n) {
        const int token = n * 8 + lane / 4;
        tokens.there[n] = token < p.tokens;
        tokens.x[n] = p.x + (long long)min(token, p.tokens - 1) * p.x_stride + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Tokens that are not there are another's twin, and nobody asks for their outputs.
            tokens.sums[n][i] = p.x_sums + min(n * 8 + lane % 4 * 2 + i, p.tokens - 1) * (p.x_stride / kSub);
        }
    }
    int slot = 0, turn = 0;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x, ++turn) {
        int part;
        const int tile = find_unit<S>(p, unit, part);
        const Zero zero = {p.parts[part].zeros != 0, (float)p.parts[part].zero};
        Sums<S> acc = {};
        for (int step = first; step < last; ++step) {
            copy_async_wait<S::DEPTH - 2>();
            __syncwarp();
            // Into the stage of the step before, with which every lane is done.
            fetcher.next();
            __syncwarp();
            multiply_step<S>(ring + slot, tokens, step, zero, lane, acc);
            slot = slot == (S::DEPTH - 1) * S::STAGE ? 0 : slot + S::STAGE;
        }
        // The place is used again if there are TURNS units more.
        const bool last = unit + S::TURNS * (int)gridDim.x >= units;
        finish_unit<S>(p, sums, acc, part, tile, turn, last, warp, lane);
    }
}

}  // namespace

#define CODED_LINEAR(BITS, NAME, EVERY, TOKENS, NT, RT, WARPS)                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                                \
        coded_linear_##BITS##_##NAME##_##EVERY(const __grid_constant__ Product p) {            \
        coded_linear<Shape<BITS, EVERY, NT, RT, WARPS, TOKENS>>(p);                            \
    }

// For up to so many tokens. Of one or two, pairs of row tiles are read faster, and single ones are shared out more
// evenly. The launcher knows these numbers, too.
#define CODED_LINEAR_OF(BITS, EVERY)                                             \
    CODED_LINEAR(BITS, pair, EVERY, 2, 1, 2, (kLarge ? 16 : 8))                  \
    CODED_LINEAR(BITS, single, EVERY, 2, 1, 1, (kLarge ? 16 : 8))                \
    CODED_LINEAR(BITS, eight, EVERY, 8, 1, (kLarge ? 2 : 1), (kLarge ? 16 : 8))  \
    CODED_LINEAR(BITS, sixteen, EVERY, 16, 2, (kLarge ? 4 : 1), 8)
