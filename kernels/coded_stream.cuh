// coded_stream: 5 to 16 tokens times weights whose codes lie as coded.cuh says, on cards with 227 KiB of shared memory a
// block and bulk copies (sm_90, sm_100).
//
// Layout   of up to three weights that read the same tokens: tiles and cells as in coded.cuh, bias [rows] f32 or null,
//          out [tokens, out_stride] f32, set or added to. x and x_cells as ordered.cuh has them for streams, of TOKENS
//          slots. stream_shares [units + blocks][TOKENS * ROWS] f32, in lanes' order, all zero, which they are again
//          afterwards. maps: tiles as [row tiles][steps][codes of a step] and cells likewise, boxes
//          of a step of RT row tiles.
// Launch   as many CTAs as multiprocessors, or steps of all units if these are fewer; all of them have to be on the card
//          at once, or those before them to end without them: see put_stream_unit. Dynamic shared memory: Stream's.
// Regime   memory, and the second-level cache: inputs are read again for every 256 rows, a quarter as many bytes as codes
//          of 4 bits for 16 tokens.
// Bound    bits / 8 bytes a code and 2 a scale, as in coded_linear.cuh.
//
// Weights and inputs come through one ring, which a warp that does nothing else keeps full. The steps of all units are
// one line, cut into as many equal ranges as there are CTAs; the sums of a unit that is in several ranges are added up in
// their order by the one that has its first step.
//
// Codes are fp16 values as they are, 2^-24 of what they mean, and so are those of the lower rows, which are higher by
// kLift bits: tensor cores take them for what they are, and each product is exact. A weight is scale (code - zero): of
// the sum of a cell its zero times that of the inputs is taken off.
#pragma once
#include "bulk.cuh"
#include "coded_ring.cuh"

// Tiles and cells of each weight.
struct Maps {
    TensorMap tiles[3], cells[3];
};

namespace {

template <int BITS_, int EVERY_, int TOKENS_>
struct Stream {
    static constexpr int BITS = BITS_, EVERY = EVERY_, TOKENS = TOKENS_;
    static constexpr int RT = 16, ROWS = RT * kTileRows;       // row tiles and rows of a unit,
    static constexpr int WARPS = 16, RTW = RT / WARPS;         // and of a warp
    static constexpr int LANES = WARPS * 32;
    static constexpr int VECTORS = kVectors<BITS>, SUBS = kSubs<BITS>, CELLS = SUBS / EVERY;
    static constexpr int CODES = VECTORS * 512;                // bytes of a row tile's codes of a step
    static constexpr int X = SUBS * kSub * TOKENS * 2;         // of the inputs
    static constexpr int X_CELLS = CELLS * TOKENS * 4;         // and their sums
    static constexpr int AT_CELLS = RT * CODES, AT_X = AT_CELLS + RT * CELLS * 48, AT_X_CELLS = AT_X + X;
    static constexpr int STAGE = (AT_X_CELLS + X_CELLS + 127) / 128 * 128;
    static constexpr int FITTING = 230144 / (STAGE + 16);      // with two barriers each
    static constexpr int DEPTH = FITTING < 12 ? FITTING : 12;
    static constexpr int SUMS = TOKENS / 2;                    // of a row tile in a lane
    static constexpr int SHARE = LANES * RTW * SUMS;
    static_assert(DEPTH >= 2, "a ring of one stage");
};

// The words of a lane that the codes of a sub-block are in.
template <int BITS>
__host__ __device__ constexpr int first_word(int sub) {
    return BITS == 3 ? sub / 2 * 3 : sub * BITS / 2;
}
template <int BITS>
__host__ __device__ constexpr int last_word(int sub) {
    return BITS == 3 ? sub / 2 * 3 + 2 : (sub + 1) * BITS / 2 - 1;
}

// The operand of 16 columns of a sub-block, those whose places modulo 8 are 4 h to 4 h + 3: of every such four the first
// and third, then the second and fourth.
template <int BITS>
__device__ __forceinline__ void halves_of(const unsigned (&words)[4 * kVectors<BITS>], int sub, int h, unsigned (&a)[4]) {
    if (BITS == 8) {
        const unsigned above = words[4 * sub + 2 * h], below = words[4 * sub + 2 * h + 1];
        a[0] = above & 0x00ff00ffu, a[1] = below & 0x00ff00ffu;
        a[2] = above >> 8 & 0x00ff00ffu, a[3] = below >> 8 & 0x00ff00ffu;
        return;
    }
    constexpr unsigned MASK = ((1u << BITS) - 1) * 0x00010001u;
    unsigned w;
    if (BITS == 2) {
        w = words[sub] >> 4 * h;
    } else if (BITS == 3) {
        const unsigned* three = words + sub / 2 * 3;
        const int at = sub % 2 * 2 + h;
        if (at < 3) {
            w = three[at];
        } else {
            w = (three[0] >> 6 & 0x03030303u) | (three[1] >> 4 & 0x0c0c0c0cu) | (three[2] >> 2 & 0x30303030u);
        }
    } else {
        w = words[2 * sub + h];
    }
    const unsigned next = w >> 8;
    a[0] = w & MASK, a[1] = w & MASK << kLift<BITS>;
    a[2] = next & MASK, a[3] = next & MASK << kLift<BITS>;
}

// First step of a block's range of so many.
__device__ __forceinline__ int first_of(int block, int steps) { return (int)((long long)block * steps / gridDim.x); }

// The unit's weight and its first row tile there.
template <class S>
__device__ __forceinline__ int find_stream_unit(const Product& p, int unit, int& part) {
    for (part = 0; part + 1 < p.part_count; ++part) {
        const int units = (p.parts[part].rows + S::ROWS - 1) / S::ROWS;
        if (unit < units) break;
        unit -= units;
    }
    return unit * S::RT;
}

// Keeps the ring full of a range's steps; one thread.
template <class S>
__device__ __forceinline__ void fetch_range(const Product& p, const Maps& maps, unsigned ring, unsigned full, unsigned empty,
                                            int first, int last) {
    const auto fetch_inputs = [&](int step, int slot) {
        const unsigned stage = ring + slot * S::STAGE, barrier = full + slot * 8;
        copy_bulk(stage + S::AT_X, (const unsigned char*)p.x + (long long)step * S::X, S::X, barrier);
        copy_bulk(stage + S::AT_X_CELLS, (const unsigned char*)p.x_cells + (long long)step * S::X_CELLS, S::X_CELLS,
                  barrier);
    };
    // The weights are nobody's to write: only the inputs of the first stages wait for the kernel ahead.
    const auto fetch_first_inputs = [&](int count) {
        wait_for_last();
        for (int slot = 0, step = first % p.steps; slot < count; ++slot, step = step + 1 == p.steps ? 0 : step + 1) {
            fetch_inputs(step, slot);
        }
    };
    int unit = first / p.steps, step = first % p.steps, slot = 0, parity = 1, part = 0, tile = 0;
    for (int i = first; i < last; ++i) {
        if (i == first || step == 0) tile = find_stream_unit<S>(p, unit, part);
        if (i == first + S::DEPTH) fetch_first_inputs(S::DEPTH);
        barrier_wait(empty + slot * 8, parity);
        const unsigned stage = ring + slot * S::STAGE, barrier = full + slot * 8;
        const int tail = p.parts[part].tail;
        barrier_expect(barrier, S::RT * (S::CODES + tail * 16) + S::X + S::X_CELLS);
        copy_box(stage, &maps.tiles[part], step * (S::CODES / 8), tile, barrier);
        copy_box(stage + S::AT_CELLS, &maps.cells[part], step * tail * 2, tile, barrier);
        if (i >= first + S::DEPTH) fetch_inputs(step, slot);
        if (++step == p.steps) step = 0, ++unit;
        if (++slot == S::DEPTH) slot = 0, parity ^= 1;
    }
    if (last - first <= S::DEPTH) fetch_first_inputs(last - first);
}

// A lane's sums of a unit, in 2^-24: of two row tiles, as multiply_add has them of every eight tokens.
template <class S>
using StreamSums = float[S::RTW][S::SUMS];

// sums += one step's, of a stage in shared memory.
template <class S>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, const Part& w, int warp, int lane,
                                               StreamSums<S>& sums) {
    constexpr int EIGHTS = S::TOKENS / 8;
    const unsigned x = shared_address(stage) + S::AT_X + lane * 16;
    const float* x_cells = (const float*)(stage + S::AT_X_CELLS);
#pragma unroll
    for (int cell = 0; cell < S::CELLS; ++cell) {
        // The vectors that its codes are in.
        unsigned words[S::RTW][4 * S::VECTORS];
#pragma unroll
        for (int rt = 0; rt < S::RTW; ++rt)
#pragma unroll
            for (int v = first_word<S::BITS>(cell * S::EVERY) / 4;
                 v <= last_word<S::BITS>((cell + 1) * S::EVERY - 1) / 4; ++v) {
                const uint4 four = *(const uint4*)(stage + (warp * S::RTW + rt) * S::CODES + v * 512 + lane * 16);
                unsigned* to = words[rt] + 4 * v;
                to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
            }
        float acc[S::RTW][EIGHTS][4] = {};
        unsigned b[4];
#pragma unroll
        for (int k = 0; k < 2 * S::EVERY; ++k) {
            // Tokens' values of 16 columns, of eight tokens those of 32.
            const int sixteen = cell * S::EVERY * 2 + k;
            if (S::TOKENS == 16 || k % 2 == 0) load_tiles(b, x + sixteen * (32 * S::TOKENS));
#pragma unroll
            for (int rt = 0; rt < S::RTW; ++rt) {
                unsigned a[4];
                halves_of<S::BITS>(words[rt], cell * S::EVERY + k / 2, k % 2, a);
                if (S::TOKENS == 16) {
                    multiply_add(acc[rt][0], a, b[0], b[2]);
                    multiply_add(acc[rt][EIGHTS - 1], a, b[1], b[3]);
                } else {
                    multiply_add(acc[rt][0], a, b[k % 2 * 2], b[k % 2 * 2 + 1]);
                }
            }
        }
        float2 x_sums[EIGHTS];
#pragma unroll
        for (int n = 0; n < EIGHTS; ++n) {
            x_sums[n] = *(const float2*)(x_cells + cell * S::TOKENS + n * 8 + lane % 4 * 2);
        }
#pragma unroll
        for (int rt = 0; rt < S::RTW; ++rt) {
            const unsigned char* cells = stage + S::AT_CELLS + (warp * S::RTW + rt) * w.tail * 16;
            const float2 scales = half2_to_floats(*(const half2_t*)(cells + cell * 32 + lane / 4 * 4));
            int above = w.zero, below = w.zero;
            if (w.zeros) {
                const unsigned both = *(const unsigned short*)(cells + S::CELLS * 32 + cell * kTileRows + lane / 4 * 2);
                above = both & 0xff, below = both >> 8;
            }
            const float off = -0x1p-24f * above, off_below = -0x1p-24f * (below << kLift<S::BITS>);
#pragma unroll
            for (int n = 0; n < EIGHTS; ++n) {
                float* to = sums[rt] + 4 * n;
                to[0] = fmaf(scales.x, fmaf(off, x_sums[n].x, acc[rt][n][0]), to[0]);
                to[1] = fmaf(scales.x, fmaf(off, x_sums[n].y, acc[rt][n][1]), to[1]);
                to[2] = fmaf(scales.y, fmaf(off_below, x_sums[n].x, acc[rt][n][2]), to[2]);
                to[3] = fmaf(scales.y, fmaf(off_below, x_sums[n].y, acc[rt][n][3]), to[3]);
            }
        }
    }
}

// Puts a unit's sums together. A block whose range begins within the unit leaves its own, and waits for nobody; the one
// that has the first step waits for the blocks after it whose ranges meet the unit. A block's range may end with such a
// wait, and the unit with which the next one's begins is done by then, or soon, without any wait: so there is no
// circle, and blocks that were put on the card later get the place of one that is done.
template <class S>
__device__ __forceinline__ void put_stream_unit(const Product& p, const Part& w, int unit, int tile, int first, int last,
                                                int steps, int warp, int lane, StreamSums<S>& sums) {
    const int begin = unit * p.steps, end = begin + p.steps;
    constexpr int FOURS = S::RTW * S::SUMS / 4, ROW_FOURS = S::SUMS / 4;
    float4* const shares = (float4*)p.stream_shares + (long long)(blockIdx.x + unit) * (S::SHARE / 4) + threadIdx.x;
    if (first > begin) {
#pragma unroll
        for (int i = 0; i < FOURS; ++i) {
            const float* four = sums[i / ROW_FOURS] + i % ROW_FOURS * 4;
            leave(shares + i * S::LANES, make_float4(four[0], four[1], four[2], four[3]));
        }
        return;
    }
    constexpr int AT_A_TIME = S::TOKENS == 16 ? 2 : 4;  // blocks
    for (int next = blockIdx.x + 1, limit = last; limit < end;) {
        float4 v[AT_A_TIME][FOURS];
        int count = 0;
        for (; count < AT_A_TIME && limit < end; ++count) limit = first_of(next + count + 1, steps);
        bool all;
        do {
            all = true;
#pragma unroll
            for (int k = 0; k < AT_A_TIME; ++k)
#pragma unroll
                for (int i = 0; i < FOURS; ++i) {
                    const float4* share = shares + (next + k - (int)blockIdx.x) * (S::SHARE / 4) + i * S::LANES;
                    if (k < count) all &= look(share, v[k][i]);
                }
        } while (!all);
#pragma unroll
        for (int k = 0; k < AT_A_TIME; ++k)
#pragma unroll
            for (int i = 0; i < FOURS; ++i) {
                if (k >= count) continue;
                float* to = sums[i / ROW_FOURS] + i % ROW_FOURS * 4;
                to[0] += v[k][i].x, to[1] += v[k][i].y, to[2] += v[k][i].z, to[3] += v[k][i].w;
                clear(shares + (next + k - (int)blockIdx.x) * (S::SHARE / 4) + i * S::LANES);
            }
        next += count;
    }
#pragma unroll
    for (int rt = 0; rt < S::RTW; ++rt)
#pragma unroll
        for (int n = 0; n < S::SUMS; ++n) {
            const int token = n / 4 * 8 + lane % 4 * 2 + n % 2, below = n / 2 % 2;
            const int row = (tile + warp * S::RTW + rt) * kTileRows + lane / 4 + 8 * below;
            const float sum = sums[rt][n] * (below ? 0x1p24f / (1 << kLift<S::BITS>) : 0x1p24f);
            if (token < p.tokens && row < w.rows) put_output(p, w, row, token, sum);
        }
}

template <class S>
__device__ __forceinline__ void coded_stream(const Product& p, const Maps& maps) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    unsigned char* const ring = (unsigned char*)shared;
    const unsigned full = shared_address(ring) + S::DEPTH * S::STAGE, empty = full + S::DEPTH * 8;
    int units = 0;
    for (int i = 0; i < p.part_count; ++i) units += (p.parts[i].rows + S::ROWS - 1) / S::ROWS;
    const int steps = units * p.steps, first = first_of(blockIdx.x, steps), last = first_of(blockIdx.x + 1, steps);

    launch_next();
    if (threadIdx.x == S::LANES) {
        for (int i = 0; i < S::DEPTH; ++i) {
            barrier_make(full + i * 8, 1);
            barrier_make(empty + i * 8, S::WARPS);
        }
        barriers_made();
    }
    __syncthreads();
    if (warp == S::WARPS) {
        if (lane == 0) fetch_range<S>(p, maps, shared_address(ring), full, empty, first, last);
        return;
    }
    int slot = 0, parity = 0, step = first % p.steps;
    for (int i = first, unit = first / p.steps; i < last; ++unit, step = 0) {
        int part;
        const int tile = find_stream_unit<S>(p, unit, part);
        StreamSums<S> sums = {};
        const int end = min(last, i + p.steps - step);
        for (; i < end; ++i) {
            barrier_wait(full + slot * 8, parity);
            multiply_stage<S>(ring + slot * S::STAGE, p.parts[part], warp, lane, sums);
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + slot * 8);
            if (++slot == S::DEPTH) slot = 0, parity ^= 1;
        }
        put_stream_unit<S>(p, p.parts[part], unit, tile, first, last, steps, warp, lane, sums);
    }
}

}  // namespace

#define CODED_STREAM(BITS, NAME, EVERY, TOKENS)                                                     \
    extern "C" __global__ void __launch_bounds__(544, 1) coded_stream_##BITS##_##NAME##_##EVERY(    \
        const __grid_constant__ Product p, const __grid_constant__ Maps maps) {                     \
        coded_stream<Stream<BITS, EVERY, TOKENS>>(p, maps);                                         \
    }

// For up to so many tokens; nothing where there is no such card. The launcher knows these numbers, too.
#ifdef LARGE
#define CODED_STREAM_OF(BITS, EVERY)    \
    CODED_STREAM(BITS, eight, EVERY, 8) \
    CODED_STREAM(BITS, sixteen, EVERY, 16)
#else
#define CODED_STREAM_OF(BITS, EVERY)
#endif
