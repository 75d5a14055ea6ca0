// dequant: the weights of a GPTQ checkpoint in fp16.
//
//   weight[r, k] = fp16(scales[g, r] * (code[k, r] - zero[g, r])),  g = g_idx[k]
//
// Codes run down a column of qweight and zeros, stored minus one, along a row of qzeros, both as one
// little-endian bit stream (see pack.cu). A zero of 0 is stored as all ones: adding one wraps.
//
// Layout   qweight [n / 32 * bits, rows] u32, qzeros [groups, rows / 32 * bits] u32, scales
//          [groups, rows] fp16, g_idx [n] i32, weight [rows, n] fp16; n and rows multiples of 32.
// Launch   256 threads; a CTA unpacks 32 rows x 256 codes: warp u takes unit u of 32 codes, lane =
//          row (reads are 128 consecutive bytes), and the tile turns in shared memory so that a warp
//          writes 512 consecutive bytes of a row. Rows of the tile are padded by 8 B, so a half-warp
//          of 8 B reads or writes covers all banks.
// Regime   memory: bits/8 B read and 2 B written a weight; scales and zeros come from L1 and L2 and
//          are fetched again only where g_idx changes (every code under act-order: 2 + bits/8 B a
//          weight more from L2).
// Bound    0.59 GB, 0.20 ms at 3 TB/s, for 28672 x 8192 at 4 bits.

#include "half.cuh"

namespace {

constexpr int kRows = 32;
constexpr int kUnits = 8;
constexpr int kColumns = kUnits * 32;

// Value `at` of a bit stream whose words lie `stride` apart.
template <int BITS>
__device__ __forceinline__ unsigned stream_value(const unsigned* words, int at) {
    const int bit = at * BITS, shift = bit % 32;
    unsigned long long pair = words[bit / 32];
    if (shift + BITS > 32) pair |= (unsigned long long)words[bit / 32 + 1] << 32;
    return (unsigned)(pair >> shift) & ((1u << BITS) - 1);
}

// The 32 codes of BITS words held in registers; every shift is a constant.
template <int BITS>
__device__ __forceinline__ unsigned unit_value(const unsigned (&words)[BITS], int k) {
    const int bit = k * BITS, word = bit / 32, shift = bit % 32;
    unsigned value = words[word] >> shift;
    if (shift + BITS > 32) value |= words[word + 1 < BITS ? word + 1 : word] << (32 - shift);
    return value & ((1u << BITS) - 1);
}

template <int BITS>
__device__ __forceinline__ void dequantize(const unsigned* qweight, const unsigned* qzeros,
                                           const half_t* scales, const int* g_idx, half_t* weight,
                                           int rows, int n) {
    __shared__ __align__(16) half_t tile[kRows][kColumns + 4];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = blockIdx.y * kRows + lane, unit = blockIdx.x * kUnits + warp;
    if (unit < n / 32) {
        unsigned words[BITS];
#pragma unroll
        for (int w = 0; w < BITS; ++w) words[w] = qweight[((long long)unit * BITS + w) * rows + row];
        int group = -1;
        float scale = 0.0f, zero = 0.0f;
#pragma unroll
        for (int k = 0; k < 32; ++k) {
            const int g = g_idx[unit * 32 + k];
            if (g != group) {
                group = g;
                scale = half_to_float(scales[(long long)g * rows + row]);
                const unsigned* zeros = qzeros + (long long)g * (rows / 32 * BITS);
                zero = (float)((stream_value<BITS>(zeros, row) + 1) & ((1u << BITS) - 1));
            }
            const float steps = (float)unit_value<BITS>(words, k) - zero;
            tile[lane][32 * warp + k] = float_to_half(__fmul_rn(scale, steps));
        }
    }
    __syncthreads();
    const int columns = min(kColumns, n - (int)blockIdx.x * kColumns);
    for (int r = warp; r < kRows; r += kUnits) {
        half_t* to = weight + (long long)(blockIdx.y * kRows + r) * n + blockIdx.x * kColumns;
        for (int c = 4 * lane; c < columns; c += 128) {
            *reinterpret_cast<uint2*>(to + c) = *reinterpret_cast<const uint2*>(&tile[r][c]);
        }
    }
}

}  // namespace

#define DEQUANT(bits)                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                              \
    dequant_##bits(const unsigned* qweight, const unsigned* qzeros, const half_t* scales,          \
                   const int* g_idx, half_t* weight, int rows, int n) {                            \
        dequantize<bits>(qweight, qzeros, scales, g_idx, weight, rows, n);                         \
    }
DEQUANT(2)
DEQUANT(3)
DEQUANT(4)
DEQUANT(8)
