// How weights that stay on the device lie: tiles in the order in which tensor cores take them.
//
// A weight [rows, columns] is cut into tiles of 16 rows, and its columns (side by side by group, filled
// up with columns that nothing is multiplied with) into sub-blocks of 32. A lane of a warp holds of a
// sub-block the columns 8 (lane % 4) .. + 7 of rows lane / 4 and lane / 4 + 8: what it gives to two
// products m16n8k16, whose sums do not mind in which order columns come. A lane so takes eight
// neighbors of a token's row, 16 bytes, as the other operand.
//
// Pair i = 4 t + f of a lane's eight pairs is register f of product t: row lane / 4 + 8 (f % 2), columns
// 8 (lane % 4) + 4 t + 2 (f / 2) and the next. Its codes lie in the halves of a word, so that a shift and
// a mask make two fp16 values of them: subnormal ones, code * 2^-24, which tensor cores multiply
// exactly. Codes of the lower eight rows stay kLift bits higher, which saves every second shift; a row
// has one factor for all of its sums.
//
// A step is as many sub-blocks as fill whole 16 bytes a lane: [row tile][step][vector][lane] uint4. Beside them are
// the cells of every step's columns, of 1, 2 or 4 sub-blocks of one group each: [row tile][step] scales [cell][16]
// fp16 and, where zeros differ, zeros [cell][16] in bytes.
#pragma once
#include "mma.cuh"

namespace {

constexpr int kTileRows = 16;
constexpr int kSub = 32;  // columns of a sub-block
constexpr float kUnit = 0x1p24f;  // one over what a code of 1 is as an fp16 value

// Sub-blocks of a step.
template <int BITS>
constexpr int kSubs = BITS < 4 ? 8 : BITS < 16 ? 4 : 2;

// Vectors of 16 bytes that a lane has of a step.
template <int BITS>
constexpr int kVectors = kSubs<BITS> * BITS / 8;

// Bits by which codes of the lower rows are too high in their pairs.
template <int BITS>
constexpr int kLift = BITS < 8 ? BITS : 0;

// With 3 bits two sub-blocks share three words of five pairs each: which of the sixteen come one after the
// other. The sixteenth is in the bits that are left.
__device__ constexpr int kThrees[3][5] = {{0, 1, 2, 3, 4}, {6, 5, 8, 7, 9}, {10, 11, 12, 13, 14}};

// The last pair of three words.
__device__ __forceinline__ unsigned spare_pair(const unsigned* words) {
    return (words[0] >> 12 & 0x00080008u) | (words[1] >> 11 & 0x00100010u) | (words[2] >> 10 & 0x00200020u);
}

// Pair `at` of the others; all of it is known to the compiler.
__device__ __forceinline__ unsigned pair_of_three(const unsigned* words, int at) {
    unsigned pair = 0;
#pragma unroll
    for (int word = 0; word < 3; ++word)
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            const int lift = at % 2 * 3;
            if (kThrees[word][i] == at) pair = words[word] >> (3 * i - lift) & 0x00070007u << lift;
        }
    return pair;
}

// The pairs of one sub-block of a lane's words of a step.
template <int BITS>
__device__ __forceinline__ void pairs_of(const unsigned (&words)[4 * kVectors<BITS>], int sub,
                                         unsigned (&a)[2][4]) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int f = 0; f < 4; ++f) {
            const int pair = 4 * t + f;
            if (BITS == 2) {
                a[t][f] = words[sub] >> (pair / 2 * 4) & 0x00030003u << (f % 2 * 2);
            } else if (BITS == 3) {
                const unsigned* three = words + sub / 2 * 3;
                const int at = sub % 2 * 8 + pair;
                a[t][f] = at == 15 ? spare_pair(three) : pair_of_three(three, at);
            } else if (BITS == 4) {
                a[t][f] = words[2 * sub + t] >> (f / 2 * 8) & 0x000f000fu << (f % 2 * 4);
            } else if (BITS == 8) {
                a[t][f] = words[4 * sub + 2 * t + f / 2] >> (8 * (f % 2)) & 0x00ff00ffu;
            } else {
                a[t][f] = words[8 * sub + pair];
            }
        }
    }
}

// One word of a lane's words of a step; `code(sub, pair, half)` is the code in its place.
template <int BITS, class Code>
__device__ __forceinline__ unsigned word_of(int word, Code code) {
    unsigned bits = 0;
    for (int half = 0; half < 2; ++half) {
        const int to = 16 * half;
        if (BITS == 2) {
            for (int i = 0; i < 8; ++i) bits |= code(word, i, half) << (2 * i + to);
        } else if (BITS == 3) {
            const int first = word / 3 * 2, third = word % 3;
            for (int i = 0; i < 5; ++i) {
                const int at = kThrees[third][i];
                bits |= code(first + at / 8, at % 8, half) << (3 * i + to);
            }
            bits |= (code(first + 1, 7, half) >> third & 1) << (15 + to);
        } else if (BITS == 4) {
            for (int f = 0; f < 4; ++f) bits |= code(word / 2, word % 2 * 4 + f, half) << (4 * f + to);
        } else if (BITS == 8) {
            for (int i = 0; i < 2; ++i) {
                bits |= code(word / 4, word % 4 * 2 + i, half) << (8 * i + to);
            }
        } else {
            bits |= code(word / 8, word % 8, half) << to;
        }
    }
    return bits;
}

}  // namespace
