// How weights that stay on the device lie: tiles in the order in which tensor cores take them.
//
// A weight [rows, columns] is cut into tiles of 16 rows, and its columns (side by side by group, filled
// up with columns that nothing is multiplied with) into sub-blocks of 32. A lane of a warp holds of a
// sub-block the columns 8 (lane % 4) .. + 7 of rows lane / 4 and lane / 4 + 8: what it gives to one product
// m16n8k32 of bytes, or of fp16 values to two products m16n8k16, whose sums do not mind in which order columns
// come. A lane so takes eight neighbors of a token's row as the other operand.
//
// Codes: register r of a lane's four is row lane / 4 + 8 (r % 2), columns 8 (lane % 4) + 4 (r / 2) .. + 3, a byte
// each. They lie in the bytes of a word, so that a mask makes an operand of them; codes of the lower eight rows stay
// kLift bits higher, which saves every second shift: a row has one factor for all of its sums.
//
// fp16: pair i = 4 t + f of a lane's eight pairs is register f of product t: row lane / 4 + 8 (f % 2), columns
// 8 (lane % 4) + 4 t + 2 (f / 2) and the next.
//
// A step is as many sub-blocks as fill whole 16 bytes a lane: [row tile][step][vector][lane] uint4. Beside them are
// the cells of every step's columns, of 1, 2 or 4 sub-blocks of one group each: [row tile][step] scales
// [cell][8][2] fp16, of rows i and i + 8 side by side, and, where zeros differ, zeros [cell][8][2] in bytes.
#pragma once
#include "mma.cuh"

namespace {

constexpr int kTileRows = 16;
constexpr int kSub = 32;  // columns of a sub-block

// Sub-blocks of a step.
template <int BITS>
constexpr int kSubs = BITS < 4 ? 8 : BITS < 16 ? 4 : 2;

// Vectors of 16 bytes that a lane has of a step.
template <int BITS>
constexpr int kVectors = kSubs<BITS> * BITS / 8;

// Bits by which codes of the lower rows are too high in their bytes.
template <int BITS>
constexpr int kLift = BITS < 8 ? BITS : 0;

// The operand of one sub-block of a lane's words of a step. With 3 bits two sub-blocks share three words: six of
// their registers are in the low bits of bytes, two in the highest two bits of all three words.
template <int BITS>
__device__ __forceinline__ void operand_of(const unsigned (&words)[4 * kVectors<BITS>], int sub, unsigned (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int lift = r % 2 * kLift<BITS>;
        if (BITS == 2) {
            a[r] = words[sub] >> (r / 2 * 4) & 0x03030303u << lift;
        } else if (BITS == 3) {
            const unsigned* three = words + sub / 2 * 3;
            const int at = sub % 2 * 4 + r;
            if (at < 6) {
                a[r] = three[at / 2] & 0x07070707u << lift;
            } else if (at == 6) {
                a[r] = (three[0] >> 6 & 0x03030303u) | (three[1] >> 4 & 0x04040404u);
            } else {
                a[r] = (three[1] >> 4 & 0x08080808u) | (three[2] >> 2 & 0x30303030u);
            }
        } else if (BITS == 4) {
            a[r] = words[2 * sub + r / 2] & 0x0f0f0f0fu << lift;
        } else {
            a[r] = words[4 * sub + r];
        }
    }
}

// One word of a lane's words of a step; `code(sub, register, byte)` is the code in its place, of fp16
// `code(sub, pair, half)`.
template <int BITS, class Code>
__device__ __forceinline__ unsigned word_of(int word, Code code) {
    unsigned bits = 0;
    if (BITS == 16) return code(word / 8, word % 8, 0) | code(word / 8, word % 8, 1) << 16;
    for (int byte = 0; byte < 4; ++byte) {
        const int to = 8 * byte;
        if (BITS == 2) {
            for (int r = 0; r < 4; ++r) bits |= code(word, r, byte) << (2 * r + to);
        } else if (BITS == 3) {
            const int first = word / 3 * 2, third = word % 3;
            for (int i = 0; i < 2; ++i) {
                const int at = 2 * third + i;
                bits |= code(first + at / 4, at % 4, byte) << (3 * i + to);
            }
            const unsigned spare = code(first + 1, 2, byte) | code(first + 1, 3, byte) << 3;
            bits |= (spare >> (2 * third) & 3) << (6 + to);
        } else if (BITS == 4) {
            for (int i = 0; i < 2; ++i) bits |= code(word / 2, word % 2 * 2 + i, byte) << (4 * i + to);
        } else {
            bits |= code(word / 4, word % 4, byte) << to;
        }
    }
    return bits;
}

}  // namespace
