// coded_tiles: a weight in the order of coded.cuh, and back as fp16 in the order of its columns there.
//
// Layout   codes [rows, cols] a byte each, or fp16 values [rows, cols], row major; places [steps * SUBS *
//          32] the column that stands at each place, -1 for none, or null. Tiles and cells, `tail` vectors a step, as
//          in coded.cuh. Back: out [rows, steps * SUBS * 32] fp16; `every` sub-blocks have a cell, its zeros are
//          there or all `zero`.
// Launch   256 threads, grid-stride: over words when tiles are made, over a lane's steps on the way back.
// Regime   memory, once when a model is loaded; on the way back for prompts of more than 16 tokens.
// Bound    a byte read and bits / 8 written a code; back bits / 8 read and 2 bytes written, at 3 TB/s 0.2 ms
//          for 8192 x 28672.
#include "coded.cuh"

namespace {

template <int BITS, class Value>
__device__ __forceinline__ void make_tiles(const Value* values, const int* places, unsigned* tiles, int rows,
                                           int cols, int steps, int row_tiles) {
    constexpr int WORDS = 4 * kVectors<BITS> * 32;
    const long long count = (long long)row_tiles * steps * WORDS;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const int at = i % WORDS, step = i / WORDS % steps, tile = i / WORDS / steps;
        const int lane = at / 4 % 32, word = at / 128 * 4 + at % 4;
        // Of a word's code or value: its sub-block, register or pair, and byte or half.
        tiles[i] = word_of<BITS>(word, [&](int sub, int r, int part) -> unsigned {
            const int row = tile * kTileRows + lane / 4 + 8 * (r % 2);
            const int in_eight = BITS < 16 ? r / 2 * 4 + part : r / 4 * 4 + r / 2 % 2 * 2 + part;
            const int place = (step * kSubs<BITS> + sub) * kSub + 8 * (lane % 4) + in_eight;
            const int column = places ? places[place] : place < cols ? place : -1;
            return row < rows && column >= 0 ? values[(long long)row * cols + column] : 0;
        });
    }
}

// Four codes of a word as fp16 values.
__device__ __forceinline__ uint2 widened(unsigned codes, float scale, float zero) {
    const auto value = [&](int i) { return scale * ((codes >> 8 * i & 0xff) - zero); };
    return {floats_to_half2(value(0), value(1)), floats_to_half2(value(2), value(3))};
}

template <int BITS>
__device__ __forceinline__ void widen(const uint4* tiles, const uint4* cells, int every, bool zeros, int zero,
                                      half_t* out, int rows, int steps, int row_tiles, int tail) {
    constexpr int VECTORS = kVectors<BITS>, SUBS = kSubs<BITS>;
    const long long count = (long long)row_tiles * steps * 32;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < count; i += gridDim.x * 256ll) {
        const int lane = i % 32, step = i / 32 % steps, tile = i / 32 / steps;
        const uint4* record = tiles + i / 32 * VECTORS * 32;
        const half_t* scales = (const half_t*)(cells + i / 32 * tail);
        const unsigned char* places = (const unsigned char*)(scales + SUBS / every * kTileRows);
        unsigned words[4 * VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const uint4 part = record[v * 32 + lane];
            words[4 * v] = part.x, words[4 * v + 1] = part.y;
            words[4 * v + 2] = part.z, words[4 * v + 3] = part.w;
        }
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) {
            unsigned a[4];
            if (BITS < 16) operand_of<BITS>(words, sub, a);
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                const int row = tile * kTileRows + lane / 4 + 8 * below;
                if (row >= rows) continue;
                uint4 eight;
                if (BITS < 16) {
                    const int cell = sub / every * kTileRows + lane / 4 * 2 + below;
                    const int lift = below ? kLift<BITS> : 0;
                    const float s = half_to_float(scales[cell]), z = zeros ? places[cell] : zero;
                    const uint2 low = widened(a[below] >> lift, s, z), high = widened(a[2 + below] >> lift, s, z);
                    eight = {low.x, low.y, high.x, high.y};
                } else {
                    const unsigned* pairs = words + 8 * sub + below;
                    eight = {pairs[0], pairs[2], pairs[4], pairs[6]};
                }
                const long long at = ((long long)row * steps * SUBS + step * SUBS + sub) * kSub + 8 * (lane % 4);
                *(uint4*)(out + at) = eight;
            }
        }
    }
}

}  // namespace

#define CODED_TILES(BITS, VALUE)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) coded_tiles_##BITS(                                   \
        const VALUE* values, const int* places, unsigned* tiles, int rows, int cols, int steps,             \
        int row_tiles) {                                                                                    \
        make_tiles<BITS>(values, places, tiles, rows, cols, steps, row_tiles);                              \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) coded_widen_##BITS(                                   \
        const uint4* tiles, const uint4* cells, int every, int zeros, int zero, half_t* out, int rows,      \
        int steps, int row_tiles, int tail) {                                                               \
        widen<BITS>(tiles, cells, every, zeros, zero, out, rows, steps, row_tiles, tail);                   \
    }

CODED_TILES(2, unsigned char)
CODED_TILES(3, unsigned char)
CODED_TILES(4, unsigned char)
CODED_TILES(8, unsigned char)
CODED_TILES(16, half_t)
