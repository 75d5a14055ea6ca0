// attention: causal softmax(q k^T / sqrt(D)) v per window and head, without scores in memory.
//
// Layout   q, out [windows * seq_len, heads * D], k, v [windows * seq_len, kv_heads * D], fp16 row
//          major; query head h reads key head h / (heads / kv_heads). Of one window, k and v may have `past`
//          rows more: keys before the first query, which all queries see.
// Launch   grid (query tiles, heads, windows), 128 threads: 4 warps of 32 queries; dynamic shared
//          memory (128 + 2 * 64) * (D + 8) halves. Tile 0 of the grid is the last of the window,
//          since late queries see most keys and should start first.
// Regime   tensor cores. A block holds its queries and walks over the keys in steps of 64; while a
//          step multiplies by K its V is on the way, and the next K while it multiplies by V.
// Bound    2 * D * seq_len^2 operations a head and window (half of a full product): 0.035 PFLOP for
//          64 heads of 128 and 128 windows of 4096, 0.1 s at 350 TFLOP/s.
#include "attention.cuh"

namespace {

constexpr int ROW_TILES = 2;
constexpr int KEYS = 64;
constexpr int QUERIES = WARPS * ROW_TILES * 16;

// Queues the copy of ROWS rows of D values from `from` (row stride `stride`); rows from `rows` on
// become zeros.
template <int D, int ROWS>
__device__ __forceinline__ void copy_tile(unsigned to, const half_t* from, long long stride, int rows) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = row < rows;
        copy_async_16(to + (row * (CHUNKS + 1) + chunk) * 16,
                      from + (valid ? row : 0) * stride + chunk * 8, valid);
    }
}

// Hides keys that a query may not see: later ones, and those past the window.
__device__ __forceinline__ void mask(float (&s)[KEYS / 8][4], int first_query, int first_key, int keys,
                                     int lane) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
            int query = first_query + lane / 4 + i / 2 * 8;
            if (key > query || key >= keys) s[n][i] = -__int_as_float(0x7f800000);
        }
}

// Divides by the sums and writes the rows inside the window.
template <int D>
__device__ __forceinline__ void store(half_t* to, long long stride, float (&out)[D / 8][4], float (&sum)[2],
                                      int first_query, int seq_len, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        float inverse = 1.0f / total;
        int query = first_query + lane / 4 + half * 8;
        if (query >= seq_len) continue;
        half_t* row = to + query * stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *reinterpret_cast<half2_t*>(row + n * 8) =
                floats_to_half2(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
        }
    }
}

template <int D>
__device__ __forceinline__ void attention(const half_t* q, const half_t* k, const half_t* v, half_t* out,
                                          int heads, int kv_heads, int seq_len, int past, float scale) {
    extern __shared__ uint4 shared[];
    constexpr int PITCH = (D / 8 + 1) * 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const long long q_stride = (long long)heads * D, kv_stride = (long long)kv_heads * D;
    const long long window = (long long)blockIdx.z * seq_len;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    q += window * q_stride + head * D;
    out += window * q_stride + head * D;
    k += window * kv_stride + kv_head * D;
    v += window * kv_stride + kv_head * D;

    const unsigned q_at = shared_address(shared);
    const unsigned k_at = q_at + QUERIES * PITCH, v_at = k_at + KEYS * PITCH;
    const unsigned my_q = q_at + warp * ROW_TILES * 16 * PITCH;
    const int my_query = tile + warp * ROW_TILES * 16;
    const int keys = past + seq_len;
    const int steps = (past + min(tile + QUERIES, seq_len) + KEYS - 1) / KEYS;

    float sums[ROW_TILES][D / 8][4] = {};
    float top[ROW_TILES][2], sum[ROW_TILES][2] = {};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) top[r][0] = top[r][1] = -__int_as_float(0x7f800000);

    copy_tile<D, QUERIES>(q_at, q + tile * q_stride, q_stride, seq_len - tile);
    copy_tile<D, KEYS>(k_at, k, kv_stride, keys);
    copy_async_commit();
    for (int step = 0; step < steps; step++) {
        const int first_key = step * KEYS;
        // A warp whose last query comes before the first key has nothing to do but copy.
        const bool seen = first_key < past + my_query + ROW_TILES * 16;
        float s[ROW_TILES][KEYS / 8][4];
        copy_async_wait<0>();
        __syncthreads();
        copy_tile<D, KEYS>(v_at, v + first_key * kv_stride, kv_stride, keys - first_key);
        copy_async_commit();
        if (seen) scores<D, ROW_TILES, KEYS>(s, my_q, k_at, lane);
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) {
            const int next = first_key + KEYS;
            copy_tile<D, KEYS>(k_at, k + next * kv_stride, kv_stride, keys - next);
        }
        copy_async_commit();
        if (!seen) continue;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const int query = past + my_query + r * 16;  // as keys are counted
            if (first_key + KEYS > min(query + 1, keys)) mask(s[r], query, first_key, keys, lane);
            soften<D, KEYS>(s[r], sums[r], top[r], sum[r], scale);
        }
        weigh<D, ROW_TILES, KEYS>(sums, s, v_at, lane);
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        store<D>(out, q_stride, sums[r], sum[r], my_query + r * 16, seq_len, lane);
    }
}

}  // namespace

// scale is log2(e) / sqrt(D).
#define ATTENTION(D)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_##D(                       \
        const half_t* q, const half_t* k, const half_t* v, half_t* out, int heads, int kv_heads,  \
        int seq_len, int past, float scale) {                                                     \
        attention<D>(q, k, v, out, heads, kv_heads, seq_len, past, scale);                        \
    }

ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
ATTENTION(80)
ATTENTION(96)
ATTENTION(128)
