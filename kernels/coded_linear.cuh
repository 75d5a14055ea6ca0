// coded_linear: up to 16 tokens, on cards with much shared memory 4, times weights whose codes lie as coded.cuh says,
// for all widths.
//
// Layout   of up to three weights that read the same tokens: tiles and cells as in coded.cuh, `tail` vectors of
//          cells a step, bias [rows] f32 or null, out [tokens, out_stride] f32, set or added to. x and x_cells as in
//          ordered.cuh, x_stride columns a token. Of several slices shares [slices, units, tokens, rows of a unit] f32
//          instead, which coded_join adds up.
// Launch   slices times so many CTAs that each has a multiprocessor, or fewer. Dynamic shared memory: Shape's rings and
//          sums, and the inputs of a slice.
// Regime   memory: every code is read once, whatever the number of tokens. Of 16 tokens tensor cores and schedulers.
// Bound    bits / 8 bytes a code and 2 a scale: 117 MB of 8192 x 28672 at 4 bits take 29 us at 4 TB/s. A lane
//          spends about one instruction a code, a third of what four schedulers give meanwhile.
//
// An input is a whole number of 16 bits times a power of two that its cell's columns share: what fp16 holds of it, but
// for bits that are below 2^-16 of the largest one there. Its two bytes are two columns of integer tensor cores'
// products with the codes, as they are, whose sums are exact; a weight is scale (code - zero), and the sums begin with
// -zero times that of the inputs.
#pragma once
#include "coded_ring.cuh"

namespace {

// Sums begin with what makes their bits those of a float, kMagic and the sum: its low bits hold 22 and a sign, and
// 255 * 128 * 128, of a cell, are less.
constexpr int kMagic = 0x4b400000;
constexpr float kMagicValue = 12582912.0f;

// d[16x8] += a[16x32] . b[32x8], codes times signed bytes; lanes hold of d what multiply_add's do.
__device__ __forceinline__ void multiply_add_bytes(int (&d)[4], const unsigned (&a)[4], uint2 b) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Fours of tokens.
template <class S>
constexpr int kFours = S::TOKENS / 4;

// Of every four tokens a lane's one, two rows of every tile.
template <class S>
using Sums = float[S::RT][kFours<S>][2];

// What a unit's weight has instead of zeros in its records.
struct Zero {
    bool differ;
    int value;
};

// Where a lane finds the inputs of its steps: a byte of one token's of every four, which it gives to products, and the
// cells of the token whose sums it gets.
template <class S>
struct Inputs {
    const unsigned char* x[kFours<S>];
    const int4* cells[kFours<S>];
};

// Those of a cell.
template <class S>
struct CellInputs {
    uint2 x[kFours<S>][S::EVERY];
    int4 cells[kFours<S>];
};

constexpr int kPair = 128;  // bytes of two sub-blocks' inputs

template <class S>
__device__ __forceinline__ CellInputs<S> inputs_of(const Inputs<S>& inputs, int step, int cell) {
    CellInputs<S> of;
#pragma unroll
    for (int n = 0; n < kFours<S>; ++n) {
        const unsigned char* x = inputs.x[n] + step * (S::SUBS / 2 * kPair);
#pragma unroll
        for (int i = 0; i < S::EVERY; ++i) {
            const int sub = cell * S::EVERY + i;
            if (S::EVERY == 1) {
                of.x[n][i] = *(const uint2*)(x + sub / 2 * kPair + sub % 2 * 8);
            } else if (i % 2 == 0) {
                const uint4 both = *(const uint4*)(x + sub / 2 * kPair);
                of.x[n][i] = {both.x, both.y}, of.x[n][i + 1] = {both.z, both.w};
            }
        }
        of.cells[n] = inputs.cells[n][step * S::CELLS + cell];
    }
    return of;
}

// A row of one token's inputs and cells, `bytes` of them and `cell_bytes`, from global to shared memory by so many
// threads: as many are under way at a time as eight lanes have of 512 columns.
__device__ __forceinline__ void stage_token(unsigned char* x, unsigned char* cells, const unsigned char* from_x,
                                            const unsigned char* from_cells, int bytes, int cell_bytes, int thread,
                                            int threads) {
    constexpr int AT_A_TIME = 9;
    for (int first = thread * 16; first < bytes + cell_bytes; first += AT_A_TIME * 16 * threads) {
        uint4 v[AT_A_TIME];
#pragma unroll
        for (int k = 0; k < AT_A_TIME; ++k) {
            const int at = first + k * 16 * threads;
            if (at < bytes + cell_bytes) v[k] = *(const uint4*)(at < bytes ? from_x + at : from_cells + (at - bytes));
        }
#pragma unroll
        for (int k = 0; k < AT_A_TIME; ++k) {
            const int at = first + k * 16 * threads;
            if (at < bytes + cell_bytes) *(uint4*)(at < bytes ? x + at : cells + (at - bytes)) = v[k];
        }
    }
}

// Brings the inputs of a slice into shared memory; each warp its own, where it does not take all of them.
template <class S>
__device__ __forceinline__ Inputs<S> stage_inputs(const Product& p, const Share& share, unsigned char* shared,
                                                  int warp, int lane) {
    constexpr int STEP = S::SUBS / 2 * kPair, CELLS = S::CELLS * 16;
    constexpr bool ALL = S::TURNS == 0;
    const int thread = ALL ? warp * 32 + lane : lane, threads = ALL ? S::WARPS * 32 : 32;
    const int most = (p.steps + p.slices - 1) / p.slices, row = most * STEP, cell_row = most * CELLS + 16;
    const int before = share.first - share.slice_first;
    unsigned char *x = shared + before * STEP, *cells = shared + p.tokens * row + before * CELLS;
    const int lanes = p.tokens == 1 ? threads : p.tokens == 2 ? threads / 2 : 8;
    for (int token = thread / lanes; token < p.tokens; token += threads / lanes) {
        stage_token(x + token * row, cells + token * cell_row,
                    (const unsigned char*)p.x + share.first * STEP + 2ll * token * p.x_stride,
                    (const unsigned char*)p.x_cells + (token * (long long)p.steps + share.first) * CELLS,
                    share.steps * STEP, share.steps * CELLS, thread % lanes, lanes);
    }
    if (ALL) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    Inputs<S> inputs;
#pragma unroll
    for (int n = 0; n < kFours<S>; ++n) {
        // Tokens that are not there are another's twin, and nobody asks for their outputs.
        inputs.x[n] = x + min(4 * n + lane / 8, p.tokens - 1) * row + lane / 4 % 2 * 64 + lane % 4 * 16;
        inputs.cells[n] = (const int4*)(cells + min(4 * n + lane % 4, p.tokens - 1) * cell_row);
    }
    return inputs;
}

// What the sums of codes times bytes begin with, so that they become those of (code - zero) times bytes.
template <class S>
__device__ __forceinline__ void begin_cell(int (&sums)[kFours<S>][4], const int4 (&cells)[kFours<S>],
                                           const unsigned char* stage, int cell, Zero zero, int lane) {
    int above = zero.value, below = zero.value;
    if (zero.differ) {
        const unsigned both = *(const unsigned short*)(stage + S::CODES + S::CELLS * 32 + cell * kTileRows + lane / 4 * 2);
        above = both & 0xff, below = both >> 8;
    }
    below <<= kLift<S::BITS>;
#pragma unroll
    for (int n = 0; n < kFours<S>; ++n) {
        sums[n][0] = above * cells[n].x + kMagic, sums[n][1] = above * cells[n].y + kMagic;
        sums[n][2] = below * cells[n].x + kMagic, sums[n][3] = below * cells[n].y + kMagic;
    }
}

// acc += scale * sum of (code - zero) * x over the columns of a cell.
template <class S>
__device__ __forceinline__ void end_cell(float (&acc)[kFours<S>][2], const int (&sums)[kFours<S>][4],
                                         const int4 (&cells)[kFours<S>], const unsigned char* stage, int cell, int lane) {
    const float2 scales = half2_to_floats(*(const half2_t*)(stage + S::CODES + cell * 32 + lane / 4 * 4));
#pragma unroll
    for (int n = 0; n < kFours<S>; ++n) {
        const float unit = __int_as_float(cells[n].z);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float low = __int_as_float(sums[n][2 * i]) - kMagicValue;
            const float high = __int_as_float(sums[n][2 * i + 1]) - kMagicValue;
            acc[n][i] = fmaf((i ? scales.y : scales.x) * unit, fmaf(256.0f, high, low), acc[n][i]);
        }
    }
}

// One step of a unit.
template <class S>
__device__ __forceinline__ void multiply_step(const unsigned char* stage, const Inputs<S>& inputs, int step, Zero zero,
                                              int lane, Sums<S>& acc) {
    // As many row tiles side by side as make four products that do not wait for one another.
    constexpr int NT = kFours<S>, SIDE = NT >= 4 ? 1 : 4 / NT < S::RT ? 4 / NT : S::RT;
    unsigned words[S::RT][4 * S::VECTORS];
    read_stage<S>(stage, lane, words);
#pragma unroll
    for (int cell = 0; cell < S::CELLS; ++cell) {
        const CellInputs<S> in = inputs_of<S>(inputs, step, cell);
#pragma unroll
        for (int first = 0; first < S::RT; first += SIDE) {
            int sums[SIDE][NT][4];
#pragma unroll
            for (int rt = 0; rt < SIDE; ++rt) {
                begin_cell<S>(sums[rt], in.cells, stage + (first + rt) * S::RECORD, cell, zero, lane);
            }
#pragma unroll
            for (int i = 0; i < S::EVERY; ++i)
#pragma unroll
                for (int rt = 0; rt < SIDE; ++rt) {
                    unsigned a[4];
                    operand_of<S::BITS>(words[first + rt], cell * S::EVERY + i, a);
#pragma unroll
                    for (int n = 0; n < NT; ++n) multiply_add_bytes(sums[rt][n], a, in.x[n][i]);
                }
#pragma unroll
            for (int rt = 0; rt < SIDE; ++rt) {
                end_cell<S>(acc[first + rt], sums[rt], in.cells, stage + (first + rt) * S::RECORD, cell, lane);
            }
        }
    }
}

// Hands on a warp's sums of a unit, row by row and token by token.
template <class S, class Put>
__device__ __forceinline__ void each_sum(const Sums<S>& acc, int tokens, int lane, Put put) {
#pragma unroll
    for (int rt = 0; rt < S::RT; ++rt)
#pragma unroll
        for (int n = 0; n < kFours<S>; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = n * 4 + lane % 4, row = rt * kTileRows + lane / 4 + i * 8;
                if (token < tokens) put(row, token, acc[rt][n][i] * (i ? 1.0f / (1 << kLift<S::BITS>) : 1.0f));
            }
}

// The sums of a warp that takes all steps of a unit: the outputs, or a slice's share of them.
template <class S>
__device__ __forceinline__ void put_unit(const Product& p, const Share& share, const Sums<S>& acc, int unit, const Part& w,
                                         int tile, int lane) {
    float* shares = p.shares + ((long long)share.slice * share.units + unit) * S::ROWS * p.tokens;
    each_sum<S>(acc, p.tokens, lane, [&](int row, int token, float sum) {
        if (p.slices > 1) {
            shares[token * S::ROWS + row] = sum;
        } else if (tile * kTileRows + row < w.rows) {
            put_output(p, w, tile * kTileRows + row, token, sum);
        }
    });
}

template <class S>
__device__ __forceinline__ void coded_linear(const Product& p) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    unsigned char* const base = (unsigned char*)shared;
    unsigned char* ring = base + warp * S::DEPTH * S::STAGE;
    float* all_sums = (float*)(base + S::RINGS);
    const Share share = share_of<S>(p, warp);

    launch_next();
    Fetcher<S> fetcher(p, share, shared_address(ring), lane);
#pragma unroll 1
    for (int i = 0; i < S::DEPTH - 1; ++i) fetcher.next();
    // The weights are nobody's to write: only from here on something is read that the kernel ahead makes.
    wait_for_last();
    const Inputs<S> inputs = stage_inputs<S>(p, share, base + S::RINGS + S::TURNS * S::SUMS, warp, lane);
    int slot = 0, turn = 0;
    for (int unit = share.unit; unit < share.units; unit += share.apart, ++turn) {
        int part;
        const int tile = find_unit<S>(p, unit, part);
        const Zero zero = {p.parts[part].zeros != 0, p.parts[part].zero};
        Sums<S> acc = {};
        for (int step = 0; step < share.steps; ++step) {
            copy_async_wait<S::DEPTH - 2>();
            __syncwarp();
            // Into the stage of the step before, with which every lane is done.
            fetcher.next();
            __syncwarp();
            multiply_step<S>(ring + slot, inputs, step, zero, lane, acc);
            slot = slot == (S::DEPTH - 1) * S::STAGE ? 0 : slot + S::STAGE;
        }
        if constexpr (S::TURNS == 0) {
            put_unit<S>(p, share, acc, unit, p.parts[part], tile, lane);
        } else {
            finish_unit<S>(p, share, all_sums, unit, part, tile, turn, warp, lane, [&](float* sums) {
                each_sum<S>(acc, p.tokens, lane, [&](int row, int token, float sum) {
                    sums[(warp * p.tokens + token) * S::ROWS + row] = sum;
                });
            });
        }
    }
}

}  // namespace

#define CODED_LINEAR(BITS, NAME, EVERY, TOKENS, RT, WARPS, TURNS, ROOM)                     \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                             \
        coded_linear_##BITS##_##NAME##_##EVERY(const __grid_constant__ Product p) {         \
        coded_linear<Shape<BITS, EVERY, RT, WARPS, TOKENS, TURNS, ROOM>>(p);                \
    }

// For up to so many tokens. Pairs of row tiles are read faster, and single ones are shared out more evenly; both leave
// shared memory to the small kernels of a step, which are on the card before a product is done. Of many, each warp has
// units of its own; on cards with much shared memory coded_stream takes them. The launcher knows these numbers, too.
#ifdef LARGE
#define CODED_LINEAR_OF(BITS, EVERY)                       \
    CODED_LINEAR(BITS, pair, EVERY, 4, 2, 16, 2, 163840)   \
    CODED_LINEAR(BITS, single, EVERY, 4, 1, 16, 2, 163840)
#else
#define CODED_LINEAR_OF(BITS, EVERY)                       \
    CODED_LINEAR(BITS, pair, EVERY, 4, 1, 8, 2, 75776)     \
    CODED_LINEAR(BITS, single, EVERY, 4, 1, 8, 2, 75776)   \
    CODED_LINEAR(BITS, eight, EVERY, 8, 1, 8, 0, 75776)    \
    CODED_LINEAR(BITS, sixteen, EVERY, 16, 1, 8, 0, 75776)
#endif
