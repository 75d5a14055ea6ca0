// pack: codes into the AutoGPTQ bit stream along in_features.
//
// Column r of qweight is one little-endian bit stream: code k of row r of the weights takes bits
// [bits k, bits (k + 1)) of words qweight[0.., r]. 32 codes fill `bits` whole words for every width.
//
// Layout   codes [rows, n] u8 in column order, n a multiple of 32; qweight [n / 32 * bits, rows] u32.
// Launch   256 threads; a CTA packs 32 rows x 256 codes. Rows are read 32 B a quarter-warp into shared
//          memory (a row padded by one word: lane = row then walks 32 different banks); warp u packs
//          unit u of 32 codes for 32 rows, and its stores are 128 consecutive bytes.
// Regime   memory: 1 B read and bits/8 B written a code. Bound: 0.35 GB, 0.12 ms at 3 TB/s, for
//          28672 x 8192 at 4 bits.

namespace {

constexpr int kRows = 32;
constexpr int kUnits = 8;
constexpr int kWords = kUnits * 32 / 4;  // words of codes in a row of the tile

// Packs 32 codes, four to a word of `codes`, into BITS words.
template <int BITS>
__device__ __forceinline__ void pack_unit(const unsigned (&codes)[8], unsigned (&words)[BITS]) {
#pragma unroll
    for (int w = 0; w < BITS; ++w) words[w] = 0;
#pragma unroll
    for (int k = 0; k < 32; ++k) {
        const unsigned code = (codes[k / 4] >> (8 * (k % 4))) & 0xffu;
        const int bit = k * BITS, word = bit / 32, shift = bit % 32;
        words[word] |= code << shift;
        if (shift + BITS > 32) words[word + 1 < BITS ? word + 1 : word] |= code >> (32 - shift);
    }
}

template <int BITS>
__device__ __forceinline__ void pack(const unsigned char* codes, unsigned* qweight, int rows,
                                     int n) {
    __shared__ unsigned tile[kRows][kWords + 1];
    const int first_row = blockIdx.y * kRows, first_word = blockIdx.x * kWords;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int at = threadIdx.x; at < kRows * kWords; at += blockDim.x) {
        const int row = first_row + at / kWords, word = first_word + at % kWords;
        const bool inside = row < rows && word < n / 4;
        const unsigned* from = reinterpret_cast<const unsigned*>(codes + (long long)row * n);
        tile[at / kWords][at % kWords] = inside ? from[word] : 0;
    }
    __syncthreads();
    const int unit = blockIdx.x * kUnits + warp, row = first_row + lane;
    if (row >= rows || unit >= n / 32) return;
    unsigned four[8], words[BITS];
#pragma unroll
    for (int k = 0; k < 8; ++k) four[k] = tile[lane][8 * warp + k];
    pack_unit<BITS>(four, words);
#pragma unroll
    for (int w = 0; w < BITS; ++w) qweight[((long long)unit * BITS + w) * rows + row] = words[w];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
pack_2(const unsigned char* codes, unsigned* qweight, int rows, int n) {
    pack<2>(codes, qweight, rows, n);
}
extern "C" __global__ void __launch_bounds__(256)
pack_3(const unsigned char* codes, unsigned* qweight, int rows, int n) {
    pack<3>(codes, qweight, rows, n);
}
extern "C" __global__ void __launch_bounds__(256)
pack_4(const unsigned char* codes, unsigned* qweight, int rows, int n) {
    pack<4>(codes, qweight, rows, n);
}
extern "C" __global__ void __launch_bounds__(256)
pack_8(const unsigned char* codes, unsigned* qweight, int rows, int n) {
    pack<8>(codes, qweight, rows, n);
}
