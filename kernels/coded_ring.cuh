// What products of weights that lie as coded.cuh says have in common: how the work is shared out, the rings that
// weights come through, and how sums are put together.
//
// A weight's row tiles are cut into units of RT, and where a slice's inputs have to be at hand, its steps into slices: a
// CTA keeps to one slice and takes every so many-th unit. Its warps share the steps of a unit, or take units of their
// own. Each lane copies what it alone will read into a ring of its own in shared memory, so that many kilobytes are on
// the way without registers that wait for them; no barrier is needed but for the cells, that lanes of a warp share. The
// sums of the warps are added up in their order, and those of slices by coded_join in theirs: the same inputs give the
// same bytes.
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
    const void* x;
    const int4* x_cells;
    float* shares;
    float* stream_shares;
    int part_count, steps, x_stride, tokens, add, slices;
};
static_assert(sizeof(Product) == 224, "as in product.rs");

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

// Whether a block may have 227 KiB of shared memory (Hopper and the Blackwell of data centers); all others have 99 KiB
// at least.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define LARGE
constexpr bool kLarge = true;
#else
constexpr bool kLarge = false;
#endif

// What a variant takes. TOKENS: the most. RT: row tiles of a unit. EVERY: sub-blocks of a cell. TURNS: units whose sums
// have a place at a time; without, a warp takes whole units, and there is nothing to add up. ROOM: bytes of shared
// memory for rings and sums.
template <int BITS_, int EVERY_, int RT_, int WARPS_, int TOKENS_, int TURNS_, int ROOM>
struct Shape {
    static constexpr int BITS = BITS_, EVERY = EVERY_, RT = RT_, WARPS = WARPS_, TOKENS = TOKENS_, TURNS = TURNS_;
    static constexpr int VECTORS = kVectors<BITS>, SUBS = kSubs<BITS>, CELLS = BITS < 16 ? SUBS / EVERY : 0;
    static constexpr int CODES = VECTORS * 512;             // bytes of a row tile's codes,
    static constexpr int RECORD = CODES + CELLS * 48;       // with cells and zeros,
    static constexpr int STAGE = RT * RECORD;               // of a warp's stage,
    static constexpr int ROWS = RT * kTileRows;
    static constexpr int SUMS = WARPS * ROWS * TOKENS * 4;  // of what warps add up of a unit
    static constexpr int FITTING = (ROOM - TURNS * SUMS) / (WARPS * STAGE);
    static constexpr int DEPTH = FITTING < 8 ? FITTING : 8;  // stages of a warp's ring
    static constexpr int RINGS = WARPS * DEPTH * STAGE;
    static_assert(DEPTH >= 2, "a ring of one stage");
};

// What of a product is a warp's: units from `unit` on, `apart` from one another, of `units`, and of them the steps from
// `first` on; and the steps of its CTA's slice.
struct Share {
    int unit, apart, units, first, steps;
    int slice, slice_first, slice_steps;
};

// Units of a weight.
template <class S>
__device__ __forceinline__ int units_of(const Part& part) {
    return (part.rows + S::RT * kTileRows - 1) / (S::RT * kTileRows);
}

template <class S>
__device__ __forceinline__ Share share_of(const Product& p, int warp) {
    Share share;
    int group = blockIdx.x, groups = gridDim.x;
    share.slice = share.slice_first = 0, share.slice_steps = p.steps;
    if (p.slices > 1) {
        group /= p.slices, groups /= p.slices;
        share.slice = blockIdx.x % p.slices;
        share.slice_first = share.slice * p.steps / p.slices;
        share.slice_steps = (share.slice + 1) * p.steps / p.slices - share.slice_first;
    }
    if (S::TURNS == 0) {
        share.unit = group * S::WARPS + warp, share.apart = groups * S::WARPS;
        share.first = share.slice_first, share.steps = share.slice_steps;
    } else {
        share.unit = group, share.apart = groups;
        share.first = share.slice_first + warp * share.slice_steps / S::WARPS;
        share.steps = share.slice_first + (warp + 1) * share.slice_steps / S::WARPS - share.first;
    }
    share.units = 0;
    for (int i = 0; i < p.part_count; ++i) share.units += units_of<S>(p.parts[i]);
    return share;
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
    const Share& share;
    const unsigned ring;
    const int lane;
    const uint4 *from[S::RT], *cells[S::RT];
    int unit, left = 0, tail = 0, slot = 0;

    __device__ __forceinline__ Fetcher(const Product& p, const Share& share, unsigned ring, int lane)
        : p(p), share(share), ring(ring), lane(lane), unit(share.unit - share.apart) {
        start();
    }

    // The warp's next unit, if there is one.
    __device__ __forceinline__ void start() {
        unit += share.apart;
        if (unit >= share.units || share.steps == 0) return;
        int part;
        const int tile = find_unit<S>(p, unit, part);
        const Part& w = p.parts[part];
        tail = w.tail;
        left = share.steps;
        const int last_tile = (w.rows - 1) / kTileRows;
#pragma unroll
        for (int rt = 0; rt < S::RT; ++rt) {
            const long long record = (long long)min(tile + rt, last_tile) * p.steps + share.first;
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
                if (S::CELLS > 0) copy_16_if(at + S::CODES, cells[rt], lane < tail);
                from[rt] += S::VECTORS * 32;
                cells[rt] += tail;
            }
            if (--left == 0) start();
        }
        copy_async_commit();
        slot = slot == (S::DEPTH - 1) * S::STAGE ? 0 : slot + S::STAGE;
    }
};

// A lane's words of a stage.
template <class S>
__device__ __forceinline__ void read_stage(const unsigned char* stage, int lane,
                                           unsigned (&words)[S::RT][4 * S::VECTORS]) {
#pragma unroll
    for (int i = 0; i < S::RT * S::VECTORS; ++i) {
        const int rt = i / S::VECTORS, vector = i % S::VECTORS;
        const uint4 v = *(const uint4*)(stage + rt * S::RECORD + vector * 512 + lane * 16);
        unsigned* to = words[rt] + vector * 4;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
}

// Adds a unit's finished sum to what its output begins with.
__device__ __forceinline__ void put_output(const Product& p, const Part& w, int row, int token, float sum) {
    float* out = w.out + (long long)token * w.out_stride + row;
    *out = (p.add ? *out : 0.0f) + (w.bias ? w.bias[row] : 0.0f) + sum;
}

// Adds up all warps' sums of a unit, by so many threads: the outputs, or a slice's share of them.
template <class S>
__device__ __forceinline__ void add_up(const Product& p, const Share& share, const float* sums, const Part& w, int unit,
                                       int tile, int thread, int threads) {
    const int size = S::ROWS * p.tokens;
    float* shares = p.shares + ((long long)share.slice * share.units + unit) * size;
    for (int i = thread; i < size; i += threads) {
        const int row = tile * kTileRows + i % S::ROWS, token = i / S::ROWS;
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < S::WARPS; ++from) sum += sums[from * size + i];
        if (p.slices > 1) {
            shares[i] = sum;
        } else if (row < w.rows) {
            put_output(p, w, row, token, sum);
        }
    }
}

// Puts a unit's sums together, the turn-th of this CTA; `put(sums)` leaves a warp's own. Of a few tokens one warp after
// the other adds up those of all, while the others go on; a place is written again when it has been read. More are
// added up by all.
template <class S, class Put>
__device__ __forceinline__ void finish_unit(const Product& p, const Share& share, float* all_sums, int unit, int part,
                                            int tile, int turn, int warp, int lane, Put put) {
    constexpr int THREADS = S::WARPS * 32;
    const int place = turn % S::TURNS, full = 1 + place, empty = 1 + S::TURNS + place;
    float* sums = all_sums + place * (S::SUMS / 4);
    const Part& w = p.parts[part];
    if (S::TOKENS > 4) {
        put(sums);
        __syncthreads();
        add_up<S>(p, share, sums, w, unit, tile, warp * 32 + lane, THREADS);
        return;
    }
    if (turn >= S::TURNS && (turn - S::TURNS) % S::WARPS != warp) await(empty, THREADS);
    put(sums);
    if (turn % S::WARPS != warp) {
        arrive(full, THREADS);
        return;
    }
    await(full, THREADS);
    add_up<S>(p, share, sums, w, unit, tile, lane, 32);
    __syncwarp();
    // The place is used again if there are TURNS units more.
    if (unit + S::TURNS * share.apart < share.units) arrive(empty, THREADS);
}

}  // namespace
